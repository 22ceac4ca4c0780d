//! Data of recent entries, by position.

use std::collections::VecDeque;

use bytes::Bytes;
use parking_lot::RwLock;

use super::record::LogPosition;

/// Memory that a cached entry takes besides its data.
const ENTRY_OVERHEAD_BYTES: usize = 64;

/// The newest entries' buffers, shared by the writer, which adds, and all readers. A lock around a
/// leaf: it is held for a search or an addition, never across I/O.
#[derive(Debug)]
pub(super) struct EntryCache {
    state: RwLock<State>,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct State {
    /// Ascending by position, not overlapping.
    entries: VecDeque<(LogPosition, Bytes)>,
    /// Memory taken by `entries`. `bytes <= bytes_max` between calls.
    bytes: usize,
}

impl EntryCache {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { state: RwLock::default(), bytes_max }
    }

    /// Adds entries, each behind all that are there, and drops the oldest past the bound.
    pub(super) fn extend(&self, entries: impl Iterator<Item = (LogPosition, Bytes)>) {
        if self.bytes_max == 0 {
            return;
        }
        let mut state = self.state.write();
        for (position, data) in entries.filter(|(_, data)| !data.is_empty()) {
            let behind =
                |(last, bytes): &(LogPosition, Bytes)| last.plus(bytes.len() as u64) <= position;
            assert!(state.entries.back().is_none_or(behind), "log positions rise");
            state.bytes += data.len() + ENTRY_OVERHEAD_BYTES;
            state.entries.push_back((position, data));
        }
        while state.bytes > self.bytes_max {
            let (_, oldest) = state.entries.pop_front().expect("bytes are of entries");
            state.bytes -= oldest.len() + ENTRY_OVERHEAD_BYTES;
        }
    }

    /// The range, if one cached entry holds all of it. No copy.
    pub(super) fn get(&self, position: LogPosition, len: usize) -> Option<Bytes> {
        let state = self.state.read();
        let behind = state.entries.partition_point(|(start, _)| *start <= position);
        let (start, data) = state.entries.get(behind.checked_sub(1)?)?;
        let from = usize::try_from(position.0 - start.0).ok()?;
        let to = from.checked_add(len)?;
        (to <= data.len()).then(|| data.slice(from..to))
    }
}
