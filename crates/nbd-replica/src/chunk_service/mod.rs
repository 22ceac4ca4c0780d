//! What peers read of this node's data: the source side of resync, scrub and repair.
//!
//! Every call that looks something up does so on the blocking pool, and there are bounds on how
//! many there are at a time. It has a TCP connection of its own for each peer that asks, so that
//! chunks never delay heartbeats.

pub(crate) mod convert;
pub(crate) mod snapshot;

use std::collections::HashMap;
use std::sync::Arc;

use nbd_rpc::error::Refusal;
use nbd_rpc::identity::{check_cluster, check_replica, replica_id};
use nbd_rpc::v1;
use nbd_rpc::v1::chunks_server::Chunks;
use nbd_store::{ChunkIndex, ChunkKey, DamagedChunk, ReadError, ShardReader, VolumeId};
use nbd_topology::{ClusterName, LogIndex, ReplicaId, ShardId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use self::convert::{
    digest_range, digest_to_wire, image_to_wire, key_from_wire, key_to_wire, range_to_wire,
    run_to_wire, stamp_to_wire,
};
use self::snapshot::SnapshotMessages;
use crate::checkpoint_thread::CheckpointHandle;

/// Calls served at a time, over all peers and shards. A peer has one or two under way a shard.
const CALLS_MAX: usize = 16;

/// Chunks in one message of a fetch: 1 MiB if they are full.
const MESSAGE_CHUNKS_MAX: usize = 16;

/// Messages of a fetch that are ready before the peer takes them.
const MESSAGES_AHEAD: usize = 2;

/// Chunks that one fetch may ask for.
pub(crate) const FETCH_CHUNKS_MAX: usize = 4096;

/// Chunks listed in one page of a manifest at most: 256 MiB of data if they are full.
pub(crate) const MANIFEST_CHUNKS_MAX: usize = 4096;

/// Ranges in one page of digests at most.
pub(crate) const DIGEST_RANGES_MAX: usize = 4096;

/// Blocks that one call may ask for: 1 MiB.
pub(crate) const BLOCKS_MAX: usize = 256;

/// What the service is made of.
#[derive(Debug, Clone)]
pub(crate) struct ChunkServiceParts {
    pub(crate) cluster: ClusterName,
    /// Of each shard hosted here.
    pub(crate) readers: HashMap<ShardId, ShardReader>,
    pub(crate) checkpoints: CheckpointHandle,
    /// Where chunks go that a peer asked for and that are damaged here.
    pub(crate) damaged: mpsc::Sender<DamagedChunk>,
}

/// Serves [`Chunks`].
#[derive(Debug, Clone)]
pub(crate) struct ChunkService {
    parts: Arc<ChunkServiceParts>,
    calls: Arc<Semaphore>,
}

/// A call that was let in.
struct Call {
    reader: ShardReader,
    from: ReplicaId,
    permit: OwnedSemaphorePermit,
}

impl ChunkService {
    pub(crate) fn new(parts: ChunkServiceParts) -> Self {
        Self { parts: Arc::new(parts), calls: Arc::new(Semaphore::new(CALLS_MAX)) }
    }

    /// Checks who asks whom, and that there is room for the call.
    fn admit(&self, to: Option<v1::ChunksAddress>) -> Result<Call, Status> {
        let to = to.ok_or(Refusal::Malformed("no address"))?;
        check_cluster(&to.cluster, &self.parts.cluster)?;
        let shard = ShardId(to.shard);
        let reader = self.parts.readers.get(&shard).ok_or(Refusal::Shard(shard))?.clone();
        let from = replica_id(to.from)?;
        let Some(formation) = reader.formation() else {
            return Err(Status::unavailable(format!("shard {shard} is not formed here yet")));
        };
        if to.to != 0 {
            check_replica(shard, to.to, formation.replica)?;
        }
        if !formation.replicas.iter().any(|known| known.id == from) {
            let text = format!("shard {shard} knows no replica {from}");
            return Err(Status::failed_precondition(text));
        }
        let permit = Arc::clone(&self.calls).try_acquire_owned().map_err(|_| Refusal::TooMany {
            what: "calls for chunks under way",
            limit: CALLS_MAX,
        })?;
        Ok(Call { reader, from, permit })
    }

    /// The snapshot of a checkpoint that covers `at_least`, and knows the replica that asks. If it
    /// is to be `fresh`, it covers all that is applied by now, as far as there is room for that.
    async fn recent_snapshot(
        &self,
        call: &Call,
        at_least: LogIndex,
        fresh: bool,
    ) -> Result<nbd_store::ShardSnapshot, Status> {
        let mut wanted = if fresh { call.reader.applied().max(at_least) } else { at_least };
        for attempt in 0..2 {
            let reader = call.reader.clone();
            let snapshot = blocking(move || reader.snapshot()).await?;
            if snapshot.applied >= wanted && snapshot.membership.contains(call.from) {
                return Ok(snapshot);
            }
            if attempt == 0 {
                self.parts.checkpoints.attempt().await;
                wanted = at_least;
            }
        }
        let from = call.from;
        let text = format!("no checkpoint yet that covers entry {at_least} and replica {from}");
        Err(Status::unavailable(text))
    }
}

/// Runs a look-up on the blocking pool.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReadError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| read_error(&error)),
        Err(_) => Err(Status::internal("the look-up panicked")),
    }
}

fn read_error(error: &ReadError) -> Status {
    match error {
        ReadError::Corrupt { .. } => Status::data_loss(error.to_string()),
        ReadError::UnknownVolume => Status::not_found(error.to_string()),
        _ => Status::internal(nbd_rpc::reason(error)),
    }
}

/// Chunks changed since an entry, and bytes in them.
fn measure(reader: &ShardReader, since: LogIndex) -> Result<(u64, u64), ReadError> {
    let (mut chunks, mut bytes, mut after) = (0, 0, None);
    loop {
        let page = reader.manifest(since, after, MANIFEST_CHUNKS_MAX)?;
        chunks += page.chunks.len() as u64;
        bytes += page.chunks.iter().map(|chunk| chunk.bytes).sum::<u64>();
        match page.next {
            Some(next) => after = Some(next),
            None => return Ok((chunks, bytes)),
        }
    }
}

/// At most `max`, and at least one: a page of nothing would never come to an end.
fn page_size(asked: u32, max: usize) -> usize {
    usize::try_from(asked).unwrap_or(max).clamp(1, max)
}

#[tonic::async_trait]
impl Chunks for ChunkService {
    type SnapshotStream = tokio_stream::Iter<SnapshotMessages>;
    type FetchStream = ReceiverStream<Result<v1::FetchReply, Status>>;

    async fn snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let v1::SnapshotRequest { to, at_least, since, fresh } = request.into_inner();
        let call = self.admit(to)?;
        let snapshot = self.recent_snapshot(&call, LogIndex(at_least), fresh).await?;
        let (reader, permit) = (call.reader, call.permit);
        let messages = blocking(move || {
            let delta = measure(&reader, LogIndex(since))?;
            Ok(SnapshotMessages::new(snapshot, delta, Some(permit)))
        })
        .await?;
        Ok(Response::new(tokio_stream::iter(messages)))
    }

    async fn manifest(
        &self,
        request: Request<v1::ManifestRequest>,
    ) -> Result<Response<v1::ManifestReply>, Status> {
        let v1::ManifestRequest { to, since, after, chunks_max } = request.into_inner();
        let Call { reader, permit, .. } = self.admit(to)?;
        let max = page_size(chunks_max, MANIFEST_CHUNKS_MAX);
        let page = blocking(move || {
            let _permit = permit;
            reader.manifest(LogIndex(since), after.map(key_from_wire), max)
        })
        .await?;
        Ok(Response::new(v1::ManifestReply {
            chunks: page.chunks.iter().map(stamp_to_wire).collect(),
            present: page.present.iter().map(run_to_wire).collect(),
            next: page.next.map(key_to_wire),
        }))
    }

    async fn fetch(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let v1::FetchRequest { to, chunks } = request.into_inner();
        let call = self.admit(to)?;
        if chunks.len() > FETCH_CHUNKS_MAX {
            return Err(Refusal::Malformed("too many chunks at a time").into());
        }
        let (messages, stream) = mpsc::channel(MESSAGES_AHEAD);
        let damaged = self.parts.damaged.clone();
        tokio::task::spawn_blocking(move || {
            let keys = chunks.into_iter().map(key_from_wire).collect::<Vec<_>>();
            send_chunks(&call, &keys, &messages, &damaged);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn digests(
        &self,
        request: Request<v1::DigestsRequest>,
    ) -> Result<Response<v1::DigestsReply>, Status> {
        let v1::DigestsRequest { to, after, ranges_max } = request.into_inner();
        let Call { reader, permit, .. } = self.admit(to)?;
        let max = page_size(ranges_max, DIGEST_RANGES_MAX);
        let ranges = blocking(move || {
            let _permit = permit;
            reader.digests(after.map(key_from_wire), max)
        })
        .await?;
        let next = ranges.last().map(|range| key_to_wire((range.volume, range.first)));
        let ranges = ranges.iter().map(range_to_wire).collect();
        Ok(Response::new(v1::DigestsReply { ranges, next }))
    }

    async fn chunk_digests(
        &self,
        request: Request<v1::ChunkDigestsRequest>,
    ) -> Result<Response<v1::ChunkDigestsReply>, Status> {
        let v1::ChunkDigestsRequest { to, volume, start, end } = request.into_inner();
        let Call { reader, permit, .. } = self.admit(to)?;
        let range = digest_range(start, end)?;
        let found = blocking(move || {
            let _permit = permit;
            DigestsAt::read(&reader, VolumeId(volume), range)
        })
        .await?;
        Ok(Response::new(v1::ChunkDigestsReply {
            chunks: found.chunks.iter().map(digest_to_wire).collect(),
            applied_before: found.before.0,
            applied_after: found.after.0,
        }))
    }

    async fn blocks(
        &self,
        request: Request<v1::BlocksRequest>,
    ) -> Result<Response<v1::BlocksReply>, Status> {
        let v1::BlocksRequest { to, blocks } = request.into_inner();
        let Call { reader, permit, .. } = self.admit(to)?;
        if blocks.len() > BLOCKS_MAX {
            return Err(Refusal::Malformed("too many blocks at a time").into());
        }
        let blocks = blocking(move || {
            let _permit = permit;
            let found = blocks.into_iter().map(|wanted| {
                let data = reader.read_block(VolumeId(wanted.volume), wanted.block, wanted.crc)?;
                Ok(v1::BlockFound { data: data.unwrap_or_default() })
            });
            found.collect::<Result<Vec<_>, ReadError>>()
        })
        .await?;
        Ok(Response::new(v1::BlocksReply { blocks }))
    }
}

/// Digests of chunks, and which checkpoints they may be of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DigestsAt {
    /// Every change up to this entry is in them, ...
    pub(crate) before: LogIndex,
    /// ... and none behind this one.
    pub(crate) after: LogIndex,
    pub(crate) chunks: Vec<nbd_store::ChunkDigest>,
}

impl DigestsAt {
    /// Looks them up. **Blocks.**
    pub(crate) fn read(
        reader: &ShardReader,
        volume: VolumeId,
        range: std::ops::Range<ChunkIndex>,
    ) -> Result<Self, ReadError> {
        // The shortest page there is, for what it is as of.
        let applied = || reader.manifest(LogIndex::ZERO, None, 1).map(|page| page.applied);
        let before = applied()?;
        let chunks = reader.chunk_digests(volume, range)?;
        let after = applied()?;
        Ok(Self { before, after, chunks })
    }
}

/// Reads chunks and sends them, until the peer goes or one cannot be read. **Blocks.**
fn send_chunks(
    call: &Call,
    keys: &[ChunkKey],
    messages: &mpsc::Sender<Result<v1::FetchReply, Status>>,
    damaged: &mpsc::Sender<DamagedChunk>,
) {
    for keys in keys.chunks(MESSAGE_CHUNKS_MAX) {
        let mut chunks = Vec::with_capacity(keys.len());
        let mut failed = None;
        for &(volume, chunk) in keys {
            match call.reader.read_chunk(volume, chunk) {
                Ok(image) => chunks.extend(image.map(image_to_wire)),
                Err(error) => {
                    if matches!(error, ReadError::Corrupt { .. }) {
                        report_damage(&call.reader, volume, chunk, damaged);
                    }
                    failed = Some(read_error(&error));
                    break;
                }
            }
        }
        if messages.blocking_send(Ok(v1::FetchReply { chunks })).is_err() {
            return;
        }
        if let Some(status) = failed {
            let _ = messages.blocking_send(Err(status));
            return;
        }
    }
}

/// Has a damaged chunk repaired, so that the peer finds it whole next time.
fn report_damage(
    reader: &ShardReader,
    volume: VolumeId,
    chunk: ChunkIndex,
    damaged: &mpsc::Sender<DamagedChunk>,
) {
    let range = chunk..ChunkIndex(chunk.0 + 1);
    if let Ok(digests) = reader.chunk_digests(volume, range)
        && let Some(found) = digests.first()
    {
        let last_index = found.last_index;
        // When too many wait, the scrub finds it.
        let _ = damaged.try_send(DamagedChunk { volume, chunk, last_index });
    }
}
