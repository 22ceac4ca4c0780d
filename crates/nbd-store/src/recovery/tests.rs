use super::*;

const SHARD: ShardId = ShardId(1);

fn checkpoint(applied: u64, commit: u64) -> ShardRecord {
    let hard_state = HardState { term: Term(4), vote: 2, commit: LogIndex(commit) };
    let (applied, applied_term) = (LogIndex(applied), Term(3));
    ShardRecord { applied, applied_term, hard_state, ..ShardRecord::empty() }
}

fn scan(applied: u64, commit: u64, entries: &[(u64, u64)]) -> ShardScan {
    let mut scan = ShardScan::new(SHARD, checkpoint(applied, commit));
    for (at, (index, term)) in entries.iter().enumerate() {
        let (index, term, kind) = (LogIndex(*index), Term(*term), EntryKind::Command);
        let entry = ScannedEntry { shard: SHARD, index, term, kind, data: &[] };
        scan.see_entry(&entry, LogPosition(at as u64));
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
    assert_eq!(positions(&seen), [2, 5, 6]);
    // A conflict below the checkpoint voids what came before it.
    let seen = scan(10, 10, &[(11, 3), (12, 3), (10, 4), (11, 4)]);
    assert_eq!(positions(&seen), [3]);
    let seen = scan(10, 10, &[]);
    assert_eq!(seen.hard_state().unwrap(), checkpoint(10, 10).hard_state);
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
