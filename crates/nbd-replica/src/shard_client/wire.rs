//! Between the types of this crate and those of the protocol between nodes; and the calls that need
//! no session.

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_rpc::{Refusal, reason, v1};
use nbd_store::{
    BlockStatus, CommandHeader, CommandKind, Extent, Outcome, Rejection, VolumeId, VolumeInfo,
    decode_all,
};
use nbd_topology::ShardId;
use tracing::debug;

use super::{Access, Failed, ReadData};
use crate::group_task::{LeaderAt, RunError};

/// The leader did not answer: it has to be looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Elsewhere {
    /// Nothing was logged.
    NotLeader,
    /// What was asked for may or may not have happened.
    Lost,
    /// This node's group has stopped.
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

pub(crate) fn target(access: &Access, shard: ShardId) -> v1::ShardTarget {
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

pub(crate) fn volume_to(volume: &VolumeInfo) -> v1::VolumeDescription {
    v1::VolumeDescription {
        id: volume.id.0,
        name: volume.name.to_string(),
        size: volume.size,
        description: volume.description.to_string(),
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

pub(crate) const fn rejection_to(rejection: Rejection) -> v1::CommandRejection {
    match rejection {
        Rejection::UnknownSession => v1::CommandRejection::UnknownSession,
        Rejection::StaleEpoch => v1::CommandRejection::StaleEpoch,
        Rejection::UnknownVolume => v1::CommandRejection::UnknownVolume,
        Rejection::PastEnd => v1::CommandRejection::PastEnd,
        Rejection::LimitReached => v1::CommandRejection::LimitReached,
        Rejection::BadCommand => v1::CommandRejection::BadCommand,
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

/// The outcome of a command that [`v1::RunRequest`] may carry; `None` for any other.
pub(crate) fn outcome_to(outcome: &Outcome) -> Option<v1::CommandOutcome> {
    use v1::command_outcome::Outcome as Wire;
    let outcome = match outcome {
        Outcome::VolumeCreated(volume) => Wire::VolumeCreated(volume_to(volume)),
        Outcome::VolumeExists(volume) => Wire::VolumeExists(volume_to(volume)),
        Outcome::SessionClosed => Wire::SessionClosed(v1::Empty {}),
        Outcome::SessionsEnded(count) => Wire::SessionsEnded(*count),
        Outcome::Counter(value) => Wire::Counter(*value),
        Outcome::Rejected(rejection) => Wire::Rejected(rejection_to(*rejection).into()),
        _ => return None,
    };
    Some(v1::CommandOutcome { outcome: Some(outcome) })
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

pub(crate) const fn failed_to(failed: Failed) -> v1::RequestFailure {
    match failed {
        Failed::NoSpace => v1::RequestFailure::NoSpace,
        Failed::Io => v1::RequestFailure::Io,
    }
}

/// The failure in a message; `None` if there is none.
pub(super) fn failed_from(failed: i32) -> Option<Failed> {
    match v1::RequestFailure::try_from(failed) {
        Ok(v1::RequestFailure::Unspecified) => None,
        Ok(v1::RequestFailure::NoSpace) => Some(Failed::NoSpace),
        Ok(v1::RequestFailure::Io) | Err(_) => Some(Failed::Io),
    }
}

/// A piece of a read, its zeroes left out.
pub(crate) fn piece_to(id: u64, piece: ReadData) -> v1::AttachReadPiece {
    let ReadData { bytes, runs } = piece;
    let length = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
    let wire =
        runs.iter().map(|(run, zero)| v1::ReadRun { length: length(run.len()), zero: *zero });
    let wire: Vec<_> = wire.collect();
    let data = if runs.iter().any(|(_, zero)| *zero) {
        let mut data = Vec::new();
        for (run, _) in runs.iter().filter(|(_, zero)| !zero) {
            data.extend_from_slice(&bytes[run.clone()]);
        }
        data
    } else {
        bytes
    };
    let data = Bytes::from(data);
    let data_crc = crc32c(&data);
    v1::AttachReadPiece { id, runs: wire, data, data_crc, failed: 0 }
}

/// Bytes in one piece of a read at most. More is taken for damage.
pub(crate) const PIECE_BYTES_MAX: usize = 1 << 20;

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

pub(crate) fn extent_to(extent: &Extent) -> v1::StatusExtent {
    let Extent { len, status } = *extent;
    v1::StatusExtent { length: len, hole: status.hole, zero: status.zero }
}

pub(super) fn extent_from(extent: &v1::StatusExtent) -> Extent {
    let status = BlockStatus { hole: extent.hole, zero: extent.zero };
    Extent { len: extent.length, status }
}

/// The header of the one mutation in a peer's command, which is whole and undamaged.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_mutation(command: &Bytes) -> Result<CommandHeader, Refusal> {
    let mut commands = decode_all(command);
    let Some(Ok(decoded)) = commands.next() else {
        return Err(malformed("a mutation that is no command"));
    };
    let header = decoded.header;
    let mutates =
        matches!(header.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    if !mutates || commands.next().is_some() {
        return Err(malformed("a mutation is one write, trim or write-zeroes"));
    }
    let mut rest = &command[decoded.payload.clone()];
    let mut piece = usize::try_from(4096 - header.offset % 4096).unwrap_or(4096);
    for checksum in command[decoded.checksums].chunks_exact(4) {
        let (fragment, after) = rest.split_at(piece.min(rest.len()));
        if crc32c(fragment).to_le_bytes() != checksum {
            return Err(Refusal::Content("the payload of a write"));
        }
        (rest, piece) = (after, 4096);
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use nbd_store::{Epoch, SessionId, encode_add_counter, encode_trim, encode_write};

    use super::*;

    #[test]
    fn a_piece_keeps_its_bytes_and_runs_and_damage_is_found() {
        let mut bytes = vec![7; 3000];
        bytes[1000..2000].fill(0);
        let runs = vec![(0..1000, false), (1000..2000, true), (2000..3000, false)];
        let mut wire = piece_to(5, ReadData { bytes: bytes.clone(), runs: runs.clone() });
        assert_eq!(wire.data.len(), 2000, "zeroes stay at home");
        assert_eq!(piece_from(&wire), Ok(ReadData { bytes, runs }));
        wire.runs[0].length += 1;
        assert!(matches!(piece_from(&wire), Err(Refusal::Malformed(_))));
        wire.runs[0].length -= 2;
        assert!(matches!(piece_from(&wire), Err(Refusal::Malformed(_))));
        wire.data_crc ^= 1;
        assert!(matches!(piece_from(&wire), Err(Refusal::Checksum { .. })));
    }

    #[test]
    fn only_whole_and_undamaged_mutations_pass() {
        let (id, epoch, volume) = (SessionId(9), Epoch(1), VolumeId(1));
        let write = encode_write(id, epoch, 1, volume, 5000, &[3; 10_000]);
        assert_eq!(check_mutation(&write).unwrap().length, 10_000);
        let trim = encode_trim(id, epoch, 2, volume, 0, 4096);
        assert_eq!(check_mutation(&trim).unwrap().seq, 2);
        for flipped in [70, write.len() - 1] {
            let mut damaged = write.to_vec();
            damaged[flipped] ^= 1;
            let refused = check_mutation(&damaged.into());
            assert!(matches!(refused, Err(Refusal::Content(_))), "{refused:?}");
        }
        let two = [&trim[..], &trim[..]].concat();
        for bad in [two.into(), encode_add_counter(1), write.slice(..100), Bytes::new()] {
            assert!(matches!(check_mutation(&bad), Err(Refusal::Malformed(_))));
        }
    }
}
