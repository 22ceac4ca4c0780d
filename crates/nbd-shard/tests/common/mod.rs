//! Three replicas on disks in memory, driven step by step: the log and the network do what the test
//! says, and nothing happens in between.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_consensus::{Entry, GroupConfig, OutMessage, Role, SnapshotOffer, Timestamp};
use nbd_log::checksum::crc32c;
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::{LogReader, LogWriter, SegmentPool};
use nbd_shard::{
    Actions, Answer, Checkpointed, Event, FetchPlan, InstallPlan, LogTail, LogWrite, Persisted,
    ShardReplica, raft_kind,
};
use nbd_store::{
    Checkpointer, EntryPlace, Formation, NodeStore, RaftRecovered, RecoveredShard,
    ReplicaAddresses, ReplicaInfo, ShardReader, ShardSnapshot, StoreOptions,
};
use nbd_topology::{Membership, ReplicaId, ShardId};

pub(crate) const SHARD: ShardId = ShardId(0);
const TICK_NANOS: u64 = 25_000_000;
const MIB: u64 = 1 << 20;

/// Names what was asked of a replica.
pub(crate) type Tag = u32;

pub(crate) struct Node {
    disk: MemoryDisk,
    pub(crate) replica: ShardReplica<Tag>,
    pub(crate) reader: ShardReader,
    pub(crate) checkpointer: Checkpointer,
    pub(crate) segments: Arc<SegmentPool>,
    log: LogWriter,
    log_reader: LogReader,
    log_writes: VecDeque<LogWrite>,
    fetches: VecDeque<FetchPlan>,
    read_backs: VecDeque<Vec<EntryPlace>>,
    pub(crate) answers: BTreeMap<Tag, Answer>,
    pub(crate) offered: Option<SnapshotOffer>,
    pub(crate) install: Option<InstallPlan>,
}

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    network: VecDeque<(usize, OutMessage)>,
    /// Replicas that nothing reaches and whose messages are lost.
    pub(crate) cut: BTreeSet<usize>,
    now: u64,
    /// Log reads for followers that lagged.
    pub(crate) fetches: usize,
}

fn id(at: usize) -> ReplicaId {
    ReplicaId::new(at as u64 + 1).unwrap()
}

fn formation(at: usize, replicas: usize) -> Formation {
    let info = |at: usize| ReplicaInfo {
        id: id(at),
        node: format!("node-{at}").parse().unwrap(),
        directory: at as u128 + 1,
        addresses: ReplicaAddresses::default(),
    };
    Formation {
        replica: id(at),
        membership: Membership::of_voters((0..replicas).map(id)),
        replicas: (0..replicas).map(info).collect(),
        next_replica: replicas as u64 + 1,
    }
}

fn options(at: usize) -> StoreOptions {
    StoreOptions {
        cluster: "test".parse().unwrap(),
        node: format!("node-{at}").parse().unwrap(),
        shards: vec![SHARD],
        segment_bytes: MIB,
        log_bytes_max: 16 * MIB,
        log_cache_bytes: 0,
        checkpoint_log_bytes: 2 * MIB,
        meta_cache_bytes: 1 << 16,
        space_reserve_bytes: 0,
        decode_change: nbd_consensus::decode_change,
        fault: None,
        rng_seed: [7; 32],
    }
}

impl Node {
    fn open(at: usize, replicas: usize, retention_bytes: u64) -> Self {
        let disk = MemoryDisk::new(at as u64);
        let store = NodeStore::open(Arc::new(disk.clone()), options(at)).unwrap();
        let NodeStore { log, log_reader, segments, mut checkpointer, mut shards, .. } = store;
        checkpointer.form(SHARD, &formation(at, replicas)).unwrap();
        let RecoveredShard { writer, reader, mut raft, .. } = shards.remove(0);
        raft.membership = writer.membership();
        let mut config = GroupConfig::new(SHARD, id(at));
        config.election_ticks_jitter = false;
        config.election_ticks_extra = 4 * u32::try_from(at).unwrap();
        config.restarted = false;
        config.cache_bytes_max = 2000;
        let replica = ShardReplica::new(config, writer, raft, retention_bytes).unwrap();
        Self {
            disk,
            replica,
            reader,
            checkpointer,
            segments,
            log,
            log_reader,
            log_writes: VecDeque::new(),
            read_backs: VecDeque::new(),
            fetches: VecDeque::new(),
            answers: BTreeMap::new(),
            offered: None,
            install: None,
        }
    }

    /// Makes a write durable.
    pub(crate) fn write(&mut self, write: &LogWrite) -> Persisted {
        let records: Vec<_> = write.records(SHARD).collect();
        let positions =
            if records.is_empty() { Vec::new() } else { self.log.append(&records).unwrap() };
        write.persisted(&mut positions.into_iter())
    }

    fn read(&self, places: &[EntryPlace]) -> Vec<Entry> {
        let entry = |place: &EntryPlace| {
            let mut data = BytesMut::zeroed(place.len);
            self.log_reader.read(place.position, &mut data).ok()?;
            assert_eq!(crc32c(&data), place.crc);
            let (index, term, kind) = (place.index, place.term, raft_kind(place.kind));
            Some(Entry { index, term, kind, data: data.freeze() })
        };
        places.iter().map(entry).collect::<Option<_>>().unwrap_or_default()
    }
}

impl Cluster {
    /// What a replica would go on with, had it lost power now.
    pub(crate) fn after_crash(&self, at: usize) -> RaftRecovered {
        let disk = self.nodes[at].disk.after_crash_as(CrashStyle::Clean, 0);
        let store = NodeStore::open(Arc::new(disk), options(at)).unwrap();
        store.shards.into_iter().next().unwrap().raft
    }

    pub(crate) fn new(replicas: usize, retention_bytes: u64) -> Self {
        let nodes = (0..replicas).map(|at| Node::open(at, replicas, retention_bytes)).collect();
        let (network, cut) = (VecDeque::new(), BTreeSet::new());
        Self { nodes, network, cut, now: 1_000_000_000, fetches: 0 }
    }

    /// A cluster whose first replica leads.
    pub(crate) fn led(replicas: usize, retention_bytes: u64) -> Self {
        let mut cluster = Self::new(replicas, retention_bytes);
        cluster.run(15);
        assert_eq!(cluster.leader(), Some(0));
        cluster
    }

    pub(crate) fn leader(&self) -> Option<usize> {
        let leads = |at: &usize| self.nodes[*at].replica.brief().role == Role::Leader;
        (0..self.nodes.len()).filter(leads).max_by_key(|at| self.nodes[*at].replica.brief().term)
    }

    pub(crate) fn step(&mut self, at: usize, event: Event<Tag>) {
        let mut actions = Actions::default();
        let node = &mut self.nodes[at];
        node.replica.step(Timestamp(self.now), event, &mut actions);
        node.log_writes.extend(actions.log_writes);
        node.read_backs.extend(actions.read_back);
        if let Some(LogTail { applied, from }) = actions.log_tail {
            node.segments.tail_begins(SHARD, applied, from);
        }
        node.fetches.extend(actions.fetch);
        for (tag, answer) in actions.answers {
            assert_eq!(node.answers.insert(tag, answer), None, "{tag} is answered twice");
        }
        if actions.snapshot_offered.is_some() {
            node.offered = actions.snapshot_offered;
        }
        if actions.install.is_some() {
            node.install = actions.install;
        }
        if let Some(above) = actions.keep_above {
            node.segments.retain(SHARD, above);
        }
        if !self.cut.contains(&at) {
            self.network.extend(actions.send.into_iter().map(|message| (at, message)));
        }
    }

    pub(crate) fn propose(&mut self, at: usize, commands: Vec<(Bytes, Tag)>) {
        self.step(at, Event::Propose(commands));
    }

    /// Makes the oldest append of a replica durable.
    pub(crate) fn persist(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let Some(write) = node.log_writes.pop_front() else { return false };
        let persisted = node.write(&write);
        self.step(at, Event::Persisted(persisted));
        true
    }

    /// Does everything there is to do without time passing.
    pub(crate) fn settle(&mut self) {
        loop {
            let mut busy = false;
            while let Some((_, message)) = self.network.pop_front() {
                busy = true;
                let to = usize::try_from(message.to.get()).unwrap() - 1;
                if !self.cut.contains(&to) {
                    self.step(to, Event::Message(message.bytes));
                }
            }
            for at in 0..self.nodes.len() {
                busy |= self.persist(at);
                if let Some(plan) = self.nodes[at].fetches.pop_front() {
                    let entries = self.nodes[at].read(&plan.places);
                    self.fetches += usize::from(!entries.is_empty());
                    self.step(at, Event::Fetched { first: plan.first, entries });
                    busy = true;
                }
                if let Some(places) = self.nodes[at].read_backs.pop_front() {
                    let entries = self.nodes[at].read(&places);
                    self.step(at, Event::ReadBack(entries));
                    busy = true;
                }
            }
            if !busy {
                return;
            }
        }
    }

    pub(crate) fn run(&mut self, ticks: usize) {
        for _ in 0..ticks {
            self.now += TICK_NANOS;
            for at in 0..self.nodes.len() {
                self.step(at, Event::Tick);
            }
            self.settle();
        }
    }

    /// Takes a checkpoint of a replica and tells it.
    pub(crate) fn checkpoint(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.checkpointer.run().unwrap();
        let snapshot = node.reader.snapshot().unwrap();
        let (applied, term) = (snapshot.applied, snapshot.applied_term);
        let first_kept = node.segments.first_kept(SHARD).unwrap_or_else(|| applied.next());
        let holds_up_log = node.segments.is_held_up_by(SHARD);
        let checkpoint = Checkpointed { applied, term, first_kept, holds_up_log };
        self.step(at, Event::Checkpointed(checkpoint));
    }

    /// Copies what `from` has at home and `to` lacks, and returns the snapshot that goes with it.
    pub(crate) fn copy_chunks(&mut self, from: usize, to: usize) -> ShardSnapshot {
        let since = self.nodes[to].replica.applied();
        self.nodes[to].checkpointer.run().unwrap();
        let source = self.nodes[from].reader.clone();
        let snapshot = source.snapshot().unwrap();
        let page = source.manifest(since, None, 1000).unwrap();
        let image = |stamp: &nbd_store::ChunkStamp| {
            source.read_chunk(stamp.volume, stamp.chunk).unwrap().unwrap()
        };
        let images: Vec<_> = page.chunks.iter().map(image).collect();
        let (checkpointer, upto) = (&mut self.nodes[to].checkpointer, snapshot.applied);
        checkpointer.write_chunks(SHARD, upto, images).unwrap();
        assert_eq!(page.next, None);
        checkpointer.remove_absent(SHARD, upto, None, None, &page.present).unwrap();
        snapshot
    }
}
