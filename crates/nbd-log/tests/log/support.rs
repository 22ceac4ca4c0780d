//! Opening logs, and records that can be kept and compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use nbd_log::io::{Disk, MemoryDisk, OpenMode};
use nbd_log::log::{
    AppendError, EntryKind, EntryRecord, HardState, Log, LogIdentity, LogOpenError, LogOptions,
    LogPosition, Record, ScannedRecord, SegmentPool,
};
use nbd_topology::{LogIndex, ShardId, Term};
use rand::RngCore;

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const SEGMENT: u64 = 1 << 20;
pub(crate) const IDENTITY: LogIdentity = LogIdentity(0x1122_3344_5566_7788);
pub(crate) const OPTIONS: LogOptions =
    LogOptions { segment_bytes: SEGMENT, log_bytes_max: 6 * SEGMENT, cache_bytes_max: 1 << 20 };

/// Counts up from a seed, so that nonces are known and differ.
pub(crate) struct CountingRng(pub(crate) u64);

impl RngCore for CountingRng {
    fn next_u32(&mut self) -> u32 {
        unreachable!("nonces have 64 bits")
    }

    fn next_u64(&mut self) -> u64 {
        self.0 += 1;
        self.0
    }

    fn fill_bytes(&mut self, _: &mut [u8]) {
        unreachable!("nonces are numbers")
    }
}

/// A record that owns its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kept {
    HardState(ShardId, HardState),
    Entry { shard: ShardId, index: LogIndex, term: Term, kind: EntryKind, data: Bytes },
}

impl Kept {
    pub(crate) fn record(&self) -> Record<'_> {
        match self {
            Self::HardState(shard, state) => Record::HardState(*shard, *state),
            Self::Entry { shard, index, term, kind, data } => Record::Entry(EntryRecord {
                shard: *shard,
                index: *index,
                term: *term,
                kind: *kind,
                data,
            }),
        }
    }

    pub(crate) fn data(&self) -> Option<&Bytes> {
        match self {
            Self::HardState(..) => None,
            Self::Entry { data, .. } => Some(data),
        }
    }
}

impl From<ScannedRecord<'_>> for Kept {
    fn from(record: ScannedRecord<'_>) -> Self {
        match record {
            ScannedRecord::HardState(shard, state) => Self::HardState(shard, state),
            ScannedRecord::Entry(entry) => Self::Entry {
                shard: entry.shard,
                index: entry.index,
                term: entry.term,
                kind: entry.kind,
                data: Bytes::copy_from_slice(entry.data),
            },
        }
    }
}

/// Bytes that differ from those of any other number, at any distance.
pub(crate) fn payload(number: u64, len: usize) -> Bytes {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = std::iter::from_fn(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes())
    });
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

pub(crate) fn entry(shard: u32, index: u64, data: Bytes) -> Kept {
    let (shard, index) = (ShardId(shard), LogIndex(index));
    Kept::Entry { shard, index, term: Term(1), kind: EntryKind::Command, data }
}

pub(crate) fn hard_state(shard: u32, term: u64, vote: u64, commit: u64) -> Kept {
    let state = HardState { term: Term(term), vote, commit: LogIndex(commit) };
    Kept::HardState(ShardId(shard), state)
}

/// An open log and what recovery found.
pub(crate) struct Opened {
    pub(crate) log: Log,
    pub(crate) found: Vec<(Kept, LogPosition)>,
}

impl Opened {
    pub(crate) fn append(&mut self, records: &[Kept]) -> Result<Vec<LogPosition>, AppendError> {
        let records: Vec<_> = records.iter().map(Kept::record).collect();
        self.log.writer.append(&records)
    }

    pub(crate) fn records(&self) -> Vec<Kept> {
        self.found.iter().map(|(record, _)| record.clone()).collect()
    }
}

pub(crate) fn open_with(
    disk: Arc<dyn Disk>,
    options: LogOptions,
    seed: u64,
) -> Result<Opened, LogOpenError> {
    let mut found = Vec::new();
    let mut visitor = |record: ScannedRecord<'_>, position| found.push((record.into(), position));
    let rng = Box::new(CountingRng(seed << 32));
    let log = Log::open(disk, IDENTITY, options, rng, &mut visitor)?;
    Ok(Opened { log, found })
}

pub(crate) fn open(disk: &MemoryDisk, seed: u64) -> Opened {
    open_with(Arc::new(disk.clone()), OPTIONS, seed).unwrap()
}

/// Frees what is covered, as if the hard states written so far were stored elsewhere.
pub(crate) fn free(segments: &SegmentPool, covered: &BTreeMap<ShardId, LogIndex>) -> usize {
    segments.free_through(covered, &segments.hard_states())
}

pub(crate) fn read_file(disk: &dyn Disk, name: &str, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let file = disk.open(name, OpenMode::Existing).unwrap();
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}
