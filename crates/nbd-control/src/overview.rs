//! What shards and nodes say at one moment, and what that makes of the cluster.

mod health;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use nbd_api::time::from_millis;
use nbd_api::{
    ClusterHealth, HealthStatus, Member, MemberRole, Node, NodeShard, NodeState, Resync, Shard,
    ShardHealth,
};
use nbd_rpc::v1;
use nbd_rpc::v1::status_reply::Role;
use nbd_service::trace::carried;
use nbd_topology::ShardId;
use tokio::task::JoinSet;

use crate::cluster::{CallError, Cluster};
use crate::limits::SHARDS_AT_ONCE;

/// What shards and nodes say at one moment.
#[derive(Debug, Default)]
pub(crate) struct Overview {
    /// Each shard that was asked.
    pub(crate) shards: BTreeMap<ShardId, Result<v1::GetShardReply, CallError>>,
    /// The nodes that hold them, or are to, by name.
    pub(crate) nodes: BTreeMap<String, NodeView>,
    /// The nodes that each shard asked is configured to be on.
    pub(crate) configured: BTreeMap<ShardId, Vec<String>>,
}

/// What a node says of itself.
#[derive(Debug, Clone)]
pub(crate) struct NodeView {
    /// Where it was asked.
    pub(crate) grpc: String,
    /// What it said, or why it said nothing.
    pub(crate) answer: Result<v1::GetNodeReply, String>,
}

/// Runs `call` for each item, some at a time; the results are in the order of the items.
pub(crate) async fn each<I, T, C>(
    items: impl IntoIterator<Item = I>,
    call: impl Fn(I) -> C,
) -> Vec<T>
where
    T: Send + 'static,
    C: Future<Output = T> + Send + 'static,
{
    let mut items = items.into_iter().enumerate();
    let mut under_way = JoinSet::new();
    let mut done = BTreeMap::new();
    loop {
        while under_way.len() < SHARDS_AT_ONCE
            && let Some((place, item)) = items.next()
        {
            let call = carried(call(item));
            under_way.spawn(async move { (place, call.await) });
        }
        match under_way.join_next().await {
            Some(Ok((place, result))) => done.insert(place, result),
            Some(Err(error)) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Only dropping the set aborts its tasks.
                Err(error) => unreachable!("{error}"),
            },
            None => return done.into_values().collect(),
        };
    }
}

impl Overview {
    /// Asks the shards, each for `time` at most, and not the nodes.
    pub(crate) async fn of_shards(
        cluster: &Cluster,
        shards: impl IntoIterator<Item = ShardId>,
        time: Duration,
    ) -> Self {
        let asked = each(shards, |shard| {
            let cluster = cluster.clone();
            async move { (shard, cluster.shard(shard, time).await) }
        })
        .await;
        let shards: BTreeMap<_, _> = asked.into_iter().collect();
        let names = |shard| cluster.config().replicas(shard).iter().map(ToString::to_string);
        let configured = shards.keys().map(|shard| (*shard, names(*shard).collect())).collect();
        Self { shards, nodes: BTreeMap::new(), configured }
    }

    /// Asks the shards, and then the nodes that they are on.
    pub(crate) async fn of(
        cluster: &Cluster,
        shards: impl IntoIterator<Item = ShardId>,
        time: Duration,
    ) -> Self {
        let mut overview = Self::of_shards(cluster, shards, time).await;
        let nodes = overview.addresses(cluster);
        let asked = each(nodes, |(name, grpc)| {
            let cluster = cluster.clone();
            async move {
                let answer = cluster.node(&grpc).await.and_then(|reply| {
                    if reply.node == name {
                        Ok(reply)
                    } else {
                        Err(format!("at {grpc} is node {}", reply.node))
                    }
                });
                (name, NodeView { grpc, answer })
            }
        });
        overview.nodes = asked.await.into_iter().collect();
        overview
    }

    /// Everything.
    pub(crate) async fn of_all(cluster: &Cluster, time: Duration) -> Self {
        Self::of(cluster, cluster.shards(), time).await
    }

    /// Where the nodes of the shards are: as their members say, else as is configured.
    fn addresses(&self, cluster: &Cluster) -> BTreeMap<String, String> {
        let config = cluster.config();
        let mut addresses = BTreeMap::new();
        for name in self.configured.values().flatten() {
            let node = config.nodes().iter().find(|node| node.name.as_str() == name);
            addresses.extend(node.map(|node| (name.clone(), node.addresses.grpc.to_string())));
        }
        let mut known = BTreeSet::new();
        // Last a member's own word, of the shards that answer.
        for reply in self.shards.values().flatten() {
            for replica in members(reply).filter_map(|member| member.replica.as_ref()) {
                let Some(at) = &replica.addresses else { continue };
                if known.insert(replica.node.clone()) {
                    addresses.insert(replica.node.clone(), at.grpc.clone());
                }
            }
        }
        // Nodes that hold nothing yet are nodes, too, if everything is asked for.
        if self.shards.len() == config.shard_count().get() as usize {
            for node in config.nodes() {
                let grpc = || node.addresses.grpc.to_string();
                addresses.entry(node.name.to_string()).or_insert_with(grpc);
            }
        }
        addresses
    }

    /// The shards that do not answer.
    pub(crate) fn missing(&self) -> Vec<u32> {
        let missing = self.shards.iter().filter(|(_, reply)| reply.is_err());
        missing.map(|(shard, _)| shard.0).collect()
    }

    /// The shards that answer.
    pub(crate) fn answering(&self) -> impl Iterator<Item = (ShardId, &v1::GetShardReply)> {
        self.shards.iter().filter_map(|(shard, reply)| Some((*shard, reply.as_ref().ok()?)))
    }

    /// The shards that the node is on, as they say, or as is configured of those that do not.
    pub(crate) fn shards_of(&self, node: &str) -> Vec<ShardId> {
        let on_it = |(shard, reply): &(&ShardId, &Result<v1::GetShardReply, CallError>)| {
            let configured = || self.configured.get(shard).is_some_and(|names| has(names, node));
            match reply {
                Ok(reply) => members(reply).any(|member| node_of(member) == node),
                Err(_) => configured(),
            }
        };
        self.shards.iter().filter(on_it).map(|(shard, _)| *shard).collect()
    }

    /// How far the node's replica of the shard is with fetching data.
    pub(crate) fn resync(&self, node: &str, shard: ShardId) -> Option<Resync> {
        let reply = self.nodes.get(node)?.answer.as_ref().ok()?;
        let status = reply.shards.iter().find(|on_it| on_it.shard == shard.0)?.status.as_ref()?;
        let v1::ResyncStatus { bytes_done, bytes_total, eta_ms } = *status.resync.as_ref()?;
        let seconds_left = (eta_ms != 0).then(|| eta_ms.div_ceil(1000));
        Some(Resync { bytes_done, bytes_total, seconds_left })
    }

    /// The shard, if it answers.
    pub(crate) fn shard(&self, shard: ShardId) -> Option<Result<Shard, CallError>> {
        Some(self.shards.get(&shard)?.as_ref().map(|r| self.view(shard, r)).map_err(Clone::clone))
    }

    fn view(&self, shard: ShardId, reply: &v1::GetShardReply) -> Shard {
        let at = reply.members.clone().unwrap_or_default();
        let members: Vec<_> =
            at.members.iter().map(|member| self.member(shard, at.leader, member)).collect();
        let reason = self.complaint(shard, &members);
        Shard {
            shard: shard.0,
            health: if reason.is_some() { HealthStatus::Degraded } else { HealthStatus::Ok },
            reason,
            leader: leader(reply),
            term: at.term,
            committed: at.committed,
            volumes: reply.volumes,
            provisioned: reply.provisioned,
            allocated: reply.allocated,
            sessions: reply.sessions,
            writable: members.iter().filter_map(|member| member.writable).min(),
            members,
        }
    }

    fn member(&self, shard: ShardId, leader: u64, member: &v1::Member) -> Member {
        let replica = member.replica.as_ref().map_or(0, |replica| replica.id);
        let node = node_of(member).to_owned();
        let role = match member.voter {
            _ if replica == leader => MemberRole::Leader,
            true => MemberRole::Voter,
            false => MemberRole::Learner,
        };
        let answer = self.nodes.get(&node).and_then(|node| node.answer.as_ref().ok());
        let writable = answer.map(|reply| reply.writable_bytes);
        let resync = self.resync(&node, shard).or_else(|| {
            let unknown = Resync { bytes_done: 0, bytes_total: 0, seconds_left: None };
            member.resyncing.then_some(unknown)
        });
        let (alive, lag) = (member.active, member.lag);
        Member { replica, node, role, alive, lag, writable, resync }
    }

    /// Whether each shard that was asked is well.
    pub(crate) fn health(&self) -> ClusterHealth {
        let shards = self.shards.iter().map(|(shard, reply)| match reply {
            Ok(reply) => {
                let Shard { shard, health, reason, .. } = self.view(*shard, reply);
                ShardHealth { shard, status: health, reason }
            }
            Err(error) => {
                let reason = Some(error.to_string());
                ShardHealth { shard: shard.0, status: HealthStatus::Down, reason }
            }
        });
        let shards: Vec<_> = shards.collect();
        let status = shards.iter().map(|shard| shard.status).max().unwrap_or(HealthStatus::Ok);
        ClusterHealth { status, shards }
    }

    /// Whether each shard that was asked has a leader, whatever else it lacks.
    pub(crate) fn leaders(&self) -> ClusterHealth {
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|(shard, reply)| {
                let reason = reply.as_ref().err().map(ToString::to_string);
                let down = reason.is_some();
                let status = if down { HealthStatus::Down } else { HealthStatus::Ok };
                ShardHealth { shard: shard.0, status, reason }
            })
            .collect();
        let status = shards.iter().map(|shard| shard.status).max().unwrap_or(HealthStatus::Ok);
        ClusterHealth { status, shards }
    }

    /// Whether the node is cordoned: for each of its shards that answers, or for all shards that
    /// answer if it has none.
    pub(crate) fn is_cordoned(&self, node: &str) -> bool {
        let of_it = self.shards_of(node);
        let mut verdicts = self
            .answering()
            .filter(|(shard, _)| of_it.is_empty() || of_it.contains(shard))
            .map(|(_, reply)| has(&reply.cordoned, node))
            .peekable();
        verdicts.peek().is_some() && verdicts.all(|cordoned| cordoned)
    }

    /// The node, if there is one of that name.
    pub(crate) fn node(&self, name: &str) -> Option<Node> {
        let NodeView { grpc, answer } = self.nodes.get(name)?;
        let said = answer.as_ref().ok();
        Some(Node {
            node: name.to_owned(),
            state: if said.is_some() { NodeState::Up } else { NodeState::Down },
            reason: answer.as_ref().err().cloned(),
            cordoned: self.is_cordoned(name),
            version: said.map(|reply| reply.version.clone()),
            started: said.and_then(|reply| from_millis(reply.started_ms)),
            disk: said.map(|reply| reply.disk_bytes),
            disk_free: said.map(|reply| reply.disk_free_bytes),
            writable: said.map(|reply| reply.writable_bytes),
            grpc: grpc.clone(),
            shards: self.replicas_on(name, said),
        })
    }

    /// What a node holds: as the shards' leaders say, and as it says itself of other shards.
    fn replicas_on(&self, node: &str, said: Option<&v1::GetNodeReply>) -> Vec<NodeShard> {
        let mut replicas = BTreeMap::new();
        for on_it in said.iter().flat_map(|reply| &reply.shards) {
            let status = on_it.status.clone().unwrap_or_default();
            let role = match status.role() {
                Role::Leader => MemberRole::Leader,
                Role::Follower | Role::Candidate => MemberRole::Voter,
                Role::Learner => MemberRole::Learner,
                Role::Forming | Role::Removed | Role::Unspecified => continue,
            };
            let replica = status.me.map_or(0, |me| me.id);
            replicas.insert(on_it.shard, NodeShard { shard: on_it.shard, replica, role });
        }
        for (shard, reply) in self.answering() {
            replicas.remove(&shard.0);
            let leader = reply.members.as_ref().map_or(0, |members| members.leader);
            for member in members(reply).filter(|member| node_of(member) == node) {
                let Member { replica, role, .. } = self.member(shard, leader, member);
                replicas.insert(shard.0, NodeShard { shard: shard.0, replica, role });
            }
        }
        replicas.into_values().collect()
    }
}

/// The shard's members.
pub(crate) fn members(reply: &v1::GetShardReply) -> impl Iterator<Item = &v1::Member> {
    reply.members.iter().flat_map(|members| &members.members)
}

/// The member of this id.
pub(crate) fn member(reply: &v1::GetShardReply, replica: u64) -> Option<&v1::Member> {
    let is_it = |member: &&v1::Member| member.replica.as_ref().is_some_and(|r| r.id == replica);
    members(reply).find(is_it)
}

/// The node that a member is on.
pub(crate) fn node_of(member: &v1::Member) -> &str {
    member.replica.as_ref().map_or("", |replica| &replica.node)
}

/// The node that leads the shard.
pub(crate) fn leader(reply: &v1::GetShardReply) -> Option<String> {
    let leader = member(reply, reply.members.as_ref()?.leader)?;
    Some(node_of(leader).to_owned())
}

fn has(names: &[String], name: &str) -> bool {
    names.iter().any(|other| other == name)
}
