//! Where each piece of a checkpoint goes.

use std::io;

use super::batch::Origin;
use super::work::Work;
use super::{CheckpointError, CheckpointReport, Checkpointer, Round, data_error};
use crate::chunk::database::{self, ChunkTable};
use crate::chunk::meta::{ChunkKey, ChunkMeta, HomeBlock, Slot};
use crate::limits::{BLOCKS_PER_CHUNK, CHUNK_BYTES, GROWTH_SLOTS, META_HEADROOM_BYTES};
use crate::overlay::{BlockBase, OverlayChunk, ZeroKind};
use crate::space::log_growth;

/// Whether a piece of work found its place.
pub(super) enum Placing<'a> {
    Placed,
    /// The transaction has no room for this rest of it.
    Partly(Work<'a>),
    /// It needs a slot, and there is none.
    OutOfSlots,
}

impl Checkpointer {
    /// Gives one piece of work its place: its home in the table, or in the batch if there are
    /// blocks to write.
    ///
    /// A home that was changed by the same entry, or a newer one, holds the piece already and is
    /// left alone: entries are replayed over a checkpoint that was cut short, and over chunks that
    /// were fetched from a replica that is ahead.
    pub(super) fn place<'a>(
        &mut self,
        table: &mut ChunkTable<'_>,
        work: &Work<'a>,
        round: &mut Round,
        report: &mut CheckpointReport,
    ) -> Result<Placing<'a>, CheckpointError> {
        match work {
            Work::Remove { volume, chunks, index } => {
                let max = round.changes_max.saturating_sub(round.changes).max(1);
                let mut removed = 0;
                let next = database::remove_chunks(table, *volume, chunks, *index, max, |home| {
                    self.slots.leave(home.slot);
                    removed += 1;
                })?;
                round.changes += removed;
                report.chunks += removed as u64;
                let rest = next.filter(|next| *next < chunks.end).map(|next| next..chunks.end);
                Ok(rest.map_or(Placing::Placed, |chunks| {
                    Placing::Partly(Work::Remove { volume: *volume, chunks, index: *index })
                }))
            }
            Work::Zero { volume, chunk, index } => {
                let key = (*volume, *chunk);
                let slot = match database::get_chunk(table, key)? {
                    Some(home) if home.last_index >= *index => return Ok(Placing::Placed),
                    Some(home) => home.slot,
                    None => match self.take_slot(round)? {
                        Some(slot) => slot,
                        None => return Ok(Placing::OutOfSlots),
                    },
                };
                self.note_created(key);
                let mut meta = ChunkMeta::new(slot);
                meta.last_index = *index;
                meta.zero = u16::MAX;
                database::put_chunk(table, key, Some(&meta))?;
                report.chunks += 1;
                Ok(Placing::Placed)
            }
            Work::Change { volume, chunk, change } => {
                self.place_change(table, (*volume, *chunk), change, round, report)
            }
        }
    }

    fn place_change<'a>(
        &mut self,
        table: &mut ChunkTable<'_>,
        key: ChunkKey,
        change: &OverlayChunk,
        round: &mut Round,
        report: &mut CheckpointReport,
    ) -> Result<Placing<'a>, CheckpointError> {
        let old = database::get_chunk(table, key)?;
        if old.is_some_and(|old| old.last_index >= change.last_index()) {
            return Ok(Placing::Placed);
        }
        let mut meta = old.unwrap_or_else(|| ChunkMeta::new(Slot(0)));
        apply_change(&mut meta, change);
        if meta.is_hole() {
            if let Some(old) = old {
                self.slots.leave(old.slot);
                database::put_chunk(table, key, None)?;
                round.changed.push((key, None));
                report.chunks += 1;
            }
            return Ok(Placing::Placed);
        }
        // In place only what is whole in the log.
        let moves = old.is_none() || (change.is_split() && !self.faults.splits_in_place());
        if moves {
            let Some(slot) = self.take_slot(round)? else { return Ok(Placing::OutOfSlots) };
            meta.slot = slot;
            if let Some(old) = old {
                self.slots.leave(old.slot);
            }
        }
        if old.is_none() {
            self.note_created(key);
        }
        self.batch.add_chunk(key, meta);
        let old_block = |block| old.map_or(HomeBlock::Hole, |old| old.block(block));
        for block in (0..BLOCKS_PER_CHUNK).filter(|block| meta.present & (1 << block) != 0) {
            let fragments = change.fragments(block);
            let origin = match change.base(block) {
                BlockBase::Log(source) => Origin::Log(source),
                BlockBase::Cleared(_) => Origin::Zeroes,
                BlockBase::Below if moves || !fragments.is_empty() => old_block(block).into(),
                BlockBase::Below => continue,
            };
            self.batch.add_block(block, origin, fragments);
        }
        Ok(Placing::Placed)
    }

    /// A slot that nothing refers to, growing the data file if need be.
    pub(super) fn take_slot(&mut self, round: &mut Round) -> Result<Option<Slot>, CheckpointError> {
        if let Some(slot) = self.slots.take() {
            return Ok(Some(slot));
        }
        // First a large step, then whatever is left.
        for step in [GROWTH_SLOTS, 16, 1] {
            if round.is_full {
                break;
            }
            let (len, bytes) = (self.slots.len(), step * CHUNK_BYTES);
            let kept = META_HEADROOM_BYTES + log_growth(&self.segments);
            if self.disk.space_available().map_err(data_error)? < bytes + kept {
                continue;
            }
            match self.base.data().allocate(len * CHUNK_BYTES, bytes) {
                Ok(()) => {
                    self.slots.grow(len + step);
                    return Ok(self.slots.take());
                }
                Err(error) if is_out_of_space(&error) => {}
                Err(source) => return Err(CheckpointError::Data { source }),
            }
        }
        round.is_full = true;
        Ok(None)
    }
}

/// Lays a chunk's changes over its home. A split block counts as present; its checksum follows.
fn apply_change(meta: &mut ChunkMeta, change: &OverlayChunk) {
    meta.last_index = meta.last_index.max(change.last_index());
    for block in 0..BLOCKS_PER_CHUNK {
        match change.base(block) {
            BlockBase::Below => {}
            BlockBase::Cleared(ZeroKind::Hole) => meta.clear(block),
            BlockBase::Cleared(ZeroKind::Zero) => meta.set_zero(block),
            BlockBase::Log(source) => meta.set_data(block, source.crc),
        }
        if !change.fragments(block).is_empty() {
            meta.set_data(block, 0);
        }
    }
}

fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
