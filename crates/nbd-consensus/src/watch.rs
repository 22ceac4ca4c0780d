//! What this replica's ticks say about its leader: when votes may be given, and when to stand.

use crate::config::{GroupConfig, ReadMode};
use crate::fault::Fault;

/// Ticks between one attempt after a hint and the next of the replica first in rank, and between
/// the first attempts of two replicas: room for the one to win before the other asks.
const HINT_TICKS: u32 = 2;

/// Counts ticks since the start and since a leader was heard from.
///
/// raft-rs has counters of its own, but forgets them with its role. This one forgets nothing while
/// the replica lives, and what it forbids is not even shown to raft-rs.
#[derive(Debug)]
pub(crate) struct Watch {
    election_ticks: u32,
    /// Whether leaders may rely on not being voted out for an election timeout.
    leases: bool,
    /// Ticks from the start until votes may be given.
    hold_ticks: u32,
    /// Ticks since the start.
    uptime: u32,
    /// Ticks since a leader was last heard from; the maximum if none was.
    silence: u32,
    /// The leader last heard from.
    leader: Option<u64>,
    /// If the leader is thought to be dead.
    hint: Option<Hint>,
}

/// When to stand because a leader is thought to be dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hint {
    /// Ticks until the next attempt.
    wait: u32,
    /// Ticks between one attempt and the next: more for a higher rank. With the same for all, two
    /// replicas that a third with a longer log votes for neither of could stand at the same ticks
    /// for ever, each with its own vote, and with each term keep the third from standing. So the
    /// lower rank has attempts of its own in between; if its log is too short, its pre-vote fails,
    /// and the higher rank has its vote.
    period: u32,
}

impl Watch {
    /// At the start.
    pub(crate) fn new(config: &GroupConfig) -> Self {
        let holds = config.restarted && !config.makes(Fault::NoWaitAfterRestart);
        Self {
            election_ticks: config.election_ticks,
            leases: config.read_mode == ReadMode::Lease,
            // The first tick may come at once.
            hold_ticks: if holds { config.election_ticks + 1 } else { 0 },
            uptime: 0,
            silence: u32::MAX,
            leader: None,
            hint: None,
        }
    }

    /// A tick has passed.
    pub(crate) const fn tick(&mut self) {
        self.uptime = self.uptime.saturating_add(1);
        self.silence = self.silence.saturating_add(1);
        if let Some(hint) = &mut self.hint {
            hint.wait = hint.wait.saturating_sub(1);
        }
    }

    /// A leader of the current term was heard from.
    pub(crate) const fn heard(&mut self, leader: u64) {
        self.silence = 0;
        self.leader = Some(leader);
        self.hint = None;
    }

    /// The leader last heard from.
    pub(crate) const fn leader(&self) -> Option<u64> {
        self.leader
    }

    /// Forgets that a leader was heard from.
    pub(crate) const fn forget(&mut self) {
        self.silence = u32::MAX;
    }

    /// The leader may be dead. Of the other voters this is the one in place `rank`: it stands as
    /// soon as the leader's lease must have run out and those before it have had their turn.
    pub(crate) fn hint(&mut self, rank: u32) {
        let lease = if self.leases { self.election_ticks.saturating_sub(self.silence) } else { 0 };
        let turn = HINT_TICKS.saturating_mul(rank);
        let (wait, period) = (lease.saturating_add(turn), HINT_TICKS.saturating_add(turn));
        self.hint = Some(Hint { wait, period });
    }

    /// Drops the hint: another replica stands.
    pub(crate) const fn drop_hint(&mut self) {
        self.hint = None;
    }

    /// Whether to stand now because of a hint. If so, the next attempt is due in its turn.
    pub(crate) const fn take_attempt(&mut self) -> bool {
        match &mut self.hint {
            Some(hint) if hint.wait == 0 => {
                hint.wait = hint.period;
                true
            }
            _ => false,
        }
    }

    /// Whether it is too soon after a restart to give a vote.
    pub(crate) const fn holds_votes(&self) -> bool {
        self.uptime < self.hold_ticks
    }

    /// Whether the leader last heard from may hold a lease that counts on this replica.
    pub(crate) const fn in_lease(&self) -> bool {
        self.leases && self.silence < self.election_ticks
    }
}

#[cfg(test)]
mod tests {
    use nbd_topology::{ReplicaId, ShardId};

    use super::*;

    fn watch(change: impl Fn(&mut GroupConfig)) -> Watch {
        let mut config = GroupConfig::new(ShardId(0), ReplicaId::new(1).unwrap());
        config.restarted = false;
        change(&mut config);
        Watch::new(&config)
    }

    fn ticks(watch: &mut Watch, count: u32) {
        (0..count).for_each(|_| watch.tick());
    }

    #[test]
    fn votes_wait_for_an_election_timeout_and_a_tick_after_a_restart() {
        assert!(!watch(|_| ()).holds_votes());
        let mut watch = watch(|config| config.restarted = true);
        ticks(&mut watch, 12);
        assert!(watch.holds_votes());
        ticks(&mut watch, 1);
        assert!(!watch.holds_votes());
    }

    #[test]
    fn a_lease_lasts_an_election_timeout_from_the_last_word() {
        let mut watch = watch(|_| ());
        assert!(!watch.in_lease(), "nobody was heard from");
        for _ in 0..2 {
            watch.heard(2);
            ticks(&mut watch, 11);
            assert!(watch.in_lease());
        }
        ticks(&mut watch, 1);
        assert!(!watch.in_lease());
    }

    #[test]
    fn without_leases_nothing_has_to_run_out() {
        let mut watch = watch(|config| config.read_mode = ReadMode::Quorum);
        watch.heard(2);
        assert!(!watch.in_lease());
        watch.hint(0);
        assert!(watch.take_attempt() && !watch.take_attempt());
        ticks(&mut watch, 2);
        assert!(watch.take_attempt());
    }

    #[test]
    fn attempts_come_in_order_of_rank_once_the_lease_is_out() {
        for (rank, first, period) in [(0, 12, 2), (1, 14, 4), (2, 16, 6)] {
            let mut watch = watch(|_| ());
            watch.heard(2);
            ticks(&mut watch, 5);
            watch.hint(rank);
            let attempts: Vec<_> = (6..24)
                .filter(|_| {
                    watch.tick();
                    watch.take_attempt()
                })
                .collect();
            let expected: Vec<_> = (first..24).step_by(period).collect();
            assert_eq!(attempts, expected);
        }
        // A hint that comes late is acted upon at once, in the same order.
        let mut watch = watch(|_| ());
        watch.heard(2);
        ticks(&mut watch, 50);
        watch.hint(1);
        ticks(&mut watch, 1);
        assert!(!watch.take_attempt());
        ticks(&mut watch, 1);
        assert!(watch.take_attempt());
    }

    #[test]
    fn a_word_from_a_leader_cancels_the_hint() {
        let mut watch = watch(|_| ());
        watch.heard(2);
        watch.hint(0);
        watch.heard(3);
        ticks(&mut watch, 100);
        assert!(!watch.take_attempt());
        assert_eq!(watch.leader(), Some(3));
    }
}
