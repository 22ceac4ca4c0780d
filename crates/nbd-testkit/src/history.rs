//! Whether what clients saw of a register can be put in one order that agrees with real time.
//!
//! Each value is written once, which makes this decidable at a glance (P. Gibbons and E. Korach,
//! "Testing Shared Memories", 1997): a write and the reads of its value form a cluster, which must
//! be contiguous in the order. Let `f` be the earliest end in a cluster and `s` its latest start.
//! With `f < s` the register must hold the value from `f` to `s`: a forward zone. Else it held it
//! at some moment from `s` to `f`: a backward zone. An order exists exactly if no read ends before
//! its write starts, no two forward zones overlap, and no backward zone lies inside a forward one.
//!
//! A write that was never answered may take effect at any time after its start, or never.

use std::collections::HashMap;
use std::fmt;

/// What a client did to a register, and saw of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// Whether it wrote `value`, else it read it.
    pub write: bool,
    /// The value.
    pub value: u64,
    /// When it was sent, in any unit. Above 0, which is the time of the register's first value.
    pub start: u64,
    /// When the answer was there. `None`: there was none. Reads without answer do not belong here.
    pub end: Option<u64>,
}

/// Why no order of a register's operations explains what was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// A value was read that nobody wrote.
    Invented(u64),
    /// A value was written twice: the history cannot be checked.
    WrittenTwice(u64),
    /// A value was read before anybody began to write it.
    Early(u64),
    /// Both values must have been there at one time.
    Overlap(u64, u64),
    /// The first value was there only while the second must have been.
    Inside(u64, u64),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invented(value) => write!(f, "{value:#x} was read and never written"),
            Self::WrittenTwice(value) => write!(f, "{value:#x} was written twice"),
            Self::Early(value) => write!(f, "{value:#x} was read before its write began"),
            Self::Overlap(one, other) => {
                write!(f, "{one:#x} and {other:#x} must both have been there at one time")
            }
            Self::Inside(value, around) => {
                write!(f, "{value:#x} was read while only {around:#x} can have been there")
            }
        }
    }
}

/// The operations on one value.
#[derive(Debug, Clone, Copy)]
struct Cluster {
    value: u64,
    write_start: Option<u64>,
    first_end: u64,
    last_start: u64,
    read: bool,
    answered: bool,
}

/// Checks the operations on a register that held `initial` at first.
///
/// # Errors
/// Why there is no order.
pub fn check(initial: u64, operations: &[Operation]) -> Result<(), Violation> {
    let clusters = clusters(initial, operations)?;
    let mut forward: Vec<&Cluster> =
        clusters.iter().filter(|c| c.first_end < c.last_start).collect();
    forward.sort_unstable_by_key(|cluster| cluster.first_end);
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(Violation::Overlap(pair[0].value, pair[1].value));
        }
    }
    for cluster in clusters.iter().filter(|c| c.first_end >= c.last_start) {
        // Forward zones are in order and apart: the last to begin before is the last to end.
        let before = forward.partition_point(|zone| zone.first_end < cluster.last_start);
        if let Some(zone) = before.checked_sub(1).map(|place| forward[place])
            && cluster.first_end < zone.last_start
        {
            return Err(Violation::Inside(cluster.value, zone.value));
        }
    }
    Ok(())
}

fn clusters(initial: u64, operations: &[Operation]) -> Result<Vec<Cluster>, Violation> {
    let empty = |value| Cluster {
        value,
        write_start: None,
        first_end: u64::MAX,
        last_start: 0,
        read: false,
        answered: false,
    };
    let first = Operation { write: true, value: initial, start: 0, end: Some(0) };
    let mut clusters: HashMap<u64, Cluster> = HashMap::new();
    for operation in std::iter::once(&first).chain(operations) {
        let cluster = clusters.entry(operation.value).or_insert_with(|| empty(operation.value));
        if operation.write {
            if cluster.write_start.replace(operation.start).is_some() {
                return Err(Violation::WrittenTwice(operation.value));
            }
            cluster.answered = operation.end.is_some();
        } else {
            cluster.read = true;
        }
        cluster.last_start = cluster.last_start.max(operation.start);
        cluster.first_end = cluster.first_end.min(operation.end.unwrap_or(u64::MAX));
    }
    for operation in operations.iter().filter(|operation| !operation.write) {
        let cluster = &clusters[&operation.value];
        let start = cluster.write_start.ok_or(Violation::Invented(operation.value))?;
        if operation.end.is_some_and(|end| end < start) {
            return Err(Violation::Early(operation.value));
        }
    }
    // A write that nobody was told of and nobody saw need not have happened.
    Ok(clusters.into_values().filter(|cluster| cluster.answered || cluster.read).collect())
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    fn write(value: u64, start: u64, end: u64) -> Operation {
        Operation { write: true, value, start, end: Some(end) }
    }

    fn lost(value: u64, start: u64) -> Operation {
        Operation { write: true, value, start, end: None }
    }

    fn read(value: u64, start: u64, end: u64) -> Operation {
        Operation { write: false, value, start, end: Some(end) }
    }

    #[test]
    fn what_a_register_may_do_passes() {
        assert_eq!(check(0, &[]), Ok(()));
        assert_eq!(
            check(0, &[read(0, 1, 2), write(7, 3, 6), read(0, 4, 5), read(7, 4, 5)]),
            Ok(())
        );
        assert_eq!(check(0, &[lost(7, 1), read(0, 5, 6), read(7, 8, 9)]), Ok(()));
        assert_eq!(check(0, &[lost(7, 1), write(8, 2, 3), read(8, 4, 5)]), Ok(()));
    }

    #[test]
    fn what_it_may_not_do_is_named() {
        let stale = [write(7, 1, 2), read(0, 3, 4)];
        assert!(matches!(check(0, &stale), Err(Violation::Overlap(..) | Violation::Inside(..))));
        let back = [write(7, 1, 2), write(8, 3, 4), read(7, 5, 6)];
        assert_eq!(check(0, &back), Err(Violation::Inside(8, 7)));
        let again = [lost(7, 1), read(7, 2, 3), write(8, 4, 5), read(8, 6, 7), read(7, 8, 9)];
        assert_eq!(check(0, &again), Err(Violation::Overlap(7, 8)));
        assert_eq!(check(0, &[read(5, 1, 2)]), Err(Violation::Invented(5)));
        assert_eq!(check(0, &[read(5, 1, 2), write(5, 3, 4)]), Err(Violation::Early(5)));
        assert_eq!(check(0, &[lost(5, 1), lost(5, 1)]), Err(Violation::WrittenTwice(5)));
    }

    /// Whether some order explains the operations, by trying all of them.
    fn explained(now: u64, left: &[Operation]) -> bool {
        let answered = left.iter().filter_map(|operation| operation.end);
        let Some(deadline) = answered.min() else { return true };
        (0..left.len()).any(|place| {
            let operation = left[place];
            let mut rest = left.to_vec();
            rest.remove(place);
            operation.start <= deadline
                && match operation.write {
                    true => explained(operation.value, &rest),
                    false => operation.value == now && explained(now, &rest),
                }
        })
    }

    #[test]
    fn small_histories_are_judged_as_by_trying_all_orders() {
        let mut random = StdRng::seed_from_u64(1);
        let (mut good, mut bad) = (0, 0);
        for _ in 0..20_000 {
            let writes = random.random_range(1..4);
            let mut operations = Vec::new();
            for place in 0..random.random_range(writes..7) {
                let start = random.random_range(1..12);
                let end = start + random.random_range(0..6);
                operations.push(match place < writes {
                    true if random.random_bool(0.3) => lost(place, start),
                    true => write(place, start, end),
                    false => read(random.random_range(0..writes), start, end),
                });
            }
            let expected = explained(99, &operations);
            *(if expected { &mut good } else { &mut bad }) += 1;
            assert_eq!(check(99, &operations).is_ok(), expected, "{operations:?}");
        }
        assert!(good > 1000 && bad > 1000, "{good} {bad}");
    }
}
