//! Appending, rotating, freeing and reading back.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use nbd_log::io::{Disk, MemoryDisk};
use nbd_log::log::{AppendError, LogOptions, LogPosition, LogReadError, OptionsError};
use nbd_topology::{LogIndex, ShardId};

use crate::support::{
    BLOCK, Kept, OPTIONS, Opened, SEGMENT, entry, free, hard_state, open, open_with, payload,
    read_file,
};

fn covered(index: u64) -> BTreeMap<ShardId, LogIndex> {
    BTreeMap::from([(ShardId(0), LogIndex(index))])
}

/// Appends entries `from..` of half a segment each until `count` more segments have been begun.
fn fill_segments(log: &mut Opened, from: u64, count: u64) -> (u64, Vec<LogPosition>) {
    let mut positions = Vec::new();
    for index in from..from + 2 * count {
        let half = usize::try_from(SEGMENT / 2 - 3 * BLOCK).unwrap();
        positions.extend(log.append(&[entry(0, index, payload(index, half))]).unwrap());
    }
    (from + 2 * count, positions)
}

fn check_data(log: &Opened, record: &Kept, position: LogPosition) {
    let Some(data) = record.data() else { return };
    let mut buf = vec![0; data.len()];
    log.log.reader.read(position, &mut buf).unwrap();
    assert_eq!(buf, data[..]);
}

#[test]
fn records_come_back_in_order_with_their_positions() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    assert!(log.found.is_empty());
    let mut written = Vec::new();
    for index in 1..20 {
        let len = [0, 1, 31, 4096, 5000, 100_000][usize::try_from(index).unwrap() % 6];
        let records = [hard_state(1, index, 1, index - 1), entry(0, index, payload(index, len))];
        let positions = log.append(&records).unwrap();
        written.extend(records.into_iter().zip(positions));
    }
    assert!(log.append(&[]).unwrap().is_empty());
    for seed in [2, 3] {
        let log = open(&disk, seed);
        assert_eq!(log.found, written);
        for (record, position) in &written {
            check_data(&log, record, *position);
        }
    }
}

#[test]
fn the_largest_entry_fits_and_a_larger_one_is_refused() {
    let disk = MemoryDisk::new(1);
    let options = LogOptions { segment_bytes: 4 << 20, log_bytes_max: 16 << 20, ..OPTIONS };
    assert_eq!(options.entry_bytes_max(), 2 << 20);
    for (options, disk) in [(options, &disk), (OPTIONS, &MemoryDisk::new(2))] {
        let max = options.entry_bytes_max();
        let mut log = open_with(Arc::new(disk.clone()), options, 1).unwrap();
        let entries = [1, 2, 3].map(|index| entry(0, index, payload(index, max)));
        let positions = log.append(&entries).unwrap();
        let refused = log.append(&[entry(0, 4, Bytes::new()), entry(0, 5, payload(5, max + 1))]);
        assert!(matches!(refused, Err(AppendError::TooLarge { bytes, .. }) if bytes == max + 1));
        let found = open_with(Arc::new(disk.clone()), options, 2).unwrap().found;
        assert_eq!(found, entries.into_iter().zip(positions).collect::<Vec<_>>());
    }
}

// Goal: one append of more than a batch and more than a segment is split, and reads back whole.
#[test]
fn a_large_append_is_split_into_batches() {
    let disk = MemoryDisk::new(1);
    let options = LogOptions { segment_bytes: 20 << 20, log_bytes_max: 60 << 20, ..OPTIONS };
    let mut log = open_with(Arc::new(disk.clone()), options, 1).unwrap();
    let entries: Vec<_> = (1..=30).map(|i| entry(0, i, payload(i, 1_000_000))).collect();
    let before = disk.sync_points();
    let positions = log.append(&entries).unwrap();
    // Two segments of three calls each to make, a header for each, and 8 + 8 + 3 + 8 + 3 MB of
    // batches.
    assert_eq!(disk.sync_points() - before, 2 * 2 + 2 + 5);
    let found = open_with(Arc::new(disk), options, 2).unwrap().found;
    assert_eq!(found, entries.into_iter().zip(positions).collect::<Vec<_>>());
}

#[test]
fn small_batches_take_one_device_write() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    log.append(&[hard_state(0, 1, 1, 0)]).unwrap();
    let before = disk.sync_points();
    let entries: Vec<_> = (1..=64).map(|i| entry(0, i, payload(i, 4096 + 96))).collect();
    log.append(&entries).unwrap();
    assert_eq!(disk.sync_points() - before, 1);
    assert_eq!(log.log.segments.live_bytes(), (2 + 67) * BLOCK);
}

// Goal: a full log refuses without writing, and goes on once a checkpoint has freed segments.
#[test]
fn full_then_freed_then_recycled() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    let (next, _) = fill_segments(&mut log, 1, 6);
    assert_eq!(segments.live_bytes() / SEGMENT, 5);
    let points = disk.sync_points();
    for _ in 0..2 {
        let refused = log.append(&[entry(0, next, payload(next, 100_000))]);
        assert!(matches!(refused, Err(AppendError::Full)));
    }
    assert!(!segments.prepare_spare().unwrap());
    assert_eq!(disk.sync_points(), points);
    // The third segment is covered in half.
    assert_eq!(free(&segments, &covered(5)), 2);
    assert_eq!(free(&segments, &covered(5)), 0);
    let (next, _) = fill_segments(&mut log, next, 2);
    let refused = log.append(&[entry(0, next, payload(next, 100_000))]);
    assert!(matches!(refused, Err(AppendError::Full)));
    assert_eq!(disk.list("log").unwrap().len(), 6);
    let found = open(&disk, 2).records();
    assert_eq!(found.len(), 12);
    assert!(found[0] == entry(0, 5, found[0].data().unwrap().clone()));
    // Everything may go but the active segment.
    assert_eq!(free(&segments, &covered(u64::MAX)), 5);
    assert!(segments.live_bytes() <= SEGMENT);
}

#[test]
fn only_whole_prefixes_are_freed() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    log.append(&[entry(9, 1, payload(0, 10))]).unwrap();
    fill_segments(&mut log, 1, 3);
    // The first segment holds an entry of a shard that is not covered; later ones do not.
    assert_eq!(free(&segments, &covered(u64::MAX)), 0);
    let both = BTreeMap::from([(ShardId(0), LogIndex(100)), (ShardId(9), LogIndex(1))]);
    assert_eq!(free(&segments, &both), 2);
}

// Goal: bytes of an earlier use of a file are never read as part of the log.
// Method: fill a file with batches, free it, recycle it with a single small batch.
#[test]
fn stale_batches_of_a_recycled_segment_are_not_read() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    let mut last = 0;
    let mut append_while = |condition: &dyn Fn(u64) -> bool| {
        while condition(segments.live_bytes()) {
            last += 1;
            log.append(&[entry(0, last, payload(last, 3000))]).unwrap();
        }
        last
    };
    let last = append_while(&|live| live <= 3 * SEGMENT);
    assert_eq!(free(&segments, &covered(last)), 3);
    let files = disk.list("log").unwrap();
    let last = append_while(&|live| live <= SEGMENT);
    assert_eq!(segments.live_bytes(), SEGMENT + 2 * BLOCK);
    assert_eq!(disk.list("log").unwrap(), files);
    assert!(read_file(&disk, "log/000000.seg", 2 * BLOCK, 8) == b"CBLOGBAT");

    let found = open(&disk, 2).records();
    let first = last + 1 - u64::try_from(found.len()).unwrap();
    let expected: Vec<_> = (first..=last).map(|i| entry(0, i, payload(i, 3000))).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_pin_keeps_freed_segments_readable() {
    let disk = MemoryDisk::new(1);
    let options = LogOptions { cache_bytes_max: 0, ..OPTIONS };
    let mut log = open_with(Arc::new(disk), options, 1).unwrap();
    let (segments, reader) = (Arc::clone(&log.log.segments), log.log.reader.clone());
    let (next, positions) = fill_segments(&mut log, 1, 4);
    let read = |n: usize| {
        let mut buf = [0; 16];
        reader.read(positions[n], &mut buf)?;
        assert_eq!(buf, payload(n as u64 + 1, 16)[..]);
        Ok::<_, LogReadError>(())
    };
    let first = reader.pin();
    assert_eq!(free(&segments, &covered(2)), 1);
    let second = reader.pin();
    assert_eq!(free(&segments, &covered(4)), 1);
    let third = reader.pin();
    // A later group waits for the pins of earlier ones.
    drop(second);
    assert_eq!(segments.release(), 0);
    (0..8).try_for_each(read).unwrap();
    let copy = first.clone();
    drop(first);
    assert_eq!(segments.release(), 0);
    drop(copy);
    assert_eq!(segments.release(), 2);
    assert!(matches!(read(0), Err(LogReadError::Freed { position }) if position == positions[0]));
    assert!(matches!(read(3), Err(LogReadError::Freed { .. })));
    (4..8).try_for_each(read).unwrap();
    // The pin that is left is of the present epoch: it holds what is live now.
    assert_eq!(free(&segments, &covered(6)), 1);
    assert_eq!(segments.release(), 2);
    read(4).unwrap();
    drop(third);
    assert_eq!(segments.release(), 3);
    fill_segments(&mut log, next, 4);
    assert!(read(4).is_err());
}

#[test]
fn the_cache_serves_slices_of_the_entry_and_forgets_the_oldest() {
    let disk = MemoryDisk::new(1);
    let options = LogOptions { cache_bytes_max: 10_000, ..OPTIONS };
    let mut log = open_with(Arc::new(disk.clone()), options, 1).unwrap();
    let data = [payload(1, 4000), payload(2, 4000), payload(3, 4000)];
    let records: Vec<_> = (1..).zip(&data).map(|(i, d)| entry(0, i, d.clone())).collect();
    let positions = log.append(&records).unwrap();
    let reader = &log.log.reader;
    assert_eq!(reader.cached(positions[0], 1), None);
    let slice = reader.cached(positions[2].plus(1000), 500).unwrap();
    assert_eq!(slice.as_ptr(), data[2][1000..].as_ptr());
    assert_eq!(slice, data[2][1000..1500]);
    assert_eq!(reader.cached(positions[2].plus(3999), 2), None);
    assert_eq!(reader.cached(positions[2].plus(4000), 1), None);
    // Misses come from the file, if that needs no waiting.
    let mut buf = [0; 100];
    assert!(reader.try_read(positions[0].plus(10), &mut buf).unwrap());
    assert_eq!(buf, data[0][10..110]);
    disk.set_cached_reads(false);
    assert!(!reader.try_read(positions[0].plus(10), &mut buf).unwrap());
    assert!(reader.try_read(positions[2].plus(10), &mut buf).unwrap());
    let past = LogPosition(2 * SEGMENT - 50);
    assert!(matches!(reader.read(past, &mut buf), Err(LogReadError::OutOfRange { .. })));
    assert!(matches!(reader.read(LogPosition(5), &mut buf), Err(LogReadError::Freed { .. })));
}

// Goal: a failed write is final, and what recovery then shows is there for good.
// Method: the write reports an error though its data stays visible in the page cache; reopen, then
// lose power.
#[test]
fn a_write_error_poisons_the_writer() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let records = [entry(0, 1, payload(1, 5000)), entry(0, 2, payload(2, 5000))];
    log.append(&records[..1]).unwrap();
    disk.fail_sync_at(disk.sync_points() + 1);
    let error = log.append(&records[1..]).unwrap_err();
    assert!(matches!(&error, AppendError::Write { file, .. } if file == "log/000000.seg"));
    for _ in 0..2 {
        assert!(matches!(log.append(&records[1..]), Err(AppendError::Failed)));
    }
    let seen = open(&disk, 2).records();
    assert_eq!(seen, records);
    let after = disk.after_crash_as(nbd_log::io::CrashStyle::Clean, 0);
    assert_eq!(open(&after, 3).records(), records);
}

#[test]
fn a_full_disk_refuses_a_new_segment_and_nothing_else() {
    let disk = MemoryDisk::new(1);
    disk.set_capacity(2 * SEGMENT + SEGMENT / 2);
    let mut log = open(&disk, 1);
    let (next, _) = fill_segments(&mut log, 1, 2);
    let record = [entry(0, next, payload(next, 100_000))];
    assert!(matches!(log.append(&record), Err(AppendError::NoSpace)));
    assert!(log.log.segments.prepare_spare().is_err());
    assert_eq!(disk.list("log").unwrap().len(), 2);
    log.append(&[hard_state(0, 1, 1, 1)]).unwrap();
    free(&log.log.segments, &covered(2));
    log.append(&record).unwrap();
    assert_eq!(open(&disk, 2).records().last(), record.last());
}

#[test]
fn a_prepared_spare_is_used() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    assert_eq!(disk.list("log").unwrap(), [""; 0]);
    assert!(log.log.segments.prepare_spare().unwrap());
    assert!(!log.log.segments.prepare_spare().unwrap());
    let before = disk.sync_points();
    log.append(&[hard_state(0, 1, 1, 1)]).unwrap();
    assert_eq!(disk.sync_points() - before, 2);
    assert_eq!(read_file(&disk, "log/000000.seg", 0, 8), b"CBLOGSEG");
    assert!(log.log.segments.prepare_spare().unwrap());
    assert_eq!(disk.list("log").unwrap(), ["000000.seg", "000001.seg"]);
    // A spare that was never used stays one.
    let mut log = open(&disk, 2);
    assert!(!log.log.segments.prepare_spare().unwrap());
    fill_segments(&mut log, 1, 1);
}

#[test]
fn the_newest_hard_states_are_kept_at_hand() {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let segments = Arc::clone(&log.log.segments);
    assert!(segments.hard_states().states.is_empty());
    log.append(&[hard_state(0, 1, 1, 0), hard_state(1, 7, 0, 3), hard_state(0, 2, 3, 9)]).unwrap();
    let states = segments.hard_states();
    let newest = [(0, hard_state(0, 2, 3, 9)), (1, hard_state(1, 7, 0, 3))];
    for (shard, expected) in newest {
        assert_eq!(Kept::HardState(ShardId(shard), states.states[&ShardId(shard)]), expected);
    }
    disk.fail_sync_at(disk.sync_points() + 1);
    log.append(&[hard_state(0, 3, 3, 10)]).unwrap_err();
    assert_eq!(segments.hard_states(), states);
    assert_eq!(segments.file_bytes(), SEGMENT);
    assert!(open(&disk, 2).log.segments.hard_states().states.is_empty());
}

#[test]
fn impossible_sizes_are_refused() {
    let with = |segment_bytes, log_bytes_max| {
        LogOptions { segment_bytes, log_bytes_max, ..OPTIONS }.validate()
    };
    assert_eq!(with(SEGMENT, 3 * SEGMENT), Ok(()));
    let given = SEGMENT + 512;
    assert_eq!(with(given, 1 << 40), Err(OptionsError::SegmentBytes { given }));
    assert_eq!(with(4096, 1 << 40), Err(OptionsError::SegmentBytes { given: 4096 }));
    let (given, least) = (3 * SEGMENT - 1, 3 * SEGMENT);
    assert_eq!(with(SEGMENT, given), Err(OptionsError::LogBytesMax { given, least }));
    LogOptions::default().validate().unwrap();
}
