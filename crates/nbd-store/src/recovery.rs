//! What a scan of the log says of each shard.
//!
//! ```text
//!   entries:  kept for followers | replayed now | tail
//!             ───────────────────┼──────────────┼──────────▶ index
//!             home already, up   │ up to commit │ may yet be superseded
//!             to the checkpoint's applied index
//! ```
//!
//! The newest record of an index counts, and makes what was above it void: records are seen in the
//! order of writing, so an entry at an index cuts off everything from that index on. Not so a copy,
//! which has the term of the one before it: it is the same entry at another place. What comes
//! before copies in the log may have been let go, so that gaps count only at the end. Entries that
//! do not lie behind the shard's log floor are void from the start: a snapshot took their place.

use bytes::{Bytes, BytesMut};
use nbd_log::checksum::crc32c;
use nbd_log::log::{EntryKind, HardState, LogPosition, LogReadError, LogReader, ScannedEntry};
use nbd_topology::{LogIndex, Membership, MembershipChange, ShardId, Term};

use crate::checkpoint::newer_vote;
use crate::chunk::record::ShardRecord;
use crate::limits::to_usize;
use crate::shard::{Applied, ShardWriter};

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

/// Where an entry lies, so that it can be sent to followers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryPlace {
    /// Its place in the group's log.
    pub index: LogIndex,
    /// The term of the leader that made it.
    pub term: Term,
    /// What its data means to Raft.
    pub kind: EntryKind,
    /// Where its data begins in the log.
    pub position: LogPosition,
    /// Bytes of its data.
    pub len: usize,
    /// CRC32C of all its data: what is read back for a follower is what was logged.
    pub crc: u32,
}

/// What Raft needs to go on where it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftRecovered {
    /// Newest term and vote on disk; `commit >= applied`.
    pub hard_state: HardState,
    /// The group's members as of `applied`.
    pub membership: Membership,
    /// Last entry that the state machine has applied.
    pub applied: LogIndex,
    /// Last entry, and its term, that is not in the log any more as far as Raft is concerned. May
    /// lie below what the checkpoint covers.
    pub compacted: (LogIndex, Term),
    /// Term of every entry behind `compacted`, up to the last one.
    pub terms: Vec<Term>,
    /// Every entry behind `compacted`, up to the last one. Those up to the checkpoint's index stay
    /// only as long as [`nbd_log::log::SegmentPool`] keeps them.
    pub kept: Vec<EntryPlace>,
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

/// Collects the records of one shard.
#[derive(Debug)]
pub(crate) struct ShardScan {
    shard: ShardId,
    checkpoint: ShardRecord,
    /// Entries without a gap.
    entries: Vec<EntryPlace>,
    hard_state: Option<HardState>,
    /// The gap before `entries`, if there were others that they do not follow.
    gap: Option<MissingEntries>,
}

/// What Raft's log begins behind, and the entries from there on.
struct Kept {
    compacted: (LogIndex, Term),
    entries: Vec<EntryPlace>,
}

impl ShardScan {
    /// A scan that has seen nothing, on top of a checkpoint.
    pub(crate) const fn new(shard: ShardId, checkpoint: ShardRecord) -> Self {
        Self { shard, checkpoint, entries: Vec::new(), hard_state: None, gap: None }
    }

    /// The last entry that is known of.
    fn last(&self) -> LogIndex {
        let applied = self.checkpoint.applied;
        self.entries.last().map_or(applied, |entry| entry.index.max(applied))
    }

    /// A hard state: the last one counts.
    pub(crate) const fn see_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = Some(hard_state);
    }

    /// An entry: it voids what was at its index and above.
    pub(crate) fn see_entry(&mut self, entry: &ScannedEntry<'_>, position: LogPosition) {
        if position <= self.checkpoint.log_floor {
            return;
        }
        let (index, term, kind, len) = (entry.index, entry.term, entry.kind, entry.data.len());
        let place = EntryPlace { index, term, kind, position, len, crc: crc32c(entry.data) };
        match self.entries.first().and_then(|first| index.0.checked_sub(first.index.0)) {
            Some(nth) if nth <= self.entries.len() as u64 => {
                if let Some(known) = self.entries.get_mut(to_usize(nth))
                    && known.term == term
                {
                    *known = place;
                    return;
                }
                self.entries.truncate(to_usize(nth));
            }
            // Everything so far is void, or of no use unless it is home already.
            _ => {
                let (shard, expected) = (self.shard, self.last().next());
                self.gap = Some(MissingEntries { shard, expected, found: index });
                self.entries.clear();
            }
        }
        self.entries.push(place);
    }

    /// The gap between the checkpoint and the entries, if there is one.
    fn missing(&self) -> Option<MissingEntries> {
        let (expected, found) = (self.checkpoint.applied.next(), self.entries.first()?.index);
        let gap = MissingEntries { shard: self.shard, expected, found };
        (found > expected).then(|| self.gap.filter(|gap| gap.found == found).unwrap_or(gap))
    }

    /// Where the entries to be replayed begin.
    pub(crate) fn first_position(&self) -> Option<LogPosition> {
        let replayed = self.entries.iter().filter(|entry| entry.index > self.checkpoint.applied);
        replayed.map(|entry| entry.position).min()
    }

    /// From where on the log must be kept for the entries to be replayed: a later scan that begins
    /// there finds them all. `None`: from nowhere, there are none.
    pub(crate) fn tail_begins(&self) -> Option<LogPosition> {
        let replayed = self.entries.iter().filter(|entry| entry.index > self.checkpoint.applied);
        // Copies that a crash cut short lie behind entries that come after them: a scan that began
        // with those would take the copies for what supersedes them.
        let rises = replayed.clone().is_sorted_by_key(|entry| entry.position);
        let first = replayed.map(|entry| entry.position).next()?;
        Some(if rises { first } else { LogPosition(0) })
    }

    /// The hard state to go on with, once all records were seen.
    ///
    /// # Errors
    /// [`MissingEntries`] when the entries have a gap, or end before what the checkpoint knows to
    /// be committed.
    pub(crate) fn hard_state(&self) -> Result<HardState, MissingEntries> {
        if let Some(missing) = self.missing() {
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

    /// What Raft's log is to be.
    fn kept(&mut self) -> Kept {
        let ShardRecord { applied, applied_term, .. } = self.checkpoint;
        let mut entries = std::mem::take(&mut self.entries);
        if entries.last().is_some_and(|last| last.index < applied) {
            // They do not reach what the checkpoint covers.
            entries.clear();
        }
        let compacted = match entries.first() {
            None => (applied, applied_term),
            Some(first) if first.index == applied.next() => (applied, applied_term),
            Some(first) if first.index == LogIndex::ZERO.next() => (LogIndex::ZERO, Term::ZERO),
            // Nothing tells the term of the entry before the first: the first takes its part.
            Some(first) => {
                let compacted = (first.index, first.term);
                entries.remove(0);
                compacted
            }
        };
        Kept { compacted, entries }
    }

    /// Replays what is committed, and hands the rest to Raft.
    pub(crate) fn replay(
        mut self,
        writer: &mut ShardWriter,
        log: &LogReader,
        decode_change: DecodeChange,
    ) -> Result<RaftRecovered, ReplayError> {
        let hard_state = self.hard_state()?;
        let Kept { compacted, entries: kept } = self.kept();
        let mut tail = Vec::new();
        for entry in kept.iter().filter(|entry| entry.index > self.checkpoint.applied) {
            let EntryPlace { index, term, kind, position, len, .. } = *entry;
            let mut data = BytesMut::zeroed(len);
            log.read(position, &mut data)?;
            let data = data.freeze();
            if index > hard_state.commit {
                tail.push(TailEntry { index, term, kind, data, position });
                continue;
            }
            let applied = match kind {
                EntryKind::Command if data.is_empty() => Applied::Empty,
                EntryKind::Command => Applied::Command(&data),
                EntryKind::ConfChange | EntryKind::ConfChangeV2 => {
                    decode_change(&data).map_or(Applied::Empty, Applied::Membership)
                }
            };
            // The outcomes were answered, or will be asked for again.
            let _outcomes = writer.apply(index, term, applied, position);
        }
        let (applied, membership) = (hard_state.commit, writer.membership());
        let terms = kept.iter().map(|entry| entry.term).collect();
        Ok(RaftRecovered { hard_state, membership, applied, compacted, terms, kept, tail })
    }
}

/// Reads what a membership entry says; `None` if it changes nothing.
pub(crate) type DecodeChange = fn(&[u8]) -> Option<MembershipChange>;

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
