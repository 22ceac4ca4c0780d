use super::*;

const SHARD: ShardId = ShardId(1);

fn checkpoint(applied: u64, commit: u64) -> ShardRecord {
    let hard_state = HardState { term: Term(4), vote: 2, commit: LogIndex(commit) };
    let (applied, applied_term) = (LogIndex(applied), Term(3));
    ShardRecord { applied, applied_term, hard_state, ..ShardRecord::empty() }
}

fn scan(applied: u64, commit: u64, entries: &[(u64, u64)]) -> ShardScan {
    let mut scan = ShardScan::new(SHARD, checkpoint(applied, commit));
    for (at, (index, term)) in (1..).zip(entries) {
        let (index, term, kind) = (LogIndex(*index), Term(*term), EntryKind::Command);
        let entry = ScannedEntry { shard: SHARD, index, term, kind, data: &[] };
        scan.see_entry(&entry, LogPosition(at));
    }
    scan
}

fn positions(scan: &ShardScan) -> Vec<u64> {
    scan.entries.iter().map(|entry| entry.position.0).collect()
}

fn with(mut scan: ShardScan, term: u64, vote: u64, commit: u64) -> HardState {
    scan.see_hard_state(HardState { term: Term(term), vote, commit: LogIndex(commit) });
    scan.hard_state().unwrap()
}

#[test]
fn the_newest_record_of_an_index_counts() {
    let seen = scan(10, 10, &[(9, 3), (10, 3), (11, 3), (12, 3), (13, 3), (12, 4), (13, 5)]);
    assert_eq!(positions(&seen), [1, 2, 3, 6, 7]);
    assert_eq!(seen.first_position(), Some(LogPosition(3)), "the first to be replayed");
    // A conflict below the checkpoint voids what came before it.
    let seen = scan(10, 10, &[(11, 3), (12, 3), (10, 4), (11, 4)]);
    assert_eq!(positions(&seen), [3, 4]);
    let seen = scan(10, 10, &[]);
    assert_eq!(seen.hard_state().unwrap(), checkpoint(10, 10).hard_state);
}

#[test]
fn copies_supersede_nothing() {
    // Copies of 11 and 12, half of what was to be copied when power failed.
    let seen = scan(10, 10, &[(11, 3), (12, 3), (13, 4), (11, 3), (12, 3)]);
    assert_eq!(positions(&seen), [4, 5, 3]);
    assert_eq!(seen.tail_begins(), Some(LogPosition(0)), "13 must not be found before 11");
    // What came before copies has been let go, in part.
    let seen = scan(10, 10, &[(13, 4), (14, 4), (11, 3), (12, 3), (13, 4), (14, 4), (15, 4)]);
    assert_eq!(positions(&seen), [3, 4, 5, 6, 7]);
    assert_eq!(seen.missing(), None);
    assert_eq!(seen.tail_begins(), Some(LogPosition(3)));
    assert_eq!(scan(10, 10, &[(9, 3), (10, 3)]).tail_begins(), None);
}

fn kept(mut scan: ShardScan) -> (u64, u64, Vec<u64>) {
    let Kept { compacted: (index, term), entries } = scan.kept();
    (index.0, term.0, entries.iter().map(|entry| entry.index.0).collect())
}

#[test]
fn entries_below_the_checkpoint_are_kept_as_far_as_they_reach_it() {
    // The term before the first is not known, so that the first takes the part of what is before.
    assert_eq!(kept(scan(10, 10, &[(8, 2), (9, 3), (10, 3), (11, 4)])), (8, 2, vec![9, 10, 11]));
    assert_eq!(kept(scan(10, 10, &[(8, 2), (9, 3), (10, 3)])), (8, 2, vec![9, 10]));
    assert_eq!(kept(scan(10, 10, &[(11, 4)])), (10, 3, vec![11]), "the checkpoint's own term");
    assert_eq!(kept(scan(2, 2, &[(1, 1), (2, 1), (3, 1)])), (0, 0, vec![1, 2, 3]));
    assert_eq!(kept(scan(10, 10, &[])), (10, 3, vec![]));
    // Gaps make what came before useless, but are no loss: it is home.
    assert_eq!(kept(scan(10, 10, &[(4, 2), (5, 2), (8, 2), (9, 3), (10, 3)])), (8, 2, vec![9, 10]));
    assert_eq!(kept(scan(10, 10, &[(4, 2), (5, 2), (11, 3)])), (10, 3, vec![11]));
    assert_eq!(kept(scan(10, 10, &[(4, 2), (5, 2)])), (10, 3, vec![]));
}

#[test]
fn entries_that_do_not_lie_behind_the_floor_are_void() {
    let record = ShardRecord { log_floor: LogPosition(5), ..checkpoint(10, 10) };
    let mut scan = ShardScan::new(SHARD, record);
    let entry = |index| {
        let (index, term, kind) = (LogIndex(index), Term(3), EntryKind::Command);
        ScannedEntry { shard: SHARD, index, term, kind, data: &[] }
    };
    for (position, index) in [(3, 9), (4, 12), (5, 13), (6, 11), (7, 12)] {
        scan.see_entry(&entry(index), LogPosition(position));
    }
    assert_eq!(scan.missing(), None);
    assert_eq!(positions(&scan), [6, 7]);
}

#[test]
fn gaps_are_refused() {
    let missing = |expected, found| MissingEntries {
        shard: SHARD,
        expected: LogIndex(expected),
        found: LogIndex(found),
    };
    assert_eq!(scan(10, 10, &[(12, 3)]).hard_state(), Err(missing(11, 12)));
    assert_eq!(scan(10, 10, &[(11, 3), (13, 3)]).hard_state(), Err(missing(12, 13)));
    assert_eq!(scan(10, 12, &[(11, 3)]).hard_state(), Err(missing(12, 12)));
}

#[test]
fn the_newer_vote_counts_and_commits_only_grow() {
    let entries = [(11, 4), (12, 4), (13, 4)];
    let state = |term, vote, commit| HardState { term: Term(term), vote, commit: LogIndex(commit) };
    assert_eq!(with(scan(10, 11, &entries), 5, 3, 12), state(5, 3, 12));
    assert_eq!(with(scan(10, 11, &entries), 5, 0, 0), state(5, 0, 11));
    assert_eq!(with(scan(10, 11, &entries), 4, 0, 12), state(4, 2, 12), "same term, vote kept");
    assert_eq!(
        with(scan(10, 11, &entries), 3, 1, 12),
        state(4, 2, 12),
        "older than the checkpoint"
    );
    assert_eq!(with(scan(10, 10, &entries), 5, 3, 99), state(5, 3, 13), "not past what is here");
}
