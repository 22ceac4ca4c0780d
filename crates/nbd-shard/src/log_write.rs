//! What a replica wants written to the node's log.

use nbd_consensus::{Append, Entry, HardState, ReadyNumber};
use nbd_log::checksum::crc32c;
use nbd_log::log::{EntryRecord, LogPosition, Record};
use nbd_store::EntryPlace;
use nbd_topology::{ReplicaId, ShardId};

use crate::event::Persisted;
use crate::recovered::log_kind;

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
        let state = self.hard_state.map(|HardState { term, vote, commit }| {
            let vote = vote.map_or(0, ReplicaId::get);
            Record::HardState(shard, nbd_log::log::HardState { term, vote, commit })
        });
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
