//! What a service tells a caller that it turns away, and why a call failed.

use std::error::Error;
use std::fmt::Write as _;

use nbd_topology::{ClusterName, InvalidName, NodeName, ReplicaId, ShardId};
use tonic::{Code, Status};

/// Why a service turns a caller away. The texts reach the caller's log, so they name both sides.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another version of the protocol.
    #[error("protocol version {found} is spoken, and {expected} is expected here")]
    Protocol {
        /// The caller's.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// Another cluster.
    #[error("the caller is of the cluster {found:?}, and this node is of {expected}")]
    Cluster {
        /// The caller's.
        found: String,
        /// Ours.
        expected: ClusterName,
    },
    /// The caller wanted another node: an address leads to the wrong one.
    #[error("the caller wants the node {found:?}, and this is {expected}")]
    Node {
        /// Whom the caller wants.
        found: String,
        /// Us.
        expected: NodeName,
    },
    /// The caller speaks for itself to itself.
    #[error("the caller claims to be this very node, {0}")]
    Oneself(NodeName),
    /// No such shard is hosted here.
    #[error("shard {0} is not hosted here")]
    Shard(ShardId),
    /// The shard's replica on this node has another id.
    #[error("shard {shard} has replica {expected} here, and not {found}")]
    Replica {
        /// The shard.
        shard: ShardId,
        /// Whom the caller wants.
        found: u64,
        /// Ours.
        expected: ReplicaId,
    },
    /// A name that no cluster or node can have.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// A message with a field that is missing or cannot be.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// Bytes that do not match their checksum.
    #[error("damaged on the way: {what} has CRC32C {found:08x}, and {expected:08x} was announced")]
    Checksum {
        /// What was damaged.
        what: &'static str,
        /// The checksum of what arrived.
        found: u32,
        /// The checksum that came with it.
        expected: u32,
    },
    /// Bytes that are whole but hold damaged content.
    #[error("damaged at the sender: {0} does not match the checksums inside it")]
    Content(&'static str),
    /// Another call took this one's place.
    #[error("a newer connection of the same node took the place of this one")]
    Superseded,
    /// A bound of this node is reached.
    #[error("this node has {limit} {what} already")]
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
}

impl Refusal {
    /// The gRPC code it goes out with.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Protocol { .. }
            | Self::Cluster { .. }
            | Self::Node { .. }
            | Self::Oneself(_)
            | Self::Replica { .. } => Code::FailedPrecondition,
            Self::Shard(_) => Code::NotFound,
            Self::Name(_) | Self::Malformed(_) => Code::InvalidArgument,
            Self::Checksum { .. } | Self::Content(_) => Code::DataLoss,
            Self::Superseded => Code::Aborted,
            Self::TooMany { .. } => Code::ResourceExhausted,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code(), refusal.to_string())
    }
}

/// Whether `status` is the verdict of a service that is alive and turned the caller away, and no
/// sign of a broken connection. Trying again helps only after something was put right.
#[must_use]
pub fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::FailedPrecondition
            | Code::NotFound
            | Code::InvalidArgument
            | Code::DataLoss
            | Code::Aborted
            | Code::ResourceExhausted
            | Code::Unimplemented
    )
}

/// An error with all its causes in one line. tonic's own text stops at "transport error".
#[must_use]
pub fn reason(error: &(dyn Error + 'static)) -> String {
    let mut text = match error.downcast_ref::<Status>() {
        Some(status) => status.message().to_owned(),
        None => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            let infallible = write!(text, ": {more}");
            debug_assert!(infallible.is_ok(), "a String takes everything");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_both_sides_and_is_known_as_one() {
        let expected = "here".parse::<NodeName>().unwrap();
        let refusal = Refusal::Node { found: "there".to_owned(), expected };
        let status = Status::from(refusal);
        assert_eq!(status.message(), "the caller wants the node \"there\", and this is here");
        assert!(is_refusal(&status));
        assert_eq!(reason(&status), status.message());
        for broken in [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled] {
            assert!(!is_refusal(&Status::new(broken, "")), "{broken}");
        }
    }

    #[test]
    fn a_reason_has_all_causes() {
        let cause = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "refused");
        let error = Refusal::Superseded;
        assert_eq!(reason(&error), error.to_string());
        let mut status = Status::unavailable("connection lost");
        status.set_source(std::sync::Arc::new(cause));
        assert_eq!(reason(&status), "connection lost: refused");
    }
}
