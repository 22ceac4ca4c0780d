//! What a checkpoint has to bring home, piece by piece.

use std::ops::Range;

use nbd_topology::LogIndex;

use crate::ids::{ChunkIndex, VolumeId};
use crate::overlay::{OverlayChunk, ZeroKind};
use crate::shard::state::Frozen;

/// One piece of a checkpoint.
#[derive(Debug, Clone)]
pub(super) enum Work<'a> {
    /// These chunks have no home any more, except those that were written since.
    Remove { volume: VolumeId, chunks: Range<ChunkIndex>, index: LogIndex },
    /// This chunk is allocated zeroes.
    Zero { volume: VolumeId, chunk: ChunkIndex, index: LogIndex },
    /// This chunk changed block by block.
    Change { volume: VolumeId, chunk: ChunkIndex, change: &'a OverlayChunk },
}

/// What is still to be placed.
pub(super) struct WorkList<'a> {
    next: Option<Work<'a>>,
    rest: Box<dyn Iterator<Item = Work<'a>> + 'a>,
}

impl<'a> WorkList<'a> {
    pub(super) fn new(work: impl Iterator<Item = Work<'a>> + 'a) -> Self {
        let mut rest: Box<dyn Iterator<Item = Work<'a>> + 'a> = Box::new(work);
        Self { next: rest.next(), rest }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.next.is_none()
    }

    pub(super) fn next(&mut self) -> Option<Work<'a>> {
        let next = self.next.take();
        self.next = self.rest.next();
        next
    }

    /// What is to be taken up next.
    pub(super) fn put_back(&mut self, work: Work<'a>) {
        if let Some(after) = self.next.replace(work) {
            let rest = std::mem::replace(&mut self.rest, Box::new(std::iter::empty()));
            self.rest = Box::new(std::iter::once(after).chain(rest));
        }
    }
}

/// All of it: what frees slots first, then what may need them.
pub(super) fn all<'a, 'f>(
    frozen: &'f [&'a Frozen],
) -> impl Iterator<Item = Work<'a>> + use<'a, 'f> {
    let freeing = frozen.iter().copied().flat_map(freeing);
    let changes = frozen.iter().copied().flat_map(changes);
    let zeroes = frozen.iter().copied().flat_map(zeroes);
    freeing.chain(changes).chain(zeroes)
}

fn freeing(frozen: &Frozen) -> impl Iterator<Item = Work<'_>> {
    frozen.overlay.volumes().flat_map(|(volume, changes)| {
        let ranges = changes.cleared().filter(|(_, range)| range.kind == ZeroKind::Hole);
        let ranges = ranges.map(move |(start, range)| {
            let (chunks, index) = (start..range.end, range.last_index);
            Work::Remove { volume, chunks, index }
        });
        let holes = changes.chunks().filter(|(_, change)| change.is_hole());
        ranges.chain(holes.map(move |(chunk, change)| Work::Change { volume, chunk, change }))
    })
}

fn changes(frozen: &Frozen) -> impl Iterator<Item = Work<'_>> {
    frozen.overlay.volumes().flat_map(|(volume, changes)| {
        let chunks = changes.chunks().filter(|(_, change)| !change.is_hole());
        chunks.map(move |(chunk, change)| Work::Change { volume, chunk, change })
    })
}

fn zeroes(frozen: &Frozen) -> impl Iterator<Item = Work<'_>> {
    frozen.overlay.volumes().flat_map(|(volume, changes)| {
        let ranges = changes.cleared().filter(|(_, range)| range.kind == ZeroKind::Zero);
        ranges.flat_map(move |(start, range)| {
            let chunks = (start.0..range.end.0).map(ChunkIndex);
            // A chunk that was written since is described by itself.
            let chunks = chunks.filter(move |chunk| !changes.has_chunk(*chunk));
            chunks.map(move |chunk| Work::Zero { volume, chunk, index: range.last_index })
        })
    })
}
