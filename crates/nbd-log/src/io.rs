//! Access to one node's data directory, behind a trait.
//!
//! Everything that reaches a disk goes through [`Disk`] and [`DiskFile`], so that the same code
//! runs on files ([`FileDisk`]) and on a disk that forgets what was not synced ([`MemoryDisk`]).
//!
//! Names are relative to the directory, made of `a-z 0-9 . / -`, and chosen by our own code; a name
//! outside that alphabet is a bug and panics. `""` is the directory itself.
//!
//! Durability: a file's contents last once [`DiskFile::sync`] has returned, or
//! [`DiskFile::write_durable_at`] for the bytes it wrote; its *name* lasts only once
//! [`Disk::sync_dir`] of its directory has.

mod aligned;
mod disk;
mod file;
mod memory;

pub use aligned::AlignedBuf;
pub use disk::{Disk, DiskFile, DiskLock, OpenMode};
pub use file::FileDisk;
pub use memory::{CrashStyle, MemoryDisk};
