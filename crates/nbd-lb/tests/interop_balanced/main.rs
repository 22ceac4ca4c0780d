//! The clients of `nbd-replica`'s `interop` once more, attached to a load balancer in front of two
//! shards: it must serve them as a replica does, and list the volumes of both shards as one.

#[path = "../../../nbd-replica/tests/interop/cases/mod.rs"]
mod cases;

use nbd_testkit::{Cluster, ClusterBuilder};

/// The cluster that all tests of this binary meet.
fn start(builder: ClusterBuilder) -> Cluster {
    let mut cluster = builder.shards(&[&["nbd-1-1"], &["nbd-2-1"]]).start();
    cluster.put_balancer_in_front();
    cluster
}
