//! What a scan of the log says of each shard.
//!
//! ```text
//!   entries:  checkpoint's applied | replayed now | tail
//!             ─────────────────────┼──────────────┼──────────▶ index
//!             home; ignored here   │ up to commit │ may yet be superseded
//! ```
//!
//! The newest record of an index counts, and makes what was above it void: records are seen in the
//! order of writing, so an entry at an index cuts off everything from that index on.

use bytes::{Bytes, BytesMut};
use nbd_log::log::{EntryKind, HardState, LogPosition, LogReadError, LogReader, ScannedEntry};
use nbd_topology::{LogIndex, ShardId, Term};

use crate::checkpoint::newer_vote;
use crate::chunk::record::ShardRecord;
use crate::limits::to_usize;
use crate::shard::ShardWriter;

/// Entry that Raft has not been told to be committed, or not yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TailEntry {
    /// Its place in the group's log.
    pub index: LogIndex,
    /// The term of the leader that made it.
    pub term: Term,
    /// What `data` means to Raft.
    pub kind: EntryKind,
    /// The payload.
    pub data: Bytes,
    /// Where the payload begins in the log.
    pub position: LogPosition,
}

/// What Raft needs to go on where it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftRecovered {
    /// Newest term and vote on disk; `commit >= applied`.
    pub hard_state: HardState,
    /// Last entry that the state machine has applied.
    pub applied: LogIndex,
    /// Last entry, and its term, that is not in the log any more as far as Raft is concerned.
    pub compacted: (LogIndex, Term),
    /// Term of every entry behind `compacted`, up to the last one.
    pub terms: Vec<Term>,
    /// Entries behind `applied`.
    pub tail: Vec<TailEntry>,
}

/// The log has entries, but not all that must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the log of shard {shard} has no entry {expected}, though there is evidence of entry {found}"
)]
pub struct MissingEntries {
    /// The shard.
    pub shard: ShardId,
    /// The entry that had to come.
    pub expected: LogIndex,
    /// A later entry that is there, or that is known to have been committed.
    pub found: LogIndex,
}

/// Where an entry lies.
#[derive(Debug, Clone, Copy)]
struct Found {
    term: Term,
    kind: EntryKind,
    position: LogPosition,
    len: usize,
}

/// Collects the records of one shard.
#[derive(Debug)]
pub(crate) struct ShardScan {
    shard: ShardId,
    checkpoint: ShardRecord,
    /// Entries behind the checkpoint's applied index, without a gap.
    entries: Vec<Found>,
    hard_state: Option<HardState>,
    missing: Option<MissingEntries>,
}

impl ShardScan {
    /// A scan that has seen nothing, on top of a checkpoint.
    pub(crate) const fn new(shard: ShardId, checkpoint: ShardRecord) -> Self {
        Self { shard, checkpoint, entries: Vec::new(), hard_state: None, missing: None }
    }

    fn last(&self) -> LogIndex {
        LogIndex(self.checkpoint.applied.0 + self.entries.len() as u64)
    }

    /// A hard state: the last one counts.
    pub(crate) const fn see_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = Some(hard_state);
    }

    /// An entry: it voids what was at its index and above.
    pub(crate) fn see_entry(&mut self, entry: &ScannedEntry<'_>, position: LogPosition) {
        let Some(nth) = entry.index.0.checked_sub(self.checkpoint.applied.0 + 1) else {
            // Home already. What came after it in an older term is void all the same.
            self.entries.clear();
            return;
        };
        if nth > self.entries.len() as u64 {
            let (shard, expected, found) = (self.shard, self.last().next(), entry.index);
            self.missing.get_or_insert(MissingEntries { shard, expected, found });
            return;
        }
        self.entries.truncate(to_usize(nth));
        let len = entry.data.len();
        self.entries.push(Found { term: entry.term, kind: entry.kind, position, len });
    }

    /// Where the first entry to be replayed lies.
    pub(crate) fn first_position(&self) -> Option<LogPosition> {
        self.entries.first().map(|entry| entry.position)
    }

    /// The hard state to go on with, once all records were seen.
    ///
    /// # Errors
    /// [`MissingEntries`] when the entries have a gap, or end before what the checkpoint knows to
    /// be committed.
    pub(crate) fn hard_state(&self) -> Result<HardState, MissingEntries> {
        if let Some(missing) = self.missing {
            return Err(missing);
        }
        let (last, known) = (self.last(), self.checkpoint.hard_state);
        if known.commit > last {
            let (shard, expected, found) = (self.shard, last.next(), known.commit);
            return Err(MissingEntries { shard, expected, found });
        }
        let newest = self.hard_state.unwrap_or(known);
        let mut hard_state = newer_vote(known, newest);
        // A hard state may come before the entries it speaks of, and a crash in between.
        hard_state.commit = known.commit.max(newest.commit.min(last)).max(self.checkpoint.applied);
        Ok(hard_state)
    }

    /// Replays what is committed, and hands the rest to Raft.
    pub(crate) fn replay(
        self,
        writer: &mut ShardWriter,
        log: &LogReader,
    ) -> Result<RaftRecovered, ReplayError> {
        let hard_state = self.hard_state()?;
        let compacted = (self.checkpoint.applied, self.checkpoint.applied_term);
        let mut tail = Vec::new();
        let mut index = compacted.0;
        for entry in &self.entries {
            index = index.next();
            let mut data = BytesMut::zeroed(entry.len);
            log.read(entry.position, &mut data)?;
            let (data, Found { term, kind, position, .. }) = (data.freeze(), *entry);
            if index > hard_state.commit {
                tail.push(TailEntry { index, term, kind, data, position });
            } else {
                let data = if kind == EntryKind::Command { data } else { Bytes::new() };
                // The outcomes were answered, or will be asked for again.
                let _outcomes = writer.apply(index, term, &data, position);
            }
        }
        let terms = self.entries.iter().map(|entry| entry.term).collect();
        Ok(RaftRecovered { hard_state, applied: hard_state.commit, compacted, terms, tail })
    }
}

/// Why a shard cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    #[error(transparent)]
    Missing(#[from] MissingEntries),
    #[error(transparent)]
    Log(#[from] LogReadError),
}

#[cfg(test)]
mod tests;
