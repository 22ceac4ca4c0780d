use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::disk::{Disk, DiskFile, DiskLock, OpenMode, assert_aligned, assert_name};
use crate::limits::{
    GATHER_BUFFERS_MAX, GATHER_BYTES_MAX, PARALLEL_WRITES_MIN, WRITES_IN_FLIGHT_MAX,
};

/// A data directory on a real file system.
///
/// Durable and batched writes go around the page cache (`O_DIRECT`, with `RWF_DSYNC` where they
/// must last), which takes half the CPU of writing through it and leaves nothing for write-back to
/// stall on. Where the file system refuses that, writes go through the cache and `fdatasync`; the
/// first refusal is logged and holds for the whole directory.
#[derive(Debug)]
pub struct FileDisk {
    dir: PathBuf,
    direct: Arc<AtomicBool>,
}

impl FileDisk {
    /// Opens a data directory, creating it, durably, if it is not there.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let missing: Vec<_> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        fs::create_dir_all(dir)?;
        for created in missing.into_iter().filter(|dir| !dir.as_os_str().is_empty()) {
            let parent = created.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or_else(|| Path::new(".")))?.sync_all()?;
        }
        Ok(Self { dir: dir.to_owned(), direct: Arc::new(AtomicBool::new(true)) })
    }

    /// The same, but never around the page cache.
    pub fn open_buffered(dir: &Path) -> io::Result<Self> {
        let disk = Self::open(dir)?;
        disk.direct.store(false, Ordering::Relaxed);
        Ok(disk)
    }

    fn resolve(&self, name: &str) -> PathBuf {
        assert_name(name);
        if name.is_empty() { self.dir.clone() } else { self.dir.join(name) }
    }
}

impl Disk for FileDisk {
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.resolve(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        match mode {
            OpenMode::Existing => {}
            OpenMode::CreateOrOpen => _ = options.create(true).truncate(false),
            OpenMode::CreateNew => _ = options.create_new(true),
        }
        let cached = options.open(&path)?;
        Ok(Arc::new(OpenFile {
            path,
            cached,
            direct: OnceLock::new(),
            direct_allowed: Arc::clone(&self.direct),
        }))
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        self.resolve(name).try_exists()
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = fs::read_dir(self.resolve(dir))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    fn create_dir(&self, dir: &str) -> io::Result<()> {
        match fs::create_dir(self.resolve(dir)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.resolve(from), self.resolve(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.resolve(name))
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.resolve(dir))?.sync_all()
    }

    fn space_available(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn lock(&self, name: &str) -> io::Result<Box<dyn DiskLock>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(self.resolve(name))?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(FileLock { _file: file })),
            Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.resolve(name)
    }
}

/// An exclusive `flock`, let go when the file is closed.
#[derive(Debug)]
struct FileLock {
    _file: File,
}

impl DiskLock for FileLock {}

/// One file under two descriptors: through the page cache, and around it.
#[derive(Debug)]
struct OpenFile {
    path: PathBuf,
    cached: File,
    /// Opened at the first write that wants it.
    direct: OnceLock<File>,
    /// Shared by the files of a directory: false once its file system has refused direct I/O.
    direct_allowed: Arc<AtomicBool>,
}

impl OpenFile {
    /// The descriptor for direct I/O, or `None` where that is refused.
    fn direct(&self) -> io::Result<Option<&File>> {
        if !self.direct_allowed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if let Some(file) = self.direct.get() {
            return Ok(Some(file));
        }
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(OFlags::DIRECT.bits().cast_signed());
        match options.open(&self.path) {
            Ok(file) => Ok(Some(self.direct.get_or_init(|| file))),
            Err(e) if is_refusal(&e) => {
                self.note_refusal(&e);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    fn note_refusal(&self, error: &io::Error) {
        if self.direct_allowed.swap(false, Ordering::Relaxed) {
            tracing::info!(
                path = %self.path.display(), %error,
                "direct I/O is refused here: writing through the page cache and fdatasync",
            );
        }
    }

    /// Writes buffers that follow one another in the file, around the page cache if possible.
    /// Returns false if they went through the cache, so that durability still needs a sync.
    fn write_run(&self, buffers: &[&[u8]], offset: u64, flags: ReadWriteFlags) -> io::Result<bool> {
        if let Some(file) = self.direct()? {
            match write_vectored_all(file, buffers, offset, flags) {
                Ok(()) => return Ok(true),
                Err(e) if is_refusal(&e) => self.note_refusal(&e),
                Err(e) => return Err(e),
            }
        }
        write_vectored_all(&self.cached, buffers, offset, ReadWriteFlags::empty())?;
        Ok(false)
    }
}

impl DiskFile for OpenFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.cached.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.cached.read_exact_at(buf, offset)
    }

    fn try_read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let wanted = buf.len();
        let mut slices = [IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.cached, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            // EINTR and the like too: the blocking read that follows sorts it out.
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => {
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        assert_aligned(buf, offset);
        if !self.write_run(&[buf], offset, ReadWriteFlags::DSYNC)? {
            self.cached.sync_data()?;
        }
        Ok(())
    }

    fn write_many_at(&self, writes: &[(u64, &[u8])]) -> io::Result<()> {
        for (offset, buf) in writes {
            assert_aligned(buf, *offset);
        }
        let runs = gather(writes);
        let write = |run: &Run<'_>| {
            self.write_run(&run.buffers, run.offset, ReadWriteFlags::empty()).map(|_| ())
        };
        if runs.len() < PARALLEL_WRITES_MIN {
            return runs.iter().try_for_each(write);
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                write(run)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let helpers: Vec<_> = (1..WRITES_IN_FLIGHT_MAX).map(|_| scope.spawn(work)).collect();
            let own = work();
            helpers
                .into_iter()
                .map(|helper| helper.join().expect("a write helper does not panic"))
                .fold(own, io::Result::and)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.cached.write_all_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.cached.set_len(len)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.cached, FallocateFlags::empty(), offset, len) {
            // A file system without fallocate reserves nothing: a full disk is then seen at the
            // write, which is worse but no reason to refuse the disk.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => match offset.checked_add(len) {
                Some(end) if end > self.len()? => self.set_len(end),
                Some(_) => Ok(()),
                None => Err(io::ErrorKind::InvalidInput.into()),
            },
            result => Ok(result?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.cached.sync_data()
    }
}

/// True for the errors by which a file system says that it has no direct I/O, or no `RWF_DSYNC`.
fn is_refusal(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS))
}

/// Buffers that follow one another in the file.
struct Run<'a> {
    offset: u64,
    bytes: usize,
    buffers: Vec<&'a [u8]>,
}

/// Joins neighbouring writes, in the order given, into runs of bounded size.
fn gather<'a>(writes: &[(u64, &'a [u8])]) -> Vec<Run<'a>> {
    let mut runs: Vec<Run<'a>> = Vec::new();
    for &(offset, buf) in writes {
        match runs.last_mut() {
            Some(run)
                if run.offset + run.bytes as u64 == offset
                    && run.buffers.len() < GATHER_BUFFERS_MAX
                    && run.bytes + buf.len() <= GATHER_BYTES_MAX =>
            {
                run.bytes += buf.len();
                run.buffers.push(buf);
            }
            _ => runs.push(Run { offset, bytes: buf.len(), buffers: vec![buf] }),
        }
    }
    runs
}

/// Writes all of `buffers`, one after the other from `offset`, however the system cuts the calls.
fn write_vectored_all(
    file: &File,
    buffers: &[&[u8]],
    offset: u64,
    flags: ReadWriteFlags,
) -> io::Result<()> {
    let mut slices: Vec<_> = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
    let mut left = slices.as_mut_slice();
    let mut offset = offset;
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match rustix::io::pwritev2(file, left, offset, flags) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut left, written);
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
