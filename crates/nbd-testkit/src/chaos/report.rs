//! What a run of chaos came to, for people.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::load::{Finished, Stall};

use super::Event;
use super::kind::Kind;

/// Counts, and how long clients stood still. Shown as a table.
#[derive(Debug, Clone)]
pub struct Report {
    /// Requests answered.
    pub operations: u64,
    /// Requests that were never answered, since what their client was attached to was ended.
    pub lost: u64,
    /// Operations on the shared region that went into the check of histories.
    pub checked: usize,
    /// Faults.
    pub faults: usize,
    reconnects: u64,
    /// By whether another node failed as well, kind of fault, and whether it hit the leader.
    rows: BTreeMap<(bool, Kind, bool), Row>,
}

#[derive(Debug, Clone, Default)]
struct Row {
    /// Longest stall of a client not attached to what was hit, for each fault, in order of length.
    stalls: Vec<Duration>,
    /// From the end of each fault until all clients had answers, in order of length.
    recoveries: Vec<Duration>,
}

impl Report {
    pub(super) fn new(events: &[Event], finished: &Finished, checked: usize) -> Self {
        let mut rows: BTreeMap<(bool, Kind, bool), Row> = BTreeMap::new();
        for (place, event) in events.iter().enumerate() {
            let next = events.get(place + 1).map(|next| next.begin);
            let within = |stall: &&Stall| {
                stall.end >= event.begin && next.is_none_or(|next| stall.end < next)
            };
            let bystander =
                |stall: &&Stall| !stall.reconnected && !event.victims.contains(&stall.node);
            let stalls = finished.stalls.iter().filter(within).filter(bystander);
            let row = rows.entry((event.second, event.kind, event.leader)).or_default();
            row.stalls.push(stalls.map(Stall::length).max().unwrap_or_default());
            row.recoveries.push(event.recovery);
        }
        for row in rows.values_mut() {
            row.stalls.sort_unstable();
            row.recoveries.sort_unstable();
        }
        let (operations, lost) = (finished.operations, finished.lost);
        let (reconnects, faults) = (finished.reconnects, events.len());
        Self { operations, lost, checked, faults, reconnects, rows }
    }
}

/// The value below which this percentage lies, of values in order; the highest of few.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let place = (sorted.len() * percent).div_ceil(100);
    sorted.get(place.saturating_sub(1)).copied().unwrap_or_default()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { operations, lost, checked, faults, reconnects, rows } = self;
        writeln!(
            f,
            "{faults} faults, {operations} requests answered, {lost} lost with their connection, \
             {reconnects} reconnections, {checked} operations in histories"
        )?;
        writeln!(f, "{:<28}{:>6}{:>42}{:>16}", "", "", "longest stall of other clients, ms", "")?;
        writeln!(
            f,
            "{:<28}{:>6}{:>14}{:>14}{:>14}{:>16}",
            "fault", "count", "p50", "p99", "max", "recovery max"
        )?;
        for ((second, kind, leader), Row { stalls, recoveries }) in rows {
            let second = if *second { " + one" } else { "" };
            let name = format!("{kind}{}{second}", kind.role(*leader));
            let ms = |time: Duration| time.as_millis();
            writeln!(
                f,
                "{name:<28}{:>6}{:>14}{:>14}{:>14}{:>16}",
                stalls.len(),
                ms(percentile(stalls, 50)),
                ms(percentile(stalls, 99)),
                ms(percentile(stalls, 100)),
                ms(percentile(recoveries, 100)),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_values_are_among_them() {
        let values: Vec<_> = (1..=10).map(Duration::from_millis).collect();
        assert_eq!(percentile(&values, 50), Duration::from_millis(5));
        assert_eq!(percentile(&values, 99), Duration::from_millis(10));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
