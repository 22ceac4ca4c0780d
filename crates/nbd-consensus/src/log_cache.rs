//! The log as raft-rs sees it: terms of every kept entry, data of the recent ones.
//!
//! ```text
//!  compacted        window_first          applied            last
//!      |  terms only     |  terms and data   |  terms and data  |
//!      +-----------------+-------------------+------------------+
//!                         <- bounded bytes -> <- not evictable ->
//! ```
//!
//! Entries are here from the moment raft-rs hands them out, durable or not: raft-rs reads them back
//! through this type at once, and would stall or panic on a storage that knew only durable ones.

use std::cell::RefCell;
use std::collections::VecDeque;

use nbd_topology::{LogIndex, Membership, ReplicaId};
use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::codec;
use crate::config::Recovered;
use crate::effect::Fetch;
use crate::limits::{ENTRY_OVERHEAD_BYTES, FETCHES_MAX};
use crate::membership::to_conf_state;

/// Entries from `first` on, up to the next run or the last entry, are of `term`. A million entries
/// of one leader are one run.
#[derive(Debug)]
struct TermRun {
    first: u64,
    term: u64,
}

/// Requests for entries that are no longer in memory.
#[derive(Debug, Default)]
struct Fetches {
    /// Asked for by raft-rs and not yet answered, with the first index asked for.
    waiting: Vec<(u64, GetEntriesContext)>,
    /// Not yet handed out to the caller.
    wanted: Vec<Fetch>,
    /// The answer raft-rs is being shown right now; empty at all other times.
    arrived: Vec<Entry>,
}

/// The group's [`Storage`].
#[derive(Debug)]
pub(crate) struct LogCache {
    initial: RaftState,
    /// Index and term of the entry that the log starts behind.
    compacted: (u64, u64),
    /// Covers `compacted.0 + 1..=last`; terms grow strictly from one run to the next.
    runs: VecDeque<TermRun>,
    /// Highest index, `>= compacted.0`.
    last: u64,
    /// Without gaps, ending at `last`; holds at least everything above `applied`.
    window: VecDeque<Entry>,
    window_bytes: usize,
    /// Bound on `window_bytes`, though entries above `applied` stay in any case.
    window_bytes_max: usize,
    applied: u64,
    /// What a follower may be offered that the log cannot feed.
    offer: Option<Snapshot>,
    /// Behind a cell because raft-rs asks through a shared reference.
    fetches: RefCell<Fetches>,
}

impl LogCache {
    /// The log as recovered and validated.
    pub(crate) fn new(recovered: &Recovered, bytes_max: usize) -> Self {
        let hard = recovered.hard_state;
        let hard_state = HardState {
            term: hard.term.0,
            vote: hard.vote.map_or(0, ReplicaId::get),
            commit: hard.commit.0,
            ..HardState::default()
        };
        let conf_state = to_conf_state(&recovered.membership);
        let compacted = (recovered.compacted.0.0, recovered.compacted.1.0);
        let mut cache = Self {
            initial: RaftState { hard_state, conf_state },
            compacted,
            runs: VecDeque::new(),
            last: compacted.0,
            window: VecDeque::new(),
            window_bytes: 0,
            window_bytes_max: bytes_max,
            applied: recovered.applied.0,
            offer: None,
            fetches: RefCell::default(),
        };
        for term in &recovered.terms {
            cache.push_term(term.0);
        }
        for entry in &recovered.tail {
            cache.push_data(codec::to_raft_entry(entry));
        }
        cache
    }

    /// Index up to which the log is forgotten.
    pub(crate) const fn compacted(&self) -> u64 {
        self.compacted.0
    }

    /// Highest index in the log.
    pub(crate) const fn last(&self) -> u64 {
        self.last
    }

    /// Index the eviction of data goes by.
    pub(crate) const fn applied(&self) -> u64 {
        self.applied
    }

    /// First index whose data is in memory, or `last + 1`.
    pub(crate) fn window_first(&self) -> u64 {
        self.last + 1 - self.window.len() as u64
    }

    /// Takes new entries, replacing everything from the first one's index on.
    pub(crate) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first().map(|entry| entry.index) else { return };
        assert!(first <= self.last + 1, "gap in the log: {first} after {}", self.last);
        assert!(first > self.applied, "entry {first} is already applied and cannot be replaced");
        self.truncate(first);
        for entry in entries {
            assert_eq!(entry.index, self.last + 1, "entries are not consecutive");
            self.push_term(entry.term);
            self.push_data(entry.clone());
        }
    }

    /// Notes that entries up to `index` are applied, which makes their data evictable.
    pub(crate) fn applied_to(&mut self, index: u64) {
        assert!(self.applied <= index && index <= self.last, "applied {index} of {}", self.last);
        self.applied = index;
        while self.window_bytes > self.window_bytes_max
            && self.window.front().is_some_and(|entry| entry.index <= index)
        {
            self.pop_front();
        }
    }

    /// Forgets everything up to `index` but that entry's own term. Less than last time is ignored.
    pub(crate) fn compact(&mut self, index: u64) {
        assert!(index <= self.applied, "compaction to {index} beyond applied {}", self.applied);
        let Some(term) = self.term_of(index).filter(|_| index > self.compacted.0) else { return };
        self.compacted = (index, term);
        while self.runs.get(1).is_some_and(|run| run.first <= index + 1) {
            self.runs.pop_front();
        }
        if index == self.last {
            self.runs.clear();
        } else if let Some(run) = self.runs.front_mut() {
            run.first = index + 1;
        }
        while self.window.front().is_some_and(|entry| entry.index <= index) {
            self.pop_front();
        }
    }

    /// The state machine is checkpointed as of the entry (`index`, `term`), with `membership` in
    /// force.
    pub(crate) fn offer(&mut self, index: u64, term: u64, membership: &Membership) {
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        metadata.set_conf_state(to_conf_state(membership));
        self.offer = Some(snapshot);
    }

    /// Index of the last checkpoint.
    pub(crate) fn offered(&self) -> Option<u64> {
        self.offer.as_ref().map(|offer| offer.get_metadata().index)
    }

    /// New requests for entries that are not in memory.
    pub(crate) fn take_fetches(&mut self) -> Vec<Fetch> {
        std::mem::take(&mut self.fetches.get_mut().wanted)
    }

    /// Takes the answer to a request, and returns what raft-rs is to be called back with. It must
    /// be called back before [`Self::forget_arrived`]. An answer that is empty or does not fit the
    /// log is dropped: raft-rs asks again at the follower's next heartbeat response.
    pub(crate) fn arrived(&mut self, first: u64, entries: Vec<Entry>) -> Vec<GetEntriesContext> {
        let fits = |(at, entry): (u64, &Entry)| {
            entry.index == at && at > self.compacted.0 && self.term_of(at) == Some(entry.term)
        };
        let usable = !entries.is_empty() && (first..).zip(&entries).all(fits);
        let fetches = self.fetches.get_mut();
        let (answered, waiting) =
            std::mem::take(&mut fetches.waiting).into_iter().partition(|(low, _)| *low == first);
        fetches.waiting = waiting;
        if !usable {
            return Vec::new();
        }
        fetches.arrived = entries;
        let answered: Vec<(u64, GetEntriesContext)> = answered;
        answered.into_iter().map(|(_, context)| context).collect()
    }

    /// Drops the answer that raft-rs has been shown.
    pub(crate) fn forget_arrived(&mut self) {
        self.fetches.get_mut().arrived = Vec::new();
    }

    fn push_term(&mut self, term: u64) {
        self.last += 1;
        if self.runs.back().is_none_or(|run| run.term < term) {
            self.runs.push_back(TermRun { first: self.last, term });
        }
        assert_eq!(self.runs.back().map(|run| run.term), Some(term), "terms went back");
    }

    fn push_data(&mut self, entry: Entry) {
        self.window_bytes += footprint(&entry);
        self.window.push_back(entry);
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.window.pop_front() {
            self.window_bytes -= footprint(&entry);
        }
    }

    fn truncate(&mut self, first: u64) {
        assert!(first >= self.window_first(), "everything above applied is in the window");
        while self.last >= first {
            if let Some(entry) = self.window.pop_back() {
                self.window_bytes -= footprint(&entry);
            }
            self.last -= 1;
        }
        while self.runs.back().is_some_and(|run| run.first >= first) {
            self.runs.pop_back();
        }
    }

    /// Term of a kept entry or of the compacted one.
    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.compacted.0 {
            return Some(self.compacted.1);
        }
        if index < self.compacted.0 || index > self.last {
            return None;
        }
        let after = self.runs.partition_point(|run| run.first <= index);
        self.runs.get(after.checked_sub(1)?).map(|run| run.term)
    }
}

/// Bytes an entry is counted with.
fn footprint(entry: &Entry) -> usize {
    entry.data.len() + ENTRY_OVERHEAD_BYTES
}

/// The longest prefix of at most `bytes_max`, but at least one entry. Entries share their data.
fn limited<'a>(entries: impl Iterator<Item = &'a Entry>, bytes_max: u64) -> Vec<Entry> {
    let mut bytes = 0;
    let mut taken = Vec::new();
    for entry in entries {
        bytes += u64::from(entry.compute_size());
        if bytes > bytes_max && !taken.is_empty() {
            break;
        }
        taken.push(entry.clone());
    }
    taken
}

impl Storage for LogCache {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.initial.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.compacted.0 {
            return Err(StorageError::Compacted.into());
        }
        assert!(low <= high && high <= self.last + 1, "entries {low}..{high} of {}", self.last);
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        let within = |entry: &&Entry| entry.index < high;
        let window_first = self.window_first();
        if low >= window_first {
            let skip = usize::try_from(low - window_first).unwrap_or(usize::MAX);
            return Ok(limited(self.window.iter().skip(skip).take_while(within), bytes_max));
        }
        let mut fetches = self.fetches.borrow_mut();
        let arrived = fetches.arrived.iter().skip_while(|entry| entry.index < low);
        let arrived = limited(arrived.take_while(within), bytes_max);
        if arrived.first().is_some_and(|entry| entry.index == low) {
            return Ok(arrived);
        }
        assert!(context.can_async(), "entry {low} is not applied and yet not in memory");
        if fetches.waiting.len() < FETCHES_MAX {
            if fetches.waiting.iter().all(|(first, _)| *first != low) {
                let last = LogIndex(high.min(window_first) - 1);
                fetches.wanted.push(Fetch { first: LogIndex(low), last, bytes_max });
            }
            fetches.waiting.push((low, context));
        }
        Err(StorageError::LogTemporarilyUnavailable.into())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.term_of(index).ok_or_else(|| {
            let missing = if index < self.compacted.0 {
                StorageError::Compacted
            } else {
                StorageError::Unavailable
            };
            missing.into()
        })
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.compacted.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    /// The last checkpoint's place in the log, without any data: volumes are not sent as Raft
    /// snapshots. It has to be one that the log goes on from.
    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let fits =
            |offer: &&Snapshot| offer.get_metadata().index >= request_index.max(self.compacted.0);
        let offer = self.offer.as_ref().filter(fits).cloned();
        offer.ok_or_else(|| StorageError::SnapshotTemporarilyUnavailable.into())
    }
}

#[cfg(test)]
mod tests;
