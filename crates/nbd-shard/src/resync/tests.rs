use bytes::Bytes;
use nbd_store::{ChunkIndex, VolumeId};
use nbd_topology::{Membership, Term};

use super::*;

const VOLUME: VolumeId = VolumeId(1);
const SECOND: Duration = Duration::from_secs(1);

fn snapshot(applied: u64) -> Box<ShardSnapshot> {
    Box::new(ShardSnapshot {
        applied: LogIndex(applied),
        applied_term: Term(1),
        membership: Membership::default(),
        body: Bytes::new(),
    })
}

fn key(chunk: u64) -> ChunkKey {
    (VOLUME, ChunkIndex(chunk))
}

fn stamps(chunks: &[u64]) -> Vec<ChunkStamp> {
    let stamp = |&chunk: &u64| ChunkStamp {
        volume: VOLUME,
        chunk: ChunkIndex(chunk),
        last_index: LogIndex(7),
        bytes: 65536,
    };
    chunks.iter().map(stamp).collect()
}

fn page(chunks: &[u64], next: Option<u64>) -> Got {
    Got::Page { chunks: stamps(chunks), present: Vec::new(), next: next.map(key) }
}

fn compared(differing: &[u64], stale: bool, next: Option<u64>) -> Got {
    let differing = differing.iter().copied().map(key).collect();
    Got::Compared { differing, stale, next: next.map(key) }
}

/// Begun, with a snapshot at 100 for a replica that has everything up to 40.
fn asked() -> Resync {
    let mut resync = Resync::new();
    assert_eq!(resync.begin(), Want::Checkpoint);
    let want = resync.step(Duration::ZERO, Got::Checkpoint { applied: LogIndex(40) });
    assert_eq!(want, Want::Snapshot { since: LogIndex(40) });
    let want = resync.step(Duration::ZERO, Got::Snapshot { snapshot: snapshot(100) });
    assert_eq!(want, Want::Page { since: LogIndex(40), after: None });
    resync
}

/// Of the source whose snapshot is at 100.
fn fetch(chunks: &[u64]) -> Want {
    Want::Fetch { chunks: stamps(chunks), upto: LogIndex(100) }
}

/// A page of that source without any chunks.
fn absent(after: Option<u64>, next: Option<u64>) -> Absent {
    let (after, next) = (after.map(key), next.map(key));
    Absent { upto: LogIndex(100), after, next, present: Vec::new() }
}

/// As `asked`, with a manifest of one page that was dealt with.
fn walked() -> Resync {
    let mut resync = asked();
    let want = resync.step(SECOND, page(&[], None));
    assert!(matches!(want, Want::Remove(_)), "{want:?}");
    let want = resync.step(SECOND, Got::Removed);
    assert_eq!(want, Want::Compare { after: None, upto: LogIndex(100) });
    resync
}

#[test]
fn page_by_page_chunks_are_fetched_and_what_is_absent_is_removed() {
    let mut resync = asked();
    let want = resync.step(SECOND, page(&[1, 5], Some(9)));
    assert_eq!(want, fetch(&[1, 5]));
    let want = resync.step(SECOND, Got::Stored);
    assert_eq!(want, Want::Remove(absent(None, Some(9))));
    let want = resync.step(SECOND, Got::Removed);
    assert_eq!(want, Want::Page { since: LogIndex(40), after: Some(key(9)) });
    let want = resync.step(SECOND, page(&[], None));
    assert_eq!(want, Want::Remove(absent(Some(9), None)));
    let want = resync.step(SECOND, Got::Removed);
    assert_eq!(want, Want::Compare { after: None, upto: LogIndex(100) });
    let want = resync.step(SECOND, compared(&[], false, Some(2048)));
    assert_eq!(want, Want::Compare { after: Some(key(2048)), upto: LogIndex(100) });
    let want = resync.step(SECOND, compared(&[], false, None));
    assert_eq!(want, Want::Ready(snapshot(100)));
    assert!(!resync.is_told());
    resync.step(SECOND, Got::Told);
    assert!(resync.is_told());
}

#[test]
fn a_large_page_is_fetched_in_parts() {
    let mut resync = asked();
    let all: Vec<u64> = (0..FETCH_CHUNKS_MAX as u64 + 10).collect();
    let Want::Fetch { chunks, .. } = resync.step(SECOND, page(&all, None)) else { panic!() };
    assert_eq!(chunks.len(), FETCH_CHUNKS_MAX);
    let want = resync.step(SECOND, Got::Stored);
    assert_eq!(want, fetch(&all[FETCH_CHUNKS_MAX..]));
}

#[test]
fn a_broken_step_is_repeated_after_growing_pauses() {
    let mut resync = asked();
    let fetch = resync.step(SECOND, page(&[1, 5], Some(9)));
    let pauses = [PAUSE_MIN, 2 * PAUSE_MIN, 4 * PAUSE_MIN];
    for pause in pauses {
        assert_eq!(resync.step(SECOND, Got::Failed), Want::Pause(pause));
        assert_eq!(resync.step(SECOND, Got::Paused), fetch, "nothing fetched is asked for again");
    }
    // The source may be another one by now, with another checkpoint.
    assert!(matches!(resync.step(SECOND, Got::Failed), Want::Pause(_)));
    assert_eq!(resync.step(SECOND, Got::Paused), Want::Checkpoint);
    // A success starts the pauses anew.
    resync.step(SECOND, Got::Checkpoint { applied: LogIndex(40) });
    assert_eq!(resync.step(SECOND, Got::Failed), Want::Pause(PAUSE_MIN));
}

#[test]
fn another_leader_is_asked_from_the_start() {
    let mut resync = asked();
    resync.step(SECOND, page(&[1, 5], Some(9)));
    resync.source_changed();
    assert_eq!(resync.begin(), Want::Checkpoint);
    // What the old one's step comes to does not matter.
    assert_eq!(resync.step(SECOND, Got::Stored), Want::Checkpoint);
    let want = resync.step(SECOND, Got::Checkpoint { applied: LogIndex(40) });
    assert_eq!(want, Want::Snapshot { since: LogIndex(40) });
}

#[test]
fn what_differs_is_fetched_again_and_compared_again() {
    let mut resync = walked();
    resync.step(SECOND, compared(&[3], false, Some(1024)));
    let want = resync.step(SECOND, compared(&[2000], false, None));
    assert_eq!(want, Want::Refetch { chunks: vec![key(3), key(2000)], upto: LogIndex(100) });
    let want = resync.step(SECOND, Got::Stored);
    assert_eq!(want, Want::Compare { after: None, upto: LogIndex(100) });
    assert_eq!(resync.step(SECOND, compared(&[], false, None)), Want::Ready(snapshot(100)));
}

#[test]
fn what_differs_after_every_round_starts_everything_over() {
    let mut resync = walked();
    for _ in 0..ROUNDS_MAX {
        let want = resync.step(SECOND, compared(&[3], false, None));
        assert_eq!(want, Want::Refetch { chunks: vec![key(3)], upto: LogIndex(100) });
        resync.step(SECOND, Got::Stored);
    }
    let want = resync.step(SECOND, compared(&[3], false, None));
    assert_eq!(want, Want::Snapshot { since: LogIndex::ZERO });
}

#[test]
fn chunks_that_the_source_does_not_have_are_removed_by_another_pass() {
    let mut resync = walked();
    let want = resync.step(SECOND, compared(&[3], true, None));
    assert_eq!(want, Want::Snapshot { since: LogIndex(100) });
    let want = resync.step(SECOND, Got::Snapshot { snapshot: snapshot(120) });
    assert_eq!(want, Want::Page { since: LogIndex(100), after: None });
}

#[test]
fn a_long_pass_is_followed_by_one_over_what_changed_meanwhile() {
    let mut resync = asked();
    resync.step(60 * SECOND, page(&[], None));
    let want = resync.step(60 * SECOND, Got::Removed);
    assert_eq!(want, Want::Snapshot { since: LogIndex(100) });
    let want = resync.step(60 * SECOND, Got::Snapshot { snapshot: snapshot(900) });
    assert_eq!(want, Want::Page { since: LogIndex(100), after: None });
    resync.step(61 * SECOND, page(&[], None));
    let want = resync.step(61 * SECOND, Got::Removed);
    assert_eq!(want, Want::Compare { after: None, upto: LogIndex(900) });
}

#[test]
fn long_passes_come_to_an_end() {
    let mut resync = asked();
    let mut now = Duration::ZERO;
    for pass in 1..=PASSES_MAX {
        now += 60 * SECOND;
        resync.step(now, page(&[], None));
        let want = resync.step(now, Got::Removed);
        if pass == PASSES_MAX {
            assert!(matches!(want, Want::Compare { .. }), "{want:?}");
        } else {
            assert!(matches!(want, Want::Snapshot { .. }), "{want:?}");
            resync.step(now, Got::Snapshot { snapshot: snapshot(100 + u64::from(pass)) });
        }
    }
}
