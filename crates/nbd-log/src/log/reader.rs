//! Entry data by position.

use std::sync::Arc;

use bytes::Bytes;

use super::cache::EntryCache;
use super::error::LogReadError;
use super::pool::{LogPin, Place, SegmentPool};
use super::record::LogPosition;

/// Reads what was appended, from memory or from the segment files. Clones are cheap and may be used
/// from any thread.
#[derive(Debug, Clone)]
pub struct LogReader {
    pool: Arc<SegmentPool>,
    cache: Arc<EntryCache>,
}

impl LogReader {
    pub(super) const fn new(pool: Arc<SegmentPool>, cache: Arc<EntryCache>) -> Self {
        Self { pool, cache }
    }

    /// Keeps every segment that is live now readable until the pin and its clones are dropped.
    #[must_use]
    pub fn pin(&self) -> LogPin {
        self.pool.pin()
    }

    /// The bytes as a slice of the entry's own buffer, if that is still in memory.
    #[must_use]
    pub fn cached(&self, position: LogPosition, len: usize) -> Option<Bytes> {
        self.cache.get(position, len)
    }

    /// Fills `buf` from `position`; may block on the disk. The bytes are as the disk gave them:
    /// only the caller knows their checksum.
    pub fn read(&self, position: LogPosition, buf: &mut [u8]) -> Result<(), LogReadError> {
        if self.copy_cached(position, buf) {
            return Ok(());
        }
        let place = self.pool.locate(position, buf.len())?;
        place.file.read_exact_at(buf, place.offset).map_err(|e| io_error(&place, e))?;
        self.recheck(position, buf.len())
    }

    /// Fills `buf` from `position` if that needs no waiting. `Ok(false)`, with `buf` in any state,
    /// if it would block.
    pub fn try_read(&self, position: LogPosition, buf: &mut [u8]) -> Result<bool, LogReadError> {
        if self.copy_cached(position, buf) {
            return Ok(true);
        }
        let place = self.pool.locate(position, buf.len())?;
        let done =
            place.file.try_read_cached_at(buf, place.offset).map_err(|e| io_error(&place, e))?;
        self.recheck(position, buf.len())?;
        Ok(done)
    }

    fn copy_cached(&self, position: LogPosition, buf: &mut [u8]) -> bool {
        match self.cached(position, buf.len()) {
            Some(data) => {
                buf.copy_from_slice(&data);
                true
            }
            None => false,
        }
    }

    /// Without a pin the file may have been taken into use again while it was read. A sequence
    /// number leaves the pool for good before that happens, so that looking again tells.
    fn recheck(&self, position: LogPosition, len: usize) -> Result<(), LogReadError> {
        self.pool.locate(position, len).map(|_| ())
    }
}

fn io_error(place: &Place, source: std::io::Error) -> LogReadError {
    LogReadError::Io { file: place.name.to_string(), source }
}
