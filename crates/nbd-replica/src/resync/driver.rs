//! Carries out the steps of [`nbd_shard::resync::Resync`].
//!
//! The driver's task runs for as long as the node; it ends when the node stops. One resync of a
//! shard is under way at a time.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_shard::InstallPlan;
use nbd_shard::resync::{Got, Resync, Want, digest_range_from, unequal_ranges, unfinished};
use nbd_store::{
    CheckpointError, ChunkImage, ChunkKey, ChunkStamp, ReadError, ReceiveError, ShardReader,
    ShardSnapshot,
};
use nbd_topology::{LogIndex, ShardId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::progress::{Meter, ResyncProgress, Total};
use super::source::{ChunkPeers, ChunkSource, SourceError};
use super::throttle::Throttle;
use super::{Offer, ResyncGroup, ResyncInbox, Said};
use crate::checkpoint_thread::{CheckpointHandle, JobError};
use crate::chunk_service::{DIGEST_RANGES_MAX, DigestsAt};
use crate::failure::Failure;

/// Bytes of chunks that are stored together. A job of this size takes the disk some 10 ms, for
/// which a checkpoint may have to wait.
const STORE_BYTES: usize = 4 << 20;

/// Wait before an installation that found no room is tried again.
const INSTALL_PAUSE: Duration = Duration::from_secs(1);

/// What a driver is made of.
#[derive(Debug)]
pub(crate) struct ResyncParts<G> {
    pub(crate) group: G,
    pub(crate) checkpoints: CheckpointHandle,
    pub(crate) peers: Arc<ChunkPeers>,
    /// Shared by all shards of the node.
    pub(crate) throttle: Arc<Throttle>,
    pub(crate) failure: Failure,
    /// Cancelled when the node stops.
    pub(crate) stop: CancellationToken,
}

/// Catches one shard's replica up.
#[derive(Debug)]
pub(crate) struct ResyncDriver<G> {
    parts: ResyncParts<G>,
    shard: ShardId,
    reader: ShardReader,
    inbox: ResyncInbox,
    pub(super) meter: Meter,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Store(#[from] JobError<ReceiveError>),
    #[error("cannot read this node's own store")]
    Read(#[from] ReadError),
    #[error("a task ended badly")]
    Panicked,
    #[error("the shard is not formed")]
    NotFormed,
}

/// How a resync came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The replica is as far as the snapshot.
    Installed,
    /// The log reaches it after all.
    NotNeeded,
    Stopped,
}

/// What happens next in a resync.
enum Turn {
    Got(Got),
    Failed(StepError),
    Install(InstallPlan),
    SourceChanged(Offer),
    Ended(Ended),
}

impl<G: ResyncGroup> ResyncDriver<G> {
    pub(crate) fn new(parts: ResyncParts<G>, inbox: ResyncInbox) -> Self {
        let reader = parts.group.reader().clone();
        let shard = reader.shard();
        Self { parts, shard, reader, inbox, meter: Meter::new(shard) }
    }

    /// The progress of the resync under way, if one is.
    pub(crate) fn progress(&self) -> watch::Receiver<Option<ResyncProgress>> {
        self.meter.shown()
    }

    /// Runs until the node stops.
    pub(crate) async fn run(self) {
        loop {
            let said = tokio::select! {
                () = self.parts.stop.cancelled() => return,
                said = self.inbox.next() => said,
            };
            match said {
                Said::Offered(offer) if self.is_outdated(&offer) => {}
                Said::Offered(offer) => {
                    self.meter.begin();
                    let ended = self.resync(offer).await;
                    let Total { bytes, received, elapsed } = self.meter.end();
                    match ended {
                        Ended::Installed => {
                            let shard = self.shard;
                            info!(%shard, bytes, received, ?elapsed, "resync finished");
                        }
                        Ended::NotNeeded => {
                            info!(shard = %self.shard, "resync given up: the log suffices");
                        }
                        Ended::Stopped => return,
                    }
                }
                // Nothing was reported to be ready, unless by a resync that was given up.
                Said::Install(plan) => {
                    if let Ended::Stopped = self.install(plan).await {
                        return;
                    }
                }
                Said::Dropped => {}
            }
        }
    }

    fn is_outdated(&self, offer: &Offer) -> bool {
        self.reader.applied() >= offer.snapshot.index
    }

    /// Runs one resync to its end.
    pub(super) async fn resync(&self, mut offer: Offer) -> Ended {
        let began = Instant::now();
        let mut plan = Resync::new();
        let mut want = plan.begin();
        let log_start = |offer: &Offer| {
            let (from, index) = (&offer.source.node, offer.snapshot.index);
            info!(shard = %self.shard, %from, %index, applied = %self.reader.applied(), "resync");
        };
        log_start(&offer);
        loop {
            if self.is_outdated(&offer) && !plan.is_told() {
                return Ended::NotNeeded;
            }
            let got = match self.attend(&offer, want, plan.is_told()).await {
                Turn::Got(got) => Ok(got),
                Turn::Failed(error) => Err(error),
                Turn::Ended(ended) => return ended,
                Turn::Install(install) => return self.install(install).await,
                // What was under way is dropped; what it has stored is found again.
                Turn::SourceChanged(newer) => {
                    log_start(&newer);
                    offer = newer;
                    plan.source_changed();
                    want = plan.begin();
                    continue;
                }
            };
            want = match got {
                Ok(got) => plan.step(began.elapsed(), got),
                Err(StepError::Store(JobError::Stopped)) => return Ended::Stopped,
                Err(error) => {
                    let from = &offer.source.node;
                    let error = nbd_rpc::reason(&error);
                    warn!(shard = %self.shard, %from, %error, "a step of the resync failed");
                    plan.step(began.elapsed(), Got::Failed)
                }
            };
        }
    }

    /// Carries a step out, with an ear for the group.
    async fn attend(&self, offer: &Offer, want: Want, is_told: bool) -> Turn {
        let step = self.carry_out(offer, want, is_told);
        tokio::pin!(step);
        loop {
            tokio::select! {
                biased;
                () = self.parts.stop.cancelled() => return Turn::Ended(Ended::Stopped),
                said = self.inbox.next() => match said {
                    Said::Install(install) => return Turn::Install(install),
                    Said::Dropped if is_told => return Turn::Ended(Ended::NotNeeded),
                    Said::Offered(newer) if !is_told && newer.source.id != offer.source.id => {
                        return Turn::SourceChanged(newer);
                    }
                    Said::Dropped | Said::Offered(_) => {}
                },
                got = &mut step => return got.map_or_else(Turn::Failed, Turn::Got),
            }
        }
    }

    /// Switches the store over, and tells the group. The group does nothing else until then.
    async fn install(&self, plan: InstallPlan) -> Ended {
        let InstallPlan { snapshot, hard_state } = plan;
        loop {
            let snapshot = snapshot.clone();
            let plan = InstallPlan { snapshot, hard_state };
            match self.parts.checkpoints.install(self.shard, plan).await {
                Ok(()) => break,
                Err(JobError::Stopped) => return Ended::Stopped,
                Err(JobError::Refused(ReceiveError::Store(CheckpointError::NoSpace))) => {
                    tokio::time::sleep(INSTALL_PAUSE).await;
                }
                Err(JobError::Refused(error)) => {
                    let shard = self.shard;
                    self.parts.failure.set(format!("cannot install shard {shard}: {error}"));
                    return Ended::Stopped;
                }
            }
        }
        match self.parts.group.installed().await {
            Ok(()) => Ended::Installed,
            Err(_) => Ended::Stopped,
        }
    }

    fn source(&self, offer: &Offer) -> Result<ChunkSource, StepError> {
        let me = self.reader.formation().ok_or(StepError::NotFormed)?.replica;
        let to = &offer.source;
        Ok(self.parts.peers.source(self.shard, me, to.id, &to.addresses.grpc)?)
    }

    async fn carry_out(&self, offer: &Offer, want: Want, is_told: bool) -> Result<Got, StepError> {
        if is_told {
            // The group speaks next.
            std::future::pending::<()>().await;
        }
        let source = self.source(offer)?;
        match want {
            Want::Checkpoint => {
                self.parts.checkpoints.attempt().await;
                Ok(Got::Checkpoint { applied: self.at_home().await? })
            }
            Want::Snapshot { since } => {
                let (snapshot, bytes) = source.snapshot(offer.snapshot.index, since, true).await?;
                self.meter.expect(bytes);
                Ok(Got::Snapshot { snapshot: Box::new(snapshot) })
            }
            Want::Page { since, after } => {
                let page = source.manifest(since, after).await?;
                let (chunks, present, next) = (page.chunks, page.present, page.next);
                Ok(Got::Page { chunks, present, next })
            }
            Want::Fetch { chunks, upto } => {
                let missing = self.missing(chunks).await?;
                self.fetch(&source, upto, missing).await?;
                Ok(Got::Stored)
            }
            Want::Refetch { chunks, upto } => {
                warn!(shard = %self.shard, chunks = chunks.len(), "fetching what differs again");
                self.fetch(&source, upto, chunks).await?;
                Ok(Got::Stored)
            }
            Want::Remove(absent) => {
                let removed = self.parts.checkpoints.remove_absent(self.shard, absent).await?;
                debug!(shard = %self.shard, removed, "removed what the source does not have");
                Ok(Got::Removed)
            }
            Want::Compare { after, upto } => self.compare(&source, after, upto).await,
            Want::Ready(snapshot) => self.ready(*snapshot).await,
            Want::Pause(pause) => {
                tokio::time::sleep(pause).await;
                Ok(Got::Paused)
            }
        }
    }

    async fn ready(&self, snapshot: ShardSnapshot) -> Result<Got, StepError> {
        match self.parts.group.resync_ready(snapshot).await {
            Ok(()) => Ok(Got::Told),
            Err(_) => Err(JobError::Stopped.into()),
        }
    }

    /// The last entry that the durable checkpoint covers.
    async fn at_home(&self) -> Result<LogIndex, StepError> {
        let reader = self.reader.clone();
        Ok(blocking(move || reader.snapshot()).await?.applied)
    }

    /// Those chunks that are not here in the version wanted.
    async fn missing(&self, chunks: Vec<ChunkStamp>) -> Result<Vec<ChunkKey>, StepError> {
        let reader = self.reader.clone();
        let (missing, found) = blocking(move || {
            let (mut missing, mut found) = (Vec::new(), 0);
            for stamp in chunks {
                let ChunkStamp { volume, chunk, last_index, bytes } = stamp;
                if reader.has_chunk(volume, chunk, last_index)? {
                    found += bytes;
                } else {
                    missing.push((volume, chunk));
                }
            }
            Ok((missing, found))
        })
        .await?;
        self.meter.found(found);
        Ok(missing)
    }

    /// Fetches chunks and stores them: while one batch is stored, the next one arrives.
    async fn fetch(
        &self,
        source: &ChunkSource,
        upto: LogIndex,
        chunks: Vec<ChunkKey>,
    ) -> Result<(), StepError> {
        if chunks.is_empty() {
            return Ok(());
        }
        let mut fetching = source.fetch(&chunks).await?;
        let mut wanted: HashSet<ChunkKey> = chunks.into_iter().collect();
        let (mut batch, mut batch_bytes) = (Vec::new(), 0);
        let mut storing = None;
        while let Some(images) = fetching.next().await? {
            for image in images {
                // What was not asked for is not taken, nor anything twice.
                if wanted.remove(&(image.volume, image.chunk)) {
                    batch_bytes += image.data.len();
                    batch.push(image);
                }
            }
            if batch_bytes >= STORE_BYTES {
                finish(storing.take()).await?;
                storing = Some(self.store(upto, std::mem::take(&mut batch)));
                self.parts.throttle.take(batch_bytes as u64).await;
                batch_bytes = 0;
            }
        }
        finish(storing).await?;
        if !batch.is_empty() {
            self.parts.throttle.take(batch_bytes as u64).await;
            finish(Some(self.store(upto, batch))).await?;
        }
        Ok(())
    }

    /// Starts to store a batch.
    fn store(&self, upto: LogIndex, batch: Vec<ChunkImage>) -> Storing {
        let bytes = batch.iter().map(|image| image.data.len() as u64).sum();
        self.meter.stored(batch.len(), bytes);
        let (checkpoints, shard) = (self.parts.checkpoints.clone(), self.shard);
        tokio::spawn(async move { checkpoints.write_chunks(shard, upto, batch).await })
    }

    /// Compares one page of digests.
    async fn compare(
        &self,
        source: &ChunkSource,
        after: Option<ChunkKey>,
        upto: LogIndex,
    ) -> Result<Got, StepError> {
        let theirs = source.digests(after).await?;
        let reader = self.reader.clone();
        let mine = blocking(move || reader.digests(after, DIGEST_RANGES_MAX)).await?;
        let (ranges, next) = unequal_ranges(&theirs, &mine);
        let (mut differing, mut stale) = (Vec::new(), false);
        for (volume, first) in ranges {
            let range = digest_range_from(first);
            let theirs = source.chunk_digests(volume, range.clone()).await?;
            let reader = self.reader.clone();
            let mine = blocking(move || DigestsAt::read(&reader, volume, range)).await?;
            let found = unfinished(volume, &theirs.chunks, &mine.chunks, upto);
            differing.extend(found.differing);
            stale |= found.stale;
        }
        if next.is_none() && self.at_home().await? != self.reader.applied() {
            // Something was applied here meanwhile, and is yet to come over what was fetched.
            self.parts.checkpoints.attempt().await;
            stale = true;
        }
        Ok(Got::Compared { differing, stale, next })
    }
}

type Storing = JoinHandle<Result<(), JobError<ReceiveError>>>;

async fn finish(storing: Option<Storing>) -> Result<(), StepError> {
    match storing {
        Some(storing) => Ok(storing.await.map_err(|_| StepError::Panicked)??),
        None => Ok(()),
    }
}

/// Runs a look-up on the blocking pool.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, StepError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|_| StepError::Panicked)??)
}
