//! The cluster that clients meet.

use nbd_testkit::Cluster;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// A cluster whose volumes have `size`, as in `64MiB`. Its log is so short that checkpoints run
/// while the clients write, and what they read comes from the chunk store as well as from the log.
pub(crate) fn cluster(size: &str) -> Cluster {
    let builder = Cluster::builder().default_size(size);
    let builder = builder.argument("--log-segment-bytes=8MiB").argument("--log-bytes-max=64MiB");
    crate::start(builder.argument("--checkpoint-log-bytes=8MiB"))
}
