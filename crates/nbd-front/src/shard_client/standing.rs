//! How a session stands with the leaders of its shard, and what its client feels of their changes.
//!
//! A **stall** begins when an attachment is lost or given up while something is pending, or, if
//! nothing is, with the first request that comes before the session is attached again. It ends with
//! the first answer over a new attachment. A client that asks nothing meanwhile feels none.

use std::time::Duration;

use nbd_topology::ReplicaId;
use tokio::time::Instant;

use crate::route::LeaderAt;

/// See the module. The caller tells what happens, and is told what to count.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// Who it is attached to.
    leader: Option<LeaderAt>,
    /// Who it was attached to last.
    last: Option<ReplicaId>,
    /// Since when its client waits for a new attachment's first answer.
    stalled: Option<Instant>,
    /// How often `leader` has changed.
    changes: u64,
}

impl Standing {
    /// Who it is attached to. `None`: it waits for a leader.
    pub(crate) const fn leader(&self) -> Option<&LeaderAt> {
        self.leader.as_ref()
    }

    /// Rises when the leader changes.
    pub(crate) const fn changes(&self) -> u64 {
        self.changes
    }

    /// The attachment that there may be is lost or given up; `waiting` says whether anything is
    /// pending.
    pub(super) fn detached(&mut self, now: Instant, waiting: bool) {
        if self.leader.take().is_some() {
            self.changes += 1;
            if waiting {
                self.stalled.get_or_insert(now);
            }
        }
    }

    /// A request came that can only wait.
    pub(super) fn asked_in_vain(&mut self, now: Instant) {
        if self.last.is_some() {
            self.stalled.get_or_insert(now);
        }
    }

    /// There is a new attachment. Whether it is a failover: to another leader than the last.
    pub(super) fn attached(&mut self, leader: &LeaderAt) -> bool {
        let before = self.last.replace(leader.replica);
        self.leader = Some(leader.clone());
        self.changes += 1;
        before.is_some_and(|before| before != leader.replica)
    }

    /// The leader has answered. How long a stall was that ends by that.
    pub(super) fn answered(&mut self, now: Instant) -> Option<Duration> {
        let since = self.stalled.take()?;
        Some(now.saturating_duration_since(since))
    }

    /// Whether an answer would end a stall.
    pub(super) const fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leader(replica: u64) -> LeaderAt {
        LeaderAt {
            replica: ReplicaId::new(replica).unwrap(),
            node: format!("n{replica}").parse().unwrap(),
            grpc: format!("n{replica}:7400"),
            local: false,
        }
    }

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_stall_lasts_from_the_loss_to_the_first_answer() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        assert!(!standing.attached(&leader(1)), "the first is no failover");
        assert_eq!(standing.answered(start), None);
        standing.detached(after(start, 10), true);
        assert_eq!(standing.leader(), None);
        // An attachment that comes to nothing does not start it anew.
        assert!(standing.attached(&leader(2)));
        standing.detached(after(start, 50), true);
        standing.asked_in_vain(after(start, 60));
        assert!(!standing.attached(&leader(2)), "the same leader again");
        assert_eq!(standing.answered(after(start, 110)), Some(Duration::from_millis(100)));
        assert_eq!(standing.answered(after(start, 120)), None);
        assert_eq!(standing.leader(), Some(&leader(2)));
        assert_eq!(standing.changes(), 5);
    }

    #[test]
    fn a_client_that_asks_nothing_feels_nothing() {
        let (mut standing, start) = (Standing::default(), Instant::now());
        standing.asked_in_vain(start);
        assert!(!standing.is_stalled(), "it was never attached");
        standing.attached(&leader(1));
        standing.detached(start, false);
        standing.attached(&leader(2));
        assert!(!standing.is_stalled());
        // One that asks before there is a leader waits from then on.
        standing.detached(after(start, 1000), false);
        standing.asked_in_vain(after(start, 1200));
        standing.attached(&leader(1));
        assert_eq!(standing.answered(after(start, 1300)), Some(Duration::from_millis(100)));
    }
}
