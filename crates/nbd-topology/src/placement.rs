//! Export name to shard.

use std::num::NonZeroU32;

use xxhash_rust::xxh3::xxh3_64;

use crate::ids::ShardId;

/// The volume that the empty export name stands for.
pub const DEFAULT_VOLUME_NAME: &str = "default";

/// The shard that holds the volume of this name: XXH3-64 (seed 0) of the name's bytes, modulo the
/// cluster's shard count. The empty name is placed like [`DEFAULT_VOLUME_NAME`], the volume it
/// means. Changing this loses every volume there is.
#[must_use]
pub fn shard_of(export_name: &[u8], shard_count: NonZeroU32) -> ShardId {
    let name = if export_name.is_empty() { DEFAULT_VOLUME_NAME.as_bytes() } else { export_name };
    let Ok(shard) = u32::try_from(xxh3_64(name) % u64::from(shard_count.get())) else {
        unreachable!("a remainder is less than its divisor");
    };
    ShardId(shard)
}
