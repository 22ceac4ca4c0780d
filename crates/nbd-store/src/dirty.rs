//! How much log there is that no checkpoint covers.

use std::sync::atomic::{AtomicU64, Ordering};

use nbd_log::log::LogPosition;

/// Bytes of log between the last freeze and the newest entry applied. A leaf shared by the shard
/// writers, which advance it, and the checkpointer; `frozen <= newest`.
#[derive(Debug, Default)]
pub(crate) struct DirtyLog {
    newest: AtomicU64,
    frozen: AtomicU64,
}

impl DirtyLog {
    /// Everything before `position` has been applied.
    pub(crate) fn advance(&self, position: LogPosition) {
        self.newest.fetch_max(position.0, Ordering::Relaxed);
    }

    /// What comes from `position` on is not covered by a checkpoint; nothing before counts.
    pub(crate) fn start(&self, position: LogPosition) {
        self.frozen.store(position.0, Ordering::Relaxed);
        self.advance(position);
    }

    /// Where what no checkpoint covers begins.
    pub(crate) fn covered(&self) -> LogPosition {
        LogPosition(self.frozen.load(Ordering::Relaxed))
    }

    /// End of what was applied.
    pub(crate) fn newest(&self) -> LogPosition {
        LogPosition(self.newest.load(Ordering::Relaxed))
    }

    /// Bytes that the next checkpoint will cover.
    pub(crate) fn bytes(&self) -> u64 {
        let newest = self.newest.load(Ordering::Relaxed);
        newest.saturating_sub(self.frozen.load(Ordering::Relaxed))
    }
}
