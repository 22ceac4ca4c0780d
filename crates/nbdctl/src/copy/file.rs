//! Raw images in files.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::endpoint::Stretch;

/// A raw image: a regular file, or a block device to read from.
#[derive(Debug)]
pub(super) struct LocalFile {
    file: Arc<File>,
    path: PathBuf,
    size: u64,
}

/// What tells whether a file is still the same, and holds the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    /// Of the last change of its content.
    modified_s: i64,
    modified_ns: i64,
}

impl Identity {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let about = || format!("look at {}", path.display());
        let data = path.metadata().with_context(about)?;
        Ok(Self {
            path: path.canonicalize().with_context(about)?,
            device: data.dev(),
            inode: data.ino(),
            size: data.len(),
            modified_s: data.mtime(),
            modified_ns: data.mtime_nsec(),
        })
    }

    /// The file's own, whatever it holds.
    pub(super) fn inode(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl LocalFile {
    /// Opens an image to read.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let about = || format!("open {}", path.display());
        let file = File::open(path).with_context(about)?;
        let kind = file.metadata().with_context(about)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            bail!("{} is neither a file nor a block device; - is standard input", path.display());
        }
        // A block device has no length, but an end.
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).with_context(about)?;
        Ok(Self { file: Arc::new(file), path: path.to_owned(), size })
    }

    /// Opens a file to write to, which will have `size` bytes. What it has before `keep` stays, all
    /// behind that becomes zeroes.
    pub(super) fn create(path: &Path, size: u64, keep: u64) -> Result<Self> {
        let about = || format!("write to {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(about)?;
        file.set_len(keep).with_context(about)?;
        file.set_len(size).with_context(about)?;
        Ok(Self { file: Arc::new(file), path: path.to_owned(), size })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) async fn stretches(&self, offset: u64, len: u64) -> Result<Vec<Stretch>> {
        let end = (offset + len).min(self.size);
        let work = move |file: &File| stretch(file, offset, end).map(|stretch| vec![stretch]);
        self.run("look for holes in", work).await
    }

    pub(super) async fn read(&self, offset: u64, mut buffer: Vec<u8>) -> Result<Vec<u8>> {
        let work = move |file: &File| file.read_exact_at(&mut buffer, offset).map(|()| buffer);
        self.run("read", work).await
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        self.run("write to", move |file| file.write_all_at(&data, offset)).await
    }

    pub(super) async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.run("write to", move |file| zero(file, offset, len)).await
    }

    pub(super) async fn sync(&self) -> Result<()> {
        self.run("sync", |file| file.sync_data()).await
    }

    /// Lets what is read next come from the disk, as far as the kernel goes along.
    pub(super) async fn forget_cached(&self) -> Result<()> {
        let work = |file: &File| {
            rustix::fs::fadvise(file, 0, None, Advice::DontNeed).map_err(io::Error::from)
        };
        self.run("advise on", work).await
    }

    async fn run<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T> {
        let file = Arc::clone(&self.file);
        let done = spawn_blocking(move || work(&file)).await.context("wait for the disk")?;
        done.with_context(|| format!("{what} {}", self.path.display()))
    }
}

/// The stretch of one kind that begins at `offset`, which is before `end`.
fn stretch(file: &File, offset: u64, end: u64) -> io::Result<Stretch> {
    let whole = Stretch { len: end - offset, zero: false };
    let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data.min(end),
        // No data up to the end of the file.
        Err(Errno::NXIO) => end,
        // It does not know holes: a block device.
        Err(Errno::INVAL | Errno::NOTSUP) => return Ok(whole),
        Err(error) => return Err(error.into()),
    };
    if data > offset {
        return Ok(Stretch { len: data - offset, zero: true });
    }
    let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?.min(end);
    // A file that shrinks meanwhile is noticed when it is read.
    Ok(Stretch { len: hole.saturating_sub(offset).max(1), zero: false })
}

fn zero(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, len) {
        Ok(()) => return Ok(()),
        Err(Errno::NOTSUP | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    // A file system that knows no holes has to be told each zero.
    let zeroes = vec![0; 1 << 20];
    let mut at = offset;
    while at < offset + len {
        let part = usize::try_from(offset + len - at).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all_at(&zeroes[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn all(file: &LocalFile) -> Vec<Stretch> {
        let (mut at, mut found) = (0, Vec::new());
        while at < file.size() {
            let stretches = file.stretches(at, file.size() - at).await.unwrap();
            at += stretches.iter().map(|stretch| stretch.len).sum::<u64>();
            found.extend(stretches);
        }
        found
    }

    #[tokio::test]
    async fn holes_are_seen_and_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = LocalFile::create(&path, 8 << 20, 0).unwrap();
        assert_eq!(all(&file).await, [Stretch { len: 8 << 20, zero: true }]);
        file.write(1 << 20, vec![7; 2 << 20].into()).await.unwrap();
        file.zero(2 << 20, 1 << 20).await.unwrap();
        let stretches = [(1, true), (1, false), (6, true)];
        let expected = stretches.map(|(mib, zero)| Stretch { len: mib << 20, zero });
        assert_eq!(all(&file).await, expected);
        assert_eq!(file.read(1 << 20, vec![1; 10]).await.unwrap(), [7; 10]);
        assert_eq!(file.read(2 << 20, vec![1; 10]).await.unwrap(), [0; 10]);
        let past_end = file.read((8 << 20) - 1, vec![1; 2]).await.unwrap_err();
        assert!(past_end.to_string().contains("image"), "{past_end}");
    }

    #[tokio::test]
    async fn what_is_kept_stays_and_the_rest_is_zero() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, vec![7; 3 << 20]).unwrap();
        let file = LocalFile::create(&path, 4 << 20, 1 << 20).unwrap();
        assert_eq!(file.read(0, vec![1; 1 << 20]).await.unwrap(), vec![7; 1 << 20]);
        assert_eq!(file.read(1 << 20, vec![1; 3 << 20]).await.unwrap(), vec![0; 3 << 20]);
    }

    #[test]
    fn a_changed_file_has_another_identity() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        std::fs::write(&path, "one").unwrap();
        let before = Identity::of(&path).unwrap();
        assert_eq!(Identity::of(&path).unwrap(), before);
        std::fs::write(&path, "other").unwrap();
        let after = Identity::of(&path).unwrap();
        assert_ne!(after, before);
        assert_eq!(after.inode(), before.inode());
    }
}
