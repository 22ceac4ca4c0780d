//! Between the types of the front end and those of the protocol between nodes, as who is asked sees
//! them.

use nbd_rpc::v1;
use nbd_store::{Outcome, Rejection, VolumeInfo};

pub(super) fn volume_to(volume: &VolumeInfo) -> v1::VolumeDescription {
    v1::VolumeDescription {
        id: volume.id.0,
        name: volume.name.to_string(),
        size: volume.size,
        description: volume.description.to_string(),
    }
}

const fn rejection_to(rejection: Rejection) -> v1::CommandRejection {
    match rejection {
        Rejection::UnknownSession => v1::CommandRejection::UnknownSession,
        Rejection::StaleEpoch => v1::CommandRejection::StaleEpoch,
        Rejection::UnknownVolume => v1::CommandRejection::UnknownVolume,
        Rejection::PastEnd => v1::CommandRejection::PastEnd,
        Rejection::LimitReached => v1::CommandRejection::LimitReached,
        Rejection::BadCommand => v1::CommandRejection::BadCommand,
        Rejection::KeyReused => v1::CommandRejection::KeyReused,
        Rejection::Attached => v1::CommandRejection::Attached,
        Rejection::Shrinks => v1::CommandRejection::Shrinks,
        Rejection::Changed => v1::CommandRejection::Changed,
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
