//! The clients of `interop` once more, with three replicas, attached to one that does not lead: it
//! forwards what they ask, and they must not notice.

#[path = "../interop/cases/mod.rs"]
mod cases;

use nbd_testkit::{Cluster, ClusterBuilder};

/// The cluster that all tests of this binary meet.
fn start(builder: ClusterBuilder) -> Cluster {
    let mut cluster = builder.replicas(3).start();
    cluster.wait_until_serving();
    cluster.put_in_front(cluster.followers()[0]);
    cluster
}
