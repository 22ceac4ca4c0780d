//! Making damaged data good from a peer's copy.
//!
//! A read that meets a damaged block is given the block's content by whichever member has it with
//! the right checksum; the chunk at home is replaced in the background. So is what checkpoints, the
//! scrub and peers come upon.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use metrics::{Counter, counter};
use nbd_store::limits::BLOCKS_PER_CHUNK;
use nbd_store::{ChunkImage, ChunkIndex, DamagedChunk, ReplicaInfo, ShardReader, VolumeId};
use nbd_topology::ShardId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::checkpoint_thread::CheckpointHandle;
use crate::hosted::{BlockRepair, Fetched};
use crate::resync::ChunkPeers;
use crate::resync::source::{ChunkSource, SourceError};

/// | name | meaning |
/// | --- | --- |
/// | `integrity_repaired_blocks_total` | damaged blocks made good from a peer, read or at home |
/// | `integrity_unrepairable_total` | damaged blocks or chunks of which no peer has a good copy |
#[derive(Clone)]
struct RepairMetrics {
    repaired: Counter,
    unrepairable: Counter,
}

impl std::fmt::Debug for RepairMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RepairMetrics").finish_non_exhaustive()
    }
}

/// What a repairer is made of.
#[derive(Debug, Clone)]
pub(crate) struct RepairParts {
    /// Of each shard hosted here.
    pub(crate) readers: HashMap<ShardId, ShardReader>,
    pub(crate) peers: Arc<ChunkPeers>,
    pub(crate) checkpoints: CheckpointHandle,
    /// Leads to [`Repairer::run`].
    pub(crate) damaged: mpsc::Sender<DamagedChunk>,
}

/// Repairs blocks and chunks.
#[derive(Debug, Clone)]
pub(crate) struct Repairer {
    parts: Arc<RepairParts>,
    metrics: RepairMetrics,
}

impl Repairer {
    pub(crate) fn new(parts: RepairParts) -> Self {
        let metrics = RepairMetrics {
            repaired: counter!("integrity_repaired_blocks_total"),
            unrepairable: counter!("integrity_unrepairable_total"),
        };
        Self { parts: Arc::new(parts), metrics }
    }

    /// The content of a block that is damaged here, from a peer that has it with this checksum.
    pub(crate) async fn fetch(
        &self,
        shard: ShardId,
        volume: VolumeId,
        block: u64,
        crc: u32,
    ) -> Option<Bytes> {
        for (peer, source) in self.sources(shard) {
            match source.blocks(&[(volume, block, crc)]).await {
                Ok(found) => {
                    if let Some(bytes) = found.into_iter().next().flatten() {
                        let node = &peer.node;
                        warn!(%shard, %volume, block, from = %node, "repaired a damaged block");
                        self.metrics.repaired.increment(1);
                        self.schedule(shard, volume, block);
                        return Some(bytes);
                    }
                }
                Err(error) => {
                    let error = nbd_rpc::reason(&error);
                    debug!(%shard, from = %peer.node, %error, "no block from this peer");
                }
            }
        }
        error!(%shard, %volume, block, "a block is damaged, and no peer has a good copy");
        self.metrics.unrepairable.increment(1);
        None
    }

    /// Has the chunk of a block looked at in the background.
    fn schedule(&self, shard: ShardId, volume: VolumeId, block: u64) {
        let Some(reader) = self.parts.readers.get(&shard).cloned() else { return };
        let (damaged, chunk) = (self.parts.damaged.clone(), block / BLOCKS_PER_CHUNK as u64);
        tokio::task::spawn_blocking(move || {
            let range = ChunkIndex(chunk)..ChunkIndex(chunk + 1);
            if let Ok(digests) = reader.chunk_digests(volume, range)
                && let Some(found) = digests.first()
            {
                let (chunk, last_index) = (found.chunk, found.last_index);
                // When too many wait, the scrub finds it.
                let _ = damaged.try_send(DamagedChunk { volume, chunk, last_index });
            }
        });
    }

    /// Repairs what comes, until the node stops.
    pub(crate) async fn run(
        self,
        mut damaged: mpsc::Receiver<DamagedChunk>,
        stop: CancellationToken,
    ) {
        loop {
            let mut batch = Vec::new();
            tokio::select! {
                () = stop.cancelled() => return,
                count = damaged.recv_many(&mut batch, crate::checkpoint_thread::DAMAGED_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
            }
            // Every read of a damaged block reports it.
            let mut seen = HashSet::new();
            for chunk in batch {
                if seen.insert((chunk.volume, chunk.chunk, chunk.last_index)) {
                    tokio::select! {
                        () = stop.cancelled() => return,
                        _ = self.repair(chunk) => {}
                    }
                }
            }
        }
    }

    /// Replaces a damaged chunk at home by a peer's copy of the same version. Returns whether the
    /// chunk is whole now, as far as it is still of that version.
    pub(crate) async fn repair(&self, damaged: DamagedChunk) -> bool {
        let DamagedChunk { volume, chunk, last_index } = damaged;
        let shard = volume.shard();
        if self.is_whole(damaged).await {
            return true;
        }
        for (peer, source) in self.sources(shard) {
            let image = match source.fetch_one((volume, chunk)).await {
                Ok(Some(image)) if image.last_index == last_index => image,
                Ok(_) => continue,
                Err(error) => {
                    let error = nbd_rpc::reason(&error);
                    debug!(%shard, from = %peer.node, %error, "no chunk from this peer");
                    continue;
                }
            };
            if self.adopt(shard, image).await {
                let from = &peer.node;
                info!(%shard, %volume, %chunk, %from, "replaced a damaged chunk");
                return true;
            }
            // Changed meanwhile, which wrote it anew as far as that could be done.
            return self.is_whole(damaged).await;
        }
        error!(%shard, %volume, %chunk, "a chunk is damaged, and no peer has it whole");
        self.metrics.unrepairable.increment(1);
        false
    }

    /// Puts a peer's copy in the place of this node's copy of the same version.
    pub(crate) async fn adopt(&self, shard: ShardId, image: ChunkImage) -> bool {
        let blocks = u64::from(image.present.count_ones());
        match self.parts.checkpoints.replace(shard, image).await {
            Ok(replaced) => {
                if replaced {
                    self.metrics.repaired.increment(blocks);
                }
                replaced
            }
            Err(error) => {
                warn!(%shard, error = nbd_rpc::reason(&error), "cannot replace a chunk");
                false
            }
        }
    }

    async fn is_whole(&self, damaged: DamagedChunk) -> bool {
        let DamagedChunk { volume, chunk, .. } = damaged;
        let Some(reader) = self.parts.readers.get(&volume.shard()).cloned() else { return false };
        let read = tokio::task::spawn_blocking(move || reader.read_chunk(volume, chunk)).await;
        matches!(read, Ok(Ok(_)))
    }

    /// The other members of the shard, voters first.
    pub(crate) fn sources(&self, shard: ShardId) -> Vec<(ReplicaInfo, ChunkSource)> {
        let reader = self.parts.readers.get(&shard);
        let Some(me) = reader.and_then(ShardReader::formation) else { return Vec::new() };
        let mut members: Vec<_> = me
            .replicas
            .into_iter()
            .filter(|info| info.id != me.replica && me.membership.contains(info.id))
            .collect();
        members.sort_by_key(|info| !me.membership.is_voter(info.id));
        let source = |info: ReplicaInfo| -> Result<_, SourceError> {
            let grpc = &info.addresses.grpc;
            let source = self.parts.peers.source(shard, me.replica, info.id, grpc)?;
            Ok((info, source))
        };
        members.into_iter().filter_map(|info| source(info).ok()).collect()
    }
}
impl BlockRepair for Repairer {
    fn fetch(&self, volume: VolumeId, block: u64, crc: u32) -> Fetched {
        let repairer = self.clone();
        Box::pin(async move { repairer.fetch(volume.shard(), volume, block, crc).await })
    }
}
