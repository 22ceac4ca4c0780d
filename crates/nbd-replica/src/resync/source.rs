//! A peer as a source of chunks.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use nbd_rpc::error::Refusal;
use nbd_rpc::v1::chunks_client::ChunksClient;
use nbd_rpc::{Channels, MESSAGE_BYTES_MAX, v1, within};
use nbd_store::{
    ChunkImage, ChunkIndex, ChunkKey, ManifestPage, RangeDigest, ShardSnapshot, VolumeId,
};
use nbd_topology::{ClusterName, LogIndex, ReplicaId, ShardId};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::chunk_service::convert::{
    digest_from_wire, image_from_wire, is_block, key_from_wire, key_to_wire, range_from_wire,
    run_from_wire, stamp_from_wire,
};
use crate::chunk_service::snapshot::ArrivingSnapshot;
use crate::chunk_service::{BLOCKS_MAX, DIGEST_RANGES_MAX, DigestsAt, MANIFEST_CHUNKS_MAX};

/// Time for an answer to a call that looks up one page. A source on a busy disk takes some 100 ms.
const CALL_DEADLINE: Duration = Duration::from_secs(15);

/// Time until a snapshot begins: the source may take a checkpoint first, and measures what changed.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(120);

/// Silence after which a fetch, or a snapshot that has begun, is given up.
pub(crate) const FETCH_STALL: Duration = Duration::from_secs(15);

/// Connections for chunks, one to each peer, apart from those of the Raft transport.
#[derive(Debug)]
pub(crate) struct ChunkPeers {
    cluster: ClusterName,
    channels: Channels,
}

/// Why a peer gave no answer that is of use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// The call failed, or was refused.
    #[error("{}", nbd_rpc::reason(.0))]
    Call(#[from] Status),
    /// The answer makes no sense, or arrived damaged.
    #[error(transparent)]
    Answer(#[from] Refusal),
    /// Its address is none.
    #[error(transparent)]
    Address(#[from] nbd_rpc::InvalidAddress),
}

impl ChunkPeers {
    pub(crate) fn new(cluster: ClusterName) -> Self {
        Self { cluster, channels: Channels::default() }
    }

    /// The replica `to` of the shard, at this address, as asked by the replica `from`. Connects
    /// when the first call is made.
    pub(crate) fn source(
        &self,
        shard: ShardId,
        from: ReplicaId,
        to: ReplicaId,
        grpc: &str,
    ) -> Result<ChunkSource, SourceError> {
        let client = ChunksClient::new(self.channels.to(grpc)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let to = v1::ChunksAddress {
            cluster: self.cluster.to_string(),
            shard: shard.0,
            from: from.get(),
            to: to.get(),
        };
        Ok(ChunkSource { client, to })
    }
}

/// A replica on another node, for its chunks. Clones share the connection.
#[derive(Debug, Clone)]
pub(crate) struct ChunkSource {
    client: ChunksClient<Channel>,
    to: v1::ChunksAddress,
}

impl ChunkSource {
    fn address(&self) -> Option<v1::ChunksAddress> {
        Some(self.to.clone())
    }

    /// The state of a checkpoint that covers `at_least` and, if it is to be `fresh`, all that the
    /// source has applied by now; and the bytes in chunks that changed after `since`.
    pub(crate) async fn snapshot(
        &self,
        at_least: LogIndex,
        since: LogIndex,
        fresh: bool,
    ) -> Result<(ShardSnapshot, u64), SourceError> {
        let (at_least, since) = (at_least.0, since.0);
        let request = v1::SnapshotRequest { to: self.address(), at_least, since, fresh };
        let request = within(SNAPSHOT_DEADLINE, request);
        // The deadline is one for the call to begin: how long a body takes depends on its length.
        let messages = self.client.clone().snapshot(request).await?.into_inner();
        receive_snapshot(messages, FETCH_STALL).await
    }

    /// Waits until the source's checkpoint covers the entry `applied`.
    pub(crate) async fn cover(&self, applied: LogIndex) -> Result<(), SourceError> {
        let (at_least, since) = (applied.0, applied.0);
        let request = v1::SnapshotRequest { to: self.address(), at_least, since, fresh: false };
        let request = within(SNAPSHOT_DEADLINE, request);
        // It begins once that is so; what follows is not of interest.
        let mut messages = self.client.clone().snapshot(request).await?.into_inner();
        let first = messages.message().await?;
        first.map(drop).ok_or_else(|| Refusal::Malformed("a snapshot without a head").into())
    }

    /// A page of the manifest.
    pub(crate) async fn manifest(
        &self,
        since: LogIndex,
        after: Option<ChunkKey>,
    ) -> Result<ManifestPage, SourceError> {
        let request = v1::ManifestRequest {
            to: self.address(),
            since: since.0,
            after: after.map(key_to_wire),
            chunks_max: u32::try_from(MANIFEST_CHUNKS_MAX).unwrap_or(u32::MAX),
        };
        let request = within(CALL_DEADLINE, request);
        let reply = self.client.clone().manifest(request).await?.into_inner();
        let next = reply.next.map(key_from_wire);
        if next.is_some() && next <= after {
            return Err(Refusal::Malformed("a page of the manifest leads back").into());
        }
        let present = reply.present.into_iter().map(run_from_wire).collect::<Result<_, _>>()?;
        let chunks = reply.chunks.into_iter().map(stamp_from_wire).collect();
        Ok(ManifestPage { applied: LogIndex::ZERO, chunks, present, next })
    }

    /// Starts to fetch chunks.
    pub(crate) async fn fetch(&self, chunks: &[ChunkKey]) -> Result<Fetching, SourceError> {
        let chunks = chunks.iter().copied().map(key_to_wire).collect();
        let request = v1::FetchRequest { to: self.address(), chunks };
        let mut client = self.client.clone();
        let call = tokio::time::timeout(FETCH_STALL, client.fetch(request));
        let stream = call.await.map_err(|_| stalled())??.into_inner();
        Ok(Fetching { stream })
    }

    /// Fetches one chunk; `None` if the source has none there.
    pub(crate) async fn fetch_one(&self, key: ChunkKey) -> Result<Option<ChunkImage>, SourceError> {
        let mut fetching = self.fetch(&[key]).await?;
        while let Some(images) = fetching.next().await? {
            let image = images.into_iter().find(|image| (image.volume, image.chunk) == key);
            if image.is_some() {
                return Ok(image);
            }
        }
        Ok(None)
    }

    /// Digests of the ranges behind the one that `after` is in. None: there are no more.
    pub(crate) async fn digests(
        &self,
        after: Option<ChunkKey>,
    ) -> Result<Vec<RangeDigest>, SourceError> {
        let request = v1::DigestsRequest {
            to: self.address(),
            after: after.map(key_to_wire),
            ranges_max: u32::try_from(DIGEST_RANGES_MAX).unwrap_or(u32::MAX),
        };
        let request = within(CALL_DEADLINE, request);
        let reply = self.client.clone().digests(request).await?.into_inner();
        Ok(reply.ranges.into_iter().map(range_from_wire).collect())
    }

    /// Digests of chunks.
    pub(crate) async fn chunk_digests(
        &self,
        volume: VolumeId,
        range: Range<ChunkIndex>,
    ) -> Result<DigestsAt, SourceError> {
        let (start, end) = (range.start.0, range.end.0);
        let volume = volume.0;
        let request = v1::ChunkDigestsRequest { to: self.address(), volume, start, end };
        let request = within(CALL_DEADLINE, request);
        let reply = self.client.clone().chunk_digests(request).await?.into_inner();
        Ok(DigestsAt {
            before: LogIndex(reply.applied_before),
            after: LogIndex(reply.applied_after),
            chunks: reply.chunks.into_iter().map(digest_from_wire).collect(),
        })
    }

    /// The content of blocks, each given by its place and its checksum; `None` where the source has
    /// no such content.
    pub(crate) async fn blocks(
        &self,
        wanted: &[(VolumeId, u64, u32)],
    ) -> Result<Vec<Option<Bytes>>, SourceError> {
        let mut found = Vec::with_capacity(wanted.len());
        for wanted in wanted.chunks(BLOCKS_MAX) {
            let blocks = wanted.iter().map(|&(volume, block, crc)| v1::BlockWanted {
                volume: volume.0,
                block,
                crc,
            });
            let request = v1::BlocksRequest { to: self.address(), blocks: blocks.collect() };
            let request = within(CALL_DEADLINE, request);
            let reply = self.client.clone().blocks(request).await?.into_inner();
            if reply.blocks.len() != wanted.len() {
                return Err(Refusal::Malformed("not one answer for each block").into());
            }
            let blocks = reply.blocks.into_iter().map(|block| block.data);
            found.extend(
                blocks.zip(wanted).map(|(data, (_, _, crc))| is_block(&data, *crc).then_some(data)),
            );
        }
        Ok(found)
    }
}

fn stalled() -> Status {
    Status::deadline_exceeded("the source sends nothing")
}

/// Takes a snapshot in, and the bytes in chunks that changed, unless `stall` passes in silence.
pub(super) async fn receive_snapshot(
    mut messages: impl Stream<Item = Result<v1::SnapshotReply, Status>> + Unpin,
    stall: Duration,
) -> Result<(ShardSnapshot, u64), SourceError> {
    let mut next = async || {
        let message = tokio::time::timeout(stall, messages.next()).await;
        message.map_err(|_| stalled())?.transpose()
    };
    let first = next().await?.ok_or(Refusal::Malformed("a snapshot without a head"))?;
    let mut arriving = ArrivingSnapshot::begin(first)?;
    while let Some(message) = next().await? {
        arriving.take(message)?;
    }
    Ok(arriving.finish()?)
}

/// Chunks under way.
#[derive(Debug)]
pub(crate) struct Fetching {
    stream: Streaming<v1::FetchReply>,
}

impl Fetching {
    /// The next few chunks, 1 MiB at most, checked against their checksums; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<ChunkImage>>, SourceError> {
        let message = tokio::time::timeout(FETCH_STALL, self.stream.message());
        let Some(reply) = message.await.map_err(|_| stalled())?? else {
            return Ok(None);
        };
        let images = reply.chunks.into_iter().map(image_from_wire).collect::<Result<_, _>>()?;
        Ok(Some(images))
    }
}
