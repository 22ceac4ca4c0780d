//! What the log's operations can fail with.

use std::fmt;
use std::io;

use nbd_topology::{LogIndex, ShardId};

use super::record::{LogIdentity, LogPosition};
use crate::limits::{SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, SEGMENTS_MIN};

/// Sizes that cannot work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// The segment size is out of range or not made of whole blocks.
    #[error(
        "segment size {given} is not a multiple of 4096 from {SEGMENT_BYTES_MIN} to \
         {SEGMENT_BYTES_MAX}"
    )]
    SegmentBytes {
        /// The size asked for.
        given: u64,
    },
    /// The log's bound leaves too few segments.
    #[error("log size {given} has no room for {SEGMENTS_MIN} segments: at least {least} is needed")]
    LogBytesMax {
        /// The bound asked for.
        given: u64,
        /// The least that works with this segment size.
        least: u64,
    },
}

/// An append that did not happen. Unless it says otherwise, nothing was written, and the writer
/// works on.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The log is at its bound and no segment is free. Retry once a checkpoint has freed some.
    #[error("the log is full: all segments hold entries that no checkpoint covers yet")]
    Full,
    /// A new segment was needed and the disk has no room for it. Retry once there is room, or once
    /// a checkpoint has freed a segment.
    #[error("the disk has no room for another log segment")]
    NoSpace,
    /// An entry is larger than any batch may be. Our own code keeps entries below that bound, so
    /// this one came from a peer with other limits.
    #[error("entry {index} of shard {shard} has {bytes} bytes of data, more than {max}")]
    TooLarge {
        /// Its group.
        shard: ShardId,
        /// Its index.
        index: LogIndex,
        /// Size of its data.
        bytes: usize,
        /// The largest possible.
        max: usize,
    },
    /// A write failed; some of the records may be on disk and may be found by the next recovery.
    /// The writer is of no further use.
    #[error("cannot write log file {file}")]
    Write {
        /// Name of the segment file.
        file: String,
        /// What the disk said.
        source: io::Error,
    },
    /// An earlier call ended in [`AppendError::Write`]. A disk that failed a write is never trusted
    /// with another.
    #[error("the log has failed before and takes no more records")]
    Failed,
}

/// A read that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum LogReadError {
    /// The segment was freed, or was never written. Impossible for a position that was live when a
    /// pin was taken that is still held.
    #[error("log position {position} is not in the log any more")]
    Freed {
        /// The position asked for.
        position: LogPosition,
    },
    /// The range passes the end of its segment; no entry does.
    #[error("{len} bytes at log position {position} pass the end of a segment")]
    OutOfRange {
        /// The position asked for.
        position: LogPosition,
        /// Bytes asked for.
        len: usize,
    },
    /// The disk failed.
    #[error("cannot read log file {file}")]
    Io {
        /// Name of the segment file.
        file: String,
        /// What the disk said.
        source: io::Error,
    },
}

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogOpenError {
    /// The sizes asked for cannot work.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The disk failed.
    #[error("cannot {action} {file}")]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or directory.
        file: String,
        /// What the disk said.
        source: io::Error,
    },
    /// Something that was acknowledged is unreadable. Cutting the log here would lose it, so this
    /// data directory must not be served; the replica is to be rebuilt from its peers.
    #[error("log file {file} is damaged at byte {offset}: expected {expected}, found {found}")]
    Damaged {
        /// The file, relative to the data directory.
        file: String,
        /// Where in the file.
        offset: u64,
        /// What had to be there.
        expected: Finding,
        /// What is there.
        found: Finding,
    },
    /// A segment belongs to another node, cluster or data directory.
    #[error("log file {file} belongs to {found}, this is {expected}")]
    Foreign {
        /// The file.
        file: String,
        /// The identity of this data directory.
        expected: LogIdentity,
        /// The identity in the file.
        found: LogIdentity,
    },
    /// A segment was written with another format version.
    #[error("log file {file} has format version {found}, this program reads {expected}")]
    Version {
        /// The file.
        file: String,
        /// The version that this program reads and writes.
        expected: u32,
        /// The version in the file.
        found: u32,
    },
    /// A segment was written with another segment size.
    #[error("log file {file} was written with segments of {found} bytes, not {expected}")]
    SegmentBytes {
        /// The file.
        file: String,
        /// The size asked for.
        expected: u64,
        /// The size in the file.
        found: u64,
    },
}

/// Something that recovery looked for, or came upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// The header of the segment with this sequence number.
    Segment(u64),
    /// No file with such a header.
    NoSegment,
    /// A header that does not pass its checks.
    BadSegmentHeader,
    /// The batch with this number, whole.
    Batch(u64),
    /// No batch that passes its checks, though later ones were written after it was durable.
    BadBatch,
    /// Records as the batch header counts them.
    Records(u32),
    /// Records that cannot be read though the batch's checksum is right.
    BadRecord,
    /// A file of this many bytes.
    FileBytes(u64),
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(seq) => write!(f, "segment {seq}"),
            Self::NoSegment => f.write_str("no such segment"),
            Self::BadSegmentHeader => f.write_str("a bad segment header"),
            Self::Batch(number) => write!(f, "batch {number}"),
            Self::BadBatch => f.write_str("no valid batch"),
            Self::Records(count) => write!(f, "{count} records"),
            Self::BadRecord => f.write_str("a record that cannot be read"),
            Self::FileBytes(bytes) => write!(f, "{bytes} bytes of file"),
        }
    }
}
