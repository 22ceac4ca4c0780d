//! Between the types of this crate and those of the protocol between nodes, as who asks sees them;
//! and the calls that need no session.

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_rpc::{Refusal, reason, v1};
use nbd_store::{BlockStatus, Extent, Outcome, Rejection, VolumeId, VolumeInfo};
use nbd_topology::ShardId;
use tracing::debug;

use super::{Access, Failed, ReadData};
use crate::limits::PIECE_BYTES_MAX;
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

/// Why a message of a leader is of no use.
pub(super) const fn malformed(what: &'static str) -> Refusal {
    Refusal::Malformed(what)
}

pub(super) fn target(access: &Access, shard: ShardId) -> v1::ShardTarget {
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
    VolumeInfo {
        id: VolumeId(volume.id),
        name: volume.name.into(),
        size: volume.size,
        description: volume.description.into(),
    }
}

pub(super) fn rejection_from(rejection: i32) -> Option<Rejection> {
    Some(match v1::CommandRejection::try_from(rejection).ok()? {
        v1::CommandRejection::Unspecified => return None,
        v1::CommandRejection::UnknownSession => Rejection::UnknownSession,
        v1::CommandRejection::StaleEpoch => Rejection::StaleEpoch,
        v1::CommandRejection::UnknownVolume => Rejection::UnknownVolume,
        v1::CommandRejection::PastEnd => Rejection::PastEnd,
        v1::CommandRejection::LimitReached => Rejection::LimitReached,
        v1::CommandRejection::BadCommand => Rejection::BadCommand,
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

/// The failure in a message; `None` if there is none.
pub(super) fn failed_from(failed: i32) -> Option<Failed> {
    match v1::RequestFailure::try_from(failed) {
        Ok(v1::RequestFailure::Unspecified) => None,
        Ok(v1::RequestFailure::NoSpace) => Some(Failed::NoSpace),
        Ok(v1::RequestFailure::Io) | Err(_) => Some(Failed::Io),
    }
}

/// A piece of a read, verified.
pub(super) fn piece_from(piece: &v1::AttachReadPiece) -> Result<ReadData, Refusal> {
    let found = crc32c(&piece.data);
    if found != piece.data_crc {
        let what = "a piece of a read";
        return Err(Refusal::Checksum { what, found, expected: piece.data_crc });
    }
    let total: u64 = piece.runs.iter().map(|run| u64::from(run.length)).sum();
    if total == 0 || total > PIECE_BYTES_MAX as u64 {
        return Err(malformed("a piece of a read has 1 byte to 1 MiB"));
    }
    let mut out = ReadData::default();
    let mut rest = &piece.data[..];
    for run in &piece.runs {
        let (start, len) = (out.bytes.len(), run.length as usize);
        if run.zero {
            out.bytes.resize(start + len, 0);
        } else {
            let (bytes, after) = rest
                .split_at_checked(len)
                .ok_or(malformed("a piece of a read has fewer bytes than it says"))?;
            out.bytes.extend_from_slice(bytes);
            rest = after;
        }
        out.runs.push((start..start + len, run.zero));
    }
    if !rest.is_empty() {
        return Err(malformed("a piece of a read has more bytes than it says"));
    }
    Ok(out)
}

pub(super) fn extent_from(extent: &v1::StatusExtent) -> Extent {
    let status = BlockStatus { hole: extent.hole, zero: extent.zero };
    Extent { len: extent.length, status }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_gets_its_zeroes_back_and_damage_is_found() {
        let run = |length, zero| v1::ReadRun { length, zero };
        let data = Bytes::from(vec![7; 2000]);
        let mut wire = v1::AttachReadPiece {
            id: 5,
            runs: vec![run(1000, false), run(1000, true), run(1000, false)],
            data_crc: crc32c(&data),
            data,
            failed: 0,
        };
        let mut bytes = vec![7; 3000];
        bytes[1000..2000].fill(0);
        let runs = vec![(0..1000, false), (1000..2000, true), (2000..3000, false)];
        assert_eq!(piece_from(&wire), Ok(ReadData { bytes, runs }));
        wire.runs[0].length += 1;
        assert!(matches!(piece_from(&wire), Err(Refusal::Malformed(_))));
        wire.runs[0].length -= 2;
        assert!(matches!(piece_from(&wire), Err(Refusal::Malformed(_))));
        wire.data_crc ^= 1;
        assert!(matches!(piece_from(&wire), Err(Refusal::Checksum { .. })));
    }
}
