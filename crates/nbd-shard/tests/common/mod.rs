//! Three replicas on disks in memory, driven step by step: the log and the network do what the test
//! says, and nothing happens in between.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_consensus::{Append, Entry, GroupConfig, OutMessage, Role, SnapshotOffer, Timestamp};
use nbd_log::checksum::crc32c;
use nbd_log::io::MemoryDisk;
use nbd_log::log::{EntryRecord, HardState, LogReader, LogWriter, Record, SegmentPool};
use nbd_shard::{
    Actions, Answer, Event, FetchPlan, InstallPlan, Persisted, ShardReplica, log_kind, raft_kind,
};
use nbd_store::{
    Checkpointer, EntryPlace, Formation, NodeStore, RecoveredShard, ReplicaAddresses, ReplicaInfo,
    ShardReader, ShardSnapshot, StoreOptions,
};
use nbd_topology::{Membership, ReplicaId, ShardId};

pub(crate) const SHARD: ShardId = ShardId(0);
const TICK_NANOS: u64 = 25_000_000;
const MIB: u64 = 1 << 20;

/// Names what was asked of a replica.
pub(crate) type Tag = u32;

pub(crate) struct Node {
    pub(crate) replica: ShardReplica<Tag>,
    pub(crate) reader: ShardReader,
    pub(crate) checkpointer: Checkpointer,
    pub(crate) segments: Arc<SegmentPool>,
    log: LogWriter,
    log_reader: LogReader,
    appends: VecDeque<Append>,
    fetches: VecDeque<FetchPlan>,
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
        let disk = Arc::new(MemoryDisk::new(at as u64));
        let store = NodeStore::open(disk, options(at)).unwrap();
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
            replica,
            reader,
            checkpointer,
            segments,
            log,
            log_reader,
            appends: VecDeque::new(),
            fetches: VecDeque::new(),
            answers: BTreeMap::new(),
            offered: None,
            install: None,
        }
    }

    /// Makes an append durable.
    fn write(&mut self, append: &Append) -> Persisted {
        let hard_state = append.hard_state.map(|state| HardState {
            term: state.term,
            vote: state.vote.map_or(0, ReplicaId::get),
            commit: state.commit,
        });
        let mut records: Vec<Record<'_>> =
            hard_state.into_iter().map(|state| Record::HardState(SHARD, state)).collect();
        let skipped = records.len();
        records.extend(append.entries.iter().map(|entry| {
            Record::Entry(EntryRecord {
                shard: SHARD,
                index: entry.index,
                term: entry.term,
                kind: log_kind(entry.kind),
                data: &entry.data,
            })
        }));
        let positions =
            if records.is_empty() { Vec::new() } else { self.log.append(&records).unwrap() };
        let place = |(entry, position): (&Entry, &nbd_log::log::LogPosition)| EntryPlace {
            index: entry.index,
            term: entry.term,
            kind: log_kind(entry.kind),
            position: *position,
            len: entry.data.len(),
            crc: crc32c(&entry.data),
        };
        let places = append.entries.iter().zip(positions.iter().skip(skipped)).map(place);
        Persisted { ready: append.ready, places: places.collect() }
    }

    fn read(&self, plan: &FetchPlan) -> Vec<Entry> {
        let entry = |place: &EntryPlace| {
            let mut data = BytesMut::zeroed(place.len);
            self.log_reader.read(place.position, &mut data).ok()?;
            assert_eq!(crc32c(&data), place.crc);
            let (index, term, kind) = (place.index, place.term, raft_kind(place.kind));
            Some(Entry { index, term, kind, data: data.freeze() })
        };
        plan.places.iter().map(entry).collect::<Option<_>>().unwrap_or_default()
    }
}

impl Cluster {
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
        node.appends.extend(actions.appends);
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
        let Some(append) = node.appends.pop_front() else { return false };
        let persisted = node.write(&append);
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
                    let entries = self.nodes[at].read(&plan);
                    self.fetches += usize::from(!entries.is_empty());
                    self.step(at, Event::Fetched { first: plan.first, entries });
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
        let first_kept = node.segments.first_kept(SHARD);
        let (applied, term) = (snapshot.applied, snapshot.applied_term);
        self.step(at, Event::Checkpointed { applied, term, first_kept });
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
