//! What this node knows of a shard, told to whoever follows it.
//!
//! ```text
//!  group task ──Route (watch)──▶ ┌───────────┐ ──ShardView──▶ stream
//!  store ──────members (look)──▶ │ one task  │    (one waits at most)
//!                                └───────────┘
//! ```
//!
//! A task for each watcher. It ends when the watcher leaves, when the group has ended, or when the
//! node stops. A watcher that does not read costs one message: what it is told next is what holds
//! by then.

#[cfg(test)]
mod tests;

use std::time::Duration;

use nbd_front::Route;
use nbd_rpc::v1;
use nbd_store::ReplicaInfo;
use nbd_topology::Membership;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::stopping;
use crate::group_task::GroupHandle;
use crate::peers::Addresses;

/// Watchers that this node may have, over all its shards. Each costs a task of a few KiB. A load
/// balancer has one for each shard of the node: 64 of them with 64 shards each.
pub(super) const WATCHERS_MAX: usize = 4096;

/// Views that wait for a slow watcher.
pub(super) const VIEWS_MAX: usize = 1;

/// Time between looks at the members, who change without the route changing. They change when an
/// operator or a new node wants it; that is told soon enough for somebody who needs them only once
/// the replicas known so far are gone.
const MEMBERS_POLL: Duration = Duration::from_millis(500);

type Views = mpsc::Sender<Result<v1::ShardView, Status>>;

/// What one watcher follows.
pub(super) struct Watcher {
    pub(super) group: GroupHandle,
    /// Where nodes are as this node's configuration says. `None`: where they were registered.
    pub(super) addresses: Option<Addresses>,
    /// Cancelled when the node stops.
    pub(super) stop: CancellationToken,
}

impl Watcher {
    /// Tells of the shard until there is nobody left to tell, or nothing.
    pub(super) async fn run(self, views: Views) {
        tokio::select! {
            () = views.closed() => {}
            () = self.follow(&views) => {
                // One who does not read is told by the end of the stream.
                let _ = views.try_send(Err(stopping()));
            }
            () = self.stop.cancelled() => {
                let _ = views.try_send(Err(stopping()));
            }
        }
    }

    /// Returns when the group has ended, or the watcher has left.
    async fn follow(&self, views: &Views) {
        let mut route = self.group.route();
        let mut look = tokio::time::interval(MEMBERS_POLL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = None;
        loop {
            // Room first: what is told is what holds once it can be told.
            let Ok(room) = views.reserve().await else { return };
            let now = self.view(&route.borrow_and_update());
            if told.as_ref() != Some(&now) {
                told = Some(now.clone());
                room.send(Ok(now));
            } else {
                drop(room);
            }
            tokio::select! {
                changed = route.changed() => if changed.is_err() {
                    return;
                },
                _ = look.tick() => {}
            }
        }
    }

    fn view(&self, route: &Route) -> v1::ShardView {
        let reader = self.group.reader();
        let mut replicas = reader.replicas();
        if let Some(addresses) = &self.addresses {
            replicas = addresses.resolve(replicas);
        }
        let leader = route.leader.as_ref().map(|leader| {
            let info = replicas.iter().find(|replica| replica.id == leader.replica);
            v1::ReplicaAddress {
                replica: leader.replica.get(),
                node: leader.node.to_string(),
                grpc: leader.grpc.clone(),
                nbd: info.map(|info| info.addresses.nbd.clone()).unwrap_or_default(),
            }
        });
        v1::ShardView {
            replica: reader.formation().map_or(0, |formation| formation.replica.get()),
            term: route.term.0,
            leader,
            serving: route.serving,
            members: members(&reader.membership(), &replicas),
        }
    }
}

/// The members among the replicas that are known.
fn members(membership: &Membership, replicas: &[ReplicaInfo]) -> Vec<v1::ShardMember> {
    let member = |replica: &ReplicaInfo| v1::ShardMember {
        at: Some(v1::ReplicaAddress {
            replica: replica.id.get(),
            node: replica.node.to_string(),
            grpc: replica.addresses.grpc.clone(),
            nbd: replica.addresses.nbd.clone(),
        }),
        voter: membership.is_voter(replica.id),
    };
    replicas.iter().filter(|replica| membership.contains(replica.id)).map(member).collect()
}
