//! Reading one segment file.

use std::io;

use crate::checksum::crc32c;
use crate::io::DiskFile;
use crate::limits::{BLOCK_BYTES, SCAN_BYTES};
use crate::log::error::LogOpenError;
use crate::log::format::{BATCH_HEADER_BYTES, BatchHeader, SegmentHeader};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Reads a segment from front to back through a window.
pub(super) struct SegmentScan<'a> {
    file: &'a dyn DiskFile,
    name: &'a str,
    header: SegmentHeader,
    /// Bytes of the file from `window_start`. At most the larger of [`SCAN_BYTES`] and one batch.
    window: Vec<u8>,
    window_start: u64,
}

/// A valid batch.
pub(super) struct Batch<'a> {
    pub(super) header: BatchHeader,
    /// Offset of `body` in the file.
    pub(super) body_at: u64,
    /// Its records.
    pub(super) body: &'a [u8],
}

/// Segment that a batch header claims to be of, whatever else is true of it.
pub(super) fn claimed_segment(block: &[u8]) -> Option<u64> {
    BatchHeader::parse(block).map(|header| header.segment_seq)
}

impl<'a> SegmentScan<'a> {
    pub(super) fn new(file: &'a dyn DiskFile, name: &'a str, header: SegmentHeader) -> Self {
        Self { file, name, header, window: Vec::new(), window_start: 0 }
    }

    /// The batch at `offset`, if it is whole, of this use of the file and has this number.
    pub(super) fn batch(
        &mut self,
        offset: u64,
        number: u64,
    ) -> Result<Option<Batch<'_>>, LogOpenError> {
        let Some(header) = self.header_at(offset)? else { return Ok(None) };
        let fits = offset + header.len() as u64 <= self.header.segment_bytes;
        if header.number != number || header.synced_through >= number || !fits {
            return Ok(None);
        }
        let batch = self.bytes(offset, header.len())?;
        let body = &batch[BATCH_HEADER_BYTES..][..header.body_bytes as usize];
        let whole = crc32c(body) == header.body_crc;
        let body_at = offset + BATCH_HEADER_BYTES as u64;
        Ok(whole.then_some(Batch { header, body_at, body }))
    }

    /// Oldest live segment by this one's header and batches. Looks at headers only: what a header
    /// says of this was so when it was written, even if the rest of its batch was lost.
    pub(super) fn oldest_live(&mut self) -> Result<u64, LogOpenError> {
        let (mut oldest, mut offset) = (self.header.oldest_live, BLOCK);
        let mut number = self.header.first_batch;
        while let Some(header) = self.header_at(offset)? {
            if header.number != number {
                break;
            }
            oldest = oldest.max(header.oldest_live.min(self.header.seq));
            offset += header.len() as u64;
            number += 1;
        }
        Ok(oldest)
    }

    /// True if a batch header from `offset` on was written when batch `number` was durable already.
    pub(super) fn holds_batch_after(
        &mut self,
        offset: u64,
        number: u64,
    ) -> Result<bool, LogOpenError> {
        for block in (offset..self.header.segment_bytes).step_by(BLOCK_BYTES) {
            let header = self.header_at(block)?;
            if header.is_some_and(|header| header.synced_through >= number) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The batch header at `offset`, if it was written there in this use of the file.
    fn header_at(&mut self, offset: u64) -> Result<Option<BatchHeader>, LogOpenError> {
        if offset + BLOCK > self.header.segment_bytes {
            return Ok(None);
        }
        let SegmentHeader { nonce, seq, .. } = self.header;
        let header = BatchHeader::parse(self.bytes(offset, BLOCK_BYTES)?);
        Ok(header.filter(|header| {
            header.nonce == nonce
                && header.segment_seq == seq
                && u64::from(header.block) * BLOCK == offset
        }))
    }

    /// A range of the file, which lies inside it.
    fn bytes(&mut self, offset: u64, len: usize) -> Result<&[u8], LogOpenError> {
        let end = offset + len as u64;
        let window_end = self.window_start + self.window.len() as u64;
        if offset < self.window_start || end > window_end {
            let left = usize::try_from(self.header.segment_bytes - offset).unwrap_or(usize::MAX);
            self.window.resize(len.max(SCAN_BYTES).min(left), 0);
            self.window_start = offset;
            let read = self.file.read_exact_at(&mut self.window, offset);
            read.map_err(|source| self.io_error(source))?;
        }
        let from = usize::try_from(offset - self.window_start).expect("the window is in memory");
        Ok(&self.window[from..from + len])
    }

    fn io_error(&self, source: io::Error) -> LogOpenError {
        LogOpenError::Io { action: "read", file: self.name.to_owned(), source }
    }
}
