//! What the digests of a resync's source and its receiver say of each other.

use std::collections::BTreeMap;
use std::ops::Range;

use nbd_store::limits::DIGEST_CHUNKS;
use nbd_store::{ChunkDigest, ChunkIndex, ChunkKey, RangeDigest, VolumeId};
use nbd_topology::LogIndex;

/// The chunks of the range of digests that begins with this one.
#[must_use]
pub const fn digest_range_from(first: ChunkIndex) -> Range<ChunkIndex> {
    first..ChunkIndex(first.0 + DIGEST_CHUNKS)
}

/// Ranges that two pages do not agree on, and where the next pages begin. `None`: all were
/// compared.
///
/// Both pages begin at the same place. Each may end anywhere; an empty one says that there are no
/// more ranges.
#[must_use]
pub fn unequal_ranges(
    theirs: &[RangeDigest],
    mine: &[RangeDigest],
) -> (Vec<ChunkKey>, Option<ChunkKey>) {
    let key = |range: &RangeDigest| (range.volume, range.first);
    let end = match (theirs.last().map(key), mine.last().map(key)) {
        (Some(theirs), Some(mine)) => Some(theirs.min(mine)),
        (theirs, mine) => theirs.or(mine),
    };
    let within = |ranges: &[RangeDigest]| -> BTreeMap<ChunkKey, u64> {
        let covered = ranges.iter().filter(|range| Some(key(range)) <= end);
        covered.map(|range| (key(range), range.digest)).collect()
    };
    let (theirs, mine) = (within(theirs), within(mine));
    let mut unequal: Vec<ChunkKey> = theirs
        .iter()
        .filter(|(key, digest)| mine.get(key) != Some(digest))
        .map(|(k, _)| *k)
        .collect();
    unequal.extend(mine.keys().filter(|key| !theirs.contains_key(key)));
    unequal.sort_unstable();
    (unequal, end)
}

/// What is wrong with chunks that were fetched for a snapshot at `upto`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Not as at the source.
    pub differing: Vec<ChunkKey>,
    /// There are chunks that the source does not have.
    pub stale: bool,
}

/// Compares what was fetched with its source. Only what entries up to `upto` made is compared: the
/// log that follows overwrites the rest on both sides.
#[must_use]
pub fn unfinished(
    volume: VolumeId,
    theirs: &[ChunkDigest],
    mine: &[ChunkDigest],
    upto: LogIndex,
) -> Unfinished {
    let by_chunk = |digests: &[ChunkDigest]| -> BTreeMap<ChunkIndex, ChunkDigest> {
        digests.iter().map(|digest| (digest.chunk, *digest)).collect()
    };
    let (theirs, mine) = (by_chunk(theirs), by_chunk(mine));
    let is_as_it_should = |their: &ChunkDigest| {
        their.last_index > upto
            || mine.get(&their.chunk).is_some_and(|my| my.last_index > upto || my == their)
    };
    let differing = theirs.values().filter(|their| !is_as_it_should(their));
    let differing = differing.map(|their| (volume, their.chunk)).collect();
    let stale = mine.values().any(|my| my.last_index <= upto && !theirs.contains_key(&my.chunk));
    Unfinished { differing, stale }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOLUME: VolumeId = VolumeId(1);

    fn range(first: u64, digest: u64) -> RangeDigest {
        RangeDigest { volume: VOLUME, first: ChunkIndex(first), digest, newest: LogIndex(1) }
    }

    fn digest(chunk: u64, last_index: u64, digest: u64) -> ChunkDigest {
        ChunkDigest { chunk: ChunkIndex(chunk), last_index: LogIndex(last_index), digest }
    }

    fn key(chunk: u64) -> ChunkKey {
        (VOLUME, ChunkIndex(chunk))
    }

    #[test]
    fn pages_of_different_length_are_compared_as_far_as_both_reach() {
        let (theirs, mine) =
            ([range(0, 5), range(1024, 6), range(2048, 7)], [range(0, 5), range(1024, 9)]);
        assert_eq!(unequal_ranges(&theirs, &mine), (vec![key(1024)], Some(key(1024))));
        // One side has nothing more: the other's ranges are all unequal.
        assert_eq!(unequal_ranges(&[], &mine), (vec![key(0), key(1024)], Some(key(1024))));
        assert_eq!(unequal_ranges(&theirs[..1], &mine[1..]), (vec![key(0)], Some(key(0))));
        assert_eq!(unequal_ranges(&[], &[]), (vec![], None));
    }

    #[test]
    fn a_copy_is_finished_when_all_up_to_the_snapshot_is_alike() {
        let upto = LogIndex(10);
        let theirs = [digest(0, 3, 1), digest(1, 10, 2), digest(2, 11, 3)];
        let same = unfinished(VOLUME, &theirs, &theirs[..2], upto);
        assert_eq!(same, Unfinished::default(), "what came after the snapshot does not matter");
        // Fetched from another source that was ahead: the log makes both alike.
        let ahead = [digest(0, 3, 1), digest(1, 15, 9)];
        assert_eq!(unfinished(VOLUME, &theirs, &ahead, upto), Unfinished::default());
        let missing = unfinished(VOLUME, &theirs, &[digest(1, 10, 2)], upto);
        assert_eq!(missing.differing, [key(0)]);
        for wrong in [digest(1, 9, 2), digest(1, 10, 7)] {
            let found = unfinished(VOLUME, &theirs, &[digest(0, 3, 1), wrong], upto);
            assert_eq!((found.differing, found.stale), (vec![key(1)], false));
        }
        let stale = unfinished(VOLUME, &theirs[..1], &[digest(0, 3, 1), digest(7, 4, 1)], upto);
        assert_eq!((stale.differing, stale.stale), (vec![], true));
        let newer = unfinished(VOLUME, &theirs[..1], &[digest(0, 3, 1), digest(7, 12, 1)], upto);
        assert!(!newer.stale);
    }
}
