//! What the base knows of one chunk.
//!
//! Value in the table `chunks` (key: volume u64, chunk u64), 88 bytes, little-endian; `crc` is the
//! seal of [`super::record`] at a place of its own, so that the block checksums stay aligned:
//!
//! ```text
//! 0          8                16            18         20        24                       88
//! +----------+----------------+-------------+----------+---------+------------------------+
//! | slot u64 | last index u64 | present u16 | zero u16 | crc u32 | 16 x block CRC32C u32  |
//! +----------+----------------+-------------+----------+---------+------------------------+
//! ```
//!
//! Bit `b` of `present`: block `b` lies in the slot and has the checksum `b`. Bit `b` of `zero`: it
//! is allocated and reads as zero. Neither: a hole. A chunk of holes has no entry and no slot.

use nbd_log::checksum::Crc32c;
use nbd_topology::LogIndex;

use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, SLOTS_MAX};

/// Bytes of a chunk's value.
pub(crate) const CHUNK_META_BYTES: usize = 88;

/// Place of a chunk in the data file: byte offset / 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Slot(pub(crate) u64);

impl Slot {
    /// Byte offset of `block` of this slot in the data file.
    pub(crate) const fn place(self, block: usize) -> u64 {
        self.0 * CHUNK_BYTES + block as u64 * BLOCK_BYTES
    }
}

/// Home of a chunk: its slot, and what lies there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkMeta {
    /// Where its blocks lie.
    pub(crate) slot: Slot,
    /// Newest entry that changed it.
    pub(crate) last_index: LogIndex,
    /// Blocks that lie in the slot.
    pub(crate) present: u16,
    /// Blocks that are allocated zeroes.
    pub(crate) zero: u16,
    /// CRC32C of the present blocks; 0 for others.
    pub(crate) crcs: [u32; BLOCKS_PER_CHUNK],
}

/// What the base says of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HomeBlock {
    /// Never written, or trimmed.
    Hole,
    /// Allocated, reads as zero.
    Zero,
    /// At this byte offset of the data file, with this CRC32C.
    Data {
        /// Byte offset in the data file.
        place: u64,
        /// CRC32C of the 4096 bytes there.
        crc: u32,
    },
}

/// Key of a chunk: chunks are ordered by volume, then by place.
pub type ChunkKey = (VolumeId, ChunkIndex);

impl ChunkMeta {
    /// A chunk of holes at `slot`.
    pub(crate) const fn new(slot: Slot) -> Self {
        Self { slot, last_index: LogIndex::ZERO, present: 0, zero: 0, crcs: [0; BLOCKS_PER_CHUNK] }
    }

    /// Where `block` lies.
    pub(crate) const fn block(&self, block: usize) -> HomeBlock {
        let bit = 1_u16 << block;
        if self.present & bit != 0 {
            HomeBlock::Data { place: self.slot.place(block), crc: self.crcs[block] }
        } else if self.zero & bit != 0 {
            HomeBlock::Zero
        } else {
            HomeBlock::Hole
        }
    }

    /// `block` lies in the slot with this checksum.
    pub(crate) const fn set_data(&mut self, block: usize, crc: u32) {
        self.clear(block);
        self.present |= 1 << block;
        self.crcs[block] = crc;
    }

    /// `block` is allocated zeroes.
    pub(crate) const fn set_zero(&mut self, block: usize) {
        self.clear(block);
        self.zero |= 1 << block;
    }

    /// `block` is a hole.
    pub(crate) const fn clear(&mut self, block: usize) {
        let keep = !(1_u16 << block);
        self.present &= keep;
        self.zero &= keep;
        self.crcs[block] = 0;
    }

    /// Whether nothing is allocated.
    pub(crate) const fn is_hole(&self) -> bool {
        self.present | self.zero == 0
    }

    /// The stored form.
    pub(crate) fn encode(&self, key: ChunkKey) -> [u8; CHUNK_META_BYTES] {
        let mut out = [0; CHUNK_META_BYTES];
        out[..8].copy_from_slice(&self.slot.0.to_le_bytes());
        out[8..16].copy_from_slice(&self.last_index.0.to_le_bytes());
        out[16..18].copy_from_slice(&self.present.to_le_bytes());
        out[18..20].copy_from_slice(&self.zero.to_le_bytes());
        for (out, crc) in out[24..].as_chunks_mut().0.iter_mut().zip(self.crcs) {
            *out = crc.to_le_bytes();
        }
        let seal = seal_of(key, &out);
        out[20..24].copy_from_slice(&seal);
        out
    }

    /// The chunk in a stored value, or `None` if the value is damaged.
    pub(crate) fn decode(key: ChunkKey, value: &[u8; CHUNK_META_BYTES]) -> Option<Self> {
        if value[20..24] != seal_of(key, value) {
            return None;
        }
        let u64_at = |at: usize| u64::from_le_bytes(value[at..at + 8].try_into().expect("8 bytes"));
        let u16_at = |at: usize| u16::from_le_bytes([value[at], value[at + 1]]);
        let meta = Self {
            slot: Slot(u64_at(0)),
            last_index: LogIndex(u64_at(8)),
            present: u16_at(16),
            zero: u16_at(18),
            crcs: std::array::from_fn(|n| u32::from_le_bytes(value[24..].as_chunks().0[n])),
        };
        (meta.slot.0 < SLOTS_MAX && meta.present & meta.zero == 0).then_some(meta)
    }
}

fn seal_of((volume, chunk): ChunkKey, value: &[u8; CHUNK_META_BYTES]) -> [u8; 4] {
    let mut crc = Crc32c::new();
    crc.update(&volume.0.to_le_bytes());
    crc.update(&chunk.0.to_le_bytes());
    crc.update(&value[..20]);
    crc.update(&value[24..]);
    crc.finish().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: ChunkKey = (VolumeId(5), ChunkIndex(77));

    #[test]
    fn golden_bytes() {
        let mut meta = ChunkMeta::new(Slot(0x0123));
        meta.last_index = LogIndex(77);
        meta.set_data(0, 0xdead_beef);
        meta.set_zero(1);
        meta.set_data(2, 0x0102_0304);
        meta.set_data(15, u32::MAX);
        let key = (VolumeId(0x3_0000_0001), ChunkIndex(0x0011_2233_4455));
        let expected =
            crate::golden::bytes(include_str!("../../tests/golden/records.txt"), "chunk");
        assert_eq!(meta.encode(key)[..], expected);
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let mut meta = ChunkMeta::new(Slot(12));
        meta.last_index = LogIndex(99);
        meta.set_data(3, 0xdead_beef);
        meta.set_zero(4);
        let value = meta.encode(KEY);
        assert_eq!(ChunkMeta::decode(KEY, &value), Some(meta));
        assert_eq!(ChunkMeta::decode((VolumeId(5), ChunkIndex(78)), &value), None);
        for bit in 0..value.len() * 8 {
            let mut bad = value;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ChunkMeta::decode(KEY, &bad), None, "bit {bit}");
        }
    }

    #[test]
    fn a_block_has_one_state() {
        let mut meta = ChunkMeta::new(Slot(2));
        meta.set_zero(15);
        meta.set_data(15, 7);
        let place = 2 * CHUNK_BYTES + 15 * BLOCK_BYTES;
        assert_eq!(meta.block(15), HomeBlock::Data { place, crc: 7 });
        meta.clear(15);
        assert_eq!(meta.block(15), HomeBlock::Hole);
        assert!(meta.is_hole());
    }
}
