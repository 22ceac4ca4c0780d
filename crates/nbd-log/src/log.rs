//! The node log: one for all groups of a node, and the only place where an acknowledged write is
//! promised to be.
//!
//! ```text
//! log/000000.seg   sealed   ┐
//! log/000001.seg   sealed   │ live: consecutive segment sequence numbers, oldest to newest
//! log/000004.seg   active   ┘ ◀── LogWriter, one batch in flight at a time
//! log/000002.seg   waiting    freed, but a LogPin from before is still held
//! log/000003.seg   spare      prefilled or recycled: the next one to write
//! log/000005.new   being prefilled; renamed once it is complete and synced
//! ```
//!
//! - [`record`]: what goes in and comes out, and where it lies ([`LogPosition`]).
//! - [`options`]: its sizes.
//! - [`mod@format`]: the bytes, drawn.
//! - [`writer`]: [`LogWriter::append`], the path of every write.
//! - [`pool`]: [`SegmentPool`], the life of segment files.
//! - [`reader`]: [`LogReader`], entry data by position, from memory or file.
//! - [`recovery`]: [`Log::open`], which tells a torn tail from a damaged middle.
//! - [`error`]: what each of them can fail with.
//!
//! **Invariants.** At most one batch is in flight, so everything before it is durable. Live
//!  segments
//! are consecutive. A position is never used twice for data that was acknowledged. A segment file
//! is overwritten only once a durable batch or header says that it was freed.

mod cache;
pub mod error;
pub mod format;
pub mod options;
pub mod pool;
pub mod reader;
pub mod record;
pub mod recovery;
pub mod writer;

pub use error::{AppendError, Finding, LogOpenError, LogReadError, OptionsError};
pub use options::LogOptions;
pub use pool::{HardStates, LogPin, SegmentPool};
pub use reader::LogReader;
pub use record::{
    EntryKind, EntryRecord, HardState, LogIdentity, LogPosition, Record, ScannedEntry,
    ScannedRecord,
};
pub use recovery::Log;
pub use writer::LogWriter;
