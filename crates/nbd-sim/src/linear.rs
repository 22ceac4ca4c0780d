//! Whether what clients saw can be explained: is each sector one linearizable register?
//!
//! Every write has a value of its own, so that for most sectors a look at *zones* decides (Gibbons
//! and Korach): a value that was surely there at two moments was there in between, and no other
//! value may have been there then. Zeroes have no name of their own; where they can be of more than
//! one origin, a search over all possible orders decides.

mod search;
mod zones;

use std::collections::BTreeMap;
use std::fmt;

use crate::history::{Action, End, Moment, Operation, OperationId, Value};

/// A write of one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Write {
    /// `None` for what was there at the beginning.
    id: Option<OperationId>,
    value: Value,
    asked: Moment,
    /// Its effect comes before this.
    end: Moment,
    /// Whether it has an effect at all: it was answered, or its value was seen.
    certain: bool,
}

/// A read of one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Read {
    id: OperationId,
    value: Value,
    asked: Moment,
    end: Moment,
}

/// Everything that was done to one register.
#[derive(Debug, Clone, Default)]
struct Register {
    writes: Vec<Write>,
    reads: Vec<Read>,
}

/// What the checker found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order that explains everything.
    Linearizable,
    /// There is none.
    Violation(Violation),
    /// The search became too large: nothing is known of this sector.
    Undecided {
        /// The volume, counted from 0.
        volume: usize,
        /// The sector.
        sector: u64,
    },
}

/// A sector whose history nothing explains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The volume, counted from 0.
    pub volume: usize,
    /// The sector.
    pub sector: u64,
    /// What is wrong.
    pub reason: Reason,
    /// Everything that was done to the sector, in the order of asking.
    pub operations: Vec<(OperationId, Operation)>,
}

/// Why no order explains a sector's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// A value that nobody wrote.
    #[error("read {0:?} found value {1:?}, which was never written there")]
    Invented(OperationId, Value),
    /// A value from the future.
    #[error("read {0:?} found value {1:?} before it was written")]
    FromTheFuture(OperationId, Value),
    /// A value surely there before and after another one.
    #[error("value {0:?} was there before and after value {1:?}")]
    Reappeared(Value, Value),
    /// The search found no order; at this operation none was left.
    #[error("no order explains operation {0:?}")]
    NoOrder(OperationId),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { volume, sector, reason, operations } = self;
        write!(f, "sector {sector} of volume {volume}: {reason}")?;
        for (id, operation) in operations {
            let (what, value) = match &operation.action {
                Action::Write(_) => ("write", id.value()),
                Action::Zero(_) => ("zero ", Value::ZERO),
                Action::Read(range, found) => {
                    let at = usize::try_from(sector - range.start).unwrap_or_default();
                    ("read ", found.get(at).copied().unwrap_or(Value::ZERO))
                }
            };
            let (client, from) = (operation.client, operation.asked.0);
            write!(f, "\n  {what} #{} = {} by client {client}: {from} to ", id.0, value.0)?;
            match operation.end {
                End::Answered(end) => write!(f, "{}", end.0)?,
                End::Unknown(Moment::END) => write!(f, "never")?,
                End::Unknown(end) => write!(f, "never, without effect from {}", end.0)?,
            }
        }
        Ok(())
    }
}

/// Checks every sector of every volume.
#[must_use]
pub fn check(operations: &[Operation]) -> Verdict {
    let mut undecided = None;
    for ((volume, sector), register) in registers(operations) {
        match register.check() {
            Ok(true) => {}
            Ok(false) => {
                undecided.get_or_insert(Verdict::Undecided { volume, sector });
            }
            Err(reason) => {
                let operations = of_sector(operations, volume, sector);
                return Verdict::Violation(Violation { volume, sector, reason, operations });
            }
        }
    }
    undecided.unwrap_or(Verdict::Linearizable)
}

fn registers(operations: &[Operation]) -> BTreeMap<(usize, u64), Register> {
    let mut registers: BTreeMap<(usize, u64), Register> = BTreeMap::new();
    for (n, operation) in operations.iter().enumerate() {
        let (id, asked) = (OperationId(n), operation.asked);
        let (end, certain) = match operation.end {
            End::Answered(end) => (end, true),
            End::Unknown(end) => (end, false),
        };
        let (range, value) = match &operation.action {
            Action::Write(range) => (range, id.value()),
            Action::Zero(range) => (range, Value::ZERO),
            Action::Read(range, found) => {
                for (sector, &value) in range.clone().zip(found) {
                    let register = registers.entry((operation.volume, sector)).or_default();
                    register.reads.push(Read { id, value, asked, end });
                }
                continue;
            }
        };
        for sector in range.clone() {
            let register = registers.entry((operation.volume, sector)).or_default();
            register.writes.push(Write { id: Some(id), value, asked, end, certain });
        }
    }
    registers
}

fn of_sector(
    operations: &[Operation],
    volume: usize,
    sector: u64,
) -> Vec<(OperationId, Operation)> {
    let touches = |operation: &Operation| match &operation.action {
        Action::Write(range) | Action::Zero(range) | Action::Read(range, _) => {
            operation.volume == volume && range.contains(&sector)
        }
    };
    let all = operations.iter().enumerate().filter(|(_, operation)| touches(operation));
    all.map(|(n, operation)| (OperationId(n), operation.clone())).collect()
}

impl Register {
    /// Whether an order explains it; `Ok(false)` if that could not be found out.
    fn check(mut self) -> Result<bool, Reason> {
        let start = Moment::START;
        let id = None;
        let value = Value::ZERO;
        self.writes.insert(0, Write { id, value, asked: start, end: start, certain: true });
        for read in &self.reads {
            let mut origins = self.writes.iter().filter(|write| write.value == read.value);
            let Some(first) = origins.clone().map(|write| write.asked).min() else {
                return Err(Reason::Invented(read.id, read.value));
            };
            if read.end < first {
                return Err(Reason::FromTheFuture(read.id, read.value));
            }
            debug_assert!(origins.next().is_some());
        }
        // What may have had no effect, and was never seen, need not have had any.
        let reads = &self.reads;
        let seen = |value: Value| reads.iter().any(|read| read.value == value);
        self.writes.retain(|write| write.certain || seen(write.value));
        let zeroes = self.writes.iter().filter(|write| write.value == Value::ZERO).count();
        if zeroes > 1 && seen(Value::ZERO) {
            search::check(&self)
        } else {
            zones::check(&self).map(|()| true)
        }
    }
}

#[cfg(test)]
mod tests;
