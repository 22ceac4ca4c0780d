//! Starts and stops a node.
//!
//! ```text
//!  task or thread     ends when                              then
//!  listener           shutdown begins                        no new connection
//!  connection tasks   shutdown begins and what they hold     their sessions are closed in the log
//!                     is answered, or their client leaves
//!  HTTP server        shutdown begins, answers are out
//!  group tasks        their keeper is dropped (after the     drop their handles on the log thread
//!                     above have drained), or failure
//!  log thread         the last group task has ended          all that was proposed is durable
//!  checkpoint thread  told to stop, after the log thread     all is home; the lock is released
//! ```
//!
//! A failure of the disk ends the group tasks at once; [`Replica::failed`] then tells the process
//! to stop.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{io, thread};

use nbd_consensus::{Entry, EntryKind as RaftKind, Group, GroupConfig, GroupError, Recovered};
use nbd_log::io::{DiskLock, FileDisk};
use nbd_log::log::{EntryKind, LogPosition};
use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{HostPort, Readiness, Shutdown, health};
use nbd_store::{NodeStore, OpenError, RecoveredShard, StoreOptions};
use nbd_topology::{LogIndex, NodeName, ReplicaId, ShardId};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::budget::ByteBudget;
use crate::checkpoint_thread::{CheckpointHandle, CheckpointThread};
use crate::config::{Config, RAFT_TICK};
use crate::failure::Failure;
use crate::group_task::{self, GroupHandle, GroupKeeper, GroupParts};
use crate::http::{Health, ShardProbe};
use crate::log_thread::{self, LogHandle};
use crate::metrics::NbdMetrics;
use crate::nbd::{Listener, Node};
use crate::shard_client::{
    Access, CorruptReads, Links, NoRepair, Owner, Room, ShardClient, end_earlier_sessions,
};

/// A running node.
#[derive(Debug)]
pub struct Replica {
    node: NodeName,
    nbd: SocketAddr,
    http: SocketAddr,
    failure: Failure,
    readiness: Readiness,
    abandon: CancellationToken,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
    keepers: Vec<GroupKeeper>,
    groups: Vec<JoinHandle<()>>,
    log_thread: thread::JoinHandle<()>,
    checkpoints: CheckpointHandle,
    checkpoint_thread: thread::JoinHandle<()>,
    /// For tests that play another node.
    #[cfg(test)]
    pub(crate) shards: HashMap<ShardId, ShardClient>,
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
    /// Binds the sockets, recovers the data directory, and starts serving. Returns once every group
    /// is started; `/readyz` tells when they can be written to.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let listener = bind("NBD", &config.listen.nbd).await?;
        let http = bind("HTTP", &config.listen.http).await?;
        let (nbd_address, http_address) = (
            local("NBD", &listener, &config.listen.nbd)?,
            local("HTTP", &http, &config.listen.http)?,
        );

        let store = open_store(&config).await?;
        let failure = Failure::default();
        let shutdown = Shutdown::new();
        let checkpoints = CheckpointHandle::new();
        let abandon = CancellationToken::new();
        let NodeStore { log, segments, checkpointer, shards, space, lock, .. } = store;
        let (log_handle, log_thread) = log_thread::spawn(
            log,
            Arc::clone(&segments),
            checkpoints.clone(),
            failure.clone(),
            abandon.clone(),
        )
        .map_err(StartError::Thread)?;

        let mut tasks = Vec::new();
        let mut handles = Vec::new();
        let mut keepers = Vec::new();
        for shard in shards {
            let parts =
                group_parts(&config, shard, log_handle.clone(), failure.clone(), abandon.clone())?;
            let (task, handle, keeper) = group_task::new(parts);
            tasks.push(task);
            handles.push(handle);
            keepers.push(keeper);
        }
        drop(log_handle);
        let checkpoint_thread = CheckpointThread {
            checkpointer,
            segments,
            space: Arc::clone(&space),
            groups: handles.clone(),
            handle: checkpoints.clone(),
            failure: failure.clone(),
        }
        .spawn()
        .map_err(StartError::Thread)?;
        let groups = tasks.into_iter().map(|task| tokio::spawn(task.run())).collect();

        let readiness = serve_readiness(&handles, &shutdown);
        serve_probes(&config, http, metrics, &handles, &failure, &readiness, &shutdown);
        let metrics = NbdMetrics::new();
        let access = Arc::new(Access {
            cluster: config.cluster.name().clone(),
            owner: Owner { node: 0, incarnation: rand::random() },
            links: Links::default(),
            room: Room { space, checkpoints: checkpoints.clone() },
            repair: Arc::new(NoRepair),
            shutdown: shutdown.clone(),
            corrupt: CorruptReads(metrics.corrupt.clone()),
        });
        let shards: HashMap<_, _> = handles
            .iter()
            .map(|group| {
                let shard = ShardClient { group: group.clone(), access: Arc::clone(&access) };
                shutdown.spawn(end_earlier_sessions(shard.clone()));
                (group.shard(), shard)
            })
            .collect();
        #[cfg(test)]
        let for_tests = shards.clone();
        let node = Node {
            shard_count: config.cluster.shard_count(),
            shards,
            volumes: config.volumes,
            budget: ByteBudget::new(config.tuning.request_bytes_max.bytes()),
            shutdown: shutdown.clone(),
            metrics,
        };
        let connections_max = config.tuning.connections_max as usize;
        shutdown.spawn(Listener::new(listener, Arc::new(node), connections_max).run());
        info!(node = %config.node, nbd = %nbd_address, http = %http_address, "started");
        Ok(Self {
            node: config.node,
            nbd: nbd_address,
            http: http_address,
            failure,
            readiness,
            abandon,
            shutdown,
            shutdown_deadline: config.tuning.shutdown_deadline.get(),
            keepers,
            groups,
            log_thread,
            checkpoints,
            checkpoint_thread,
            #[cfg(test)]
            shards: for_tests,
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

    /// Stops: finishes what is under way, within the configured deadline, and takes a last
    /// checkpoint. What is not finished then is abandoned; nothing acknowledged is lost by it.
    ///
    /// # Errors
    /// The reason, if the node's disk has failed by then.
    pub async fn stop(self) -> Result<(), String> {
        self.readiness.drain();
        if let Err(late) = self.shutdown.drain(self.shutdown_deadline).await {
            warn!(%late, "stopping without waiting any longer");
        }
        drop(self.keepers);
        let groups = async {
            for group in self.groups {
                if let Err(error) = group.await {
                    warn!(%error, "a group task ended badly");
                }
            }
        };
        tokio::pin!(groups);
        if tokio::time::timeout(ABANDON_AFTER, &mut groups).await.is_err() {
            warn!("the log does not take what is under way: abandoning it");
            self.abandon.cancel();
            groups.await;
        }
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

fn group_parts(
    config: &Config,
    recovered: RecoveredShard,
    log: LogHandle,
    failure: Failure,
    abandon: CancellationToken,
) -> Result<GroupParts, StartError> {
    let RecoveredShard { shard, writer, reader, raft, .. } = recovered;
    let replicas = config.cluster.replicas(shard);
    let id = |node: &NodeName| config.cluster.replica_id(shard, node);
    let (Some(replica), voters) =
        (id(&config.node), replicas.iter().filter_map(id).collect::<Vec<ReplicaId>>())
    else {
        unreachable!("the configuration gave this shard to this node")
    };
    let positions: VecDeque<(LogIndex, LogPosition)> =
        raft.tail.iter().map(|entry| (entry.index, entry.position)).collect();
    let recovered = Recovered {
        hard_state: nbd_consensus::HardState {
            term: raft.hard_state.term,
            vote: ReplicaId::new(raft.hard_state.vote),
            commit: raft.hard_state.commit,
        },
        applied: raft.applied,
        compacted: raft.compacted,
        terms: raft.terms,
        tail: raft
            .tail
            .into_iter()
            .map(|entry| Entry {
                index: entry.index,
                term: entry.term,
                kind: match entry.kind {
                    EntryKind::Command => RaftKind::Command,
                    EntryKind::ConfChange => RaftKind::ConfChange,
                    EntryKind::ConfChangeV2 => RaftKind::ConfChangeV2,
                },
                data: entry.data,
            })
            .collect(),
    };
    let sole_voter = voters.len() == 1;
    let mut settings = GroupConfig::new(shard, replica, voters);
    if sole_voter {
        // Nobody will ever ask for entries that are applied.
        settings.cache_bytes_max = 0;
    }
    let group =
        Group::new(settings, recovered).map_err(|source| StartError::Group { shard, source })?;
    Ok(GroupParts {
        shard,
        group,
        writer,
        reader,
        positions,
        log,
        failure,
        tick: RAFT_TICK,
        sole_voter,
        abandon,
    })
}

/// Ready once every group serves.
fn serve_readiness(groups: &[GroupHandle], shutdown: &Shutdown) -> Readiness {
    let (readiness, [latch]) = Readiness::new(["every shard to be led"]);
    for group in groups {
        let (group, latch, stop) = (group.clone(), latch.clone(), shutdown.started());
        shutdown.spawn(async move {
            tokio::select! {
                serving = group.serving() => match serving {
                    Ok(()) => latch.release(),
                    // Never ready: the condition must not be met by dropping the latch.
                    Err(_) => std::mem::forget(latch),
                },
                () = stop => std::mem::forget(latch),
            }
        });
    }
    readiness
}

fn serve_probes(
    config: &Config,
    listener: TcpListener,
    metrics: PrometheusHandle,
    groups: &[GroupHandle],
    failure: &Failure,
    readiness: &Readiness,
    shutdown: &Shutdown,
) {
    let health = Health {
        node: config.node.clone(),
        failure: failure.clone(),
        deadline: config.tuning.health_deadline.get(),
        shards: groups.iter().cloned().map(|group| Arc::new(ShardProbe::new(group))).collect(),
    };
    let router =
        health::probes(readiness.clone(), metrics).merge(crate::http::router(Arc::new(health)));
    let stop = shutdown.token();
    shutdown.spawn(async move {
        if let Err(error) = serve_http(listener, router, stop).await {
            warn!(%error, "the HTTP server ended");
        }
    });
}
