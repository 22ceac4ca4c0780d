//! A node that its peers do without ends itself, so that whoever supervises it starts it anew.
//!
//! Such a node runs, and of a shard it takes no part: what it sends does not get out, say, or a
//! connection is stuck. Nobody misses it until the next fault. A new process has new connections,
//! and on most orchestrators a new place. The rule, looked at once a second:
//!
//! - For one shard at least, and without a break for the time that was configured, the shard's
//!   leader said to whoever asked for us that it has not heard from this replica. (A leader says so
//!   after a round to a majority, by way of any peer that this node can reach.)
//! - For each shard of this node the leader was heard, this very moment, and other replicas than
//!   this one are active in number enough to be a majority. So no shard loses its majority by this.
//! - This node leads no shard. None of its replicas is being formed, is learning or is catching up:
//!   a new process would begin that anew. Its disk is sound, as far as is known.
//!
//! Whatever is not known counts against ending: a node that reaches no peer stays, and of a cluster
//! that has fallen apart nobody ends. Nothing that was acknowledged depends on a process: what this
//! node has is on its disk, and it stops in good order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nbd_consensus::Role;
use nbd_rpc::{v1, within};
use nbd_topology::{ReplicaId, ShardId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::failure::Failure;
use crate::formation::{AdminPeers, Oneself};
use crate::group_task::GroupHandle;
use crate::join::RemovedShards;
use crate::peers::Addresses;
use crate::resync::ResyncProgress;

/// Time between looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Time for a peer to answer for the leader.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

/// A look that comes later than this after the one before shows that this process itself, or its
/// machine, stood still: what was seen before does not count any more.
const LOOK_GAP_MAX: Duration = Duration::from_secs(10);

/// How this node stands in one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It is no member any more, and has nothing to do with the shard.
    Gone,
    /// It leads, is being formed, learns or catches up.
    Busy,
    /// Nobody could say.
    Unknown,
    /// Without this node the shard has no majority.
    Needed,
    /// The leader hears from it, and could do without it.
    Counted,
    /// The leader does not hear from it, and has a majority of others.
    Isolated,
}

/// What the leader's list of members says of the replica `me`.
fn standing(me: ReplicaId, reply: &v1::MembersReply) -> Standing {
    let id = |member: &v1::Member| member.replica.as_ref().map(|replica| replica.id);
    let own = reply.members.iter().find(|member| id(member) == Some(me.get()));
    let voters = || reply.members.iter().filter(|member| member.voter);
    let others = voters().filter(|member| member.active && id(member) != Some(me.get())).count();
    match own {
        // Its own look at its membership deals with that.
        None => Standing::Unknown,
        Some(_) if reply.leader == me.get() => Standing::Busy,
        Some(own) if !own.voter || own.resyncing => Standing::Busy,
        Some(_) if others < voters().count() / 2 + 1 => Standing::Needed,
        Some(own) if own.active => Standing::Counted,
        Some(_) => Standing::Isolated,
    }
}

/// Remembers since when the node is isolated. Without clock and network.
#[derive(Debug)]
struct Rule {
    after: Duration,
    since: HashMap<ShardId, Instant>,
    looked: Option<Instant>,
}

impl Rule {
    fn new(after: Duration) -> Self {
        Self { after, since: HashMap::new(), looked: None }
    }

    /// Takes in how the node stands in each of its shards. `Some`: it is to end, for it was
    /// isolated in that shard for that long.
    fn look(
        &mut self,
        now: Instant,
        standings: &[(ShardId, Standing)],
    ) -> Option<(ShardId, Duration)> {
        if self.looked.is_some_and(|looked| now - looked > LOOK_GAP_MAX) {
            self.since.clear();
        }
        self.looked = Some(now);
        for &(shard, standing) in standings {
            match standing {
                Standing::Isolated => {
                    self.since.entry(shard).or_insert(now);
                }
                _ => {
                    self.since.remove(&shard);
                }
            }
        }
        let dispensable = |&(_, standing): &(ShardId, Standing)| {
            matches!(standing, Standing::Gone | Standing::Counted | Standing::Isolated)
        };
        if !standings.iter().all(dispensable) {
            return None;
        }
        let (shard, since) = self.since.iter().min_by_key(|(_, since)| **since)?;
        let lasted = now - *since;
        (lasted >= self.after).then_some((*shard, lasted))
    }
}

/// A shard of the node.
#[derive(Debug)]
pub(crate) struct WatchedShard {
    pub(crate) group: GroupHandle,
    pub(crate) resync: watch::Receiver<Option<ResyncProgress>>,
}

/// Looks whether the node is to end.
#[derive(Debug)]
pub(crate) struct IsolationWatch {
    pub(crate) after: Duration,
    pub(crate) shards: Vec<WatchedShard>,
    pub(crate) oneself: Arc<Oneself>,
    pub(crate) peers: Arc<AdminPeers>,
    pub(crate) addresses: Addresses,
    pub(crate) removed: RemovedShards,
    pub(crate) failure: Failure,
    /// Cancelled when the node stops.
    pub(crate) stop: CancellationToken,
    /// Told why the node is to end.
    pub(crate) verdict: watch::Sender<Option<String>>,
}

impl IsolationWatch {
    /// Runs until the node is to end, or stops.
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(Arc::new(self).watch()).await;
    }

    async fn watch(self: Arc<Self>) {
        let mut rule = Rule::new(self.after);
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_isolated = false;
        loop {
            looks.tick().await;
            let standings = self.look().await;
            if self.failure.is_set() {
                return;
            }
            let isolated = standings.iter().find(|(_, it)| *it == Standing::Isolated);
            match (was_isolated, isolated) {
                (false, Some((shard, _))) => {
                    warn!(%shard, after = ?self.after, "the leader does not hear from this node");
                }
                (true, None) => info!("the leaders hear from this node again, or are not known"),
                _ => {}
            }
            was_isolated = isolated.is_some();
            if let Some((shard, lasted)) = rule.look(Instant::now(), &standings) {
                let reason = format!(
                    "for {} s the leader of shard {shard} has not heard from this node, which \
                     hears of it: ending, so that a new process can begin",
                    lasted.as_secs()
                );
                error!(%reason, "isolated");
                self.verdict.send_replace(Some(reason));
                return;
            }
        }
    }

    /// How the node stands in each of its shards, all at this moment.
    async fn look(self: &Arc<Self>) -> Vec<(ShardId, Standing)> {
        let mut looking = JoinSet::new();
        for place in 0..self.shards.len() {
            let watch = Arc::clone(self);
            looking.spawn(async move {
                let shard = &watch.shards[place];
                (shard.group.shard(), watch.look_at(shard).await)
            });
        }
        looking.join_all().await
    }

    async fn look_at(&self, shard: &WatchedShard) -> Standing {
        let (group, status) = (&shard.group, shard.group.status());
        if self.removed.contains(group.shard()) {
            return Standing::Gone;
        }
        let Some(formation) = group.reader().formation() else { return Standing::Busy };
        let resyncing = shard.resync.borrow().is_some();
        if status.role == Role::Leader || !status.voter || resyncing {
            return Standing::Busy;
        }
        let replies = self.ask(group).await;
        // The newest leader's word counts: one that was cut off may not know that it was.
        let newest = replies.into_iter().max_by_key(|reply| reply.term);
        match newest {
            Some(reply) if reply.term >= status.term.0 => standing(formation.replica, &reply),
            _ => Standing::Unknown,
        }
    }

    /// What the leader says, by way of each of the other members.
    async fn ask(&self, group: &GroupHandle) -> Vec<v1::MembersReply> {
        let members = self.addresses.resolve(group.reader().replicas());
        let mut asking = JoinSet::new();
        for member in members.into_iter().filter(|member| member.node != self.oneself.node) {
            let Ok(mut client) = self.peers.client(&member.addresses.grpc) else { continue };
            let request = v1::MembersRequest { to: self.oneself.address(group.shard()) };
            asking.spawn(async move {
                // The deadline is the caller's too: what is sent may not get out.
                let asked = client.members(within(ASK_DEADLINE, request));
                let asked = tokio::time::timeout(ASK_DEADLINE, asked).await;
                asked.ok()?.ok().map(tonic::Response::into_inner)
            });
        }
        let mut replies = Vec::new();
        while let Some(reply) = asking.join_next().await {
            replies.extend(reply.ok().flatten());
        }
        replies
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(10);
    const A: ShardId = ShardId(0);
    const B: ShardId = ShardId(1);

    fn member(id: u64, active: bool) -> v1::Member {
        let replica = Some(v1::ReplicaInfo { id, ..Default::default() });
        v1::Member { replica, voter: true, active, ..Default::default() }
    }

    fn said(leader: u64, members: Vec<v1::Member>) -> Standing {
        let me = ReplicaId::new(3).unwrap();
        standing(me, &v1::MembersReply { leader, members, ..Default::default() })
    }

    #[test]
    fn the_leader_says_how_this_replica_stands() {
        let all = |three| vec![member(1, true), member(2, true), member(3, three)];
        assert_eq!(said(1, all(true)), Standing::Counted);
        assert_eq!(said(1, all(false)), Standing::Isolated);
        assert_eq!(said(3, all(true)), Standing::Busy, "it leads");
        let two = |three| vec![member(1, true), member(2, false), member(3, three)];
        assert_eq!(said(1, two(true)), Standing::Needed);
        assert_eq!(said(1, two(false)), Standing::Needed, "the shard has no majority at all");
        assert_eq!(said(1, vec![member(1, true), member(2, true)]), Standing::Unknown);
        let learning = v1::Member { voter: false, ..member(3, false) };
        assert_eq!(said(1, vec![member(1, true), member(2, true), learning]), Standing::Busy);
        let fetching = v1::Member { resyncing: true, ..member(3, false) };
        assert_eq!(said(1, vec![member(1, true), member(2, true), fetching]), Standing::Busy);
    }

    /// Looks once a second at what `at` says of each second; tells the second in which it ends.
    fn ends(seconds: u64, at: impl Fn(u64) -> Vec<(ShardId, Standing)>) -> Option<u64> {
        let (mut rule, began) = (Rule::new(AFTER), Instant::now());
        (0..seconds)
            .find(|second| rule.look(began + Duration::from_secs(*second), &at(*second)).is_some())
    }

    #[test]
    fn it_ends_after_the_time_and_not_before() {
        let always = |standing| move |_| vec![(A, standing)];
        assert_eq!(ends(60, always(Standing::Isolated)), Some(10));
        for never in
            [Standing::Gone, Standing::Busy, Standing::Unknown, Standing::Needed, Standing::Counted]
        {
            assert_eq!(ends(60, always(never)), None, "{never:?}");
        }
    }

    #[test]
    fn any_other_word_begins_the_time_anew() {
        let broken = |other| {
            move |second| vec![(A, if second % 8 == 7 { other } else { Standing::Isolated })]
        };
        for other in [Standing::Counted, Standing::Unknown, Standing::Needed, Standing::Busy] {
            assert_eq!(ends(120, broken(other)), None, "{other:?}");
        }
        let recovers =
            |second| vec![(A, if second == 5 { Standing::Counted } else { Standing::Isolated })];
        assert_eq!(ends(60, recovers), Some(16));
    }

    #[test]
    fn no_other_shard_may_suffer() {
        let with = |other| move |_| vec![(A, Standing::Isolated), (B, other)];
        for harmless in [Standing::Gone, Standing::Counted, Standing::Isolated] {
            assert_eq!(ends(60, with(harmless)), Some(10), "{harmless:?}");
        }
        for needed in [Standing::Busy, Standing::Needed, Standing::Unknown] {
            assert_eq!(ends(60, with(needed)), None, "{needed:?}");
        }
        // It ends as soon as the other shard allows it.
        let later = |second| {
            let other = if second < 20 { Standing::Busy } else { Standing::Counted };
            vec![(A, Standing::Isolated), (B, other)]
        };
        assert_eq!(ends(60, later), Some(20));
    }

    #[test]
    fn a_node_that_stood_still_knows_nothing_of_the_time_in_between() {
        let (mut rule, began) = (Rule::new(AFTER), Instant::now());
        let mut look = |second| {
            rule.look(began + Duration::from_secs(second), &[(A, Standing::Isolated)]).is_some()
        };
        assert!(!look(0) && !look(1));
        assert!(!look(100), "it was stopped for as long");
        assert!(!look(105) && look(110));
    }
}
