//! The path of every write.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rand::RngCore;

use super::cache::EntryCache;
use super::error::AppendError;
use super::format::{BATCH_HEADER_BYTES, BatchHeader, SegmentHeader, batch_bytes};
use super::pool::{Indexes, Segment, SegmentPool, Spare, TakeError, include, is_out_of_space};
use super::record::{LogIdentity, LogPosition, Record};
use crate::checksum::crc32c;
use crate::io::{AlignedBuf, DiskFile};
use crate::limits::{BATCH_BYTES_MAX, BLOCK_BYTES};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Appends records, durably. One per log, owned by the thread that writes it.
pub struct LogWriter {
    pool: Arc<SegmentPool>,
    cache: Arc<EntryCache>,
    rng: Box<dyn RngCore + Send>,
    identity: LogIdentity,
    /// The segment being written, `None` before the first batch of all.
    active: Option<Active>,
    /// Number of the next batch. All batches below it are durable.
    next_batch: u64,
    /// Oldest live segment as named by the last durable batch or header: files whose last use came
    /// before it may be written over.
    recorded_oldest: u64,
    /// The batch being put together. Kept between calls for its memory.
    staging: AlignedBuf,
    /// Set by the first failed write, for good.
    failed: bool,
}

/// The segment being written.
pub(super) struct Active {
    pub(super) seq: u64,
    pub(super) nonce: u64,
    pub(super) name: Arc<str>,
    pub(super) file: Arc<dyn DiskFile>,
    /// Where the next batch starts. A multiple of the block size, at most the segment's size.
    pub(super) end: u64,
}

/// Where recovery found the log to end.
pub(super) struct Tail {
    pub(super) active: Option<Active>,
    pub(super) next_batch: u64,
    pub(super) recorded_oldest: u64,
}

/// A batch to be written: which records, and whether a new segment comes first.
struct PlannedBatch {
    rotate: bool,
    records: Range<usize>,
}

impl LogWriter {
    pub(super) fn new(
        pool: Arc<SegmentPool>,
        cache: Arc<EntryCache>,
        rng: Box<dyn RngCore + Send>,
        identity: LogIdentity,
        tail: Tail,
    ) -> Self {
        let Tail { active, next_batch, recorded_oldest } = tail;
        let (staging, failed) = (AlignedBuf::new(), false);
        Self { pool, cache, rng, identity, active, next_batch, recorded_oldest, staging, failed }
    }

    /// Appends the records in order and returns once they are on stable storage: for each an
    /// entry's data position, or the record's own for a hard state.
    ///
    /// One call is one device write unless the records pass [`BATCH_BYTES_MAX`] or the end of the
    /// segment; then a crash may keep the first of them and lose the rest. After
    /// [`AppendError::Write`] the writer refuses everything; the other errors wrote nothing.
    pub fn append(&mut self, records: &[Record<'_>]) -> Result<Vec<LogPosition>, AppendError> {
        self.append_leaving(records, 0)
    }

    /// As [`LogWriter::append`], but the log is full already when only its reserve is left: a
    /// shard whose entries hold up the whole log ([`SegmentPool::is_held_up_by`]) must still be
    /// able to write what lets it go.
    pub fn append_ordinary(
        &mut self,
        records: &[Record<'_>],
    ) -> Result<Vec<LogPosition>, AppendError> {
        self.append_leaving(records, self.pool.reserve())
    }

    fn append_leaving(
        &mut self,
        records: &[Record<'_>],
        leaving: u64,
    ) -> Result<Vec<LogPosition>, AppendError> {
        if self.failed {
            return Err(AppendError::Failed);
        }
        let plan = self.plan(records)?;
        let rotations = plan.iter().filter(|batch| batch.rotate).count();
        let mut spares = self.take_spares(rotations, leaving)?;
        let mut positions = Vec::with_capacity(records.len());
        for batch in plan {
            if batch.rotate {
                let spare = spares.pop_front().expect("one spare was taken for each rotation");
                self.rotate(spare)?;
            }
            self.write_records(&records[batch.records], &mut positions)?;
        }
        Ok(positions)
    }

    /// Cuts the records into batches, each within [`BATCH_BYTES_MAX`] and within its segment,
    /// filling the active segment first. Touches nothing, so that it can still be refused.
    fn plan(&self, records: &[Record<'_>]) -> Result<Vec<PlannedBatch>, AppendError> {
        let size = self.pool.segment_bytes();
        // The last block is kept for a closing batch.
        let room_from = |end: u64| {
            let room = usize::try_from((size - BLOCK).saturating_sub(end)).unwrap_or(usize::MAX);
            room.min(BATCH_BYTES_MAX)
        };
        let mut plan = Vec::new();
        // Without an active segment there is no room, and the first batch takes one.
        let mut end = self.active.as_ref().map_or(size, |active| active.end);
        let (mut rotate, mut first, mut body) = (false, 0, 0);
        for (n, record) in records.iter().enumerate() {
            self.check_size(record)?;
            let bytes = record.encoded_bytes();
            if n > first && batch_bytes(body + bytes) > room_from(end) {
                plan.push(PlannedBatch { rotate, records: first..n });
                end += batch_bytes(body) as u64;
                (rotate, first, body) = (false, n, 0);
            }
            if n == first && batch_bytes(bytes) > room_from(end) {
                (rotate, end) = (true, BLOCK);
            }
            body += bytes;
        }
        if first < records.len() {
            plan.push(PlannedBatch { rotate, records: first..records.len() });
        }
        Ok(plan)
    }

    fn check_size(&self, record: &Record<'_>) -> Result<(), AppendError> {
        let Record::Entry(entry) = record else { return Ok(()) };
        let (bytes, max) = (entry.data.len(), self.pool.options().entry_bytes_max());
        if bytes > max {
            let (shard, index) = (entry.shard, entry.index);
            return Err(AppendError::TooLarge { shard, index, bytes, max });
        }
        Ok(())
    }

    fn take_spares(&mut self, count: usize, leaving: u64) -> Result<VecDeque<Spare>, AppendError> {
        if count == 0 {
            return Ok(VecDeque::new());
        }
        self.pool.take_spares(count, leaving).map_err(|error| match error {
            TakeError::Full => AppendError::Full,
            TakeError::Io { source, .. } if is_out_of_space(&source) => AppendError::NoSpace,
            TakeError::Io { file, source } => {
                self.failed = true;
                AppendError::Write { file, source }
            }
        })
    }

    /// Takes a new segment into use: its header is durable before the first batch goes in.
    fn rotate(&mut self, spare: Spare) -> Result<(), AppendError> {
        if spare.last_seq.is_some_and(|seq| seq >= self.recorded_oldest) {
            // Nothing on disk says yet that this file was freed. Were it overwritten first, a crash
            // in the middle would look like the loss of a live segment.
            self.write_batch(&[], &mut Vec::new())?;
            assert!(spare.last_seq.is_some_and(|seq| seq < self.recorded_oldest), "it was freed");
        }
        let seq = self.active.as_ref().map_or(1, |active| active.seq + 1);
        let header = SegmentHeader {
            seq,
            nonce: self.rng.next_u64(),
            first_batch: self.next_batch,
            oldest_live: self.pool.oldest_live().unwrap_or(seq),
            identity: self.identity.0,
            segment_bytes: self.pool.segment_bytes(),
        };
        let Spare { name, file, .. } = spare;
        let written = file.write_durable_at(&header.encode(), 0);
        written.map_err(|source| self.fail(&name, source))?;
        self.recorded_oldest = header.oldest_live;
        let (indexes, nonce) = (Indexes::new(), header.nonce);
        let segment = Segment { seq, name: Arc::clone(&name), file: Arc::clone(&file), indexes };
        self.pool.activate(segment, BLOCK);
        self.active = Some(Active { seq, nonce, name, file, end: BLOCK });
        Ok(())
    }

    /// Writes one batch and lets the pool and the readers know.
    fn write_records(
        &mut self,
        records: &[Record<'_>],
        positions: &mut Vec<LogPosition>,
    ) -> Result<(), AppendError> {
        let known = positions.len();
        self.write_batch(records, positions)?;
        for record in records {
            if let Record::HardState(shard, hard_state) = record {
                self.pool.note_hard_state(*shard, *hard_state);
            }
        }
        let placed = records.iter().zip(&positions[known..]);
        self.cache.extend(placed.filter_map(|(record, position)| match record {
            Record::Entry(entry) => Some((*position, entry.data.clone())),
            Record::HardState(..) => None,
        }));
        Ok(())
    }

    /// Writes one batch at the end of the active segment; it fits.
    fn write_batch(
        &mut self,
        records: &[Record<'_>],
        positions: &mut Vec<LogPosition>,
    ) -> Result<(), AppendError> {
        let active = self.active.as_mut().expect("a segment is active before a batch");
        let start = active.seq * self.pool.segment_bytes() + active.end;
        self.staging.clear();
        self.staging.extend_from_slice(&[0; BATCH_HEADER_BYTES]);
        for record in records {
            let offset = record.encode(&mut self.staging) as u64;
            positions.push(LogPosition(start + offset));
        }
        let body = &self.staging[BATCH_HEADER_BYTES..];
        let header = BatchHeader {
            nonce: active.nonce,
            segment_seq: active.seq,
            number: self.next_batch,
            synced_through: self.next_batch - 1,
            oldest_live: self.pool.oldest_live().expect("the active segment is live"),
            block: u32::try_from(active.end / BLOCK).expect("segments are small enough"),
            records: u32::try_from(records.len()).expect("batches are small enough"),
            body_bytes: u32::try_from(body.len()).expect("batches are small enough"),
            body_crc: crc32c(body),
        };
        self.staging[..BATCH_HEADER_BYTES].copy_from_slice(&header.encode());
        self.staging.pad_to_block();
        let end = active.end + self.staging.len() as u64;
        assert!(end <= self.pool.segment_bytes(), "a batch stays inside its segment");
        if let Err(source) = active.file.write_durable_at(&self.staging, active.end) {
            let name = Arc::clone(&active.name);
            return Err(self.fail(&name, source));
        }
        active.end = end;
        self.next_batch += 1;
        self.recorded_oldest = header.oldest_live;
        self.pool.note_batch(&indexes_of(records), end);
        Ok(())
    }

    fn fail(&mut self, name: &str, source: io::Error) -> AppendError {
        self.failed = true;
        AppendError::Write { file: name.to_owned(), source }
    }
}

impl fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogWriter")
            .field("segment", &self.active.as_ref().map(|active| active.seq))
            .field("end", &self.active.as_ref().map(|active| active.end))
            .field("next_batch", &self.next_batch)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// Lowest and highest index of each shard that has entries among the records.
fn indexes_of(records: &[Record<'_>]) -> Indexes {
    let mut indexes = Indexes::new();
    for record in records {
        if let Record::Entry(entry) = record {
            include(&mut indexes, entry.shard, entry.index);
        }
    }
    indexes
}
