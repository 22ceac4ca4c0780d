//! The shard as other replicas see it: what is at home, for transfers, comparisons and repairs.
//!
//! Everything here **blocks**, takes no lock across I/O, and keeps no state between calls.
//!
//! What is at home may be overwritten in place by the checkpoint under way. A chunk is therefore
//! looked at through the frozen overlay, which has all that this checkpoint changes: what comes out
//! is the chunk as of the last checkpoint, or as of the one under way. A later checkpoint waits for
//! the pin that is taken with the look at the overlay.
//!
//! A checkpoint that power failed in leaves blocks at home that are half overwritten. What it wrote
//! is in the log, and after the replay in the active overlay: a chunk that is damaged at home is
//! looked at through that one too.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_log::checksum::crc32c;
use nbd_topology::LogIndex;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::plan::{BlockKind, ReadError, ReadPlan, Source};
use super::reader::{Overlays, ShardReader};
use crate::chunk::database::MetadataError;
use crate::chunk::meta::{ChunkKey, ChunkMeta};
use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, CHUNKS_PER_VOLUME_MAX, DIGEST_CHUNKS,
    PAGE_CHUNKS_MAX, to_usize,
};
use crate::overlay::{Layer, OverlayChunk};
use crate::snapshot;
use crate::transfer::{
    ChunkDigest, ChunkImage, ChunkRun, ChunkStamp, DamagedChunk, ManifestPage, RangeDigest,
    ScrubPage, ShardSnapshot,
};

const BLOCK: usize = to_usize(BLOCK_BYTES);

/// A chunk about to be read.
struct ChunkView {
    plan: ReadPlan,
    /// Newest entry that changed it.
    last_index: LogIndex,
    /// Whether an overlay has a part in it.
    is_changing: bool,
}

/// How new a view of a chunk is.
#[derive(Clone, Copy)]
enum AsOf {
    /// The last checkpoint, or the one under way.
    Checkpoint,
    /// The last entry applied.
    Now,
}

impl ShardReader {
    /// The shard's state as of the last durable checkpoint, chunks left out.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn snapshot(&self) -> Result<ShardSnapshot, ReadError> {
        let contents = self.shard.base.database().contents(Some(self.shard.id))?;
        let missing = MetadataError::Damaged { table: "shards" };
        snapshot::encode(&contents).ok_or(ReadError::Metadata(missing))
    }

    /// The chunks at home behind the key `after` (`None`: from the first), and the versions of
    /// those that entries behind `since` changed: at most `max` of them, but at least one.
    ///
    /// A receiver gives as `since` what its own last checkpoint covers
    /// ([`crate::CheckpointReport::applied`]), not what it has applied: what lies in its overlays
    /// goes when the snapshot is installed.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn manifest(
        &self,
        since: LogIndex,
        after: Option<ChunkKey>,
        max: usize,
    ) -> Result<ManifestPage, ReadError> {
        let (applied, reader) = self.shard.base.database().read_shard(self.shard.id)?;
        let (chunks, present) = (Vec::new(), Vec::new());
        let mut page = ManifestPage { applied, chunks, present, next: None };
        for (seen, row) in reader.shard_chunks(self.shard.id, after)?.enumerate() {
            if seen == PAGE_CHUNKS_MAX || page.chunks.len() >= max.max(1) {
                return Ok(page);
            }
            let ((volume, chunk), meta) = row?;
            let ChunkMeta { last_index, present, .. } = meta;
            if last_index > since {
                let bytes = u64::from(present.count_ones()) * BLOCK_BYTES;
                page.chunks.push(ChunkStamp { volume, chunk, last_index, bytes });
            }
            match page.present.last_mut() {
                Some(run) if run.volume == volume && run.end == chunk => run.end = chunk.next(),
                _ => page.present.push(ChunkRun { volume, start: chunk, end: chunk.next() }),
            }
            page.next = Some((volume, chunk));
        }
        page.next = None;
        Ok(page)
    }

    /// A chunk with its bytes, verified; `None` if nothing of it is allocated. It may be newer than
    /// the manifest said.
    ///
    /// # Errors
    /// A damaged block, or a failure of the disk or the database.
    pub fn read_chunk(
        &self,
        volume: VolumeId,
        chunk: ChunkIndex,
    ) -> Result<Option<ChunkImage>, ReadError> {
        let key = (volume, chunk);
        let Some(view) = self.view(key, AsOf::Checkpoint)? else { return Ok(None) };
        let mut bytes = vec![0; to_usize(CHUNK_BYTES)];
        let Some(view) = self.read_view(key, view, &mut bytes)? else { return Ok(None) };
        let ChunkView { plan, last_index, .. } = view;
        let (mut present, mut zero, mut crcs) = (0, 0, [0; BLOCKS_PER_CHUNK]);
        let mut data = BytesMut::with_capacity(bytes.len());
        for (at, (kind, block)) in plan.kinds().zip(bytes.chunks_exact(BLOCK)).enumerate() {
            match kind {
                BlockKind::Hole => {}
                BlockKind::Zero => zero |= 1 << at,
                BlockKind::Data => {
                    present |= 1 << at;
                    crcs[at] = crc32c(block);
                    data.extend_from_slice(block);
                }
            }
        }
        let data = data.freeze();
        let image = ChunkImage { volume, chunk, last_index, present, zero, crcs, data };
        Ok((present | zero != 0).then_some(image))
    }

    /// Whether this very version of a chunk is at home here, so that it need not be fetched.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn has_chunk(
        &self,
        volume: VolumeId,
        chunk: ChunkIndex,
        last_index: LogIndex,
    ) -> Result<bool, ReadError> {
        let home = self.home((volume, chunk))?;
        Ok(home.is_some_and(|meta| meta.last_index == last_index))
    }

    /// Digests of the ranges that hold chunks, of those behind the range that `after` is in, at
    /// most `max`. None: there are no more.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn digests(
        &self,
        after: Option<ChunkKey>,
        max: usize,
    ) -> Result<Vec<RangeDigest>, ReadError> {
        let range_of = |chunk: ChunkIndex| ChunkIndex(chunk.0 / DIGEST_CHUNKS * DIGEST_CHUNKS);
        let last_of = |chunk: ChunkIndex| ChunkIndex(range_of(chunk).0 | (DIGEST_CHUNKS - 1));
        let after = after.map(|(volume, chunk)| (volume, last_of(chunk)));
        let reader = self.shard.base.database().read()?;
        let mut found: Vec<RangeDigest> = Vec::new();
        let mut hash = Xxh3::new();
        for (seen, row) in reader.shard_chunks(self.shard.id, after)?.enumerate() {
            let ((volume, chunk), meta) = row?;
            let first = range_of(chunk);
            let goes_on =
                found.last().is_some_and(|last| last.volume == volume && last.first == first);
            if !goes_on {
                if found.len() >= max || seen >= PAGE_CHUNKS_MAX {
                    break;
                }
                hash.reset();
                found.push(RangeDigest { volume, first, digest: 0, newest: LogIndex::ZERO });
            }
            for part in [chunk.0, meta.last_index.0, digest_of(&meta)] {
                hash.update(&part.to_le_bytes());
            }
            if let Some(range) = found.last_mut() {
                range.digest = hash.digest();
                range.newest = range.newest.max(meta.last_index);
            }
        }
        Ok(found)
    }

    /// Digests of the chunks at home in a range, of the first [`DIGEST_CHUNKS`] at most.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn chunk_digests(
        &self,
        volume: VolumeId,
        chunks: Range<ChunkIndex>,
    ) -> Result<Vec<ChunkDigest>, ReadError> {
        let end = chunks.end.0.min(chunks.start.0.saturating_add(DIGEST_CHUNKS));
        if volume.shard() != self.shard.id || chunks.start.0 >= end {
            return Ok(Vec::new());
        }
        let reader = self.shard.base.database().read()?;
        let mut found = Vec::new();
        for row in reader.range(volume, &(chunks.start..ChunkIndex(end)))? {
            let (chunk, meta) = row?;
            let (last_index, digest) = (meta.last_index, digest_of(&meta));
            found.push(ChunkDigest { chunk, last_index, digest });
        }
        Ok(found)
    }

    /// A block's 4096 bytes, if they have this checksum: as they are by now, or at home. For a
    /// replica whose own copy is damaged.
    ///
    /// # Errors
    /// A failure of the disk or the database. A damaged copy is none: it is not the one asked for.
    pub fn read_block(
        &self,
        volume: VolumeId,
        block: u64,
        crc: u32,
    ) -> Result<Option<Bytes>, ReadError> {
        let (chunk, at) = (ChunkIndex(block / PER_CHUNK), to_usize(block % PER_CHUNK));
        if !self.is_ours(volume, chunk) {
            return Ok(None);
        }
        let (newest, pin) = {
            let state = self.shard.state.read();
            let layers = Overlays::of(&state, volume).chunk(chunk);
            (layers.source(at, &mut || None), Arc::clone(&state.pin))
        };
        let home = Source::home(self.home((volume, chunk))?, at);
        for mut source in [newest, home] {
            let of_home = || Ok::<_, ReadError>(Source::home(self.home((volume, chunk))?, at));
            source.settle(of_home)?;
            if !source.may_have(crc) {
                continue;
            }
            let (shard, pin) = (Arc::clone(&self.shard), Arc::clone(&pin));
            let offset = block * BLOCK_BYTES;
            let mut plan = ReadPlan::new(shard, pin, volume, offset, BLOCK_BYTES, vec![source]);
            let mut bytes = BytesMut::zeroed(BLOCK);
            match plan.read_blocking(&mut bytes) {
                Ok(()) if crc32c(&bytes) == crc => return Ok(Some(bytes.freeze())),
                Ok(()) | Err(ReadError::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Verifies chunks at home behind the key `after`, at most `max` of them, but at least one.
    ///
    /// # Errors
    /// A failure of the disk or the database.
    pub fn scrub(&self, after: Option<ChunkKey>, max: usize) -> Result<ScrubPage, ReadError> {
        let (mut page, mut keys) = (ScrubPage::default(), Vec::new());
        let max = max.clamp(1, PAGE_CHUNKS_MAX);
        let reader = self.shard.base.database().read()?;
        for row in reader.shard_chunks(self.shard.id, after)?.take(max) {
            keys.push(row?.0);
        }
        drop(reader);
        page.next = keys.last().copied().filter(|_| keys.len() == max);
        let mut bytes = vec![0; to_usize(CHUNK_BYTES)];
        for (volume, chunk) in keys {
            let key = (volume, chunk);
            // One that changes is written and verified by the checkpoint.
            let Some(view) = self.view(key, AsOf::Checkpoint)?.filter(|view| !view.is_changing)
            else {
                continue;
            };
            let ChunkView { last_index, .. } = view;
            let blocks = view.plan.kinds().filter(|kind| *kind == BlockKind::Data).count();
            page.bytes += (blocks * BLOCK) as u64;
            match self.read_view(key, view, &mut bytes) {
                Ok(_) => {}
                Err(ReadError::Corrupt { .. }) => {
                    page.damaged.push(DamagedChunk { volume, chunk, last_index });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(page)
    }

    fn is_ours(&self, volume: VolumeId, chunk: ChunkIndex) -> bool {
        volume.shard() == self.shard.id && chunk.0 < CHUNKS_PER_VOLUME_MAX
    }

    fn home(&self, (volume, chunk): ChunkKey) -> Result<Option<ChunkMeta>, MetadataError> {
        let homes = self.shard.base.load(volume, [chunk])?;
        Ok(homes.into_iter().find_map(|(_, meta)| meta))
    }

    /// Reads a chunk as the last checkpoint has it, of which `view` is the view; or, if that is
    /// damaged and was changed since, as of now. Returns the view that was read.
    fn read_view(
        &self,
        key: ChunkKey,
        mut view: ChunkView,
        bytes: &mut [u8],
    ) -> Result<Option<ChunkView>, ReadError> {
        let damaged = match view.plan.read_blocking(bytes) {
            Ok(()) => return Ok(Some(view)),
            Err(error @ ReadError::Corrupt { .. }) => error,
            Err(error) => return Err(error),
        };
        let Some(mut view) = self.view(key, AsOf::Now)? else { return Ok(None) };
        if !view.is_changing {
            return Err(damaged);
        }
        view.plan.read_blocking(bytes)?;
        Ok(Some(view))
    }

    /// A chunk as the last checkpoint has it, or the one under way; or as of now.
    fn view(&self, (volume, chunk): ChunkKey, as_of: AsOf) -> Result<Option<ChunkView>, ReadError> {
        if !self.is_ours(volume, chunk) {
            return Ok(None);
        }
        // In this order: the home is at least as new as what the pin protects.
        let (pin, sources, changed) = {
            let state = self.shard.state.read();
            let overlays = Overlays::of(&state, volume);
            let overlays = match as_of {
                AsOf::Checkpoint => Overlays { active: None, ..overlays },
                AsOf::Now => overlays,
            };
            let layers = overlays.chunk(chunk);
            let sources: Vec<_> =
                (0..BLOCKS_PER_CHUNK).map(|at| layers.source(at, &mut || None)).collect();
            let changes = [overlays.frozen, overlays.active].into_iter().flatten();
            let changed = changes.filter_map(|volume| match volume.layer(chunk)? {
                Layer::Chunk(change) => Some(OverlayChunk::last_index(change)),
                Layer::Cleared(_) => volume.cleared_at(chunk).map(|range| range.last_index),
            });
            let changed = changed.max();
            (Arc::clone(&state.pin), sources, changed)
        };
        let home = self.home((volume, chunk))?;
        let Some(at_home) = home.map(|meta| meta.last_index).max(changed) else { return Ok(None) };
        // A home that holds the change already is as good without it: see `Checkpointer::place`.
        let is_changing = changed > home.map(|meta| meta.last_index);
        let mut sources = sources;
        for (at, source) in sources.iter_mut().enumerate() {
            let of_home = || Ok::<_, ReadError>(Source::home(home, at));
            if is_changing {
                source.settle(of_home)?;
            } else {
                *source = of_home()?;
            }
        }
        let (shard, offset) = (Arc::clone(&self.shard), chunk.0 * CHUNK_BYTES);
        let plan = ReadPlan::new(shard, pin, volume, offset, CHUNK_BYTES, sources);
        Ok(Some(ChunkView { plan, last_index: at_home, is_changing }))
    }
}

const PER_CHUNK: u64 = BLOCKS_PER_CHUNK as u64;

/// What a chunk holds, wherever it lies.
fn digest_of(meta: &ChunkMeta) -> u64 {
    let mut bytes = [0; 4 + 4 * BLOCKS_PER_CHUNK];
    bytes[..2].copy_from_slice(&meta.present.to_le_bytes());
    bytes[2..4].copy_from_slice(&meta.zero.to_le_bytes());
    for (out, crc) in bytes[4..].as_chunks_mut().0.iter_mut().zip(meta.crcs) {
        *out = crc.to_le_bytes();
    }
    xxh3_64(&bytes)
}
