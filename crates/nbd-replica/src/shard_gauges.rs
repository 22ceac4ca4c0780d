//! What is looked at from time to time for the metrics: how a leader's followers stand, and what
//! volumes and the disk hold.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use metrics::{Gauge, gauge};
use nbd_consensus::{PeerStatus, Role};
use nbd_store::ShardReader;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::group_task::GroupHandle;
use crate::metrics::float;

/// Time between looks at the followers: less than between two scrapes.
const MEMBERS_INTERVAL: Duration = Duration::from_secs(2);

/// Looks at the followers for each at what is held, which takes looking through all that has no
/// home yet.
const HELD_EVERY: u32 = 5;

/// What no replica stands for any more: it does not lead, or the member has gone. A series stays
/// for as long as the process does; as no number it counts nowhere.
const NOTHING: f64 = f64::NAN;

/// Of one shard.
#[derive(Default)]
struct Members {
    /// By the member's node: whether it is heard, and its lag.
    known: BTreeMap<String, (Gauge, Gauge)>,
}

/// Looks at all of them until the node stops.
pub(crate) async fn watch(groups: Vec<GroupHandle>, data_dir: PathBuf, stop: CancellationToken) {
    let looking = async {
        let disk = gauge!("store_disk_bytes");
        let mut members: Vec<Members> = groups.iter().map(|_| Members::default()).collect();
        let mut looks = tokio::time::interval(MEMBERS_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut number = 0_u32;
        loop {
            looks.tick().await;
            for (group, members) in groups.iter().zip(&mut members) {
                members.look(group).await;
            }
            if number.is_multiple_of(HELD_EVERY) {
                look_at_held(&groups).await;
                look_at_disk(&disk, data_dir.clone()).await;
            }
            number = number.wrapping_add(1);
        }
    };
    stop.run_until_cancelled(looking).await;
}

impl Members {
    async fn look(&mut self, group: &GroupHandle) {
        let leads = group.status().role == Role::Leader;
        // A group that has ended has no members to look at.
        let status = if leads { group.details().await.ok() } else { None };
        let replicas = group.reader().replicas();
        let node_of = |peer: &PeerStatus| {
            let info = replicas.iter().find(|info| info.id == peer.replica)?;
            Some(info.node.to_string())
        };
        let peers = status.iter().flat_map(|status| &status.peers);
        let now: BTreeMap<String, &PeerStatus> =
            peers.filter_map(|peer| Some((node_of(peer)?, peer))).collect();
        for (_, (alive, lag)) in self.known.iter().filter(|(node, _)| !now.contains_key(*node)) {
            alive.set(NOTHING);
            lag.set(NOTHING);
        }
        let committed = status.as_ref().map_or(0, |status| status.committed.0);
        for (node, peer) in now {
            let (alive, lag) = self.known.entry(node).or_insert_with_key(|node| {
                let (shard, member) = (group.shard().to_string(), node.clone());
                let labels = [("shard", shard), ("member", member)];
                (gauge!("raft_member_alive", &labels), gauge!("raft_member_lag_entries", &labels))
            });
            alive.set(f64::from(u8::from(peer.active)));
            lag.set(float(committed.saturating_sub(peer.matched.0)));
        }
    }
}

async fn look_at_held(groups: &[GroupHandle]) {
    for group in groups {
        let (shard, reader) = (group.shard().to_string(), group.reader().clone());
        let provisioned = float(reader.provisioned_bytes());
        gauge!("shard_provisioned_bytes", "shard" => shard.clone()).set(provisioned);
        let looked = tokio::task::spawn_blocking(move || ShardReader::allocated_total(&reader));
        match looked.await {
            Ok(Ok(bytes)) => gauge!("shard_allocated_bytes", "shard" => shard).set(float(bytes)),
            // Whoever reads from the database for a client finds out, too.
            Ok(Err(error)) => debug!(shard, %error, "cannot tell what is allocated"),
            Err(error) => debug!(shard, %error, "cannot tell what is allocated"),
        }
    }
}

async fn look_at_disk(disk: &Gauge, data_dir: PathBuf) {
    let looked = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&data_dir)).await;
    if let Ok(Ok(found)) = looked {
        disk.set(float(found.f_blocks.saturating_mul(found.f_frsize)));
    }
}
