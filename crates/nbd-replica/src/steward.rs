//! What the leader of a shard sees to by itself: that a node which is cordoned does not lead while
//! another could, and that replacements come to their end. Both are noted in the shard's log, so
//! that whoever leads goes on with them.
//!
//! A leader that is cordoned hands leadership over, and so does one that is to be replaced. Both
//! go the same way, and seldom: nothing is committed while another replica is asked to lead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nbd_consensus::Status;
use nbd_front::Route;
use nbd_topology::{NodeName, ReplicaId};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{info, warn};

use crate::admin_service::{Leader, relief};
use crate::group_task::GroupHandle;

/// Time between looks of a leader.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Time for another replica to take over: somewhat longer than an election timeout, after which the
/// request is void.
const HAND_OVER_MAX: Duration = crate::config::RAFT_TICK.saturating_mul(14);

/// Wait after a replica did not take over, doubled each time: while one is asked nothing is
/// committed.
const AGAIN_MIN: Duration = Duration::from_secs(2);

/// Longest such wait.
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// Time between log lines about a replacement that does not get on.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Why a leader hands leadership over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// Its node is cordoned: it goes on if all others are.
    Cordoned,
    /// Another replica takes its place: any other will do.
    Replaced,
}

/// When another replica may be asked to take over.
#[derive(Debug)]
struct Backoff {
    due: Instant,
    /// From the next attempt that comes to nothing to the one after it.
    wait: Duration,
}

/// Has a shard's steward look at once. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Nudge(Arc<Notify>);

impl Nudge {
    /// There is something to look after.
    pub(crate) fn now(&self) {
        self.0.notify_one();
    }
}

/// Looks after one shard while this node leads it.
#[derive(Debug)]
pub(crate) struct Steward {
    node: NodeName,
    group: GroupHandle,
    nudge: Nudge,
    stop: CancellationToken,
    /// When another replica may be asked to take over.
    again: Backoff,
    /// When it was last said that a replacement does not get on.
    said: Option<Instant>,
}

impl Steward {
    pub(crate) fn new(
        node: NodeName,
        group: GroupHandle,
        nudge: Nudge,
        stop: CancellationToken,
    ) -> Self {
        Self { node, group, nudge, stop, again: Backoff::new(), said: None }
    }

    /// Runs until the node stops.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.look_after()).await;
    }

    async fn look_after(&mut self) {
        let mut route = self.group.route();
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if route.wait_for(|now| now.serving).await.is_err() {
                return;
            }
            let replaced = self.finish_replacements().await;
            self.step_aside(&replaced).await;
            tokio::select! {
                () = self.nudge.0.notified() => {}
                changed = route.changed() => if changed.is_err() {
                    return;
                },
                _ = looks.tick() => {}
            }
        }
    }

    /// Removes replicas whose replacements vote, this one excepted: it leads. Gives those that are
    /// still to be removed.
    async fn finish_replacements(&mut self) -> BTreeSet<ReplicaId> {
        let reader = self.group.reader().clone();
        let me = reader.formation().map(|formed| formed.replica);
        let mut left = BTreeSet::new();
        for (old, new) in reader.replacements() {
            if !reader.membership().is_voter(new) {
                continue;
            }
            if me == Some(old) {
                left.insert(old);
                continue;
            }
            let shard = self.group.shard();
            match Leader::new(&self.group).remove(old).await {
                Ok(()) => {
                    info!(%shard, %old, %new, "replaced");
                    continue;
                }
                // A change of members is under way.
                Err(status) if status.code() == Code::Unavailable => {}
                Err(status) => {
                    if self.may_say() {
                        let reason = status.message();
                        warn!(%shard, %old, %new, reason, "the old replica cannot be removed yet");
                    }
                }
            }
            left.insert(old);
        }
        left
    }

    /// Whether it is time to say once more that a replacement does not get on.
    fn may_say(&mut self) -> bool {
        let due = self.said.is_none_or(|said| said.elapsed() >= LOG_INTERVAL);
        if due {
            self.said = Some(Instant::now());
        }
        due
    }

    /// Why this replica should not lead, if it should not.
    fn leaving(&self, replaced: &BTreeSet<ReplicaId>) -> Option<Leaving> {
        let reader = self.group.reader();
        if reader.formation().is_some_and(|formed| replaced.contains(&formed.replica)) {
            return Some(Leaving::Replaced);
        }
        reader.is_cordoned(&self.node).then_some(Leaving::Cordoned)
    }

    /// Hands leadership over if this replica should not lead and another one can.
    async fn step_aside(&mut self, replaced: &BTreeSet<ReplicaId>) {
        let Some(why) = self.leaving(replaced) else {
            self.again = Backoff::new();
            return;
        };
        if Instant::now() < self.again.due {
            return;
        }
        let Ok(status) = self.group.details().await else { return };
        let avoided = Leader::new(&self.group).avoided();
        let (shard, mut route) = (self.group.shard(), self.group.route());
        let Some(to) = heir(&status, why, &avoided, replaced) else {
            // One that is cordoned may have to go on for as long as it is.
            let stuck = why == Leaving::Replaced && status.transferring.is_none();
            if stuck && self.may_say() {
                warn!(%shard, "this replica is to be removed, but no other one can lead yet");
            }
            return;
        };
        info!(%shard, %to, ?why, "this replica should not lead: another one is asked to");
        if self.group.transfer(to).await.is_err() {
            return;
        }
        let elsewhere = |route: &Route| !route.serving;
        if tokio::time::timeout(HAND_OVER_MAX, route.wait_for(elsewhere)).await.is_ok() {
            self.again = Backoff::new();
        } else {
            let wait = self.again.failed(Instant::now());
            warn!(%shard, %to, ?wait, "it did not take over: it is asked again later");
        }
    }
}

impl Backoff {
    fn new() -> Self {
        Self { due: Instant::now(), wait: AGAIN_MIN }
    }

    /// Notes an attempt that came to nothing by `now`; gives the wait until the next one.
    fn failed(&mut self, now: Instant) -> Duration {
        let wait = self.wait;
        (self.due, self.wait) = (now + wait, (wait * 2).min(AGAIN_MAX));
        wait
    }
}

/// Whom a leader that leaves asks to lead: one that has caught up, and is neither `avoided` nor
/// about to be removed. Nobody while somebody has been asked already.
fn heir(
    status: &Status,
    why: Leaving,
    avoided: &BTreeSet<ReplicaId>,
    replaced: &BTreeSet<ReplicaId>,
) -> Option<ReplicaId> {
    if status.transferring.is_some() {
        return None;
    }
    let best = relief(status, &(avoided | replaced));
    match why {
        Leaving::Cordoned => best,
        // A cordoned one can carry out the removal as well as any.
        Leaving::Replaced => best.or_else(|| relief(status, replaced)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin_service::status_at;

    fn id(id: u64) -> ReplicaId {
        ReplicaId::new(id).unwrap()
    }

    /// Replica 1 leads, with 1000 entries committed; each peer is (id, matched).
    fn status(peers: &[(u64, u64)]) -> Status {
        let peers = peers.iter().map(|&(peer, matched)| (peer, matched, true, false));
        status_at(1000, &peers.collect::<Vec<_>>())
    }

    #[test]
    fn only_one_that_has_caught_up_is_asked_to_lead() {
        let (nobody, two) = (BTreeSet::new(), BTreeSet::from([id(2)]));
        for why in [Leaving::Cordoned, Leaving::Replaced] {
            let asked = |peers: &[(u64, u64)], avoided| heir(&status(peers), why, avoided, &nobody);
            assert_eq!(asked(&[(2, 1000), (3, 990)], &nobody), Some(id(2)));
            assert_eq!(asked(&[(2, 1000), (3, 990)], &two), Some(id(3)));
            assert_eq!(asked(&[(2, 500), (3, 400)], &nobody), None, "commits would stand still");
        }
    }

    #[test]
    fn a_cordoned_one_is_asked_only_by_one_that_is_replaced() {
        let (avoided, replaced) = (BTreeSet::from([id(2), id(3)]), BTreeSet::from([id(1)]));
        let status = status(&[(2, 1000), (3, 990)]);
        assert_eq!(heir(&status, Leaving::Cordoned, &avoided, &replaced), None);
        assert_eq!(heir(&status, Leaving::Replaced, &avoided, &replaced), Some(id(2)));
    }

    #[test]
    fn one_that_is_about_to_be_removed_is_not_asked() {
        let (avoided, replaced) = (BTreeSet::new(), BTreeSet::from([id(1), id(2)]));
        let status = status(&[(2, 1000), (3, 990)]);
        for why in [Leaving::Cordoned, Leaving::Replaced] {
            assert_eq!(heir(&status, why, &avoided, &replaced), Some(id(3)));
        }
    }

    #[test]
    fn nobody_is_asked_while_another_one_is() {
        let nobody = BTreeSet::new();
        let status = Status { transferring: Some(id(3)), ..status(&[(2, 1000), (3, 990)]) };
        for why in [Leaving::Cordoned, Leaving::Replaced] {
            assert_eq!(heir(&status, why, &nobody, &nobody), None);
        }
    }

    #[test]
    fn each_attempt_that_comes_to_nothing_is_followed_by_a_longer_wait() {
        let mut again = Backoff::new();
        let mut now = Instant::now();
        assert!(again.due <= now, "the first is made at once");
        for seconds in [2, 4, 8, 16, 32, 60, 60] {
            let wait = Duration::from_secs(seconds);
            assert_eq!(again.failed(now), wait);
            now += wait;
            assert_eq!(again.due, now);
        }
    }
}
