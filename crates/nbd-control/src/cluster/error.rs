//! Why a call came to nothing.

use nbd_rpc::{Refusal, v1};
use nbd_topology::ShardId;
use prost::Message as _;
use tonic::{Code, Status};

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum CallError {
    /// Nobody answered for the shard in time.
    #[error("shard {shard} does not answer: {reason}")]
    Unavailable { shard: ShardId, reason: String },
    /// What the call names does not exist. `repeated`: another attempt of the same call
    /// may have reached the shard, and may have been what removed it.
    #[error("{message}")]
    NotFound { message: String, repeated: bool },
    /// As things stand, it cannot be done.
    #[error("{message}")]
    Conflict { message: String, conflict: Conflict },
    /// A value is out of bounds.
    #[error("{message}")]
    Invalid { message: String },
}

/// Why a call was refused as things stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conflict {
    VolumeExists,
    KeyReused,
    /// With the number of sessions.
    Attached(u32),
    /// With the volume's size.
    Shrinks(u64),
    LimitReached,
    /// The message says why.
    Other,
}

/// The gRPC service that a call is of: they word refusals differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Control,
    Admin,
}

impl CallError {
    /// What the answer `status` says for good. `None`: nothing, ask again or somebody else.
    pub(crate) fn verdict(
        service: Service,
        shard: ShardId,
        status: &Status,
        repeated: bool,
    ) -> Option<Self> {
        let message = status.message().to_owned();
        match status.code() {
            // A contact that is no longer of the shard says nothing about what was asked for.
            Code::NotFound if message == Refusal::Shard(shard).to_string() => None,
            Code::NotFound => Some(Self::NotFound { message, repeated }),
            Code::InvalidArgument | Code::OutOfRange => Some(Self::Invalid { message }),
            Code::ResourceExhausted => {
                Some(Self::Conflict { message, conflict: Conflict::LimitReached })
            }
            Code::FailedPrecondition => match service {
                // Without details, it is a contact of another cluster.
                Service::Control if status.details().is_empty() => None,
                Service::Control => Some(Self::Conflict { message, conflict: conflict(status) }),
                // It was passed on to a replica that no longer leads.
                Service::Admin if message.starts_with(&format!("shard {shard} is led by ")) => None,
                Service::Admin => Some(Self::Conflict { message, conflict: Conflict::Other }),
            },
            _ => None,
        }
    }
}

fn conflict(status: &Status) -> Conflict {
    let detail = v1::ConflictDetail::decode(status.details()).unwrap_or_default();
    match detail.conflict() {
        v1::Conflict::Unspecified | v1::Conflict::Changed => Conflict::Other,
        v1::Conflict::VolumeExists => Conflict::VolumeExists,
        v1::Conflict::KeyReused => Conflict::KeyReused,
        v1::Conflict::Attached => Conflict::Attached(detail.sessions),
        v1::Conflict::Shrinks => Conflict::Shrinks(detail.volume.map_or(0, |volume| volume.size)),
        v1::Conflict::LimitReached => Conflict::LimitReached,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: ShardId = ShardId(1);

    fn verdict(service: Service, status: &Status) -> Option<CallError> {
        CallError::verdict(service, SHARD, status, false)
    }

    #[test]
    fn a_verdict_is_told_from_a_wrong_contact() {
        let control = |status: Status| verdict(Service::Control, &status);
        let admin = |status: Status| verdict(Service::Admin, &status);
        assert_eq!(control(Refusal::Shard(SHARD).into()), None);
        assert!(matches!(control(Status::not_found("no")), Some(CallError::NotFound { .. })));
        assert_eq!(control(Status::failed_precondition("the caller is of the cluster")), None);
        assert_eq!(admin(Status::failed_precondition("shard 1 is led by b, at b:1")), None);
        let refused = admin(Status::failed_precondition("no majority would be left"));
        assert!(matches!(refused, Some(CallError::Conflict { conflict: Conflict::Other, .. })));
        for again in [Code::Unavailable, Code::Unknown, Code::DeadlineExceeded, Code::Unimplemented]
        {
            assert_eq!(control(Status::new(again, "")), None, "{again}");
        }
    }

    #[test]
    fn the_details_say_what_is_in_the_way() {
        let volume = v1::Volume { size: 4096, ..v1::Volume::default() };
        let detail = |conflict: v1::Conflict| {
            let (volume, sessions) = (Some(volume.clone()), 3);
            let detail = v1::ConflictDetail { conflict: conflict.into(), volume, sessions };
            let details = detail.encode_to_vec().into();
            let status = Status::with_details(Code::FailedPrecondition, "no", details);
            match verdict(Service::Control, &status) {
                Some(CallError::Conflict { conflict, .. }) => conflict,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(detail(v1::Conflict::Attached), Conflict::Attached(3));
        assert_eq!(detail(v1::Conflict::Shrinks), Conflict::Shrinks(4096));
        assert_eq!(detail(v1::Conflict::KeyReused), Conflict::KeyReused);
    }
}
