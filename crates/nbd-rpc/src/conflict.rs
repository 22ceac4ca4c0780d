//! Calls of `Control` that are refused as things stand: what the details of their status say.

use prost::Message as _;
use tonic::{Code, Status};

use crate::v1::ConflictDetail;

/// The status of a call that is refused, with a text for people. Its details are the bytes of
/// `detail`.
#[must_use]
pub fn conflict(detail: &ConflictDetail, text: impl Into<String>) -> Status {
    Status::with_details(Code::FailedPrecondition, text, detail.encode_to_vec().into())
}

/// Why a call was refused, if that is why it failed.
#[must_use]
pub fn conflict_of(status: &Status) -> Option<ConflictDetail> {
    if status.code() != Code::FailedPrecondition || status.details().is_empty() {
        return None;
    }
    ConflictDetail::decode(status.details()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::Conflict;

    #[test]
    fn a_conflict_is_known_as_one() {
        let kind = Conflict::Attached.into();
        let detail = ConflictDetail { conflict: kind, volume: None, sessions: 3 };
        let status = conflict(&detail, "attached by 3 clients");
        assert_eq!(conflict_of(&status), Some(detail));
        assert_eq!(conflict_of(&Status::failed_precondition("another cluster")), None);
        assert_eq!(conflict_of(&Status::unavailable("")), None);
    }
}
