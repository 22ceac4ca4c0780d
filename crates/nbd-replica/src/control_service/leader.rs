//! Calls about volumes, sessions and nodes, at the shard's leader.

use bytes::Bytes;
use nbd_front::RunError;
use nbd_rpc::{conflict, v1};
use nbd_store::command::{self, NewVolume, VolumeUpdate};
use nbd_store::{
    AdmissionKind, CommandError, Epoch, ListQuery, Outcome, ReadError, Rejection, SessionId,
    SessionInfo, ShardReader, VolumeId, VolumeInfo,
};
use nbd_topology::NodeName;
use tonic::Status;
use tracing::info;
use xxhash_rust::xxh3::xxh3_128;

use super::check::{self, Invalid};
use super::wire;
use crate::admin_service::{members, not_leader};
use crate::hosted::{HostedShard, VolumesMoved};

/// Bytes of volumes in one page, or of a report, at most; well below what a message may have.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// Volumes in a report of what they do.
const ACTIVE_MAX: usize = 10_000;

/// Bytes that a volume's counts take in a report, beside its name.
const ACTIVITY_BYTES: usize = 80;

/// The leader's end of a shard.
#[derive(Debug)]
pub(super) struct Leader<'a> {
    pub(super) shard: &'a HostedShard,
    /// Tells this life of the process from others.
    pub(super) incarnation: u64,
}

fn not_run(error: &RunError) -> Status {
    match error {
        RunError::NotLeader => not_leader(),
        RunError::Lost => Status::unavailable("leadership was lost meanwhile: ask again"),
        RunError::Stopped(_) => Status::unavailable("the node is stopping"),
    }
}

fn unknown_volume() -> Status {
    Status::not_found("there is no such volume")
}

fn unexpected(outcome: &Outcome) -> Status {
    Status::internal(format!("the log answered {outcome:?}"))
}

/// What was checked before cannot be refused by the encoder.
fn not_encoded(error: CommandError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn refused(kind: v1::Conflict, volume: Option<&VolumeInfo>, sessions: u32, text: &str) -> Status {
    let volume = volume.map(wire::volume);
    conflict(&v1::ConflictDetail { conflict: kind.into(), volume, sessions }, text)
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

impl Leader<'_> {
    fn reader(&self) -> &ShardReader {
        self.shard.group.reader()
    }

    async fn run(&self, command: Bytes) -> Result<Outcome, Status> {
        self.shard.group.run(command).await.map_err(|error| not_run(&error))
    }

    /// Looks something up, once it is known that this replica still leads.
    async fn look<T>(&self, look: impl Fn(&ShardReader) -> T) -> Result<T, Status> {
        self.shard.look(|| look(self.reader())).await.map_err(|error| not_run(&error))
    }

    /// Looks up how much space is taken, which may wait for the disk.
    async fn allocated(
        &self,
        look: impl FnOnce(&ShardReader) -> Result<u64, ReadError> + Send + 'static,
    ) -> Result<u64, Status> {
        let reader = self.reader().clone();
        match tokio::task::spawn_blocking(move || look(&reader)).await {
            Ok(looked) => looked.map_err(|error| Status::internal(error.to_string())),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }

    pub(super) async fn create(
        &self,
        request: v1::CreateVolumeRequest,
    ) -> Result<v1::CreateVolumeReply, Status> {
        let v1::CreateVolumeRequest { name, size, description, labels, key, now_ms, .. } = request;
        check::name(&name)?;
        check::size(size)?;
        check::description(&description)?;
        check::key(&key)?;
        let labels = check::labels("labels", labels)?;
        let key = (!key.is_empty()).then(|| xxh3_128(key.as_bytes()).max(1));
        let new = NewVolume {
            name: &name,
            size,
            description: &description,
            labels: &labels,
            key,
            now_ms,
        };
        let command = command::encode_new_volume(&new).map_err(not_encoded)?;
        let found = |volume, repeated| {
            Ok(v1::CreateVolumeReply { volume: Some(wire::volume(&volume)), repeated })
        };
        match self.run(command).await? {
            Outcome::VolumeCreated(volume) => {
                info!(volume = %volume.id.0, name, size, "created a volume");
                found(volume, false)
            }
            Outcome::VolumeRepeated(volume) => found(volume, true),
            Outcome::VolumeExists(volume) => {
                let text = "a volume of this name exists";
                Err(refused(v1::Conflict::VolumeExists, Some(&volume), 0, text))
            }
            Outcome::Rejected(Rejection::KeyReused) => {
                let volume = self.reader().volume_by_name(&name);
                let text = "the key was used to create a volume otherwise";
                Err(refused(v1::Conflict::KeyReused, volume.as_ref(), 0, text))
            }
            Outcome::Rejected(Rejection::LimitReached) => {
                let text = "the shard has as many volumes as it may have";
                Err(refused(v1::Conflict::LimitReached, None, 0, text))
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn get(
        &self,
        request: v1::GetVolumeRequest,
    ) -> Result<v1::GetVolumeReply, Status> {
        check::name(&request.name)?;
        let found = self
            .look(|reader| {
                let volume = reader.volume_by_name(&request.name)?;
                let sessions = count(reader.sessions_of(volume.id));
                Some((volume, sessions))
            })
            .await?;
        let (info, sessions) = found.ok_or_else(unknown_volume)?;
        let id = info.id;
        let allocated = self.allocated(move |reader| reader.allocated_bytes(id)).await?;
        Ok(v1::GetVolumeReply { volume: Some(wire::volume(&info)), allocated, sessions })
    }

    pub(super) async fn list(
        &self,
        request: v1::ListVolumesRequest,
    ) -> Result<v1::ListVolumesReply, Status> {
        check::prefix(&request.prefix)?;
        let query = ListQuery {
            labels: check::labels("labels", request.labels)?,
            prefix: request.prefix,
            order: wire::order(request.order)?,
            descending: request.descending,
            after: request.after.map(wire::position),
            limit: check::limit(request.limit)?,
        };
        let (found, mut more, total, total_bytes) = self
            .look(|reader| {
                let (found, more) = reader.list(&query);
                (found, more, reader.volume_count() as u64, reader.provisioned_bytes())
            })
            .await?;
        let mut bytes = 0;
        let mut volumes = Vec::with_capacity(found.len());
        for info in &found {
            bytes += wire::volume_bytes(info);
            if bytes > PAGE_BYTES_MAX && !volumes.is_empty() {
                more = true;
                break;
            }
            volumes.push(wire::volume(info));
        }
        Ok(v1::ListVolumesReply { volumes, more, total, total_bytes })
    }

    pub(super) async fn update(
        &self,
        request: v1::UpdateVolumeRequest,
    ) -> Result<v1::UpdateVolumeReply, Status> {
        let volume = check::volume(request.volume)?;
        if let Some(description) = &request.description {
            check::description(description)?;
        }
        let set_labels = check::labels("set_labels", request.set_labels)?;
        check::label_names("remove_labels", &request.remove_labels)?;
        let update = VolumeUpdate {
            description: request.description.as_deref(),
            set_labels: Some(&set_labels),
            remove_labels: &request.remove_labels,
            now_ms: request.now_ms,
        };
        let command = command::encode_update_volume(volume, &update).map_err(not_encoded)?;
        match self.run(command).await? {
            Outcome::VolumeChanged(volume) => {
                Ok(v1::UpdateVolumeReply { volume: Some(wire::volume(&volume)) })
            }
            Outcome::Rejected(Rejection::UnknownVolume) => Err(unknown_volume()),
            Outcome::Rejected(Rejection::LimitReached) => Err(Invalid::TooManyLabels.into()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn resize(
        &self,
        request: v1::ResizeVolumeRequest,
    ) -> Result<v1::ResizeVolumeReply, Status> {
        let v1::ResizeVolumeRequest { volume, size, force, now_ms, from, .. } = request;
        let from = (from != 0).then_some(from);
        let volume = check::volume(volume)?;
        check::size(size)?;
        // An end within a block takes room like a write of zeroes there.
        let _grant = match self.reader().volume(volume) {
            Some(before) if size < before.size && force => {
                let kind = AdmissionKind::WriteZeroes { no_hole: false };
                let room = &self.shard.hosting.room;
                let range = (size, before.size - size);
                let grant = room.look_for(self.reader(), volume, range, kind).await;
                Some(grant.map_err(|_| {
                    Status::resource_exhausted("the leader's disk has no room for the change")
                })?)
            }
            _ => None,
        };
        let command = command::encode_resize_volume(volume, from, size, force, now_ms);
        match self.run(command).await? {
            Outcome::VolumeChanged(info) => {
                info!(volume = %info.id.0, name = %info.name, size, "resized a volume");
                Ok(v1::ResizeVolumeReply { volume: Some(wire::volume(&info)) })
            }
            Outcome::Rejected(Rejection::UnknownVolume) => Err(unknown_volume()),
            Outcome::Rejected(Rejection::Changed) => {
                let info = self.reader().volume(volume);
                let text = "the volume has another size by now: look at it, and ask again";
                Err(refused(v1::Conflict::Changed, info.as_ref(), 0, text))
            }
            Outcome::Rejected(Rejection::Shrinks) => {
                let info = self.reader().volume(volume);
                let sessions = count(self.reader().sessions_of(volume));
                let text = "the volume is larger than that: what lies behind its new end is lost \
                            if this is forced";
                Err(refused(v1::Conflict::Shrinks, info.as_ref(), sessions, text))
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn delete(
        &self,
        request: &v1::DeleteVolumeRequest,
    ) -> Result<v1::DeleteVolumeReply, Status> {
        let volume = check::volume(request.volume)?;
        let command = command::encode_delete_volume(volume, request.force);
        match self.run(command).await? {
            Outcome::VolumeDeleted { sessions_ended } => {
                info!(volume = %volume.0, sessions_ended, "deleted a volume");
                Ok(v1::DeleteVolumeReply { sessions_ended })
            }
            Outcome::Rejected(Rejection::UnknownVolume) => Err(unknown_volume()),
            Outcome::Rejected(Rejection::Attached) => {
                let info = self.reader().volume(volume);
                let sessions = count(self.reader().sessions_of(volume));
                let text = format!("the volume has {sessions} sessions");
                Err(refused(v1::Conflict::Attached, info.as_ref(), sessions, &text))
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn sessions(
        &self,
        request: &v1::ListSessionsRequest,
    ) -> Result<v1::ListSessionsReply, Status> {
        let volume = (request.volume != 0).then_some(VolumeId(request.volume));
        let after = match &request.after[..] {
            [] => SessionId::NONE,
            after => check::session("after", after)?,
        };
        let limit = check::limit(request.limit)?;
        // One more tells whether there is a next page.
        let (mut found, _) =
            self.look(|reader| reader.sessions_after(volume, after, limit + 1)).await?;
        let mut more = found.len() > limit;
        found.truncate(limit);
        let mut bytes = 0;
        let mut sessions = Vec::with_capacity(found.len());
        for info in &found {
            let view = self.session_view(info);
            bytes += view.name.len() + 1024;
            if bytes > 2 * PAGE_BYTES_MAX && !sessions.is_empty() {
                more = true;
                break;
            }
            sessions.push(view);
        }
        Ok(v1::ListSessionsReply { sessions, more })
    }

    fn session_view(&self, info: &SessionInfo) -> v1::SessionView {
        let volume = self.reader().volume(info.volume);
        let name = volume.map(|volume| volume.name.to_string()).unwrap_or_default();
        wire::session(info, name, self.shard.attached.of(info.id))
    }

    /// Ends a session, whoever has resumed it by then.
    pub(super) async fn end(&self, request: &v1::EndSessionRequest) -> Result<(), Status> {
        let session = check::session("session", &request.session)?;
        let command = command::encode_close_session(session, Epoch(u32::MAX));
        match self.run(command).await? {
            Outcome::SessionClosed => {
                info!(%session, "ended a session");
                Ok(())
            }
            Outcome::Rejected(Rejection::UnknownSession) => {
                Err(Status::not_found("there is no such session"))
            }
            other => Err(unexpected(&other)),
        }
    }

    pub(super) async fn trace(
        &self,
        request: &v1::TraceVolumeRequest,
    ) -> Result<v1::TraceVolumeReply, Status> {
        check::name(&request.name)?;
        check::requests(request.requests)?;
        let found = self
            .look(|reader| {
                let volume = reader.volume_by_name(&request.name)?.id;
                Some((volume, self.shard.attached.sample(volume, request.requests)))
            })
            .await?;
        let (volume, sessions) = found.ok_or_else(unknown_volume)?;
        Ok(v1::TraceVolumeReply { volume: volume.0, sessions: count(sessions) })
    }

    pub(super) async fn activity(&self) -> Result<v1::ActivityReply, Status> {
        // Counts are this process's own; but who asks wants those of the leader there is.
        let moved = self
            .look(|reader| self.shard.attached.moved(|volume| reader.volume(volume).is_some()))
            .await?;
        let VolumesMoved { total, volumes } = moved;
        let mut volumes: Vec<_> = volumes.into_iter().collect();
        volumes.sort_unstable_by_key(|(id, (moved, _))| (std::cmp::Reverse(moved.bytes()), *id));
        let mut bytes = 0;
        let mut told = Vec::new();
        for (id, (moved, sessions)) in volumes {
            // One that was deleted has nothing to say.
            let Some(info) = self.reader().volume(id) else { continue };
            bytes += info.name.len() + ACTIVITY_BYTES;
            if told.len() >= ACTIVE_MAX || bytes > 2 * PAGE_BYTES_MAX {
                break;
            }
            let (name, counts) = (info.name.to_string(), Some(wire::counts(&moved)));
            told.push(v1::VolumeActivity { volume: id.0, name, counts, sessions });
        }
        let (incarnation, total) = (self.incarnation, Some(wire::counts(&total)));
        Ok(v1::ActivityReply { incarnation, total, volumes: told })
    }

    pub(super) async fn shard(&self) -> Result<v1::GetShardReply, Status> {
        let members = members(&self.shard.group).await?;
        let allocated = self.allocated(ShardReader::allocated_total).await?;
        let reader = self.reader();
        let cordoned = reader.cordoned().iter().map(ToString::to_string).collect();
        let replacement = |(old, new): (nbd_topology::ReplicaId, nbd_topology::ReplicaId)| {
            v1::Replacement { old: old.get(), new: new.get() }
        };
        Ok(v1::GetShardReply {
            members: Some(members),
            volumes: reader.volume_count() as u64,
            provisioned: reader.provisioned_bytes(),
            allocated,
            sessions: count(reader.session_count()),
            cordoned,
            replacements: reader.replacements().into_iter().map(replacement).collect(),
        })
    }

    pub(super) async fn cordon(&self, node: &NodeName, cordoned: bool) -> Result<(), Status> {
        match self.run(command::encode_cordon_node(node, cordoned)).await? {
            Outcome::Done => {
                info!(shard = %self.shard.group.shard(), %node, cordoned, "cordon");
                Ok(())
            }
            Outcome::Rejected(Rejection::LimitReached) => {
                let most = nbd_store::limits::CORDONED_MAX;
                Err(Status::resource_exhausted(format!("{most} nodes are cordoned already")))
            }
            other => Err(unexpected(&other)),
        }
    }
}
