//! Starts and stops a node.
//!
//! ```text
//!  task or thread     ends when                              then
//!  (leadership is handed over, where this node leads)
//!  listener           shutdown begins                        no new connection
//!  connection tasks   shutdown begins and what they hold     their sessions are closed in the log
//!                     is answered, or their client leaves
//!  HTTP server        shutdown begins, answers are out
//!  group tasks        their keeper is dropped (after the     drop their handles on the log thread
//!                     above), or failure
//!  helpers            the network stops, after the groups    formation, resync, scrub, repair,
//!                                                            membership, gRPC server, transport
//!  log thread         the last group task has ended          all that was proposed is durable
//!  checkpoint thread  told to stop, after the log thread     all is home; the lock is released
//! ```
//!
//! When all nodes of a cluster stop at once, nobody hands leadership over, and no group ends before
//! all connections have: [`Replica::drain`], then [`Replica::finish`].
//!
//! A failure of the disk ends the group tasks at once; [`Replica::failed`] then tells the process
//! to stop.
//!
//! - `shards`: from a recovered shard to a running group. `services`: the gRPC server, and the
//!   tasks that look after data and members.

mod services;
mod shards;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use nbd_consensus::{GroupError, Role};
use nbd_front::{Access, ByteBudget, Front, Links, Listener, Route, end_earlier_sessions};
use nbd_log::io::{DiskLock, FileDisk};
use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::trace::{HttpTraces, Service, Tracer};
use nbd_service::{HostPort, Readiness, Shutdown, health, trace};
use nbd_store::{NodeStore, OpenError, Owner, StoreOptions};
use nbd_topology::{NodeName, ShardId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};
use xxhash_rust::xxh3::xxh3_64;

use self::services::{ForCallers, Services};
use self::shards::ShardStarter;
use crate::admin_service::avoided;
use crate::checkpoint_thread::{CheckpointHandle, CheckpointThread, DAMAGED_MAX};
use crate::config::{Config, RAFT_TICK};
use crate::failure::Failure;
use crate::group_task::{self, GroupHandle, GroupKeeper};
use crate::hosted::{
    Attachments, CorruptReads, HostedShard, Hosting, Room, end_attachments, expire_sessions,
};
use crate::http::{Health, ShardProbe};
use crate::log_thread;
use crate::metrics::ReplyMetrics;
use crate::node_port::NodePort;
use crate::relay_service::RelayService;
use crate::session_service;

/// A running node.
#[derive(Debug)]
pub struct Replica {
    node: NodeName,
    nbd: SocketAddr,
    grpc: SocketAddr,
    http: SocketAddr,
    failure: Failure,
    /// Why the node is to end, once its peers have done without it for long.
    isolated: watch::Receiver<Option<String>>,
    readiness: Readiness,
    abandon: CancellationToken,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
    handles: Vec<GroupHandle>,
    keepers: Vec<GroupKeeper>,
    /// Group tasks, also of shards that are still being formed.
    groups: TaskTracker,
    services: Services,
    /// For tests that play another node.
    #[cfg(test)]
    pub(crate) shards: HashMap<ShardId, HostedShard>,
    log_thread: thread::JoinHandle<()>,
    checkpoints: CheckpointHandle,
    checkpoint_thread: thread::JoinHandle<()>,
    tracer: Tracer,
    /// Keeps other processes out of the data directory; let go last.
    lock: Box<dyn DiskLock>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// What would be served there.
        what: &'static str,
        /// The address as configured.
        address: HostPort,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The data directory cannot be made or entered.
    #[error("cannot use the data directory {path}")]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The data directory is not usable by this node.
    #[error("cannot open the data directory {path}")]
    Open {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: OpenError,
    },
    /// The recovered state of a shard makes no sense to Raft.
    #[error("cannot start the group of shard {shard}")]
    Group {
        /// The shard.
        shard: ShardId,
        /// What is wrong with it.
        #[source]
        source: GroupError,
    },
    /// The system refused a thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl Replica {
    /// Binds the sockets, recovers the data directory, and starts serving. Returns once everything
    /// is started; `/readyz` tells when the shards can be written to.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        crate::metrics::describe();
        let listener = bind("NBD", &config.listen.nbd).await?;
        let grpc = bind("gRPC", &config.listen.grpc).await?;
        let http = bind("HTTP", &config.listen.http).await?;
        let (nbd_address, grpc_address, http_address) = (
            local("NBD", &listener, &config.listen.nbd)?,
            local("gRPC", &grpc, &config.listen.grpc)?,
            local("HTTP", &http, &config.listen.http)?,
        );

        let store = open_store(&config).await?;
        let (failure, shutdown) = (Failure::default(), Shutdown::new());
        let service = Service {
            name: "nbd-replica",
            instance: config.node.as_str(),
            version: env!("CARGO_PKG_VERSION"),
        };
        let tracer = Tracer::start(&config.trace, service);
        let (checkpoints, abandon) = (CheckpointHandle::new(), CancellationToken::new());
        let directory = store.identity.directory;
        let NodeStore { log, log_reader, segments, checkpointer, shards, space, lock, .. } = store;
        let (log_handle, log_thread) = log_thread::spawn(
            &config.node,
            log,
            Arc::clone(&segments),
            checkpoints.clone(),
            failure.clone(),
            abandon.clone(),
        )
        .map_err(StartError::Thread)?;

        let (mut handles, mut keepers, mut recovered) = (Vec::new(), Vec::new(), Vec::new());
        for shard in shards {
            let (handle, keeper, mailbox) = group_task::mailbox(shard.reader.clone());
            handles.push(handle.clone());
            keepers.push(keeper);
            // What recovery found stays until the group says otherwise.
            segments.retain(shard.shard, shard.raft.compacted.0);
            recovered.push((shard, handle, mailbox));
        }
        let (damaged_tx, damaged) = tokio::sync::mpsc::channel(DAMAGED_MAX);
        let checkpoint_thread = CheckpointThread {
            checkpointer,
            segments,
            space: Arc::clone(&space),
            groups: handles.clone(),
            handle: checkpoints.clone(),
            damaged: damaged_tx.clone(),
            failure: failure.clone(),
        }
        .spawn(&config.node)
        .map_err(StartError::Thread)?;

        let services = Services::new(
            &config,
            directory,
            &handles,
            checkpoints.clone(),
            failure.clone(),
            damaged_tx,
        );
        let groups = TaskTracker::new();
        let starter = ShardStarter {
            config: config.clone(),
            log: log_handle,
            log_reader,
            services: services.clone(),
            failure: failure.clone(),
            abandon: abandon.clone(),
            shutdown: shutdown.clone(),
            tracer: tracer.clone(),
        };
        let resync = starter.start_all(recovered, &groups);
        let access = Arc::new(Access {
            cluster: config.cluster.name().clone(),
            owner: Owner {
                node: xxh3_64(config.node.as_str().as_bytes()),
                incarnation: incarnation(),
            },
            name: config.node.as_str().into(),
            links: Links::default(),
            shutdown: shutdown.clone(),
        });
        let hosting = Arc::new(Hosting {
            room: Room { space, checkpoints: checkpoints.clone() },
            repair: services.repair(),
            shutdown: shutdown.clone(),
            corrupt: CorruptReads::new(),
            tracer: tracer.clone(),
            replies: ReplyMetrics::new(),
        });
        let hosted = |group: &GroupHandle| {
            let (group, hosting) = (group.clone(), Arc::clone(&hosting));
            let attached = Attachments::default();
            (group.shard(), HostedShard { group, attached, hosting })
        };
        let hosted: HashMap<_, _> = handles.iter().map(hosted).collect();
        let client = |shard: &HostedShard| shard.client(Arc::clone(&access));
        let clients: HashMap<_, _> =
            hosted.iter().map(|(id, shard)| (*id, client(shard))).collect();
        for (id, shard) in &hosted {
            shutdown.spawn(end_earlier_sessions(clients[id].clone()));
            let expiry = config.tuning.session_expiry.get();
            shutdown.spawn(expire_sessions(shard.clone(), expiry));
            shutdown.spawn(end_attachments(shard.clone()));
        }
        let sessions = session_service::service(
            access.cluster.clone(),
            hosted.clone(),
            Some(services.addresses()),
        );
        let relays = RelayService::new(access.cluster.clone(), hosted.clone(), shutdown.clone());
        let (port, callers) = NodePort::new(grpc, relays);
        let incarnation = access.owner.incarnation;
        let callers = ForCallers { callers, sessions, hosted: hosted.clone(), incarnation };
        services.serve(port, callers, &config, &resync, damaged);
        let isolated = services.watch_isolation(&config, &resync);

        let readiness = serve_readiness(&handles, &shutdown);
        let probe = |group: &GroupHandle| {
            let id = group.shard();
            let (client, resync) = (clients[&id].clone(), resync[&id].clone());
            Arc::new(ShardProbe::new(client, group.clone(), resync))
        };
        let health = Health {
            node: config.node.clone(),
            failure: failure.clone(),
            deadline: config.tuning.health_deadline.get(),
            shards: handles.iter().map(probe).collect(),
            checkpoints: checkpoints.clone(),
        };
        let front = Front::new(
            config.cluster.shard_count(),
            clients,
            config.volumes,
            ByteBudget::new(config.tuning.request_bytes_max.bytes()),
            shutdown.clone(),
        )
        .traced(tracer.clone());
        let traces = HttpTraces { tracer: tracer.clone(), by_chance: false };
        let traced = axum::middleware::from_fn_with_state(traces, trace::traced);
        let router = health::probes(readiness.clone(), metrics)
            .merge(crate::http::router(Arc::new(health)))
            .merge(front.sessions().router())
            .layer(traced);
        serve_router(http, router, &shutdown);
        let connections_max = config.tuning.connections_max as usize;
        shutdown.spawn(Listener::new(listener, Arc::new(front), connections_max).run());
        info!(node = %config.node, nbd = %nbd_address, grpc = %grpc_address, http = %http_address,
              "started");
        Ok(Self {
            node: config.node,
            nbd: nbd_address,
            grpc: grpc_address,
            http: http_address,
            failure,
            isolated,
            readiness,
            abandon,
            shutdown,
            shutdown_deadline: config.tuning.shutdown_deadline.get(),
            handles,
            keepers,
            groups,
            services,
            #[cfg(test)]
            shards: hosted,
            log_thread,
            checkpoints,
            checkpoint_thread,
            tracer,
            lock,
        })
    }

    /// This node's name.
    #[must_use]
    pub const fn node(&self) -> &NodeName {
        &self.node
    }

    /// Where NBD is served.
    #[must_use]
    pub const fn nbd_address(&self) -> SocketAddr {
        self.nbd
    }

    /// Where other nodes are served.
    #[must_use]
    pub const fn grpc_address(&self) -> SocketAddr {
        self.grpc
    }

    /// Where HTTP is served.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// Whether every shard can be read and written.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.readiness.is_ready()
    }

    /// Waits until the node's disk has failed, and gives the reason.
    pub async fn failed(&self) -> String {
        self.failure.wait().await
    }

    /// Waits until the node is to end itself because its peers do without it, and gives the reason.
    /// Never, unless that was configured.
    pub async fn isolated(&self) -> String {
        let mut isolated = self.isolated.clone();
        match isolated.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            // Whoever would say so has ended, or was never there.
            Err(_) => std::future::pending().await,
        }
    }

    /// Stops: finishes what is under way, within the configured deadline, and takes a last
    /// checkpoint. What is not finished then is abandoned; nothing acknowledged is lost by it.
    ///
    /// # Errors
    /// The reason, if the node's disk has failed by then.
    pub async fn stop(self) -> Result<(), String> {
        self.readiness.drain();
        // First: what is under way here goes on through the next leader, and clients of other nodes
        // do not wait for this one's.
        hand_over(&self.handles).await;
        self.drain().await;
        self.finish().await
    }

    /// The first half of stopping all nodes of a cluster at once, when nobody is left to hand
    /// leadership to: takes nothing new and finishes what clients have under way, within the
    /// configured deadline. The node goes on as a replica, so that the others can do the same.
    pub async fn drain(&self) {
        self.readiness.drain();
        if let Err(late) = self.shutdown.drain(self.shutdown_deadline).await {
            warn!(%late, "stopping without waiting any longer");
        }
    }

    /// The second half, once every node is [drained](Self::drain): ends the groups and takes a last
    /// checkpoint.
    ///
    /// # Errors
    /// The reason, if the node's disk has failed by then.
    pub async fn finish(self) -> Result<(), String> {
        drop(self.keepers);
        self.groups.close();
        if tokio::time::timeout(ABANDON_AFTER, self.groups.wait()).await.is_err() {
            warn!("the log does not take what is under way: abandoning it");
            self.abandon.cancel();
            self.groups.wait().await;
        }
        self.services.stop().await;
        let (log, checkpoint) = (self.log_thread, self.checkpoint_thread);
        let checkpoints = self.checkpoints;
        let joined = tokio::task::spawn_blocking(move || {
            let log = log.join();
            checkpoints.stop();
            (log, checkpoint.join())
        });
        match joined.await {
            Ok((Ok(()), Ok(()))) => info!(node = %self.node, "stopped"),
            _ => warn!(node = %self.node, "a thread ended badly"),
        }
        self.tracer.shutdown().await;
        drop(self.lock);
        self.failure.reason().map_or(Ok(()), Err)
    }

    /// Gives the node up after its disk has failed. Keeps the data directory locked until the
    /// process ends: its threads may still be writing.
    pub fn abandon(self) {
        std::mem::forget(self.lock);
    }
}

/// Time that the log has, once nothing new is proposed, to take what is under way.
const ABANDON_AFTER: Duration = Duration::from_secs(2);

/// Times that another replica is asked to take over where this node leads.
const HAND_OVER_ATTEMPTS: usize = 3;

/// Wait for a replica that was asked to take over: somewhat longer than the election timeout, after
/// which the request is void. It also bounds how long a replica that has just started must not
/// stand for election.
const HAND_OVER_MAX: Duration = RAFT_TICK.saturating_mul(14);

/// Hands leadership of each group that this node leads to another voter, so that clients elsewhere
/// need not wait for an election.
async fn hand_over(groups: &[GroupHandle]) {
    let mut handing = tokio::task::JoinSet::new();
    for group in groups {
        let group = group.clone();
        handing.spawn(async move {
            if !hand_over_one(&group).await {
                warn!(shard = %group.shard(), "nobody took over leadership in time");
            }
        });
    }
    handing.join_all().await;
}

/// Asks the voters in turn, the most advanced first, and those on cordoned nodes last: one that has
/// just started refuses. `false`: it still leads.
async fn hand_over_one(group: &GroupHandle) -> bool {
    for attempt in 0..HAND_OVER_ATTEMPTS {
        let Ok(status) = group.details().await else { return true };
        let cordoned = avoided(&group.reader().replicas(), &group.reader().cordoned());
        let voters = status.peers.iter().filter(|peer| peer.active && !peer.learner);
        let voters =
            voters.map(|peer| (!cordoned.contains(&peer.replica), peer.matched, peer.replica));
        let mut voters: Vec<_> = voters.collect();
        voters.sort_unstable_by(|one, other| other.cmp(one));
        if status.role != Role::Leader || voters.is_empty() {
            return true;
        }
        let (_, _, next) = voters[attempt % voters.len()];
        if group.transfer(next).await.is_err() {
            return true;
        }
        let mut route = group.route();
        let elsewhere = |route: &Route| !route.serving && route.leader.is_some();
        let moved = tokio::time::timeout(HAND_OVER_MAX, route.wait_for(elsewhere)).await;
        if moved.is_ok() {
            return true;
        }
    }
    false
}

async fn bind(what: &'static str, address: &HostPort) -> Result<TcpListener, StartError> {
    TcpListener::bind(address.to_string()).await.map_err(|source| StartError::Listen {
        what,
        address: address.clone(),
        source,
    })
}

fn local(
    what: &'static str,
    listener: &TcpListener,
    address: &HostPort,
) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|source| StartError::Listen {
        what,
        address: address.clone(),
        source,
    })
}

async fn open_store(config: &Config) -> Result<NodeStore, StartError> {
    let options = StoreOptions {
        cluster: config.cluster.name().clone(),
        node: config.node.clone(),
        shards: config.shards.clone(),
        segment_bytes: config.tuning.log_segment_bytes.bytes(),
        log_bytes_max: config.tuning.log_bytes_max.bytes(),
        log_cache_bytes: usize::try_from(config.tuning.log_cache_bytes.bytes())
            .unwrap_or(usize::MAX),
        checkpoint_log_bytes: config.tuning.checkpoint_log_bytes.bytes(),
        meta_cache_bytes: META_CACHE_BYTES,
        space_reserve_bytes: config.tuning.space_reserve.bytes(),
        decode_change: nbd_consensus::decode_change,
        fault: None,
        rng_seed: rand::random(),
    };
    let path = config.data_dir.clone();
    let opened = tokio::task::spawn_blocking(move || open_blocking(&path, options));
    match opened.await {
        Ok(opened) => opened,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// Memory for chunk metadata that was read from disk: room for about 300,000 chunks, 18 GiB of
/// data.
const META_CACHE_BYTES: usize = 32 << 20;

fn open_blocking(path: &Path, options: StoreOptions) -> Result<NodeStore, StartError> {
    let unusable = |source| StartError::DataDir { path: path.to_owned(), source };
    std::fs::create_dir_all(path).map_err(unusable)?;
    let disk = FileDisk::open(path).map_err(unusable)?;
    NodeStore::open(Arc::new(disk), options)
        .map_err(|source| StartError::Open { path: path.to_owned(), source })
}

/// Ready once every group has a leader, here or elsewhere.
fn serve_readiness(groups: &[GroupHandle], shutdown: &Shutdown) -> Readiness {
    let (readiness, [latch]) = Readiness::new(["every shard to be led"]);
    for group in groups {
        let (group, latch, stop) = (group.clone(), latch.clone(), shutdown.started());
        shutdown.spawn(async move {
            let mut route = group.route();
            let led = |route: &Route| {
                let elsewhere = route.leader.as_ref().is_some_and(|leader| !leader.local);
                route.serving || elsewhere
            };
            tokio::select! {
                known = route.wait_for(led) => match known {
                    Ok(_) => latch.release(),
                    // Never ready: the condition must not be met by dropping the latch.
                    Err(_) => std::mem::forget(latch),
                },
                () = stop => std::mem::forget(latch),
            }
        });
    }
    readiness
}

fn serve_router(listener: TcpListener, router: axum::Router, shutdown: &Shutdown) {
    let stop = shutdown.token();
    shutdown.spawn(async move {
        if let Err(error) = serve_http(listener, router, stop).await {
            warn!(%error, "the HTTP server ended");
        }
    });
}

/// Tells this life of the process from earlier ones: higher than theirs, as long as the machine's
/// clock is not set back by more than a life lasts. If it is, sessions of the life before stay
/// open.
fn incarnation() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
