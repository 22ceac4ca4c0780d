//! The gRPC server, and the tasks that look after data and members.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use nbd_rpc::MESSAGE_BYTES_MAX;
use nbd_rpc::v1::admin_server::AdminServer;
use nbd_rpc::v1::chunks_server::ChunksServer;
use nbd_rpc::v1::session_server::SessionServer;
use nbd_store::{DamagedChunk, Formation, ShardReader};
use nbd_topology::ShardId;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::shards::ResyncProgresses;
use crate::admin_service::{AdminParts, AdminService, AdminShard};
use crate::checkpoint_thread::CheckpointHandle;
use crate::chunk_service::{ChunkService, ChunkServiceParts};
use crate::config::Config;
use crate::control_service::{self, ControlParts, ControlShard};
use crate::failure::Failure;
use crate::formation::{AdminPeers, FormationError, Former, Founders, Oneself};
use crate::group_task::GroupHandle;
use crate::hosted::{BlockRepair, HostedShard};
use crate::isolation::{IsolationWatch, WatchedShard};
use crate::join::{MemberWatch, RemovedShards};
use crate::node_port::{Callers, NodePort};
use crate::peers::{Addresses, GroupEvents};
use crate::repair::{RepairParts, Repairer};
use crate::resync::{ChunkPeers, ResyncParts, ResyncProgress, Throttle};
use crate::scrub::{Comparer, ScrubParts, ScrubState, Scrubber};
use crate::session_service::SessionService;
use crate::shard_gauges;
use crate::steward::{Nudge, Steward};
use crate::transport::{Transport, TransportHandle};

/// Longest wait, when a node stops, for peers to close connections to its gRPC server. A peer that
/// the network keeps from hearing of it never does.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// What callers of the gRPC server are served with, beside what [`Services`] has.
pub(super) struct ForCallers {
    /// Their connections.
    pub(super) callers: Callers,
    pub(super) sessions: SessionServer<SessionService>,
    pub(super) hosted: HashMap<ShardId, HostedShard>,
    /// This life of the process: nanoseconds since 1970 when it began.
    pub(super) incarnation: u64,
}

/// What the shards of a node share beside log and store. Clones are the same.
#[derive(Clone)]
pub(super) struct Services {
    oneself: Arc<Oneself>,
    addresses: Addresses,
    founders: Arc<HashMap<ShardId, Founders>>,
    groups: Vec<GroupHandle>,
    checkpoints: CheckpointHandle,
    failure: Failure,
    transport: TransportHandle,
    admin_peers: Arc<AdminPeers>,
    chunk_peers: Arc<ChunkPeers>,
    comparer: Comparer,
    repairer: Repairer,
    removed: RemovedShards,
    throttle: Arc<Throttle>,
    damaged: mpsc::Sender<DamagedChunk>,
    /// Cancelled once the groups have ended: until then they need the network.
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").field("node", &self.oneself.node).finish_non_exhaustive()
    }
}

impl Services {
    pub(super) fn new(
        config: &Config,
        directory: u128,
        groups: &[GroupHandle],
        checkpoints: CheckpointHandle,
        failure: Failure,
        damaged: mpsc::Sender<DamagedChunk>,
    ) -> Self {
        let cluster = config.cluster.name().clone();
        let addresses = Addresses::new(Arc::new(config.cluster.clone()));
        let stop = CancellationToken::new();
        let by_shard: HashMap<_, _> = groups.iter().map(|g| (g.shard(), g.clone())).collect();
        let node = config.node.clone();
        let transport = Transport::new(cluster.clone(), node.clone(), directory, rand::random());
        let events = Arc::new(GroupEvents { groups: by_shard });
        let transport = transport.spawn(events, stop.clone());
        let chunk_peers = Arc::new(ChunkPeers::new(cluster.clone()));
        let readers: HashMap<ShardId, ShardReader> =
            groups.iter().map(|group| (group.shard(), group.reader().clone())).collect();
        let repairer = Repairer::new(RepairParts {
            readers,
            peers: Arc::clone(&chunk_peers),
            checkpoints: checkpoints.clone(),
            damaged: damaged.clone(),
        });
        let founders = |shard: ShardId| Founders {
            nodes: config
                .cluster
                .replicas(shard)
                .iter()
                .map(|node| (node.clone(), addresses.configured(node).unwrap_or_default()))
                .collect(),
        };
        let founders =
            groups.iter().map(|group| (group.shard(), founders(group.shard()))).collect();
        let own = addresses.of(&node).unwrap_or_default();
        Self {
            oneself: Arc::new(Oneself { cluster, node, directory, addresses: own }),
            founders: Arc::new(founders),
            groups: groups.to_vec(),
            transport,
            admin_peers: Arc::new(AdminPeers::default()),
            comparer: Comparer {
                peers: Arc::clone(&chunk_peers),
                checkpoints: checkpoints.clone(),
            },
            chunk_peers,
            repairer,
            removed: RemovedShards::default(),
            throttle: Arc::new(Throttle::new(config.tuning.resync_bytes_per_second.bytes())),
            damaged,
            addresses,
            checkpoints,
            failure,
            stop,
            tasks: TaskTracker::new(),
        }
    }

    /// Where nodes are reached.
    pub(super) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// The way to the other nodes' groups.
    pub(super) fn transport(&self) -> TransportHandle {
        self.transport.clone()
    }

    /// Good copies of damaged blocks, from other replicas.
    pub(super) fn repair(&self) -> Arc<dyn BlockRepair> {
        Arc::new(self.repairer.clone())
    }

    /// Runs a task until the network stops; it watches for that itself.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// What the shard's group starts from, once that is known.
    pub(super) async fn form(&self, reader: &ShardReader) -> Result<Formation, FormationError> {
        let former = Former {
            oneself: Arc::clone(&self.oneself),
            peers: Arc::clone(&self.admin_peers),
            checkpoints: self.checkpoints.clone(),
            stop: self.stop.clone(),
        };
        let founders = self.founders.get(&reader.shard());
        former.form(reader, founders.ok_or(FormationError::NotFounder(reader.shard()))?).await
    }

    pub(super) fn resync_parts(&self, group: GroupHandle) -> ResyncParts<GroupHandle> {
        ResyncParts {
            group,
            checkpoints: self.checkpoints.clone(),
            peers: Arc::clone(&self.chunk_peers),
            throttle: Arc::clone(&self.throttle),
            failure: self.failure.clone(),
            stop: self.stop.clone(),
        }
    }

    /// Looks after this node's own membership in a group.
    pub(super) fn watch_membership(
        &self,
        group: &GroupHandle,
        resync: &watch::Receiver<Option<ResyncProgress>>,
    ) {
        let founders = self.founders.get(&group.shard());
        let nodes = founders.map(|founders| founders.nodes.as_slice()).unwrap_or_default();
        let others = nodes.iter().filter(|(node, _)| *node != self.oneself.node);
        let watch = MemberWatch {
            group: group.clone(),
            oneself: Arc::clone(&self.oneself),
            peers: Arc::clone(&self.admin_peers),
            contacts: others.map(|(_, grpc)| grpc.clone()).collect(),
            comparer: self.comparer.clone(),
            resync: resync.clone(),
            removed: self.removed.clone(),
            stop: self.stop.clone(),
        };
        self.spawn(watch.run());
    }

    /// Sees to it that the node ends when its peers do without it, if that is configured; tells
    /// why.
    pub(super) fn watch_isolation(
        &self,
        config: &Config,
        resync: &ResyncProgresses,
    ) -> watch::Receiver<Option<String>> {
        let (verdict, isolated) = watch::channel(None);
        let Some(after) = config.isolation_exit else { return isolated };
        let shard = |group: &GroupHandle| {
            let (group, resync) = (group.clone(), resync[&group.shard()].clone());
            WatchedShard { group, resync }
        };
        let watch = IsolationWatch {
            after,
            shards: self.groups.iter().map(shard).collect(),
            oneself: Arc::clone(&self.oneself),
            peers: Arc::clone(&self.admin_peers),
            addresses: self.addresses.clone(),
            removed: self.removed.clone(),
            failure: self.failure.clone(),
            stop: self.stop.clone(),
            verdict,
        };
        self.spawn(watch.run());
        isolated
    }

    /// Serves the other nodes, and starts what goes on in the background.
    pub(super) fn serve(
        &self,
        port: NodePort,
        callers: ForCallers,
        config: &Config,
        resync: &ResyncProgresses,
        damaged: mpsc::Receiver<DamagedChunk>,
    ) {
        let scrub = ScrubState::default();
        let stewards: HashMap<ShardId, Nudge> =
            self.groups.iter().map(|group| (group.shard(), Nudge::default())).collect();
        for group in &self.groups {
            let (node, nudge) = (self.oneself.node.clone(), stewards[&group.shard()].clone());
            let steward = Steward::new(node, group.clone(), nudge, self.stop.clone());
            self.spawn(steward.run());
        }
        let shard = |group: &GroupHandle| {
            let id = group.shard();
            let founders = self.founders[&id].clone();
            let (group, resync) = (group.clone(), resync[&id].clone());
            let steward = stewards[&id].clone();
            (id, AdminShard { group, founders, resync, steward })
        };
        let admin = AdminService::new(AdminParts {
            oneself: Arc::clone(&self.oneself),
            shards: self.groups.iter().map(shard).collect(),
            peers: Arc::clone(&self.admin_peers),
            removed: self.removed.clone(),
            scrub: scrub.clone(),
        });
        let hosted = |(id, hosted): (ShardId, HostedShard)| {
            (id, ControlShard { hosted, steward: stewards[&id].clone() })
        };
        let control = control_service::service(ControlParts {
            oneself: Arc::clone(&self.oneself),
            shards: callers.hosted.into_iter().map(hosted).collect(),
            admin: admin.clone(),
            data_dir: config.data_dir.clone(),
            started_ms: callers.incarnation / 1_000_000,
            incarnation: callers.incarnation,
        });
        let readers = self.groups.iter().map(|group| (group.shard(), group.reader().clone()));
        let chunks = ChunkService::new(ChunkServiceParts {
            cluster: self.oneself.cluster.clone(),
            readers: readers.collect(),
            checkpoints: self.checkpoints.clone(),
            damaged: self.damaged.clone(),
        });
        let server = nbd_rpc::server()
            .add_service(self.transport.service())
            .add_service(callers.sessions)
            .add_service(control)
            .add_service(
                AdminServer::new(admin)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                ChunksServer::new(chunks)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            );
        self.spawn(port.run(self.stop.clone()));
        let stop = self.stop.clone();
        self.spawn(async move {
            let stopped = stop.clone().cancelled_owned();
            let served = server.serve_with_incoming_shutdown(callers.callers, stopped);
            let late = async {
                stop.cancelled().await;
                tokio::time::sleep(GOODBYE_MAX).await;
            };
            tokio::select! {
                served = served => if let Err(error) = served {
                    warn!(%error, "the gRPC server ended");
                },
                () = late => info!("a peer does not let go of its connection: leaving it"),
            }
        });
        self.spawn(self.repairer.clone().run(damaged, self.stop.clone()));
        let scrubber = Scrubber::new(ScrubParts {
            groups: self.groups.clone(),
            resync: resync.clone(),
            comparer: self.comparer.clone(),
            repairer: self.repairer.clone(),
            state: scrub,
            bytes_per_second: config.tuning.scrub_bytes_per_second.bytes(),
            interval: config.tuning.scrub_interval.get(),
            stop: self.stop.clone(),
        });
        self.spawn(scrubber.run());
        let (groups, data_dir) = (self.groups.clone(), config.data_dir.clone());
        self.spawn(shard_gauges::watch(groups, data_dir, self.stop.clone()));
    }

    /// Stops everything, once no group needs it any more.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.transport.closed().await;
    }
}
