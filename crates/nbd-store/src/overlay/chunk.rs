//! One chunk's newest content, block by block, as places in the log.

use nbd_log::log::LogPosition;
use nbd_topology::LogIndex;

use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK};

/// A whole block whose content lies in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogBlock {
    /// Where its 4096 bytes begin.
    pub(crate) position: LogPosition,
    /// Their CRC32C.
    pub(crate) crc: u32,
}

/// How a run of zeroes came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ZeroKind {
    /// Not allocated: never written, or trimmed.
    Hole,
    /// Written as zeroes with NO_HOLE: allocated.
    Zero,
}

/// Where the bytes of a fragment come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FragmentSource {
    /// Zeroes, from the edge of a write-zeroes.
    Zero,
    /// The log: position of the fragment's first byte, CRC32C of the whole fragment.
    Log {
        /// Where the fragment begins.
        position: LogPosition,
        /// CRC32C of all its bytes.
        crc: u32,
    },
}

/// New content for part of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// First byte within the block.
    pub(crate) start: u16,
    /// End within the block, exclusive, at most 4096.
    pub(crate) end: u16,
    /// The bytes.
    pub(crate) source: FragmentSource,
}

/// What a block is, fragments aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlockBase {
    /// Whatever the layer below says.
    Below,
    /// Zeroes.
    Cleared(ZeroKind),
    /// In the log.
    Log(LogBlock),
}

/// Fragments of a block are swept for invisible ones when there are this many, then at each
/// doubling: the list stays within twice its visible part.
const SWEEP_FRAGMENTS: usize = 32;

/// The blocks of a chunk that changed since the layer below.
///
/// Bit `b` of a mask speaks of block `b`; a block is in at most one of `hole`, `zero` and `data`,
/// and in none when its content is what lies below. `split` marks blocks that have fragments on top
/// of that. The vectors hold one element per set bit, in block order: a chunk with one block costs
/// 64 bytes and an allocation of 16.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OverlayChunk {
    last_index: LogIndex,
    hole: u16,
    zero: u16,
    data: u16,
    split: u16,
    blocks: Vec<LogBlock>,
    parts: Vec<Vec<Fragment>>,
}

const fn bit(block: usize) -> u16 {
    assert!(block < BLOCKS_PER_CHUNK);
    1 << block
}

/// Number of set bits of `mask` below `block`.
const fn rank(mask: u16, block: usize) -> usize {
    (mask & (bit(block) - 1)).count_ones() as usize
}

/// Bits `from..to`.
pub(crate) fn mask_of(from: usize, to: usize) -> u16 {
    assert!(from <= to && to <= BLOCKS_PER_CHUNK);
    let below = |end: usize| if end == BLOCKS_PER_CHUNK { u16::MAX } else { (1 << end) - 1 };
    below(to) & !below(from)
}

impl OverlayChunk {
    /// A chunk whose blocks are all what `below` says (`None`: the next layer).
    pub(crate) const fn new(below: Option<ZeroKind>) -> Self {
        let (hole, zero) = match below {
            None => (0, 0),
            Some(ZeroKind::Hole) => (u16::MAX, 0),
            Some(ZeroKind::Zero) => (0, u16::MAX),
        };
        Self {
            last_index: LogIndex::ZERO,
            hole,
            zero,
            data: 0,
            split: 0,
            blocks: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Index of the newest entry that changed the chunk.
    pub(crate) const fn last_index(&self) -> LogIndex {
        self.last_index
    }

    /// Notes that the entry at `index` changes the chunk.
    pub(crate) fn touch(&mut self, index: LogIndex) {
        self.last_index = self.last_index.max(index);
    }

    /// What `block` is under its fragments.
    pub(crate) fn base(&self, block: usize) -> BlockBase {
        let bit = bit(block);
        if self.data & bit != 0 {
            BlockBase::Log(self.blocks[rank(self.data, block)])
        } else if self.hole & bit != 0 {
            BlockBase::Cleared(ZeroKind::Hole)
        } else if self.zero & bit != 0 {
            BlockBase::Cleared(ZeroKind::Zero)
        } else {
            BlockBase::Below
        }
    }

    /// Fragments of `block`, oldest first.
    pub(crate) fn fragments(&self, block: usize) -> &[Fragment] {
        if self.split & bit(block) == 0 { &[] } else { &self.parts[rank(self.split, block)] }
    }

    /// Whether any block has fragments.
    pub(crate) const fn is_split(&self) -> bool {
        self.split != 0
    }

    /// Whether every block is a hole, so that the chunk needs no slot.
    pub(crate) const fn is_hole(&self) -> bool {
        self.hole == u16::MAX && self.split == 0
    }

    /// Whether no block shows the layer below.
    #[cfg(test)]
    const fn is_complete(&self) -> bool {
        self.hole | self.zero | self.data == u16::MAX
    }

    /// `block` is now whole in the log.
    pub(crate) fn set_log(&mut self, block: usize, content: LogBlock) {
        self.drop_fragments(bit(block));
        let (bit, at) = (bit(block), rank(self.data, block));
        if self.data & bit != 0 {
            self.blocks[at] = content;
            return;
        }
        if self.blocks.len() == self.blocks.capacity() {
            // Doubling from one, not from the allocator's four: most chunks of a random workload
            // have one block.
            self.blocks.reserve_exact(self.blocks.len().max(1));
        }
        self.blocks.insert(at, content);
        self.data |= bit;
        self.hole &= !bit;
        self.zero &= !bit;
    }

    /// The blocks of `mask` now read as zero.
    pub(crate) fn clear(&mut self, mask: u16, kind: ZeroKind) {
        self.drop_fragments(mask);
        if self.data & mask != 0 {
            let data = self.data;
            let mut bits = (0..BLOCKS_PER_CHUNK).filter(|&block| data & bit(block) != 0);
            self.blocks.retain(|_| bits.next().is_some_and(|block| mask & bit(block) == 0));
        }
        self.data &= !mask;
        self.hole &= !mask;
        self.zero &= !mask;
        match kind {
            ZeroKind::Hole => self.hole |= mask,
            ZeroKind::Zero => self.zero |= mask,
        }
    }

    /// `fragment` lies on top of `block` from now on. It must not cover the whole block from the
    /// log: such a one is a [`LogBlock`].
    pub(crate) fn add_fragment(&mut self, block: usize, fragment: Fragment) {
        assert!(fragment.start < fragment.end && u64::from(fragment.end) <= BLOCK_BYTES);
        let (bit, at) = (bit(block), rank(self.split, block));
        if self.split & bit == 0 {
            self.parts.insert(at, Vec::with_capacity(1));
            self.split |= bit;
        }
        let list = &mut self.parts[at];
        list.retain(|old| old.start < fragment.start || old.end > fragment.end);
        list.push(fragment);
        if list.len() >= SWEEP_FRAGMENTS && list.len().is_power_of_two() {
            drop_invisible(list);
        }
    }

    fn drop_fragments(&mut self, mask: u16) {
        if self.split & mask == 0 {
            return;
        }
        let split = self.split;
        let mut bits = (0..BLOCKS_PER_CHUNK).filter(|&block| split & bit(block) != 0);
        self.parts.retain(|_| bits.next().is_some_and(|block| mask & bit(block) == 0));
        self.split &= !mask;
    }

    /// Lays `newer` over this chunk.
    pub(crate) fn absorb(&mut self, newer: &Self) {
        for block in 0..BLOCKS_PER_CHUNK {
            match newer.base(block) {
                BlockBase::Below => {}
                BlockBase::Cleared(kind) => self.clear(bit(block), kind),
                BlockBase::Log(content) => self.set_log(block, content),
            }
            for fragment in newer.fragments(block) {
                self.add_fragment(block, *fragment);
            }
        }
        self.touch(newer.last_index);
    }
}

/// Removes fragments of which newer ones leave no byte to be seen.
fn drop_invisible(list: &mut Vec<Fragment>) {
    let mut hidden = [false; 4096];
    let mut keep = vec![false; list.len()];
    for (kept, fragment) in keep.iter_mut().zip(list.iter()).rev() {
        let bytes = &mut hidden[usize::from(fragment.start)..usize::from(fragment.end)];
        *kept = bytes.iter().any(|hidden| !hidden);
        bytes.fill(true);
    }
    let mut keep = keep.into_iter();
    list.retain(|_| keep.next().unwrap_or(true));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(position: u64) -> LogBlock {
        LogBlock { position: LogPosition(position), crc: 1 }
    }

    fn part(start: u16, end: u16) -> Fragment {
        Fragment { start, end, source: FragmentSource::Zero }
    }

    #[test]
    fn masks() {
        assert_eq!(mask_of(0, 16), u16::MAX);
        assert_eq!(mask_of(3, 3), 0);
        assert_eq!(mask_of(1, 3), 0b110);
        assert_eq!(mask_of(15, 16), 0x8000);
    }

    #[test]
    fn blocks_are_found_by_rank() {
        let mut chunk = OverlayChunk::new(None);
        for block in [7, 0, 15, 3] {
            chunk.set_log(block, log(block as u64 * 100));
        }
        chunk.set_log(3, log(333));
        assert_eq!(chunk.base(0), BlockBase::Log(log(0)));
        assert_eq!(chunk.base(3), BlockBase::Log(log(333)));
        assert_eq!(chunk.base(7), BlockBase::Log(log(700)));
        assert_eq!(chunk.base(8), BlockBase::Below);
        chunk.clear(mask_of(0, 8), ZeroKind::Hole);
        assert_eq!(chunk.base(3), BlockBase::Cleared(ZeroKind::Hole));
        assert_eq!(chunk.base(15), BlockBase::Log(log(1500)));
        chunk.clear(u16::MAX, ZeroKind::Hole);
        assert!(chunk.is_hole() && chunk.is_complete());
    }

    #[test]
    fn covered_fragments_go() {
        let mut chunk = OverlayChunk::new(Some(ZeroKind::Zero));
        chunk.add_fragment(2, part(10, 20));
        chunk.add_fragment(2, part(15, 30));
        chunk.add_fragment(2, part(0, 5));
        assert_eq!(chunk.fragments(2), [part(10, 20), part(15, 30), part(0, 5)]);
        chunk.add_fragment(2, part(8, 21));
        assert_eq!(chunk.fragments(2), [part(15, 30), part(0, 5), part(8, 21)]);
        chunk.set_log(2, log(9));
        assert!(!chunk.is_split());
    }

    #[test]
    fn fragment_lists_stay_bounded() {
        let mut chunk = OverlayChunk::new(None);
        for round in 0..8_000_u16 {
            // Staggered pairs: none covers another, but each is hidden by two newer ones.
            let start = (round * 7) % 64;
            chunk.add_fragment(0, part(start, start + 2));
        }
        assert!(chunk.fragments(0).len() <= 256);
    }
}
