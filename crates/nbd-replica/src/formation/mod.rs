//! How a node finds out which replica of a shard it is, before the shard's group may start.
//!
//! A directory that was formed once knows. A fresh one must not guess: had its node belonged to the
//! group before, with a disk that is gone now, the group may count on votes and entries that this
//! directory does not have. So it asks all nodes that the shard was configured with:
//!
//! | answers | decision |
//! | --- | --- |
//! | one has formed, and lists this node's first id and directory | form, as that one did |
//! | one has formed, and does not | this is another replica: [`join`](crate::join) under a new id |
//! | all are fresh, twice in a row, with the same directories | form a new group |
//! | else | ask again |
//!
//! Twice, because an answer may be old by the time the last one comes: in the second round every
//! node was still fresh after each directory of the first round existed, so that none of them can
//! have voted under a directory that was wiped since.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nbd_rpc::error::Refusal;
use nbd_rpc::identity::{directory_from_bytes, directory_to_bytes, node_name, replica_id};
use nbd_rpc::v1::admin_client::AdminClient;
use nbd_rpc::{Channels, MESSAGE_BYTES_MAX, v1, within};
use nbd_store::{
    FormError, Formation, ReplicaAddresses, ReplicaInfo, ReplicaRegistration, ShardReader,
};
use nbd_topology::{ClusterName, Membership, NodeName, ReplicaId, ShardId};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{info, warn};

use crate::checkpoint_thread::{CheckpointHandle, JobError};

/// Time for an answer of a node that only has to look something up.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

/// The first wait before asking again; doubled each time.
const RETRY_MIN: Duration = Duration::from_millis(100);

/// The longest wait before asking again.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Time between log lines of a node that waits.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// This node, as it introduces itself.
#[derive(Debug, Clone)]
pub(crate) struct Oneself {
    pub(crate) cluster: ClusterName,
    pub(crate) node: NodeName,
    /// The random id of the data directory.
    pub(crate) directory: u128,
    /// Where others reach it.
    pub(crate) addresses: ReplicaAddresses,
}

/// Nodes that a shard is configured with, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Founders {
    /// Each with its gRPC address. The n-th one's first id is n, from 1.
    pub(crate) nodes: Vec<(NodeName, String)>,
}

/// Connections for calls of [`v1::admin_client`].
#[derive(Debug, Default)]
pub(crate) struct AdminPeers {
    channels: Channels,
}

impl AdminPeers {
    /// A client of the node at `grpc`, a host:port. Connects when the first call is made.
    pub(crate) fn client(
        &self,
        grpc: &str,
    ) -> Result<AdminClient<Channel>, nbd_rpc::InvalidAddress> {
        Ok(AdminClient::new(self.channels.to(grpc)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}

impl Oneself {
    /// Whom a call is meant for.
    pub(crate) fn address(&self, shard: ShardId) -> Option<v1::ShardAddress> {
        let cluster = self.cluster.to_string();
        Some(v1::ShardAddress { cluster, shard: shard.0, forwarded: false })
    }

    /// This node as a replica that asks to be known.
    pub(crate) fn registration(&self) -> ReplicaRegistration {
        ReplicaRegistration {
            node: self.node.clone(),
            directory: self.directory,
            addresses: self.addresses.clone(),
        }
    }

    /// This node as a replica with this id, if it has one.
    pub(crate) fn to_wire(&self, id: Option<ReplicaId>) -> v1::ReplicaInfo {
        v1::ReplicaInfo {
            id: id.map_or(0, ReplicaId::get),
            node: self.node.to_string(),
            directory: directory_to_bytes(self.directory),
            addresses: Some(addresses_to_wire(&self.addresses)),
        }
    }
}

fn addresses_to_wire(addresses: &ReplicaAddresses) -> v1::NodeAddresses {
    let ReplicaAddresses { nbd, grpc, http } = addresses.clone();
    v1::NodeAddresses { nbd, grpc, http }
}

pub(crate) fn info_to_wire(info: &ReplicaInfo) -> v1::ReplicaInfo {
    v1::ReplicaInfo {
        id: info.id.get(),
        node: info.node.to_string(),
        directory: directory_to_bytes(info.directory),
        addresses: Some(addresses_to_wire(&info.addresses)),
    }
}

/// A replica without its id.
pub(crate) fn registration_from_wire(
    info: v1::ReplicaInfo,
) -> Result<ReplicaRegistration, Refusal> {
    let v1::NodeAddresses { nbd, grpc, http } =
        info.addresses.ok_or(Refusal::Malformed("a replica has no addresses"))?;
    let addresses = ReplicaAddresses { nbd, grpc, http };
    if !addresses.is_bounded() {
        return Err(Refusal::Malformed("an address is too long"));
    }
    let (node, directory) = (node_name(&info.node)?, directory_from_bytes(&info.directory)?);
    Ok(ReplicaRegistration { node, directory, addresses })
}

pub(crate) fn info_from_wire(info: v1::ReplicaInfo) -> Result<ReplicaInfo, Refusal> {
    let id = replica_id(info.id)?;
    let ReplicaRegistration { node, directory, addresses } = registration_from_wire(info)?;
    Ok(ReplicaInfo { id, node, directory, addresses })
}

pub(crate) fn record_to_wire(formation: &Formation) -> v1::FormationRecord {
    v1::FormationRecord {
        voters: formation.membership.voters().iter().map(|id| id.get()).collect(),
        learners: formation.membership.learners().iter().map(|id| id.get()).collect(),
        replicas: formation.replicas.iter().map(info_to_wire).collect(),
        next_replica: formation.next_replica,
    }
}

/// What a group is made of, with `replica` as one's own.
pub(crate) fn record_from_wire(
    record: v1::FormationRecord,
    replica: ReplicaId,
) -> Result<Formation, Refusal> {
    let ids = |ids: Vec<u64>| ids.into_iter().map(replica_id).collect::<Result<Vec<_>, _>>();
    let replicas = record.replicas.into_iter().map(info_from_wire);
    let membership = Membership::new(ids(record.voters)?, ids(record.learners)?)
        .ok_or(Refusal::Malformed("a replica is voter and learner"))?;
    Ok(Formation {
        replica,
        membership,
        replicas: replicas.collect::<Result<_, _>>()?,
        next_replica: record.next_replica,
    })
}

/// What a node said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Heard {
    Fresh(ReplicaRegistration),
    Formed(Formation),
}

/// What follows from the answers.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Form(Formation),
    Join,
    AskAgain,
}

/// Answers by first id.
type Answers = BTreeMap<ReplicaId, Heard>;

/// The table of the module's head. `others`: the first ids of all other founders; `last`: the
/// answers of the round before.
fn decide(
    my_id: ReplicaId,
    me: &ReplicaRegistration,
    others: &[ReplicaId],
    last: &Answers,
    now: &Answers,
) -> Decision {
    let mut found = None;
    for heard in now.values() {
        if let Heard::Formed(formation) = heard {
            let is_me = |known: &ReplicaInfo| known.id == my_id && known.directory == me.directory;
            if !formation.replicas.iter().any(is_me) {
                return Decision::Join;
            }
            found = Some(Formation { replica: my_id, ..formation.clone() });
        }
    }
    if let Some(formation) = found {
        return Decision::Form(formation);
    }
    if now.len() < others.len() || (now != last && !others.is_empty()) {
        return Decision::AskAgain;
    }
    let mut replicas = vec![with_id(my_id, me.clone())];
    for (id, heard) in now {
        if let Heard::Fresh(registration) = heard {
            replicas.push(with_id(*id, registration.clone()));
        }
    }
    replicas.sort_by_key(|replica| replica.id);
    let next_replica = replicas.len() as u64 + 1;
    let membership = Membership::of_voters(replicas.iter().map(|replica| replica.id));
    Decision::Form(Formation { replica: my_id, membership, replicas, next_replica })
}

fn with_id(id: ReplicaId, registration: ReplicaRegistration) -> ReplicaInfo {
    let ReplicaRegistration { node, directory, addresses } = registration;
    ReplicaInfo { id, node, directory, addresses }
}

/// Why a shard was not formed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FormationError {
    /// The node stops.
    #[error("the node stops")]
    Stopped,
    /// The store does not take it.
    #[error(transparent)]
    Store(#[from] JobError<FormError>),
    /// This node is not among those that the shard is configured with.
    #[error("shard {0} is not configured with this node")]
    NotFounder(ShardId),
}

/// Forms the shards of a node.
#[derive(Debug, Clone)]
pub(crate) struct Former {
    pub(crate) oneself: std::sync::Arc<Oneself>,
    pub(crate) peers: std::sync::Arc<AdminPeers>,
    pub(crate) checkpoints: CheckpointHandle,
    /// Cancelled when the node stops.
    pub(crate) stop: CancellationToken,
}

impl Former {
    /// What the shard's group starts from: as the store knows it, or as is found out now and
    /// stored. Takes as long as it takes until enough peers are there.
    pub(crate) async fn form(
        &self,
        reader: &ShardReader,
        founders: &Founders,
    ) -> Result<Formation, FormationError> {
        if let Some(formation) = reader.formation() {
            return Ok(formation);
        }
        let shard = reader.shard();
        let formation = tokio::select! {
            () = self.stop.cancelled() => return Err(FormationError::Stopped),
            found = self.find_out(shard, founders) => found?,
        };
        self.checkpoints.form(shard, formation.clone()).await?;
        let (replica, members) = (formation.replica, formation.replicas.len());
        info!(%shard, %replica, members, "formed");
        Ok(formation)
    }

    async fn find_out(
        &self,
        shard: ShardId,
        founders: &Founders,
    ) -> Result<Formation, FormationError> {
        let mut others: Vec<(ReplicaId, NodeName, String)> = Vec::new();
        let mut my_id = None;
        for (id, (node, grpc)) in (1..).filter_map(ReplicaId::new).zip(&founders.nodes) {
            if *node == self.oneself.node {
                my_id = Some(id);
            } else {
                others.push((id, node.clone(), grpc.clone()));
            }
        }
        let my_id = my_id.ok_or(FormationError::NotFounder(shard))?;
        let (me, ids) = (self.oneself.registration(), others.iter().map(|(id, ..)| *id));
        let ids: Vec<ReplicaId> = ids.collect();
        let (mut last, mut wait, mut logged) = (Answers::new(), RETRY_MIN, None);
        loop {
            let now = self.ask_all(shard, founders, &others).await;
            match decide(my_id, &me, &ids, &last, &now) {
                Decision::Form(formation) => return Ok(formation),
                Decision::Join => {
                    warn!(%shard, "the group has formed without this directory: joining it");
                    let contacts: Vec<String> = others.into_iter().map(|(.., at)| at).collect();
                    return Ok(self.join(shard, &contacts).await);
                }
                // Complete: the second round need not wait.
                Decision::AskAgain if now.len() == ids.len() => last = now,
                Decision::AskAgain => {
                    if logged.is_none_or(|at: Instant| at.elapsed() >= LOG_INTERVAL) {
                        logged = Some(Instant::now());
                        let missing = others.iter().filter(|(id, ..)| !now.contains_key(id));
                        let missing: Vec<&str> =
                            missing.map(|(_, node, _)| node.as_str()).collect();
                        info!(%shard, ?missing, "waiting for all nodes to form the group with");
                    }
                    last = now;
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                }
            }
        }
    }

    /// Asks all at once; those that gave no answer of use are left out.
    async fn ask_all(
        &self,
        shard: ShardId,
        founders: &Founders,
        others: &[(ReplicaId, NodeName, String)],
    ) -> Answers {
        let nodes: Vec<String> = founders.nodes.iter().map(|(node, _)| node.to_string()).collect();
        let mut asked = JoinSet::new();
        for (id, node, grpc) in others.iter().cloned() {
            let request = v1::FormationRequest {
                to: self.oneself.address(shard),
                node: self.oneself.node.to_string(),
                nodes: nodes.clone(),
            };
            let client = self.peers.client(&grpc);
            asked.spawn(async move {
                let mut client =
                    client.map_err(|error| Status::invalid_argument(error.to_string()))?;
                let reply = client.formation(within(ASK_DEADLINE, request)).await?.into_inner();
                Ok::<_, Status>((id, heard(&node, reply)?))
            });
        }
        let mut answers = Answers::new();
        for answer in asked.join_all().await {
            match answer {
                Ok((id, heard)) => _ = answers.insert(id, heard),
                Err(status) if nbd_rpc::is_refusal(&status) => {
                    warn!(%shard, refusal = status.message(), "cannot form the group");
                }
                // Not up yet, most likely.
                Err(_) => {}
            }
        }
        answers
    }
}

/// What a node's answer says.
fn heard(node: &NodeName, reply: v1::FormationReply) -> Result<Heard, Refusal> {
    let me = reply.me.ok_or(Refusal::Malformed("a node does not say who it is"))?;
    if me.node != node.as_str() {
        return Err(Refusal::Node { found: node.to_string(), expected: node_name(&me.node)? });
    }
    match reply.formed {
        None => Ok(Heard::Fresh(registration_from_wire(me)?)),
        Some(record) => {
            let id = replica_id(me.id)?;
            Ok(Heard::Formed(record_from_wire(record, id)?))
        }
    }
}

/// A node's answer about itself.
pub(crate) fn formation_reply(
    oneself: &Oneself,
    formation: Option<&Formation>,
) -> v1::FormationReply {
    v1::FormationReply {
        me: Some(oneself.to_wire(formation.map(|formation| formation.replica))),
        formed: formation.map(record_to_wire),
    }
}

/// Refuses a node that would form the shard with others than this one would.
pub(crate) fn check_founders(asked_for: &[String], mine: &Founders) -> Result<(), Status> {
    let same = asked_for.iter().map(String::as_str).eq(mine.nodes.iter().map(|(n, _)| n.as_str()));
    if same {
        return Ok(());
    }
    let mine: Vec<&str> = mine.nodes.iter().map(|(node, _)| node.as_str()).collect();
    let text = format!("the shard is configured with {asked_for:?} there, and with {mine:?} here");
    Err(Status::failed_precondition(text))
}

#[cfg(test)]
mod tests;
