//! Which parts of a volume are holes or zeroes.

use std::ops::Range;

use super::Shard;
use super::plan::ReadError;
use super::reader::Overlays;
use crate::chunk::meta::{ChunkMeta, HomeBlock};
use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, STATUS_CHUNKS_MAX};
use crate::overlay::{BlockBase, VolumeOverlay, ZeroKind};

/// What a range is, in the terms of NBD's `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// Nothing is allocated.
    pub hole: bool,
    /// It reads as zero.
    pub zero: bool,
}

impl BlockStatus {
    /// Never written, or trimmed.
    pub const HOLE: Self = Self { hole: true, zero: true };
    /// Allocated zeroes.
    pub const ZERO: Self = Self { hole: false, zero: true };
    /// Bytes.
    pub const DATA: Self = Self { hole: false, zero: false };
}

impl From<ZeroKind> for BlockStatus {
    fn from(kind: ZeroKind) -> Self {
        match kind {
            ZeroKind::Hole => Self::HOLE,
            ZeroKind::Zero => Self::ZERO,
        }
    }
}

/// A run of one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes in the run.
    pub len: u64,
    /// What they are.
    pub status: BlockStatus,
}

/// What the overlays say of the chunks from some place on.
enum Step {
    /// A run of chunks of one status.
    Cleared { end: ChunkIndex, status: BlockStatus },
    /// A run of chunks that the overlays do not know.
    Base { end: ChunkIndex },
    /// One chunk, block by block; `None` where its home decides.
    Chunk([Option<BlockStatus>; BLOCKS_PER_CHUNK]),
}

/// Collects extents for a byte range, merging neighbours.
struct Extents {
    found: Vec<Extent>,
    /// Next byte.
    at: u64,
    /// End of the range.
    end: u64,
    extents_max: usize,
}

impl Extents {
    /// The bytes up to `end` have this status. `false` once nothing more is wanted.
    fn push(&mut self, end: u64, status: BlockStatus) -> bool {
        let end = end.min(self.end);
        if end > self.at {
            let len = end - self.at;
            let is_full = self.found.len() >= self.extents_max;
            match self.found.last_mut() {
                Some(last) if last.status == status => last.len += len,
                _ if is_full => return false,
                _ => self.found.push(Extent { len, status }),
            }
            self.at = end;
        }
        self.at < self.end
    }

    fn push_chunk(&mut self, chunk: ChunkIndex, status: impl Fn(usize) -> BlockStatus) -> bool {
        (0..BLOCKS_PER_CHUNK).all(|block| {
            let end = chunk.0 * CHUNK_BYTES + (block as u64 + 1) * BLOCK_BYTES;
            self.push(end, status(block))
        })
    }
}

/// See [`super::reader::ShardReader::block_status`].
///
/// The overlays are looked at first, piece by piece, and the base after that: a checkpoint in
/// between can only have brought home what the overlays showed.
pub(super) fn block_status(
    shard: &Shard,
    volume: VolumeId,
    offset: u64,
    len: u64,
    extents_max: usize,
) -> Result<Vec<Extent>, ReadError> {
    let mut out = Extents {
        found: Vec::new(),
        at: offset,
        end: offset + len,
        extents_max: extents_max.max(1),
    };
    let mut chunk = ChunkIndex(offset / CHUNK_BYTES);
    let end = ChunkIndex((offset + len).div_ceil(CHUNK_BYTES));
    // Runs count as one: only what is looked at singly takes time.
    let mut budget = STATUS_CHUNKS_MAX;
    while chunk < end && budget > 0 {
        let step = {
            let state = shard.state.read();
            next_step(Overlays::of(&state, volume), chunk, end)
        };
        budget -= 1;
        let (next, more) = match step {
            Step::Cleared { end, status } => (end, out.push(end.0 * CHUNK_BYTES, status)),
            Step::Base { end } => push_base(shard, volume, chunk..end, &mut out, &mut budget)?,
            Step::Chunk(known) => {
                let home = if known.contains(&None) {
                    shard.base.load(volume, [chunk])?.pop().and_then(|(_, meta)| meta)
                } else {
                    None
                };
                let status = |block: usize| {
                    known[block].unwrap_or_else(|| home_status(home.as_ref(), block))
                };
                (chunk.next(), out.push_chunk(chunk, status))
            }
        };
        if !more {
            break;
        }
        chunk = next;
    }
    Ok(out.found)
}

/// Adds what the base says of `chunks`; where to go on, and whether more is wanted.
fn push_base(
    shard: &Shard,
    volume: VolumeId,
    chunks: Range<ChunkIndex>,
    out: &mut Extents,
    budget: &mut u64,
) -> Result<(ChunkIndex, bool), ReadError> {
    let reader = shard.base.database().read()?;
    for row in reader.range(volume, &chunks)? {
        let (chunk, meta) = row?;
        let more = out.push(chunk.0 * CHUNK_BYTES, BlockStatus::HOLE)
            && out.push_chunk(chunk, |block| home_status(Some(&meta), block));
        *budget = budget.saturating_sub(1);
        if !more || *budget == 0 {
            return Ok((chunk.next(), more));
        }
    }
    Ok((chunks.end, out.push(chunks.end.0 * CHUNK_BYTES, BlockStatus::HOLE)))
}

const fn home_status(home: Option<&ChunkMeta>, block: usize) -> BlockStatus {
    let Some(meta) = home else { return BlockStatus::HOLE };
    match meta.block(block) {
        HomeBlock::Hole => BlockStatus::HOLE,
        HomeBlock::Zero => BlockStatus::ZERO,
        HomeBlock::Data { .. } => BlockStatus::DATA,
    }
}

/// What the overlays say from `chunk` on, as far as one answer reaches, at most to `end`.
fn next_step(overlays: Overlays<'_>, chunk: ChunkIndex, end: ChunkIndex) -> Step {
    let layers = overlays.chunk(chunk);
    let active_end = reach(overlays.active, chunk, end);
    if let Some(kind) = cleared_run(overlays.active, chunk) {
        return Step::Cleared { end: active_end, status: kind.into() };
    }
    let frozen_end = reach(overlays.frozen, chunk, active_end);
    if layers.is_empty() {
        return Step::Base { end: frozen_end };
    }
    if layers.is_frozen_only()
        && let Some(kind) = cleared_run(overlays.frozen, chunk)
    {
        return Step::Cleared { end: frozen_end, status: kind.into() };
    }
    Step::Chunk(std::array::from_fn(|block| match layers.base(block) {
        (_, true) | (BlockBase::Log(_), false) => Some(BlockStatus::DATA),
        (BlockBase::Cleared(kind), false) => Some(kind.into()),
        (BlockBase::Below, false) => None,
    }))
}

/// The kind of the cleared range that decides on `chunk` in this layer.
fn cleared_run(volume: Option<&VolumeOverlay>, chunk: ChunkIndex) -> Option<ZeroKind> {
    let volume = volume?;
    if volume.next_chunk(chunk) == Some(chunk) {
        return None;
    }
    volume.cleared_at(chunk).map(|range| range.kind)
}

/// How far from `chunk` on this layer says the same, if it does not describe `chunk` by blocks.
fn reach(volume: Option<&VolumeOverlay>, chunk: ChunkIndex, end: ChunkIndex) -> ChunkIndex {
    let Some(volume) = volume else { return end };
    let next_chunk = volume.next_chunk(chunk).unwrap_or(end);
    let next_range = match volume.cleared_at(chunk) {
        Some(range) => range.end,
        None => volume.next_cleared(chunk).unwrap_or(end),
    };
    end.min(next_chunk).min(next_range)
}
