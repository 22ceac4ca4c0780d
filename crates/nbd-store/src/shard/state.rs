//! What the lock of a shard guards, and how a command changes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbd_log::log::LogPosition;
use nbd_topology::{LogIndex, ReplicaId, ShardId, Term};

use super::Applied;
use super::catalogue::{VolumeChanges, Volumes};
use super::pins::Pin;
use super::session::{Seen, Session};
use super::sessions::{SessionChanges, Sessions};
use crate::chunk::database::{Contents, MetadataError};
use crate::chunk::record::ShardRecord;
use crate::command::{
    CommandHeader, CommandKind, CreateVolumeBody, DecodedCommand, UpdateVolumeBody, decode_all,
};
use crate::fault::Faults;
use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::limits::{
    LABELS_MAX, SESSIONS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_SIZE_MULTIPLE, VOLUMES_MAX,
};
use crate::members::{Members, decode_node, decode_registration};
use crate::outcome::{Labels, Outcome, Rejection, VolumeInfo, shared_labels};
use crate::overlay::{Overlay, ZeroKind};

/// Everything that applying changes, except what lies in volumes.
#[derive(Debug)]
pub(crate) struct Metadata {
    /// The last entry applied.
    pub(crate) applied: LogIndex,
    /// Its term.
    pub(crate) applied_term: Term,
    /// The replicated counter.
    pub(crate) counter: i64,
    /// Number of volumes ever created.
    pub(crate) volumes_created: u32,
    /// The volumes.
    pub(crate) volumes: Volumes,
    /// Open sessions.
    pub(crate) sessions: Sessions,
    /// The shard's replicas. Shared with the frozen copy until the next change.
    pub(crate) members: Arc<Members>,
}

/// The metadata as it was at a freeze, of volumes and sessions only what changed since the last
/// checkpoint.
#[derive(Debug)]
pub(crate) struct FrozenMetadata {
    pub(crate) applied: LogIndex,
    pub(crate) applied_term: Term,
    pub(crate) counter: i64,
    pub(crate) volumes_created: u32,
    pub(crate) volumes: VolumeChanges,
    pub(crate) sessions: SessionChanges,
    pub(crate) members: Arc<Members>,
}

/// The state as it was at a freeze: what the checkpointer writes home.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) overlay: Overlay,
    pub(crate) metadata: FrozenMetadata,
}

/// What the lock of a shard guards.
#[derive(Debug)]
pub(crate) struct ShardState {
    pub(crate) shard: ShardId,
    /// This replica's id, once the shard was formed.
    pub(crate) replica: Option<ReplicaId>,
    pub(crate) metadata: Metadata,
    /// Newest layer.
    pub(crate) active: Overlay,
    /// Next layer, from a freeze until its checkpoint is durable.
    pub(crate) frozen: Option<Arc<Frozen>>,
    /// Handed out to readers.
    pub(crate) pin: Arc<Pin>,
    pub(crate) faults: Faults,
}

impl FrozenMetadata {
    /// Adds what an earlier freeze has that was not written home.
    pub(crate) fn follow(&mut self, older: Self) {
        for (id, volume) in older.volumes {
            self.volumes.entry(id).or_insert(volume);
        }
        for (id, session) in older.sessions {
            self.sessions.entry(id).or_insert(session);
        }
    }
}

impl ShardState {
    /// Applies an entry; see [`super::ShardWriter::apply`].
    pub(super) fn apply(
        &mut self,
        index: LogIndex,
        term: Term,
        entry: Applied<'_>,
        position: LogPosition,
    ) -> Vec<Outcome> {
        assert_eq!(index, self.metadata.applied.next(), "entries are applied in order");
        let mut outcomes = Vec::new();
        match entry {
            Applied::Command(data) => {
                outcomes.extend(decode_all(data).map(|command| match command {
                    Ok(command) => self.execute(index, &command, data, position),
                    Err(_) => Outcome::Rejected(Rejection::BadCommand),
                }));
            }
            Applied::Membership(change) => Arc::make_mut(&mut self.metadata.members).change(change),
            Applied::Empty => {}
        }
        self.metadata.applied = index;
        self.metadata.applied_term = term;
        outcomes
    }

    fn execute(
        &mut self,
        index: LogIndex,
        command: &DecodedCommand,
        data: &[u8],
        position: LogPosition,
    ) -> Outcome {
        let header = &command.header;
        match header.kind {
            CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes => {
                self.mutate_once(index, command, data, position)
            }
            CommandKind::OpenSession => self.metadata.open_session(header),
            CommandKind::CloseSession => self.metadata.close_session(header),
            CommandKind::CreateVolume | CommandKind::NewVolume => {
                let body = CreateVolumeBody::decode(&data[command.payload.clone()]);
                body.map_or(Outcome::Rejected(Rejection::BadCommand), |body| {
                    self.metadata.create_volume(self.shard, header.length, body)
                })
            }
            CommandKind::AddCounter => {
                let addend = header.length.cast_signed();
                self.metadata.counter = self.metadata.counter.wrapping_add(addend);
                Outcome::Counter(self.metadata.counter)
            }
            CommandKind::EndSessions => self.metadata.end_sessions(owner_of(header)),
            CommandKind::UpdateVolume => {
                let body = UpdateVolumeBody::decode(&data[command.payload.clone()]);
                body.map_or(Outcome::Rejected(Rejection::BadCommand), |body| {
                    self.metadata.update_volume(header, body)
                })
            }
            CommandKind::ResizeVolume => self.resize_volume(index, header),
            CommandKind::DeleteVolume => self.delete_volume(index, header),
            CommandKind::CordonNode => {
                let node = decode_node(&data[command.payload.clone()]);
                done_or_rejected(node.ok_or(Rejection::BadCommand).and_then(|node| {
                    Arc::make_mut(&mut self.metadata.members).cordon(node, header.length != 0)
                }))
            }
            CommandKind::SetReplacement => {
                let old = ReplicaId::new(header.offset).ok_or(Rejection::BadCommand);
                done_or_rejected(old.and_then(|old| {
                    let members = Arc::make_mut(&mut self.metadata.members);
                    members.replace(old, ReplicaId::new(header.length))
                }))
            }
            CommandKind::RegisterReplica => {
                let id = ReplicaId::new(header.length);
                self.metadata.register_replica(id, &data[command.payload.clone()])
            }
        }
    }

    /// Applies a mutation unless its session has applied it before.
    fn mutate_once(
        &mut self,
        index: LogIndex,
        command: &DecodedCommand,
        data: &[u8],
        position: LogPosition,
    ) -> Outcome {
        let header = &command.header;
        let Some(session) = self.metadata.sessions.get_mut(header.session) else {
            return Outcome::Rejected(Rejection::UnknownSession);
        };
        if header.epoch < session.epoch && !self.faults.takes_old_epochs() {
            return Outcome::Rejected(Rejection::StaleEpoch);
        }
        if header.epoch > session.epoch {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        let seen = session.look(header.seq);
        let is_new = seen == Seen::New;
        match seen {
            Seen::Before(Outcome::Done) if self.faults.applies_again() => {}
            Seen::Before(outcome) => return outcome,
            Seen::Behind => return Outcome::Rejected(Rejection::BadCommand),
            Seen::New => {}
        }
        let volume = self.metadata.volumes.get(header.volume);
        let verdict = match volume {
            _ if session.volume != header.volume => Err(Rejection::BadCommand),
            None => Err(Rejection::UnknownVolume),
            Some(volume) if header.offset + header.length > volume.size => Err(Rejection::PastEnd),
            Some(volume) => Ok(volume.size),
        };
        if is_new {
            session.record(header.seq, verdict.err());
        }
        match verdict {
            Ok(size) => {
                mutate(&mut self.active, index, command, data, position, size);
                Outcome::Done
            }
            Err(rejection) => Outcome::Rejected(rejection),
        }
    }

    fn resize_volume(&mut self, index: LogIndex, header: &CommandHeader) -> Outcome {
        let (id, size) = (header.volume, header.length);
        let Some(old) = self.metadata.volumes.get(id).map(|volume| volume.size) else {
            return Outcome::Rejected(Rejection::UnknownVolume);
        };
        if !is_volume_size(size) {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if header.seq != 0 && header.seq != old && size != old {
            return Outcome::Rejected(Rejection::Changed);
        }
        if size < old && !header.force {
            return Outcome::Rejected(Rejection::Shrinks);
        }
        if size < old && !self.faults.keeps_what_is_cut_off() {
            // So that it reads as zero should the volume grow again.
            self.active.write_zeroes(id, index, (size, old), old, ZeroKind::Hole);
        }
        let change = |volume: &mut VolumeInfo| {
            if size != old {
                (volume.size, volume.modified_ms) = (size, header.offset);
            }
        };
        self.metadata
            .volumes
            .change(id, change)
            .map_or(Outcome::Rejected(Rejection::UnknownVolume), Outcome::VolumeChanged)
    }

    /// What the volume holds is given back by the next checkpoint: to the overlay it is one run of
    /// holes, whatever its size.
    fn delete_volume(&mut self, index: LogIndex, header: &CommandHeader) -> Outcome {
        let id = header.volume;
        if self.metadata.volumes.get(id).is_none() {
            return Outcome::Rejected(Rejection::UnknownVolume);
        }
        let is_attached = self.metadata.sessions.of_volume(id, SessionId::NONE).next().is_some();
        if is_attached && !header.force {
            return Outcome::Rejected(Rejection::Attached);
        }
        let ended = self.metadata.sessions.remove_of(id);
        self.metadata.volumes.remove(id);
        if !self.faults.keeps_deleted_chunks() {
            self.active.delete(id, index);
        }
        let sessions_ended = u32::try_from(ended).expect("sessions are bounded");
        Outcome::VolumeDeleted { sessions_ended }
    }
}

fn done_or_rejected(result: Result<(), Rejection>) -> Outcome {
    result.map_or_else(Outcome::Rejected, |()| Outcome::Done)
}

/// Whether a volume may have this size.
pub(crate) fn is_volume_size(size: u64) -> bool {
    (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size)
        && size.is_multiple_of(VOLUME_SIZE_MULTIPLE)
}

/// The owner that a command names.
const fn owner_of(header: &CommandHeader) -> Owner {
    Owner { node: header.offset, incarnation: header.length }
}

/// Applies a mutation that is known to be good.
fn mutate(
    overlay: &mut Overlay,
    index: LogIndex,
    command: &DecodedCommand,
    data: &[u8],
    position: LogPosition,
    size: u64,
) {
    let header = &command.header;
    let (volume, range) = (header.volume, (header.offset, header.offset + header.length));
    match header.kind {
        CommandKind::Write => {
            let payload = position.plus(command.payload.start as u64);
            let checksums = &data[command.checksums.clone()];
            overlay.write(volume, index, (header.offset, header.length), payload, checksums);
        }
        CommandKind::Trim => overlay.trim(volume, index, range, size),
        CommandKind::WriteZeroes => {
            let kind = if header.no_hole { ZeroKind::Zero } else { ZeroKind::Hole };
            overlay.write_zeroes(volume, index, range, size, kind);
        }
        kind => unreachable!("{kind:?} does not change a volume's content"),
    }
}

impl Metadata {
    /// What a checkpoint's record says, volumes and sessions still to be added.
    pub(crate) fn of_record(record: &ShardRecord) -> Self {
        Self {
            applied: record.applied,
            applied_term: record.applied_term,
            counter: record.counter,
            volumes_created: record.volumes_created,
            volumes: Volumes::default(),
            sessions: Sessions::default(),
            members: Arc::default(),
        }
    }

    /// What a checkpoint is to write home.
    pub(crate) fn freeze(&mut self) -> FrozenMetadata {
        FrozenMetadata {
            applied: self.applied,
            applied_term: self.applied_term,
            counter: self.counter,
            volumes_created: self.volumes_created,
            volumes: self.volumes.take_changes(),
            sessions: self.sessions.take_changes(),
            members: Arc::clone(&self.members),
        }
    }

    /// Sorts the database's contents by shard.
    pub(crate) fn sort(contents: Contents) -> Result<BTreeMap<ShardId, Self>, MetadataError> {
        let Contents { shards, members, volumes, sessions } = contents;
        let mut all: BTreeMap<ShardId, Self> =
            shards.iter().map(|(id, record)| (*id, Self::of_record(record))).collect();
        let stray = |table| move || MetadataError::Damaged { table };
        for (shard, members) in members {
            let metadata = all.get_mut(&shard).ok_or_else(stray("members"))?;
            metadata.members = Arc::new(members);
        }
        for volume in volumes {
            let metadata = all.get_mut(&volume.id.shard()).ok_or_else(stray("volumes"))?;
            if !metadata.volumes.load(volume) {
                return Err(MetadataError::Damaged { table: "volumes" });
            }
        }
        for (shard, id, session) in sessions {
            let metadata = all.get_mut(&shard).ok_or_else(stray("sessions"))?;
            if !metadata.sessions.load(id, session) {
                return Err(MetadataError::Damaged { table: "sessions" });
            }
        }
        Ok(all)
    }

    fn open_session(&mut self, header: &CommandHeader) -> Outcome {
        let owner = owner_of(header);
        if header.session == SessionId::NONE || header.epoch < Epoch::FIRST {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if let Some(session) = self.sessions.get_mut(header.session) {
            // The same epoch asked for twice is a command sent again, but not from someone else.
            let is_taken = header.epoch == session.epoch && owner != session.owner;
            if header.epoch < session.epoch || is_taken {
                return Outcome::Rejected(Rejection::StaleEpoch);
            }
            if header.volume != session.volume {
                return Outcome::Rejected(Rejection::BadCommand);
            }
            (session.epoch, session.owner) = (header.epoch, owner);
            return Outcome::SessionOpened;
        }
        if header.epoch > Epoch::FIRST {
            // It was ended. Opened anew, it would apply what it had applied before.
            return Outcome::Rejected(Rejection::UnknownSession);
        }
        if self.volumes.get(header.volume).is_none() {
            return Outcome::Rejected(Rejection::UnknownVolume);
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Outcome::Rejected(Rejection::LimitReached);
        }
        let session = Session::new(header.epoch, header.volume, owner);
        self.sessions.insert(header.session, session);
        Outcome::SessionOpened
    }

    fn close_session(&mut self, header: &CommandHeader) -> Outcome {
        match self.sessions.get(header.session) {
            None => Outcome::Rejected(Rejection::UnknownSession),
            Some(session) if header.epoch < session.epoch => {
                Outcome::Rejected(Rejection::StaleEpoch)
            }
            Some(_) => {
                self.sessions.remove(header.session);
                Outcome::SessionClosed
            }
        }
    }

    fn end_sessions(&mut self, owner: Owner) -> Outcome {
        // Not those of later ones: the command may have been on its way for long.
        let is_older = |of: Owner| of.node == owner.node && of.incarnation < owner.incarnation;
        let ended = self.sessions.remove_if(|session| is_older(session.owner));
        Outcome::SessionsEnded(u32::try_from(ended).expect("sessions are bounded"))
    }

    fn register_replica(&mut self, id: Option<ReplicaId>, body: &[u8]) -> Outcome {
        let (Some(id), Some(new)) = (id, decode_registration(body)) else {
            return Outcome::Rejected(Rejection::BadCommand);
        };
        match Arc::make_mut(&mut self.members).register(id, new) {
            Ok(info) => Outcome::ReplicaRegistered(info),
            Err(reason) => Outcome::Rejected(reason),
        }
    }

    fn create_volume(&mut self, shard: ShardId, size: u64, body: CreateVolumeBody<'_>) -> Outcome {
        let CreateVolumeBody { name, description, labels, now_ms, key, fingerprint } = body;
        if let Some(volume) = self.volumes.by_name(name) {
            return if key == 0 || volume.key != key {
                Outcome::VolumeExists(volume.clone())
            } else if volume.fingerprint == fingerprint {
                Outcome::VolumeRepeated(volume.clone())
            } else {
                Outcome::Rejected(Rejection::KeyReused)
            };
        }
        if key != 0 && self.volumes.has_key(key) {
            return Outcome::Rejected(Rejection::KeyReused);
        }
        if !is_volume_size(size) {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if self.volumes.len() >= VOLUMES_MAX || self.volumes_created == u32::MAX {
            return Outcome::Rejected(Rejection::LimitReached);
        }
        self.volumes_created += 1;
        let info = VolumeInfo {
            id: VolumeId::new(shard, self.volumes_created),
            name: name.into(),
            size,
            description: description.into(),
            labels: shared_labels(labels),
            created_ms: now_ms,
            modified_ms: now_ms,
            key,
            fingerprint,
        };
        self.volumes.insert(info.clone());
        Outcome::VolumeCreated(info)
    }

    fn update_volume(&mut self, header: &CommandHeader, body: UpdateVolumeBody<'_>) -> Outcome {
        let UpdateVolumeBody { description, set_labels, remove_labels } = body;
        let Some(old) = self.volumes.get(header.volume) else {
            return Outcome::Rejected(Rejection::UnknownVolume);
        };
        let mut labels = Labels::clone(&old.labels);
        remove_labels.iter().for_each(|name| _ = labels.remove(name));
        labels.extend(set_labels);
        if labels.len() > LABELS_MAX {
            return Outcome::Rejected(Rejection::LimitReached);
        }
        let change = |volume: &mut VolumeInfo| {
            if let Some(description) = description {
                volume.description = description.into();
            }
            volume.labels = shared_labels(labels);
            volume.modified_ms = header.offset;
        };
        self.volumes
            .change(header.volume, change)
            .map_or(Outcome::Rejected(Rejection::UnknownVolume), Outcome::VolumeChanged)
    }
}
