//! Between the types of this crate and those of the protocol between nodes, as who asks sees them;
//! and the calls that need no session.

use bytes::Bytes;
use nbd_rpc::{reason, v1};
use nbd_store::{Outcome, Rejection, VolumeId, VolumeInfo};
use nbd_topology::ShardId;
use tracing::debug;

use super::Access;
use crate::route::{LeaderAt, RunError};

/// The leader did not answer: it has to be looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elsewhere {
    /// Nothing was logged.
    NotLeader,
    /// What was asked for may or may not have happened.
    Lost,
    /// This process is stopping.
    Stopped,
}

impl From<RunError> for Elsewhere {
    fn from(error: RunError) -> Self {
        match error {
            RunError::NotLeader => Self::NotLeader,
            RunError::Lost => Self::Lost,
            RunError::Stopped(_) => Self::Stopped,
        }
    }
}

fn target(access: &Access, shard: ShardId) -> v1::ShardTarget {
    v1::ShardTarget { cluster: access.cluster.to_string(), shard: shard.0 }
}

/// A call that failed, as far as its caller must know.
fn failed_call(leader: &LeaderAt, status: &tonic::Status) -> Elsewhere {
    debug!(node = %leader.node, reason = %reason(status), "a leader cannot be asked");
    Elsewhere::Lost
}

pub(super) async fn run(
    access: &Access,
    shard: ShardId,
    leader: &LeaderAt,
    command: Bytes,
) -> Result<Outcome, Elsewhere> {
    use v1::run_reply::Result as Reply;
    let mut client = access.links.client(&leader.grpc).map_err(|_| Elsewhere::NotLeader)?;
    let request = v1::RunRequest { target: Some(target(access, shard)), command };
    let reply = client.run(request).await.map_err(|status| failed_call(leader, &status))?;
    match reply.into_inner().result {
        Some(Reply::Outcome(outcome)) => outcome_from(outcome).ok_or(Elsewhere::Lost),
        Some(Reply::NotLeader(_)) => Err(Elsewhere::NotLeader),
        Some(Reply::Lost(_)) | None => Err(Elsewhere::Lost),
    }
}

pub(super) async fn describe(
    access: &Access,
    shard: ShardId,
    leader: &LeaderAt,
    name: &str,
) -> Result<Option<VolumeInfo>, Elsewhere> {
    use v1::describe_reply::Result as Reply;
    let mut client = access.links.client(&leader.grpc).map_err(|_| Elsewhere::NotLeader)?;
    let target = Some(target(access, shard));
    let request = v1::DescribeRequest { target, name: name.to_owned() };
    let reply = client.describe(request).await.map_err(|status| failed_call(leader, &status))?;
    match reply.into_inner().result {
        Some(Reply::Volume(volume)) => Ok(Some(volume_from(volume))),
        Some(Reply::Unknown(_)) => Ok(None),
        Some(Reply::NotLeader(_)) => Err(Elsewhere::NotLeader),
        None => Err(Elsewhere::Lost),
    }
}

pub(super) async fn list(
    access: &Access,
    shard: ShardId,
    leader: &LeaderAt,
    after: VolumeId,
) -> Result<Vec<VolumeInfo>, Elsewhere> {
    use v1::list_reply::Result as Reply;
    let mut client = access.links.client(&leader.grpc).map_err(|_| Elsewhere::NotLeader)?;
    let request = v1::ListRequest { target: Some(target(access, shard)), after: after.0 };
    let reply = client.list(request).await.map_err(|status| failed_call(leader, &status))?;
    match reply.into_inner().result {
        // A page that does not get on would be asked for without end.
        Some(Reply::Page(page)) if page.volumes.iter().all(|volume| volume.id > after.0) => {
            Ok(page.volumes.into_iter().map(volume_from).collect())
        }
        Some(Reply::NotLeader(_)) => Err(Elsewhere::NotLeader),
        Some(Reply::Page(_)) | None => Err(Elsewhere::Lost),
    }
}

fn volume_from(volume: v1::VolumeDescription) -> VolumeInfo {
    let v1::VolumeDescription { id, name, size, description } = volume;
    VolumeInfo::new(VolumeId(id), &name, size, &description)
}

fn rejection_from(rejection: i32) -> Option<Rejection> {
    Some(match v1::CommandRejection::try_from(rejection).ok()? {
        v1::CommandRejection::Unspecified => return None,
        v1::CommandRejection::UnknownSession => Rejection::UnknownSession,
        v1::CommandRejection::StaleEpoch => Rejection::StaleEpoch,
        v1::CommandRejection::UnknownVolume => Rejection::UnknownVolume,
        v1::CommandRejection::PastEnd => Rejection::PastEnd,
        v1::CommandRejection::LimitReached => Rejection::LimitReached,
        v1::CommandRejection::BadCommand => Rejection::BadCommand,
        v1::CommandRejection::KeyReused => Rejection::KeyReused,
        v1::CommandRejection::Attached => Rejection::Attached,
        v1::CommandRejection::Shrinks => Rejection::Shrinks,
        v1::CommandRejection::Changed => Rejection::Changed,
    })
}

fn outcome_from(outcome: v1::CommandOutcome) -> Option<Outcome> {
    use v1::command_outcome::Outcome as Wire;
    Some(match outcome.outcome? {
        Wire::VolumeCreated(volume) => Outcome::VolumeCreated(volume_from(volume)),
        Wire::VolumeExists(volume) => Outcome::VolumeExists(volume_from(volume)),
        Wire::SessionClosed(_) => Outcome::SessionClosed,
        Wire::SessionsEnded(count) => Outcome::SessionsEnded(count),
        Wire::Counter(value) => Outcome::Counter(value),
        Wire::Rejected(rejection) => Outcome::Rejected(rejection_from(rejection)?),
    })
}
