//! A leader's right to answer reads alone, for a while.
//!
//! A round of heartbeats that a majority answered proves that, when the round was sent, no other
//! leader had been elected, and that none will be before an election timeout has passed at those
//! that answered: each of them grants no vote until then. Every later leader needs one of them. A
//! follower counts ticks, the first of which may come at once; so the lease is that much shorter,
//! and shorter by a tenth again for clocks that do not run alike.

use std::time::Duration;

use crate::config::GroupConfig;
use crate::fault::Fault;
use crate::input::Timestamp;

/// The lease of this leader in its current term, if it has one.
#[derive(Debug)]
pub(crate) struct Lease {
    length: Duration,
    /// When the last round that counts was sent.
    from: Option<Timestamp>,
    /// Rounds up to this number do not count: they were sent to another set of voters.
    void_through: u64,
    /// Not to be had again in this term.
    given_up: bool,
}

impl Lease {
    /// No lease yet.
    pub(crate) fn new(config: &GroupConfig) -> Self {
        let length = if config.makes(Fault::LeaseOverlong) {
            config.tick.saturating_mul(config.election_ticks)
        } else {
            config.tick.saturating_mul(config.election_ticks - 1) / 10 * 9
        };
        Self { length, from: None, void_through: 0, given_up: false }
    }

    /// Round `number`, sent at `from`, was answered by a majority.
    pub(crate) fn renew(&mut self, number: u64, from: Timestamp) {
        if number > self.void_through && !self.given_up {
            self.from = self.from.max(Some(from));
        }
    }

    /// The voters changed. What a majority of the old ones granted may not bind a majority two
    /// changes on: rounds up to `number` no longer count.
    pub(crate) fn void(&mut self, number: u64) {
        self.from = None;
        self.void_through = number;
    }

    /// A transfer of leadership begins. The request to take over makes its receiver stand, and
    /// voters grant, inside the lease, and it may arrive at any time.
    pub(crate) const fn give_up(&mut self) {
        self.from = None;
        self.given_up = true;
    }

    /// Another term, or no leader any longer.
    pub(crate) const fn reset(&mut self) {
        self.from = None;
        self.given_up = false;
    }

    /// Whether it was given up in this term.
    pub(crate) const fn is_given_up(&self) -> bool {
        self.given_up
    }

    /// When it runs out.
    pub(crate) fn until(&self) -> Option<Timestamp> {
        self.from.map(|from| from.after(self.length))
    }
}

#[cfg(test)]
mod tests {
    use nbd_topology::{ReplicaId, ShardId};

    use super::*;

    const MS: u64 = 1_000_000;

    fn lease() -> Lease {
        Lease::new(&GroupConfig::new(ShardId(0), ReplicaId::new(1).unwrap()))
    }

    #[test]
    fn it_is_shorter_than_what_followers_wait() {
        let mut lease = lease();
        assert_eq!(lease.until(), None);
        lease.renew(1, Timestamp(1000 * MS));
        // 0.9 of eleven ticks of 25 ms.
        assert_eq!(lease.until(), Some(Timestamp(1000 * MS + 247_500_000)));
        lease.renew(2, Timestamp(900 * MS));
        assert_eq!(lease.until(), Some(Timestamp(1000 * MS + 247_500_000)), "never back");
    }

    #[test]
    fn rounds_of_other_voters_do_not_count() {
        let mut lease = lease();
        lease.renew(3, Timestamp(MS));
        lease.void(5);
        assert_eq!(lease.until(), None);
        lease.renew(5, Timestamp(MS));
        assert_eq!(lease.until(), None);
        lease.renew(6, Timestamp(MS));
        assert!(lease.until().is_some());
    }

    #[test]
    fn given_up_it_is_gone_for_the_term() {
        let mut lease = lease();
        lease.renew(1, Timestamp(MS));
        lease.give_up();
        lease.renew(2, Timestamp(MS));
        assert_eq!((lease.until(), lease.is_given_up()), (None, true));
        lease.reset();
        lease.renew(3, Timestamp(MS));
        assert!(lease.until().is_some());
    }
}
