//! A node: its clock, its disk, and what runs on it between a start and a crash.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nbd_consensus::{GroupConfig, Timestamp, decode_change};
use nbd_log::io::{DiskLock, MemoryDisk};
use nbd_log::log::{LogReader, LogWriter, SegmentPool};
use nbd_shard::{Event, LogWrite, ShardReplica};
use nbd_store::{
    Checkpointer, FormError, Formation, NodeStore, RecoveredShard, ReplicaAddresses, ReplicaInfo,
    ShardReader, SpaceGauge, StoreOptions,
};
use nbd_topology::{ClusterName, Membership, NodeName, ReplicaId, ShardId};
use rand::Rng;

use super::resync::Resync;
use super::server::Attachment;
use super::{Planned, Reply, Told, World};
use crate::failure::Breach;
use crate::ledger::Mirror;
use crate::network::{ConnectionId, Parcel, Side};
use crate::profile::{Drift, Profile};
use crate::random::Draw;
use crate::time::{DRIFT_PPM_MAX, MILLISECOND, Nanos, NodeClock, SECOND};

/// One unit of Raft's time.
const TICK: Duration = Duration::from_millis(25);

/// Ticks without a leader until a follower stands.
const ELECTION_TICKS: u32 = 12;

/// Size of a node's disk. The store takes a few MiB of it in a world's life.
pub(super) const DISK_BYTES: u64 = 24 << 20;

const SEGMENT_BYTES: u64 = 1 << 20;

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    name: NodeName,
    pub(super) clock: NodeClock,
    pub(super) disk: MemoryDisk,
    /// Rises with each start and each end.
    pub(super) life: u32,
    pub(super) running: Option<Box<Running>>,
    /// Its disk is full for a while.
    pub(super) cramped: bool,
    /// What its replicas had in their logs at the end of its last life.
    mirrors: BTreeMap<ShardId, Mirror>,
    /// Ticks that its replicas wait longer than others.
    extra_ticks: u32,
    /// Its disk as it was before log writes that have not left the disk's own cache; only of a disk
    /// that lies about them.
    pub(super) cached_since: Option<MemoryDisk>,
}

/// What a running node consists of.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) log: LogWriter,
    pub(super) log_reader: LogReader,
    pub(super) segments: Arc<SegmentPool>,
    pub(super) checkpointer: Checkpointer,
    pub(super) space: Arc<SpaceGauge>,
    pub(super) directory: u128,
    pub(super) groups: BTreeMap<ShardId, Hosted>,
    /// Shards that are not formed here yet.
    pub(super) unformed: BTreeMap<ShardId, RecoveredShard>,
    /// For the log thread.
    pub(super) queue: VecDeque<(ShardId, LogWrite)>,
    /// What the log thread is writing.
    pub(super) writing: Vec<(ShardId, LogWrite)>,
    pub(super) attachments: BTreeMap<ConnectionId, Attachment>,
    /// The clock as of the last tick: good enough for a first look at the lease.
    pub(super) coarse: Timestamp,
    _lock: Box<dyn DiskLock>,
}

/// A replica and what surrounds it.
#[derive(Debug)]
pub(super) struct Hosted {
    pub(super) id: ReplicaId,
    pub(super) replica: ShardReplica<Reply>,
    pub(super) reader: ShardReader,
    pub(super) mirror: Mirror,
    /// Commands that wait to be taken in.
    pub(super) mailbox: Vec<(Bytes, Reply)>,
    pub(super) turn_planned: bool,
    pub(super) resync: Option<Resync>,
}

impl Node {
    pub(super) fn replica_id(&self, shard: ShardId) -> Option<ReplicaId> {
        self.running.as_ref()?.groups.get(&shard).map(|group| group.id)
    }

    fn options(&self, profile: &Profile, fault: Option<nbd_store::StoreFault>) -> StoreOptions {
        let mut seed = [0; 32];
        seed[..4].copy_from_slice(&self.life.to_le_bytes());
        seed[4..4 + self.name.as_str().len()].copy_from_slice(self.name.as_str().as_bytes());
        StoreOptions {
            cluster: name::<ClusterName>("sim"),
            node: self.name.clone(),
            shards: (0..profile.shards).map(ShardId).collect(),
            segment_bytes: SEGMENT_BYTES,
            log_bytes_max: 6 * SEGMENT_BYTES,
            log_cache_bytes: profile.log_cache_bytes,
            checkpoint_log_bytes: SEGMENT_BYTES,
            meta_cache_bytes: 1 << 20,
            space_reserve_bytes: 0,
            decode_change,
            fault,
            rng_seed: seed,
        }
    }

    fn info(&self, id: ReplicaId, directory: u128) -> ReplicaInfo {
        let addresses = ReplicaAddresses::default();
        ReplicaInfo { id, node: self.name.clone(), directory, addresses }
    }

    pub(super) const fn name(&self) -> &NodeName {
        &self.name
    }
}

fn name<N: std::str::FromStr>(text: &str) -> N {
    let Ok(name) = text.parse() else { unreachable!("{text} is a valid name") };
    name
}

/// The id of node `n`'s first replica of any shard.
pub(super) fn initial_id(node: usize) -> ReplicaId {
    let Some(id) = ReplicaId::new(node as u64 + 1) else { unreachable!("ids begin at 1") };
    id
}

impl World {
    pub(super) fn make_nodes(&mut self) {
        let slowest = match self.profile.drift {
            Drift::Apart => self.rng.random_range(0..self.profile.nodes),
            Drift::None | Drift::Any => 0,
        };
        for n in 0..self.profile.nodes {
            let offset = self.rng.span(0, 1_000 * SECOND);
            let rate_ppm = match self.profile.drift {
                Drift::None => self.rng.random_range(0..=0),
                Drift::Any => self.rng.random_range(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX),
                Drift::Apart if n == slowest => -DRIFT_PPM_MAX,
                Drift::Apart => DRIFT_PPM_MAX,
            };
            let clock = NodeClock::new(offset, rate_ppm);
            let disk = MemoryDisk::new(self.disks.random());
            disk.set_capacity(DISK_BYTES);
            self.nodes.push(Node {
                name: name(&format!("n{n}")),
                clock,
                disk,
                life: 0,
                running: None,
                cramped: false,
                mirrors: BTreeMap::new(),
                extra_ticks: 0,
                cached_since: None,
            });
        }
        for node in 0..self.profile.nodes {
            self.start_node(node);
            for shard in 0..self.profile.shards {
                self.form(node, ShardId(shard));
            }
        }
    }

    /// What the formation of a new cluster comes to, once every member has answered.
    fn form(&mut self, node: usize, shard: ShardId) {
        let members = (0..self.profile.nodes).map(initial_id);
        let replicas =
            (0..self.profile.nodes).map(|n| self.nodes[n].info(initial_id(n), n as u128));
        let formation = Formation {
            replica: initial_id(node),
            membership: Membership::of_voters(members),
            replicas: replicas.collect(),
            next_replica: self.profile.nodes as u64 + 1,
        };
        self.form_as(node, shard, &formation, false);
    }

    /// Forms a shard on a node and starts its group.
    pub(super) fn form_as(
        &mut self,
        node: usize,
        shard: ShardId,
        formation: &Formation,
        restarted: bool,
    ) {
        let Some(running) = &mut self.nodes[node].running else { return };
        let Some(mut recovered) = running.unformed.remove(&shard) else { return };
        match running.checkpointer.form(shard, formation) {
            Ok(()) => {}
            Err(FormError::Store(_)) => {
                self.fail_node(node);
                return;
            }
            Err(error) => {
                self.fail(Breach::StartFailed { node, reason: format!("{error:?}") });
                return;
            }
        }
        recovered.raft.membership = formation.membership.clone();
        self.places.insert((shard, formation.replica), node);
        self.start_group(node, recovered, formation.replica, restarted);
    }

    /// Opens a node's directory and starts what it finds there.
    pub(super) fn start_node(&mut self, n: usize) {
        let fault = self.plant.store();
        // A wait of its own for each, so that no two stand at the same time for ever.
        let taken: Vec<u32> = self.nodes.iter().map(|node| node.extra_ticks).collect();
        let node = &mut self.nodes[n];
        if node.running.is_some() {
            return;
        }
        node.life += 1;
        node.extra_ticks = loop {
            let extra = self.rng.random_range(0..ELECTION_TICKS);
            if !taken.contains(&extra) {
                break extra;
            }
        };
        let life = node.life;
        let store =
            NodeStore::open(Arc::new(node.disk.clone()), node.options(&self.profile, fault));
        let store = match store {
            Ok(store) => store,
            Err(_) if node.cramped => {
                self.schedule.after(100 * MILLISECOND, Planned::Restart { node: n });
                return;
            }
            Err(error) => {
                self.fail(Breach::StartFailed { node: n, reason: format!("{error:?}") });
                return;
            }
        };
        let NodeStore { log, log_reader, segments, checkpointer, space, identity, lock, shards } =
            store;
        node.running = Some(Box::new(Running {
            log,
            log_reader,
            segments,
            checkpointer,
            space,
            directory: identity.directory,
            groups: BTreeMap::new(),
            unformed: BTreeMap::new(),
            queue: VecDeque::new(),
            writing: Vec::new(),
            attachments: BTreeMap::new(),
            coarse: Timestamp(node.clock.read(self.schedule.now())),
            _lock: lock,
        }));
        self.count("node starts");
        self.tell(&Told::Life { node: n, life, up: true });
        for recovered in shards {
            let shard = recovered.shard;
            if let Some(before) = self.nodes[n].mirrors.remove(&shard)
                && let Err(breach) = before.check_kept(&recovered.raft)
            {
                self.fail(breach);
                return;
            }
            match recovered.formation.as_ref().map(|formation| formation.replica) {
                Some(id) => self.start_group(n, recovered, id, true),
                None => {
                    if let Some(running) = &mut self.nodes[n].running {
                        running.unformed.insert(shard, recovered);
                    }
                }
            }
        }
        let wait = self.tick_offset(n);
        self.schedule.after(wait, Planned::Tick { node: n, life });
        let wait = self.rng.span(0, 2 * self.profile.checkpoint_interval);
        self.schedule.after(wait, Planned::Checkpoint { node: n, life });
        self.front_of_node_comes_up(n);
        self.plan_join(n);
    }

    fn tick_offset(&mut self, node: usize) -> u64 {
        let tick = self.nodes[node].clock.true_span(TICK);
        self.rng.span(0, tick)
    }

    fn start_group(&mut self, n: usize, recovered: RecoveredShard, id: ReplicaId, restarted: bool) {
        let RecoveredShard { shard, writer, reader, raft, .. } = recovered;
        let node = &mut self.nodes[n];
        let mut config = GroupConfig::new(shard, id);
        config.tick = TICK;
        config.election_ticks = ELECTION_TICKS;
        config.election_ticks_jitter = false;
        config.election_ticks_extra = node.extra_ticks;
        config.read_mode = self.profile.read_mode;
        config.restarted = restarted;
        config.cache_bytes_max = self.profile.log_cache_bytes;
        // Little beside the log, which cannot let go of what is not applied.
        config.uncommitted_bytes_max = 512 << 10;
        config.entry_bytes_max = 512 << 10;
        #[cfg(feature = "planted-faults")]
        if let crate::plant::Plant::Consensus(fault) = self.plant {
            config.fault = Some(fault);
        }
        let mirror = Mirror::of(&raft);
        let retention = &self.profile.retention_bytes;
        let retention = retention[n % retention.len()];
        let replica = ShardReplica::new(config, writer, raft, retention);
        let replica = match replica {
            Ok(replica) => replica,
            Err(error) => {
                self.fail(Breach::StartFailed { node: n, reason: format!("{error:?}") });
                return;
            }
        };
        let Some(running) = &mut node.running else { return };
        let hosted = Hosted {
            id,
            replica,
            reader,
            mirror,
            mailbox: Vec::new(),
            turn_planned: false,
            resync: None,
        };
        running.groups.insert(shard, hosted);
    }

    /// How long a node really waits between standing for election twice.
    pub(super) fn election_wait(&self, n: usize) -> Nanos {
        let node = &self.nodes[n];
        node.clock.true_span(TICK * (ELECTION_TICKS + node.extra_ticks))
    }

    pub(super) fn on_tick(&mut self, n: usize, life: u32) {
        let now = self.schedule.now();
        let node = &mut self.nodes[n];
        if node.life != life {
            return;
        }
        let (wait, coarse) = (node.clock.true_span(TICK), Timestamp(node.clock.read(now)));
        let Some(running) = &mut node.running else { return };
        let shards: Vec<ShardId> = running.groups.keys().copied().collect();
        for shard in shards {
            self.step(n, shard, Event::Tick);
        }
        if let Some(running) = &mut self.nodes[n].running {
            running.coarse = coarse;
        }
        self.schedule.after(wait, Planned::Tick { node: n, life });
    }

    /// The commands that have gathered are taken in, if the replica takes any.
    pub(super) fn on_turn(&mut self, n: usize, life: u32, shard: ShardId) {
        if self.nodes[n].life != life {
            return;
        }
        let Some(running) = &mut self.nodes[n].running else { return };
        let Some(group) = running.groups.get_mut(&shard) else { return };
        group.turn_planned = false;
        if group.mailbox.is_empty() {
            return;
        }
        if !group.replica.accepts_proposals() {
            group.turn_planned = true;
            self.schedule.after(MILLISECOND / 4, Planned::Turn { node: n, life, shard });
            return;
        }
        let commands = std::mem::take(&mut group.mailbox);
        self.step(n, shard, Event::Propose(commands));
    }

    /// Puts a command into a replica's mailbox.
    pub(super) fn propose(&mut self, n: usize, shard: ShardId, command: Bytes, reply: Reply) {
        let life = self.nodes[n].life;
        let Some(running) = &mut self.nodes[n].running else { return };
        let Some(group) = running.groups.get_mut(&shard) else { return };
        group.mailbox.push((command, reply));
        if !group.turn_planned {
            group.turn_planned = true;
            let wait = self.rng.span(1_000, 50_000);
            self.schedule.after(wait, Planned::Turn { node: n, life, shard });
        }
    }

    pub(super) fn on_connection_lost(&mut self, n: usize, life: u32, peer: usize) {
        if self.nodes[n].life != life || peer >= self.nodes.len() {
            return;
        }
        let Some(running) = &self.nodes[n].running else { return };
        let shards: Vec<(ShardId, Option<ReplicaId>)> = running
            .groups
            .iter()
            .map(|(shard, group)| (*shard, group.replica.brief().leader))
            .collect();
        for (shard, leader) in shards {
            let lost = |id: ReplicaId| self.places.get(&(shard, id)) == Some(&peer);
            let leader_lost = leader.is_some_and(lost);
            let ids: Vec<ReplicaId> = self
                .places
                .iter()
                .filter(|((of, _), node)| *of == shard && **node == peer)
                .map(|((_, id), _)| *id)
                .collect();
            for id in ids {
                self.step(n, shard, Event::PeerUnreachable(id));
            }
            if leader_lost {
                self.step(n, shard, Event::LeaderLost);
            }
        }
    }

    /// Ends a node's life: everything in memory is gone. Its peers' connections break; whether they
    /// notice depends on how it died.
    pub(super) fn stop_node(&mut self, n: usize, noticed: bool) {
        let node = &mut self.nodes[n];
        let Some(running) = node.running.take() else { return };
        node.life += 1;
        let life = node.life;
        for (shard, group) in running.groups {
            node.mirrors.insert(shard, group.mirror);
        }
        self.tell(&Told::Life { node: n, life, up: false });
        let peers: Vec<usize> = (0..self.nodes.len()).filter(|peer| *peer != n).collect();
        for peer in peers {
            if noticed && !self.network.is_blocked(n, peer) {
                let wait = self.rng.span(50_000, 20 * MILLISECOND);
                let life = self.nodes[peer].life;
                self.schedule.after(wait, Planned::ConnectionLost { node: peer, life, peer: n });
            }
        }
        for (connection, side) in self.network.ends_at(n) {
            self.network.leave(connection, side);
            if noticed {
                self.post(connection, side.other(), Parcel::Closed);
            }
            let _: Side = side;
        }
        self.front_of_node_dies(n);
    }

    /// The node's disk is as a loss of power leaves it.
    pub(super) fn lose_power(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let disk = node.cached_since.take().unwrap_or_else(|| node.disk.clone());
        node.disk = disk.after_crash(self.disks.random());
        node.disk.set_capacity(DISK_BYTES);
    }

    /// Ends a node's life by a failure that it noticed itself.
    pub(super) fn fail_node(&mut self, n: usize) {
        self.stop_node(n, true);
        self.lose_power(n);
        let wait = self.rng.span(20 * MILLISECOND, SECOND);
        self.schedule.after(wait, Planned::Restart { node: n });
    }

    /// Forgets what was known of a node's log: it has another disk now.
    pub(super) fn forget_log(&mut self, n: usize) {
        self.nodes[n].mirrors.clear();
        self.nodes[n].cached_since = None;
    }
}
