//! Volumes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Timestamp;

/// Words attached to a volume, to find it by. At most 64; a name has 1 to 63 bytes, a value up to
/// 255.
pub type Labels = BTreeMap<String, String>;

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its name: what clients attach to. 1 to 4096 bytes, permanent.
    #[schema(example = "vol1", min_length = 1, max_length = 4096)]
    pub name: String,
    /// Its number, never used for another volume, as 16 hexadecimal digits.
    #[schema(example = "0000000000000001")]
    pub id: String,
    /// The shard that holds it.
    pub shard: u32,
    /// Bytes it has: a multiple of 512, 4 KiB to 64 TiB.
    #[schema(example = 1_073_741_824_u64)]
    pub size: u64,
    /// Free text.
    pub description: String,
    /// Words to find it by.
    pub labels: Labels,
    /// When it was created. Absent if it was by an older version.
    pub created: Option<Timestamp>,
    /// When its size, description or labels changed last.
    pub modified: Option<Timestamp>,
}

/// A volume, with what it takes up and who uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeDetails {
    /// The volume.
    #[serde(flatten)]
    pub volume: Volume,
    /// Bytes that it takes up on each replica: a multiple of 64 KiB.
    pub allocated: u64,
    /// Sessions it has.
    pub sessions: u32,
    /// Node that leads its shard, if one does.
    pub leader: Option<String>,
}

/// What a new volume is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name: 1 to 4096 bytes.
    #[schema(example = "vol1", min_length = 1, max_length = 4096)]
    pub name: String,
    /// Bytes it has: a multiple of 512, 4 KiB to 64 TiB. Default: as configured for the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        example = 1_073_741_824_u64,
        minimum = 4096,
        maximum = 70_368_744_177_664_u64,
        multiple_of = 512
    )]
    pub size: Option<u64>,
    /// Free text, up to 4096 bytes.
    #[serde(default)]
    #[schema(max_length = 4096)]
    pub description: String,
    /// Words to find it by.
    #[serde(default)]
    pub labels: Labels,
}

/// What is to change of a volume's description and labels: a JSON merge patch (RFC 7396).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateVolume {
    /// Absent: stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 4096)]
    pub description: Option<String>,
    /// Labels to set, and those to take away: the ones that are null.
    #[serde(default)]
    pub labels: BTreeMap<String, Option<String>>,
}

/// Asks for the next requests of a volume to be traced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TraceVolume {
    /// How many requests of each attached client.
    #[schema(example = 10, minimum = 1, maximum = 1000)]
    pub requests: u32,
}

/// What came of asking for traces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Traced {
    /// How many requests of each attached client will be traced, if it asks as many.
    pub requests: u32,
    /// Attached sessions that were asked; without any, nothing will be traced.
    pub sessions: u32,
    /// Where Jaeger shows the volume's traces; null if it is not configured where that is.
    #[schema(example = "http://localhost:16686/search?service=nbd-replica")]
    pub search: Option<String>,
}

/// A volume's new size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// Bytes it is to have: a multiple of 512, 4 KiB to 64 TiB.
    #[schema(
        example = 2_147_483_648_u64,
        minimum = 4096,
        maximum = 70_368_744_177_664_u64,
        multiple_of = 512
    )]
    pub size: u64,
    /// Allow it to become smaller, attached or not: what lies behind its new end is lost.
    #[serde(default)]
    pub force: bool,
}
