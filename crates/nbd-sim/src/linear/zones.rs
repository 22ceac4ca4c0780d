//! Registers in which each value has one origin.

use super::{Reason, Register};
use crate::history::{Moment, Value};

/// When a value was there: what is known from its write and its reads.
struct Zone {
    value: Value,
    /// The first of its operations to end.
    first_end: Moment,
    /// The last of its operations to begin.
    last_start: Moment,
}

impl Zone {
    /// Whether the value was surely there from `first_end` to `last_start`. Otherwise all its
    /// operations overlap, and it need only have been there at one moment in between.
    fn is_forward(&self) -> bool {
        self.first_end < self.last_start
    }
}

/// Looks for values in each other's way. Zeroes count as one value only for the write with which
/// the register began; other writes of zeroes were never seen, and are values of their own.
pub(super) fn check(register: &Register) -> Result<(), Reason> {
    let mut zones: Vec<Zone> = Vec::with_capacity(register.writes.len());
    let one_zero = register.writes.iter().filter(|write| write.value == Value::ZERO).count() == 1;
    for write in &register.writes {
        let mut zone = Zone { value: write.value, first_end: write.end, last_start: write.asked };
        if write.value != Value::ZERO || one_zero {
            for read in register.reads.iter().filter(|read| read.value == write.value) {
                zone.first_end = zone.first_end.min(read.end);
                zone.last_start = zone.last_start.max(read.asked);
            }
        }
        zones.push(zone);
    }
    let (mut forward, backward): (Vec<_>, Vec<_>) = zones.into_iter().partition(Zone::is_forward);
    forward.sort_by_key(|zone| zone.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(Reason::Reappeared(pair[0].value, pair[1].value));
        }
    }
    for inner in &backward {
        // The last forward zone to begin before it is the only one that can hold all of it.
        let after = forward.partition_point(|zone| zone.first_end < inner.last_start);
        if let Some(outer) = after.checked_sub(1).map(|at| &forward[at])
            && inner.first_end < outer.last_start
        {
            return Err(Reason::Reappeared(outer.value, inner.value));
        }
    }
    Ok(())
}
