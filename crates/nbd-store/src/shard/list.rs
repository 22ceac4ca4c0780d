//! Listing volumes page by page, without holding up whoever applies entries.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::reader::ShardReader;
use crate::ids::VolumeId;
use crate::limits::LOOKED_AT_PER_LOCK;
use crate::outcome::{Labels, VolumeInfo};

/// What volumes are sorted by. Those that are alike are in the order of their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VolumeOrder {
    /// The bytes of their names.
    #[default]
    Name,
    /// Their size.
    Size,
    /// When they were created.
    Created,
    /// When they were changed last.
    Modified,
}

/// A place in the order of volumes. There need not be a volume at it any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPosition {
    /// Name of the volume.
    pub name: String,
    /// What it is sorted by; of no meaning with [`VolumeOrder::Name`].
    pub value: u64,
}

/// Which volumes are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListQuery {
    /// Names begin with this.
    pub prefix: String,
    /// Volumes have all of these labels, with these values.
    pub labels: Labels,
    /// What they are sorted by.
    pub order: VolumeOrder,
    /// The other way round, that of names among those that are alike included.
    pub descending: bool,
    /// Only what comes after this.
    pub after: Option<ListPosition>,
    /// As many at most.
    pub limit: usize,
}

impl VolumeOrder {
    /// What a volume is sorted by, before its name.
    #[must_use]
    pub const fn value(self, volume: &VolumeInfo) -> u64 {
        match self {
            Self::Name => 0,
            Self::Size => volume.size,
            Self::Created => volume.created_ms,
            Self::Modified => volume.modified_ms,
        }
    }
}

impl ListQuery {
    fn wants(&self, volume: &VolumeInfo) -> bool {
        volume.name.starts_with(&self.prefix)
            && self.labels.iter().all(|(name, value)| volume.labels.get(name) == Some(value))
    }
}

/// The least text above all that begin with `prefix`; `None` if there is no bound.
fn end_of_prefix(prefix: &str) -> Option<String> {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        // The next character; none lies between U+D7FF and U+E000.
        let next = match last {
            '\u{d7ff}' => Some('\u{e000}'),
            last => char::from_u32(u32::from(last) + 1),
        };
        if let Some(next) = next {
            end.push(next);
            return Some(end);
        }
    }
    None
}

impl ShardReader {
    /// A page of volumes, and whether there is more behind it. What changes while the page is put
    /// together may be in it or not.
    ///
    /// Takes about a microsecond a volume of the page by name, and as long for each volume of the
    /// shard in another order; applying entries goes on meanwhile.
    #[must_use]
    pub fn list(&self, query: &ListQuery) -> (Vec<VolumeInfo>, bool) {
        if query.limit == 0 {
            return (Vec::new(), self.volume_count() > 0);
        }
        match query.order {
            VolumeOrder::Name => self.list_by_name(query),
            _ if query.descending => {
                let after =
                    query.after.as_ref().map(|at| Reverse((at.value, at.name.as_str().into())));
                self.list_by_value(query, after, Reverse)
            }
            _ => {
                let after = query.after.as_ref().map(|at| (at.value, at.name.as_str().into()));
                self.list_by_value(query, after, |key| key)
            }
        }
    }

    fn list_by_name(&self, query: &ListQuery) -> (Vec<VolumeInfo>, bool) {
        let end = end_of_prefix(&query.prefix);
        let after = query.after.as_ref().map(|after| after.name.clone());
        // Names already dealt with lie before (after) this.
        let mut seen: Option<Arc<str>> = after.map(Into::into);
        let mut found = Vec::new();
        loop {
            let first = match &seen {
                Some(seen) if !query.descending && **seen >= *query.prefix => {
                    Bound::Excluded(&**seen)
                }
                _ => Bound::Included(&*query.prefix),
            };
            let last = match (&seen, &end) {
                (Some(seen), Some(end)) if query.descending && **seen < **end => {
                    Bound::Excluded(&**seen)
                }
                (Some(seen), None) if query.descending => Bound::Excluded(&**seen),
                (_, Some(end)) => Bound::Excluded(&**end),
                (_, None) => Bound::Unbounded,
            };
            if is_empty(first, last) {
                return (found, false);
            }
            let mut looked_at = 0;
            let mut newest = None;
            {
                let state = self.shard.state.read();
                let mut names = state.metadata.volumes.named((first, last));
                let mut next = || if query.descending { names.next_back() } else { names.next() };
                while looked_at < LOOKED_AT_PER_LOCK
                    && let Some(volume) = next()
                {
                    looked_at += 1;
                    newest = Some(Arc::clone(&volume.name));
                    if !query.wants(volume) {
                        continue;
                    }
                    if found.len() == query.limit {
                        return (found, true);
                    }
                    found.push(volume.clone());
                }
            }
            if looked_at < LOOKED_AT_PER_LOCK {
                return (found, false);
            }
            seen = newest;
        }
    }

    /// Looks at all volumes and keeps the first `limit` behind `after`, by `key`.
    fn list_by_value<K: Ord>(
        &self,
        query: &ListQuery,
        after: Option<K>,
        key: impl Fn((u64, Arc<str>)) -> K,
    ) -> (Vec<VolumeInfo>, bool) {
        let mut first: BTreeMap<K, VolumeInfo> = BTreeMap::new();
        let mut more = false;
        let mut seen = VolumeId(0);
        loop {
            let mut looked_at = 0;
            {
                let state = self.shard.state.read();
                let volumes = state.metadata.volumes.created_after(seen);
                for volume in volumes.take(LOOKED_AT_PER_LOCK) {
                    looked_at += 1;
                    seen = volume.id;
                    if !query.wants(volume) {
                        continue;
                    }
                    let key = key((query.order.value(volume), Arc::clone(&volume.name)));
                    let is_behind = after.as_ref().is_none_or(|after| key > *after);
                    let is_full = first.len() == query.limit;
                    let is_last = first.last_key_value().is_some_and(|(last, _)| key > *last);
                    if !is_behind {
                        continue;
                    }
                    more |= is_full;
                    if !(is_full && is_last) {
                        first.insert(key, volume.clone());
                    }
                    if first.len() > query.limit {
                        first.pop_last();
                    }
                }
            }
            if looked_at < LOOKED_AT_PER_LOCK {
                return (first.into_values().collect(), more);
            }
        }
    }
}

/// Whether no text lies between these bounds. A map refuses a range that runs backwards.
fn is_empty(first: Bound<&str>, last: Bound<&str>) -> bool {
    match (first, last) {
        (Bound::Included(first), Bound::Excluded(last)) => first >= last,
        (Bound::Excluded(first), Bound::Excluded(last)) => first >= last,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end() {
        assert_eq!(end_of_prefix("ab").as_deref(), Some("ac"));
        assert_eq!(end_of_prefix(""), None);
        assert_eq!(end_of_prefix("a\u{10ffff}").as_deref(), Some("b"));
        assert_eq!(end_of_prefix("\u{d7ff}").as_deref(), Some("\u{e000}"));
        assert_eq!(end_of_prefix("\u{10ffff}"), None);
    }
}
