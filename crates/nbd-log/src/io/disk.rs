use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::limits::BLOCK_BYTES;

/// How [`Disk::open`] treats a file that is or is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Must exist, else `NotFound`.
    Existing,
    /// Opened as it is, or created empty.
    CreateOrOpen,
    /// Must not exist, else `AlreadyExists`.
    CreateNew,
}

/// One node's data directory.
pub trait Disk: Send + Sync + Debug + 'static {
    /// Opens a file for reading and writing.
    fn open(&self, name: &str, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;

    /// True if a file or directory of this name is there.
    fn exists(&self, name: &str) -> io::Result<bool>;

    /// Names directly inside `dir`, without the directory's own, sorted.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// Creates a directory; one that is there already is no error. Lasts once its parent is synced.
    fn create_dir(&self, dir: &str) -> io::Result<()>;

    /// Renames a file inside its directory, replacing what bore the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file's name. Open handles go on working.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names inside `dir` last.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;

    /// Bytes that an unprivileged writer can still use.
    fn space_available(&self) -> io::Result<u64>;

    /// Takes the exclusive lock of this name without waiting; held until the guard is dropped or
    /// the process ends. `WouldBlock` if somebody else holds it.
    fn lock(&self, name: &str) -> io::Result<Box<dyn DiskLock>>;

    /// The full path, for messages only.
    fn path(&self, name: &str) -> PathBuf;
}

/// An open file. All offsets and lengths are in bytes; all methods may be called from any thread.
#[expect(clippy::len_without_is_empty, reason = "that a file is empty is no state worth a method")]
pub trait DiskFile: Send + Sync + Debug {
    /// The file's length.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; may block. `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fills `buf` from `offset` if that needs no waiting: `Ok(true)` only if all of it came.
    /// `Ok(false)`, with `buf` in any state, if it would block or the system cannot tell.
    fn try_read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<bool>;

    /// Writes `buf`, which is on stable storage when this returns. The buffer's address, its length
    /// and `offset` are multiples of [`BLOCK_BYTES`] (see [`super::AlignedBuf`]); panics if not.
    ///
    /// After an error it is not known which blocks were written. Never retry: the system may have
    /// dropped the data and forgotten the error.
    fn write_durable_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Writes each buffer at its offset, several at a time and in no particular order; the ranges
    /// do not overlap. Not durable before [`DiskFile::sync`]. Alignment as for
    /// [`DiskFile::write_durable_at`].
    fn write_many_at(&self, writes: &[(u64, &[u8])]) -> io::Result<()>;

    /// Writes through the page cache, at any alignment. Not durable before [`DiskFile::sync`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Cuts the file to `len`, or extends it with a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Reserves space for the range and extends the file to cover it, so that a full disk
    /// (`StorageFull`) is seen here and not at a later write.
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes all that was written to this file, by any handle, last. A failure is final for the
    /// file: its unsynced contents are unknown from then on.
    fn sync(&self) -> io::Result<()>;
}

/// A held lock; dropping it lets go.
pub trait DiskLock: Send + Sync + Debug {}

/// Panics unless a write is fit for direct I/O: our own buffers are always aligned.
pub(super) fn assert_aligned(buf: &[u8], offset: u64) {
    assert!(
        (buf.as_ptr() as usize).is_multiple_of(BLOCK_BYTES)
            && buf.len().is_multiple_of(BLOCK_BYTES)
            && offset.is_multiple_of(BLOCK_BYTES as u64),
        "unaligned direct write: {} bytes at offset {offset}",
        buf.len(),
    );
}

/// Panics unless `name` is of the alphabet that our own code uses, and inside the directory.
pub(super) fn assert_name(name: &str) {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"./-".contains(&b);
    assert!(
        name.bytes().all(allowed) && !name.starts_with('/') && !name.split('/').any(|p| p == ".."),
        "{name:?} is no name inside a data directory",
    );
}
