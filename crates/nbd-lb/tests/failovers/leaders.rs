//! Losing the leader.

use std::thread;
use std::time::{Duration, Instant};

use nbd_rpc::v1;
use nbd_rpc::v1::admin_client::AdminClient;
use nbd_testkit::{Cluster, Fault};
use tokio::runtime::Runtime;

/// Time for another to lead. Far above what it takes: these are debug builds on machines that do
/// other things.
const DEADLINE: Duration = Duration::from_secs(30);

/// Time after which a transfer that has not come about is asked for again. It lapses after an
/// election timeout.
const TRANSFER_AGAIN: Duration = Duration::from_secs(2);

/// A way of losing the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT once another leads.
    Freeze,
    /// Its connections to the other replicas break, until another leads.
    CutOff,
    /// Nothing passes between it and the other replicas, until another leads.
    Silence,
    /// An operator hands leadership over.
    Transfer,
    /// SIGTERM.
    Stop,
}

impl Way {
    pub(crate) const ALL: [Self; 6] =
        [Self::Kill, Self::Freeze, Self::CutOff, Self::Transfer, Self::Silence, Self::Stop];
}

/// Loses the leader, waits until another leads, and brings the lost one back. Returns when all
/// replicas serve.
///
/// # Panics
/// If any of that does not come about in time.
pub(crate) fn lose_leader(cluster: &mut Cluster, way: Way) {
    let leader = cluster.wait_leader();
    match way {
        Way::Kill => cluster.at_mut(leader).kill_9(),
        Way::Freeze => cluster.at_mut(leader).pause(),
        Way::CutOff => cluster.network().set_around(leader, Fault::Cut),
        Way::Silence => cluster.network().set_around(leader, Fault::Hold),
        Way::Transfer => transfer(cluster, leader),
        Way::Stop => assert!(cluster.at_mut(leader).terminate().success(), "a stop ends well"),
    }
    assert!(leads_elsewhere(cluster, leader, DEADLINE), "nobody leads {DEADLINE:?} after {way:?}");
    match way {
        Way::Kill | Way::Stop => cluster.at_mut(leader).start(),
        Way::Freeze => cluster.at_mut(leader).resume(),
        Way::CutOff | Way::Silence => cluster.network().heal(),
        Way::Transfer => {}
    }
    cluster.wait_until_serving();
}

/// Whether another node comes to lead in time.
fn leads_elsewhere(cluster: &Cluster, lost: usize, time: Duration) -> bool {
    let started = Instant::now();
    loop {
        if cluster.leader().is_some_and(|leader| leader != lost) {
            return true;
        }
        if started.elapsed() > time {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Asks the leader to hand over to whoever is most advanced, until it has.
fn transfer(cluster: &Cluster, leader: usize) {
    let (host, port) = cluster.at(leader).grpc_address();
    let runtime = Runtime::new().unwrap();
    let started = Instant::now();
    loop {
        let asked = runtime.block_on(async {
            let channel = nbd_rpc::channel(&format!("{host}:{port}")).unwrap().connect_lazy();
            let to = v1::ShardAddress { cluster: "test".to_owned(), shard: 0, forwarded: false };
            let request = v1::TransferLeadershipRequest { to: Some(to), replica: 0 };
            AdminClient::new(channel).transfer_leadership(request).await
        });
        if leads_elsewhere(cluster, leader, TRANSFER_AGAIN) {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "no transfer comes about: {asked:?}");
    }
}
