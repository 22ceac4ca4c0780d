//! Blocks on their way home: fetched in the order in which they lie in the log, written in the
//! order of their slots.

use std::io;

use nbd_log::checksum::crc32c;
use nbd_log::io::AlignedBuf;
use nbd_log::log::{LogReadError, LogReader};

use super::CheckpointError;
use crate::chunk::Base;
use crate::chunk::meta::{ChunkKey, ChunkMeta, HomeBlock};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHECKPOINT_BATCH_BYTES, CHUNK_BYTES, to_usize};
use crate::overlay::{Fragment, FragmentSource, LogBlock};
use crate::transfer::DamagedChunk;

const BLOCK: usize = to_usize(BLOCK_BYTES);

/// Where a block comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// The log.
    Log(LogBlock),
    /// The chunk's old slot.
    Data { place: u64, crc: u32 },
    /// Nowhere: zeroes.
    Zeroes,
}

impl From<HomeBlock> for Origin {
    fn from(block: HomeBlock) -> Self {
        match block {
            HomeBlock::Hole | HomeBlock::Zero => Self::Zeroes,
            HomeBlock::Data { place, crc } => Self::Data { place, crc },
        }
    }
}

/// One block to be written.
#[derive(Debug)]
struct Job {
    /// Which of the batch's chunks it belongs to.
    chunk: usize,
    /// Which block of it.
    block: usize,
    /// Where it goes.
    target: u64,
    origin: Origin,
    /// What lies on top, oldest first.
    fragments: Vec<Fragment>,
}

/// Chunks being brought home together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    chunks: Vec<(ChunkKey, ChunkMeta)>,
    jobs: Vec<Job>,
    /// Contents of the jobs, in their order. Kept between batches for its memory.
    buffer: AlignedBuf,
}

/// What a batch came to.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) chunks: Vec<(ChunkKey, ChunkMeta)>,
    pub(super) blocks: u64,
    pub(super) corrupt_blocks: u64,
    /// The chunks of those blocks, each once.
    pub(super) damaged: Vec<DamagedChunk>,
}

impl Batch {
    /// Whether another chunk fits.
    pub(super) const fn has_room(&self) -> bool {
        self.jobs.len() as u64 * BLOCK_BYTES + CHUNK_BYTES <= CHECKPOINT_BATCH_BYTES
    }

    /// Adds a chunk with its new home; the blocks follow.
    pub(super) fn add_chunk(&mut self, key: ChunkKey, meta: ChunkMeta) {
        self.chunks.push((key, meta));
    }

    /// Adds a block of the chunk added last, which its new home names as present.
    pub(super) fn add_block(&mut self, block: usize, origin: Origin, fragments: &[Fragment]) {
        let chunk = self.chunks.len() - 1;
        let target = self.chunks[chunk].1.slot.place(block);
        self.jobs.push(Job { chunk, block, target, origin, fragments: fragments.to_vec() });
    }

    /// Fetches and writes all blocks, not durably yet, and empties the batch. The homes returned
    /// have the checksums of what was put together.
    ///
    /// A block whose only copy is damaged is written as it is, with a checksum that it does not
    /// have: it stays unreadable, and the rest of the volume stays available.
    pub(super) fn write(
        &mut self,
        base: &Base,
        log: &LogReader,
    ) -> Result<Written, CheckpointError> {
        self.jobs.sort_unstable_by_key(|job| job.target);
        self.buffer.resize(self.jobs.len() * BLOCK);
        self.fetch(base, log)?;
        let mut written = Written { blocks: self.jobs.len() as u64, ..Written::default() };
        for (at, job) in self.jobs.iter().enumerate() {
            let block = &mut self.buffer[at * BLOCK..(at + 1) * BLOCK];
            let (key, meta) = &mut self.chunks[job.chunk];
            let whole = match job.origin {
                Origin::Zeroes => {
                    block.fill(0);
                    true
                }
                Origin::Log(source) => {
                    ensure(block, source.crc, |out| log.read(source.position, out))?
                }
                Origin::Data { place, crc } => {
                    let read = |out: &mut [u8]| base.read_data(out, place).map_err(data_error);
                    ensure(block, crc, read)?
                }
            };
            let whole = lay_over(block, &job.fragments, log)? && whole;
            if !job.fragments.is_empty() {
                let crc = crc32c(block);
                meta.crcs[job.block] = if whole { crc } else { !crc };
            }
            if !whole {
                written.corrupt_blocks += 1;
                let (volume, chunk) = *key;
                let damaged = DamagedChunk { volume, chunk, last_index: meta.last_index };
                if !written.damaged.contains(&damaged) {
                    written.damaged.push(damaged);
                }
                let block = key.1.0 * BLOCKS_PER_CHUNK as u64 + job.block as u64;
                tracing::error!(volume = %key.0, block, "the only copy of a block is damaged");
            }
        }
        self.store(base)?;
        self.jobs.clear();
        written.chunks = std::mem::take(&mut self.chunks);
        Ok(written)
    }

    /// Reads what the jobs start from, in long runs where it lies together.
    fn fetch(&mut self, base: &Base, log: &LogReader) -> Result<(), CheckpointError> {
        let source = |at: usize| match self.jobs[at].origin {
            Origin::Log(block) => Some((0, block.position.0)),
            Origin::Data { place, .. } => Some((1, place)),
            Origin::Zeroes => None,
        };
        let mut order: Vec<_> =
            (0..self.jobs.len()).filter_map(|at| Some((source(at)?, at))).collect();
        order.sort_unstable();
        let follows = |a: &((u8, u64), usize), b: &((u8, u64), usize)| {
            a.0.0 == b.0.0 && a.0.1 + BLOCK_BYTES == b.0.1 && a.1 + 1 == b.1
        };
        for run in order.chunk_by(follows) {
            let out = &mut self.buffer[run[0].1 * BLOCK..(run[0].1 + run.len()) * BLOCK];
            match self.jobs[run[0].1].origin {
                Origin::Log(block) => log.read(block.position, out)?,
                Origin::Data { place, .. } => base.read_data(out, place).map_err(data_error)?,
                Origin::Zeroes => {}
            }
        }
        Ok(())
    }

    fn store(&self, base: &Base) -> Result<(), CheckpointError> {
        let mut writes: Vec<(u64, &[u8])> = Vec::new();
        let mut first = 0;
        for run in self.jobs.chunk_by(|a, b| a.target + BLOCK_BYTES == b.target) {
            let bytes = &self.buffer[first * BLOCK..(first + run.len()) * BLOCK];
            writes.push((run[0].target, bytes));
            first += run.len();
        }
        base.data().write_many_at(&writes).map_err(|source| CheckpointError::Data { source })
    }
}

fn data_error(source: io::Error) -> CheckpointError {
    CheckpointError::Data { source }
}

/// Whether `bytes` have their checksum, if need be after reading them once more: what was damaged
/// on the way is right the second time, what is damaged at its place is not.
fn ensure<E>(
    bytes: &mut [u8],
    crc: u32,
    read: impl FnOnce(&mut [u8]) -> Result<(), E>,
) -> Result<bool, CheckpointError>
where
    CheckpointError: From<E>,
{
    if crc32c(bytes) == crc {
        return Ok(true);
    }
    read(bytes)?;
    Ok(crc32c(bytes) == crc)
}

/// Lays fragments over a block. `false` if one of them is damaged.
fn lay_over(
    block: &mut [u8],
    fragments: &[Fragment],
    log: &LogReader,
) -> Result<bool, CheckpointError> {
    let mut whole = true;
    for fragment in fragments {
        let out = &mut block[usize::from(fragment.start)..usize::from(fragment.end)];
        match fragment.source {
            FragmentSource::Zero => out.fill(0),
            FragmentSource::Log { position, crc } => {
                let read = |out: &mut [u8]| -> Result<(), LogReadError> { log.read(position, out) };
                read(out)?;
                whole &= ensure(out, crc, read)?;
            }
        }
    }
    Ok(whole)
}
