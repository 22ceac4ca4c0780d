//! Between the types of the front end and those of the protocol between nodes, as who is asked sees
//! them.

use bytes::Bytes;
use nbd_front::{Failed, ReadData};
use nbd_log::checksum::crc32c;
use nbd_rpc::{Refusal, v1};
use nbd_store::{CommandHeader, CommandKind, Extent, Outcome, Rejection, VolumeInfo, decode_all};

pub(super) fn volume_to(volume: &VolumeInfo) -> v1::VolumeDescription {
    v1::VolumeDescription {
        id: volume.id.0,
        name: volume.name.to_string(),
        size: volume.size,
        description: volume.description.to_string(),
    }
}

pub(super) const fn rejection_to(rejection: Rejection) -> v1::CommandRejection {
    match rejection {
        Rejection::UnknownSession => v1::CommandRejection::UnknownSession,
        Rejection::StaleEpoch => v1::CommandRejection::StaleEpoch,
        Rejection::UnknownVolume => v1::CommandRejection::UnknownVolume,
        Rejection::PastEnd => v1::CommandRejection::PastEnd,
        Rejection::LimitReached => v1::CommandRejection::LimitReached,
        Rejection::BadCommand => v1::CommandRejection::BadCommand,
    }
}

/// The outcome of a command that [`v1::RunRequest`] may carry; `None` for any other.
pub(super) fn outcome_to(outcome: &Outcome) -> Option<v1::CommandOutcome> {
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

pub(super) const fn failed_to(failed: Failed) -> v1::RequestFailure {
    match failed {
        Failed::NoSpace => v1::RequestFailure::NoSpace,
        Failed::Io => v1::RequestFailure::Io,
    }
}

/// A piece of a read, its zeroes left out.
pub(super) fn piece_to(id: u64, piece: ReadData) -> v1::AttachReadPiece {
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

pub(super) fn extent_to(extent: &Extent) -> v1::StatusExtent {
    let Extent { len, status } = *extent;
    v1::StatusExtent { length: len, hole: status.hole, zero: status.zero }
}

/// The header of the one mutation in a peer's command, which is whole and undamaged.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_mutation(command: &Bytes) -> Result<CommandHeader, Refusal> {
    let mut commands = decode_all(command);
    let Some(Ok(decoded)) = commands.next() else {
        return Err(Refusal::Malformed("a mutation that is no command"));
    };
    let header = decoded.header;
    let mutates =
        matches!(header.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    if !mutates || commands.next().is_some() {
        return Err(Refusal::Malformed("a mutation is one write, trim or write-zeroes"));
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
    use nbd_store::{Epoch, SessionId, VolumeId, encode_add_counter, encode_trim, encode_write};

    use super::*;

    #[test]
    fn a_piece_leaves_its_zeroes_at_home() {
        let mut bytes = vec![7; 3000];
        bytes[1000..2000].fill(0);
        let runs = vec![(0..1000, false), (1000..2000, true), (2000..3000, false)];
        let wire = piece_to(5, ReadData { bytes, runs });
        let run = |length, zero| v1::ReadRun { length, zero };
        assert_eq!(wire.runs, [run(1000, false), run(1000, true), run(1000, false)]);
        assert_eq!((wire.id, &wire.data[..]), (5, &[7; 2000][..]));
        assert_eq!(wire.data_crc, crc32c(&[7; 2000]));
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
