//! Real files.

use std::io::ErrorKind;
use std::sync::Arc;

use nbd_log::io::{AlignedBuf, Disk, FileDisk, OpenMode};

use crate::support::{BLOCK, OPTIONS, entry, hard_state, open_with, payload};

/// A disk for each way of writing.
fn disks() -> Vec<(tempfile::TempDir, FileDisk)> {
    [FileDisk::open, FileDisk::open_buffered]
        .into_iter()
        .map(|open| {
            let dir = tempfile::tempdir().unwrap();
            let disk = open(&dir.path().join("data")).unwrap();
            (dir, disk)
        })
        .collect()
}

fn aligned(number: u64, blocks: u64) -> AlignedBuf {
    let mut buf = AlignedBuf::new();
    buf.extend_from_slice(&payload(number, usize::try_from(blocks * BLOCK).unwrap()));
    buf
}

#[test]
fn a_log_on_files_survives_reopening() {
    for (_dir, disk) in disks() {
        let disk: Arc<dyn Disk> = Arc::new(disk);
        let mut log = open_with(Arc::clone(&disk), OPTIONS, 1).unwrap();
        let mut written = Vec::new();
        for index in 1..30 {
            let len = if index % 4 == 0 { 200_000 } else { 4096 };
            let records =
                [hard_state(0, index, 1, index - 1), entry(0, index, payload(index, len))];
            let positions = log.append(&records).unwrap();
            written.extend(records.into_iter().zip(positions));
        }
        drop(log);
        let log = open_with(disk, OPTIONS, 2).unwrap();
        assert_eq!(log.found, written);
        for (record, position) in &written {
            let Some(data) = record.data() else { continue };
            let mut buf = vec![0; data.len()];
            log.log.reader.read(*position, &mut buf).unwrap();
            assert_eq!(buf, data[..]);
        }
    }
}

#[test]
fn every_way_of_writing_reads_back() {
    for (_dir, disk) in disks() {
        let file = disk.open("f", OpenMode::CreateNew).unwrap();
        file.allocate(0, 64 * BLOCK).unwrap();
        assert_eq!(file.len().unwrap(), 64 * BLOCK);
        file.write_durable_at(&aligned(1, 3), 5 * BLOCK).unwrap();
        file.write_at(b"unaligned", 5 * BLOCK - 4).unwrap();
        file.sync().unwrap();
        let mut expected = vec![0; usize::try_from(64 * BLOCK).unwrap()];
        let at = usize::try_from(5 * BLOCK).unwrap();
        expected[at..at + 3 * 4096].copy_from_slice(&aligned(1, 3));
        expected[at - 4..at + 5].copy_from_slice(b"unaligned");
        let mut found = vec![1; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected);
        // Just read, so that it is in memory; unless the file system cannot tell.
        found.fill(1);
        if file.try_read_cached_at(&mut found, 0).unwrap() {
            assert!(found == expected);
        }
        assert!(!file.try_read_cached_at(&mut found, BLOCK).unwrap());
        let error = file.read_exact_at(&mut found, BLOCK).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        file.set_len(BLOCK).unwrap();
        assert_eq!(file.len().unwrap(), BLOCK);
    }
}

#[test]
fn many_writes_at_once_all_arrive() {
    for (_dir, disk) in disks() {
        let file = disk.open("f", OpenMode::CreateNew).unwrap();
        // Runs of adjacent writes, longer than one call takes, and single ones.
        let offsets: Vec<u64> = (0..300).chain((310..600).step_by(7)).map(|n| n * BLOCK).collect();
        let buffers: Vec<_> = offsets.iter().map(|&offset| aligned(offset + 1, 1)).collect();
        let writes: Vec<_> = offsets.iter().zip(&buffers).map(|(o, b)| (*o, &**b)).collect();
        for count in [0, 1, 5, writes.len()] {
            file.write_many_at(&writes[..count]).unwrap();
        }
        file.sync().unwrap();
        let mut found = [0; 4096];
        for (offset, buffer) in writes {
            file.read_exact_at(&mut found, offset).unwrap();
            assert!(found == *buffer);
        }
    }
}

#[test]
#[should_panic(expected = "unaligned direct write")]
fn an_unaligned_durable_write_is_a_bug() {
    let (_dir, disk) = disks().remove(0);
    let file = disk.open("f", OpenMode::CreateNew).unwrap();
    _ = file.write_durable_at(&aligned(1, 1)[..512], 0);
}

#[test]
#[should_panic(expected = "no name inside a data directory")]
fn a_name_outside_of_the_directory_is_a_bug() {
    let (_dir, disk) = disks().remove(0);
    _ = disk.open("../f", OpenMode::CreateOrOpen);
}

#[test]
fn names_and_locks() {
    let (_dir, disk) = disks().remove(0);
    let kind = |result: std::io::Result<_>| result.map(|_| ()).unwrap_err().kind();
    assert_eq!(kind(disk.open("d/f", OpenMode::CreateNew)), ErrorKind::NotFound);
    disk.create_dir("d").unwrap();
    disk.create_dir("d").unwrap();
    disk.sync_dir("").unwrap();
    assert_eq!(kind(disk.open("d/f", OpenMode::Existing)), ErrorKind::NotFound);
    disk.open("d/f", OpenMode::CreateOrOpen).unwrap();
    assert_eq!(kind(disk.open("d/f", OpenMode::CreateNew)), ErrorKind::AlreadyExists);
    disk.open("d/a", OpenMode::CreateNew).unwrap();
    disk.rename("d/f", "d/g").unwrap();
    disk.sync_dir("d").unwrap();
    assert_eq!(disk.list("d").unwrap(), ["a", "g"]);
    assert_eq!(disk.list("").unwrap(), ["d"]);
    disk.remove("d/a").unwrap();
    assert!(disk.exists("d/g").unwrap() && !disk.exists("d/a").unwrap());
    assert!(disk.path("d/g").ends_with("data/d/g"));
    assert!(disk.space_available().unwrap() > 0);

    let held = disk.lock("lock").unwrap();
    assert_eq!(disk.lock("lock").map(|_| ()).unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(held);
    disk.lock("lock").unwrap();
}
