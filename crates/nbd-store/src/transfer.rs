//! What replicas of a shard tell each other about their state: snapshots, chunks, digests.
//!
//! A replica that the log no longer reaches is brought up to date in three steps:
//!
//! ```text
//!   source                                           receiver
//!   ShardReader::snapshot   ── at index A ─────────▶ kept until the end
//!   ShardReader::manifest   ── what changed ───────▶ fetches, remove_absent
//!   ShardReader::read_chunk ── as it is by now ────▶ Checkpointer::write_chunks
//!                                                    Checkpointer::install(snapshot)
//!   the log behind A        ───────────────────────▶ ShardWriter::apply
//! ```
//!
//! Chunks may be *newer* than A, and than each other. That is made good by the log behind A, which
//! the receiver applies over them: each entry sets whole pieces of a chunk regardless of what was
//! there, so that after the newest entry that any fetched chunk holds, all is as at the source.
//! Until then nobody is shown the receiver's volumes: a leader serves reads only once it has
//! applied everything committed.

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_topology::{LogIndex, Membership, Term};

use crate::checkpoint::CheckpointError;
use crate::chunk::meta::ChunkKey;
use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNKS_PER_VOLUME_MAX, to_usize};

/// A shard's state at one index, its chunks left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSnapshot {
    /// Last entry that it covers.
    pub applied: LogIndex,
    /// The term of that entry.
    pub applied_term: Term,
    /// The group's members as of that entry.
    pub membership: Membership,
    /// Everything, the above included, in the form that [`crate::Checkpointer::install`] takes and
    /// checks.
    pub body: Bytes,
}

/// Which version of a chunk there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkStamp {
    /// The volume.
    pub volume: VolumeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Newest entry that changed it.
    pub last_index: LogIndex,
    /// Bytes that fetching it takes, its description left out.
    pub bytes: u64,
}

/// Chunks in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRun {
    /// The volume.
    pub volume: VolumeId,
    /// The first chunk.
    pub start: ChunkIndex,
    /// End of the run, exclusive.
    pub end: ChunkIndex,
}

/// A part of a shard's list of chunks: those behind the key asked for, up to `next`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestPage {
    /// Last entry that the list covers.
    pub applied: LogIndex,
    /// The chunks that changed since the index asked for.
    pub chunks: Vec<ChunkStamp>,
    /// All chunks that there are.
    pub present: Vec<ChunkRun>,
    /// Last key covered, from where to go on; `None`: all keys are covered.
    pub next: Option<ChunkKey>,
}

/// A chunk to be sent to another replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkImage {
    /// The volume.
    pub volume: VolumeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Newest entry that changed it.
    pub last_index: LogIndex,
    /// Blocks that have bytes, one bit each.
    pub present: u16,
    /// Blocks that are allocated zeroes. The others are holes.
    pub zero: u16,
    /// CRC32C of the present blocks; 0 for others.
    pub crcs: [u32; BLOCKS_PER_CHUNK],
    /// The present blocks' bytes, back to back.
    pub data: Bytes,
}

/// What a range of [`crate::limits::DIGEST_CHUNKS`] chunks holds, in one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeDigest {
    /// The volume.
    pub volume: VolumeId,
    /// The range's first chunk.
    pub first: ChunkIndex,
    /// Of which chunks there are, their versions, and what they hold.
    pub digest: u64,
    /// Newest entry that changed any of them.
    pub newest: LogIndex,
}

/// What a chunk holds, in one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkDigest {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Newest entry that changed it: replicas with the same one have the same digest.
    pub last_index: LogIndex,
    /// Of what each block is and its checksum.
    pub digest: u64,
}

/// A chunk with a block that does not have its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DamagedChunk {
    /// The volume.
    pub volume: VolumeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Newest entry that changed it: a good copy of another replica has the same.
    pub last_index: LogIndex,
}

/// What a scrub has looked at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScrubPage {
    /// Last key looked at, from where to go on; `None`: this was the last.
    pub next: Option<ChunkKey>,
    /// Bytes read and verified.
    pub bytes: u64,
    /// What was found damaged.
    pub damaged: Vec<DamagedChunk>,
}

/// Why something of another replica was not taken over. Nothing of it was stored.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// No such shard on this node.
    #[error("this node has no such shard")]
    UnknownShard,
    /// The chunk contradicts itself, does not have its checksums, or is not of the shard.
    #[error("chunk {chunk} of volume {volume} is not as it should be")]
    BadChunk {
        /// The volume.
        volume: VolumeId,
        /// The chunk.
        chunk: ChunkIndex,
    },
    /// The snapshot is damaged, is another shard's, or is in another format.
    #[error("the snapshot is damaged or is not of this shard")]
    BadSnapshot,
    /// The snapshot, or the chunks that belong to it, are older than what is here.
    #[error("the snapshot covers entry {snapshot}, but entry {applied} was applied already")]
    Stale {
        /// What the snapshot covers.
        snapshot: LogIndex,
        /// What was applied here.
        applied: LogIndex,
    },
    /// Many chunks came home here while they were being transferred. The manifest has to be walked
    /// once more; what is here already need not be fetched again.
    #[error("chunks changed here since the source was asked for them")]
    Overtaken,
    /// The store has no room, or failed.
    #[error(transparent)]
    Store(#[from] CheckpointError),
}

/// Why a shard was not formed.
#[derive(Debug, thiserror::Error)]
pub enum FormError {
    /// No such shard on this node.
    #[error("this node has no such shard")]
    UnknownShard,
    /// The formation contradicts itself or is too large.
    #[error("the formation contradicts itself or names too many replicas")]
    Invalid,
    /// The shard was formed differently before.
    #[error("the shard was formed before, and differently")]
    AlreadyFormed,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] CheckpointError),
}

impl ChunkImage {
    /// Whether the image is whole: its parts fit each other, and every block has its checksum.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let block = to_usize(BLOCK_BYTES);
        let is_present = |at: usize| self.present & (1 << at) != 0;
        let others_are_zero = (0..BLOCKS_PER_CHUNK).all(|at| is_present(at) || self.crcs[at] == 0);
        if self.present & self.zero != 0
            || self.present | self.zero == 0
            || self.chunk.0 >= CHUNKS_PER_VOLUME_MAX
            || self.data.len() != self.present.count_ones() as usize * block
            || !others_are_zero
        {
            return false;
        }
        let crcs = (0..BLOCKS_PER_CHUNK).filter(|&at| is_present(at)).map(|at| self.crcs[at]);
        self.data.chunks_exact(block).zip(crcs).all(|(bytes, crc)| crc32c(bytes) == crc)
    }
}
