//! What attaching to a name that nobody created does.

use nbd_service::{ByteSize, VolumePolicy};
use nbd_store::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_SIZE_MULTIPLE};

/// What happens when a client attaches to a name nobody created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumesConfig {
    /// Whether the first attach creates the volume.
    pub(crate) auto_create: bool,
    /// Size, in bytes, of a volume created that way.
    pub(crate) default_size: u64,
}

/// A volume size that the store cannot make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("default_size is {0}: allowed is 4KiB to 64TiB, in steps of 512 bytes")]
pub struct InvalidDefaultSize(pub ByteSize);

impl VolumesConfig {
    /// As the cluster's configuration says.
    ///
    /// # Errors
    /// A size that no volume can have.
    pub const fn new(policy: VolumePolicy) -> Result<Self, InvalidDefaultSize> {
        let default_size = policy.default_size.bytes();
        let valid = default_size >= VOLUME_BYTES_MIN
            && default_size <= VOLUME_BYTES_MAX
            && default_size.is_multiple_of(VOLUME_SIZE_MULTIPLE);
        if !valid {
            return Err(InvalidDefaultSize(policy.default_size));
        }
        Ok(Self { auto_create: policy.auto_create, default_size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_size_must_be_one_that_volumes_can_have() {
        let policy = |bytes| VolumePolicy { default_size: ByteSize::new(bytes), auto_create: true };
        let made = VolumesConfig::new(policy(1 << 30)).unwrap();
        assert_eq!(made, VolumesConfig { auto_create: true, default_size: 1 << 30 });
        for bytes in [0, 4095, 4097, (64 << 40) + 512] {
            let error = VolumesConfig::new(policy(bytes)).unwrap_err();
            assert!(error.to_string().contains("allowed is 4KiB to 64TiB"), "{error}");
        }
    }
}
