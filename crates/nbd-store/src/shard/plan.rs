//! A read in progress: where each block lies, and fetching it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use nbd_log::checksum::crc32c;
use nbd_log::log::{LogPosition, LogReadError};

use super::Shard;
use super::pins::Pin;
use crate::chunk::database::MetadataError;
use crate::ids::{ChunkIndex, VolumeId};
use crate::limits::{BLOCK_BYTES, BLOCKS_PER_CHUNK, to_usize};
use crate::overlay::{Fragment, FragmentSource, LogBlock};

const BLOCK: usize = to_usize(BLOCK_BYTES);

/// Where a damaged copy was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the log, at this position.
    Log(LogPosition),
    /// In the data file, at this byte offset.
    Data(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log(position) => write!(f, "log position {position}"),
            Self::Data(offset) => write!(f, "byte {offset} of the data file"),
        }
    }
}

/// Why a read gives nothing.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No such volume.
    #[error("unknown volume")]
    UnknownVolume,
    /// The range is empty or does not end within the volume.
    #[error("range past the end of the volume")]
    PastEnd,
    /// The range is longer than [`crate::limits::READ_BYTES_MAX`].
    #[error("a read of more than {} bytes", crate::limits::READ_BYTES_MAX)]
    TooLong,
    /// The only copy here does not have its checksum. Resolving again may find a newer one.
    #[error("block {block} of volume {volume} is damaged at {place}")]
    Corrupt {
        /// The volume.
        volume: VolumeId,
        /// The block: byte offset / 4096.
        block: u64,
        /// Where the bad copy lies.
        place: Place,
        /// The checksum that the block should have, if all of it should have been there: a good
        /// copy of another replica may be found by it.
        crc: Option<u32>,
    },
    /// The data file could not be read.
    #[error("cannot read the data file")]
    Io(#[source] io::Error),
    /// The log could not be read.
    #[error(transparent)]
    Log(#[from] LogReadError),
    /// The metadata database could not be read, or is damaged.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
}

/// Where one block's content lies.
#[derive(Debug)]
pub(super) enum Source {
    /// Not allocated.
    Hole,
    /// Allocated zeroes.
    Zero,
    /// Whole in the log.
    Log(LogBlock),
    /// At home.
    Slot {
        /// Byte offset in the data file.
        place: u64,
        /// CRC32C of the block.
        crc: u32,
    },
    /// At home, wherever that is: the chunk's home was not in memory.
    Unresolved,
    /// Parts of it were overwritten.
    Split(Box<SplitSource>),
}

/// A block with newer fragments.
#[derive(Debug)]
pub(super) struct SplitSource {
    /// What lies under them; never split itself.
    under: Source,
    /// Oldest first.
    fragments: Vec<Fragment>,
}

impl Source {
    /// `under` with `fragments` on top, oldest first.
    pub(super) fn split(under: Self, fragments: impl Iterator<Item = Fragment>) -> Self {
        Self::Split(Box::new(SplitSource { under, fragments: fragments.collect() }))
    }

    /// The part that a chunk's home decides.
    fn unresolved_mut(&mut self) -> Option<&mut Self> {
        match self {
            Self::Unresolved => Some(self),
            Self::Split(split) => split.under.unresolved_mut(),
            _ => None,
        }
    }

    /// Puts what `home` gives in the place of what a chunk's home decides.
    pub(super) fn settle<E>(&mut self, home: impl FnOnce() -> Result<Self, E>) -> Result<(), E> {
        if let Some(unresolved) = self.unresolved_mut() {
            *unresolved = home()?;
        }
        Ok(())
    }

    /// Whether the block may turn out to have this checksum.
    pub(super) fn may_have(&self, expected: u32) -> bool {
        match self {
            Self::Log(LogBlock { crc, .. }) | Self::Slot { crc, .. } => *crc == expected,
            Self::Hole | Self::Zero | Self::Unresolved | Self::Split(_) => true,
        }
    }

    const fn kind(&self) -> BlockKind {
        match self {
            Self::Hole => BlockKind::Hole,
            Self::Zero => BlockKind::Zero,
            _ => BlockKind::Data,
        }
    }

    const fn is_zero(&self) -> bool {
        matches!(self, Self::Hole | Self::Zero)
    }

    /// Whether `next`, the source of the next block, follows this one in one read.
    fn is_followed_by(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Log(a), Self::Log(b)) => a.position.plus(BLOCK_BYTES) == b.position,
            (Self::Slot { place: a, .. }, Self::Slot { place: b, .. }) => a + BLOCK_BYTES == *b,
            (a, b) => a.is_zero() && b.is_zero(),
        }
    }
}

/// What a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockKind {
    Hole,
    Zero,
    Data,
}

/// What a part of a read is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// Zeroes that nothing is stored for; a structured reply can say so.
    Zero,
    /// Bytes.
    Data,
}

/// A resolved read. It owns all it needs and may be moved to another thread.
///
/// Call [`ReadPlan::try_read_cached`] first; if that says `false`, hand plan and buffer to a thread
/// that may block and call [`ReadPlan::read_blocking`]. After an error the buffer holds nothing of
/// use. Every block is verified against its checksum, whole, even if only a part was asked for.
#[derive(Debug)]
pub struct ReadPlan {
    shard: Arc<Shard>,
    /// Keeps every place below as it was when the plan was made.
    _pin: Arc<Pin>,
    volume: VolumeId,
    offset: u64,
    len: usize,
    /// One a block, from the block of `offset` on.
    sources: Vec<Source>,
}

/// Whether a fetch may wait for the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    Cached,
    Blocking,
}

impl ReadPlan {
    pub(super) const fn new(
        shard: Arc<Shard>,
        pin: Arc<Pin>,
        volume: VolumeId,
        offset: u64,
        len: u64,
        sources: Vec<Source>,
    ) -> Self {
        Self { shard, _pin: pin, volume, offset, len: to_usize(len), sources }
    }

    /// Bytes that the plan reads.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a plan is never empty")]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Fills `buf` if that needs no waiting: `Ok(false)`, with `buf` in any state, if it would.
    ///
    /// # Errors
    /// A failure of the disk.
    ///
    /// # Panics
    /// If `buf` is not as long as the plan.
    pub fn try_read_cached(&mut self, buf: &mut [u8]) -> Result<bool, ReadError> {
        if self.sources.iter_mut().any(|source| source.unresolved_mut().is_some()) {
            return Ok(false);
        }
        match self.read(buf, Patience::Cached) {
            // It is looked at once more, where that may take its time.
            Err(ReadError::Corrupt { .. }) => Ok(false),
            result => result,
        }
    }

    /// Fills `buf`, waiting for the disk as needed.
    ///
    /// # Errors
    /// A damaged copy, or a failure of the disk or the metadata database.
    ///
    /// # Panics
    /// If `buf` is not as long as the plan.
    pub fn read_blocking(&mut self, buf: &mut [u8]) -> Result<(), ReadError> {
        self.look_up()?;
        let done = match self.read(buf, Patience::Blocking) {
            // What was damaged on the way is right the second time.
            Err(ReadError::Corrupt { .. }) => self.read(buf, Patience::Blocking)?,
            result => result?,
        };
        assert!(done, "a read that may block is never put off");
        Ok(())
    }

    /// The plan's range in runs of zeroes and of bytes, as ranges of the buffer. Exact once a read
    /// has succeeded; before, what is not yet known counts as bytes.
    pub fn segments(&self) -> impl Iterator<Item = (Range<usize>, Segment)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.sources.get(at)?.is_zero();
            let run = self.sources[at..].iter().take_while(|s| s.is_zero() == first).count();
            let (start, end) = (self.span(at).start, self.span(at + run - 1).end);
            at += run;
            Some((start..end, if first { Segment::Zero } else { Segment::Data }))
        })
    }

    /// What each block is, as far as it is known.
    pub(super) fn kinds(&self) -> impl Iterator<Item = BlockKind> {
        self.sources.iter().map(Source::kind)
    }

    fn first_block(&self) -> u64 {
        self.offset / BLOCK_BYTES
    }

    /// Where in the buffer the plan's `at`-th block goes, as far as it was asked for.
    fn span(&self, at: usize) -> Range<usize> {
        let skipped = to_usize(self.offset % BLOCK_BYTES);
        (at * BLOCK).saturating_sub(skipped)..((at + 1) * BLOCK - skipped).min(self.len)
    }

    /// Finds the homes that were not in memory.
    fn look_up(&mut self) -> Result<(), ReadError> {
        let first = self.first_block();
        let per_chunk = BLOCKS_PER_CHUNK as u64;
        let mut unresolved = Vec::new();
        for (at, source) in self.sources.iter_mut().enumerate() {
            if let Some(source) = source.unresolved_mut() {
                unresolved.push((first + at as u64, source));
            }
        }
        if unresolved.is_empty() {
            return Ok(());
        }
        let mut chunks: Vec<_> =
            unresolved.iter().map(|(block, _)| ChunkIndex(block / per_chunk)).collect();
        chunks.dedup();
        let homes = self.shard.base.load(self.volume, chunks)?;
        let mut homes = homes.into_iter().peekable();
        for (block, source) in unresolved {
            while homes.next_if(|(chunk, _)| chunk.0 < block / per_chunk).is_some() {}
            let (_, meta) = homes.peek().expect("one home for each chunk asked for");
            *source = Source::home(*meta, to_usize(block % per_chunk));
        }
        Ok(())
    }

    fn read(&self, buf: &mut [u8], patience: Patience) -> Result<bool, ReadError> {
        assert_eq!(buf.len(), self.len, "the buffer is as long as the plan");
        let mut at = 0;
        while at < self.sources.len() {
            let span = self.span(at);
            if span.len() < BLOCK || matches!(self.sources[at], Source::Split(_)) {
                if !self.read_one(at, &mut buf[span], patience)? {
                    return Ok(false);
                }
                at += 1;
                continue;
            }
            let mut end = at + 1;
            while end < self.sources.len()
                && self.span(end).len() == BLOCK
                && self.sources[end - 1].is_followed_by(&self.sources[end])
            {
                end += 1;
            }
            let out = &mut buf[span.start..span.start + (end - at) * BLOCK];
            if !self.read_run(at..end, out, patience)? {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    /// Reads a block of which only a part is wanted, or that has to be put together.
    fn read_one(&self, at: usize, out: &mut [u8], patience: Patience) -> Result<bool, ReadError> {
        if self.sources[at].is_zero() {
            out.fill(0);
            return Ok(true);
        }
        let mut block = [0; BLOCK];
        let done = match &self.sources[at] {
            Source::Split(split) => self.read_split(at, split, &mut block, patience)?,
            _ => self.read_run(at..at + 1, &mut block, patience)?,
        };
        let skipped = if at == 0 { to_usize(self.offset % BLOCK_BYTES) } else { 0 };
        out.copy_from_slice(&block[skipped..skipped + out.len()]);
        Ok(done)
    }

    fn read_split(
        &self,
        at: usize,
        split: &SplitSource,
        block: &mut [u8; BLOCK],
        patience: Patience,
    ) -> Result<bool, ReadError> {
        if !self.read_source(at, &split.under, block, patience)? {
            return Ok(false);
        }
        for fragment in &split.fragments {
            let out = &mut block[usize::from(fragment.start)..usize::from(fragment.end)];
            match fragment.source {
                FragmentSource::Zero => out.fill(0),
                FragmentSource::Log { position, crc } => {
                    if !self.read_log(position, out, patience)? {
                        return Ok(false);
                    }
                    self.verify(at, out, crc, Place::Log(position))?;
                }
            }
        }
        Ok(true)
    }

    /// Reads whole blocks that lie one after the other.
    fn read_run(
        &self,
        run: Range<usize>,
        out: &mut [u8],
        patience: Patience,
    ) -> Result<bool, ReadError> {
        let done = self.read_source(run.start, &self.sources[run.start], out, patience)?;
        if done {
            // The first block was verified with the read.
            for at in run.start + 1..run.end {
                let bytes = &out[(at - run.start) * BLOCK..][..BLOCK];
                match &self.sources[at] {
                    Source::Log(block) => {
                        self.verify(at, bytes, block.crc, Place::Log(block.position))?;
                    }
                    Source::Slot { place, crc } => {
                        self.verify(at, bytes, *crc, Place::Data(*place))?;
                    }
                    _ => {}
                }
            }
        }
        Ok(done)
    }

    /// Fills `out` from `source` on, and verifies its first block.
    fn read_source(
        &self,
        at: usize,
        source: &Source,
        out: &mut [u8],
        patience: Patience,
    ) -> Result<bool, ReadError> {
        let (done, crc, place) = match source {
            Source::Hole | Source::Zero => {
                out.fill(0);
                return Ok(true);
            }
            Source::Log(block) => {
                let done = self.read_log(block.position, out, patience)?;
                (done, block.crc, Place::Log(block.position))
            }
            Source::Slot { place, crc } => {
                (self.read_data(*place, out, patience)?, *crc, Place::Data(*place))
            }
            Source::Unresolved | Source::Split(_) => unreachable!("looked up and taken apart"),
        };
        if done {
            self.verify(at, &out[..BLOCK], crc, place)?;
        }
        Ok(done)
    }

    fn read_log(
        &self,
        position: LogPosition,
        out: &mut [u8],
        patience: Patience,
    ) -> Result<bool, ReadError> {
        if patience == Patience::Cached {
            return Ok(self.shard.log.try_read(position, out)?);
        }
        self.shard.log.read(position, out)?;
        Ok(true)
    }

    fn read_data(&self, place: u64, out: &mut [u8], patience: Patience) -> Result<bool, ReadError> {
        let data = self.shard.base.data();
        if patience == Patience::Cached {
            return data.try_read_cached_at(out, place).map_err(ReadError::Io);
        }
        data.read_exact_at(out, place).map_err(ReadError::Io)?;
        Ok(true)
    }

    fn verify(&self, at: usize, bytes: &[u8], crc: u32, place: Place) -> Result<(), ReadError> {
        if crc32c(bytes) == crc {
            return Ok(());
        }
        let block = self.first_block() + at as u64;
        let crc = (bytes.len() == BLOCK).then_some(crc);
        Err(ReadError::Corrupt { volume: self.volume, block, place, crc })
    }
}
