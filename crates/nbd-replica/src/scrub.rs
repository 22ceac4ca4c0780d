//! Looking for damage before somebody needs the data.
//!
//! A pass reads every chunk at home against its checksums, and then compares digests with another
//! replica of each shard: a follower with its leader, a leader with one of its followers. Equal
//! versions of a chunk must have equal content on all replicas. What is damaged is replaced; where
//! two whole copies differ, a third one decides.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use metrics::{Counter, counter};
use nbd_rpc::v1;
use nbd_shard::resync::{digest_range_from, unequal_ranges};
use nbd_store::{ChunkImage, ChunkIndex, ChunkKey, ReadError, ReceiveError, ShardReader, VolumeId};
use nbd_topology::{LogIndex, ReplicaId, ShardId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, error, info, warn};

use crate::checkpoint_thread::{CheckpointHandle, JobError};
use crate::chunk_service::{DIGEST_RANGES_MAX, DigestsAt};
use crate::group_task::GroupHandle;
use crate::repair::Repairer;
use crate::resync::compare::mismatches;
use crate::resync::source::{ChunkSource, SourceError};
use crate::resync::{ChunkPeers, ResyncProgress, Throttle};

/// Chunks read in one turn: 4 MiB if they are full.
const PAGE_CHUNKS: usize = 64;

/// The first pass begins this long after the start, at random: so that the nodes of a cluster that
/// was started at once do not all read at once.
const FIRST_PASS: std::ops::Range<u64> = 30..120;

/// Differing chunks that one comparison keeps; those past it are found by the next one.
const DIFFERING_MAX: usize = 4096;

/// Why two replicas could not be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CompareError {
    /// The other one did not answer.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// This node's store could not be read.
    #[error("cannot read this node's own store")]
    Read(#[from] ReadError),
    /// This node's store did not take a chunk.
    #[error(transparent)]
    Store(#[from] JobError<ReceiveError>),
    /// A look-up panicked.
    #[error("a task ended badly")]
    Panicked,
    /// This node has no replica of the shard.
    #[error("the shard is not formed")]
    NotFormed,
}

/// Compares this node's replicas with others.
#[derive(Debug, Clone)]
pub(crate) struct Comparer {
    pub(crate) peers: Arc<ChunkPeers>,
    pub(crate) checkpoints: CheckpointHandle,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, CompareError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|_| CompareError::Panicked)??)
}

impl Comparer {
    fn source(
        &self,
        reader: &ShardReader,
        with: ReplicaId,
        grpc: &str,
    ) -> Result<ChunkSource, CompareError> {
        let me = reader.formation().ok_or(CompareError::NotFormed)?.replica;
        Ok(self.peers.source(reader.shard(), me, with, grpc)?)
    }

    /// Chunks that differ from another replica's and must not. Compares everything that the last
    /// checkpoints of both cover.
    async fn differing(
        &self,
        reader: &ShardReader,
        source: &ChunkSource,
    ) -> Result<Vec<ChunkKey>, CompareError> {
        let (mut differing, mut after) = (Vec::new(), None);
        loop {
            let theirs = source.digests(after).await?;
            let local = reader.clone();
            let mine = blocking(move || local.digests(after, DIGEST_RANGES_MAX)).await?;
            let (ranges, next) = unequal_ranges(&theirs, &mine);
            for (volume, first) in ranges {
                let range = digest_range_from(first);
                let theirs = source.chunk_digests(volume, range.clone()).await?;
                let local = reader.clone();
                let mine = blocking(move || DigestsAt::read(&local, volume, range)).await?;
                differing.extend(mismatches(&theirs, &mine).into_iter().map(|c| (volume, c)));
            }
            if next.is_none() || differing.len() >= DIFFERING_MAX {
                return Ok(differing);
            }
            after = next;
        }
    }

    /// Compares a learner's copy with its leader's, at checkpoints of both that cover what was
    /// applied here, and takes over the leader's chunks where it is not the same. Returns how many
    /// those were: at 0 the copy is good.
    pub(crate) async fn make_equal(
        &self,
        reader: &ShardReader,
        leader: ReplicaId,
        grpc: &str,
    ) -> Result<usize, CompareError> {
        let source = self.source(reader, leader, grpc)?;
        self.checkpoints.attempt().await;
        covered_by_both(reader, &source).await?;
        let differing = self.differing(reader, &source).await?;
        for &key in &differing {
            // Anew each time: checkpoints go on here, and older chunks are refused.
            let upto = covered_by_both(reader, &source).await?;
            if let Some(image) = source.fetch_one(key).await? {
                self.checkpoints.write_chunks(reader.shard(), upto, vec![image]).await?;
            }
        }
        Ok(differing.len())
    }
}

/// Waits until the source's checkpoint covers what the one here does: entries up to this one.
async fn covered_by_both(
    reader: &ShardReader,
    source: &ChunkSource,
) -> Result<LogIndex, CompareError> {
    let local = reader.clone();
    let applied = blocking(move || local.snapshot()).await?.applied;
    source.cover(applied).await?;
    Ok(applied)
}

/// | name | meaning |
/// | --- | --- |
/// | `scrub_bytes_total` | bytes read and checked |
/// | `scrub_passes_total` | passes over all chunks that came to their end |
/// | `scrub_mismatches_total` | copies found damaged, or different from another replica's |
#[derive(Clone)]
struct ScrubMetrics {
    bytes: Counter,
    passes: Counter,
    mismatches: Counter,
}

impl std::fmt::Debug for ScrubMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScrubMetrics").finish_non_exhaustive()
    }
}

/// How the scrub stands, for whoever asks.
#[derive(Debug, Clone, Default)]
pub(crate) struct ScrubState {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    passes: AtomicU64,
    running: AtomicBool,
    mismatches: AtomicU64,
    repaired: AtomicU64,
}

impl ScrubState {
    pub(crate) fn to_wire(&self) -> v1::ScrubStatus {
        let counts = &self.counts;
        v1::ScrubStatus {
            passes: counts.passes.load(Ordering::Relaxed),
            running: counts.running.load(Ordering::Relaxed),
            mismatches: counts.mismatches.load(Ordering::Relaxed),
            repaired: counts.repaired.load(Ordering::Relaxed),
        }
    }
}

/// What a scrubber is made of.
#[derive(Debug)]
pub(crate) struct ScrubParts {
    pub(crate) groups: Vec<GroupHandle>,
    /// Of each shard, whether data is being fetched: such a shard is left out.
    pub(crate) resync: HashMap<ShardId, watch::Receiver<Option<ResyncProgress>>>,
    pub(crate) comparer: Comparer,
    pub(crate) repairer: Repairer,
    pub(crate) state: ScrubState,
    /// Bytes read a second at most; 0: there is no scrub.
    pub(crate) bytes_per_second: u64,
    /// Time from the end of one pass to the begin of the next.
    pub(crate) interval: Duration,
    /// Cancelled when the node stops.
    pub(crate) stop: CancellationToken,
}

/// Scrubs a node's shards, one after the other.
#[derive(Debug)]
pub(crate) struct Scrubber {
    parts: ScrubParts,
    throttle: Throttle,
    metrics: ScrubMetrics,
}

/// What follows from copies of one version of a chunk.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// They are alike, or of different versions by now.
    Fine,
    /// This node's copy is wrong: take this one.
    Adopt(Box<ChunkImage>),
    /// The other replica's copy is wrong.
    TheirsIsWrong,
    /// There is no telling.
    Undecided,
}

/// A replica's copy of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Copy {
    Whole(Box<ChunkImage>),
    Damaged,
    /// No such chunk, or no answer.
    None,
}

/// Decides by this node's copy, that of the replica compared with, and those of others.
fn judge(mine: &Copy, theirs: &Copy, others: &[Copy]) -> Verdict {
    match (mine, theirs) {
        (Copy::Whole(mine), Copy::Whole(theirs)) => {
            if mine == theirs || mine.last_index != theirs.last_index {
                return Verdict::Fine;
            }
            let votes = |image: &ChunkImage| {
                others.iter().filter(|o| matches!(o, Copy::Whole(o) if **o == *image)).count()
            };
            match votes(theirs).cmp(&votes(mine)) {
                std::cmp::Ordering::Greater => Verdict::Adopt(theirs.clone()),
                std::cmp::Ordering::Less => Verdict::TheirsIsWrong,
                std::cmp::Ordering::Equal => Verdict::Undecided,
            }
        }
        (Copy::Damaged, Copy::Whole(theirs)) => Verdict::Adopt(theirs.clone()),
        (Copy::Whole(_), Copy::Damaged) => Verdict::TheirsIsWrong,
        (Copy::None, Copy::None) => Verdict::Fine,
        _ => Verdict::Undecided,
    }
}

impl Scrubber {
    pub(crate) fn new(parts: ScrubParts) -> Self {
        let throttle = Throttle::new(parts.bytes_per_second);
        let metrics = ScrubMetrics {
            bytes: counter!("scrub_bytes_total"),
            passes: counter!("scrub_passes_total"),
            mismatches: counter!("scrub_mismatches_total"),
        };
        Self { parts, throttle, metrics }
    }

    /// Runs until the node stops.
    pub(crate) async fn run(self) {
        if self.parts.bytes_per_second == 0 {
            return;
        }
        let stop = self.parts.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.scrub() => {}
        }
    }

    async fn scrub(&self) {
        tokio::time::sleep(Duration::from_secs(rand::random_range(FIRST_PASS))).await;
        loop {
            let counts = &self.parts.state.counts;
            counts.running.store(true, Ordering::Relaxed);
            for group in &self.parts.groups {
                if let Err(error) = self.scrub_shard(group).await {
                    let error = nbd_rpc::reason(&error);
                    info!(shard = %group.shard(), %error, "the scrub leaves this shard out");
                }
            }
            counts.running.store(false, Ordering::Relaxed);
            counts.passes.fetch_add(1, Ordering::Relaxed);
            self.metrics.passes.increment(1);
            debug!("scrub pass finished");
            tokio::time::sleep(self.parts.interval).await;
        }
    }

    /// One pass over one shard.
    async fn scrub_shard(&self, group: &GroupHandle) -> Result<(), CompareError> {
        let reader = group.reader();
        let mut after = None;
        loop {
            if self.is_resyncing(group.shard()) {
                return Ok(());
            }
            let local = reader.clone();
            let page = blocking(move || local.scrub(after, PAGE_CHUNKS)).await?;
            self.metrics.bytes.increment(page.bytes);
            for damaged in page.damaged {
                self.found();
                let repaired = self.parts.repairer.repair(damaged).await;
                self.parts.state.counts.repaired.fetch_add(repaired.into(), Ordering::Relaxed);
            }
            self.throttle.take(page.bytes).await;
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        self.compare(group).await
    }

    fn is_resyncing(&self, shard: ShardId) -> bool {
        self.parts.resync.get(&shard).is_some_and(|progress| progress.borrow().is_some())
    }

    fn found(&self) {
        self.metrics.mismatches.increment(1);
        self.parts.state.counts.mismatches.fetch_add(1, Ordering::Relaxed);
    }

    /// Compares the shard with another replica, and settles what differs.
    async fn compare(&self, group: &GroupHandle) -> Result<(), CompareError> {
        let shard = group.shard();
        let leader = group.route().borrow().leader.clone();
        let mut sources = self.parts.repairer.sources(shard);
        if let Some(leader) = leader.filter(|leader| !leader.local) {
            sources.sort_by_key(|(info, _)| info.id != leader.replica);
        }
        let Some((with, source)) = sources.first().cloned() else { return Ok(()) };
        let others: Vec<ChunkSource> = sources.into_iter().skip(1).map(|(_, s)| s).collect();
        let differing = self.parts.comparer.differing(group.reader(), &source).await?;
        for (volume, chunk) in differing {
            if self.is_resyncing(shard) {
                return Ok(());
            }
            let node = with.node.as_str();
            self.settle(group.reader(), volume, chunk, node, &source, &others).await;
        }
        Ok(())
    }

    /// Looks at all copies of a chunk, and repairs this node's if that is the wrong one.
    async fn settle(
        &self,
        reader: &ShardReader,
        volume: VolumeId,
        chunk: ChunkIndex,
        with: &str,
        source: &ChunkSource,
        others: &[ChunkSource],
    ) {
        let (mine, theirs) =
            (own_copy(reader, volume, chunk).await, copy(source, volume, chunk).await);
        let mut third = Vec::with_capacity(others.len());
        for other in others {
            third.push(copy(other, volume, chunk).await);
        }
        let shard = reader.shard();
        match judge(&mine, &theirs, &third) {
            Verdict::Fine => {}
            Verdict::Adopt(image) => {
                self.found();
                error!(%shard, %volume, %chunk, %with, "this copy of a chunk is wrong");
                if self.parts.repairer.adopt(shard, *image).await {
                    self.parts.state.counts.repaired.fetch_add(1, Ordering::Relaxed);
                }
            }
            Verdict::TheirsIsWrong => {
                self.found();
                error!(%shard, %volume, %chunk, %with, "the other copy of a chunk is wrong");
            }
            Verdict::Undecided => {
                self.found();
                error!(%shard, %volume, %chunk, %with, "copies of a chunk all differ");
            }
        }
    }
}

async fn own_copy(reader: &ShardReader, volume: VolumeId, chunk: ChunkIndex) -> Copy {
    let local = reader.clone();
    match blocking(move || local.read_chunk(volume, chunk)).await {
        Ok(Some(image)) => Copy::Whole(Box::new(image)),
        Err(CompareError::Read(ReadError::Corrupt { .. })) => Copy::Damaged,
        Ok(None) => Copy::None,
        Err(error) => {
            warn!(error = nbd_rpc::reason(&error), "cannot read a chunk");
            Copy::None
        }
    }
}

async fn copy(source: &ChunkSource, volume: VolumeId, chunk: ChunkIndex) -> Copy {
    match source.fetch_one((volume, chunk)).await {
        Ok(Some(image)) => Copy::Whole(Box::new(image)),
        Err(SourceError::Call(status)) if status.code() == Code::DataLoss => Copy::Damaged,
        Ok(None) | Err(_) => Copy::None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use nbd_topology::LogIndex;

    use super::*;

    fn whole(last_index: u64, byte: u8) -> Copy {
        let mut crcs = [0; nbd_store::limits::BLOCKS_PER_CHUNK];
        crcs[0] = u32::from(byte);
        Copy::Whole(Box::new(ChunkImage {
            volume: VolumeId(1),
            chunk: ChunkIndex(2),
            last_index: LogIndex(last_index),
            present: 1,
            zero: 0,
            crcs,
            data: Bytes::from(vec![byte; 4096]),
        }))
    }

    fn adopted(copy: &Copy) -> Verdict {
        let Copy::Whole(image) = copy else { panic!("nothing to adopt") };
        Verdict::Adopt(image.clone())
    }

    #[test]
    fn two_whole_copies_are_judged_by_a_third() {
        let (a, b) = (whole(5, 1), whole(5, 2));
        assert_eq!(judge(&a, &a, &[]), Verdict::Fine);
        assert_eq!(judge(&a, &b, std::slice::from_ref(&b)), adopted(&b));
        assert_eq!(judge(&a, &b, std::slice::from_ref(&a)), Verdict::TheirsIsWrong);
        assert_eq!(judge(&a, &b, &[]), Verdict::Undecided);
        assert_eq!(judge(&a, &b, &[whole(5, 3)]), Verdict::Undecided);
        assert_eq!(judge(&a, &b, &[Copy::None]), Verdict::Undecided);
    }

    #[test]
    fn a_copy_that_changed_meanwhile_is_not_judged() {
        assert_eq!(judge(&whole(5, 1), &whole(6, 2), &[whole(6, 2)]), Verdict::Fine);
        assert_eq!(judge(&Copy::None, &Copy::None, &[]), Verdict::Fine);
    }

    #[test]
    fn a_damaged_copy_never_wins() {
        let good = whole(5, 1);
        assert_eq!(judge(&Copy::Damaged, &good, &[]), adopted(&good));
        assert_eq!(judge(&good, &Copy::Damaged, &[]), Verdict::TheirsIsWrong);
        assert_eq!(judge(&Copy::Damaged, &Copy::Damaged, &[]), Verdict::Undecided);
        assert_eq!(judge(&Copy::Damaged, &Copy::None, &[]), Verdict::Undecided);
    }
}
