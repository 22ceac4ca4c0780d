//! The bytes of the log. All integers are little-endian; all checksums are CRC32C.
//!
//! A **segment** is a file of a fixed size, prefilled with zeroes. Its first block is the header,
//! its last one is kept free for a closing batch; batches lie between, each at a multiple of 4096.
//!
//! ```text
//! 0        4096                                          size - 4096      size
//! ├ header ┼ batch ─┼ batch ───┼ batch ─┼ … ┼ old bytes ─┼ closing batch ─┤
//!
//! Segment header (the rest of its block is zero)
//!  0  u64  magic "CBLOGSEG"
//!  8  u32  format version, 1
//! 12  u32  0
//! 16  u64  sequence number: 1 for the first segment, one more at each use of a file
//! 24  u64  nonce, drawn at random for this use
//! 32  u64  number of the first batch in this segment
//! 40  u64  sequence number of the oldest live segment when this one was begun
//! 48  u64  identity of the data directory
//! 56  u64  segment size
//! 64  u32  checksum of bytes 0..64
//!
//! Batch: header, records, zeroes up to the next multiple of 4096
//!  0  u64  magic "CBLOGBAT"
//!  8  u64  nonce of its segment
//! 16  u64  sequence number of its segment
//! 24  u64  batch number: 1 for the first batch, one more for each, across segments
//! 32  u64  synced through: number of the last batch known durable when this one was issued
//! 40  u64  sequence number of the oldest live segment when this one was issued
//! 48  u32  block in the segment at which this batch starts
//! 52  u32  number of records
//! 56  u32  bytes of all records
//! 60  u32  checksum of all records
//! 64  u32  checksum of bytes 0..64
//!
//! Record: header, and for an entry its data, without padding
//!  0  u8   type: 1 hard state, 2 entry
//!  1  u8   entry: kind (0 command, 1 and 2 membership change); hard state: 0
//!  2  u16  0
//!  4  u32  shard
//!  8  u64  term
//! 16  u64  entry: index; hard state: vote
//! 24  u64  entry: bytes of data; hard state: commit index
//! ```
//!
//! **What makes a batch valid**: both magics and checksums, and that nonce, segment, number and
//!  block
//! are exactly those expected at its place. So bytes of an earlier use of the file are never taken
//! for new, and no payload can pass for a batch: it would have to hold a nonce that its writer
//! cannot know, or a batch number that was not yet given when it was written.
//!
//! **Oldest live segment** is what lets a file be reused: files of lower sequence numbers hold
//! nothing, whatever is in them. A file is overwritten only once a durable batch or header says so
//! of it; where none does yet, a closing batch without records goes into the last block first.

use nbd_topology::{LogIndex, ShardId, Term};

use super::record::{EntryKind, HardState, Record, ScannedEntry, ScannedRecord};
use crate::checksum::crc32c;
use crate::io::AlignedBuf;
use crate::limits::{BATCH_BYTES_MAX, BLOCK_BYTES};

/// Version of the format above. 1 is the first.
pub const FORMAT_VERSION: u32 = 1;

/// Bytes that a batch spends before its records.
pub const BATCH_HEADER_BYTES: usize = CHECKED_BYTES + 4;

/// Bytes that a record spends before its data.
pub const RECORD_HEADER_BYTES: usize = 32;

const SEGMENT_MAGIC: u64 = u64::from_le_bytes(*b"CBLOGSEG");
const BATCH_MAGIC: u64 = u64::from_le_bytes(*b"CBLOGBAT");
const TYPE_HARD_STATE: u8 = 1;
const TYPE_ENTRY: u8 = 2;

/// Bytes under the checksum of either header.
const CHECKED_BYTES: usize = 64;

/// The header of a segment, see the module's drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Sequence number of this use of the file.
    pub seq: u64,
    /// Random number of this use of the file.
    pub nonce: u64,
    /// Number of its first batch.
    pub first_batch: u64,
    /// Oldest live segment when it was begun. `oldest_live <= seq`.
    pub oldest_live: u64,
    /// Identity of the data directory.
    pub identity: u64,
    /// Size of the file.
    pub segment_bytes: u64,
}

/// What the first block of a segment file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParsedSegmentHeader {
    /// A header in this format.
    Valid(SegmentHeader),
    /// A header with a right checksum in another format version.
    OtherVersion(u32),
    /// Anything else: blank, torn or damaged.
    Invalid,
}

impl SegmentHeader {
    /// The header's block.
    #[must_use]
    pub fn encode(&self) -> AlignedBuf {
        let mut block = AlignedBuf::with_capacity(BLOCK_BYTES);
        block.extend_from_slice(&SEGMENT_MAGIC.to_le_bytes());
        block.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        block.extend_from_slice(&[0; 4]);
        let fields = [
            self.seq,
            self.nonce,
            self.first_batch,
            self.oldest_live,
            self.identity,
            self.segment_bytes,
        ];
        for field in fields {
            block.extend_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c(&block);
        block.extend_from_slice(&crc.to_le_bytes());
        block.pad_to_block();
        block
    }

    /// Reads a header from at least its first 68 bytes.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> ParsedSegmentHeader {
        if !is_checked(bytes, SEGMENT_MAGIC) {
            return ParsedSegmentHeader::Invalid;
        }
        let version = u32_at(bytes, 8);
        if version != FORMAT_VERSION {
            return ParsedSegmentHeader::OtherVersion(version);
        }
        let header = Self {
            seq: u64_at(bytes, 16),
            nonce: u64_at(bytes, 24),
            first_batch: u64_at(bytes, 32),
            oldest_live: u64_at(bytes, 40),
            identity: u64_at(bytes, 48),
            segment_bytes: u64_at(bytes, 56),
        };
        ParsedSegmentHeader::Valid(header)
    }
}

/// The header of a batch, see the module's drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// Nonce of its segment.
    pub nonce: u64,
    /// Sequence number of its segment.
    pub segment_seq: u64,
    /// Its number. `number > synced_through`.
    pub number: u64,
    /// Number of the last batch known durable when this one was issued.
    pub synced_through: u64,
    /// Oldest live segment when it was issued. `oldest_live <= segment_seq`.
    pub oldest_live: u64,
    /// Block in the segment at which it starts, at least 1.
    pub block: u32,
    /// Number of records.
    pub records: u32,
    /// Bytes of all records.
    pub body_bytes: u32,
    /// Checksum of all records.
    pub body_crc: u32,
}

impl BatchHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; BATCH_HEADER_BYTES] {
        let mut bytes = [0; BATCH_HEADER_BYTES];
        let longs = [
            BATCH_MAGIC,
            self.nonce,
            self.segment_seq,
            self.number,
            self.synced_through,
            self.oldest_live,
        ];
        for (n, field) in longs.into_iter().enumerate() {
            bytes[8 * n..8 * (n + 1)].copy_from_slice(&field.to_le_bytes());
        }
        let shorts = [self.block, self.records, self.body_bytes, self.body_crc];
        for (n, field) in shorts.into_iter().enumerate() {
            bytes[48 + 4 * n..48 + 4 * (n + 1)].copy_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c(&bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header from at least its first 68 bytes. `None` if magic or checksum are wrong, or
    /// if it claims more than a batch may have.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        if !is_checked(bytes, BATCH_MAGIC) {
            return None;
        }
        let header = Self {
            nonce: u64_at(bytes, 8),
            segment_seq: u64_at(bytes, 16),
            number: u64_at(bytes, 24),
            synced_through: u64_at(bytes, 32),
            oldest_live: u64_at(bytes, 40),
            block: u32_at(bytes, 48),
            records: u32_at(bytes, 52),
            body_bytes: u32_at(bytes, 56),
            body_crc: u32_at(bytes, 60),
        };
        (header.len() <= BATCH_BYTES_MAX).then_some(header)
    }

    /// Bytes of the whole batch, header and padding included.
    #[must_use]
    pub fn len(&self) -> usize {
        batch_bytes(usize::try_from(self.body_bytes).unwrap_or(usize::MAX))
    }

    /// True for a batch without records, as written to close a segment.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records == 0
    }
}

/// Bytes that a batch with records of `body_bytes` takes on disk.
#[must_use]
pub const fn batch_bytes(body_bytes: usize) -> usize {
    body_bytes.saturating_add(BATCH_HEADER_BYTES + BLOCK_BYTES - 1) / BLOCK_BYTES * BLOCK_BYTES
}

impl Record<'_> {
    /// Bytes that the record takes in a batch.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        match self {
            Self::HardState(..) => RECORD_HEADER_BYTES,
            Self::Entry(entry) => RECORD_HEADER_BYTES + entry.data.len(),
        }
    }

    /// Appends the record, and returns the offset in `buf` of an entry's data, or else of the
    /// record.
    pub(super) fn encode(&self, buf: &mut AlignedBuf) -> usize {
        let start = buf.len();
        let (kind, shard, fields) = match self {
            Self::HardState(shard, state) => {
                ([TYPE_HARD_STATE, 0], shard, [state.term.0, state.vote, state.commit.0])
            }
            Self::Entry(e) => {
                let fields = [e.term.0, e.index.0, e.data.len() as u64];
                ([TYPE_ENTRY, e.kind as u8], &e.shard, fields)
            }
        };
        let mut header = [0; RECORD_HEADER_BYTES];
        header[..2].copy_from_slice(&kind);
        header[4..8].copy_from_slice(&shard.0.to_le_bytes());
        for (n, field) in fields.into_iter().enumerate() {
            header[8 * (n + 1)..8 * (n + 2)].copy_from_slice(&field.to_le_bytes());
        }
        buf.extend_from_slice(&header);
        match self {
            Self::HardState(..) => start,
            Self::Entry(entry) => {
                buf.extend_from_slice(entry.data);
                start + RECORD_HEADER_BYTES
            }
        }
    }
}

/// Takes one record off the front of a batch's records. Returns it, the offset in `body` of an
/// entry's data or else of the record, and the record's whole length; `None` if it cannot be read.
#[must_use]
pub fn parse_record(body: &[u8]) -> Option<(ScannedRecord<'_>, usize, usize)> {
    let header = body.get(..RECORD_HEADER_BYTES)?;
    let shard = ShardId(u32_at(header, 4));
    let [first, second, third] = [8, 16, 24].map(|at| u64_at(header, at));
    match (header[0], header[1]) {
        (TYPE_HARD_STATE, 0) => {
            let state = HardState { term: Term(first), vote: second, commit: LogIndex(third) };
            Some((ScannedRecord::HardState(shard, state), 0, RECORD_HEADER_BYTES))
        }
        (TYPE_ENTRY, kind) => {
            let kind = EntryKind::from_u8(kind)?;
            let data = body[RECORD_HEADER_BYTES..].get(..usize::try_from(third).ok()?)?;
            let (term, index) = (Term(first), LogIndex(second));
            let entry = ScannedEntry { shard, index, term, kind, data };
            let bytes = RECORD_HEADER_BYTES + data.len();
            Some((ScannedRecord::Entry(entry), RECORD_HEADER_BYTES, bytes))
        }
        _ => None,
    }
}

/// True if the bytes begin with this magic and their header checksum is right.
fn is_checked(bytes: &[u8], magic: u64) -> bool {
    bytes.len() >= CHECKED_BYTES + 4
        && u64_at(bytes, 0) == magic
        && u32_at(bytes, CHECKED_BYTES) == crc32c(&bytes[..CHECKED_BYTES])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
