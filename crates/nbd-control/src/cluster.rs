//! The cluster, as seen through the gRPC of its nodes.
//!
//! A call about a shard may go to any replica of it: followers pass it on to the leader. So there
//! is no leader to look for here, only contacts to try. [`ask`] tries them until one answers, or
//! until the deadline; [`calls`] are the calls there are; [`error`] is what comes of those that are
//! refused.

pub(crate) mod ask;
pub(crate) mod calls;
pub(crate) mod error;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nbd_rpc::{Channels, v1};
use nbd_service::ClusterConfig;
use nbd_topology::ShardId;
use parking_lot::Mutex;

pub(crate) use self::error::{CallError, Conflict};

/// A cluster, and what is known of where its shards are. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: ClusterConfig,
    deadline: Duration,
    channels: Channels,
    /// A leaf registry: locked for a look-up, never across I/O.
    learnt: Mutex<HashMap<ShardId, Learnt>>,
}

/// What a shard itself said of where it is.
#[derive(Debug, Default)]
struct Learnt {
    /// The contact to try first: the leader, or the one that answered last.
    first: Option<String>,
    /// Addresses of its members.
    members: Vec<String>,
}

impl Cluster {
    /// A cluster whose shards have `deadline` to answer.
    pub(crate) fn new(config: ClusterConfig, deadline: Duration) -> Self {
        let (channels, learnt) = (Channels::default(), Mutex::default());
        Self { inner: Arc::new(Inner { config, deadline, channels, learnt }) }
    }

    pub(crate) fn config(&self) -> &ClusterConfig {
        &self.inner.config
    }

    pub(crate) fn deadline(&self) -> Duration {
        self.inner.deadline
    }

    /// Every shard's number.
    pub(crate) fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.inner.config.shard_count().get()).map(ShardId)
    }

    /// The shard that holds the volume of this name.
    pub(crate) fn shard_of(&self, volume: &str) -> ShardId {
        self.inner.config.shard_map().shard_of(volume.as_bytes())
    }

    /// Where the shard may be asked, best first: what it said itself, then what is configured.
    fn contacts(&self, shard: ShardId) -> Vec<String> {
        let mut contacts = Vec::new();
        let mut add = |address: String| {
            if !contacts.contains(&address) {
                contacts.push(address);
            }
        };
        if let Some(learnt) = self.inner.learnt.lock().get(&shard) {
            learnt.first.iter().chain(&learnt.members).cloned().for_each(&mut add);
        }
        let config = &self.inner.config;
        let nodes = config.replicas(shard).iter().filter_map(|name| config.node(name));
        nodes.map(|node| node.addresses.grpc.to_string()).for_each(add);
        contacts
    }

    /// A contact has answered for the shard.
    fn answered(&self, shard: ShardId, contact: &str) {
        let mut learnt = self.inner.learnt.lock();
        let learnt = learnt.entry(shard).or_default();
        if learnt.first.as_deref() != Some(contact) {
            learnt.first = Some(contact.to_owned());
        }
    }

    /// The shard has said who its members are.
    fn learn(&self, shard: ShardId, reply: &v1::MembersReply) {
        let address = |member: &v1::Member| {
            let replica = member.replica.as_ref()?;
            Some((replica.id, replica.addresses.as_ref()?.grpc.clone()))
        };
        let members: Vec<_> = reply.members.iter().filter_map(address).collect();
        let leader = members.iter().find(|(id, _)| *id == reply.leader);
        let mut learnt = self.inner.learnt.lock();
        let learnt = learnt.entry(shard).or_default();
        if let Some((_, address)) = leader {
            learnt.first = Some(address.clone());
        }
        learnt.members = members.into_iter().map(|(_, address)| address).collect();
    }
}
