//! Where the data of each kept entry lies in the node's log.

use std::collections::VecDeque;

use nbd_log::log::LogPosition;
use nbd_store::EntryPlace;
use nbd_topology::LogIndex;

use crate::limits::KEPT_ENTRIES_MAX;

/// Where its data ends.
const fn end(place: &EntryPlace) -> LogPosition {
    place.position.plus(place.len as u64)
}

/// The kept entries of one group that are on stable storage here, by index without gaps.
#[derive(Debug)]
pub(crate) struct Places {
    entries: VecDeque<EntryPlace>,
    /// End of the newest data written for this group, as far as that is known.
    written: LogPosition,
}

impl Places {
    /// The places that recovery found.
    pub(crate) fn new(entries: Vec<EntryPlace>) -> Self {
        let written = entries.iter().map(end).max().unwrap_or(LogPosition(0));
        Self { entries: entries.into(), written }
    }

    /// Notes newly persisted entries. A newer record of an index replaces the older one and all
    /// behind it.
    pub(crate) fn persisted(&mut self, places: Vec<EntryPlace>) {
        for place in places {
            while self.entries.back().is_some_and(|last| last.index >= place.index) {
                self.entries.pop_back();
            }
            let follows = self.entries.back().is_none_or(|last| last.index.next() == place.index);
            assert!(follows, "entry {} leaves a gap in the log", place.index);
            self.written = self.written.max(end(&place));
            self.entries.push_back(place);
        }
    }

    /// Notes that copies of entries were written to the log's end. Those that were superseded
    /// meanwhile do not count.
    pub(crate) fn copied(&mut self, copies: Vec<EntryPlace>) {
        for copy in copies {
            self.written = self.written.max(end(&copy));
            if let Some(place) = self.get_mut(copy.index)
                && place.term == copy.term
            {
                *place = copy;
            }
        }
    }

    /// The entries above `index`.
    pub(crate) fn above(&self, index: LogIndex) -> impl Iterator<Item = EntryPlace> {
        let first = self.entries.partition_point(|place| place.index <= index);
        self.entries.range(first..).copied()
    }

    /// Where the first of the entries above `index` lies; without any, where the next one lies at
    /// the earliest.
    pub(crate) fn begin_above(&self, index: LogIndex) -> LogPosition {
        self.above(index).map(|place| place.position).min().unwrap_or(self.written)
    }

    fn get_mut(&mut self, index: LogIndex) -> Option<&mut EntryPlace> {
        let first = self.entries.front()?.index;
        let nth = usize::try_from(index.0.checked_sub(first.0)?).ok()?;
        self.entries.get_mut(nth)
    }

    /// Where the entry at `index` lies.
    pub(crate) fn get(&self, index: LogIndex) -> Option<EntryPlace> {
        let first = self.entries.front()?.index;
        let nth = usize::try_from(index.0.checked_sub(first.0)?).ok()?;
        self.entries.get(nth).copied()
    }

    /// Places of the entries `first..=last`, cut at `bytes_max` of data but not before the first
    /// entry. Empty if one of them is not kept.
    pub(crate) fn range(&self, first: LogIndex, last: LogIndex, bytes_max: u64) -> Vec<EntryPlace> {
        let mut bytes = 0;
        let mut places = Vec::new();
        let mut index = first;
        while index <= last {
            let Some(place) = self.get(index) else { return Vec::new() };
            bytes += place.len as u64;
            if bytes > bytes_max && !places.is_empty() {
                break;
            }
            places.push(place);
            index = index.next();
        }
        places
    }

    /// The index above which entries are worth keeping: of those up to `covered`, the ones within
    /// the last `bytes` of what was written, and not more than [`KEPT_ENTRIES_MAX`].
    pub(crate) fn keep_above(&self, covered: LogIndex, bytes: u64) -> LogIndex {
        let from = LogPosition(self.written.0.saturating_sub(bytes));
        let old = self.entries.partition_point(|place| place.position < from);
        let old = old.max(self.entries.len().saturating_sub(KEPT_ENTRIES_MAX));
        let first = self.entries.get(old).or_else(|| self.entries.back());
        first.map_or(covered, |first| LogIndex(first.index.0 - 1).min(covered))
    }

    /// Forgets entries up to `index`.
    pub(crate) fn forget_through(&mut self, index: LogIndex) {
        while self.entries.pop_front_if(|place| place.index <= index).is_some() {}
    }

    /// Forgets everything: the log starts over behind a snapshot.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use nbd_log::log::EntryKind;
    use nbd_topology::Term;

    use super::*;

    fn place(index: u64, term: u64, position: u64) -> EntryPlace {
        EntryPlace {
            index: LogIndex(index),
            term: Term(term),
            kind: EntryKind::Command,
            position: LogPosition(position),
            len: 100,
            crc: 0,
        }
    }

    #[test]
    fn a_newer_record_replaces_the_older_one_and_all_behind_it() {
        let mut places = Places::new((1..=5).map(|n| place(n, 1, n * 1000)).collect());
        places.persisted(vec![place(3, 2, 9000), place(4, 2, 9100)]);
        assert_eq!(places.get(LogIndex(3)), Some(place(3, 2, 9000)));
        assert_eq!(places.get(LogIndex(5)), None);
        assert_eq!(places.range(LogIndex(2), LogIndex(4), 200).len(), 2);
        assert_eq!(places.range(LogIndex(2), LogIndex(4), 1).len(), 1);
        assert!(places.range(LogIndex(2), LogIndex(5), 1000).is_empty());
    }

    #[test]
    fn copies_take_the_place_of_what_they_are_copies_of() {
        let mut places = Places::new((1..=5).map(|n| place(n, 1, n * 1000)).collect());
        assert_eq!(places.begin_above(LogIndex(3)), LogPosition(4000));
        // Superseded while the copy was on its way.
        places.persisted(vec![place(5, 2, 8000)]);
        places.copied(vec![place(4, 1, 9000), place(5, 1, 9100)]);
        let above: Vec<_> = places.above(LogIndex(3)).collect();
        assert_eq!(above, [place(4, 1, 9000), place(5, 2, 8000)]);
        assert_eq!(places.begin_above(LogIndex(3)), LogPosition(8000));
        assert_eq!(places.begin_above(LogIndex(5)), LogPosition(9200), "behind all there is");
    }

    #[test]
    fn what_is_old_or_too_much_is_not_kept() {
        let mut places = Places::new((1..=10).map(|n| place(n, 1, n * 1000)).collect());
        assert_eq!(places.keep_above(LogIndex(10), 1 << 20), LogIndex(0));
        // The last 3500 bytes are those from 6600 on.
        assert_eq!(places.keep_above(LogIndex(10), 3500), LogIndex(6));
        assert_eq!(places.keep_above(LogIndex(4), 3500), LogIndex(4), "not covered yet");
        assert_eq!(places.keep_above(LogIndex(10), 0), LogIndex(9), "the newest stays");
        places.forget_through(LogIndex(6));
        assert_eq!(places.get(LogIndex(6)), None);
        assert_eq!(places.keep_above(LogIndex(10), 1 << 20), LogIndex(6));
    }
}
