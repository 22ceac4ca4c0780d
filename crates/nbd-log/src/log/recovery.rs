//! Opening a log: finding its end, and telling a torn tail from a damaged middle.
//!
//! 1. Every segment file is synced, then its header read. The highest sequence number is the newest
//!    segment; it and its batches name the oldest live one. All between must be there.
//! 2. Live segments are read in order, batch by batch, each with the number expected next.
//! 3. In a sealed segment the first batch that fails its checks is its end: the next segment's
//!    header says with which number to go on, and a different one is damage.
//! 4. In the newest segment the first batch that fails its checks is the log's end, *unless* a
//!    header behind it says that it was written when the failed one was already durable. That is
//!    damage.
//! 5. What was written last is written once more. A process may have died, or failed, with it in
//!    the page cache only; a sync cannot be trusted to say so twice.
//!
//! Since one batch is in flight at a time, nothing that recovery cuts off was acknowledged. (A bit
//! that rots in the very last batch looks like a torn write and is cut: nothing can tell.)

mod scan;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::Arc;

use rand::RngCore;

use super::cache::EntryCache;
use super::error::{Finding, LogOpenError};
use super::format::{FORMAT_VERSION, ParsedSegmentHeader, SegmentHeader, parse_record};
use super::options::LogOptions;
use super::pool::{Indexes, LOG_DIR, Segment, SegmentPool, Spare, include};
use super::reader::LogReader;
use super::record::{LogIdentity, LogPosition, ScannedRecord};
use super::writer::{Active, LogWriter, Tail};
use crate::io::{AlignedBuf, Disk, DiskFile, OpenMode};
use crate::limits::BLOCK_BYTES;
use scan::{Batch, SegmentScan};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Highest log position taken for real, far from overflow whatever a file says: a century of
/// writing at a gigabyte a second.
const POSITION_MAX: u64 = 1 << 62;

/// Highest batch number taken for real.
const BATCH_NUMBER_MAX: u64 = 1 << 62;

/// An open log.
#[derive(Debug)]
pub struct Log {
    /// Appends. For the log thread.
    pub writer: LogWriter,
    /// Reads, from any thread.
    pub reader: LogReader,
    /// The segment files, for background work and checkpoints.
    pub segments: Arc<SegmentPool>,
}

/// A segment file as found.
struct Found {
    name: Arc<str>,
    file: Arc<dyn DiskFile>,
    /// `None` if there is no valid header.
    header: Option<SegmentHeader>,
    /// Segment that the first batch claims to be of, if its header passes its own checksum.
    first_batch_of: Option<u64>,
}

/// Where the log ends, as it is found bit by bit.
struct End {
    /// Number of the next batch. All before it were found, from the oldest live segment on.
    next_batch: u64,
    /// Start of the last valid thing in the newest segment: a batch, or the header.
    last_start: u64,
    /// End of the last valid batch in the newest segment.
    end: u64,
    records: u64,
}

/// What a caller of [`Log::open`] is shown.
type Visitor<'a> = &'a mut dyn FnMut(ScannedRecord<'_>, LogPosition);

impl Log {
    /// Opens the log in directory `log` of the disk, creating it if there is none, and shows every
    /// record in it to `visitor`, in the order of writing, with the position that
    /// [`LogWriter::append`] gave for it. All of it is on stable storage when this returns. `rng`
    /// draws the nonces of segments.
    ///
    /// Superseded entries and entries of long ago may be among the records: it is the visitor who
    /// knows what its checkpoint covers.
    pub fn open(
        disk: Arc<dyn Disk>,
        identity: LogIdentity,
        options: LogOptions,
        rng: Box<dyn RngCore + Send>,
        visitor: Visitor<'_>,
    ) -> Result<Self, LogOpenError> {
        options.validate()?;
        let (found, next_file) = find_segments(&*disk, identity, &options)?;
        let (live, spares) = sort_out(found)?;
        let (tail, live) = replay(live, visitor)?;
        disk.sync_dir(LOG_DIR).map_err(|e| io_error("sync", LOG_DIR, e))?;

        let active_end = tail.active.as_ref().map_or(0, |active| active.end);
        let pool = SegmentPool::new(disk, options, live, active_end, spares, next_file);
        let segments = Arc::new(pool);
        let cache = Arc::new(EntryCache::new(options.cache_bytes_max));
        let reader = LogReader::new(Arc::clone(&segments), Arc::clone(&cache));
        let writer = LogWriter::new(Arc::clone(&segments), cache, rng, identity, tail);
        Ok(Self { writer, reader, segments })
    }
}

/// Opens and syncs every segment file and reads its header. Returns them with the lowest file
/// number above all of them.
fn find_segments(
    disk: &dyn Disk,
    identity: LogIdentity,
    options: &LogOptions,
) -> Result<(Vec<Found>, u64), LogOpenError> {
    disk.create_dir(LOG_DIR).map_err(|e| io_error("create", LOG_DIR, e))?;
    disk.sync_dir("").map_err(|e| io_error("sync the directory of", LOG_DIR, e))?;
    let (mut found, mut next_file) = (Vec::new(), 0);
    for entry in disk.list(LOG_DIR).map_err(|e| io_error("list", LOG_DIR, e))? {
        let name = format!("{LOG_DIR}/{entry}");
        match file_number(&entry) {
            Some((number, "seg")) => {
                next_file = next_file.max(number + 1);
                found.push(open_segment(disk, name, identity, options)?);
            }
            // Left by a crash while it was being prefilled.
            Some((_, "new")) => disk.remove(&name).map_err(|e| io_error("remove", &name, e))?,
            _ => tracing::warn!(file = %disk.path(LOG_DIR).join(entry).display(), "not a log file"),
        }
    }
    Ok((found, next_file))
}

/// Splits `000123.seg` into number and extension. `None` for names that the pool never gives.
fn file_number(entry: &str) -> Option<(u64, &str)> {
    let (number, extension) = entry.split_once('.')?;
    let plausible = (6..=12).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
    if !plausible {
        return None;
    }
    Some((number.parse().ok()?, extension))
}

fn open_segment(
    disk: &dyn Disk,
    name: String,
    identity: LogIdentity,
    options: &LogOptions,
) -> Result<Found, LogOpenError> {
    let file = disk.open(&name, OpenMode::Existing).map_err(|e| io_error("open", &name, e))?;
    file.sync().map_err(|e| io_error("sync", &name, e))?;
    let len = file.len().map_err(|e| io_error("examine", &name, e))?;
    let mut start = [0; 2 * BLOCK_BYTES];
    if len >= start.len() as u64 {
        file.read_exact_at(&mut start, 0).map_err(|e| io_error("read", &name, e))?;
    }
    let (first_block, second_block) = start.split_at(BLOCK_BYTES);
    let header = match SegmentHeader::parse(first_block) {
        ParsedSegmentHeader::Valid(header) => Some(header),
        ParsedSegmentHeader::Invalid => None,
        ParsedSegmentHeader::OtherVersion(found) => {
            return Err(LogOpenError::Version { file: name, expected: FORMAT_VERSION, found });
        }
    };
    if let Some(header) = header {
        check_header(&header, &name, identity, options)?;
    }
    if len != options.segment_bytes {
        let expected = Finding::FileBytes(options.segment_bytes);
        let offset = len.min(options.segment_bytes);
        return Err(damaged(&name, offset, expected, Finding::FileBytes(len)));
    }
    let first_batch_of = scan::claimed_segment(second_block);
    Ok(Found { name: name.into(), file, header, first_batch_of })
}

fn check_header(
    header: &SegmentHeader,
    name: &str,
    identity: LogIdentity,
    options: &LogOptions,
) -> Result<(), LogOpenError> {
    let (file, found) = (name.to_owned(), LogIdentity(header.identity));
    if found != identity {
        return Err(LogOpenError::Foreign { file, expected: identity, found });
    }
    let (expected, found) = (options.segment_bytes, header.segment_bytes);
    if found != expected {
        return Err(LogOpenError::SegmentBytes { file, expected, found });
    }
    let plausible = (1..=POSITION_MAX / header.segment_bytes).contains(&header.seq)
        && (1..=header.seq).contains(&header.oldest_live)
        && (1..=BATCH_NUMBER_MAX).contains(&header.first_batch);
    if !plausible {
        let expected = Finding::Segment(header.seq);
        return Err(damaged(name, 0, expected, Finding::BadSegmentHeader));
    }
    Ok(())
}

/// A live segment before its batches are read.
struct Live {
    name: Arc<str>,
    file: Arc<dyn DiskFile>,
    header: SegmentHeader,
}

impl Live {
    fn scan(&self) -> SegmentScan<'_> {
        SegmentScan::new(&*self.file, &self.name, self.header)
    }
}

/// Tells live segments, which must be complete, from spares.
fn sort_out(found: Vec<Found>) -> Result<(Vec<Live>, Vec<Spare>), LogOpenError> {
    let newest = found.iter().filter_map(|found| found.header.map(|header| header.seq)).max();
    let mut numbered = BTreeMap::new();
    let (mut spares, mut headless) = (Vec::new(), BTreeMap::new());
    for Found { name, file, header, first_batch_of } in found {
        match (header, first_batch_of) {
            (Some(header), _) => {
                let live = Live { name: Arc::clone(&name), file, header };
                if numbered.insert(header.seq, live).is_some() {
                    let found = Finding::Segment(header.seq);
                    return Err(damaged(&name, 0, Finding::NoSegment, found));
                }
            }
            (None, of) => {
                // A header is durable before the first batch: a batch of a segment that has no
                // header anywhere means that the header was lost afterwards.
                if let Some(seq) = of.filter(|&seq| newest.is_none_or(|newest| seq > newest)) {
                    let expected = Finding::Segment(seq);
                    return Err(damaged(&name, 0, expected, Finding::BadSegmentHeader));
                }
                if let Some(seq) = of {
                    headless.insert(seq, Arc::clone(&name));
                }
                spares.push(Spare { name, file, last_seq: None });
            }
        }
    }
    let Some((_, newest)) = numbered.last_key_value() else { return Ok((Vec::new(), spares)) };
    let oldest = newest.scan().oldest_live()?;
    let live = numbered.split_off(&oldest);
    for (expected, seq) in (oldest..).zip(live.keys()) {
        if *seq != expected {
            let (name, found) = match headless.get(&expected) {
                Some(name) => (&**name, Finding::BadSegmentHeader),
                None => (LOG_DIR, Finding::NoSegment),
            };
            return Err(damaged(name, 0, Finding::Segment(expected), found));
        }
    }
    spares.extend(numbered.into_values().map(|freed| Spare {
        name: freed.name,
        file: freed.file,
        last_seq: Some(freed.header.seq),
    }));
    Ok((live.into_values().collect(), spares))
}

/// Reads the live segments in order and makes sure that what was found stays.
fn replay(
    live: Vec<Live>,
    visitor: Visitor<'_>,
) -> Result<(Tail, VecDeque<Segment>), LogOpenError> {
    let (Some(oldest), Some(newest)) = (live.first(), live.last()) else {
        let tail = Tail { active: None, next_batch: 1, recorded_oldest: 0 };
        return Ok((tail, VecDeque::new()));
    };
    let recorded_oldest = oldest.header.seq;
    let next_batch = oldest.header.first_batch;
    let mut end = End { next_batch, last_start: 0, end: 0, records: 0 };
    let mut segments = VecDeque::with_capacity(live.len());
    let mut before: Option<&Live> = None;
    for segment in &live {
        check_continuity(before, segment, &end)?;
        let indexes = read_batches(segment, &mut end, visitor)?;
        let (name, file) = (Arc::clone(&segment.name), Arc::clone(&segment.file));
        segments.push_back(Segment { seq: segment.header.seq, name, file, indexes });
        before = Some(segment);
    }
    if newest.scan().holds_batch_after(end.end, end.next_batch)? {
        let expected = Finding::Batch(end.next_batch);
        return Err(damaged(&newest.name, end.end, expected, Finding::BadBatch));
    }
    write_again(newest, &end)?;
    tracing::info!(
        segments = live.len(),
        records = end.records,
        next_batch = end.next_batch,
        file = %newest.name,
        offset = end.end,
        "log read",
    );
    let active = Active {
        seq: newest.header.seq,
        nonce: newest.header.nonce,
        name: Arc::clone(&newest.name),
        file: Arc::clone(&newest.file),
        end: end.end,
    };
    let tail = Tail { active: Some(active), next_batch: end.next_batch, recorded_oldest };
    Ok((tail, segments))
}

/// Checks that a segment goes on where the one before it ended.
fn check_continuity(before: Option<&Live>, next: &Live, end: &End) -> Result<(), LogOpenError> {
    let (expected, found) = (end.next_batch, next.header.first_batch);
    match before {
        // The header was written when all batches before it were durable.
        Some(before) if found > expected => {
            Err(damaged(&before.name, end.end, Finding::Batch(expected), Finding::BadBatch))
        }
        _ if found < expected => {
            Err(damaged(&next.name, 0, Finding::Batch(expected), Finding::Batch(found)))
        }
        _ => Ok(()),
    }
}

/// Shows a segment's records to the visitor and moves the end behind its last valid batch. Returns
/// the indexes of each shard in it.
fn read_batches(
    segment: &Live,
    end: &mut End,
    visitor: Visitor<'_>,
) -> Result<Indexes, LogOpenError> {
    let mut indexes = Indexes::new();
    let mut scan = segment.scan();
    (end.last_start, end.end) = (0, BLOCK);
    while let Some(Batch { header, body_at, body }) = scan.batch(end.end, end.next_batch)? {
        let body_start = segment.header.seq * segment.header.segment_bytes + body_at;
        let bad = |at: usize, found| {
            let expected = Finding::Records(header.records);
            damaged(&segment.name, body_at + at as u64, expected, found)
        };
        let (mut at, mut records) = (0, 0);
        while at < body.len() {
            let (record, data_at, bytes) =
                parse_record(&body[at..]).ok_or_else(|| bad(at, Finding::BadRecord))?;
            if let ScannedRecord::Entry(entry) = record {
                include(&mut indexes, entry.shard, entry.index);
            }
            visitor(record, LogPosition(body_start + (at + data_at) as u64));
            at += bytes;
            records += 1;
        }
        if records != header.records {
            return Err(bad(0, Finding::Records(records)));
        }
        end.last_start = end.end;
        end.end += header.len() as u64;
        end.next_batch += 1;
        end.records += u64::from(records);
    }
    Ok(indexes)
}

/// Writes the newest segment's last batch, or its header if it has none, over itself. Everything
/// before that was durable when it was issued; so now is all of it.
fn write_again(newest: &Live, end: &End) -> Result<(), LogOpenError> {
    let len = usize::try_from(end.end - end.last_start).expect("a batch fits in memory");
    let mut bytes = AlignedBuf::zeroed(len);
    let (file, name) = (&newest.file, &*newest.name);
    file.read_exact_at(&mut bytes, end.last_start).map_err(|e| io_error("read", name, e))?;
    file.write_durable_at(&bytes, end.last_start).map_err(|e| io_error("write", name, e))
}

fn io_error(action: &'static str, file: &str, source: io::Error) -> LogOpenError {
    LogOpenError::Io { action, file: file.to_owned(), source }
}

fn damaged(file: &str, offset: u64, expected: Finding, found: Finding) -> LogOpenError {
    LogOpenError::Damaged { file: file.to_owned(), offset, expected, found }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Live").field(&self.name).field(&self.header).finish()
    }
}
