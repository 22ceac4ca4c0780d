//! Sessions: the clients of volumes.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Timestamp;

/// A session: one logical client of a volume, through the loss of any replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Its id: 32 hexadecimal digits.
    #[schema(example = "00000000000000000000000000000abc")]
    pub id: String,
    /// The volume's name.
    pub volume: String,
    /// The shard that holds the volume.
    pub shard: u32,
    /// How often it was opened or resumed.
    pub epoch: u32,
    /// How it is attached. Absent while it is not: it waits to be resumed, or to expire.
    pub attachment: Option<Attachment>,
}

/// How a session is attached to the leader of its shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// Where the client is, as the process that it is connected to sees it.
    #[schema(example = "10.0.0.9:50312")]
    pub client: String,
    /// The node or load balancer that the client is connected to.
    pub via: String,
    /// The node that its requests go to.
    pub leader: String,
    /// When the client connected.
    pub since: Timestamp,
    /// When it was attached to this leader: the counts begin with it.
    pub attached: Timestamp,
    /// What was read and written since.
    pub counts: IoCounts,
    /// Requests under way.
    pub pending: u32,
}

/// What was read and written, since some moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IoCounts {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes, trims and write-zeroes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Microseconds that reads took at the leader, all together.
    pub read_us: u64,
    /// Microseconds that writes, trims and write-zeroes took at the leader, all together.
    pub write_us: u64,
}
