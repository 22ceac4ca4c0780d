//! Taking over what other replicas have: whole transfers, and single chunks as repairs.
//!
//! While a transfer is under way the shard's old state stays in force: its metadata, its log, its
//! overlays. Chunks that were fetched are as new as the source's base or newer, and so hold all
//! that any entry of the old log did to them. Those entries may still be applied, now or again
//! after a crash, and checkpoints may run: `Checkpointer::place` leaves a home alone that is newer
//! than a change. Should the log go on after all, past what the source had when it was asked, then
//! nothing of the transfer is taken any more once a checkpoint has brought that home. What
//! `Checkpointer::place` must not leave is a chunk that the source does not have, and that an
//! entry of the old log brings back after it was removed: such chunks are noted, and go when the
//! snapshot is installed. After a crash nothing is noted, but then the manifest is walked again
//! from its start.

use std::collections::BTreeSet;
use std::sync::Arc;

use nbd_log::io::AlignedBuf;
use nbd_log::log::{HardState, LogPosition};
use nbd_topology::{LogIndex, ShardId};
use redb::WriteTransaction;

use super::{CheckpointError, Checkpointer, Round, data_error, newer_vote};
use crate::chunk::database::{self, ChunkTable, MetadataError};
use crate::chunk::meta::{ChunkKey, ChunkMeta};
use crate::chunk::record::ShardRecord;
use crate::limits::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, CHANGES_PER_TRANSACTION_MAX, CHECKPOINT_BATCH_BYTES,
    CHUNK_BYTES, to_usize,
};
use crate::members::{Formation, Members};
use crate::shard::Shard;
use crate::shard::state::Metadata;
use crate::snapshot;
use crate::transfer::{ChunkImage, ChunkRun, FormError, ReceiveError, ShardSnapshot};

const BLOCK: usize = to_usize(BLOCK_BYTES);

/// Chunks noted during one walk over a manifest, at most. What comes home here meanwhile comes from
/// the old log, of which 1 GiB holds half as many writes.
const CREATED_MAX: usize = 262_144;

/// A transfer under way, or one that was given up.
#[derive(Debug, Default)]
pub(super) struct Receiving {
    /// Chunks that checkpoints gave a home which had none, since the source was asked for them.
    created: BTreeSet<ChunkKey>,
    /// There were too many of those to note them all.
    overtaken: bool,
}

impl Receiving {
    fn note(&mut self, key: ChunkKey) {
        if self.created.len() < CREATED_MAX {
            self.created.insert(key);
        } else {
            self.overtaken = true;
        }
    }

    /// The source was asked for the chunks with keys in `(after, next]`, and those that it has not
    /// are gone.
    fn checked(&mut self, after: Option<ChunkKey>, next: Option<ChunkKey>) {
        if after.is_none() {
            // A walk begins: whatever is here by now, its pages will tell.
            *self = Self::default();
            return;
        }
        self.created.retain(|key| {
            after.is_some_and(|after| *key <= after) || next.is_some_and(|next| *key > next)
        });
    }
}

/// Chunks on their way to fresh slots.
#[derive(Default)]
struct Images {
    buffer: AlignedBuf,
    /// Where each block of the buffer goes.
    targets: Vec<u64>,
}

impl Images {
    fn add(&mut self, image: &ChunkImage, meta: &ChunkMeta) {
        self.buffer.extend_from_slice(&image.data);
        let present = (0..BLOCKS_PER_CHUNK).filter(|&at| meta.present & (1 << at) != 0);
        self.targets.extend(present.map(|at| meta.slot.place(at)));
    }

    const fn is_full(&self) -> bool {
        self.targets.len() as u64 * BLOCK_BYTES + CHUNK_BYTES > CHECKPOINT_BATCH_BYTES
    }

    /// Writes all, not durably yet.
    fn write(&mut self, to: &Checkpointer) -> Result<(), CheckpointError> {
        let (mut writes, mut first) = (Vec::new(), 0);
        for run in self.targets.chunk_by(|a, b| a + BLOCK_BYTES == *b) {
            writes.push((run[0], &self.buffer[first * BLOCK..(first + run.len()) * BLOCK]));
            first += run.len();
        }
        to.base.data().write_many_at(&writes).map_err(data_error)?;
        self.buffer.clear();
        self.targets.clear();
        Ok(())
    }
}

impl Checkpointer {
    /// Makes a shard that was never formed here one of a group. Durable on return. Doing the same
    /// again does nothing.
    ///
    /// # Errors
    /// [`FormError::AlreadyFormed`] if the shard was formed differently, or anything was applied.
    pub fn form(&mut self, shard: ShardId, formation: &Formation) -> Result<(), FormError> {
        let target = self.find(shard).ok_or(FormError::UnknownShard)?;
        let members = Arc::new(Members::of_formation(formation).ok_or(FormError::Invalid)?);
        {
            let state = target.state.read();
            if state.replica == Some(formation.replica) && state.metadata.members == members {
                return Ok(());
            }
            if state.replica.is_some() || state.metadata.applied != LogIndex::ZERO {
                return Err(FormError::AlreadyFormed);
            }
        }
        let record = ShardRecord { replica: Some(formation.replica), ..self.records[&shard] };
        self.attempt(|this| {
            let txn = this.base.database().write()?;
            database::put_shard(&txn, shard, &record)?;
            database::put_members(&txn, shard, &members)?;
            txn.commit().map_err(MetadataError::from)
        })?;
        self.records.insert(shard, record);
        self.members.insert(shard, Arc::clone(&members));
        let mut state = target.state.write();
        state.replica = record.replica;
        state.metadata.members = members;
        Ok(())
    }

    /// Takes over chunks of another replica, of volumes known here or not. Durable on return, all
    /// or none; those of which a newer version is at home are left out.
    ///
    /// `upto` is an entry that the source's own checkpoint covered when it was asked for them: the
    /// index of its snapshot. What the log has brought home here by then is in the images too; see
    /// [`crate::transfer`].
    ///
    /// # Errors
    /// [`ReceiveError::BadChunk`]; [`ReceiveError::Stale`] if the checkpoint here is beyond `upto`;
    /// or the store has no room or failed.
    pub fn write_chunks(
        &mut self,
        shard: ShardId,
        upto: LogIndex,
        images: Vec<ChunkImage>,
    ) -> Result<(), ReceiveError> {
        self.refuse_overtaken(shard, upto)?;
        images.iter().try_for_each(|image| check_image(shard, image))?;
        self.receiving.entry(shard).or_default();
        self.attempt(|this| {
            this.put_images(&images, |home, image| {
                let is_newer = home.is_some_and(|home| home.last_index > image.last_index);
                (!is_newer).then_some(image.last_index)
            })
        })?;
        if let Some(receiving) = self.receiving.get_mut(&shard) {
            images
                .iter()
                .for_each(|image| _ = receiving.created.remove(&(image.volume, image.chunk)));
        }
        Ok(())
    }

    /// Removes the chunks of the shard with keys in `(after, next]` (`None`: from the first, to the
    /// last) that are not among `present`, as in a [`crate::ManifestPage`]. Returns their number.
    /// `upto` is an entry that the page covers, as for [`Self::write_chunks`].
    ///
    /// # Errors
    /// [`ReceiveError::Stale`] if the checkpoint here is beyond `upto`, or the store has no room or
    /// failed.
    pub fn remove_absent(
        &mut self,
        shard: ShardId,
        upto: LogIndex,
        after: Option<ChunkKey>,
        next: Option<ChunkKey>,
        present: &[ChunkRun],
    ) -> Result<u64, ReceiveError> {
        self.refuse_overtaken(shard, upto)?;
        self.receiving.entry(shard).or_default();
        let mut present = present.to_vec();
        present.sort_unstable_by_key(|run| (run.volume, run.start));
        let is_absent = |(volume, chunk): ChunkKey| {
            let at = present.partition_point(|run| (run.volume, run.start) <= (volume, chunk));
            let run = at.checked_sub(1).map(|at| present[at]);
            run.is_none_or(|run| run.volume != volume || run.end <= chunk)
        };
        let mut all_removed = 0;
        loop {
            let (removed, more) =
                self.attempt(|this| this.remove_some(shard, (after, next), is_absent))?;
            all_removed += removed;
            if !more {
                break;
            }
        }
        if let Some(receiving) = self.receiving.get_mut(&shard) {
            receiving.checked(after, next);
        }
        Ok(all_removed)
    }

    /// Removes as many chunks as one transaction may. Returns their number, and whether that was
    /// the bound.
    fn remove_some(
        &mut self,
        shard: ShardId,
        keys: (Option<ChunkKey>, Option<ChunkKey>),
        is_absent: impl Fn(ChunkKey) -> bool,
    ) -> Result<(u64, bool), CheckpointError> {
        let (max, mut found) = (self.changes_max()?, 0);
        let is_next = |key| {
            let removes = found < max && is_absent(key);
            found += usize::from(removes);
            removes
        };
        let txn = self.base.database().write()?;
        let mut changed = Vec::new();
        let mut table = database::chunk_table(&txn)?;
        database::remove_absent(&mut table, shard, keys, is_next, |key, home| {
            self.slots.leave(home.slot);
            changed.push((key, None));
        })?;
        self.close(table);
        let removed = changed.len();
        self.commit_chunks(txn, changed)?;
        Ok((removed as u64, removed == max))
    }

    /// Puts a snapshot in the place of the shard's state, once all chunks that its source had, and
    /// none that it had not, are here. Atomic, durable on return; readers see the new state at
    /// once.
    ///
    /// `hard_state` is Raft's own, of which term and vote count. All entries of the shard that are
    /// in the log are void from then on; none may be on its way there.
    ///
    /// # Errors
    /// [`ReceiveError::BadSnapshot`], [`ReceiveError::Stale`] or [`ReceiveError::Overtaken`], or
    /// the store has no room or failed.
    pub fn install(
        &mut self,
        shard: ShardId,
        snapshot: &ShardSnapshot,
        hard_state: HardState,
    ) -> Result<(), ReceiveError> {
        let target = self.find(shard).ok_or(ReceiveError::UnknownShard)?;
        let metadata = snapshot::decode(shard, snapshot).ok_or(ReceiveError::BadSnapshot)?;
        let applied = target.state.read().metadata.applied;
        if metadata.applied < applied {
            return Err(ReceiveError::Stale { snapshot: metadata.applied, applied });
        }
        let stray = self.receiving.get(&shard).map(|receiving| receiving.created.clone());
        if self.receiving.get(&shard).is_some_and(|receiving| receiving.overtaken) {
            self.receiving.insert(shard, Receiving::default());
            return Err(ReceiveError::Overtaken);
        }
        let log_floor = self.segments.next_position();
        // As many as one transaction may take are left for the last step.
        let mut stray: Vec<ChunkKey> = stray.unwrap_or_default().into_iter().collect();
        while stray.len() > CHANGES_PER_TRANSACTION_MAX {
            let some = stray.split_off(stray.len() - CHANGES_PER_TRANSACTION_MAX);
            self.attempt(|this| this.remove_chunks(&some))?;
        }
        self.attempt(|this| {
            let record = this.record_of(shard, &metadata, hard_state, log_floor);
            this.try_install(&target, record, metadata, &stray)
        })?;
        self.receiving.remove(&shard);
        self.segments.void(shard, log_floor, None);
        Ok(())
    }

    /// Puts a good copy in the place of a damaged one. `false`: the chunk has changed since, or is
    /// not of the version given.
    ///
    /// # Errors
    /// [`ReceiveError::BadChunk`], or the store has no room or failed.
    pub fn replace_chunk(
        &mut self,
        shard: ShardId,
        image: &ChunkImage,
    ) -> Result<bool, ReceiveError> {
        self.find(shard).ok_or(ReceiveError::UnknownShard)?;
        check_image(shard, image)?;
        let is_same = |home: &ChunkMeta, image: &ChunkImage| {
            let content = (home.present, home.zero, home.crcs);
            home.last_index == image.last_index
                || content == (image.present, image.zero, image.crcs)
        };
        let images = std::slice::from_ref(image);
        let replaced = self.attempt(|this| {
            // It stays the version that it was, whatever the copy says.
            this.put_images(images, |home, image| {
                home.filter(|home| is_same(home, image)).map(|home| home.last_index)
            })
        })?;
        Ok(replaced > 0)
    }

    /// Refuses what a source that covers entries up to `upto` says, if a checkpoint has brought
    /// later ones home here meanwhile. A chunk that they made would be removed, one that they
    /// removed would come back, and nothing would apply them once more.
    fn refuse_overtaken(&self, shard: ShardId, upto: LogIndex) -> Result<(), ReceiveError> {
        let applied = self.records.get(&shard).ok_or(ReceiveError::UnknownShard)?.applied;
        if applied > upto && !self.faults.takes_overtaken() {
            return Err(ReceiveError::Stale { snapshot: upto, applied });
        }
        Ok(())
    }

    fn find(&self, shard: ShardId) -> Option<Arc<Shard>> {
        self.shards.iter().find(|found| found.id == shard).map(Arc::clone)
    }

    /// Notes that a chunk got a home that had none.
    pub(super) fn note_created(&mut self, key: ChunkKey) {
        if let Some(receiving) = self.receiving.get_mut(&key.0.shard()) {
            receiving.note(key);
        }
    }

    /// Gives the images homes in fresh slots, of the version that `version` says or not at all, in
    /// one transaction. Returns how many got one.
    fn put_images(
        &mut self,
        images: &[ChunkImage],
        version: impl Fn(Option<&ChunkMeta>, &ChunkImage) -> Option<LogIndex>,
    ) -> Result<u64, CheckpointError> {
        if self.changes_max()? < images.len() {
            return Err(CheckpointError::NoSpace);
        }
        let txn = self.base.database().write()?;
        let mut table = database::chunk_table(&txn)?;
        let (mut round, mut pieces) = (Round::default(), Images::default());
        for image in images {
            let key = (image.volume, image.chunk);
            let old = database::get_chunk(&table, key)?;
            let Some(last_index) = version(old.as_ref(), image) else { continue };
            let slot = self.take_slot(&mut round)?.ok_or(CheckpointError::NoSpace)?;
            let ChunkImage { present, zero, crcs, .. } = *image;
            let meta = ChunkMeta { slot, last_index, present, zero, crcs };
            if let Some(old) = old {
                self.slots.leave(old.slot);
            }
            put_home(&mut table, key, meta, &mut round)?;
            pieces.add(image, &meta);
            if pieces.is_full() {
                pieces.write(self)?;
            }
        }
        self.close(table);
        pieces.write(self)?;
        self.base.data().sync().map_err(data_error)?;
        let put = round.changed.len() as u64;
        self.commit_chunks(txn, round.changed)?;
        Ok(put)
    }

    /// Makes homes that changed durable, and lets go of the slots that were left.
    fn commit_chunks(
        &mut self,
        txn: WriteTransaction,
        changed: Vec<(ChunkKey, Option<ChunkMeta>)>,
    ) -> Result<(), CheckpointError> {
        self.put_books(&txn)?;
        txn.commit().map_err(MetadataError::from)?;
        let left = self.books_are_durable();
        self.base.forget(changed, None);
        self.gauge.space.measure(self.slots.free()).map_err(data_error)?;
        self.free_slots(left);
        Ok(())
    }

    /// The record of a shard whose state becomes `metadata`.
    fn record_of(
        &self,
        shard: ShardId,
        metadata: &Metadata,
        hard_state: HardState,
        log_floor: LogPosition,
    ) -> ShardRecord {
        let old = self.records[&shard];
        let written = self.segments.hard_states().states.get(&shard).copied();
        let known = newer_vote(old.hard_state, written.unwrap_or(old.hard_state));
        ShardRecord {
            applied: metadata.applied,
            applied_term: metadata.applied_term,
            hard_state: HardState { commit: metadata.applied, ..newer_vote(known, hard_state) },
            counter: metadata.counter,
            volumes_created: metadata.volumes_created,
            replica: old.replica,
            log_floor: log_floor.max(old.log_floor),
        }
    }

    /// Removes chunks, durably.
    fn remove_chunks(&mut self, keys: &[ChunkKey]) -> Result<(), CheckpointError> {
        let txn = self.base.database().write()?;
        let changed = self.remove_homes(&txn, keys)?;
        self.commit_chunks(txn, changed)
    }

    /// Removes the homes that these chunks have. Returns what that changed.
    fn remove_homes(
        &mut self,
        txn: &WriteTransaction,
        keys: &[ChunkKey],
    ) -> Result<Vec<(ChunkKey, Option<ChunkMeta>)>, MetadataError> {
        let mut changed = Vec::new();
        let mut table = database::chunk_table(txn)?;
        for &key in keys {
            if let Some(home) = database::get_chunk(&table, key)? {
                self.slots.leave(home.slot);
                database::put_chunk(&mut table, key, None)?;
                changed.push((key, None));
            }
        }
        self.close(table);
        Ok(changed)
    }

    fn try_install(
        &mut self,
        target: &Shard,
        record: ShardRecord,
        metadata: Metadata,
        stray: &[ChunkKey],
    ) -> Result<(), CheckpointError> {
        let shard = target.id;
        self.changes_max()?;
        let txn = self.base.database().write()?;
        let changed = self.remove_homes(&txn, stray)?;
        database::put_shard(&txn, shard, &record)?;
        database::put_members(&txn, shard, &metadata.members)?;
        database::replace_volumes(&txn, shard, &metadata.volumes)?;
        database::replace_sessions(&txn, shard, &metadata.sessions)?;
        self.put_books(&txn)?;
        txn.commit().map_err(MetadataError::from)?;
        let left = self.books_are_durable();
        self.records.insert(shard, record);
        self.members.insert(shard, Arc::clone(&metadata.members));
        let mut state = target.state.write();
        let frozen = state.frozen.take();
        let active = std::mem::take(&mut state.active);
        state.metadata = metadata;
        // Before the overlays go: under them the cache may have been behind.
        self.base.forget(changed, None);
        drop(state);
        let frozen = frozen.as_ref().map_or(0, |frozen| frozen.overlay.pending_chunks());
        self.gauge.space.pending_changed(active.pending_chunks() + frozen, 0);
        self.gauge.space.measure(self.slots.free()).map_err(data_error)?;
        self.free_slots(left);
        Ok(())
    }
}

fn put_home(
    table: &mut ChunkTable<'_>,
    key: ChunkKey,
    meta: ChunkMeta,
    round: &mut Round,
) -> Result<(), MetadataError> {
    database::put_chunk(table, key, Some(&meta))?;
    round.changed.push((key, Some(meta)));
    Ok(())
}

/// Refuses what is damaged or is not of the shard. Nothing a peer sends is trusted to be right.
fn check_image(shard: ShardId, image: &ChunkImage) -> Result<(), ReceiveError> {
    let ChunkImage { volume, chunk, .. } = *image;
    let is_ours = volume.shard() == shard && image.is_sound();
    is_ours.then_some(()).ok_or(ReceiveError::BadChunk { volume, chunk })
}
