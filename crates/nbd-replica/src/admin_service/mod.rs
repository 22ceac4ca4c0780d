//! [`Admin`]: forming groups, and changing who belongs to them.
//!
//! Calls for the leader are passed on by replicas that do not lead, once: a replica that gets a
//! call passed on and does not lead either says where the leader is, if it knows.

mod leader;
mod rules;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nbd_consensus::Role;
use nbd_rpc::error::Refusal;
use nbd_rpc::identity::{check_cluster, node_name, replica_id};
use nbd_rpc::v1::admin_client::AdminClient;
use nbd_rpc::v1::admin_server::Admin;
use nbd_rpc::v1::status_reply::Role as WireRole;
use nbd_rpc::{v1, within};
use nbd_store::ReplicaRegistration;
use nbd_topology::{ReplicaId, ShardId};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tracing::info;

use self::leader::Replaced;
use crate::formation::{
    AdminPeers, Founders, Oneself, check_founders, formation_reply, record_to_wire,
    registration_from_wire,
};
use crate::group_task::GroupHandle;
use crate::join::RemovedShards;
use crate::resync::ResyncProgress;
use crate::scrub::ScrubState;
use crate::steward::Nudge;

pub(crate) use self::leader::{Leader, find_leader, not_leader};
#[cfg(test)]
pub(crate) use self::rules::tests::status_at;
pub(crate) use self::rules::{avoided, relief};

/// Time for an answer of a node that a call is passed on to.
const FORWARD_DEADLINE: Duration = Duration::from_secs(10);

/// Time for a node to say who it is.
const ASK_DEADLINE: Duration = Duration::from_secs(3);

/// One shard of the node.
#[derive(Debug, Clone)]
pub(crate) struct AdminShard {
    pub(crate) group: GroupHandle,
    pub(crate) founders: Founders,
    pub(crate) resync: watch::Receiver<Option<ResyncProgress>>,
    /// Has the leader look after what was noted at once.
    pub(crate) steward: Nudge,
}

/// What the service is made of.
#[derive(Debug)]
pub(crate) struct AdminParts {
    pub(crate) oneself: Arc<Oneself>,
    pub(crate) shards: HashMap<ShardId, AdminShard>,
    pub(crate) peers: Arc<AdminPeers>,
    pub(crate) removed: RemovedShards,
    pub(crate) scrub: ScrubState,
}

/// Serves [`Admin`].
#[derive(Debug, Clone)]
pub(crate) struct AdminService {
    parts: Arc<AdminParts>,
}

/// Where a call is answered.
enum Place {
    Here(Leader),
    /// At the leader's node; with the address to send along.
    There(AdminClient<Channel>, v1::ShardAddress),
}

impl AdminService {
    pub(crate) fn new(parts: AdminParts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    fn shard(&self, to: &v1::ShardAddress) -> Result<&AdminShard, Status> {
        check_cluster(&to.cluster, &self.parts.oneself.cluster)?;
        let shard = ShardId(to.shard);
        Ok(self.parts.shards.get(&shard).ok_or(Refusal::Shard(shard))?)
    }

    /// Has the leader look after what was noted at once.
    fn nudge(&self, leader: &Leader) {
        if let Some(shard) = self.parts.shards.get(&leader.group.shard()) {
            shard.steward.now();
        }
    }

    /// Finds the leader of the shard that a call is meant for.
    async fn place(&self, to: Option<v1::ShardAddress>) -> Result<Place, Status> {
        let to = to.ok_or(Refusal::Malformed("no address"))?;
        let group = self.shard(&to)?.group.clone();
        let leader = find_leader(&group).await?;
        let shard = to.shard;
        if leader.local {
            return Ok(Place::Here(Leader { group }));
        }
        let (node, grpc) = (&leader.node, &leader.grpc);
        if to.forwarded {
            let text = format!("shard {shard} is led by {node}, at {grpc}");
            return Err(Status::failed_precondition(text));
        }
        let client = self.parts.peers.client(grpc);
        let client = client.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Place::There(client, v1::ShardAddress { forwarded: true, ..to }))
    }

    /// Asks a node who it is.
    async fn introduce(
        &self,
        shard: ShardId,
        node: &str,
        grpc: &str,
    ) -> Result<v1::FormationReply, Status> {
        let name = node_name(node)?;
        let client = self.parts.peers.client(grpc);
        let mut client = client.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let request = v1::FormationRequest {
            to: self.parts.oneself.address(shard),
            node: self.parts.oneself.node.to_string(),
            // It need not be one of the founders' equals.
            nodes: Vec::new(),
        };
        let reply = client.formation(within(ASK_DEADLINE, request)).await.map_err(|status| {
            let reason = nbd_rpc::reason(&status);
            Status::failed_precondition(format!("cannot reach node {name} at {grpc}: {reason}"))
        })?;
        let reply = reply.into_inner();
        match &reply.me {
            Some(me) if me.node == name.as_str() => Ok(reply),
            Some(me) => {
                let found = &me.node;
                Err(Status::failed_precondition(format!("at {grpc} is node {found}, not {name}")))
            }
            None => Err(Refusal::Malformed("a node does not say who it is").into()),
        }
    }

    /// Adds the replica of a node that runs.
    async fn add(&self, leader: &Leader, node: &str, grpc: &str) -> Result<ReplicaId, Status> {
        let reply = self.introduce(leader.group.shard(), node, grpc).await?;
        let me = reply.me.ok_or(Refusal::Malformed("a node does not say who it is"))?;
        if reply.formed.is_some() {
            let id = replica_id(me.id)?;
            if leader.group.reader().membership().contains(id) {
                return Ok(id);
            }
            let text = format!(
                "node {node} holds a replica of this shard that is no member: empty its data \
                 directory first"
            );
            return Err(Status::failed_precondition(text));
        }
        Ok(leader.join(registration_from_wire(me)?).await?.replica)
    }

    /// How this node's replica of a shard stands. `None`: it is not hosted here.
    pub(crate) fn standing(&self, shard: ShardId) -> Option<v1::StatusReply> {
        self.parts.shards.get(&shard).map(|shard| self.standing_of(shard))
    }

    fn standing_of(&self, shard: &AdminShard) -> v1::StatusReply {
        let AdminShard { group, resync, .. } = shard;
        let formation = group.reader().formation();
        let (status, route) = (group.status(), group.route().borrow().clone());
        let role = match &formation {
            _ if self.parts.removed.contains(group.shard()) => WireRole::Removed,
            None => WireRole::Forming,
            Some(me) if me.membership.learners().contains(&me.replica) => WireRole::Learner,
            Some(_) => match status.role {
                Role::Leader => WireRole::Leader,
                Role::Follower => WireRole::Follower,
                Role::Candidate | Role::PreCandidate => WireRole::Candidate,
            },
        };
        let resync = resync.borrow().map(|progress| v1::ResyncStatus {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            eta_ms: progress.eta.map_or(0, |eta| u64::try_from(eta.as_millis()).unwrap_or(0)),
        });
        v1::StatusReply {
            me: Some(self.parts.oneself.to_wire(formation.map(|me| me.replica))),
            role: role.into(),
            term: status.term.0,
            leader: route.leader.map_or(0, |leader| leader.replica.get()),
            applied: status.applied.0,
            committed: status.committed.0,
            resync,
            scrub: Some(self.parts.scrub.to_wire()),
        }
    }
}

/// The members of a group, asked of its leader.
pub(crate) async fn members(group: &GroupHandle) -> Result<v1::MembersReply, Status> {
    Leader::new(group).members().await
}

fn optional_id(id: u64) -> Option<ReplicaId> {
    ReplicaId::new(id)
}

/// Answers a call at the leader: here, or by passing it on.
macro_rules! at_leader {
    ($self:ident, $request:ident, $method:ident, |$leader:ident, $message:ident| $here:expr) => {{
        let mut $message = $request.into_inner();
        match $self.place($message.to.take()).await? {
            Place::Here($leader) => Ok(Response::new($here)),
            Place::There(mut client, to) => {
                $message.to = Some(to);
                client.$method(within(FORWARD_DEADLINE, $message)).await
            }
        }
    }};
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn formation(
        &self,
        request: Request<v1::FormationRequest>,
    ) -> Result<Response<v1::FormationReply>, Status> {
        let v1::FormationRequest { to, nodes, .. } = request.into_inner();
        let to = to.ok_or(Refusal::Malformed("no address"))?;
        let shard = self.shard(&to)?;
        let formation = shard.group.reader().formation();
        if formation.is_none() && !nodes.is_empty() {
            check_founders(&nodes, &shard.founders)?;
        }
        Ok(Response::new(formation_reply(&self.parts.oneself, formation.as_ref())))
    }

    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        at_leader!(self, request, join, |leader, message| {
            let new = message.replica.ok_or(Refusal::Malformed("nobody wants to join"))?;
            let new: ReplicaRegistration = registration_from_wire(new)?;
            let formation = leader.join(new).await?;
            let replica = formation.replica.get();
            v1::JoinReply { replica, formation: Some(record_to_wire(&formation)) }
        })
    }

    async fn promote(
        &self,
        request: Request<v1::PromoteRequest>,
    ) -> Result<Response<v1::PromoteReply>, Status> {
        at_leader!(self, request, promote, |leader, message| {
            leader.promote(replica_id(message.replica)?).await?;
            v1::PromoteReply {}
        })
    }

    async fn members(
        &self,
        request: Request<v1::MembersRequest>,
    ) -> Result<Response<v1::MembersReply>, Status> {
        at_leader!(self, request, members, |leader, message| leader.members().await?)
    }

    async fn add_replica(
        &self,
        request: Request<v1::AddReplicaRequest>,
    ) -> Result<Response<v1::AddReplicaReply>, Status> {
        at_leader!(self, request, add_replica, |leader, message| {
            let replica = self.add(&leader, &message.node, &message.grpc).await?.get();
            v1::AddReplicaReply { replica }
        })
    }

    async fn remove_replica(
        &self,
        request: Request<v1::RemoveReplicaRequest>,
    ) -> Result<Response<v1::RemoveReplicaReply>, Status> {
        at_leader!(self, request, remove_replica, |leader, message| {
            leader.remove(replica_id(message.replica)?).await?;
            v1::RemoveReplicaReply {}
        })
    }

    async fn replace_replica(
        &self,
        request: Request<v1::ReplaceReplicaRequest>,
    ) -> Result<Response<v1::ReplaceReplicaReply>, Status> {
        at_leader!(self, request, replace_replica, |leader, message| {
            let old = replica_id(message.replica)?;
            leader.may_replace(old).await?;
            let new = self.add(&leader, &message.node, &message.grpc).await?;
            if new == old {
                let text = "a replica is not replaced by itself";
                return Err(Status::invalid_argument(text));
            }
            if leader.replace(old, new).await? == Replaced::Noted {
                info!(shard = %leader.group.shard(), %old, %new, "a replica is to be replaced");
                self.nudge(&leader);
            }
            v1::ReplaceReplicaReply { replica: new.get() }
        })
    }

    async fn transfer_leadership(
        &self,
        request: Request<v1::TransferLeadershipRequest>,
    ) -> Result<Response<v1::TransferLeadershipReply>, Status> {
        at_leader!(self, request, transfer_leadership, |leader, message| {
            let to = leader.transfer(optional_id(message.replica)).await?;
            v1::TransferLeadershipReply { replica: to.get() }
        })
    }

    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusReply>, Status> {
        let to = request.into_inner().to.ok_or(Refusal::Malformed("no address"))?;
        Ok(Response::new(self.standing_of(self.shard(&to)?)))
    }
}
