//! Chunks and digests as they travel. What comes from the wire is checked for shape here; the store
//! checks content against checksums before it takes anything over.

use std::ops::Range;

use nbd_log::checksum::crc32c;
use nbd_rpc::error::Refusal;
use nbd_rpc::v1;
use nbd_store::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, DIGEST_CHUNKS};
use nbd_store::{
    ChunkDigest, ChunkImage, ChunkIndex, ChunkKey, ChunkRun, ChunkStamp, RangeDigest, VolumeId,
};
use nbd_topology::LogIndex;

pub(crate) const fn key_to_wire(key: ChunkKey) -> v1::ChunkKey {
    v1::ChunkKey { volume: key.0.0, chunk: key.1.0 }
}

pub(crate) const fn key_from_wire(key: v1::ChunkKey) -> ChunkKey {
    (VolumeId(key.volume), ChunkIndex(key.chunk))
}

pub(crate) fn stamp_to_wire(stamp: &ChunkStamp) -> v1::ChunkStamp {
    v1::ChunkStamp {
        volume: stamp.volume.0,
        chunk: stamp.chunk.0,
        last_index: stamp.last_index.0,
        bytes: u32::try_from(stamp.bytes).unwrap_or(u32::MAX),
    }
}

pub(crate) fn stamp_from_wire(stamp: v1::ChunkStamp) -> ChunkStamp {
    ChunkStamp {
        volume: VolumeId(stamp.volume),
        chunk: ChunkIndex(stamp.chunk),
        last_index: LogIndex(stamp.last_index),
        bytes: u64::from(stamp.bytes),
    }
}

pub(crate) const fn run_to_wire(run: &ChunkRun) -> v1::ChunkRun {
    v1::ChunkRun { volume: run.volume.0, start: run.start.0, end: run.end.0 }
}

pub(crate) const fn run_from_wire(run: v1::ChunkRun) -> Result<ChunkRun, Refusal> {
    if run.start >= run.end {
        return Err(Refusal::Malformed("a run of chunks is empty"));
    }
    let (start, end) = (ChunkIndex(run.start), ChunkIndex(run.end));
    Ok(ChunkRun { volume: VolumeId(run.volume), start, end })
}

pub(crate) fn image_to_wire(image: ChunkImage) -> v1::ChunkImage {
    let present = |at: &usize| image.present & (1 << at) != 0;
    v1::ChunkImage {
        volume: image.volume.0,
        chunk: image.chunk.0,
        last_index: image.last_index.0,
        present: u32::from(image.present),
        zero: u32::from(image.zero),
        crcs: (0..BLOCKS_PER_CHUNK).filter(present).map(|at| image.crcs[at]).collect(),
        data: image.data,
    }
}

/// The image, its bytes checked against their checksums.
pub(crate) fn image_from_wire(image: v1::ChunkImage) -> Result<ChunkImage, Refusal> {
    let bits =
        |bits: u32| u16::try_from(bits).map_err(|_| Refusal::Malformed("a chunk has 16 blocks"));
    let (present, zero) = (bits(image.present)?, bits(image.zero)?);
    if image.crcs.len() != present.count_ones() as usize {
        return Err(Refusal::Malformed("a chunk has one checksum for each block with data"));
    }
    let mut crcs = [0; BLOCKS_PER_CHUNK];
    let places = (0..BLOCKS_PER_CHUNK).filter(|at| present & (1 << at) != 0);
    for (at, crc) in places.zip(image.crcs) {
        crcs[at] = crc;
    }
    let image = ChunkImage {
        volume: VolumeId(image.volume),
        chunk: ChunkIndex(image.chunk),
        last_index: LogIndex(image.last_index),
        present,
        zero,
        crcs,
        data: image.data,
    };
    if !image.is_sound() {
        return Err(Refusal::Content("a chunk"));
    }
    Ok(image)
}

pub(crate) const fn range_to_wire(range: &RangeDigest) -> v1::RangeDigest {
    v1::RangeDigest {
        volume: range.volume.0,
        first: range.first.0,
        digest: range.digest,
        newest: range.newest.0,
    }
}

pub(crate) const fn range_from_wire(range: v1::RangeDigest) -> RangeDigest {
    RangeDigest {
        volume: VolumeId(range.volume),
        first: ChunkIndex(range.first),
        digest: range.digest,
        newest: LogIndex(range.newest),
    }
}

pub(crate) const fn digest_to_wire(digest: &ChunkDigest) -> v1::ChunkDigest {
    let ChunkDigest { chunk, last_index, digest } = *digest;
    v1::ChunkDigest { chunk: chunk.0, last_index: last_index.0, digest }
}

pub(crate) const fn digest_from_wire(digest: v1::ChunkDigest) -> ChunkDigest {
    let (chunk, last_index) = (ChunkIndex(digest.chunk), LogIndex(digest.last_index));
    ChunkDigest { chunk, last_index, digest: digest.digest }
}

/// The chunks that a request for digests is about.
pub(crate) fn digest_range(start: u64, end: u64) -> Result<Range<ChunkIndex>, Refusal> {
    if start > end || end - start > DIGEST_CHUNKS {
        return Err(Refusal::Malformed("digests are asked for 1024 chunks at most"));
    }
    Ok(ChunkIndex(start)..ChunkIndex(end))
}

/// Whether these are the bytes of a block with this checksum.
pub(crate) fn is_block(bytes: &[u8], crc: u32) -> bool {
    bytes.len() as u64 == BLOCK_BYTES && crc32c(bytes) == crc
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn image() -> ChunkImage {
        let data: Vec<u8> = (0..2 * 4096_u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut crcs = [0; BLOCKS_PER_CHUNK];
        (crcs[1], crcs[15]) = (crc32c(&data[..4096]), crc32c(&data[4096..]));
        ChunkImage {
            volume: VolumeId(7),
            chunk: ChunkIndex(9),
            last_index: LogIndex(11),
            present: 1 << 1 | 1 << 15,
            zero: 1 << 3,
            crcs,
            data: Bytes::from(data),
        }
    }

    #[test]
    fn an_image_arrives_as_it_left() {
        let wire = image_to_wire(image());
        assert_eq!(wire.crcs.len(), 2);
        assert_eq!(image_from_wire(wire).unwrap(), image());
    }

    #[test]
    fn an_image_that_contradicts_itself_is_refused() {
        let broken = |change: fn(&mut v1::ChunkImage)| {
            let mut wire = image_to_wire(image());
            change(&mut wire);
            image_from_wire(wire).unwrap_err()
        };
        assert_eq!(broken(|wire| wire.crcs[1] ^= 1), Refusal::Content("a chunk"));
        assert_eq!(broken(|wire| wire.data = wire.data.slice(1..)), Refusal::Content("a chunk"));
        assert_eq!(broken(|wire| wire.zero |= 2), Refusal::Content("a chunk"));
        assert!(matches!(broken(|wire| wire.present |= 4), Refusal::Malformed(_)));
        assert!(matches!(broken(|wire| wire.zero = 1 << 16), Refusal::Malformed(_)));
    }
}
