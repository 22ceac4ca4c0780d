//! What the lock of a shard guards, and how a command changes it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use nbd_log::log::LogPosition;
use nbd_topology::{LogIndex, ShardId, Term};

use super::pins::Pin;
use super::session::{Seen, Session};
use crate::chunk::record::ShardRecord;
use crate::command::{CommandHeader, CommandKind, CreateVolumeBody, DecodedCommand, decode_all};
use crate::ids::{SessionId, VolumeId};
use crate::limits::{
    SESSIONS_MAX, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_SIZE_MULTIPLE, VOLUMES_MAX,
};
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
    /// Where its data begins in the log; `None` if it came from a checkpoint.
    pub(crate) applied_position: Option<LogPosition>,
    /// The replicated counter.
    pub(crate) counter: i64,
    /// Number of volumes ever created.
    pub(crate) volumes_created: u32,
    /// Shared with the frozen copy until the next volume is created.
    pub(crate) volumes: Arc<Volumes>,
    /// Open sessions.
    pub(crate) sessions: BTreeMap<SessionId, Session>,
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
    pub(crate) metadata: Metadata,
    /// Newest layer.
    pub(crate) active: Overlay,
    /// Next layer, from a freeze until its checkpoint is durable.
    pub(crate) frozen: Option<Arc<Frozen>>,
    /// Handed out to readers.
    pub(crate) pin: Arc<Pin>,
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
        data: &[u8],
        position: LogPosition,
    ) -> Vec<Outcome> {
        assert_eq!(index, self.metadata.applied.next(), "entries are applied in order");
        let mut outcomes = Vec::new();
        for command in decode_all(data) {
            outcomes.push(match command {
                Ok(command) => self.execute(index, &command, data, position),
                Err(_) => Outcome::Rejected(Rejection::BadCommand),
            });
        }
        self.metadata.applied = index;
        self.metadata.applied_term = term;
        self.metadata.applied_position = Some(position);
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
        if header.epoch < session.epoch {
            return Outcome::Rejected(Rejection::StaleEpoch);
        }
        if header.epoch > session.epoch {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        match session.look(header.seq) {
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
        session.record(header.seq, verdict.err());
        match verdict {
            Ok(size) => {
                mutate(&mut self.active, index, command, data, position, size);
                Outcome::Done
            }
            Err(rejection) => Outcome::Rejected(rejection),
        }
    }
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
            applied_position: None,
            counter: record.counter,
            volumes_created: record.volumes_created,
            volumes: Arc::default(),
            sessions: BTreeMap::new(),
        }
    }

    fn open_session(&mut self, header: &CommandHeader) -> Outcome {
        if let Some(session) = self.sessions.get_mut(&header.session) {
            if header.epoch < session.epoch {
                return Outcome::Rejected(Rejection::StaleEpoch);
            }
            if header.volume != session.volume {
                return Outcome::Rejected(Rejection::BadCommand);
            }
            session.epoch = header.epoch;
            return Outcome::SessionOpened;
        }
        if header.session == SessionId::NONE {
            return Outcome::Rejected(Rejection::BadCommand);
        }
        if self.volumes.get(header.volume).is_none() {
            return Outcome::Rejected(Rejection::UnknownVolume);
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Outcome::Rejected(Rejection::LimitReached);
        }
        self.sessions.insert(header.session, Session::new(header.epoch, header.volume));
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
