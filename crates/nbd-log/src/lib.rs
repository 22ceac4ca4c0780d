//! Disk access and the node log: durable, group-committed, self-checking.
//!
//! The only crate with file I/O. It is passive: it starts no thread of its own that outlives a call
//! and reads no clock; its random numbers come from the caller. It knows neither Raft's rules nor
//! what an entry's bytes mean: to the log they are `(shard, index, term, kind, bytes)`.
//!
//! ```text
//!   records ──▶ LogWriter ── one aligned write per batch ──▶ Disk ──▶ files, or a crash twin
//!                  │  takes spares, reports indexes             ▲
//!                  ▼                                            │ read, pin
//!              SegmentPool ◀── prepare_spare, free_through   LogReader ◀── anyone
//! ```
//!
//! - [`io`]: the [`io::Disk`] trait, the real [`io::FileDisk`], and [`io::MemoryDisk`], which loses
//!   unsynced writes on demand.
//! - [`log`]: [`log::Log::open`] scans what a crash left and hands out the writer, the reader and
//!   the pool of segment files. The format is drawn in [`log::format`].
//! - [`checksum`]: CRC32C, as used by everything that reaches a disk.
//! - [`limits`]: every bound of this crate, by name.

pub mod checksum;
pub mod io;
pub mod limits;
pub mod log;
