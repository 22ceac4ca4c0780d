//! What the lock of a shard guards, and how a command changes it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use nbd_log::log::LogPosition;
use nbd_topology::{LogIndex, ReplicaId, ShardId, Term};

use super::Applied;
use super::pins::Pin;
use super::session::{Seen, Session};
use crate::chunk::database::{Contents, MetadataError};
use crate::chunk::record::ShardRecord;
use crate::command::{CommandHeader, CommandKind, CreateVolumeBody, DecodedCommand, decode_all};
use crate::fault::Faults;
use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::limits::{
    SESSIONS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_SIZE_MULTIPLE, VOLUMES_MAX,
};
use crate::members::{Members, decode_registration};
use crate::outcome::{Outcome, Rejection, VolumeInfo};
use crate::overlay::{Overlay, ZeroKind};

/// Volumes by id and by name. Both maps hold the same volumes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Volumes {
    by_id: BTreeMap<VolumeId, VolumeInfo>,
    by_name: HashMap<Arc<str>, VolumeId>,
}

/// Everything that applying changes, except what lies in volumes.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    /// The last entry applied.
    pub(crate) applied: LogIndex,
    /// Its term.
    pub(crate) applied_term: Term,
    /// The replicated counter.
    pub(crate) counter: i64,
    /// Number of volumes ever created.
    pub(crate) volumes_created: u32,
    /// Shared with the frozen copy until the next volume is created.
    pub(crate) volumes: Arc<Volumes>,
    /// Open sessions.
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    /// The shard's replicas. Shared with the frozen copy until the next change.
    pub(crate) members: Arc<Members>,
}

/// The state as it was at a freeze: what the checkpointer writes home.
#[derive(Debug)]
pub(crate) struct Frozen {
    pub(crate) overlay: Overlay,
    pub(crate) metadata: Metadata,
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

impl Volumes {
    /// The volume with this id.
    pub(crate) fn get(&self, id: VolumeId) -> Option<&VolumeInfo> {
        self.by_id.get(&id)
    }

    /// The volume with this name.
    pub(crate) fn by_name(&self, name: &str) -> Option<&VolumeInfo> {
        self.get(*self.by_name.get(name)?)
    }

    /// All volumes, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &VolumeInfo> {
        self.by_id.values()
    }

    /// Volumes created after the first `created` ones.
    pub(crate) fn newer(&self, shard: ShardId, created: u32) -> impl Iterator<Item = &VolumeInfo> {
        self.by_id.range(VolumeId::new(shard, created).next()..).map(|(_, info)| info)
    }

    /// Adds a volume whose name is new.
    pub(crate) fn insert(&mut self, info: VolumeInfo) {
        let old = self.by_name.insert(Arc::clone(&info.name), info.id);
        assert!(old.is_none(), "volume names are unique");
        self.by_id.insert(info.id, info);
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
            CommandKind::CreateVolume => {
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
        let Some(session) = self.metadata.sessions.get_mut(&header.session) else {
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
            volumes: Arc::default(),
            sessions: BTreeMap::new(),
            members: Arc::default(),
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
            let VolumeInfo { id, name, .. } = &volume;
            let metadata = all.get_mut(&id.shard()).ok_or_else(stray("volumes"))?;
            let known = &metadata.volumes;
            if known.by_name(name).is_some() || known.get(*id).is_some() {
                return Err(MetadataError::Damaged { table: "volumes" });
            }
            Arc::make_mut(&mut metadata.volumes).insert(volume);
        }
        for (shard, id, session) in sessions {
            let metadata = all.get_mut(&shard).ok_or_else(stray("sessions"))?;
            metadata.sessions.insert(id, session);
        }
        Ok(all)
    }

    fn open_session(&mut self, header: &CommandHeader) -> Outcome {
        let owner = owner_of(header);
        if header.session == SessionId::NONE || header.epoch < Epoch::FIRST {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if let Some(session) = self.sessions.get_mut(&header.session) {
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
        match self.sessions.get(&header.session) {
            None => Outcome::Rejected(Rejection::UnknownSession),
            Some(session) if header.epoch < session.epoch => {
                Outcome::Rejected(Rejection::StaleEpoch)
            }
            Some(_) => {
                self.sessions.remove(&header.session);
                Outcome::SessionClosed
            }
        }
    }

    fn end_sessions(&mut self, owner: Owner) -> Outcome {
        let before = self.sessions.len();
        // Not those of later ones: the command may have been on its way for long.
        let stays = |of: Owner| of.node != owner.node || of.incarnation >= owner.incarnation;
        self.sessions.retain(|_, session| stays(session.owner));
        let ended = before - self.sessions.len();
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
        if let Some(volume) = self.volumes.by_name(body.name) {
            return Outcome::VolumeExists(volume.clone());
        }
        let size_fits = (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size);
        if !size_fits || !size.is_multiple_of(VOLUME_SIZE_MULTIPLE) {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if self.volumes.by_id.len() >= VOLUMES_MAX || self.volumes_created == u32::MAX {
            return Outcome::Rejected(Rejection::LimitReached);
        }
        self.volumes_created += 1;
        let info = VolumeInfo {
            id: VolumeId::new(shard, self.volumes_created),
            name: body.name.into(),
            size,
            description: body.description.into(),
        };
        Arc::make_mut(&mut self.volumes).insert(info.clone());
        Outcome::VolumeCreated(info)
    }
}
