//! Clients that other people wrote, against a real node: what they see is what the NBD document
//! promises them, and what they wrote is there.
//!
//! All of it runs three times: here with one replica, in `interop_replicated` attached to one of
//! three that does not lead, and in the load balancer's `interop_balanced` through a load balancer.

mod cases;

use nbd_testkit::{Cluster, ClusterBuilder};

/// The cluster that all tests of this binary meet.
fn start(builder: ClusterBuilder) -> Cluster {
    builder.start()
}
