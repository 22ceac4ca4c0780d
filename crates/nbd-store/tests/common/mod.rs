//! A node of one replica that drives the store as consensus would, and the model it is held
//! against.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use nbd_log::io::Disk;
use nbd_log::log::{
    AppendError, EntryKind, EntryRecord, HardState, LogPosition, LogReader, LogWriter, Record,
    SegmentPool,
};
use nbd_store::limits::{BLOCK_BYTES, MUTATION_BYTES_MAX};
use nbd_store::{
    Applied, BlockStatus, CheckpointError, Checkpointer, Epoch, NodeStore, OpenError, Outcome,
    Owner, RaftRecovered, ReadError, RecoveredShard, Segment, SessionId, ShardReader, ShardWriter,
    SpaceGauge, StoreOptions, VolumeId, encode_create_volume, encode_open_session, encode_trim,
    encode_write, encode_write_zeroes,
};
use nbd_topology::{LogIndex, MembershipChange, ReplicaId, ShardId, Term};
use rand::Rng;
use rand::rngs::StdRng;

pub(crate) const SHARD: ShardId = ShardId(3);
pub(crate) const SESSION: SessionId = SessionId(0xfeed);
pub(crate) const OWNER: Owner = Owner { node: 0xabc, incarnation: 1 };
pub(crate) const BLOCK: usize = BLOCK_BYTES as usize;
pub(crate) const CHUNK: usize = 16 * BLOCK;
pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn options() -> StoreOptions {
    StoreOptions {
        cluster: "test".parse().unwrap(),
        node: "node-1".parse().unwrap(),
        shards: vec![SHARD],
        segment_bytes: MIB,
        log_bytes_max: 8 * MIB,
        log_cache_bytes: 256 << 10,
        checkpoint_log_bytes: 2 * MIB,
        meta_cache_bytes: 1 << 16,
        space_reserve_bytes: 0,
        decode_change,
        fault: None,
        rng_seed: [7; 32],
    }
}

/// Membership entries of these tests: a byte for the kind, then the id.
pub(crate) fn decode_change(data: &[u8]) -> Option<MembershipChange> {
    let (kind, id) = data.split_first()?;
    let id = ReplicaId::new(u64::from_le_bytes(id.try_into().ok()?))?;
    match kind {
        0 => Some(MembershipChange::AddVoter(id)),
        1 => Some(MembershipChange::AddLearner(id)),
        2 => Some(MembershipChange::Remove(id)),
        _ => None,
    }
}

pub(crate) fn encode_change(change: MembershipChange) -> Bytes {
    let (kind, id) = match change {
        MembershipChange::AddVoter(id) => (0_u8, id),
        MembershipChange::AddLearner(id) => (1, id),
        MembershipChange::Remove(id) => (2, id),
    };
    [&[kind][..], &id.get().to_le_bytes()].concat().into()
}

/// A node, with a volume and a session once it has been prepared.
pub(crate) struct Node {
    pub(crate) log: LogWriter,
    pub(crate) log_reader: LogReader,
    pub(crate) segments: Arc<SegmentPool>,
    pub(crate) checkpointer: Checkpointer,
    pub(crate) writer: ShardWriter,
    pub(crate) reader: ShardReader,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) raft: RaftRecovered,
    pub(crate) index: LogIndex,
    pub(crate) term: Term,
    pub(crate) last_position: LogPosition,
    /// Where entries lie that were not applied yet.
    pub(crate) positions: BTreeMap<LogIndex, LogPosition>,
    pub(crate) lock: Box<dyn nbd_log::io::DiskLock>,
}

#[derive(Debug)]
pub(crate) enum Failure {
    Append(AppendError),
    Checkpoint(CheckpointError),
}

impl Node {
    /// Opens the node and, as its only voter, commits whatever is in its log.
    pub(crate) fn open(disk: &impl CloneDisk) -> Result<Self, OpenError> {
        Self::open_with(disk, options())
    }

    pub(crate) fn open_with(
        disk: &impl CloneDisk,
        options: StoreOptions,
    ) -> Result<Self, OpenError> {
        let mut node = Self::open_follower(disk, options)?;
        node.index = node.raft.applied;
        for entry in std::mem::take(&mut node.raft.tail) {
            assert_eq!(entry.index, node.index.next());
            let applied = Applied::Command(&entry.data);
            node.writer.apply(entry.index, entry.term, applied, entry.position);
            node.index = entry.index;
        }
        Ok(node)
    }

    /// Opens the node as one of several: what nobody says is committed stays in the log.
    pub(crate) fn open_follower(
        disk: &impl CloneDisk,
        options: StoreOptions,
    ) -> Result<Self, OpenError> {
        let NodeStore { log, log_reader, segments, checkpointer, mut shards, space, lock, .. } =
            NodeStore::open(disk.dyn_disk(), options)?;
        let RecoveredShard { writer, reader, raft, .. } = shards.remove(0);
        let node = Self {
            log,
            log_reader,
            segments,
            checkpointer,
            writer,
            reader,
            space,
            index: raft.kept.last().map_or(raft.applied, |last| last.index),
            positions: raft.kept.iter().map(|entry| (entry.index, entry.position)).collect(),
            term: Term(raft.hard_state.term.0 + 1),
            raft,
            last_position: LogPosition(0),
            lock,
        };
        assert_eq!(node.raft.applied, node.reader.applied());
        assert!(node.raft.hard_state.commit >= node.raft.applied);
        Ok(node)
    }

    /// Appends an entry, with a hard state that lags behind as Raft's does, and applies it.
    pub(crate) fn propose(&mut self, data: Bytes) -> Result<Vec<Outcome>, Failure> {
        let index = self.index.next();
        for _ in 0..3 {
            let hard_state = HardState { term: self.term, vote: 1, commit: self.index };
            let kind = EntryKind::Command;
            let entry = EntryRecord { shard: SHARD, index, term: self.term, kind, data: &data };
            let records = [Record::HardState(SHARD, hard_state), Record::Entry(entry)];
            match self.log.append(&records) {
                Ok(positions) => {
                    self.index = index;
                    self.last_position = positions[1];
                    return Ok(self.writer.apply(
                        index,
                        self.term,
                        Applied::Command(&data),
                        positions[1],
                    ));
                }
                Err(AppendError::Full) => {
                    self.checkpointer.run().map_err(Failure::Checkpoint)?;
                }
                Err(error) => return Err(Failure::Append(error)),
            }
        }
        panic!("a checkpoint frees log");
    }

    /// The volume of this name, created and with the session opened.
    pub(crate) fn prepare(&mut self, name: &str, size: u64) -> Result<VolumeId, Failure> {
        let outcomes = self.propose(encode_create_volume(name, size, "").unwrap())?;
        let id = match &outcomes[..] {
            [Outcome::VolumeCreated(info) | Outcome::VolumeExists(info)] => info.id,
            other => panic!("{other:?}"),
        };
        let opened = self.propose(open_session(id))?;
        assert_eq!(opened, [Outcome::SessionOpened]);
        Ok(id)
    }

    pub(crate) fn checkpoint(&mut self) -> Result<(), Failure> {
        self.checkpointer.run().map(|_| ()).map_err(Failure::Checkpoint)
    }

    pub(crate) fn read(
        &self,
        volume: VolumeId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, ReadError> {
        let mut plan = self.reader.resolve(volume, offset, len as u64)?;
        let mut buf = vec![0xee; len];
        if !plan.try_read_cached(&mut buf)? {
            plan.read_blocking(&mut buf)?;
        }
        for (range, segment) in plan.segments() {
            if segment == Segment::Zero {
                assert!(buf[range].iter().all(|byte| *byte == 0));
            }
        }
        Ok(buf)
    }
}

/// Opens the session that all changes belong to.
pub(crate) fn open_session(volume: VolumeId) -> Bytes {
    encode_open_session(SESSION, Epoch(1), volume, OWNER)
}

/// A change of any kind and size of a volume of `size` bytes.
pub(crate) fn random_op(rng: &mut StdRng, size: usize, fill: u64) -> Op {
    let unit = [1, 512, BLOCK, BLOCK, CHUNK][rng.random_range(0..5)];
    let places = size / unit;
    let first = rng.random_range(0..places);
    let count = rng.random_range(1..=(places - first).min(if unit == CHUNK { 6 } else { 18 }));
    let (offset, len) = ((first * unit) as u64, (count * unit) as u64);
    match rng.random_range(0..10) {
        0..6 => Op::Write { offset, len, fill: fill + 1 },
        6..8 => Op::Trim { offset, len },
        _ => Op::Zero { offset, len, no_hole: rng.random() },
    }
}

/// Disks that can be handed to several owners.
pub(crate) trait CloneDisk {
    fn dyn_disk(&self) -> Arc<dyn Disk>;
}

impl CloneDisk for nbd_log::io::MemoryDisk {
    fn dyn_disk(&self) -> Arc<dyn Disk> {
        Arc::new(self.clone())
    }
}

impl CloneDisk for Arc<nbd_log::io::FileDisk> {
    fn dyn_disk(&self) -> Arc<dyn Disk> {
        Self::clone(self)
    }
}

/// A change of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Write { offset: u64, len: u64, fill: u64 },
    Trim { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, no_hole: bool },
}

/// Bytes that differ from place to place and from `fill` to `fill`.
pub(crate) fn pattern(fill: u64, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len)
        .map(|at| {
            let mixed = (at ^ fill << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed >> 56) as u8
        })
        .collect()
}

impl Op {
    pub(crate) fn range(self) -> (u64, u64) {
        match self {
            Self::Write { offset, len, .. }
            | Self::Trim { offset, len }
            | Self::Zero { offset, len, .. } => (offset, len),
        }
    }

    pub(crate) fn encode(self, seq: u64, volume: VolumeId) -> Bytes {
        let epoch = Epoch(1);
        match self {
            Self::Write { offset, len, fill } => {
                assert!(len <= MUTATION_BYTES_MAX);
                let bytes = pattern(fill, offset, len);
                encode_write(SESSION, epoch, seq, volume, offset, &bytes)
            }
            Self::Trim { offset, len } => encode_trim(SESSION, epoch, seq, volume, offset, len),
            Self::Zero { offset, len, no_hole } => {
                encode_write_zeroes(SESSION, epoch, seq, volume, offset, len, no_hole)
            }
        }
    }
}

/// A volume as it ought to be.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    /// One for each block.
    pub(crate) status: Vec<BlockStatus>,
}

impl Model {
    pub(crate) fn new(size: usize) -> Self {
        Self { bytes: vec![0; size], status: vec![BlockStatus::HOLE; size.div_ceil(BLOCK)] }
    }

    pub(crate) fn apply(&mut self, op: Op) {
        let (offset, len) = op.range();
        let (start, end) = (offset as usize, (offset + len) as usize);
        let whole_end = if end == self.bytes.len() { end.div_ceil(BLOCK) } else { end / BLOCK };
        let whole = start.div_ceil(BLOCK)..whole_end;
        match op {
            Op::Write { fill, .. } => {
                self.bytes[start..end].copy_from_slice(&pattern(fill, offset, len));
                self.status[start / BLOCK..end.div_ceil(BLOCK)].fill(BlockStatus::DATA);
            }
            Op::Trim { .. } => {
                if !whole.is_empty() {
                    let end = (whole.end * BLOCK).min(self.bytes.len());
                    self.bytes[whole.start * BLOCK..end].fill(0);
                    self.status[whole].fill(BlockStatus::HOLE);
                }
            }
            Op::Zero { no_hole, .. } => {
                self.bytes[start..end].fill(0);
                self.status[start / BLOCK..end.div_ceil(BLOCK)].fill(BlockStatus::DATA);
                let kind = if no_hole { BlockStatus::ZERO } else { BlockStatus::HOLE };
                if !whole.is_empty() {
                    // The edges were written; they keep what they are made of.
                    self.status[whole].fill(kind);
                }
            }
        }
    }

    /// The volume gets another size. What is cut off reads as zero should it grow again.
    pub(crate) fn resize(&mut self, size: usize) {
        let old = self.bytes.len();
        if size < old {
            let (offset, len) = (size as u64, (old - size) as u64);
            self.apply(Op::Zero { offset, len, no_hole: false });
        }
        self.bytes.resize(size, 0);
        self.status.resize(size.div_ceil(BLOCK), BlockStatus::HOLE);
    }

    /// Compares the whole volume, bytes and status.
    pub(crate) fn check(&self, node: &Node, volume: VolumeId) -> Result<(), String> {
        let found = node.read(volume, 0, self.bytes.len()).map_err(|e| format!("{e:?}"))?;
        if let Some(at) = found.iter().zip(&self.bytes).position(|(a, b)| a != b) {
            return Err(format!(
                "byte {at} (block {}) is {:#x}, not {:#x}",
                at / BLOCK,
                found[at],
                self.bytes[at]
            ));
        }
        self.check_status(node, volume, 0, self.bytes.len() as u64)
    }

    pub(crate) fn check_status(
        &self,
        node: &Node,
        volume: VolumeId,
        offset: u64,
        len: u64,
    ) -> Result<(), String> {
        let extents = node.reader.block_status(volume, offset, len, usize::MAX);
        let extents = extents.map_err(|e| format!("{e:?}"))?;
        let mut at = offset;
        for pair in extents.windows(2) {
            if pair[0].status == pair[1].status {
                return Err(format!("extents are not merged: {extents:?}"));
            }
        }
        for extent in &extents {
            let blocks = at / BLOCK_BYTES..(at + extent.len).div_ceil(BLOCK_BYTES);
            for block in blocks {
                let expected = self.status[block as usize];
                if expected != extent.status {
                    return Err(format!("block {block} is {:?}, not {expected:?}", extent.status));
                }
            }
            at += extent.len;
        }
        if at != offset + len { Err(format!("extents end at {at}")) } else { Ok(()) }
    }
}
