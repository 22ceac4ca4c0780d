//! A replica that was not there from the start: how it gets its id, and then its vote; and how a
//! replica finds out that it is no longer wanted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_rpc::error::Refusal;
use nbd_rpc::identity::replica_id;
use nbd_rpc::{v1, within};
use nbd_store::Formation;
use nbd_topology::{LogIndex, ReplicaId, ShardId};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::formation::{AdminPeers, Former, Oneself, record_from_wire};
use crate::group_task::GroupHandle;
use crate::resync::ResyncProgress;
use crate::scrub::Comparer;

/// Time for an answer to a call that commits entries: several elections.
const COMMIT_DEADLINE: Duration = Duration::from_secs(10);

/// The first wait before trying again; doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(200);

/// The longest wait before trying again.
const RETRY_MAX: Duration = Duration::from_secs(3);

/// Time between a member's looks at itself.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Time without a leader, or as no member, after which a replica asks others whether it still
/// belongs to the group. Elections are over long before.
const DOUBT_AFTER: Duration = Duration::from_secs(5);

/// Committed entries that a learner may lack and still ask for its vote: what a busy leader commits
/// while the answer travels.
const LAG_MAX: u64 = 4096;

/// Time between log lines about a failure that goes on.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

impl Former {
    /// Gets an id of its own for this directory, from whichever contact leads to the leader. Tries
    /// for ever.
    pub(crate) async fn join(&self, shard: ShardId, contacts: &[String]) -> Formation {
        let (mut wait, mut logged) = (RETRY_MIN, None);
        loop {
            let mut refusals = Vec::new();
            for contact in contacts {
                match self.join_through(shard, contact).await {
                    Ok(formation) => return formation,
                    Err(status) => refusals.push(nbd_rpc::reason(&status)),
                }
            }
            if logged.is_none_or(|at: Instant| at.elapsed() >= LOG_INTERVAL) {
                logged = Some(Instant::now());
                warn!(%shard, ?refusals, "cannot join the group yet");
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn join_through(&self, shard: ShardId, grpc: &str) -> Result<Formation, tonic::Status> {
        let mut client = client_of(&self.peers, grpc)?;
        let replica = Some(self.oneself.to_wire(None));
        let request = v1::JoinRequest { to: self.oneself.address(shard), replica };
        let reply = client.join(within(COMMIT_DEADLINE, request)).await?.into_inner();
        let id = replica_id(reply.replica)?;
        let record = reply.formation.ok_or(Refusal::Malformed("a group without members"))?;
        info!(%shard, replica = %id, "joins under a new id");
        Ok(record_from_wire(record, id)?)
    }
}

fn client_of(
    peers: &AdminPeers,
    grpc: &str,
) -> Result<v1::admin_client::AdminClient<tonic::transport::Channel>, tonic::Status> {
    peers.client(grpc).map_err(|error| tonic::Status::invalid_argument(error.to_string()))
}

/// Shards whose groups removed this node's replica. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct RemovedShards {
    shards: Arc<Mutex<BTreeSet<ShardId>>>,
}

impl RemovedShards {
    pub(crate) fn contains(&self, shard: ShardId) -> bool {
        self.shards.lock().contains(&shard)
    }

    fn add(&self, shard: ShardId) {
        self.shards.lock().insert(shard);
    }
}

/// Looks after this node's own membership in one group: asks for its vote as a learner, and stops
/// when it was removed. The task ends then, or with the node.
#[derive(Debug)]
pub(crate) struct MemberWatch {
    pub(crate) group: GroupHandle,
    pub(crate) oneself: Arc<Oneself>,
    pub(crate) peers: Arc<AdminPeers>,
    /// Where the shard's configured nodes are, as host:port of their gRPC.
    pub(crate) contacts: Vec<String>,
    pub(crate) comparer: Comparer,
    pub(crate) resync: watch::Receiver<Option<ResyncProgress>>,
    pub(crate) removed: RemovedShards,
    /// Cancelled when the node stops.
    pub(crate) stop: CancellationToken,
}

/// What a replica makes of its own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// All is well, or an election is under way.
    Settled,
    /// It should ask whether it still belongs to the group.
    InDoubt,
    /// It should see whether it can vote.
    Learning,
}

/// `unsettled_for`: the time since it last was a member with a leader.
fn standing(
    is_voter: bool,
    is_learner: bool,
    has_leader: bool,
    unsettled_for: Duration,
) -> Standing {
    let is_member = is_voter || is_learner;
    if (!is_member || !has_leader) && unsettled_for >= DOUBT_AFTER {
        Standing::InDoubt
    } else if is_learner && has_leader {
        Standing::Learning
    } else {
        Standing::Settled
    }
}

/// Whether a learner is near enough to its leader to vote.
const fn is_near(applied: LogIndex, committed: LogIndex) -> bool {
    applied.0 + LAG_MAX >= committed.0
}

impl MemberWatch {
    /// Runs until the replica is removed or the node stops.
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(mut self) {
        let shard = self.group.shard();
        let (mut settled_at, mut verified) = (Instant::now(), false);
        let mut logged: Option<Instant> = None;
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let Some(me) = self.group.reader().formation() else { continue };
            let id = me.replica;
            let is_voter = me.membership.is_voter(id);
            let is_learner = me.membership.learners().contains(&id);
            let has_leader = self.group.route().borrow().leader.is_some();
            if (is_voter || is_learner) && has_leader {
                settled_at = Instant::now();
            }
            match standing(is_voter, is_learner, has_leader, settled_at.elapsed()) {
                Standing::Settled => {}
                Standing::InDoubt => match self.members().await {
                    Ok(reply) if is_listed(&reply, id) => settled_at = Instant::now(),
                    Ok(_) => {
                        error!(%shard, replica = %id, "removed from its group");
                        self.removed.add(shard);
                        return;
                    }
                    // Nobody knows just now.
                    Err(_) => settled_at = Instant::now(),
                },
                Standing::Learning => {
                    // Whatever is fetched anew is compared anew.
                    verified &= self.resync.borrow_and_update().is_none();
                    if let Err(reason) = self.rise(id, &mut verified).await
                        && logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL)
                    {
                        logged = Some(Instant::now());
                        info!(%shard, replica = %id, %reason, "learning");
                    }
                }
            }
        }
    }

    /// Goes a step towards a vote. The error says what is in the way.
    async fn rise(&self, id: ReplicaId, verified: &mut bool) -> Result<(), String> {
        if self.resync.borrow().is_some() {
            return Err("data is being fetched".to_owned());
        }
        let text = |status: tonic::Status| nbd_rpc::reason(&status);
        let committed = LogIndex(self.members().await.map_err(text)?.committed);
        let applied = self.group.reader().applied();
        if !is_near(applied, committed) {
            return Err(format!("applied {applied} of {committed} entries"));
        }
        let route = self.group.route().borrow().clone();
        let leader = route.leader.ok_or("no leader is known")?;
        if !*verified {
            let reader = self.group.reader();
            let wrong = self.comparer.make_equal(reader, leader.replica, &leader.grpc).await;
            let wrong = wrong.map_err(|error| format!("cannot compare: {error}"))?;
            if wrong > 0 {
                return Err(format!("{wrong} chunks differ from the leader's: fetched again"));
            }
            *verified = true;
        }
        let shard = self.group.shard();
        let (to, applied) = (self.oneself.address(shard), self.group.reader().applied().0);
        let request = v1::PromoteRequest { to, replica: id.get(), applied };
        let mut client = client_of(&self.peers, &leader.grpc).map_err(text)?;
        client.promote(within(COMMIT_DEADLINE, request)).await.map_err(text)?;
        info!(%shard, replica = %id, "votes from now on");
        Ok(())
    }

    /// The committed members, from the leader or whoever leads to it.
    async fn members(&self) -> Result<v1::MembersReply, tonic::Status> {
        let leader = self.group.route().borrow().leader.clone().map(|leader| leader.grpc);
        let known = self.group.reader().replicas();
        let known = known.iter().filter(|info| info.node != self.oneself.node);
        let known = known.map(|info| info.addresses.grpc.clone());
        let mut asked = BTreeSet::new();
        let mut failure = tonic::Status::unavailable("there is nobody to ask");
        for grpc in leader.into_iter().chain(known).chain(self.contacts.iter().cloned()) {
            if !asked.insert(grpc.clone()) {
                continue;
            }
            let request = v1::MembersRequest { to: self.oneself.address(self.group.shard()) };
            match client_of(&self.peers, &grpc)?.members(within(COMMIT_DEADLINE, request)).await {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(status) => failure = status,
            }
        }
        Err(failure)
    }
}

fn is_listed(reply: &v1::MembersReply, id: ReplicaId) -> bool {
    let ids = reply.members.iter().filter_map(|member| member.replica.as_ref());
    ids.map(|info| info.id).any(|listed| listed == id.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_doubts_only_after_a_while_and_learns_only_under_a_leader() {
        let (short, long) = (DOUBT_AFTER / 2, DOUBT_AFTER);
        // As voter, learner, or neither; with a leader or without.
        assert_eq!(standing(true, false, true, long), Standing::Settled);
        assert_eq!(standing(true, false, false, short), Standing::Settled);
        assert_eq!(standing(true, false, false, long), Standing::InDoubt);
        assert_eq!(standing(false, true, true, short), Standing::Learning);
        assert_eq!(standing(false, true, false, short), Standing::Settled);
        assert_eq!(standing(false, false, true, short), Standing::Settled);
        assert_eq!(standing(false, false, true, long), Standing::InDoubt);
    }

    #[test]
    fn a_learner_may_lack_what_is_committed_meanwhile() {
        assert!(is_near(LogIndex(1000), LogIndex(1000 + LAG_MAX)));
        assert!(!is_near(LogIndex(1000), LogIndex(1001 + LAG_MAX)));
    }

    #[test]
    fn a_member_finds_itself_by_its_id() {
        let member = |id| v1::Member {
            replica: Some(v1::ReplicaInfo { id, ..Default::default() }),
            ..Default::default()
        };
        let reply = v1::MembersReply { members: vec![member(1), member(4)], ..Default::default() };
        assert!(is_listed(&reply, ReplicaId::new(4).unwrap()));
        assert!(!is_listed(&reply, ReplicaId::new(2).unwrap()));
    }

    #[test]
    fn removed_shards_are_remembered() {
        let removed = RemovedShards::default();
        assert!(!removed.contains(ShardId(3)));
        removed.add(ShardId(3));
        assert!(removed.contains(ShardId(3)));
    }
}
