//! What applying a command came to.

use std::sync::Arc;

use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::members::ReplicaInfo;

/// A volume as its creator described it. Cloning copies two pointers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its identity.
    pub id: VolumeId,
    /// Its name, unique in the cluster: the NBD export name.
    pub name: Arc<str>,
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
    /// Free text.
    pub description: Arc<str>,
}

/// An open session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionInfo {
    /// Its identity.
    pub id: SessionId,
    /// The newest generation seen.
    pub epoch: Epoch,
    /// The volume it is attached to.
    pub volume: VolumeId,
    /// Who opened it, or resumed it last.
    pub owner: Owner,
}

/// The verdict on one command: the same on every replica, for it comes from the log alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The mutation took effect (now, or when the same sequence number was first applied).
    Done,
    /// The volume exists from now on.
    VolumeCreated(VolumeInfo),
    /// A volume of that name was there already; it keeps its size and description.
    VolumeExists(VolumeInfo),
    /// The session is open with the epoch asked for.
    SessionOpened,
    /// The session is gone.
    SessionClosed,
    /// So many sessions of an earlier life of a node were ended.
    SessionsEnded(u32),
    /// The replica is known, by this id.
    ReplicaRegistered(ReplicaInfo),
    /// The counter's new value.
    Counter(i64),
    /// Nothing changed.
    Rejected(Rejection),
}

/// Why a command had no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u8)]
pub enum Rejection {
    /// No such session: never opened, or closed.
    #[error("unknown session")]
    UnknownSession = 1,
    /// The session has moved on to a higher epoch.
    #[error("the session was resumed elsewhere")]
    StaleEpoch = 2,
    /// No such volume.
    #[error("unknown volume")]
    UnknownVolume = 3,
    /// The range does not end within the volume.
    #[error("range past the end of the volume")]
    PastEnd = 4,
    /// As many volumes, sessions or replicas as a shard may have.
    #[error("too many volumes, sessions or replicas")]
    LimitReached = 5,
    /// Not a command of this version, a size or name out of bounds, a mutation of another volume
    /// than the session's, a sequence number behind the session's window, or a replica id that was
    /// given before.
    #[error("malformed command")]
    BadCommand = 6,
}

impl Rejection {
    /// The rejection stored as `code`.
    pub(crate) const fn from_u8(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::UnknownSession,
            2 => Self::StaleEpoch,
            3 => Self::UnknownVolume,
            4 => Self::PastEnd,
            5 => Self::LimitReached,
            6 => Self::BadCommand,
            _ => return None,
        })
    }
}
