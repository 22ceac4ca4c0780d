//! Registers in which zeroes may be of more than one origin: a search over all orders.
//!
//! It goes through starts and ends of operations in time and keeps every state that the register
//! may be in: its value, and which of the operations under way have had their effect. An operation
//! takes effect as late as possible: only when one that ends needs it.

use std::collections::BTreeSet;

use super::{Reason, Register};
use crate::history::{Moment, OperationId, Value};

/// States kept at a time. Past it the search gives up.
const STATES_MAX: usize = 200_000;

/// Operations under way at a time, and those that may take effect at any later time.
const SLOTS: usize = 128;

/// The register's value, and a bit for each operation under way that has had its effect.
type State = (Value, u128);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    Read,
}

/// An operation under way, in its slot.
#[derive(Debug, Clone, Copy)]
struct Open {
    kind: Kind,
    value: Value,
}

#[derive(Debug, Clone, Copy)]
struct Operation {
    id: OperationId,
    open: Open,
    asked: Moment,
    end: Moment,
    certain: bool,
}

/// A start or an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Step {
    at: Moment,
    is_end: bool,
    operation: usize,
}

/// `Ok(false)` if there are too many states or operations to tell.
pub(super) fn check(register: &Register) -> Result<bool, Reason> {
    let operations = operations(register);
    let mut steps = Vec::with_capacity(operations.len() * 2);
    for (n, operation) in operations.iter().enumerate() {
        steps.push(Step { at: operation.asked, is_end: false, operation: n });
        if operation.end != Moment::END {
            steps.push(Step { at: operation.end, is_end: true, operation: n });
        }
    }
    steps.sort_unstable();
    let mut slots: [Option<Open>; SLOTS] = [None; SLOTS];
    let mut slot_of = vec![0; operations.len()];
    let mut states: BTreeSet<State> = BTreeSet::from([(Value::ZERO, 0)]);
    for step in steps {
        let operation = &operations[step.operation];
        if !step.is_end {
            let Some(slot) = slots.iter().position(Option::is_none) else { return Ok(false) };
            slots[slot] = Some(operation.open);
            slot_of[step.operation] = slot;
            states = states.into_iter().map(|state| settle(state, &slots)).collect();
            continue;
        }
        let slot = slot_of[step.operation];
        let Some(with) = with_effect(&states, slot, &slots) else { return Ok(false) };
        if operation.certain {
            states = with;
        } else {
            // It may also never have had an effect, and will not have one any more.
            states.extend(with);
        }
        slots[slot] = None;
        states = states.into_iter().map(|(value, done)| (value, done & !(1 << slot))).collect();
        if states.is_empty() {
            return Err(Reason::NoOrder(operation.id));
        }
    }
    Ok(true)
}

fn operations(register: &Register) -> Vec<Operation> {
    let mut operations = Vec::with_capacity(register.writes.len() + register.reads.len());
    for write in &register.writes {
        // The register begins with zeroes.
        let Some(id) = write.id else { continue };
        let open = Open { kind: Kind::Write, value: write.value };
        let (asked, end, certain) = (write.asked, write.end, write.certain);
        operations.push(Operation { id, open, asked, end, certain });
    }
    for read in &register.reads {
        let open = Open { kind: Kind::Read, value: read.value };
        let (id, asked, end) = (read.id, read.asked, read.end);
        operations.push(Operation { id, open, asked, end, certain: true });
    }
    operations
}

/// Lets every read under way that finds its value have it: to wait would gain it nothing.
fn settle((value, mut done): State, slots: &[Option<Open>; SLOTS]) -> State {
    for (slot, open) in slots.iter().enumerate() {
        if let Some(Open { kind: Kind::Read, value: wanted }) = open
            && *wanted == value
        {
            done |= 1 << slot;
        }
    }
    (value, done)
}

/// Every state in which the operation in `slot` has had its effect, reached by letting others have
/// theirs first as needed. `None` if there are too many.
fn with_effect(
    states: &BTreeSet<State>,
    slot: usize,
    slots: &[Option<Open>; SLOTS],
) -> Option<BTreeSet<State>> {
    let mut reached = BTreeSet::new();
    let mut seen = states.clone();
    let mut open: Vec<State> = states.iter().copied().collect();
    while let Some(state) = open.pop() {
        if state.1 & (1 << slot) != 0 {
            reached.insert(state);
            continue;
        }
        for (other, operation) in slots.iter().enumerate() {
            let Some(Open { kind: Kind::Write, value }) = operation else { continue };
            if state.1 & (1 << other) != 0 {
                continue;
            }
            let next = settle((*value, state.1 | (1 << other)), slots);
            if seen.insert(next) {
                open.push(next);
            }
        }
        if seen.len() > STATES_MAX {
            return None;
        }
    }
    Some(reached)
}
