//! Bit flips, lost files, foreign files, forged payloads.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use nbd_log::checksum::crc32c;
use nbd_log::io::{Disk, MemoryDisk, OpenMode};
use nbd_log::log::format::BatchHeader;
use nbd_log::log::{Finding, LogIdentity, LogOpenError, LogOptions, LogPosition};

use crate::support::{
    BLOCK, CountingRng, IDENTITY, Kept, OPTIONS, SEGMENT, entry, open, open_with, payload,
    read_file,
};

const NONCE: u64 = (1 << 32) + 1;

/// A log of two full segments and a begun one, a batch to an entry.
fn three_segments() -> (MemoryDisk, Vec<Kept>, Vec<LogPosition>) {
    let disk = MemoryDisk::new(1);
    let mut log = open(&disk, 1);
    let entries: Vec<_> = (1..=23).map(|i| entry(0, i, payload(i, 100_000))).collect();
    let mut positions = Vec::new();
    for entry in &entries {
        positions.extend(log.append(std::slice::from_ref(entry)).unwrap());
    }
    assert_eq!(file_of(positions[22]).0, "log/000002.seg");
    (disk, entries, positions)
}

/// File and offset of a position in a log whose files were used once.
fn file_of(position: LogPosition) -> (String, u64) {
    (format!("log/{:06}.seg", position.0 / SEGMENT - 1), position.0 % SEGMENT)
}

/// Start of the batch whose only entry's data is at `position`.
fn batch_of(position: LogPosition) -> (String, u64) {
    let (file, offset) = file_of(position);
    (file, offset - 100)
}

fn expect_damage(disk: &MemoryDisk) -> (String, u64, Finding, Finding) {
    match open_with(Arc::new(disk.clone()), OPTIONS, 2) {
        Err(LogOpenError::Damaged { file, offset, expected, found }) => {
            (file, offset, expected, found)
        }
        Err(error) => panic!("{error}"),
        Ok(log) => panic!("opened with {} records", log.found.len()),
    }
}

// Goal: a batch that others were written after is damage wherever it is hit, named by file and
// byte.
#[test]
fn a_flipped_bit_in_the_middle_is_damage() {
    let (disk, _, positions) = three_segments();
    for nth in [0, 5, 9, 10, 18, 19, 20, 21] {
        let (file, start) = batch_of(positions[nth]);
        for at in [0, 8, 30, 64, 68, 100, 5000, 100_099] {
            disk.flip_bit(&file, start + at);
            let number = nth as u64 + 1;
            let expected = (file.clone(), start, Finding::Batch(number), Finding::BadBatch);
            assert_eq!(expect_damage(&disk), expected, "batch {number} byte {at}");
            disk.flip_bit(&file, start + at);
        }
    }
    let error = {
        let (file, start) = batch_of(positions[5]);
        disk.flip_bit(&file, start);
        open_with(Arc::new(disk.clone()), OPTIONS, 2).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        error,
        "log file log/000000.seg is damaged at byte 516096: expected batch 6, found no valid batch"
    );
}

#[test]
fn bits_outside_of_batches_do_not_matter() {
    let (disk, entries, positions) = three_segments();
    let (file, start) = batch_of(positions[5]);
    disk.flip_bit(&file, start + 100_100);
    disk.flip_bit(&file, SEGMENT - 1);
    disk.flip_bit(&file, 100);
    assert_eq!(open(&disk, 2).records(), entries);
}

// Goal: the last batch may be torn, so that damage to it is cut; what is appended then is found.
#[test]
fn a_flipped_bit_in_the_last_batch_is_cut() {
    for at in [0, 8, 64, 100, 60_000, 100_099] {
        let (disk, mut entries, positions) = three_segments();
        let (file, start) = batch_of(positions[22]);
        disk.flip_bit(&file, start + at);
        let mut log = open(&disk, 2);
        entries.pop();
        assert_eq!(log.records(), entries);
        // Shorter than what was cut: its rest stays behind the new end.
        entries.push(entry(0, 23, payload(77, 5_000)));
        assert_eq!(log.append(&entries[22..]).unwrap(), positions[22..]);
        assert_eq!(open(&disk, 3).records(), entries);
    }
}

#[test]
fn a_lost_segment_header_is_damage() {
    let (disk, ..) = three_segments();
    for (n, seq) in [(0, 1), (1, 2), (2, 3)] {
        let file = format!("log/{n:06}.seg");
        for at in [0, 10, 24, 60, 64] {
            disk.flip_bit(&file, at);
            let expected = (file.clone(), 0, Finding::Segment(seq), Finding::BadSegmentHeader);
            assert_eq!(expect_damage(&disk), expected);
            disk.flip_bit(&file, at);
        }
    }
}

#[test]
fn a_segment_that_is_missing_or_short_is_damage() {
    for (n, seq) in [(0, 1), (1, 2)] {
        let (disk, ..) = three_segments();
        let file = format!("log/{n:06}.seg");
        let expected = (file.clone(), SEGMENT - 5, Finding::FileBytes(SEGMENT));
        disk.open(&file, OpenMode::Existing).unwrap().set_len(SEGMENT - 5).unwrap();
        let (name, offset, wanted, found) = expect_damage(&disk);
        assert_eq!((name, offset, wanted), expected);
        assert_eq!(found, Finding::FileBytes(SEGMENT - 5));
        disk.open(&file, OpenMode::Existing).unwrap().set_len(100).unwrap();
        assert_eq!(expect_damage(&disk).3, Finding::FileBytes(100));
        disk.remove(&file).unwrap();
        let expected = ("log".to_owned(), 0, Finding::Segment(seq), Finding::NoSegment);
        assert_eq!(expect_damage(&disk), expected);
    }
}

#[test]
fn a_segment_that_is_there_twice_is_damage() {
    let (disk, ..) = three_segments();
    let bytes = read_file(&disk, "log/000001.seg", 0, usize::try_from(SEGMENT).unwrap());
    disk.open("log/000009.seg", OpenMode::CreateNew).unwrap().write_at(&bytes, 0).unwrap();
    let expected = ("log/000009.seg".to_owned(), 0, Finding::NoSegment, Finding::Segment(2));
    assert_eq!(expect_damage(&disk), expected);
}

/// Changes bytes of a header and makes its checksum right again.
fn patch(disk: &MemoryDisk, file: &str, start: u64, at: u64, bytes: &[u8]) {
    let handle = disk.open(file, OpenMode::Existing).unwrap();
    handle.write_at(bytes, start + at).unwrap();
    let checked = read_file(disk, file, start, 64);
    handle.write_at(&crc32c(&checked).to_le_bytes(), start + 64).unwrap();
}

#[test]
fn files_of_other_logs_are_refused() {
    let (disk, ..) = three_segments();
    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
    let rng = || Box::new(CountingRng(0));
    let other = LogIdentity(7);
    let error = nbd_log::log::Log::open(shared, other, OPTIONS, rng(), &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, LogOpenError::Foreign { expected, found, .. }
        if expected == other && found == IDENTITY));
    let options = LogOptions { segment_bytes: 2 * SEGMENT, ..OPTIONS };
    let error = open_with(Arc::new(disk.clone()), options, 2).map(|_| ()).unwrap_err();
    assert!(matches!(error, LogOpenError::SegmentBytes { found: SEGMENT, .. }));
    patch(&disk, "log/000001.seg", 0, 8, &2_u32.to_le_bytes());
    let error = open_with(Arc::new(disk), OPTIONS, 2).map(|_| ()).unwrap_err();
    assert!(matches!(error, LogOpenError::Version { expected: 1, found: 2, .. }));
}

// Goal: no byte of a file can make recovery panic or take nonsense for records, not even under a
// right checksum.
#[test]
fn nonsense_under_a_right_checksum_is_damage() {
    for (at, value) in [(16, 0), (16, u64::MAX), (32, 0), (32, u64::MAX), (40, 0), (40, 9)] {
        let (disk, ..) = three_segments();
        patch(&disk, "log/000002.seg", 0, at, &u64::to_le_bytes(value));
        assert_eq!(expect_damage(&disk).3, Finding::BadSegmentHeader, "{value} at {at}");
    }
    for (at, value) in [(32, 5), (32, 400), (16, 7)] {
        let (disk, ..) = three_segments();
        patch(&disk, "log/000002.seg", 0, at, &u64::to_le_bytes(value));
        expect_damage(&disk);
    }
    let (_, _, positions) = three_segments();
    let (file, start) = batch_of(positions[21]);
    for (at, value) in [(48, u32::MAX), (52, 2), (52, 0), (56, u32::MAX), (56, 0), (60, 1)] {
        let (disk, ..) = three_segments();
        patch(&disk, &file, start, at, &u32::to_le_bytes(value));
        let (name, offset, ..) = expect_damage(&disk);
        assert_eq!((name, offset / BLOCK), (file.clone(), start / BLOCK));
    }
    // Records that do not parse: an unknown type, an unknown kind, more data than there is.
    for (at, byte) in [(0, 9), (1, 3), (30, 1), (31, 0xff)] {
        let (disk, ..) = three_segments();
        disk.open(&file, OpenMode::Existing).unwrap().write_at(&[byte], start + 68 + at).unwrap();
        let body = read_file(&disk, &file, start + 68, 100_032);
        patch(&disk, &file, start, 60, &crc32c(&body).to_le_bytes());
        let (name, offset, _, found) = expect_damage(&disk);
        assert_eq!((name, offset, found), (file.clone(), start + 68, Finding::BadRecord));
    }
}

// Goal: what a client writes is never taken for a batch.
// Method: a payload full of block-aligned batch headers, exact but for the nonce, in a last batch
// that is then torn. With the right nonce, which only the writer knows, they would count.
#[test]
fn a_payload_cannot_pass_for_a_batch() {
    for (nonce, forged) in [(NONCE + 1, false), (NONCE, true)] {
        let disk = MemoryDisk::new(1);
        let mut log = open(&disk, 1);
        let first = entry(0, 1, payload(1, 10));
        log.append(std::slice::from_ref(&first)).unwrap();
        // The second batch starts at block 2; its data at byte 100 of that.
        let mut data = BytesMut::zeroed(4096 - 100);
        for block in 3..10 {
            let header = BatchHeader {
                nonce,
                segment_seq: 1,
                number: 3,
                synced_through: 2,
                oldest_live: 1,
                block,
                records: 0,
                body_bytes: 0,
                body_crc: 0,
            };
            data.extend_from_slice(&header.encode());
            data.resize(data.len() + 4096 - 68, 0);
        }
        log.append(&[entry(0, 2, Bytes::from(data))]).unwrap();
        assert_eq!(&read_file(&disk, "log/000000.seg", 3 * BLOCK, 8), b"CBLOGBAT");
        disk.flip_bit("log/000000.seg", 2 * BLOCK);
        match (open_with(Arc::new(disk), OPTIONS, 2), forged) {
            (Ok(log), false) => assert_eq!(log.records(), [first]),
            (Err(LogOpenError::Damaged { offset, .. }), true) => assert_eq!(offset, 2 * BLOCK),
            (result, _) => panic!("forged: {forged}, opened: {}", result.is_ok()),
        }
    }
}

#[test]
fn leftovers_of_a_crash_are_cleared_and_strangers_left_alone() {
    let (disk, entries, _) = three_segments();
    for name in ["log/000007.new", "log/readme.txt", "log/1.seg"] {
        disk.open(name, OpenMode::CreateNew).unwrap();
    }
    assert_eq!(open(&disk, 2).records(), entries);
    let names = disk.list("log").unwrap();
    assert_eq!(names, ["000000.seg", "000001.seg", "000002.seg", "1.seg", "readme.txt"]);
}
