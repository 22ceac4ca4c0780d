//! The clients of `interop` once more, with three replicas, attached to one that does not lead: it
//! forwards what they ask, and they must not notice.

#[path = "../interop/cluster.rs"]
mod cluster;
#[path = "../interop/command.rs"]
mod command;
#[path = "../interop/content.rs"]
mod content;
#[path = "../interop/ext4.rs"]
mod ext4;
#[path = "../interop/fio.rs"]
mod fio;
#[path = "../interop/map.rs"]
mod map;
#[path = "../interop/multi_conn.rs"]
mod multi_conn;
#[path = "../interop/nbdcopy.rs"]
mod nbdcopy;
#[path = "../interop/nbdinfo.rs"]
mod nbdinfo;
#[path = "../interop/old_clients.rs"]
mod old_clients;
#[path = "../interop/qemu.rs"]
mod qemu;
#[path = "../interop/restart.rs"]
mod restart;
#[path = "../interop/trouble.rs"]
mod trouble;

use nbd_testkit::{Cluster, ClusterBuilder};

use self::cluster::{KIB, MIB, cluster};

/// The cluster that all tests of this binary meet.
fn start(builder: ClusterBuilder) -> Cluster {
    let mut cluster = builder.replicas(3).start();
    cluster.wait_until_serving();
    cluster.put_in_front(cluster.followers()[0]);
    cluster
}
