//! Sizes of a log.

use super::error::OptionsError;
use super::format::{BATCH_HEADER_BYTES, RECORD_HEADER_BYTES};
use crate::limits::{
    BLOCK_BYTES, ENTRY_BYTES_MAX, SEGMENT_BYTES_MAX, SEGMENT_BYTES_MIN, SEGMENTS_MIN,
};

/// Sizes of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogOptions {
    /// Size of a segment file. Fixed for the life of a data directory. Default 64 MiB; a multiple
    /// of 4096, from [`SEGMENT_BYTES_MIN`] to [`SEGMENT_BYTES_MAX`].
    pub segment_bytes: u64,
    /// Most bytes that segment files may take, spares included. At least [`SEGMENTS_MIN`] segments.
    /// A lower value than before does not remove files that are there already.
    pub log_bytes_max: u64,
    /// Most bytes of entry data kept in memory for readers. Default 64 MiB; 0 keeps nothing.
    pub cache_bytes_max: usize,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, log_bytes_max: 1 << 30, cache_bytes_max: 64 << 20 }
    }
}

impl LogOptions {
    /// Refuses sizes that cannot work.
    pub fn validate(&self) -> Result<(), OptionsError> {
        let Self { segment_bytes, log_bytes_max, .. } = *self;
        if !(SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX).contains(&segment_bytes)
            || !segment_bytes.is_multiple_of(BLOCK_BYTES as u64)
        {
            return Err(OptionsError::SegmentBytes { given: segment_bytes });
        }
        if log_bytes_max / segment_bytes < SEGMENTS_MIN {
            let least = SEGMENTS_MIN * segment_bytes;
            return Err(OptionsError::LogBytesMax { given: log_bytes_max, least });
        }
        Ok(())
    }

    /// Most data that one entry may carry: [`ENTRY_BYTES_MAX`], or less if a segment is so small
    /// that such an entry would not fit between its header and its closing block.
    #[must_use]
    pub fn entry_bytes_max(&self) -> usize {
        let overhead = 2 * BLOCK_BYTES + BATCH_HEADER_BYTES + RECORD_HEADER_BYTES;
        let room = self.segment_bytes.saturating_sub(overhead as u64);
        usize::try_from(room).unwrap_or(usize::MAX).min(ENTRY_BYTES_MAX)
    }
}
