use super::*;
use crate::io::AlignedBuf;
use crate::limits::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

fn block(fill: u8) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
    buf.fill(fill);
    buf
}

/// A disk with a durable file `f` of `blocks` blocks of ones.
fn disk_with_file(blocks: u8) -> (MemoryDisk, Arc<dyn DiskFile>) {
    let disk = MemoryDisk::new(1);
    let file = disk.open("f", OpenMode::CreateNew).unwrap();
    for n in 0..blocks {
        file.write_durable_at(&block(1), u64::from(n) * BLOCK).unwrap();
    }
    disk.sync_dir("").unwrap();
    (disk, file)
}

fn read(disk: &MemoryDisk, name: &str) -> Vec<u8> {
    let file = disk.open(name, OpenMode::Existing).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

const STYLES: [CrashStyle; 4] =
    [CrashStyle::Clean, CrashStyle::Kept, CrashStyle::Blocks, CrashStyle::Sectors];

#[test]
fn synced_contents_survive_and_others_may_not() {
    let (disk, file) = disk_with_file(1);
    file.write_at(&[2; 100], 50).unwrap();
    let all = |disk: &MemoryDisk, fill| read(disk, "f")[50..150].iter().all(|&b| b == fill);
    assert!(all(&disk, 2));
    assert!(all(&disk.after_crash_as(CrashStyle::Clean, 0), 1));
    assert!(all(&disk.after_crash_as(CrashStyle::Kept, 0), 2));
    let kept = (0..50).filter(|&seed| all(&disk.after_crash_as(CrashStyle::Blocks, seed), 2));
    assert!((1..50).contains(&kept.count()));
    file.sync().unwrap();
    for style in STYLES {
        assert!(all(&disk.after_crash_as(style, 0), 2));
    }
}

// Goal: an unsynced block may be found as after any of its writes, and sectors independently.
#[test]
fn crashes_tear_and_reorder() {
    let (disk, file) = disk_with_file(2);
    for fill in [2, 3] {
        file.write_many_at(&[(0, &block(fill)), (BLOCK, &block(fill))]).unwrap();
    }
    let mut pairs = BTreeSet::new();
    let mut torn = false;
    for seed in 0..200 {
        let found = read(&disk.after_crash_as(CrashStyle::Blocks, seed), "f");
        assert!(found.chunks(BLOCK_BYTES).all(|b| b.iter().all(|x| *x == b[0])));
        pairs.insert((found[0], found[BLOCK_BYTES]));
        let found = read(&disk.after_crash_as(CrashStyle::Sectors, seed), "f");
        assert!(found.chunks(512).all(|b| b.iter().all(|x| *x == b[0])));
        torn |= found[0] != found[512];
        let again = read(&disk.after_crash_as(CrashStyle::Sectors, seed), "f");
        assert!(found == again, "a seed decides everything");
    }
    assert_eq!(pairs.len(), 9);
    assert!(torn);
}

#[test]
fn a_durable_write_covers_its_own_bytes_only() {
    let (disk, file) = disk_with_file(2);
    file.write_at(&block(2), BLOCK).unwrap();
    file.write_durable_at(&block(3), 0).unwrap();
    let found = read(&disk.after_crash_as(CrashStyle::Clean, 0), "f");
    assert_eq!((found[0], found[BLOCK_BYTES]), (3, 1));
}

#[test]
fn names_last_once_their_directory_is_synced() {
    let disk = MemoryDisk::new(1);
    disk.create_dir("d").unwrap();
    disk.sync_dir("").unwrap();
    disk.open("d/a", OpenMode::CreateNew).unwrap().sync().unwrap();
    assert_eq!(disk.list("d").unwrap(), ["a"]);
    let after = |disk: &MemoryDisk, style| disk.after_crash_as(style, 0).list("d").unwrap();
    assert_eq!(after(&disk, CrashStyle::Clean), [""; 0]);
    assert_eq!(after(&disk, CrashStyle::Kept), ["a"]);
    disk.sync_dir("d").unwrap();
    disk.rename("d/a", "d/b").unwrap();
    assert_eq!(disk.list("d").unwrap(), ["b"]);
    for seed in 0..20 {
        let found = after(&disk.after_crash_as(CrashStyle::Blocks, seed), CrashStyle::Clean);
        assert!(found == ["a"] || found == ["b"], "{found:?}");
    }
    disk.sync_dir("d").unwrap();
    disk.remove("d/b").unwrap();
    assert_eq!(after(&disk, CrashStyle::Clean), ["b"]);
    disk.sync_dir("d").unwrap();
    assert_eq!(after(&disk, CrashStyle::Clean), [""; 0]);
}

#[test]
fn a_planned_crash_fails_everything_from_there() {
    let (disk, file) = disk_with_file(1);
    let n = disk.sync_points();
    assert_eq!(n, 2);
    disk.crash_at(n + 2);
    file.sync().unwrap();
    let error = file.write_durable_at(&block(9), 0).unwrap_err();
    assert!(MemoryDisk::is_crash(&error) && disk.crashed());
    assert!(MemoryDisk::is_crash(&file.len().unwrap_err()));
    assert!(MemoryDisk::is_crash(&disk.list("").unwrap_err()));
    let found: BTreeSet<_> =
        (0..20).map(|s| read(&disk.after_crash_as(CrashStyle::Blocks, s), "f")[0]).collect();
    assert_eq!(found, BTreeSet::from([1, 9]));
}

// Goal: the lesson of fsync on Linux: after a failed sync the data is visible and lost.
#[test]
fn a_failed_sync_is_not_made_good_by_the_next() {
    let (disk, file) = disk_with_file(1);
    disk.fail_sync_at(disk.sync_points() + 1);
    file.write_at(&[5], 0).unwrap();
    let error = file.sync().unwrap_err();
    assert!(!MemoryDisk::is_crash(&error));
    file.sync().unwrap();
    assert_eq!(read(&disk, "f")[0], 5);
    assert_eq!(read(&disk.after_crash_as(CrashStyle::Kept, 0), "f")[0], 1);
}

#[test]
fn capacity_is_enforced_and_given_back() {
    let disk = MemoryDisk::new(1);
    disk.set_capacity(3 * BLOCK);
    let file = disk.open("f", OpenMode::CreateNew).unwrap();
    file.allocate(0, 2 * BLOCK).unwrap();
    assert_eq!((disk.space_available().unwrap(), file.len().unwrap()), (BLOCK, 2 * BLOCK));
    file.write_at(&[1; 10], BLOCK - 5).unwrap();
    let full = file.allocate(0, 4 * BLOCK).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert_eq!(file.len().unwrap(), 2 * BLOCK);
    file.set_len(100 * BLOCK).unwrap();
    assert_eq!(disk.space_available().unwrap(), BLOCK);
    file.set_len(0).unwrap();
    assert_eq!(disk.space_available().unwrap(), 3 * BLOCK);
    file.write_at(&[1; BLOCK_BYTES], 0).unwrap();
    disk.remove("f").unwrap();
    assert_eq!(disk.space_available().unwrap(), 3 * BLOCK);
}

#[test]
fn cut_bytes_do_not_return() {
    let (disk, file) = disk_with_file(2);
    file.set_len(BLOCK + 10).unwrap();
    file.set_len(2 * BLOCK).unwrap();
    let found = read(&disk, "f");
    assert!(found[..BLOCK_BYTES + 10].iter().all(|&b| b == 1));
    assert!(found[BLOCK_BYTES + 10..].iter().all(|&b| b == 0));
    assert_eq!(read(&disk.after_crash_as(CrashStyle::Clean, 0), "f"), [1; 2 * BLOCK_BYTES]);
    file.sync().unwrap();
    assert_eq!(read(&disk.after_crash_as(CrashStyle::Clean, 0), "f"), found);
}

#[test]
fn opening_locking_and_reading_follow_the_contract() {
    let (disk, file) = disk_with_file(1);
    let kind = |r: io::Result<Arc<dyn DiskFile>>| r.unwrap_err().kind();
    assert_eq!(kind(disk.open("g", OpenMode::Existing)), io::ErrorKind::NotFound);
    assert_eq!(kind(disk.open("f", OpenMode::CreateNew)), io::ErrorKind::AlreadyExists);
    assert_eq!(kind(disk.open("no/f", OpenMode::CreateNew)), io::ErrorKind::NotFound);
    assert_eq!(disk.open("f", OpenMode::CreateOrOpen).unwrap().len().unwrap(), BLOCK);
    assert!(disk.exists("f").unwrap() && !disk.exists("g").unwrap());

    let held = disk.lock("lock").unwrap();
    assert_eq!(disk.lock("lock").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(held);
    disk.lock("lock").unwrap();

    let mut buf = [0; 10];
    let error = file.read_exact_at(&mut buf, BLOCK - 5).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(file.try_read_cached_at(&mut buf, BLOCK - 10).unwrap());
    assert!(!file.try_read_cached_at(&mut buf, BLOCK - 5).unwrap());
    disk.set_cached_reads(false);
    assert!(!file.try_read_cached_at(&mut buf, 0).unwrap());
    disk.flip_bit("f", 3);
    file.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(buf, [1, 1, 1, 0, 1, 1, 1, 1, 1, 1]);
}
