use nbd_topology::Term;

use super::*;
use crate::effect::HardState as OurHardState;

const DATA_BYTES: usize = 100;
const ENTRY_BYTES: usize = DATA_BYTES + ENTRY_OVERHEAD_BYTES;

fn entry(index: u64, term: u64) -> Entry {
    Entry { index, term, data: vec![0; DATA_BYTES].into(), ..Entry::default() }
}

/// Empty, with room for `entries` applied ones.
fn cache(entries: usize) -> LogCache {
    LogCache::new(&Recovered::default(), entries * ENTRY_BYTES)
}

/// Entries 1..=10 of the terms 1 1 1 2 2 2 2 5 5 5.
fn ten(room: usize) -> LogCache {
    let mut cache = cache(room);
    let terms = [1, 1, 1, 2, 2, 2, 2, 5, 5, 5];
    let entries: Vec<_> = (1..).zip(terms).map(|(index, term)| entry(index, term)).collect();
    cache.append(&entries);
    cache
}

fn terms(cache: &LogCache) -> Vec<u64> {
    (cache.first_index().unwrap()..=cache.last()).map(|index| cache.term(index).unwrap()).collect()
}

fn read(cache: &LogCache, low: u64, high: u64, bytes_max: u64) -> raft::Result<Vec<u64>> {
    let entries = cache.entries(low, high, bytes_max, GetEntriesContext::empty(true))?;
    Ok(entries.iter().map(|entry| entry.index).collect())
}

#[test]
fn terms_are_kept_as_runs() {
    let mut cache = ten(100);
    assert_eq!(cache.runs.len(), 3);
    assert_eq!(terms(&cache), [1, 1, 1, 2, 2, 2, 2, 5, 5, 5]);
    assert_eq!(cache.term(0), Ok(0));
    assert_eq!(cache.term(11), Err(StorageError::Unavailable.into()));
    cache.applied_to(10);
    // Every cut leaves the same terms behind it, and the term of the cut.
    for cut in 1..=10 {
        cache.compact(cut);
        let index = usize::try_from(cut).unwrap();
        assert_eq!(terms(&cache), [1, 1, 1, 2, 2, 2, 2, 5, 5, 5][index..], "{cut}");
        assert_eq!(cache.term(cut), Ok([1, 1, 1, 2, 2, 2, 2, 5, 5, 5][index - 1]));
        assert_eq!(cache.term(cut - 1), Err(StorageError::Compacted.into()));
        assert_eq!(read(&cache, cut, cut + 1, 1), Err(StorageError::Compacted.into()));
    }
    assert!(cache.runs.is_empty() && cache.window.is_empty() && cache.window_bytes == 0);
    cache.append(&[entry(11, 5)]);
    assert_eq!(terms(&cache), [5]);
}

#[test]
fn a_conflict_replaces_the_tail() {
    for from in 1..=11_u64 {
        let mut cache = ten(100);
        cache.append(&[entry(from, 7), entry(from + 1, 9)]);
        let keep = usize::try_from(from - 1).unwrap();
        let mut expected = [1, 1, 1, 2, 2, 2, 2, 5, 5, 5][..keep].to_vec();
        expected.extend([7, 9]);
        assert_eq!(terms(&cache), expected);
        assert_eq!(cache.window_bytes, expected.len() * ENTRY_BYTES);
    }
}

#[test]
#[should_panic(expected = "entry 3 is already applied")]
fn applied_entries_are_not_replaced() {
    let mut cache = ten(100);
    cache.applied_to(3);
    cache.append(&[entry(3, 7)]);
}

#[test]
#[should_panic(expected = "gap in the log")]
fn the_log_has_no_gaps() {
    ten(100).append(&[entry(12, 7)]);
}

#[test]
fn data_of_applied_entries_is_bounded() {
    let mut cache = ten(4);
    assert_eq!(cache.window_first(), 1, "nothing is applied");
    cache.applied_to(3);
    assert_eq!(cache.window_first(), 4);
    cache.applied_to(10);
    assert_eq!(cache.window_first(), 7);
    assert_eq!(cache.window_bytes, 4 * ENTRY_BYTES);
    assert_eq!(terms(&cache).len(), 10);
}

#[test]
fn reads_are_bounded_but_never_empty() {
    let cache = ten(100);
    let size = u64::from(entry(1, 1).compute_size());
    assert_eq!(read(&cache, 2, 11, u64::MAX).unwrap(), [2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(read(&cache, 2, 5, u64::MAX).unwrap(), [2, 3, 4]);
    assert_eq!(read(&cache, 2, 11, 3 * size).unwrap(), [2, 3, 4]);
    assert_eq!(read(&cache, 2, 11, 3 * size - 1).unwrap(), [2, 3]);
    assert_eq!(read(&cache, 2, 11, 0).unwrap(), [2]);
    assert_eq!(read(&cache, 11, 11, 0).unwrap(), []);
}

#[test]
fn evicted_entries_are_fetched() {
    let mut cache = ten(4);
    cache.applied_to(10);
    let later = Err(StorageError::LogTemporarilyUnavailable.into());
    assert_eq!(read(&cache, 3, 11, 500), later);
    assert_eq!(read(&cache, 3, 11, 500), later);
    let fetch = Fetch { first: LogIndex(3), last: LogIndex(6), bytes_max: 500 };
    assert_eq!(cache.take_fetches(), [fetch], "asked for once, up to what is in memory");
    assert_eq!(cache.take_fetches(), []);

    assert_eq!(cache.arrived(3, vec![entry(3, 1), entry(4, 2)]).len(), 2);
    assert_eq!(read(&cache, 3, 11, 500).unwrap(), [3, 4]);
    assert_eq!(read(&cache, 4, 11, 500).unwrap(), [4]);
    cache.forget_arrived();
    assert_eq!(read(&cache, 4, 11, 500), later);
    assert_eq!(cache.take_fetches().len(), 1);

    // Answers that do not fit the log are as good as none.
    for bad in [vec![], vec![entry(4, 1)], vec![entry(5, 2)], vec![entry(4, 2), entry(6, 2)]] {
        assert!(cache.arrived(4, bad).is_empty());
        assert_eq!(read(&cache, 4, 11, 500), later);
        assert_eq!(cache.take_fetches().len(), 1);
    }
    // Nor is one that comes after compaction.
    cache.compact(5);
    assert!(cache.arrived(4, vec![entry(4, 2)]).is_empty());
    assert_eq!(read(&cache, 4, 11, 500), Err(StorageError::Compacted.into()));
}

#[test]
fn open_fetches_are_bounded() {
    let mut cache = ten(0);
    cache.applied_to(10);
    for _ in 0..10 {
        for low in 1..=10 {
            assert!(read(&cache, low, low + 1, 1).is_err());
        }
    }
    assert_eq!(cache.fetches.borrow().waiting.len(), FETCHES_MAX);
}

#[test]
fn a_snapshot_is_a_checkpoint_that_the_log_goes_on_from() {
    let mut cache = ten(100);
    let unavailable = Err(StorageError::SnapshotTemporarilyUnavailable.into());
    assert_eq!(cache.snapshot(0, 9), unavailable);
    cache.applied_to(10);
    cache.offer(7, 2, &Membership::of_voters(ReplicaId::new(2)));
    assert_eq!(cache.offered(), Some(7));
    let snapshot = cache.snapshot(7, 9).unwrap();
    let metadata = snapshot.get_metadata();
    assert_eq!((metadata.index, metadata.term), (7, 2));
    assert_eq!((metadata.get_conf_state().voters.clone(), snapshot.data.len()), (vec![2], 0));
    assert_eq!(cache.snapshot(8, 9), unavailable);
    cache.compact(7);
    assert!(cache.snapshot(0, 9).is_ok());
    cache.compact(8);
    assert_eq!(cache.snapshot(0, 9), unavailable, "what follows it is gone");
}

#[test]
fn recovery_keeps_terms_and_tail() {
    let tail: Vec<_> = (4..=5)
        .map(|index| crate::Entry {
            index: LogIndex(index),
            term: Term(3),
            kind: crate::EntryKind::Command,
            data: vec![1].into(),
        })
        .collect();
    let recovered = Recovered {
        hard_state: OurHardState { term: Term(3), vote: ReplicaId::new(2), commit: LogIndex(4) },
        membership: Membership::of_voters(ReplicaId::new(2)),
        applied: LogIndex(3),
        compacted: (LogIndex(1), Term(1)),
        terms: vec![Term(1), Term(2), Term(3), Term(3)],
        tail,
    };
    let cache = LogCache::new(&recovered, 0);
    assert_eq!((cache.compacted(), cache.last(), cache.window_first()), (1, 5, 4));
    assert_eq!(terms(&cache), [1, 2, 3, 3]);
    let state = cache.initial_state().unwrap();
    assert_eq!((state.hard_state.term, state.hard_state.vote, state.hard_state.commit), (3, 2, 4));
    assert_eq!(state.conf_state.voters, [2]);
}
