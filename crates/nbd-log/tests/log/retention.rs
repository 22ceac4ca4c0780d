//! Keeping covered entries for followers, and giving them up.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbd_log::io::MemoryDisk;
use nbd_log::log::{AppendError, LogPosition};
use nbd_topology::{LogIndex, ShardId};

use crate::support::{Opened, SEGMENT, entry, free, open, payload};

const SHARD: ShardId = ShardId(0);

fn covered(index: u64) -> BTreeMap<ShardId, LogIndex> {
    BTreeMap::from([(SHARD, LogIndex(index))])
}

/// Appends entries, two to a segment.
fn append(log: &mut Opened, indexes: std::ops::RangeInclusive<u64>) {
    for index in indexes {
        try_append(log, 0, index).unwrap();
    }
}

fn try_append(log: &mut Opened, shard: u32, index: u64) -> Result<LogPosition, AppendError> {
    let half = usize::try_from(SEGMENT / 2).unwrap() - 3 * 4096;
    let positions = log.append(&[entry(shard, index, payload(index, half))])?;
    Ok(positions[0])
}

#[test]
fn retained_entries_stay_though_they_are_covered() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    append(&mut log, 1..=8);
    let before = segments.live_bytes();
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(1)));
    assert_eq!(segments.first_kept(ShardId(1)), None);
    segments.retain(SHARD, LogIndex(2));
    assert_eq!(free(&segments, &covered(6)), 1);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(3)));
    // Two segments are in nobody's way: they are no reason to slow writers down.
    assert_eq!(segments.retained_bytes(), 2 * SEGMENT);
    assert_eq!(segments.live_bytes(), before - 3 * SEGMENT);
    assert!(!segments.could_free(&covered(6)));
    segments.retain(SHARD, LogIndex(u64::MAX));
    assert!(segments.could_free(&covered(6)));
    assert_eq!(free(&segments, &covered(6)), 2);
    assert_eq!(segments.retained_bytes(), 0);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(7)));
}

#[test]
fn what_is_retained_gives_way_to_new_entries_and_what_is_not_covered_does_not() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    segments.retain(SHARD, LogIndex::ZERO);
    append(&mut log, 1..=12);
    assert!(matches!(try_append(&mut log, 0, 13), Err(AppendError::Full)));
    assert_eq!(free(&segments, &covered(6)), 0);
    append(&mut log, 13..=14);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(3)), "only as many as needed");
    append(&mut log, 15..=18);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(7)));
    assert!(matches!(try_append(&mut log, 0, 19), Err(AppendError::Full)));
    let found = open(&disk, 2).records();
    assert_eq!(found.len(), 12, "all that no checkpoint covers");
}

#[test]
fn what_is_retained_gives_way_on_a_full_disk() {
    let disk = MemoryDisk::new(1);
    disk.set_capacity(3 * SEGMENT + SEGMENT / 2);
    let mut log = open(&disk, 1);
    log.log.segments.retain(SHARD, LogIndex::ZERO);
    append(&mut log, 1..=6);
    assert!(matches!(try_append(&mut log, 0, 7), Err(AppendError::NoSpace)));
    free(&log.log.segments, &covered(2));
    append(&mut log, 7..=8);
    assert!(matches!(try_append(&mut log, 0, 9), Err(AppendError::NoSpace)));
}

#[test]
fn a_pin_keeps_segments_that_give_way_readable() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    segments.retain(SHARD, LogIndex::ZERO);
    append(&mut log, 1..=12);
    free(&segments, &covered(6));
    let pin = log.log.reader.pin();
    assert!(matches!(try_append(&mut log, 0, 13), Err(AppendError::Full)));
    drop(pin);
    append(&mut log, 13..=13);
}

#[test]
fn entries_that_were_written_again_count_once() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    append(&mut log, 1..=6);
    append(&mut log, 4..=7);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(1)));
    assert_eq!(free(&segments, &covered(2)), 1);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(3)));
    // The next batch says on disk what was freed.
    append(&mut log, 8..=8);
    assert_eq!(open(&disk, 2).log.segments.first_kept(SHARD), Some(LogIndex(3)), "found again");
}

#[test]
fn void_entries_keep_no_segment_and_count_for_nothing() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    // The fifth shares a segment with what comes behind the snapshot.
    append(&mut log, 1..=5);
    let floor = segments.next_position();
    segments.void(SHARD, floor, None);
    assert_eq!(segments.first_kept(SHARD), None);
    let first = try_append(&mut log, 0, 4).unwrap();
    assert!(first > floor);
    append(&mut log, 5..=6);
    assert_eq!(segments.first_kept(SHARD), Some(LogIndex(4)));
    assert_eq!(free(&segments, &covered(3)), 2, "the void entries 4 and 5 keep nothing");

    // Opened again, it has to be told.
    let log = open(&disk, 2);
    let behind = Some((LogIndex(4), LogIndex(4)));
    log.log.segments.void(SHARD, floor, behind);
    assert_eq!(log.log.segments.first_kept(SHARD), Some(LogIndex(4)));
}

// Goal: a shard without a majority, whose entries nothing covers, does not fill the log for all
// others: room is left for it, and copies of its entries let go of all that lay behind them.
#[test]
fn entries_that_hold_up_the_log_can_be_copied_to_its_end() {
    const STUCK: ShardId = ShardId(1);
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    try_append(&mut log, STUCK.0, 1).unwrap();
    try_append(&mut log, STUCK.0, 2).unwrap();
    // Six segments, of which ordinary writes leave one.
    let ordinary = |log: &mut Opened, index| {
        let entry = entry(0, index, payload(index, 200_000));
        log.log.writer.append_ordinary(&[entry.record()]).map(|_| ())
    };
    let full = (1..).find(|index| ordinary(&mut log, *index).is_err()).unwrap();
    let all = BTreeMap::from([(SHARD, LogIndex(full - 1)), (STUCK, LogIndex(0))]);
    assert_eq!(free(&segments, &all), 0, "the oldest segment stays");
    assert!(matches!(ordinary(&mut log, full), Err(AppendError::Full)));
    assert!(segments.is_held_up_by(STUCK) && !segments.is_held_up_by(SHARD));

    // One of its two entries has been applied.
    let copy = try_append(&mut log, STUCK.0, 2).unwrap();
    segments.tail_begins(STUCK, LogIndex(1), copy);
    assert!(!segments.is_held_up_by(SHARD));
    assert_eq!(free(&segments, &all), 0, "entry 1 is applied, but not covered");
    let all = BTreeMap::from([(SHARD, LogIndex(full - 1)), (STUCK, LogIndex(1))]);
    assert!(free(&segments, &all) >= 4);
    assert!(!segments.is_held_up_by(STUCK));
    assert_eq!(segments.first_kept(STUCK), Some(LogIndex(2)));
    ordinary(&mut log, full).unwrap();
}

#[test]
fn a_segment_with_newer_hard_states_stays() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    append(&mut log, 1..=3);
    let stored = segments.hard_states();
    append(&mut log, 4..=6);
    // The second segment was active when the hard states were looked at.
    assert_eq!(segments.free_through(&covered(6), &stored), 1);
    assert_eq!(free(&segments, &covered(6)), 1);
}
