//! Copies from one endpoint to another: pieces of a MiB, many at a time, zeroes told and not sent.
//!
//! Pieces end in any order; what is before the first that has not ended is done, and once the
//! target has synced it, the journal says so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use xxhash_rust::xxh3::xxh3_64;

use super::endpoint::{Endpoint, Stretch};
use super::journal::{Journal, Record, Sample};
use super::progress::Progress;

/// Bytes of data copied at once. A server cuts larger writes at these boundaries.
pub(super) const PIECE: u64 = 1 << 20;

/// Bytes in flight, in buffers of ours.
pub(super) const IN_FLIGHT: usize = 16 << 20;

/// Bytes of zeroes told at once: so that a journal gets on, and an interrupt is heard.
const ZERO_PIECE: u64 = 1 << 30;

/// What a piece of zeroes counts among the bytes in flight.
const ZERO_COST: u32 = 64 << 10;

/// Zeroes of this length in the midst of data are told and not sent: what a volume keeps as one.
const ZERO_GRAIN: usize = 64 << 10;

/// Between two entries in the journal.
const JOURNAL_EVERY: Duration = Duration::from_secs(1);

/// Every so many pieces, one is kept in the journal as a sample; the first of a run always is.
/// Pieces of zeroes never are: they would not tell a copy from a volume made anew.
const SAMPLE_EVERY: u64 = 16;

/// What all pieces of a copy share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) target: Endpoint,
    pub(super) progress: Arc<Progress>,
    /// Checksums of all that was carried, by offset, if the copy is to be verified.
    pub(super) sums: Option<Mutex<BTreeMap<u64, Sum>>>,
    samples: Mutex<Vec<Sample>>,
    /// Where this run's first piece of data is: it is always sampled. Pieces end in any order, and
    /// a sample counts once all before it is done.
    first_data: OnceLock<u64>,
    budget: Arc<Semaphore>,
    /// Buffers to be used again: fresh ones cost a page fault for each page.
    buffers: Mutex<Vec<Vec<u8>>>,
}

/// What was written somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) len: u64,
    /// XXH3 of the bytes; `None`: zeroes.
    pub(super) sum: Option<u64>,
}

/// A piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) zero: bool,
}

impl Piece {
    fn cost(&self) -> u32 {
        if self.zero { ZERO_COST } else { u32::try_from(self.len).unwrap_or(u32::MAX) }
    }
}

/// Cuts a source into pieces.
#[derive(Debug)]
pub(super) struct Planner {
    source: Endpoint,
    at: u64,
    /// Of the target; behind the source's end there are zeroes.
    end: u64,
    /// What is known of what comes next.
    known: VecDeque<Stretch>,
}

impl Planner {
    pub(super) fn new(source: Endpoint, from: u64, end: u64) -> Self {
        Self { source, at: from, end, known: VecDeque::new() }
    }

    pub(super) async fn next(&mut self) -> Result<Option<Piece>> {
        if self.at >= self.end {
            return Ok(None);
        }
        if self.known.is_empty() {
            let size = self.source.size().min(self.end);
            if self.at < size {
                self.known.extend(self.source.stretches(self.at, size - self.at).await?);
            } else {
                self.known.push_back(Stretch { len: self.end - self.at, zero: true });
            }
        }
        let mut next = self.known.pop_front().context("nothing is known of what comes next")?;
        while let Some(more) = self.known.pop_front_if(|more| more.zero == next.zero) {
            next.len += more.len;
        }
        let offset = self.at;
        let len = match next.zero {
            true => next.len.min(ZERO_PIECE),
            // Pieces end where a server would cut them anyway.
            false => next.len.min(PIECE - offset % PIECE),
        };
        if len < next.len {
            self.known.push_front(Stretch { len: next.len - len, zero: next.zero });
        }
        self.at += len;
        Ok(Some(Piece { offset, len, zero: next.zero }))
    }
}

/// How far pieces that end in any order have come without a gap.
#[derive(Debug)]
pub(super) struct Mark {
    done: u64,
    beyond: BTreeMap<u64, u64>,
}

impl Mark {
    pub(super) fn new(done: u64) -> Self {
        Self { done, beyond: BTreeMap::new() }
    }

    pub(super) fn finish(&mut self, piece: &Piece) {
        self.beyond.insert(piece.offset, piece.len);
        while let Some(len) = self.beyond.remove(&self.done) {
            self.done += len;
        }
    }
}

impl Shared {
    pub(super) fn new(target: Endpoint, progress: Arc<Progress>, verify: bool) -> Self {
        Self {
            target,
            progress,
            sums: verify.then(Mutex::default),
            samples: Mutex::default(),
            first_data: OnceLock::new(),
            budget: Arc::new(Semaphore::new(IN_FLIGHT)),
            buffers: Mutex::default(),
        }
    }

    /// Room for `cost` bytes in flight.
    pub(super) async fn room(&self, cost: u32) -> OwnedSemaphorePermit {
        let budget = Arc::clone(&self.budget);
        budget.acquire_many_owned(cost).await.expect("the budget is never closed")
    }

    pub(super) fn buffer(&self, len: u64) -> Vec<u8> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        buffer.resize(usize::try_from(len).expect("pieces are small"), 0);
        buffer
    }

    pub(super) fn give_back(&self, data: Vec<u8>) {
        let mut buffers = lock(&self.buffers);
        if buffers.len() < IN_FLIGHT >> 20 {
            buffers.push(data);
        }
    }

    async fn copy(&self, source: &Endpoint, piece: Piece) -> Result<()> {
        if piece.zero {
            self.write_zeroes(piece.offset, piece.len).await?;
        } else {
            let buffer = self.buffer(piece.len);
            let data = source.read(piece.offset, buffer).await?;
            self.write(piece.offset, data).await?;
        }
        self.progress.advance(piece.len);
        Ok(())
    }

    pub(super) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        self.target.zero(offset, len).await?;
        if let Some(sums) = &self.sums {
            lock(sums).insert(offset, Sum { len, sum: None });
        }
        Ok(())
    }

    /// Writes a piece of data; what of it is zeroes is told instead.
    pub(super) async fn write(&self, offset: u64, data: Vec<u8>) -> Result<()> {
        let len = data.len() as u64;
        let runs = runs(&data);
        let sample = runs.iter().any(|(_, zero)| !zero)
            && (self.first_data.get() == Some(&offset)
                || (offset / PIECE).is_multiple_of(SAMPLE_EVERY));
        if sample || self.sums.is_some() {
            let sum = xxh3_64(&data);
            if sample {
                lock(&self.samples).push(Sample { offset, len, sum });
            }
            if let Some(sums) = &self.sums {
                lock(sums).insert(offset, Sum { len, sum: Some(sum) });
            }
        }
        let data = Bytes::from(data);
        let mut at = 0;
        for (len, zero) in runs {
            let offset = offset + at as u64;
            if zero {
                self.target.zero(offset, len as u64).await?;
            } else {
                self.target.write(offset, data.slice(at..at + len)).await?;
                self.progress.carry(len as u64);
            }
            at += len;
        }
        self.give_back(data.into());
        Ok(())
    }
}

/// Cuts data into runs of zeroes, of at least [`ZERO_GRAIN`], and of anything.
fn runs(data: &[u8]) -> Vec<(usize, bool)> {
    static ZEROES: [u8; ZERO_GRAIN] = [0; ZERO_GRAIN];
    let mut runs: Vec<(usize, bool)> = Vec::new();
    for grain in data.chunks(ZERO_GRAIN) {
        let zero = *grain == ZEROES[..grain.len()];
        match runs.last_mut() {
            Some((len, of_zeroes)) if *of_zeroes == zero => *len += grain.len(),
            _ => runs.push((grain.len(), zero)),
        }
    }
    runs
}

/// Copies all of `source` behind what the record says is done, to the end of the target.
pub(super) async fn run(
    shared: &Arc<Shared>,
    source: &Endpoint,
    journal: &Arc<Journal>,
    record: Record,
) -> Result<()> {
    let end = shared.target.size();
    let mut planner = Planner::new(source.clone(), record.done, end);
    let mut mark = Mark::new(record.done);
    shared.progress.begin(end, record.done);
    let mut book = Book { shared, journal, record: Some(record), writing: None };
    // Dropping the set ends its tasks.
    let mut tasks: JoinSet<Result<Piece>> = JoinSet::new();
    let mut ticks = tokio::time::interval(JOURNAL_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while let Some(piece) = planner.next().await? {
        if !piece.zero {
            shared.first_data.get_or_init(|| piece.offset);
        }
        let permit = loop {
            tokio::select! {
                permit = shared.room(piece.cost()) => break permit,
                Some(ended) = tasks.join_next() => mark.finish(&ended.context("copy")??),
                _ = ticks.tick() => book.enter(mark.done).await?,
            }
        };
        // Without it, a copy that never has to wait for room would never look.
        while let Some(ended) = tasks.try_join_next() {
            mark.finish(&ended.context("copy")??);
        }
        let (shared, source) = (Arc::clone(shared), source.clone());
        tasks.spawn(async move {
            shared.copy(&source, piece).await?;
            drop(permit);
            Ok(piece)
        });
    }
    loop {
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(ended) => mark.finish(&ended.context("copy")??),
                None => break,
            },
            _ = ticks.tick() => book.enter(mark.done).await?,
        }
    }
    debug_assert_eq!(mark.done, end, "all pieces have ended");
    book.close(mark.done).await
}

/// Keeps the journal, beside the copying.
struct Book<'a> {
    shared: &'a Arc<Shared>,
    journal: &'a Arc<Journal>,
    /// With the one that writes it otherwise.
    record: Option<Record>,
    writing: Option<JoinHandle<Result<Record>>>,
}

impl Book<'_> {
    /// Begins to write down that all before `done` is copied, unless the last entry is still being
    /// written.
    async fn enter(&mut self, done: u64) -> Result<()> {
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return Ok(());
        }
        let record = self.written().await?;
        if record.done == done {
            self.record = Some(record);
        } else {
            let entry =
                write_entry(Arc::clone(self.shared), Arc::clone(self.journal), record, done);
            self.writing = Some(tokio::spawn(entry));
        }
        Ok(())
    }

    /// Writes the last entry.
    async fn close(mut self, done: u64) -> Result<()> {
        let record = self.written().await?;
        let (shared, journal) = (Arc::clone(self.shared), Arc::clone(self.journal));
        write_entry(shared, journal, record, done).await.map(drop)
    }

    /// The record, once no one else has it.
    async fn written(&mut self) -> Result<Record> {
        if let Some(writing) = self.writing.take() {
            return writing.await.context("write the journal")?;
        }
        self.record.take().context("the journal's record is lost")
    }
}

async fn write_entry(
    shared: Arc<Shared>,
    journal: Arc<Journal>,
    mut record: Record,
    done: u64,
) -> Result<Record> {
    shared.target.sync().await?;
    let entries: Vec<Sample> = {
        let mut samples = lock(&shared.samples);
        let behind = |sample: &Sample| sample.offset + sample.len > done;
        let (later, now) = std::mem::take(&mut *samples).into_iter().partition(behind);
        *samples = later;
        now
    };
    record.add(entries);
    record.done = done;
    let stored = tokio::task::spawn_blocking(move || journal.store(&record).map(|()| record));
    stored.await.context("write the journal")?
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::file::LocalFile;
    use super::*;

    #[test]
    fn zeroes_are_found_by_the_grain() {
        let mut data = vec![0; 4 * ZERO_GRAIN + 10];
        assert_eq!(runs(&data), [(data.len(), true)]);
        data[ZERO_GRAIN] = 1;
        let expected = [(ZERO_GRAIN, true), (ZERO_GRAIN, false), (2 * ZERO_GRAIN + 10, true)];
        assert_eq!(runs(&data), expected);
        assert_eq!(runs(&[1, 0]), [(2, false)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn the_mark_stops_at_a_gap() {
        let piece = |offset, len| Piece { offset, len, zero: false };
        let mut mark = Mark::new(10);
        mark.finish(&piece(20, 10));
        mark.finish(&piece(40, 10));
        assert_eq!(mark.done, 10);
        mark.finish(&piece(10, 10));
        assert_eq!(mark.done, 30);
        mark.finish(&piece(30, 10));
        assert_eq!((mark.done, mark.beyond.len()), (50, 0));
    }

    #[tokio::test]
    async fn a_source_is_cut_at_holes_and_boundaries_up_to_the_targets_end() {
        let directory = tempfile::tempdir().unwrap();
        let file = LocalFile::create(&directory.path().join("image"), 5 << 20, 0).unwrap();
        file.write(1 << 20, vec![1; 3 << 19].into()).await.unwrap();
        let source = Endpoint::File(Arc::new(file));
        let mut planner = Planner::new(source, 4096, 3 << 30);
        let mut pieces = Vec::new();
        while let Some(Piece { offset, len, zero }) = planner.next().await.unwrap() {
            pieces.push((offset, offset + len, zero));
        }
        let mib = |mib: u64| mib << 20;
        let data_end = mib(1) + (3 << 19);
        let expected = [
            (4096, mib(1), true),
            (mib(1), mib(2), false),
            (mib(2), data_end, false),
            (data_end, mib(5), true),
            (mib(5), mib(5 + 1024), true),
            (mib(5 + 1024), mib(5 + 2048), true),
            (mib(5 + 2048), mib(3072), true),
        ];
        assert_eq!(pieces, expected);
    }
}
