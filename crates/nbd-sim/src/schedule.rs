//! What happens next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::time::{Nanos, SimTime};

/// Events in the order of their time; those of one moment in the order in which they were planned.
#[derive(Debug)]
pub struct Schedule<E> {
    now: SimTime,
    planned: u64,
    heap: BinaryHeap<Reverse<Item<E>>>,
}

#[derive(Debug)]
struct Item<E> {
    at: SimTime,
    nth: u64,
    event: E,
}

impl<E> PartialEq for Item<E> {
    fn eq(&self, other: &Self) -> bool {
        self.nth == other.nth
    }
}

impl<E> Eq for Item<E> {}

impl<E> PartialOrd for Item<E> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Item<E> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.nth).cmp(&(other.at, other.nth))
    }
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Self { now: SimTime::default(), planned: 0, heap: BinaryHeap::new() }
    }
}

impl<E> Schedule<E> {
    /// The time of the last event taken.
    #[must_use]
    pub const fn now(&self) -> SimTime {
        self.now
    }

    /// Plans an event for `span` from now.
    pub fn after(&mut self, span: Nanos, event: E) {
        self.planned += 1;
        let item = Item { at: self.now.plus(span), nth: self.planned, event };
        self.heap.push(Reverse(item));
    }

    /// The next event, if there is any before `end`. It is now then.
    pub fn next_before(&mut self, end: SimTime) -> Option<E> {
        if self.heap.peek().is_none_or(|Reverse(item)| item.at >= end) {
            return None;
        }
        let Reverse(item) = self.heap.pop()?;
        self.now = item.at;
        Some(item.event)
    }

    /// Events taken and still to come.
    #[must_use]
    pub const fn planned(&self) -> u64 {
        self.planned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_the_order_of_planning() {
        let mut schedule = Schedule::default();
        schedule.after(5, 'c');
        schedule.after(3, 'a');
        schedule.after(3, 'b');
        let mut taken = String::new();
        while let Some(event) = schedule.next_before(SimTime(6)) {
            taken.push(event);
            if event == 'a' {
                schedule.after(0, 'd');
                schedule.after(10, 'e');
            }
        }
        assert_eq!(taken, "abdc");
        assert_eq!(schedule.now(), SimTime(5));
    }
}
