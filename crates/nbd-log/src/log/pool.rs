//! The life of segment files: spare, active, sealed, freed, spare again.
//!
//! ```text
//!             prepare_spare           LogWriter rotates        LogWriter rotates away
//!   (nothing) ────────────▶  spare  ───────────────────▶ active ────────────────▶ sealed
//!                              ▲                                                    │ free_through
//!                              └──────── waiting, until older pins are gone ◀───────┘
//! ```
//!
//! **Retention.** What is covered, that is on stable storage elsewhere, is freed unless somebody
//! asked to retain it, so that followers can be sent it. It gives way, oldest first, as soon as the
//! writer finds no other room: a log full of what is merely nice to have never stops a write.
//!
//! **Pins.** The pool holds one token (an `Arc`) for the present epoch, and a pin is a clone of it.
//! Freeing segments ends the epoch: they wait together with its token. They become spares once
//! nobody else holds the token *and* everything freed before them has become spare. A pin taken
//! before they were freed is of their epoch or an older one: the first condition covers the former,
//! the second the latter. A token whose epoch has ended can only be cloned from a pin, so a count
//! that has fallen to one stays there.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::Arc;

use nbd_topology::{LogIndex, ShardId};
use parking_lot::Mutex;

use super::error::LogReadError;
use super::options::LogOptions;
use super::record::{HardState, LogPosition};
use crate::io::{AlignedBuf, Disk, DiskFile, OpenMode};
use crate::limits::SCAN_BYTES;

/// Directory of the segment files.
pub(super) const LOG_DIR: &str = "log";

/// The segment files of a log. Shared by the writer, the readers and whoever takes checkpoints; a
/// lock around a leaf, held across no I/O.
pub struct SegmentPool {
    disk: Arc<dyn Disk>,
    options: LogOptions,
    state: Mutex<State>,
    /// Held while a file is made, so that writer and background thread do not each make one.
    creating: Mutex<()>,
    /// Last durable hard state of each shard since the log was opened. Noted before the batch after
    /// it is written.
    hard_states: Mutex<BTreeMap<ShardId, HardState>>,
}

/// Keeps segments readable, see [`super::LogReader::pin`]. Clones hold the same segments.
#[derive(Clone)]
pub struct LogPin {
    _epoch: Arc<()>,
}

/// A live or waiting segment.
pub(super) struct Segment {
    pub(super) seq: u64,
    pub(super) name: Arc<str>,
    pub(super) file: Arc<dyn DiskFile>,
    /// Lowest and highest index of each shard that has entries here.
    pub(super) indexes: Indexes,
}

/// Lowest and highest index by shard.
pub(super) type Indexes = BTreeMap<ShardId, (LogIndex, LogIndex)>;

/// Hard states as of some moment, see [`SegmentPool::hard_states`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardStates {
    /// The last one of each shard that was written since the log was opened.
    pub states: BTreeMap<ShardId, HardState>,
    /// The segment that was active then: it and all after it may hold newer ones.
    active: u64,
}

/// A file that may be written over.
pub(super) struct Spare {
    pub(super) name: Arc<str>,
    pub(super) file: Arc<dyn DiskFile>,
    /// Sequence number of its last use, `None` if it was never used. Written over only once a
    /// durable batch or header names a higher one as the oldest that is live.
    pub(super) last_seq: Option<u64>,
}

/// Where a position lies.
pub(super) struct Place {
    pub(super) name: Arc<str>,
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) offset: u64,
}

/// Why the writer gets no spare.
pub(super) enum TakeError {
    Full,
    Io { file: String, source: io::Error },
}

struct State {
    /// For each shard, the index above which entries are retained though they are covered.
    retained: BTreeMap<ShardId, LogIndex>,
    /// For each shard, the last entry that is on stable storage elsewhere.
    covered: BTreeMap<ShardId, LogIndex>,
    /// No segment before this one holds a hard state that is not on stable storage elsewhere.
    covered_before: u64,
    /// Consecutive sequence numbers; the last one is active, the others are sealed.
    live: VecDeque<Segment>,
    /// End of the last batch in the active segment. 0 without one.
    active_end: u64,
    /// Freed, oldest first, each group with the token of the epoch that its freeing ended.
    waiting: VecDeque<Waiting>,
    spares: Vec<Spare>,
    /// Token of the present epoch.
    epoch: Arc<()>,
    /// Files that exist or are being made. Bounded by the log's size, except that files found at
    /// opening are kept. Equals live + waiting + spares + those being made or in the writer's
    /// hands.
    files: u64,
    /// Number that no file has yet.
    next_file: u64,
}

struct Waiting {
    epoch: Arc<()>,
    segments: Vec<Segment>,
}

impl SegmentPool {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        options: LogOptions,
        live: VecDeque<Segment>,
        active_end: u64,
        spares: Vec<Spare>,
        next_file: u64,
    ) -> Self {
        let files = (live.len() + spares.len()) as u64;
        let state = State {
            retained: BTreeMap::new(),
            covered: BTreeMap::new(),
            covered_before: 0,
            live,
            active_end,
            waiting: VecDeque::new(),
            spares,
            epoch: Arc::new(()),
            files,
            next_file,
        };
        let (creating, hard_states) = (Mutex::new(()), Mutex::default());
        Self { disk, options, state: Mutex::new(state), creating, hard_states }
    }

    /// Makes sure that the writer finds a spare segment, unless the log is at its bound: prefills
    /// one if there is none. Takes as long as writing a segment; meant for a background thread,
    /// often. Returns true if it made one.
    ///
    /// An error leaves the log as it was; `StorageFull` is worth a retry, others are not.
    pub fn prepare_spare(&self) -> io::Result<bool> {
        let _creating = self.creating.lock();
        {
            let mut state = self.state.lock();
            state.release();
            if !state.spares.is_empty() || state.files >= self.files_max() {
                return Ok(false);
            }
        }
        self.create_spare().map_err(|(_, source)| source)?;
        Ok(true)
    }

    /// Notes what need not be in the log any more, and frees nothing yet: every entry at or below
    /// the index given for its shard, and these hard states with all before them, are on stable
    /// storage elsewhere. The next recovery may not find them here.
    pub fn cover(&self, covered: &BTreeMap<ShardId, LogIndex>, hard_states: &HardStates) {
        let mut state = self.state.lock();
        for (&shard, &index) in covered {
            let known = state.covered.entry(shard).or_insert(index);
            *known = index.max(*known);
        }
        state.covered_before = state.covered_before.max(hard_states.active);
    }

    /// As [`SegmentPool::cover`], and frees the oldest sealed segments as long as all in them is
    /// covered and none of it is retained. Returns how many that were.
    pub fn free_through(
        &self,
        covered: &BTreeMap<ShardId, LogIndex>,
        hard_states: &HardStates,
    ) -> usize {
        self.cover(covered, hard_states);
        let mut state = self.state.lock();
        let freed = state.live.iter().take_while(|segment| state.is_free(segment)).count();
        state.free(freed);
        state.release();
        freed
    }

    /// Whether [`SegmentPool::free_through`] of these indexes would free anything, were all hard
    /// states on stable storage elsewhere.
    #[must_use]
    pub fn could_free(&self, covered: &BTreeMap<ShardId, LogIndex>) -> bool {
        let state = self.state.lock();
        let sealed = state.live.len() > 1;
        sealed
            && state.live.front().is_some_and(|oldest| {
                let mut indexes = oldest.indexes.iter();
                indexes.all(|(shard, (_, highest))| {
                    let through = covered.get(shard).copied().unwrap_or_default();
                    *highest <= through && !state.is_retained(*shard, *highest)
                })
            })
    }

    /// Asks to keep the shard's entries above this index, though they may be covered; `LogIndex` of
    /// `u64::MAX` asks for nothing, as is so at first. They go all the same when the writer finds
    /// no other room; see [`SegmentPool::first_kept`].
    pub fn retain(&self, shard: ShardId, above: LogIndex) {
        self.state.lock().retained.insert(shard, above);
    }

    /// The lowest index from which on the shard's entries are in live segments without a gap:
    /// entries below it may be gone. `None` if it has none there.
    #[must_use]
    pub fn first_kept(&self, shard: ShardId) -> Option<LogIndex> {
        let state = self.state.lock();
        let mut ranges = state.live.iter().rev().filter_map(|s| s.indexes.get(&shard));
        let (mut first, _) = *ranges.next()?;
        for (lowest, highest) in ranges {
            if highest.next() < first {
                break;
            }
            first = first.min(*lowest);
        }
        Some(first)
    }

    /// The shard's entries before this position are void: they are kept for nobody, whatever their
    /// index. `behind` is the lowest and highest index of its entries behind the position in the
    /// same segment; nothing of the shard may be on its way to the log.
    pub fn void(&self, shard: ShardId, before: LogPosition, behind: Option<(LogIndex, LogIndex)>) {
        let cut = before.0 / self.options.segment_bytes;
        let mut state = self.state.lock();
        for segment in state.live.iter_mut().filter(|segment| segment.seq <= cut) {
            let left = behind.filter(|_| segment.seq == cut);
            match left {
                Some(indexes) => segment.indexes.insert(shard, indexes),
                None => segment.indexes.remove(&shard),
            };
        }
    }

    /// Whether the log is half full and its oldest segment stays because of entries of this shard
    /// that nothing covers: copies of them at the end of the log would let it go.
    #[must_use]
    pub fn is_held_up_by(&self, shard: ShardId) -> bool {
        let state = self.state.lock();
        let is_half_full = 2 * state.live.len() as u64 >= self.files_max();
        let covered = state.covered.get(&shard).copied().unwrap_or_default();
        let oldest = state.live.front().filter(|_| state.live.len() > 1);
        is_half_full
            && oldest
                .and_then(|segment| segment.indexes.get(&shard))
                .is_some_and(|(_, highest)| *highest > covered)
    }

    /// The shard's entries above `applied` that count lie at `from` or behind: others above it, in
    /// segments before, were superseded or copied, and keep nothing.
    pub fn tail_begins(&self, shard: ShardId, applied: LogIndex, from: LogPosition) {
        let first = from.0 / self.options.segment_bytes;
        let mut state = self.state.lock();
        for segment in state.live.iter_mut().filter(|segment| segment.seq < first) {
            match segment.indexes.get_mut(&shard) {
                Some((lowest, _)) if *lowest > applied => _ = segment.indexes.remove(&shard),
                Some((_, highest)) => *highest = applied.min(*highest),
                None => {}
            }
        }
    }

    /// Where the next batch will lie, or before. The data of every entry in the log begins at this
    /// position or before it (at it only if there is none), and that of every later one behind it.
    #[must_use]
    pub fn next_position(&self) -> LogPosition {
        let state = self.state.lock();
        let active = state.live.back().map_or(1, |segment| segment.seq);
        LogPosition(active * self.options.segment_bytes + state.active_end)
    }

    /// Turns freed segments into spares as far as pins allow. Freeing and preparing do the same;
    /// this is for when nothing else happens. Returns the number of spares.
    pub fn release(&self) -> usize {
        let mut state = self.state.lock();
        state.release();
        state.spares.len()
    }

    /// Bytes of log that no checkpoint covers: whole sealed segments and what is written of the
    /// active one.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        let state = self.state.lock();
        let sealed = state.live.len().saturating_sub(1) - state.covered_segments();
        sealed as u64 * self.options.segment_bytes + state.active_end
    }

    /// Bytes of log that are only kept because somebody asked to retain them: room that the writer
    /// has when it needs it.
    #[must_use]
    pub fn retained_bytes(&self) -> u64 {
        self.state.lock().covered_segments() as u64 * self.options.segment_bytes
    }

    /// Last hard state of each shard that was written, durably, since the log was opened: what a
    /// checkpoint has to hold before it frees segments.
    #[must_use]
    pub fn hard_states(&self) -> HardStates {
        // The segment first: a hard state that is not noted yet lies in it or behind.
        let active = self.state.lock().live.back().map_or(0, |segment| segment.seq);
        HardStates { states: self.hard_states.lock().clone(), active }
    }

    pub(super) fn note_hard_state(&self, shard: ShardId, hard_state: HardState) {
        self.hard_states.lock().insert(shard, hard_state);
    }

    /// Bytes that segment files take now, spares included.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.state.lock().files * self.options.segment_bytes
    }

    /// Most bytes that segment files may take.
    #[must_use]
    pub const fn bytes_max(&self) -> u64 {
        self.options.log_bytes_max
    }

    /// Segments that ordinary writes leave alone, see [`super::LogWriter::append_ordinary`]: a
    /// quarter of the log.
    #[must_use]
    pub fn reserve(&self) -> u64 {
        (self.files_max() / 4).max(1)
    }

    /// Most bytes of log that ordinary writes fill.
    #[must_use]
    pub fn ordinary_bytes_max(&self) -> u64 {
        self.options.log_bytes_max - self.reserve() * self.options.segment_bytes
    }

    /// Size of one segment.
    #[must_use]
    pub const fn segment_bytes(&self) -> u64 {
        self.options.segment_bytes
    }

    pub(super) const fn options(&self) -> &LogOptions {
        &self.options
    }

    pub(super) fn pin(&self) -> LogPin {
        LogPin { _epoch: Arc::clone(&self.state.lock().epoch) }
    }

    /// Finds the file that holds `len` bytes from `position`.
    pub(super) fn locate(&self, position: LogPosition, len: usize) -> Result<Place, LogReadError> {
        let size = self.options.segment_bytes;
        let (seq, offset) = (position.0 / size, position.0 % size);
        if offset + len as u64 > size {
            return Err(LogReadError::OutOfRange { position, len });
        }
        let state = self.state.lock();
        let segment = state.segment(seq).ok_or(LogReadError::Freed { position })?;
        Ok(Place { name: Arc::clone(&segment.name), file: Arc::clone(&segment.file), offset })
    }

    /// Sequence number of the oldest live segment, `None` in a log that was never written.
    pub(super) fn oldest_live(&self) -> Option<u64> {
        self.state.lock().live.front().map(|segment| segment.seq)
    }

    /// Takes `count` spares so that `leaving` segments can still be taken, making files where there
    /// are too few and the bound allows it. All or none. The longest unused come first.
    pub(super) fn take_spares(
        &self,
        count: usize,
        leaving: u64,
    ) -> Result<VecDeque<Spare>, TakeError> {
        {
            let mut state = self.state.lock();
            let room = usize::try_from(self.files_max() - leaving).unwrap_or(usize::MAX);
            if !state.shrink_live(room.saturating_sub(count)) {
                return Err(TakeError::Full);
            }
            if let Some(spares) = state.take(count) {
                return Ok(spares);
            }
        }
        let _creating = self.creating.lock();
        loop {
            {
                let mut state = self.state.lock();
                if let Some(spares) = state.take(count) {
                    return Ok(spares);
                }
                let missing = count - state.spares.len();
                if state.files + missing as u64 > self.files_max() {
                    if state.give_way(missing) {
                        continue;
                    }
                    return Err(TakeError::Full);
                }
            }
            if let Err((file, source)) = self.create_spare()
                && (!is_out_of_space(&source) || !self.state.lock().give_way(1))
            {
                return Err(TakeError::Io { file, source });
            }
        }
    }

    /// Makes a segment the active one. Its header is durable.
    pub(super) fn activate(&self, segment: Segment, end: u64) {
        let mut state = self.state.lock();
        let follows = state.live.back().is_none_or(|last| last.seq + 1 == segment.seq);
        assert!(follows, "live segments are consecutive");
        state.live.push_back(segment);
        state.active_end = end;
    }

    /// Notes what a durable batch brought into the active segment.
    pub(super) fn note_batch(&self, indexes: &Indexes, end: u64) {
        let mut state = self.state.lock();
        state.active_end = end;
        let active = state.live.back_mut().expect("batches go into an active segment");
        for (&shard, &(lowest, highest)) in indexes {
            include(&mut active.indexes, shard, lowest);
            include(&mut active.indexes, shard, highest);
        }
    }

    fn files_max(&self) -> u64 {
        self.options.log_bytes_max / self.options.segment_bytes
    }

    /// Makes a spare. The caller holds `creating` and has checked the bound.
    fn create_spare(&self) -> Result<(), (String, io::Error)> {
        let number = {
            let mut state = self.state.lock();
            state.files += 1;
            state.next_file += 1;
            state.next_file - 1
        };
        let unfinished = format!("{LOG_DIR}/{number:06}.new");
        let name = format!("{LOG_DIR}/{number:06}.seg");
        match self.create_file(&unfinished, &name) {
            Ok(file) => {
                let spare = Spare { name: name.into(), file, last_seq: None };
                self.state.lock().spares.push(spare);
                Ok(())
            }
            Err(error) => {
                // What cannot be removed now is removed when the log is opened next.
                _ = self.disk.remove(&unfinished);
                self.state.lock().files -= 1;
                Err((name, error))
            }
        }
    }

    /// Writes a whole segment of zeroes: the first real write to a block that is only reserved
    /// would pay for a change of metadata, twice the time of a plain overwrite. The name that
    /// counts comes last, so that a file of that name is always complete.
    fn create_file(&self, unfinished: &str, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.disk.open(unfinished, OpenMode::CreateNew)?;
        let size = self.options.segment_bytes;
        file.allocate(0, size)?;
        let zeroes = AlignedBuf::zeroed(SCAN_BYTES);
        let mut offset = 0;
        while offset < size {
            let len = SCAN_BYTES.min(usize::try_from(size - offset).unwrap_or(SCAN_BYTES));
            file.write_many_at(&[(offset, &zeroes[..len])])?;
            offset += len as u64;
        }
        file.sync()?;
        self.disk.rename(unfinished, name)?;
        self.disk.sync_dir(LOG_DIR)?;
        Ok(file)
    }
}

impl State {
    fn is_retained(&self, shard: ShardId, index: LogIndex) -> bool {
        self.retained.get(&shard).is_some_and(|above| index > *above)
    }

    /// Whether everything in the segment is on stable storage elsewhere. Never so of the active
    /// one, which was active, or was not there, when hard states were asked for.
    fn is_covered(&self, segment: &Segment) -> bool {
        let mut indexes = segment.indexes.iter();
        segment.seq < self.covered_before
            && indexes.all(|(shard, (_, highest))| {
                self.covered.get(shard).is_some_and(|through| highest <= through)
            })
    }

    fn is_free(&self, segment: &Segment) -> bool {
        let mut indexes = segment.indexes.iter();
        self.is_covered(segment)
            && !indexes.any(|(shard, (_, highest))| self.is_retained(*shard, *highest))
    }

    /// Oldest segments that are covered.
    fn covered_segments(&self) -> usize {
        self.live.iter().take_while(|segment| self.is_covered(segment)).count()
    }

    /// Frees the oldest `count` segments.
    fn free(&mut self, count: usize) {
        if count > 0 {
            let segments = self.live.drain(..count).collect();
            let epoch = std::mem::take(&mut self.epoch);
            self.waiting.push_back(Waiting { epoch, segments });
        }
    }

    /// Frees segments that are covered, retained or not, until at most `max` are live. False if
    /// there are more all the same.
    fn shrink_live(&mut self, max: usize) -> bool {
        let excess = self.live.len().saturating_sub(max);
        if excess > 0 {
            self.free(self.covered_segments().min(excess));
        }
        self.live.len() <= max
    }

    /// Frees up to `count` segments that are covered, retained or not. True if that made a spare.
    fn give_way(&mut self, count: usize) -> bool {
        let (before, free) = (self.spares.len(), self.covered_segments().min(count));
        self.free(free);
        self.release();
        self.spares.len() > before
    }

    /// Turns waiting segments into spares as long as no pin can reach them.
    fn release(&mut self) {
        while let Some(oldest) = self.waiting.front_mut() {
            // `get_mut` and not `strong_count`: it also orders the last pin's reads before us.
            if Arc::get_mut(&mut oldest.epoch).is_none() {
                return;
            }
            let segments = self.waiting.pop_front().map_or_else(Vec::new, |w| w.segments);
            self.spares.extend(segments.into_iter().map(|segment| Spare {
                name: segment.name,
                file: segment.file,
                last_seq: Some(segment.seq),
            }));
        }
    }

    fn take(&mut self, count: usize) -> Option<VecDeque<Spare>> {
        self.release();
        if self.spares.len() < count {
            return None;
        }
        self.spares.sort_by_key(|spare| spare.last_seq);
        Some(self.spares.drain(..count).collect())
    }

    fn segment(&self, seq: u64) -> Option<&Segment> {
        let oldest = self.live.front()?.seq;
        if let Some(nth) = seq.checked_sub(oldest) {
            return self.live.get(usize::try_from(nth).ok()?);
        }
        self.waiting.iter().flat_map(|w| &w.segments).find(|segment| segment.seq == seq)
    }
}

/// Whether an error says that the disk is full.
pub(super) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Widens a shard's range of indexes to include `index`.
pub(super) fn include(indexes: &mut Indexes, shard: ShardId, index: LogIndex) {
    let (lowest, highest) = indexes.entry(shard).or_insert((index, index));
    *lowest = index.min(*lowest);
    *highest = index.max(*highest);
}

impl fmt::Debug for SegmentPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("SegmentPool")
            .field("live", &state.live.iter().map(|segment| segment.seq).collect::<Vec<_>>())
            .field("waiting", &state.waiting.iter().map(|w| w.segments.len()).sum::<usize>())
            .field("spares", &state.spares.len())
            .field("files", &state.files)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LogPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogPin")
    }
}
