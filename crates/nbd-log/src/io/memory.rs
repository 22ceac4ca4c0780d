//! A disk in memory that forgets what was not synced.
//!
//! It keeps two images of every file and of the directory: `live`, what a running process sees, and
//! `durable`, what is promised to survive. [`MemoryDisk::after_crash`] gives a disk as it might be
//! found after power was lost: the durable image plus any part of what was still under way. All of
//! it is decided by seeds, so that a failing run can be repeated.
//!
//! Faults are placed by *sync points*: the calls of `sync`, `sync_dir` and `write_durable_at` of
//! one disk, counted from 1 in the order in which they happen.

mod image;
mod names;
mod style;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::disk::{Disk, DiskFile, DiskLock, OpenMode, assert_aligned, assert_name};
use image::FileImage;
use names::{Entry, Names};

pub use style::CrashStyle;

/// A data directory in memory, with faults on demand. Clones are handles to the same disk.
#[derive(Debug, Clone)]
pub struct MemoryDisk {
    shared: Arc<Mutex<State>>,
}

struct State {
    /// Mixed into the seed of each crash.
    seed: u64,
    files: BTreeMap<u64, FileImage>,
    names: Names,
    sync_points: u64,
    crash_at: Option<u64>,
    fail_sync_at: Option<u64>,
    /// Once true, every operation fails.
    crashed: bool,
    capacity: Option<u64>,
    locks: BTreeSet<String>,
    cached_reads: bool,
    /// Bytes, by file, that the next read gives with a bit flipped.
    flips: Vec<(u64, u64)>,
}

/// The error of every operation on a disk that has crashed.
#[derive(Debug, thiserror::Error)]
#[error("the memory disk has crashed, as planned")]
struct Crashed;

/// What becomes of the durability operation at hand.
enum Fate {
    Done,
    /// Power fails during it.
    Crash,
    /// It reports an I/O error, once.
    Error,
}

impl MemoryDisk {
    /// An empty disk of unlimited size without faults.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::from_parts(seed, BTreeMap::new(), Names::default(), None)
    }

    fn from_parts(
        seed: u64,
        files: BTreeMap<u64, FileImage>,
        names: Names,
        capacity: Option<u64>,
    ) -> Self {
        let state = State {
            seed,
            files,
            names,
            sync_points: 0,
            crash_at: None,
            fail_sync_at: None,
            crashed: false,
            capacity,
            locks: BTreeSet::new(),
            cached_reads: true,
            flips: Vec::new(),
        };
        Self { shared: Arc::new(Mutex::new(state)) }
    }

    /// Durability operations so far, failed ones included.
    #[must_use]
    pub fn sync_points(&self) -> u64 {
        self.shared.lock().sync_points
    }

    /// Plans a loss of power during the `n`-th durability operation: it and every operation after
    /// it fail, with an error for which [`MemoryDisk::is_crash`] is true.
    pub fn crash_at(&self, n: u64) {
        self.shared.lock().crash_at = Some(n);
    }

    /// Loses power now.
    pub fn crash(&self) {
        self.shared.lock().crashed = true;
    }

    /// True once the planned crash has happened.
    #[must_use]
    pub fn crashed(&self) -> bool {
        self.shared.lock().crashed
    }

    /// True for the error of an operation on a crashed disk.
    #[must_use]
    pub fn is_crash(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|e| e.is::<Crashed>())
    }

    /// Plans an I/O error of the `n`-th durability operation, once. As on a real system, what it
    /// should have made durable stays visible but is never written, not even by a later sync.
    pub fn fail_sync_at(&self, n: u64) {
        self.shared.lock().fail_sync_at = Some(n);
    }

    /// Limits the disk: writes and reservations past `bytes` of files give `StorageFull`.
    pub fn set_capacity(&self, bytes: u64) {
        self.shared.lock().capacity = Some(bytes);
    }

    /// Whether `try_read_cached_at` succeeds (the default) or always says that it would block.
    pub fn set_cached_reads(&self, cached: bool) {
        self.shared.lock().cached_reads = cached;
    }

    /// Flips the lowest bit of the byte at `offset`, in both images. Panics if it is not there.
    pub fn flip_bit(&self, name: &str, offset: u64) {
        let mut state = self.shared.lock();
        let id = state.names.file(name).expect("the file exists");
        state.file(id).flip_bit(offset);
    }

    /// As [`MemoryDisk::flip_bit`], but on the way: only the next read of that byte sees it.
    pub fn flip_bit_once(&self, name: &str, offset: u64) {
        let mut state = self.shared.lock();
        let id = state.names.file(name).expect("the file exists");
        state.flips.push((id, offset));
    }

    /// The disk as found after a loss of power, in a style drawn from the seed.
    #[must_use]
    pub fn after_crash(&self, seed: u64) -> Self {
        let style = match seed % 4 {
            0 => CrashStyle::Sectors,
            1 => CrashStyle::Blocks,
            2 => CrashStyle::Clean,
            _ => CrashStyle::Kept,
        };
        self.after_crash_as(style, seed)
    }

    /// The disk as found after a loss of power. This one stays as it is.
    #[must_use]
    pub fn after_crash_as(&self, style: CrashStyle, seed: u64) -> Self {
        let state = self.shared.lock();
        let mut rng = StdRng::seed_from_u64(state.seed.rotate_left(32) ^ seed);
        let names = state.names.after_crash(style, &mut rng);
        let files = state
            .files
            .iter()
            .filter(|(id, _)| names.refers_to(**id))
            .map(|(id, file)| (*id, file.after_crash(style, &mut rng)))
            .collect();
        Self::from_parts(rng.random(), files, names, state.capacity)
    }

    /// Runs one operation, unless power has failed.
    fn run<T>(&self, operation: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.shared.lock();
        if state.crashed {
            return Err(io::Error::other(Crashed));
        }
        operation(&mut state)
    }
}

impl State {
    /// Counts a durability operation and says how it ends. The caller carries that out.
    fn sync_point(&mut self) -> Fate {
        self.sync_points += 1;
        if self.crash_at.is_some_and(|n| self.sync_points >= n) {
            self.crashed = true;
            return Fate::Crash;
        }
        if self.fail_sync_at == Some(self.sync_points) {
            return Fate::Error;
        }
        Fate::Done
    }

    fn file(&mut self, id: u64) -> &mut FileImage {
        self.files.get_mut(&id).expect("an open file keeps its image")
    }

    /// Reads, and flips the bits that were planned.
    fn read(&mut self, id: u64, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file(id).read(buf, offset)?;
        self.flips.retain(|&(file, at)| {
            let place = at.checked_sub(offset).filter(|_| file == id);
            let byte = place.and_then(|place| buf.get_mut(usize::try_from(place).ok()?));
            byte.map(|byte| *byte ^= 1).is_none()
        });
        Ok(())
    }

    fn used(&self) -> u64 {
        self.names.files().map(|id| self.files[&id].allocated_bytes()).sum()
    }

    /// Refuses to allocate the range of this file if the disk is too small for it.
    fn check_space(&mut self, id: u64, offset: u64, len: u64) -> io::Result<()> {
        let Some(capacity) = self.capacity else { return Ok(()) };
        let wanted = self.file(id).unallocated_bytes(offset, len);
        if wanted > 0 && self.used() + wanted > capacity {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

impl Fate {
    fn into_result(self) -> io::Result<()> {
        match self {
            Self::Done => Ok(()),
            Self::Crash => Err(io::Error::other(Crashed)),
            Self::Error => Err(rustix::io::Errno::IO.into()),
        }
    }
}

impl Disk for MemoryDisk {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        assert_name(name);
        self.run(|state| {
            let id = match (state.names.get(name), mode) {
                (Some(Entry::Dir), _) => return Err(io::ErrorKind::IsADirectory.into()),
                (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
                (None, OpenMode::Existing) => return Err(io::ErrorKind::NotFound.into()),
                (Some(Entry::File(id)), _) => id,
                (None, _) => {
                    let id = state.files.last_key_value().map_or(0, |(id, _)| id + 1);
                    state.names.insert(name, Entry::File(id))?;
                    state.files.insert(id, FileImage::default());
                    id
                }
            };
            let file = MemoryFile { disk: self.clone(), id, name: name.to_owned() };
            Ok(Arc::new(file) as Arc<dyn DiskFile>)
        })
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        self.run(|state| Ok(name.is_empty() || state.names.get(name).is_some()))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.run(|state| state.names.list(dir))
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        assert_name(dir);
        self.run(|state| match state.names.get(dir) {
            Some(Entry::Dir) => Ok(()),
            Some(Entry::File(_)) => Err(io::ErrorKind::AlreadyExists.into()),
            None => state.names.insert(dir, Entry::Dir),
        })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        assert_name(to);
        self.run(|state| state.names.rename(from, to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.run(|state| state.names.remove(name))
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.run(|state| {
            let fate = state.sync_point();
            if let Fate::Done = fate {
                state.names.sync(dir);
            }
            fate.into_result()
        })
    }

    fn space_available(&self) -> io::Result<u64> {
        self.run(|state| Ok(state.capacity.unwrap_or(1 << 50).saturating_sub(state.used())))
    }

    fn lock(&self, name: &str) -> io::Result<Box<dyn DiskLock>> {
        self.open(name, OpenMode::CreateOrOpen)?;
        self.run(|state| {
            if !state.locks.insert(name.to_owned()) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(Box::new(MemoryLock { disk: self.clone(), name: name.to_owned() }) as _)
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("memory:").join(name)
    }
}

#[derive(Debug)]
struct MemoryLock {
    disk: MemoryDisk,
    name: String,
}

impl DiskLock for MemoryLock {}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        self.disk.shared.lock().locks.remove(&self.name);
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    id: u64,
    name: String,
}

impl MemoryFile {
    /// Writes to the live image, after checking that there is room.
    fn write(&self, state: &mut State, buf: &[u8], offset: u64) -> io::Result<()> {
        state.check_space(self.id, offset, buf.len() as u64)?;
        state.file(self.id).write(buf, offset);
        Ok(())
    }
}

impl DiskFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        self.disk.run(|state| Ok(state.file(self.id).len()))
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.run(|state| state.read(self.id, buf, offset))
    }

    fn try_read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.disk.run(|state| {
            let file = &state.files[&self.id];
            let whole = file.len().checked_sub(offset).is_some_and(|n| n >= buf.len() as u64);
            if !state.cached_reads || !whole {
                return Ok(false);
            }
            state.read(self.id, buf, offset).map(|()| true)
        })
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert_aligned(buf, offset);
        self.disk.run(|state| {
            let fate = state.sync_point();
            self.write(state, buf, offset)?;
            match fate {
                Fate::Done => state.file(self.id).make_durable(buf.len(), offset),
                Fate::Error => state.file(self.id).forget_unsynced(buf.len(), offset),
                Fate::Crash => {}
            }
            fate.into_result()
        })
    }

    fn write_many_at(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        self.disk.run(|state| {
            for (offset, buf) in writes {
                assert_aligned(buf, *offset);
                self.write(state, buf, *offset)?;
            }
            Ok(())
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.disk.run(|state| self.write(state, buf, offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.run(|state| {
            state.file(self.id).set_len(len);
            Ok(())
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.run(|state| {
            state.check_space(self.id, offset, len)?;
            state.file(self.id).allocate(offset, len);
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.run(|state| {
            let fate = state.sync_point();
            match fate {
                Fate::Done => state.file(self.id).sync(),
                Fate::Error => state.file(self.id).forget_all_unsynced(),
                Fate::Crash => {}
            }
            fate.into_result()
        })
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFile({})", self.name)
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("files", &self.files.len())
            .field("sync_points", &self.sync_points)
            .field("crashed", &self.crashed)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
