//! What two replicas' digests say of each other, at any time.

use std::collections::BTreeMap;

use nbd_store::{ChunkDigest, ChunkIndex};

use crate::chunk_service::DigestsAt;

/// Chunks that two replicas must have alike and do not. What one of them may have changed after the
/// other's checkpoint is not compared.
pub(crate) fn mismatches(theirs: &DigestsAt, mine: &DigestsAt) -> Vec<ChunkIndex> {
    let by_chunk = |at: &DigestsAt| -> BTreeMap<ChunkIndex, ChunkDigest> {
        at.chunks.iter().map(|digest| (digest.chunk, *digest)).collect()
    };
    let (their_chunks, my_chunks) = (by_chunk(theirs), by_chunk(mine));
    let all = their_chunks.keys().chain(my_chunks.keys());
    let mut wrong: Vec<ChunkIndex> = all
        .copied()
        .filter(|chunk| match (their_chunks.get(chunk), my_chunks.get(chunk)) {
            (Some(their), Some(my)) if their.last_index == my.last_index => their != my,
            // The one with the older version has applied the newer change.
            (Some(their), Some(my)) if their.last_index > my.last_index => {
                their.last_index <= mine.before
            }
            (Some(_), Some(my)) => my.last_index <= theirs.before,
            (Some(their), None) => is_lost(their, mine, theirs),
            (None, Some(my)) => is_lost(my, theirs, mine),
            (None, None) => false,
        })
        .collect();
    wrong.sort_unstable();
    wrong.dedup();
    wrong
}

/// Whether a chunk is missing on one side that should be there: that side has applied what made it,
/// and knows of no change, such as its removal, that the other side may not know.
fn is_lost(chunk: &ChunkDigest, without: &DigestsAt, with: &DigestsAt) -> bool {
    chunk.last_index <= without.before && without.after <= with.before
}

#[cfg(test)]
mod tests {
    use nbd_topology::LogIndex;

    use super::*;

    fn digest(chunk: u64, last_index: u64, digest: u64) -> ChunkDigest {
        ChunkDigest { chunk: ChunkIndex(chunk), last_index: LogIndex(last_index), digest }
    }

    fn at(before: u64, after: u64, chunks: &[ChunkDigest]) -> DigestsAt {
        let (before, after) = (LogIndex(before), LogIndex(after));
        DigestsAt { before, after, chunks: chunks.to_vec() }
    }

    #[test]
    fn equal_versions_must_have_equal_content() {
        let (their, my) = (digest(4, 7, 1), digest(4, 7, 2));
        assert_eq!(mismatches(&at(9, 9, &[their]), &at(8, 8, &[my])), [ChunkIndex(4)]);
        assert!(mismatches(&at(9, 9, &[their]), &at(8, 8, &[their])).is_empty());
    }

    #[test]
    fn a_version_is_wrong_only_if_its_replica_has_applied_the_newer_one() {
        let (newer, older) = (digest(4, 7, 1), digest(4, 5, 2));
        assert!(mismatches(&at(9, 9, &[newer]), &at(6, 6, &[older])).is_empty());
        assert_eq!(mismatches(&at(9, 9, &[newer]), &at(7, 7, &[older])), [ChunkIndex(4)]);
        assert_eq!(mismatches(&at(7, 7, &[older]), &at(9, 9, &[newer])), [ChunkIndex(4)]);
    }

    #[test]
    fn a_chunk_is_lost_only_if_it_cannot_have_been_removed() {
        let chunk = digest(4, 7, 1);
        // The one without it knows nothing that the other does not know.
        assert_eq!(mismatches(&at(9, 9, &[chunk]), &at(8, 8, &[])), [ChunkIndex(4)]);
        assert_eq!(mismatches(&at(9, 9, &[]), &at(9, 9, &[chunk])), [ChunkIndex(4)]);
        // It may have been removed by an entry that the other has not applied.
        assert!(mismatches(&at(9, 9, &[chunk]), &at(8, 10, &[])).is_empty());
        // It was made by an entry that the one without it has not applied.
        assert!(mismatches(&at(9, 9, &[chunk]), &at(6, 6, &[])).is_empty());
    }
}
