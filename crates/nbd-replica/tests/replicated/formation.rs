//! A cluster that begins, and any replica of it can be attached to.

use std::thread;
use std::time::Duration;

use nbd_testkit::list_exports;

use crate::{MIB, builder, cluster};

#[test]
fn a_new_cluster_waits_for_all_its_replicas_and_then_serves() {
    let mut cluster = builder().prepare();
    cluster.at_mut(0).spawn();
    cluster.at_mut(1).spawn();
    // A majority could elect a leader and must not: the third might hold data of an older life.
    thread::sleep(Duration::from_secs(1));
    for at in [0, 1] {
        assert!(cluster.at_mut(at).is_running(), "{}", cluster.at(at).tail());
        assert!(!cluster.at(at).is_ready());
    }
    cluster.at_mut(2).spawn();
    cluster.wait_until_serving();
    assert!(cluster.nodes().iter().all(|node| node.is_ready()));
    let health: Vec<_> = (0..3).map(|at| cluster.at(at).health().unwrap()).collect();
    let leader = cluster.at(cluster.wait_leader()).name();
    for health in &health {
        assert_eq!(health.shards[0].leader.as_deref(), Some(leader), "{health:?}");
    }
    let leaders = health.iter().filter(|health| health.shards[0].role == "leader").count();
    assert_eq!(leaders, 1, "{health:?}");
}

#[test]
fn the_counter_of_health_is_one_for_all_replicas() {
    // That a busy disk makes it fail in time is another test's matter.
    let mut cluster = builder().argument("--health-deadline=20s").start();
    cluster.wait_until_serving();
    let counter = |at: usize| {
        // Past the time for which probes share a result.
        thread::sleep(Duration::from_millis(150));
        cluster.at(at).health().unwrap().shards[0].counter.unwrap()
    };
    // Each probe moves it by one, up or down.
    for at in [0, 1, 2, 1, 0, 2] {
        let before = counter((at + 1) % 3);
        let after = counter(at);
        assert_eq!((after - before).abs(), 1, "{before} at one, then {after} at the next");
    }
}

#[test]
fn every_replica_takes_requests_and_shows_what_others_took() {
    let cluster = cluster();
    let mut clients: Vec<_> = (0..3).map(|at| cluster.at(at).connect("volume").unwrap()).collect();
    for round in 0..60_u8 {
        let (writer, offset) = (usize::from(round % 3), u64::from(round) * 70_001);
        let data = vec![round + 1; 9000];
        clients[writer].write(offset, &data).unwrap();
        for (at, client) in clients.iter_mut().enumerate() {
            let seen = client.read(offset, data.len()).unwrap();
            assert!(seen == data, "round {round}: written at {writer}, read at {at}");
        }
    }
    clients[0].trim(0, MIB).unwrap();
    clients[1].write_zeroes(MIB, MIB, true).unwrap();
    clients[2].flush().unwrap();
    for client in &mut clients {
        let extents = client.block_status(0, 2 * MIB).unwrap();
        assert!(extents[0].hole && extents[0].len >= MIB, "{extents:?}");
        assert!(!extents[1].hole && extents[1].zero, "{extents:?}");
        assert!(client.read(0, 2 << 20).unwrap().iter().all(|byte| *byte == 0));
    }
    for at in 0..3 {
        assert_eq!(list_exports(cluster.at(at).nbd_address()).unwrap(), ["volume"]);
    }
    drop(clients);
    let digests = cluster.wait_until_equal();
    assert_eq!(digests.len(), 1);
}
