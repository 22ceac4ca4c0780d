//! What a replica wants written to the node's log, and in which order that is done where there is
//! hardly any room.
//!
//! Writes of one group stay in their order, whatever happens. Those of different groups need not: a
//! group that holds up the log ([`SegmentPool::is_held_up_by`]) goes first, into room that is left
//! for it, with all that it waits for.

use std::collections::BTreeSet;

use nbd_consensus::{Append, Entry, HardState, ReadyNumber};
use nbd_log::checksum::crc32c;
use nbd_log::log::{AppendError, EntryRecord, LogPosition, LogWriter, Record, SegmentPool};
use nbd_store::EntryPlace;
use nbd_topology::ShardId;

use crate::event::Persisted;
use crate::recovered::{log_hard_state, log_kind};

/// A write for the node's log. Those of one group are carried out in the order they came in;
/// several may be written in one go, also of several groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogWrite {
    /// The number of the append that it carries out; `None`: copies of entries that are in the log
    /// already, for the end of it.
    pub ready: Option<ReadyNumber>,
    /// Written before the entries, if it changed.
    pub hard_state: Option<HardState>,
    /// Entries without gaps.
    pub entries: Vec<Entry>,
}

impl LogWrite {
    /// What an append wants written.
    pub(crate) fn of_append(append: Append) -> Self {
        let Append { ready, entries, hard_state, .. } = append;
        Self { ready: Some(ready), hard_state, entries }
    }

    /// Copies of entries.
    pub(crate) const fn of_copies(entries: Vec<Entry>) -> Self {
        Self { ready: None, hard_state: None, entries }
    }

    /// Whether there is nothing to write: it only waits until its predecessors are durable.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.hard_state.is_none()
    }

    /// Bytes of its entries' data.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.entries.iter().map(|entry| entry.data.len()).sum()
    }

    /// The log's records of it, in order.
    pub fn records(&self, shard: ShardId) -> impl Iterator<Item = Record<'_>> {
        let state = self.hard_state.map(|state| Record::HardState(shard, log_hard_state(state)));
        let entries = self.entries.iter().map(move |entry| {
            let (index, term, kind) = (entry.index, entry.term, log_kind(entry.kind));
            Record::Entry(EntryRecord { shard, index, term, kind, data: &entry.data })
        });
        state.into_iter().chain(entries)
    }

    /// What to tell the replica once it is durable. Takes from `positions` those of
    /// [`Self::records`].
    ///
    /// # Panics
    /// If there are fewer positions than records.
    pub fn persisted(&self, positions: &mut impl Iterator<Item = LogPosition>) -> Persisted {
        if self.hard_state.is_some() {
            positions.next();
        }
        let place = |entry: &Entry| EntryPlace {
            index: entry.index,
            term: entry.term,
            kind: log_kind(entry.kind),
            position: positions.next().expect("each record has a position"),
            len: entry.data.len(),
            crc: crc32c(&entry.data),
        };
        Persisted { ready: self.ready, places: self.entries.iter().map(place).collect() }
    }
}

/// A write on its way to the log, with whatever goes with it.
pub trait Queued {
    /// Whose it is.
    fn shard(&self) -> ShardId;

    /// What is to be written.
    fn write(&self) -> &LogWrite;
}

impl Queued for (ShardId, LogWrite) {
    fn shard(&self) -> ShardId {
        self.0
    }

    fn write(&self) -> &LogWrite {
        &self.1
    }
}

/// How a log is appended to: [`LogWriter::append_ordinary`] or, for what is urgent,
/// [`LogWriter::append`].
pub type AppendTo = fn(&mut LogWriter, &[Record<'_>]) -> Result<Vec<LogPosition>, AppendError>;

/// Makes the first of `jobs` durable: all of them or, where there is no room for that, half as many
/// until there is. Takes them out, and returns them with what to tell their groups; none if not
/// even the first one fits.
///
/// # Errors
/// Any but a lack of room. Nobody may be told anything then.
pub fn write_first<T: Queued>(
    log: &mut LogWriter,
    append: AppendTo,
    jobs: &mut Vec<T>,
) -> Result<Vec<(T, Persisted)>, AppendError> {
    let mut count = jobs.len();
    loop {
        let records: Vec<_> =
            jobs[..count].iter().flat_map(|job| job.write().records(job.shard())).collect();
        // Without any there are only messages that waited for earlier writes, and those are done.
        let appended = if records.is_empty() { Ok(Vec::new()) } else { append(log, &records) };
        match appended {
            Ok(positions) => {
                let mut positions = positions.into_iter();
                let with_persisted = |job: T| {
                    let persisted = job.write().persisted(&mut positions);
                    (job, persisted)
                };
                return Ok(jobs.drain(..count).map(with_persisted).collect());
            }
            Err(AppendError::Full | AppendError::NoSpace) if count > 1 => count /= 2,
            Err(AppendError::Full | AppendError::NoSpace) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
}

/// Takes out everything of the groups that hold up the log.
pub fn take_urgent<T: Queued>(jobs: &mut Vec<T>, segments: &SegmentPool) -> Vec<T> {
    // Asked once for each group: the answer may change meanwhile, and a part of a group's writes
    // must not overtake another.
    let mut shards: BTreeSet<ShardId> = jobs.iter().map(T::shard).collect();
    shards.retain(|shard| segments.is_held_up_by(*shard));
    jobs.extract_if(.., |job| shards.contains(&job.shard())).collect()
}

/// Takes out copies: they are to make room, and where there is none for them they are in the way.
/// Their groups are told [`Persisted::given_up`].
pub fn take_copies<T: Queued>(jobs: &mut Vec<T>) -> Vec<T> {
    jobs.extract_if(.., |job| job.write().ready.is_none()).collect()
}
