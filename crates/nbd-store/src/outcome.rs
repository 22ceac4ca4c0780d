//! What applying a command came to.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::members::ReplicaInfo;

/// Labels of a volume: names and values, see [`crate::labels`].
pub type Labels = BTreeMap<String, String>;

/// A volume as the log has it. Cloning copies three pointers.
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
    /// What its users tell it from others by.
    pub labels: Arc<Labels>,
    /// When it was created, in milliseconds since 1970 by the clock of who asked for it; 0 if that
    /// was not said.
    pub created_ms: u64,
    /// When its size, description or labels changed last.
    pub modified_ms: u64,
    /// XXH3-128 of the key that its creator gave the call, so that the call can be told from
    /// another; 0: there was none.
    pub key: u128,
    /// What was asked for by the call with that key; see [`crate::NewVolume::fingerprint`].
    pub fingerprint: u64,
}

impl VolumeInfo {
    /// A volume without labels of which nobody knows when it was created.
    #[must_use]
    pub fn new(id: VolumeId, name: &str, size: u64, description: &str) -> Self {
        Self {
            id,
            name: name.into(),
            size,
            description: description.into(),
            labels: no_labels(),
            created_ms: 0,
            modified_ms: 0,
            key: 0,
            fingerprint: 0,
        }
    }
}

/// No labels, shared by all volumes that have none.
pub(crate) fn no_labels() -> Arc<Labels> {
    static NONE: LazyLock<Arc<Labels>> = LazyLock::new(Arc::default);
    Arc::clone(&NONE)
}

/// Labels as a volume holds them.
pub(crate) fn shared_labels(labels: Labels) -> Arc<Labels> {
    if labels.is_empty() { no_labels() } else { Arc::new(labels) }
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
    /// The mutation took effect (now, or when the same sequence number was first applied); or a
    /// node was cordoned, or is not any more, or a replacement was noted or forgotten.
    Done,
    /// The volume exists from now on.
    VolumeCreated(VolumeInfo),
    /// The volume was created by an earlier command with the same key, and is like this now.
    VolumeRepeated(VolumeInfo),
    /// A volume of that name was there already; nothing of it changes.
    VolumeExists(VolumeInfo),
    /// The volume is like this from now on.
    VolumeChanged(VolumeInfo),
    /// The volume is gone.
    VolumeDeleted {
        /// So many sessions of it were ended.
        sessions_ended: u32,
    },
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
    /// As many volumes, labels, sessions, replicas or cordoned nodes as there may be.
    #[error("too many volumes, labels, sessions, replicas or cordoned nodes")]
    LimitReached = 5,
    /// Not a command of this version, a size or name out of bounds, a mutation of another volume
    /// than the session's, a sequence number behind the session's window, a replica id that was
    /// given before, or a replacement of or by a replica that is not known.
    #[error("malformed command")]
    BadCommand = 6,
    /// The key was used before, to create another volume, or this one with other properties.
    #[error("the key was used for something else")]
    KeyReused = 7,
    /// The volume has sessions.
    #[error("the volume is attached")]
    Attached = 8,
    /// The volume is larger than the size asked for, and what lies behind it was not given up.
    #[error("the volume would shrink")]
    Shrinks = 9,
    /// The volume has another size than the command says.
    #[error("the volume has another size by now")]
    Changed = 10,
}

impl Rejection {
    /// The rejection stored as `code`.
    #[must_use]
    pub const fn from_u8(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::UnknownSession,
            2 => Self::StaleEpoch,
            3 => Self::UnknownVolume,
            4 => Self::PastEnd,
            5 => Self::LimitReached,
            6 => Self::BadCommand,
            7 => Self::KeyReused,
            8 => Self::Attached,
            9 => Self::Shrinks,
            10 => Self::Changed,
            _ => return None,
        })
    }
}
