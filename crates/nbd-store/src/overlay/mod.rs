//! What changed since the last checkpoint: for each volume, which blocks lie where in the log, and
//! which ranges became zero. Pure memory; nothing here does I/O.
//!
//! Readers look through up to two overlays, then the base (see [`crate::shard`]). Within one
//! overlay a chunk is described by its [`OverlayChunk`] if it has one, else by the range of cleared
//! chunks that contains it, else not at all. A chunk written after its range was cleared starts out
//! as cleared, so that it never needs the range again.

mod chunk;

use std::collections::BTreeMap;

use nbd_log::log::LogPosition;
use nbd_topology::LogIndex;

pub(crate) use self::chunk::{
    BlockBase, Fragment, FragmentSource, LogBlock, OverlayChunk, ZeroKind, mask_of,
};
use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, CHUNKS_PER_VOLUME_MAX, to_usize};

/// A run of whole chunks that became zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClearedRange {
    /// End of the run, exclusive.
    pub(crate) end: ChunkIndex,
    /// Hole or allocated zeroes.
    pub(crate) kind: ZeroKind,
    /// Newest entry that cleared some of it; all of it, if it is allocated. An allocated chunk's
    /// index is stored with it, and has to come out the same whatever was cleared beside it.
    pub(crate) last_index: LogIndex,
}

impl ClearedRange {
    /// Whether the two, side by side, can be told of as one.
    fn joins(&self, other: &Self) -> bool {
        let is_hole = self.kind == ZeroKind::Hole;
        self.kind == other.kind && (is_hole || self.last_index == other.last_index)
    }
}

/// What one overlay knows of one chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Layer<'a> {
    /// Block by block.
    Chunk(&'a OverlayChunk),
    /// Zero as a whole.
    Cleared(ZeroKind),
}

impl<'a> Layer<'a> {
    /// What `block` is in this layer, under its fragments.
    pub(crate) fn base(self, block: usize) -> BlockBase {
        match self {
            Self::Chunk(chunk) => chunk.base(block),
            Self::Cleared(kind) => BlockBase::Cleared(kind),
        }
    }

    /// Fragments of `block` in this layer, oldest first.
    pub(crate) fn fragments(self, block: usize) -> &'a [Fragment] {
        match self {
            Self::Chunk(chunk) => chunk.fragments(block),
            Self::Cleared(_) => &[],
        }
    }
}

/// Changes of one volume.
#[derive(Debug, Clone, Default)]
pub(crate) struct VolumeOverlay {
    chunks: BTreeMap<ChunkIndex, OverlayChunk>,
    /// Disjoint, in order; neighbours that can be are joined. Those that cannot are allocated
    /// chunks, each of which has room on the disk.
    cleared: BTreeMap<ChunkIndex, ClearedRange>,
    /// Chunks in ranges of [`ZeroKind::Zero`].
    zero_chunks: u64,
}

/// Changes of all volumes of a shard.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overlay {
    volumes: BTreeMap<VolumeId, VolumeOverlay>,
    pending_chunks: u64,
    has_cleared: bool,
    /// What was there of volumes that were deleted since. Kept until the overlay goes, for whoever
    /// applies entries has no time to take it apart.
    discarded: Vec<VolumeOverlay>,
}

/// Blocks of `[offset, offset + len)` chunk by chunk: (chunk, first block, end block).
fn chunk_runs(
    first_block: u64,
    end_block: u64,
) -> impl Iterator<Item = (ChunkIndex, usize, usize)> {
    let per_chunk = BLOCKS_PER_CHUNK as u64;
    let chunks = first_block / per_chunk..end_block.div_ceil(per_chunk);
    chunks.map(move |chunk| {
        let start = chunk * per_chunk;
        let from = first_block.saturating_sub(start);
        let to = (end_block - start).min(per_chunk);
        (ChunkIndex(chunk), to_usize(from), to_usize(to))
    })
}

impl VolumeOverlay {
    /// What is known of `chunk`.
    pub(crate) fn layer(&self, chunk: ChunkIndex) -> Option<Layer<'_>> {
        if let Some(found) = self.chunks.get(&chunk) {
            return Some(Layer::Chunk(found));
        }
        self.cleared_at(chunk).map(|range| Layer::Cleared(range.kind))
    }

    /// Whether `chunk` is described block by block.
    pub(crate) fn has_chunk(&self, chunk: ChunkIndex) -> bool {
        self.chunks.contains_key(&chunk)
    }

    /// The cleared range that contains `chunk`, whether or not the chunk was written since.
    pub(crate) fn cleared_at(&self, chunk: ChunkIndex) -> Option<ClearedRange> {
        let (_, range) = self.cleared.range(..=chunk).next_back()?;
        (range.end > chunk).then_some(*range)
    }

    /// First chunk at or after `chunk` that has an [`OverlayChunk`].
    pub(crate) fn next_chunk(&self, chunk: ChunkIndex) -> Option<ChunkIndex> {
        self.chunks.range(chunk..).next().map(|(at, _)| *at)
    }

    /// First start of a cleared range at or after `chunk`.
    pub(crate) fn next_cleared(&self, chunk: ChunkIndex) -> Option<ChunkIndex> {
        self.cleared.range(chunk..).next().map(|(at, _)| *at)
    }

    /// All chunks described block by block, in order.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (ChunkIndex, &OverlayChunk)> {
        self.chunks.iter().map(|(at, chunk)| (*at, chunk))
    }

    /// All cleared ranges, in order.
    pub(crate) fn cleared(&self) -> impl Iterator<Item = (ChunkIndex, ClearedRange)> {
        self.cleared.iter().map(|(start, range)| (*start, *range))
    }

    /// Upper bound of the chunks that may need a new slot.
    fn pending_chunks(&self) -> u64 {
        self.chunks.len() as u64 + self.zero_chunks
    }

    fn chunk_mut(&mut self, chunk: ChunkIndex, index: LogIndex) -> &mut OverlayChunk {
        let below = if self.cleared.is_empty() || self.chunks.contains_key(&chunk) {
            None
        } else {
            self.cleared_at(chunk).map(|range| range.kind)
        };
        let found = self.chunks.entry(chunk).or_insert_with(|| OverlayChunk::new(below));
        found.touch(index);
        found
    }

    /// A write of `len` bytes at `offset` whose payload begins at `payload` in the log; `checksums`
    /// holds one little-endian CRC32C for each block-sized piece.
    fn write(
        &mut self,
        index: LogIndex,
        offset: u64,
        len: u64,
        payload: LogPosition,
        checksums: &[u8],
    ) {
        let end = offset + len;
        let (first_block, end_block) = (offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        assert!(checksums.len() as u64 == 4 * (end_block - first_block), "one checksum a piece");
        let mut checksums = checksums.as_chunks::<4>().0.iter();
        for (chunk, from, to) in chunk_runs(first_block, end_block) {
            let start = chunk.0 * CHUNK_BYTES;
            let target = self.chunk_mut(chunk, index);
            for block in from..to {
                let crc = u32::from_le_bytes(*checksums.next().expect("counted above"));
                let block_start = start + block as u64 * BLOCK_BYTES;
                let piece_start = block_start.max(offset);
                let piece_end = (block_start + BLOCK_BYTES).min(end);
                let position = LogPosition(payload.0 + (piece_start - offset));
                if piece_end - piece_start == BLOCK_BYTES {
                    target.set_log(block, LogBlock { position, crc });
                } else {
                    let source = FragmentSource::Log { position, crc };
                    let part = fragment(piece_start - block_start, piece_end - block_start, source);
                    target.add_fragment(block, part);
                }
            }
        }
    }

    /// Blocks `first..end` read as zero. Whole chunks inside become a range: the cost does not
    /// depend on its length, only on the chunks that were written there since the last checkpoint.
    fn clear(&mut self, index: LogIndex, first: u64, end: u64, kind: ZeroKind) {
        let per_chunk = BLOCKS_PER_CHUNK as u64;
        let whole = ChunkIndex(first.div_ceil(per_chunk))..ChunkIndex(end / per_chunk);
        if whole.start >= whole.end {
            self.clear_blocks(index, first, end, kind);
            return;
        }
        self.clear_blocks(index, first, whole.start.0 * per_chunk, kind);
        self.clear_blocks(index, whole.end.0 * per_chunk, end, kind);
        self.chunks.extract_if(whole.clone(), |_, _| true).for_each(drop);
        self.insert_cleared(whole.start, ClearedRange { end: whole.end, kind, last_index: index });
    }

    fn clear_blocks(&mut self, index: LogIndex, first: u64, end: u64, kind: ZeroKind) {
        for (chunk, from, to) in chunk_runs(first, end) {
            self.chunk_mut(chunk, index).clear(mask_of(from, to), kind);
        }
    }

    /// Zeroes for a part of one block.
    fn zero_part(&mut self, index: LogIndex, start: u64, end: u64) {
        let block = start / BLOCK_BYTES;
        let block_start = block * BLOCK_BYTES;
        let part = fragment(start - block_start, end - block_start, FragmentSource::Zero);
        let per_chunk = BLOCKS_PER_CHUNK as u64;
        let chunk = ChunkIndex(block / per_chunk);
        self.chunk_mut(chunk, index).add_fragment(to_usize(block % per_chunk), part);
    }

    fn insert_cleared(&mut self, start: ChunkIndex, new: ClearedRange) {
        let (mut start, mut new) = (start, new);
        // What sticks out of the new range to the left and to the right stays as it was.
        if let Some((&left, &old)) = self.cleared.range(..start).next_back()
            && old.end > start
        {
            self.remove_cleared(left);
            self.put_cleared(left, ClearedRange { end: start, ..old });
            if old.end > new.end {
                self.put_cleared(new.end, old);
            }
        }
        while let Some((&at, &old)) = self.cleared.range(start..new.end).next() {
            self.remove_cleared(at);
            if old.end > new.end {
                self.put_cleared(new.end, old);
            }
        }
        if let Some((&left, &old)) = self.cleared.range(..start).next_back()
            && old.end == start
            && old.joins(&new)
        {
            self.remove_cleared(left);
            start = left;
            new.last_index = new.last_index.max(old.last_index);
        }
        if let Some(&old) = self.cleared.get(&new.end)
            && old.joins(&new)
        {
            self.remove_cleared(new.end);
            new.end = old.end;
            new.last_index = new.last_index.max(old.last_index);
        }
        self.put_cleared(start, new);
    }

    fn put_cleared(&mut self, start: ChunkIndex, range: ClearedRange) {
        assert!(start < range.end, "a cleared range is not empty");
        if range.kind == ZeroKind::Zero {
            self.zero_chunks += range.end.0 - start.0;
        }
        let old = self.cleared.insert(start, range);
        assert!(old.is_none(), "cleared ranges are disjoint");
    }

    fn remove_cleared(&mut self, start: ChunkIndex) {
        if let Some(range) = self.cleared.remove(&start)
            && range.kind == ZeroKind::Zero
        {
            self.zero_chunks -= range.end.0 - start.0;
        }
    }

    fn absorb(&mut self, newer: &Self) {
        for (start, range) in newer.cleared() {
            self.chunks.extract_if(start..range.end, |_, _| true).for_each(drop);
            self.insert_cleared(start, range);
        }
        for (at, chunk) in newer.chunks() {
            self.chunk_mut(at, chunk.last_index()).absorb(chunk);
        }
    }
}

fn fragment(start: u64, end: u64, source: FragmentSource) -> Fragment {
    let within = |at: u64| u16::try_from(at).expect("a place within a block");
    Fragment { start: within(start), end: within(end), source }
}

impl Overlay {
    /// Changes of `volume`, if any.
    pub(crate) fn volume(&self, volume: VolumeId) -> Option<&VolumeOverlay> {
        self.volumes.get(&volume)
    }

    /// All volumes with changes.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = (VolumeId, &VolumeOverlay)> {
        self.volumes.iter().map(|(id, volume)| (*id, volume))
    }

    /// The chunks with changes, volume by volume; those in cleared ranges are not among them.
    pub(crate) fn changed_chunks(
        &self,
    ) -> impl Iterator<Item = (VolumeId, impl Iterator<Item = ChunkIndex>)> {
        self.volumes.iter().map(|(volume, overlay)| (*volume, overlay.chunks.keys().copied()))
    }

    /// Upper bound of the chunks that may need a new slot at the next checkpoint.
    pub(crate) const fn pending_chunks(&self) -> u64 {
        self.pending_chunks
    }

    /// Whether any block was cleared, so that slots may become free.
    pub(crate) const fn has_cleared(&self) -> bool {
        self.has_cleared
    }

    /// Whether any run of whole chunks was cleared.
    pub(crate) fn has_ranges(&self) -> bool {
        self.volumes.values().any(|volume| !volume.cleared.is_empty())
    }

    /// Applies a write; see [`VolumeOverlay::write`].
    pub(crate) fn write(
        &mut self,
        volume: VolumeId,
        index: LogIndex,
        range: (u64, u64),
        payload: LogPosition,
        checksums: &[u8],
    ) {
        let (offset, len) = range;
        self.change(volume, |v| v.write(index, offset, len, payload, checksums));
    }

    /// Applies a trim: the whole blocks of `[start, end)` become holes, its edges stay. A partial
    /// last block of the volume counts as whole when the trim reaches its end.
    pub(crate) fn trim(
        &mut self,
        volume: VolumeId,
        index: LogIndex,
        (start, end): (u64, u64),
        volume_size: u64,
    ) {
        let (first, last) = (start.div_ceil(BLOCK_BYTES), whole_end(end, volume_size));
        if first < last {
            self.has_cleared = true;
            self.change(volume, |v| v.clear(index, first, last, ZeroKind::Hole));
        }
    }

    /// Applies a write-zeroes: whole blocks become `kind`, edges are overwritten with zeroes.
    pub(crate) fn write_zeroes(
        &mut self,
        volume: VolumeId,
        index: LogIndex,
        (start, end): (u64, u64),
        volume_size: u64,
        kind: ZeroKind,
    ) {
        let (first, last) = (start.div_ceil(BLOCK_BYTES), whole_end(end, volume_size));
        self.has_cleared |= kind == ZeroKind::Hole;
        self.change(volume, |v| {
            if first > last {
                v.zero_part(index, start, end);
                return;
            }
            if start < first * BLOCK_BYTES {
                v.zero_part(index, start, first * BLOCK_BYTES);
            }
            if first < last {
                v.clear(index, first, last, kind);
            }
            if last * BLOCK_BYTES < end {
                v.zero_part(index, last * BLOCK_BYTES, end);
            }
        });
    }

    /// The entry at `index` deletes `volume`: all of it is holes. Takes the same time whatever the
    /// overlay has of it.
    pub(crate) fn delete(&mut self, volume: VolumeId, index: LogIndex) {
        self.has_cleared = true;
        if let Some(old) = self.volumes.remove(&volume) {
            self.pending_chunks -= old.pending_chunks();
            self.discarded.push(old);
        }
        let blocks = CHUNKS_PER_VOLUME_MAX * BLOCKS_PER_CHUNK as u64;
        self.change(volume, |v| v.clear(index, 0, blocks, ZeroKind::Hole));
    }

    /// Lays `newer` over this overlay.
    pub(crate) fn absorb(&mut self, newer: &Self) {
        self.has_cleared |= newer.has_cleared;
        for (id, volume) in newer.volumes() {
            self.change(id, |v| v.absorb(volume));
        }
    }

    fn change(&mut self, volume: VolumeId, change: impl FnOnce(&mut VolumeOverlay)) {
        let target = self.volumes.entry(volume).or_default();
        let before = target.pending_chunks();
        change(target);
        self.pending_chunks = self.pending_chunks - before + target.pending_chunks();
    }
}

/// End, in blocks, of the whole blocks before byte `end`. The end of the volume rounds up: nothing
/// behind it can be read.
const fn whole_end(end: u64, volume_size: u64) -> u64 {
    if end == volume_size { end.div_ceil(BLOCK_BYTES) } else { end / BLOCK_BYTES }
}

#[cfg(test)]
mod tests;
