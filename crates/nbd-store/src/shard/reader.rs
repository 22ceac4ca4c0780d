//! Looking things up in a shard.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use nbd_topology::{LogIndex, Membership, NodeName, ReplicaId, ShardId};

use super::Shard;
use super::plan::{ReadError, ReadPlan, Source};
use super::state::ShardState;
use super::status::{self, Extent};
use crate::chunk::meta::{ChunkMeta, HomeBlock};
use crate::ids::{ChunkIndex, SessionId, VolumeId};
use crate::limits::{
    BLOCK_BYTES, BLOCKS_PER_CHUNK, CHUNK_BYTES, LOOKED_AT_PER_LOCK, READ_BYTES_MAX, to_usize,
};
use crate::members::{Formation, ReplicaInfo};
use crate::outcome::{SessionInfo, VolumeInfo};
use crate::overlay::{BlockBase, Layer, VolumeOverlay, ZeroKind};
use crate::space::{Admission, AdmissionKind};

/// Chunks whose homes are looked up one by one, through the cache. Of more, and there is no bound
/// for zeroes, only those that exist are walked through.
const LOOKED_UP_SINGLY_MAX: u64 = 64;

/// Reads a shard as it is now. Clones are cheap and may be used from any thread.
#[derive(Debug, Clone)]
pub struct ShardReader {
    pub(super) shard: Arc<Shard>,
}

/// What the overlays know of one volume.
#[derive(Clone, Copy)]
pub(super) struct Overlays<'a> {
    pub(super) active: Option<&'a VolumeOverlay>,
    pub(super) frozen: Option<&'a VolumeOverlay>,
}

/// What the overlays know of one chunk, newest first.
#[derive(Clone, Copy)]
pub(super) struct Layers<'a> {
    active: Option<Layer<'a>>,
    frozen: Option<Layer<'a>>,
}

impl<'a> Overlays<'a> {
    pub(super) fn of(state: &'a ShardState, volume: VolumeId) -> Self {
        let frozen = state.frozen.as_ref().and_then(|frozen| frozen.overlay.volume(volume));
        Self { active: state.active.volume(volume), frozen }
    }

    pub(super) fn chunk(self, chunk: ChunkIndex) -> Layers<'a> {
        Layers {
            active: self.active.and_then(|volume| volume.layer(chunk)),
            frozen: self.frozen.and_then(|volume| volume.layer(chunk)),
        }
    }
}

impl Layers<'_> {
    /// What `block` is under all fragments, and whether it has any.
    pub(super) fn base(self, block: usize) -> (BlockBase, bool) {
        let mut split = false;
        for layer in [self.active, self.frozen].into_iter().flatten() {
            split |= !layer.fragments(block).is_empty();
            match layer.base(block) {
                BlockBase::Below => {}
                known => return (known, split),
            }
        }
        (BlockBase::Below, split)
    }

    /// Whether neither overlay knows the chunk.
    pub(super) const fn is_empty(self) -> bool {
        self.active.is_none() && self.frozen.is_none()
    }

    /// Whether the frozen overlay decides alone, as far as the base does not.
    pub(super) const fn is_frozen_only(self) -> bool {
        self.active.is_none() && self.frozen.is_some()
    }

    /// Where the content of `block` lies. `home` is asked for the chunk's home if that matters.
    pub(super) fn source(
        self,
        block: usize,
        home: &mut impl FnMut() -> Option<Option<ChunkMeta>>,
    ) -> Source {
        let (base, split) = self.base(block);
        let under = match base {
            BlockBase::Below => home().map_or(Source::Unresolved, |meta| Source::home(meta, block)),
            BlockBase::Cleared(ZeroKind::Hole) => Source::Hole,
            BlockBase::Cleared(ZeroKind::Zero) => Source::Zero,
            BlockBase::Log(block) => Source::Log(block),
        };
        if !split {
            return under;
        }
        // A newer layer's base hides an older one's fragments.
        let older = match self.active.map(|layer| layer.base(block)) {
            None | Some(BlockBase::Below) => self.frozen,
            Some(_) => None,
        };
        let fragments = [older, self.active].into_iter().flatten();
        Source::split(under, fragments.flat_map(|layer| layer.fragments(block)).copied())
    }
}

impl Source {
    /// What `block` is according to its chunk's home.
    pub(super) fn home(meta: Option<ChunkMeta>, block: usize) -> Self {
        match meta.map_or(HomeBlock::Hole, |meta| meta.block(block)) {
            HomeBlock::Hole => Self::Hole,
            HomeBlock::Zero => Self::Zero,
            HomeBlock::Data { place, crc } => Self::Slot { place, crc },
        }
    }
}

impl ShardReader {
    pub(crate) const fn new(shard: Arc<Shard>) -> Self {
        Self { shard }
    }

    /// The shard that this reads.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        self.shard.id
    }

    /// The last entry applied.
    #[must_use]
    pub fn applied(&self) -> LogIndex {
        self.shard.state.read().metadata.applied
    }

    /// The replicated counter.
    #[must_use]
    pub fn counter(&self) -> i64 {
        self.shard.state.read().metadata.counter
    }

    /// The group's members as of the last entry applied.
    #[must_use]
    pub fn membership(&self) -> Membership {
        self.shard.state.read().metadata.members.membership.clone()
    }

    /// The replicas that are known, by id.
    #[must_use]
    pub fn replicas(&self) -> Vec<ReplicaInfo> {
        self.shard.state.read().metadata.members.replicas.values().cloned().collect()
    }

    /// What this replica knows of its group, once it was formed.
    #[must_use]
    pub fn formation(&self) -> Option<Formation> {
        let state = self.shard.state.read();
        state.replica.map(|replica| state.metadata.members.formation(replica))
    }

    /// The volume with this id.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<VolumeInfo> {
        self.shard.state.read().metadata.volumes.get(id).cloned()
    }

    /// The volume with this name.
    #[must_use]
    pub fn volume_by_name(&self, name: &str) -> Option<VolumeInfo> {
        self.shard.state.read().metadata.volumes.by_name(name).cloned()
    }

    /// All volumes, oldest first. One that is created or deleted meanwhile may be among them.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeInfo> {
        let (mut found, mut more) = self.volumes_after(VolumeId(0), LOOKED_AT_PER_LOCK);
        while more && let Some(last) = found.last().map(|volume| volume.id) {
            let (page, is_more) = self.volumes_after(last, LOOKED_AT_PER_LOCK);
            found.extend(page);
            more = is_more;
        }
        found
    }

    /// At most `limit` volumes with higher ids than `after`, oldest first, and whether there may be
    /// more.
    #[must_use]
    pub fn volumes_after(&self, after: VolumeId, limit: usize) -> (Vec<VolumeInfo>, bool) {
        let state = self.shard.state.read();
        let found: Vec<_> =
            state.metadata.volumes.created_after(after).take(limit).cloned().collect();
        let more = found.len() == limit;
        (found, more)
    }

    /// How many volumes there are.
    #[must_use]
    pub fn volume_count(&self) -> usize {
        self.shard.state.read().metadata.volumes.len()
    }

    /// Bytes that all volumes have together, whatever of them is allocated.
    #[must_use]
    pub fn provisioned_bytes(&self) -> u64 {
        self.shard.state.read().metadata.volumes.provisioned_bytes()
    }

    /// Bytes of the data file that `volume` takes up, a multiple of 64 KiB: what it had at the last
    /// checkpoint, and what was written since where it had nothing. What was cleared since, or
    /// belonged to a volume that was deleted since, still counts. **Blocks**: each chunk that was
    /// written since is looked up.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn allocated_bytes(&self, volume: VolumeId) -> Result<u64, ReadError> {
        let new = self.without_home(Some(volume))?;
        Ok((self.shard.base.chunk_count(volume) + new) * CHUNK_BYTES)
    }

    /// The same of all volumes of the shard.
    ///
    /// # Errors
    /// A failure of the database.
    pub fn allocated_total(&self) -> Result<u64, ReadError> {
        let new = self.without_home(None)?;
        Ok((self.shard.base.chunks_of(self.shard.id) + new) * CHUNK_BYTES)
    }

    /// Chunks that the overlays have something of, and that have no home; of one volume or of all.
    fn without_home(&self, only: Option<VolumeId>) -> Result<u64, ReadError> {
        let mut found: Vec<(VolumeId, ChunkIndex)> = Vec::new();
        let mut zeroed: Vec<(VolumeId, Range<u64>)> = Vec::new();
        {
            let state = self.shard.state.read();
            let frozen = state.frozen.as_ref().map(|frozen| &frozen.overlay);
            for overlay in [Some(&state.active), frozen].into_iter().flatten() {
                for (id, volume) in overlay.volumes() {
                    if only.is_some_and(|only| only != id) {
                        continue;
                    }
                    let ranges = volume.cleared().filter(|(_, range)| range.kind == ZeroKind::Zero);
                    zeroed.extend(ranges.map(|(start, range)| (id, start.0..range.end.0)));
                    let chunks = volume.chunks().filter(|(_, chunk)| !chunk.is_hole());
                    found.extend(chunks.map(|(at, _)| (id, at)));
                }
            }
        }
        // Sorted without the lock, which holds up applying.
        let mut changed: BTreeMap<VolumeId, BTreeSet<ChunkIndex>> = BTreeMap::new();
        for (id, at) in found {
            changed.entry(id).or_default().insert(at);
        }
        let mut homeless = 0;
        for (volume, mut chunks) in changed {
            for (_, range) in zeroed.iter().filter(|(of, _)| *of == volume) {
                chunks
                    .extract_if(ChunkIndex(range.start)..ChunkIndex(range.end), |_| true)
                    .for_each(drop);
            }
            let homes = self.shard.base.load(volume, chunks)?;
            homeless += homes.iter().filter(|(_, home)| home.is_none()).count() as u64;
        }
        for (volume, range) in zeroed {
            homeless += self.homeless(volume, std::iter::once(range))?;
        }
        Ok(homeless)
    }

    /// All open sessions.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let state = self.shard.state.read();
        state.metadata.sessions.iter().map(|(id, session)| session.info(id)).collect()
    }

    /// Those of `sessions` that are not open, or not any more.
    #[must_use]
    pub fn not_open(&self, sessions: impl IntoIterator<Item = SessionId>) -> BTreeSet<SessionId> {
        let state = self.shard.state.read();
        let is_open = |id: &SessionId| state.metadata.sessions.get(*id).is_some();
        sessions.into_iter().filter(|id| !is_open(id)).collect()
    }

    /// The session with this id.
    #[must_use]
    pub fn session(&self, id: SessionId) -> Option<SessionInfo> {
        self.shard.state.read().metadata.sessions.get(id).map(|session| session.info(id))
    }

    /// How many sessions are open.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.shard.state.read().metadata.sessions.len()
    }

    /// How many sessions `volume` has.
    #[must_use]
    pub fn sessions_of(&self, volume: VolumeId) -> usize {
        let state = self.shard.state.read();
        state.metadata.sessions.of_volume(volume, SessionId::NONE).count()
    }

    /// At most `limit` sessions with higher ids than `after` ([`SessionId::NONE`]: from the first),
    /// by id, of `volume` or of all, and whether there may be more.
    #[must_use]
    pub fn sessions_after(
        &self,
        volume: Option<VolumeId>,
        after: SessionId,
        limit: usize,
    ) -> (Vec<SessionInfo>, bool) {
        let state = self.shard.state.read();
        let sessions = &state.metadata.sessions;
        let found: Vec<SessionInfo> = match volume {
            None => {
                sessions.after(after).take(limit).map(|(id, session)| session.info(id)).collect()
            }
            Some(volume) => {
                let ids = sessions.of_volume(volume, after).take(limit);
                ids.filter_map(|id| Some(sessions.get(id)?.info(id))).collect()
            }
        };
        let more = found.len() == limit;
        (found, more)
    }

    /// Nodes that are cordoned, by name.
    #[must_use]
    pub fn cordoned(&self) -> BTreeSet<NodeName> {
        self.shard.state.read().metadata.members.cordoned.clone()
    }

    /// Whether `node` is cordoned.
    #[must_use]
    pub fn is_cordoned(&self, node: &NodeName) -> bool {
        self.shard.state.read().metadata.members.cordoned.contains(node)
    }

    /// By which replica a member is to be replaced.
    #[must_use]
    pub fn replacements(&self) -> BTreeMap<ReplicaId, ReplicaId> {
        self.shard.state.read().metadata.members.replacements.clone()
    }

    /// Finds out where `[offset, offset + len)` lies as of now. No I/O, about a microsecond for a
    /// block; the plan then fetches the bytes. Hold plans shortly: a checkpoint waits for those
    /// from before it.
    ///
    /// # Errors
    /// [`ReadError::UnknownVolume`], [`ReadError::PastEnd`] (also for an empty range) and
    /// [`ReadError::TooLong`].
    pub fn resolve(&self, volume: VolumeId, offset: u64, len: u64) -> Result<ReadPlan, ReadError> {
        let state = self.shard.state.read();
        check_range(&state, volume, offset, len)?;
        if len > READ_BYTES_MAX {
            return Err(ReadError::TooLong);
        }
        let overlays = Overlays::of(&state, volume);
        let (first, end) = (offset / BLOCK_BYTES, (offset + len).div_ceil(BLOCK_BYTES));
        let per_chunk = BLOCKS_PER_CHUNK as u64;
        let mut sources = Vec::with_capacity(to_usize(end - first));
        let mut block = first;
        while block < end {
            let chunk = ChunkIndex(block / per_chunk);
            let layers = overlays.chunk(chunk);
            let mut looked_up = None;
            let mut home =
                || *looked_up.get_or_insert_with(|| self.shard.base.cached(volume, chunk));
            let chunk_end = end.min((chunk.0 + 1) * per_chunk);
            for block in block..chunk_end {
                sources.push(layers.source(to_usize(block % per_chunk), &mut home));
            }
            block = chunk_end;
        }
        let pin = Arc::clone(&state.pin);
        drop(state);
        Ok(ReadPlan::new(Arc::clone(&self.shard), pin, volume, offset, len, sources))
    }

    /// Which parts of the range are holes or zeroes, exact to 4 KiB, neighbours merged. **Blocks**
    /// on the metadata database. At most `extents_max` extents; they may cover less than `len`, but
    /// cover something.
    ///
    /// # Errors
    /// As [`ShardReader::resolve`] (of any length), or a failure of the database.
    pub fn block_status(
        &self,
        volume: VolumeId,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        check_range(&self.shard.state.read(), volume, offset, len)?;
        status::block_status(&self.shard, volume, offset, len, extents_max)
    }

    /// Whether there is room for a mutation. Answers at once when there is plenty; otherwise
    /// **blocks** to look which chunks have a slot already. Keep the grant until the mutation was
    /// applied or given up.
    ///
    /// # Errors
    /// As [`ShardReader::resolve`], or a failure of the disk or the database.
    pub fn admit(
        &self,
        volume: VolumeId,
        offset: u64,
        len: u64,
        kind: AdmissionKind,
    ) -> Result<Admission, ReadError> {
        if let Some(grant) = self.shard.space.admit_fast(offset, len, kind) {
            return Ok(Admission::Granted(grant));
        }
        if self.shard.space.log_is_for_trims_only(kind) {
            return Ok(Admission::NoSpace);
        }
        check_range(&self.shard.state.read(), volume, offset, len)?;
        let chunks = kind.chunks(offset, len);
        let homeless = self.homeless(volume, chunks)?;
        let at_home = self.pending_at_home()?;
        self.shard.space.admit_precisely(homeless, at_home).map_err(ReadError::Io)
    }

    /// Chunks that the overlays of this shard count as pending although they have a slot:
    /// overwritten ones, most often.
    fn pending_at_home(&self) -> Result<u64, ReadError> {
        let mut changed: Vec<(VolumeId, Vec<ChunkIndex>)> = Vec::new();
        {
            let state = self.shard.state.read();
            let frozen = state.frozen.as_ref().map(|frozen| &frozen.overlay);
            for overlay in [Some(&state.active), frozen].into_iter().flatten() {
                changed.extend(overlay.changed_chunks().map(|(id, chunks)| (id, chunks.collect())));
            }
        }
        let mut at_home = 0;
        for (volume, chunks) in changed {
            let homes = self.shard.base.load(volume, chunks)?;
            at_home += homes.iter().filter(|(_, home)| home.is_some()).count() as u64;
        }
        Ok(at_home)
    }

    /// Chunks of these ranges that have no slot. What the overlays will need is counted as pending.
    fn homeless(
        &self,
        volume: VolumeId,
        ranges: impl Iterator<Item = Range<u64>>,
    ) -> Result<u64, ReadError> {
        let mut homeless = 0;
        for range in ranges {
            let len = range.end - range.start;
            let chunks = ChunkIndex(range.start)..ChunkIndex(range.end);
            let mut with_home = 0;
            if len <= LOOKED_UP_SINGLY_MAX {
                let homes = self.shard.base.load(volume, range.map(ChunkIndex))?;
                with_home = homes.iter().filter(|(_, meta)| meta.is_some()).count() as u64;
            } else {
                let reader = self.shard.base.database().read()?;
                for row in reader.range(volume, &chunks)? {
                    row?;
                    with_home += 1;
                }
            }
            homeless += len - with_home;
        }
        Ok(homeless)
    }
}

/// Refuses a range that is empty or not inside the volume.
fn check_range(
    state: &ShardState,
    volume: VolumeId,
    offset: u64,
    len: u64,
) -> Result<(), ReadError> {
    let info = state.metadata.volumes.get(volume).ok_or(ReadError::UnknownVolume)?;
    let end = offset.checked_add(len).filter(|end| len > 0 && *end <= info.size);
    end.map(|_| ()).ok_or(ReadError::PastEnd)
}
