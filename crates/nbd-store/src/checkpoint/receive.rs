//! Taking over what other replicas have.

use nbd_log::log::{HardState, LogPosition};
use nbd_topology::ShardId;

use super::{CheckpointError, Checkpointer};
use crate::chunk::meta::ChunkKey;
use crate::members::Formation;
use crate::transfer::{ChunkImage, ChunkRun, FormError, ReceiveError, ShardSnapshot};

impl Checkpointer {
    /// Makes a shard that was never formed here one of a group. Durable on return. Doing the same
    /// again does nothing.
    ///
    /// # Errors
    /// [`FormError::AlreadyFormed`] if the shard was formed, or has changed since.
    pub fn form(&mut self, shard: ShardId, formation: &Formation) -> Result<(), FormError> {
        _ = (shard, formation);
        Err(FormError::Store(CheckpointError::Failed))
    }

    /// Takes over chunks of another replica. Durable on return, all or none.
    ///
    /// # Errors
    /// [`ReceiveError::BadChunk`], or the store has no room or failed.
    pub fn write_chunks(
        &mut self,
        shard: ShardId,
        images: Vec<ChunkImage>,
    ) -> Result<(), ReceiveError> {
        _ = (shard, images);
        Err(ReceiveError::Store(CheckpointError::Failed))
    }

    /// Removes the chunks of the shard with keys in `(after, next]` (`None`: from the first, to the
    /// last) that are not among `present`, as in a [`crate::ManifestPage`]. Returns their number.
    ///
    /// # Errors
    /// The store has no room or failed.
    pub fn remove_absent(
        &mut self,
        shard: ShardId,
        after: Option<ChunkKey>,
        next: Option<ChunkKey>,
        present: &[ChunkRun],
    ) -> Result<u64, ReceiveError> {
        _ = (shard, after, next, present);
        Err(ReceiveError::Store(CheckpointError::Failed))
    }

    /// Puts a snapshot in the place of the shard's state. Atomic, durable on return.
    ///
    /// # Errors
    /// [`ReceiveError::BadSnapshot`] or [`ReceiveError::Stale`], or the store failed.
    pub fn install(
        &mut self,
        shard: ShardId,
        snapshot: &ShardSnapshot,
        hard_state: HardState,
        log_floor: LogPosition,
    ) -> Result<(), ReceiveError> {
        _ = (shard, snapshot, hard_state, log_floor);
        Err(ReceiveError::Store(CheckpointError::Failed))
    }

    /// Puts a good copy in the place of a damaged one. `false`: the chunk has changed, or is not of
    /// the version given.
    ///
    /// # Errors
    /// [`ReceiveError::BadChunk`], or the store has no room or failed.
    pub fn replace_chunk(
        &mut self,
        shard: ShardId,
        image: &ChunkImage,
    ) -> Result<bool, ReceiveError> {
        _ = (shard, image);
        Err(ReceiveError::Store(CheckpointError::Failed))
    }
}
