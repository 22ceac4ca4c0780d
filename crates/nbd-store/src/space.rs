//! Room: whether a mutation can be taken without the disk running full later.
//!
//! What is in the log has been promised, so room for it must be certain before it is proposed. The
//! gauge compares, in slots:
//!
//! ```text
//!   room    = free slots + what the disk can still give - reserve - SPARE_SLOTS
//!   claimed = chunks in the overlays (each may need a slot) + grants not yet applied
//! ```
//!
//! `claimed` is an upper bound: most chunks that change have a slot already. While it fits, the
//! answer is a few atomic operations. Only when it does not are chunks looked up one by one, those
//! of the mutation and those pending.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nbd_log::io::Disk;
use nbd_log::log::SegmentPool;

use crate::limits::{
    BLOCK_BYTES, CHUNK_BYTES, META_BYTES_PER_CHUNK, META_HEADROOM_BYTES, SPARE_SLOTS,
};

/// What a mutation does, as far as room is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdmissionKind {
    /// A write.
    Write,
    /// A trim: needs no room.
    Trim,
    /// A write-zeroes.
    WriteZeroes {
        /// The range stays allocated, and so needs room.
        no_hole: bool,
    },
}

/// Whether a mutation may be proposed.
#[derive(Debug)]
pub enum Admission {
    /// Yes. Hold the grant until the mutation was applied, or was given up.
    Granted(SpaceGrant),
    /// Perhaps: a checkpoint has to tell what the changes under way really need. Run one and ask
    /// again.
    NeedCheckpoint,
    /// No: the disk is full.
    NoSpace,
}

/// Room held for a mutation until it is dropped.
#[derive(Debug)]
pub struct SpaceGrant {
    gauge: Arc<SpaceGauge>,
    slots: u64,
}

/// A node's room. Shared by whoever admits mutations, the shard writers and the checkpointer;
/// atomics only, since each number is an estimate on the safe side by itself.
pub struct SpaceGauge {
    disk: Arc<dyn Disk>,
    segments: Arc<SegmentPool>,
    /// Never given out.
    reserve_bytes: u64,
    /// Slots that the disk could still give, the reserve left, when last asked.
    disk_slots: AtomicU64,
    /// Slots that are free for the next checkpoint, or will be during it.
    free_slots: AtomicU64,
    /// Chunks in overlays, active and frozen.
    pending: AtomicU64,
    /// Slots in grants.
    granted: AtomicU64,
    /// A range was cleared since the last checkpoint, so that one may free slots.
    cleared: AtomicBool,
    /// The last checkpoint found no room: what is in the log cannot be brought home for now.
    starved: AtomicBool,
}

impl fmt::Debug for SpaceGauge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpaceGauge")
            .field("room_slots", &self.room())
            .field("claimed_slots", &self.claimed())
            .finish_non_exhaustive()
    }
}

impl Drop for SpaceGrant {
    fn drop(&mut self) {
        self.gauge.granted.fetch_sub(self.slots, Ordering::Relaxed);
    }
}

impl AdmissionKind {
    /// The chunks that the mutation may need room for, as at most two ranges.
    pub(crate) fn chunks(self, offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
        let end = offset.saturating_add(len);
        let whole = offset / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES);
        let none = 0..0;
        let (first, second) = match self {
            Self::Trim => (none.clone(), none),
            Self::Write | Self::WriteZeroes { no_hole: true } => (whole, none),
            Self::WriteZeroes { no_hole: false } => {
                // Only the edges, as far as they are parts of blocks, are written.
                let edge = |at: u64| {
                    let chunk = at / CHUNK_BYTES;
                    if at.is_multiple_of(BLOCK_BYTES) { 0..0 } else { chunk..chunk + 1 }
                };
                let (head, tail) = (edge(offset), edge(end));
                if head == tail { (head, none) } else { (head, tail) }
            }
        };
        [first, second].into_iter().filter(|range| !range.is_empty())
    }
}

/// Bytes that the log's files may still grow by.
pub(crate) fn log_growth(segments: &SegmentPool) -> u64 {
    segments.bytes_max().saturating_sub(segments.file_bytes())
}

impl SpaceGauge {
    /// The gauge of the node on `disk`, of which `reserve_bytes` are never given out (nor, whatever
    /// that is, what the metadata database needs to go on).
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        segments: Arc<SegmentPool>,
        reserve_bytes: u64,
    ) -> io::Result<Self> {
        let gauge = Self {
            disk,
            segments,
            reserve_bytes: reserve_bytes.max(META_HEADROOM_BYTES),
            disk_slots: AtomicU64::new(0),
            free_slots: AtomicU64::new(0),
            pending: AtomicU64::new(0),
            granted: AtomicU64::new(0),
            cleared: AtomicBool::new(false),
            starved: AtomicBool::new(false),
        };
        gauge.refresh()?;
        Ok(gauge)
    }

    /// Asks the disk how much it has left. Others may fill it too, so do this every second or so.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn refresh(&self) -> io::Result<()> {
        // What the log may still grow by is spoken for: it must never be what runs out.
        let kept = self.reserve_bytes + log_growth(&self.segments);
        let bytes = self.disk.space_available()?.saturating_sub(kept);
        self.disk_slots.store(bytes / (CHUNK_BYTES + META_BYTES_PER_CHUNK), Ordering::Relaxed);
        Ok(())
    }

    /// Bytes that new chunks may still take, as of the last look.
    #[must_use]
    pub fn available_bytes(&self) -> u64 {
        self.room().saturating_sub(self.claimed()) * CHUNK_BYTES
    }

    /// A grant, if there is clearly room. Never blocks. `None` means that
    /// [`crate::ShardReader::admit`] has to look, on a thread that may block.
    #[must_use]
    pub fn admit_fast(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        kind: AdmissionKind,
    ) -> Option<SpaceGrant> {
        if self.log_is_for_trims_only(kind) {
            return None;
        }
        let needed = kind.chunks(offset, len).map(|range| range.end - range.start).sum();
        self.grant(needed, 0)
    }

    /// While checkpoints find no room, the log fills. Its second half is kept for what may make
    /// room: it would be too late for a trim once the log is full.
    pub(crate) fn log_is_for_trims_only(&self, kind: AdmissionKind) -> bool {
        let gives_room =
            matches!(kind, AdmissionKind::Trim | AdmissionKind::WriteZeroes { no_hole: false });
        !gives_room
            && self.starved.load(Ordering::Relaxed)
            && self.segments.live_bytes() > self.segments.bytes_max() / 2
    }

    /// Whether the last checkpoint found no room.
    pub(crate) fn set_starved(&self, starved: bool) {
        self.starved.store(starved, Ordering::Relaxed);
    }

    /// The answer for a mutation of which `homeless` chunks have no slot, when `at_home` of the
    /// pending ones have one and need no other. Asks the disk afresh.
    pub(crate) fn admit_precisely(
        self: &Arc<Self>,
        homeless: u64,
        at_home: u64,
    ) -> io::Result<Admission> {
        self.refresh()?;
        if let Some(grant) = self.grant(homeless, at_home) {
            return Ok(Admission::Granted(grant));
        }
        // With nothing under way a grant was refused for want of room alone.
        let fits_alone = self.claimed() > 0 && homeless <= self.room();
        Ok(if fits_alone || self.cleared.load(Ordering::Relaxed) {
            Admission::NeedCheckpoint
        } else {
            Admission::NoSpace
        })
    }

    fn grant(self: &Arc<Self>, slots: u64, at_home: u64) -> Option<SpaceGrant> {
        // Added first and looked at second: of two that compete for the last room at most one can
        // miss the other.
        self.granted.fetch_add(slots, Ordering::Relaxed);
        let grant = SpaceGrant { gauge: Arc::clone(self), slots };
        (slots == 0 || self.claimed().saturating_sub(at_home) <= self.room()).then_some(grant)
    }

    fn claimed(&self) -> u64 {
        self.pending.load(Ordering::Relaxed) + self.granted.load(Ordering::Relaxed)
    }

    fn room(&self) -> u64 {
        let slots =
            self.free_slots.load(Ordering::Relaxed) + self.disk_slots.load(Ordering::Relaxed);
        slots.saturating_sub(SPARE_SLOTS)
    }

    /// The number of chunks in a shard's overlays has changed.
    pub(crate) fn pending_changed(&self, before: u64, after: u64) {
        if after >= before {
            self.pending.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.pending.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Whether something was cleared that no checkpoint has begun to write home.
    pub(crate) fn set_cleared(&self, cleared: bool) {
        if self.cleared.load(Ordering::Relaxed) != cleared {
            self.cleared.store(cleared, Ordering::Relaxed);
        }
    }

    /// Upper bound of the slots that the overlays will need.
    pub(crate) fn pending(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }

    /// The data file may have grown, and has this many free slots now.
    pub(crate) fn measure(&self, free: u64) -> io::Result<()> {
        // In this order: in between the same room is missing on both sides, never counted on both.
        self.refresh()?;
        self.set_free_slots(free);
        Ok(())
    }

    /// The data file has this many free slots.
    pub(crate) fn set_free_slots(&self, free: u64) {
        self.free_slots.store(free, Ordering::Relaxed);
    }
}
