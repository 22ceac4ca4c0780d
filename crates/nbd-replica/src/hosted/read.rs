//! Reads and block status at the leader: under its lease or behind a barrier, and with damaged
//! blocks replaced by good copies of other replicas.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;

use bytes::Bytes;
use nbd_consensus::Timestamp;
use nbd_front::{QueryData, ReadBuffer, ReadData, RunError};
use nbd_relay::Failed;
use nbd_service::trace::{Context, Kind, Span};
use nbd_session::Query;
use nbd_store::limits::BLOCK_BYTES;
use nbd_store::{ReadError, ReadPlan, Segment, ShardReader, VolumeId};
use tracing::{error, info, warn};

use super::HostedShard;
use crate::group_task::ReadPermit;

/// Damaged blocks that one read may have repaired. A disk with more of them is no place to read
/// from.
const REPAIRS_PER_READ_MAX: usize = 16;

/// A good copy of a block, or none.
pub(crate) type Fetched = Pin<Box<dyn Future<Output = Option<Bytes>> + Send>>;

/// Finds good copies of damaged blocks, and sees to it that they are put in place.
pub(crate) trait BlockRepair: fmt::Debug + Send + Sync {
    /// The 4096 bytes of `block` of `volume` that have the CRC32C `crc`, from another replica.
    fn fetch(&self, volume: VolumeId, block: u64, crc: u32) -> Fetched;
}

/// Why a query was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QueryError {
    /// It never will be.
    Failed(Failed),
    /// This replica may not answer it: another leads.
    Lost,
}

impl From<RunError> for QueryError {
    fn from(_: RunError) -> Self {
        Self::Lost
    }
}

/// Good copies of blocks that are damaged here, by number.
type Repaired = BTreeMap<u64, Bytes>;

/// What a query is about, on whatever thread it is looked at.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    pub(crate) shard: HostedShard,
    pub(crate) volume: VolumeId,
    pub(crate) query: Query,
    /// The leader's part of its trace, if it is traced.
    pub(crate) trace: Option<Context>,
}

impl Question {
    /// A part of its trace.
    fn span(&self, name: &'static str) -> Option<Span> {
        self.shard.hosting.tracer.child_of(self.trace?, name, Kind::Internal)
    }

    /// Answers under the lease, or behind a barrier if there is none.
    pub(crate) async fn answer(self) -> Result<QueryData, QueryError> {
        let mut repaired = Repaired::new();
        loop {
            let permit = self.shard.group.read_permit();
            if permit.is_none() {
                let span = self.span("barrier");
                self.shard.group.barrier().await?;
                drop(span);
            }
            let looked = self.clone().look_elsewhere(repaired.clone()).await;
            if permit.is_some_and(|permit| !permit.holds()) {
                // What was read, and what was found damaged, may be out of date.
                repaired.clear();
                continue;
            }
            match looked {
                Ok(data) => return Ok(data),
                Err(error) => self.repair(&error, &mut repaired).await?,
            }
        }
    }

    async fn look_elsewhere(self, repaired: Repaired) -> Result<QueryData, ReadError> {
        let _span = self.span("disk");
        match tokio::task::spawn_blocking(move || self.look(&repaired)).await {
            Ok(looked) => looked,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }

    /// Answers on this thread, which may block, if all goes well under `permit`. `None`: see
    /// [`Question::answer`].
    pub(super) fn answer_blocking(&self, permit: &ReadPermit) -> Option<QueryData> {
        let span = self.span("disk");
        let looked = self.look(&Repaired::new());
        drop(span);
        looked.ok().filter(|_| permit.holds())
    }

    /// Fetches a good copy of the block that made a read fail.
    async fn repair(&self, error: &ReadError, repaired: &mut Repaired) -> Result<(), QueryError> {
        let failed = QueryError::Failed(match error {
            // Not the disk's fault: the volume was changed since the client attached.
            ReadError::PastEnd => return Err(QueryError::Failed(Failed::PastEnd)),
            ReadError::UnknownVolume => return Err(QueryError::Failed(Failed::Gone)),
            _ => Failed::Io,
        });
        if let ReadError::Corrupt { volume, block, crc, .. } = error {
            self.shard.hosting.corrupt.increment();
            if let Some(crc) = *crc
                && repaired.len() < REPAIRS_PER_READ_MAX
                && !repaired.contains_key(block)
                && let Some(bytes) = self.shard.hosting.repair.fetch(*volume, *block, crc).await
            {
                info!(%error, "read from another replica");
                repaired.insert(*block, bytes);
                return Ok(());
            }
        }
        error!(%error, query = ?self.query, "read failed");
        Err(failed)
    }

    fn look(&self, repaired: &Repaired) -> Result<QueryData, ReadError> {
        let reader = self.shard.group.reader();
        match self.query {
            Query::Read { offset, len, holes } => {
                let read = if repaired.is_empty() {
                    read_blocking(reader, self.volume, offset, len, holes)
                } else {
                    read_around(reader, self.volume, offset, len, repaired)
                };
                read.map(QueryData::Bytes)
            }
            Query::BlockStatus { offset, len, extents_max } => {
                let extents = reader.block_status(self.volume, offset, len, extents_max as usize);
                extents.map(QueryData::Extents)
            }
        }
    }
}

/// Reads `(offset, length)` into `data` at once: if this replica may answer alone, and can without
/// waiting for the disk. Gives the times between which it did. Otherwise `None`, with anything in
/// `data`.
pub(crate) fn read_cached(
    shard: &HostedShard,
    volume: VolumeId,
    (offset, len): (u64, u64),
    holes: bool,
    data: &mut ReadBuffer,
) -> Option<(Timestamp, Timestamp)> {
    let permit = shard.group.read_permit()?;
    // What cannot be read is looked at again, by the book, on the blocking pool.
    let mut plan = shard.group.reader().resolve(volume, offset, len).ok()?;
    data.bytes.resize(plan.len(), 0);
    if !matches!(plan.try_read_cached(&mut data.bytes), Ok(true)) {
        return None;
    }
    let now = permit.still()?;
    data.runs = runs(&plan, holes);
    Some((permit.since(), now))
}

/// Reads a range, waiting for the disk. A block that fails its checksum is looked up and read once
/// more: it may have moved in between.
fn read_blocking(
    reader: &ShardReader,
    volume: VolumeId,
    offset: u64,
    len: u64,
    holes: bool,
) -> Result<ReadData, ReadError> {
    let mut plan = reader.resolve(volume, offset, len)?;
    let mut bytes = vec![0; plan.len()];
    if let Err(first) = plan.read_blocking(&mut bytes) {
        warn!(error = %first, "a read failed: looking the blocks up again");
        drop(plan);
        plan = reader.resolve(volume, offset, len)?;
        plan.read_blocking(&mut bytes)?;
    }
    let runs = runs(&plan, holes);
    Ok(ReadData { bytes: bytes.into(), runs })
}

/// Reads a range with some blocks given: one run of bytes.
fn read_around(
    reader: &ShardReader,
    volume: VolumeId,
    offset: u64,
    len: u64,
    repaired: &Repaired,
) -> Result<ReadData, ReadError> {
    let end = offset + len;
    let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
    let mut at = offset;
    while at < end {
        let (block, skipped) = (at / BLOCK_BYTES, at % BLOCK_BYTES);
        let block_end = end.min((block + 1) * BLOCK_BYTES);
        if let Some(good) = repaired.get(&block) {
            let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
            let wanted = usize::try_from(block_end - at).unwrap_or(usize::MAX);
            bytes.extend_from_slice(&good[skipped..skipped + wanted]);
            at = block_end;
            continue;
        }
        let next = repaired.range(block..).next().map_or(end, |(next, _)| next * BLOCK_BYTES);
        let part = read_blocking(reader, volume, at, next.min(end) - at, false)?;
        bytes.extend_from_slice(&part.bytes);
        at = next.min(end);
    }
    let whole = 0..bytes.len();
    Ok(ReadData { bytes: bytes.into(), runs: vec![(whole, false)] })
}

/// The runs of a plan that was read; `true` for zeroes. One run of bytes if holes are not wanted.
fn runs(plan: &ReadPlan, holes: bool) -> Vec<(Range<usize>, bool)> {
    if holes {
        plan.segments().map(|(run, segment)| (run, segment == Segment::Zero)).collect()
    } else {
        vec![(0..plan.len(), false)]
    }
}
