//! Bringing what changed home, so that the log can be freed.
//!
//! ```text
//!   1 freeze     active overlay becomes frozen; sessions, volumes, applied index A with it
//!   2 wait       for read plans from before: they may read slots that 4 overwrites
//!   3 intent     one transaction: "everything up to A is committed"
//!   4 write      blocks home: in place, or to fresh slots; then sync the data file
//!   5 commit     one transaction: homes, slots, volumes, sessions, A
//!   6 publish    the caches forget the old homes, the frozen overlay goes
//!   7 wait       for read plans from before; then free what only they could still reach:
//!                slots that were left, log segments up to A
//! ```
//!
//! A block goes home in place only if all of it lies in the log: should the machine stop in the
//! middle, recovery finds it there. A chunk with a partly overwritten block goes to a fresh slot,
//! its other blocks copied. Step 3 is what makes recovery replay at least up to A: otherwise it
//! might stop short of an entry whose block was overwritten already.
//!
//! A volume that was deleted is a run of holes like any other, as long as a volume can be: what it
//! held is given back here, however much that is, in transactions of a bounded size.
//!
//! When slots run out, or one transaction has changed enough, 4 to 7 are done for what has been
//! placed, with the old applied index, which makes the slots left so far free, and then go on with
//! the rest. Replaying the log over such a half-way state gives the same result as over the old
//! one: it rewrites every block that changed.
//!
//! **Rules.** What the last durable transaction refers to is overwritten only by a block whose
//!  whole
//! new content is in the log behind that transaction's applied index. A slot that a transaction
//! leaves is not taken before that transaction is durable and read plans from before are gone. Log
//! segments are freed behind a durable transaction only. A failed sync or transaction is final.

mod batch;
mod place;
mod receive;
mod work;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use nbd_log::io::Disk;
use nbd_log::log::{HardState, HardStates, LogReadError, LogReader, SegmentPool};
use nbd_topology::{LogIndex, ShardId};
use redb::WriteTransaction;

use self::batch::Batch;
use self::place::Placing;
use self::receive::Receiving;
use self::work::{Work, WorkList};
use crate::chunk::Base;
use crate::chunk::database::{self, ChunkTable, CountChanges, MetadataError};
use crate::chunk::meta::{ChunkKey, ChunkMeta, Slot};
use crate::chunk::record::ShardRecord;
use crate::chunk::slots::SlotMap;
use crate::dirty::DirtyLog;
use crate::fault::Faults;
use crate::ids::ChunkIndex;
use crate::limits::{
    BLOCK_BYTES, CHANGES_PER_TRANSACTION_MAX, META_BYTES_PER_CHANGE, META_HEADROOM_LEAST_BYTES,
};
use crate::members::Members;
use crate::shard::Shard;
use crate::shard::pins::{Pin, PinGate, RetiredPin};
use crate::shard::state::Frozen;
use crate::space::SpaceGauge;
use crate::transfer::DamagedChunk;

/// What a checkpoint did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckpointReport {
    /// For each shard the entry up to which everything is home now: the log before it may be
    /// compacted.
    pub applied: BTreeMap<ShardId, LogIndex>,
    /// Chunks whose home changed, removed ones included.
    pub chunks: u64,
    /// Blocks written.
    pub blocks: u64,
    /// The same in bytes.
    pub bytes: u64,
    /// Blocks whose only copy was found damaged. They stay so, and unreadable.
    pub corrupt_blocks: u64,
    /// The chunks of those blocks: [`Checkpointer::replace_chunk`] makes them good.
    pub damaged: Vec<DamagedChunk>,
    /// Log segments freed.
    pub segments_freed: usize,
}

/// Why a checkpoint did not come about.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// No room for a new slot. Nothing is lost, everything stays readable, and the next run starts
    /// over, including what changed until then.
    #[error("the disk has no room for a checkpoint")]
    NoSpace,
    /// The data file could not be read, written or synced. The node must stop.
    #[error("the data file failed")]
    Data {
        /// What the disk said.
        source: io::Error,
    },
    /// The log could not be read. The node must stop.
    #[error(transparent)]
    Log(#[from] LogReadError),
    /// The metadata database failed or is damaged. The node must stop.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// An earlier run ended in an error after which nothing is certain.
    #[error("the checkpointer has failed before")]
    Failed,
}

impl CheckpointError {
    /// Whether the node must stop: a disk that failed once is not trusted again.
    #[must_use]
    pub const fn is_fatal(&self) -> bool {
        !matches!(self, Self::NoSpace)
    }
}

/// How much a checkpoint would have to do. Cheap to clone; for threads that decide when to run one.
#[derive(Debug, Clone)]
pub struct CheckpointGauge {
    dirty: Arc<DirtyLog>,
    space: Arc<SpaceGauge>,
    log_bytes: u64,
}

impl CheckpointGauge {
    /// Bytes of log that the next checkpoint would cover.
    #[must_use]
    pub fn dirty_log_bytes(&self) -> u64 {
        self.dirty.bytes()
    }

    /// Whether it is time: enough log to cover, or so many changed chunks that their descriptions
    /// weigh (a few hundred bytes each, in memory).
    #[must_use]
    pub fn should_run(&self) -> bool {
        self.dirty_log_bytes() >= self.log_bytes || self.space.pending() >= self.log_bytes / 512
    }
}

/// Takes a node's checkpoints, for all its shards at once. Owned by a thread of its own.
#[derive(Debug)]
pub struct Checkpointer {
    disk: Arc<dyn Disk>,
    base: Arc<Base>,
    shards: Vec<Arc<Shard>>,
    /// Each shard's record as of the last durable transaction.
    records: BTreeMap<ShardId, ShardRecord>,
    /// Each shard's replicas, as of the same.
    members: BTreeMap<ShardId, Arc<Members>>,
    slots: SlotMap,
    log: LogReader,
    segments: Arc<SegmentPool>,
    gate: Arc<PinGate>,
    gauge: CheckpointGauge,
    batch: Batch,
    /// What the transaction being built changes in the numbers of chunks.
    counts: CountChanges,
    /// Shards that take over chunks of other replicas.
    receiving: BTreeMap<ShardId, Receiving>,
    faults: Faults,
    failed: bool,
}

/// What [`Checkpointer`] is made from.
pub(crate) struct CheckpointerParts {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) base: Arc<Base>,
    pub(crate) shards: Vec<Arc<Shard>>,
    pub(crate) records: BTreeMap<ShardId, ShardRecord>,
    pub(crate) members: BTreeMap<ShardId, Arc<Members>>,
    pub(crate) slots: SlotMap,
    pub(crate) log: LogReader,
    pub(crate) segments: Arc<SegmentPool>,
    pub(crate) gate: Arc<PinGate>,
    pub(crate) dirty: Arc<DirtyLog>,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) log_bytes: u64,
    pub(crate) faults: Faults,
}

/// Everything frozen for one run.
struct Freeze {
    shards: Vec<(Arc<Shard>, Arc<Frozen>)>,
}

/// One transaction.
#[derive(Default)]
struct Round {
    /// What it changes, for the caches.
    changed: Vec<(ChunkKey, Option<ChunkMeta>)>,
    /// Pieces of work taken up and chunks removed, and how many may be.
    changes: usize,
    changes_max: usize,
    /// The data file cannot grow any further.
    is_full: bool,
}

impl Round {
    const fn has_room(&self) -> bool {
        self.changes < self.changes_max
    }
}

impl Checkpointer {
    pub(crate) fn new(parts: CheckpointerParts) -> Self {
        let CheckpointerParts {
            disk,
            base,
            shards,
            records,
            members,
            mut slots,
            log,
            segments,
            gate,
            ..
        } = parts;
        let (dirty, space, log_bytes) = (parts.dirty, parts.space, parts.log_bytes);
        space.set_free_slots(slots.free());
        let gauge = CheckpointGauge { dirty, space, log_bytes };
        let (batch, counts) = (Batch::default(), CountChanges::new());
        let (receiving, failed) = (BTreeMap::new(), false);
        let faults = parts.faults;
        slots.reuse_early(faults.reuses_slots_early());
        Self {
            disk,
            base,
            shards,
            records,
            members,
            slots,
            log,
            segments,
            gate,
            gauge,
            batch,
            counts,
            receiving,
            faults,
            failed,
        }
    }

    /// Tells other threads how much there is to do.
    #[must_use]
    pub fn gauge(&self) -> CheckpointGauge {
        self.gauge.clone()
    }

    /// Bytes of log that the next run would cover.
    #[must_use]
    pub fn dirty_log_bytes(&self) -> u64 {
        self.gauge.dirty_log_bytes()
    }

    /// Whether it is time for a run; see [`CheckpointGauge::should_run`].
    #[must_use]
    pub fn should_run(&self) -> bool {
        self.gauge.should_run()
    }

    /// Brings home everything applied so far. Blocks for as long as that takes, and while a read
    /// plan from before is held; applying and reading go on meanwhile.
    ///
    /// # Errors
    /// [`CheckpointError::NoSpace`], after which everything goes on as before, or a fatal one.
    pub fn run(&mut self) -> Result<CheckpointReport, CheckpointError> {
        self.run_paced(&mut |_| ())
    }

    /// As [`Checkpointer::run`]; `pace` is called between batches with the bytes just written, and
    /// may sleep.
    ///
    /// # Errors
    /// As [`Checkpointer::run`].
    pub fn run_paced(
        &mut self,
        pace: &mut dyn FnMut(u64),
    ) -> Result<CheckpointReport, CheckpointError> {
        let covered = self.gauge.dirty.covered();
        let result = self.attempt(|this| this.try_run(pace));
        self.gauge.space.set_starved(matches!(result, Err(CheckpointError::NoSpace)));
        if result.is_err() {
            // Still to be covered.
            self.gauge.dirty.start(covered);
        }
        result
    }

    /// Does something that may fail half-way, after which nothing else is done if that was fatal.
    fn attempt<T, E>(
        &mut self,
        action: impl FnOnce(&mut Self) -> Result<T, E>,
    ) -> Result<T, CheckpointError>
    where
        CheckpointError: From<E>,
    {
        if self.failed {
            return Err(CheckpointError::Failed);
        }
        let result = action(self).map_err(CheckpointError::from);
        if let Err(error) = &result {
            self.failed = error.is_fatal();
            self.slots.aborted();
            self.counts.clear();
            // The file may have grown. The disk's answer is of no interest on this way out.
            _ = self.gauge.space.measure(self.slots.free());
        }
        result
    }

    fn try_run(&mut self, pace: &mut dyn FnMut(u64)) -> Result<CheckpointReport, CheckpointError> {
        let (freeze, retired) = self.freeze();
        let mut report = CheckpointReport::default();
        // Without changes there may still be hard states that keep log from being freed, or entries
        // that are not retained any longer.
        if !freeze.shards.is_empty() || self.segments.could_free(&self.covered()) {
            self.gate.wait(retired);
            self.changes_max()?;
            self.declare_committed(&freeze)?;
            let stored = self.write_home(&freeze, pace, &mut report)?;
            report.segments_freed = self.segments.free_through(&self.covered(), &stored);
        }
        report.applied = self.covered();
        Ok(report)
    }

    /// For each shard the entry up to which everything is home.
    fn covered(&self) -> BTreeMap<ShardId, LogIndex> {
        self.records.iter().map(|(id, record)| (*id, record.applied)).collect()
    }

    /// Step 1. What an earlier run could not write home is joined with what came after it.
    fn freeze(&self) -> (Freeze, Vec<RetiredPin>) {
        let space = &self.gauge.space;
        let mut shards = Vec::new();
        self.gauge.dirty.start(self.gauge.dirty.newest());
        space.set_cleared(false);
        for shard in &self.shards {
            let mut state = shard.state.write();
            let is_new = state.metadata.applied != self.records[&shard.id].applied;
            if state.frozen.is_none() && !is_new {
                continue;
            }
            let active = std::mem::take(&mut state.active);
            let mut metadata = state.metadata.freeze();
            let overlay = match state.frozen.take() {
                None => active,
                Some(left_over) => {
                    let left_over = Arc::into_inner(left_over).expect("only a run holds it");
                    metadata.follow(left_over.metadata);
                    let mut overlay = left_over.overlay;
                    let before = overlay.pending_chunks() + active.pending_chunks();
                    overlay.absorb(&active);
                    space.pending_changed(before, overlay.pending_chunks());
                    overlay
                }
            };
            let frozen = Arc::new(Frozen { overlay, metadata });
            state.frozen = Some(Arc::clone(&frozen));
            shards.push((Arc::clone(shard), frozen));
        }
        (Freeze { shards }, self.replace_pins())
    }

    fn replace_pins(&self) -> Vec<RetiredPin> {
        self.shards.iter().map(|shard| Pin::replace(&mut shard.state.write().pin)).collect()
    }

    /// Chunks that the next transaction may change without danger of meeting a full disk.
    fn changes_max(&self) -> Result<usize, CheckpointError> {
        let available = self.disk.space_available().map_err(data_error)?;
        if available < META_HEADROOM_LEAST_BYTES {
            return Err(CheckpointError::NoSpace);
        }
        let max = usize::try_from(available / META_BYTES_PER_CHANGE).unwrap_or(usize::MAX);
        Ok(max.min(CHANGES_PER_TRANSACTION_MAX))
    }

    /// Step 3.
    fn declare_committed(&mut self, freeze: &Freeze) -> Result<(), CheckpointError> {
        let txn = self.base.database().write()?;
        for (shard, frozen) in &freeze.shards {
            let record = self.record_mut(shard.id);
            record.hard_state.commit = record.hard_state.commit.max(frozen.metadata.applied);
            database::put_shard(&txn, shard.id, record)?;
        }
        txn.commit().map_err(MetadataError::from)?;
        Ok(())
    }

    fn record_mut(&mut self, shard: ShardId) -> &mut ShardRecord {
        self.records.get_mut(&shard).expect("every shard has a record")
    }

    /// Steps 4 to 7, in as many transactions as the slots make necessary. Returns the hard states
    /// that are stored.
    fn write_home(
        &mut self,
        freeze: &Freeze,
        pace: &mut dyn FnMut(u64),
        report: &mut CheckpointReport,
    ) -> Result<HardStates, CheckpointError> {
        let frozen: Vec<&Frozen> = freeze.shards.iter().map(|(_, frozen)| &**frozen).collect();
        let mut work = WorkList::new(work::all(&frozen));
        // What found no slot, and whether any was left since the list was begun.
        let (mut deferred, mut any_left) = (Vec::new(), false);
        loop {
            let txn = self.base.database().write()?;
            let mut round = Round { changes_max: self.changes_max()?, ..Round::default() };
            self.place_all(&txn, &mut work, &mut deferred, &mut round, pace, report)?;
            any_left |= self.slots.leaves_any();
            let list_ends = work.is_empty();
            let is_last = list_ends && deferred.is_empty();
            if list_ends && !is_last && !any_left {
                return Err(CheckpointError::NoSpace);
            }
            if self.faults.frees_log_early() {
                let applied = freeze.shards.iter().map(|(s, f)| (s.id, f.metadata.applied));
                self.segments.free_through(&applied.collect(), &self.segments.hard_states());
            }
            self.base.data().sync().map_err(data_error)?;
            self.put_books(&txn)?;
            let metadata = if is_last { Some(self.put_metadata(&txn, freeze)?) } else { None };
            txn.commit().map_err(MetadataError::from)?;
            if let Some((records, stored)) = metadata {
                self.records = records;
                let members = freeze.shards.iter().map(|(s, f)| (s.id, &f.metadata.members));
                self.members.extend(members.map(|(id, members)| (id, Arc::clone(members))));
                self.publish(freeze, round, true)?;
                return Ok(stored);
            }
            self.publish(freeze, round, false)?;
            if list_ends {
                work = WorkList::new(std::mem::take(&mut deferred).into_iter());
                any_left = false;
            }
        }
    }

    /// Step 4 for one transaction.
    fn place_all<'a>(
        &mut self,
        txn: &WriteTransaction,
        work: &mut WorkList<'a>,
        deferred: &mut Vec<Work<'a>>,
        round: &mut Round,
        pace: &mut dyn FnMut(u64),
        report: &mut CheckpointReport,
    ) -> Result<(), CheckpointError> {
        while !work.is_empty() && round.has_room() {
            let mut table = database::chunk_table(txn)?;
            while self.batch.has_room()
                && round.has_room()
                && let Some(item) = work.next()
            {
                round.changes += 1;
                match self.place(&mut table, &item, round, report)? {
                    Placing::Placed => {}
                    Placing::Partly(rest) => work.put_back(rest),
                    Placing::OutOfSlots => deferred.push(item),
                }
            }
            let written = self.batch.write(&self.base, &self.log)?;
            for (key, meta) in written.chunks {
                database::put_chunk(&mut table, key, Some(&meta))?;
                round.changed.push((key, Some(meta)));
                report.chunks += 1;
            }
            let bytes = written.blocks * BLOCK_BYTES;
            report.blocks += written.blocks;
            report.bytes += bytes;
            report.corrupt_blocks += written.corrupt_blocks;
            report.damaged.extend(written.damaged);
            self.close(table);
            pace(bytes);
        }
        Ok(())
    }

    /// Closes the table of chunks, and takes over what it counted.
    fn close(&mut self, table: ChunkTable<'_>) {
        for (volume, change) in table.close() {
            *self.counts.entry(volume).or_default() += change;
        }
    }

    /// Stores which slots are in use, and how many chunks volumes have.
    fn put_books(&self, txn: &WriteTransaction) -> Result<(), MetadataError> {
        database::put_regions(txn, self.slots.dirty_regions())?;
        database::put_counts(txn, self.base.counts_after(&self.counts))
    }

    /// The books are durable. Returns the slots that were left.
    fn books_are_durable(&mut self) -> Vec<Slot> {
        self.base.count(&std::mem::take(&mut self.counts));
        self.slots.committed()
    }

    /// Step 5, what is not chunks: for every shard, since a segment to be freed may hold hard
    /// states of shards that applied nothing. Returns the shards' records to be, and the hard
    /// states in them.
    fn put_metadata(
        &self,
        txn: &WriteTransaction,
        freeze: &Freeze,
    ) -> Result<(BTreeMap<ShardId, ShardRecord>, HardStates), CheckpointError> {
        let written = self.segments.hard_states();
        let mut records = BTreeMap::new();
        for (&id, old) in &self.records {
            let newest = written.states.get(&id).copied().unwrap_or(old.hard_state);
            let mut record = *old;
            record.hard_state = newer_vote(old.hard_state, newest);
            record.hard_state.commit = old.hard_state.commit;
            if let Some((_, frozen)) = freeze.shards.iter().find(|(shard, _)| shard.id == id) {
                let metadata = &frozen.metadata;
                record.hard_state.commit = old.hard_state.commit.max(metadata.applied);
                record.applied = metadata.applied;
                record.applied_term = metadata.applied_term;
                record.counter = metadata.counter;
                record.volumes_created = metadata.volumes_created;
                database::put_volumes(txn, &metadata.volumes)?;
                database::put_sessions(txn, id, &metadata.sessions)?;
                if metadata.members != self.members[&id] {
                    database::put_members(txn, id, &metadata.members)?;
                }
            }
            database::put_shard(txn, id, &record)?;
            records.insert(id, record);
        }
        Ok((records, written))
    }

    /// Steps 6 and 7 for a durable transaction.
    fn publish(
        &mut self,
        freeze: &Freeze,
        round: Round,
        is_last: bool,
    ) -> Result<(), CheckpointError> {
        let left = self.books_are_durable();
        let cleared = |key: &ChunkKey| is_cleared(freeze, key);
        let any_cleared = freeze.shards.iter().any(|(_, frozen)| frozen.overlay.has_ranges());
        let dropped: Option<&dyn Fn(&ChunkKey) -> bool> =
            if any_cleared { Some(&cleared) } else { None };
        self.base.forget(round.changed, dropped);
        // Before the frozen chunks stop counting as pending: what they took must be gone by then.
        self.gauge.space.measure(self.slots.free()).map_err(data_error)?;
        if is_last {
            for (shard, frozen) in &freeze.shards {
                let done = shard.state.write().frozen.take();
                self.gauge.space.pending_changed(frozen.overlay.pending_chunks(), 0);
                drop(done);
            }
        }
        self.free_slots(left);
        Ok(())
    }

    /// Step 7, as far as it is about slots: those that a durable transaction left.
    fn free_slots(&mut self, left: Vec<Slot>) {
        self.gate.wait(self.replace_pins());
        self.slots.release(left);
        self.gauge.space.set_free_slots(self.slots.free());
    }
}

/// Of two hard states the one whose vote counts, `newest` having been written later.
pub(crate) const fn newer_vote(older: HardState, newest: HardState) -> HardState {
    let same_term = older.term.0 == newest.term.0;
    if older.term.0 > newest.term.0 || (same_term && newest.vote == 0) { older } else { newest }
}

fn is_cleared(freeze: &Freeze, (volume, chunk): &(crate::VolumeId, ChunkIndex)) -> bool {
    let mut overlays = freeze.shards.iter().filter_map(|(_, f)| f.overlay.volume(*volume));
    overlays.any(|changes| changes.cleared_at(*chunk).is_some())
}

const fn data_error(source: io::Error) -> CheckpointError {
    CheckpointError::Data { source }
}
