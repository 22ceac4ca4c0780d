//! What takes long. An operation is nothing but a way to look at the cluster: its id says what to
//! look for, so that any control API can tell how it stands, and none has to remember it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// A replica is added to a shard.
    Add,
    /// A replica takes the place of another.
    Replace,
    /// A replica that was away fetches what it lacks.
    Resync,
    /// Leadership is moved away from a node.
    Drain,
}

/// How an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationState {
    /// It is under way.
    Running,
    /// It is done.
    Done,
    /// It was cancelled, or cannot succeed any more.
    Ended,
}

/// Something that takes long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// What to ask for it by.
    #[schema(example = "replace-0-2-4")]
    pub id: String,
    /// What it does.
    pub kind: OperationKind,
    /// How it stands.
    pub state: OperationState,
    /// How it stands, in words.
    pub message: String,
    /// The shard it is about, if one.
    pub shard: Option<u32>,
    /// The node it is about: the one that is added, or drained.
    pub node: Option<String>,
    /// How far it is. Absent if that is not known.
    pub progress: Option<Progress>,
    /// Whether it can be cancelled as things stand.
    pub cancellable: bool,
}

/// How far something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// What is done, in `unit`.
    pub done: u64,
    /// What there is to do.
    pub total: u64,
    /// What is counted: `bytes` or `shards`.
    pub unit: ProgressUnit,
    /// Estimated seconds until it is done. Absent if not known.
    pub seconds_left: Option<u64>,
}

/// What progress is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProgressUnit {
    /// Bytes.
    Bytes,
    /// Shards.
    Shards,
}

/// One of the server-sent events that follow an operation, as its fields are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OperationEvent {
    /// What `data` is.
    pub event: OperationEventKind,
    /// JSON: an [`Operation`], or a [`Problem`](crate::Problem).
    #[schema(content_media_type = "application/json")]
    pub data: String,
}

/// What an event tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OperationEventKind {
    /// How the operation stands, now or after a change.
    Operation,
    /// Why it cannot be told at present, or any more.
    Problem,
}

impl OperationEventKind {
    /// How it is written in a stream.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Operation => "operation",
            Self::Problem => "problem",
        }
    }
}
