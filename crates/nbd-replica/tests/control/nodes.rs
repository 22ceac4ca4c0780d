//! Cordoned nodes, replaced replicas, and what nodes say of themselves.

use std::time::{Duration, Instant};

use nbd_rpc::v1;
use nbd_testkit::Cluster;
use tonic::Code;

use crate::support::{Caller, FLAGS, MIB, cluster, wait_until};

fn leader_is(cluster: &Cluster, wanted: impl Fn(usize) -> bool) -> bool {
    cluster.leader().is_some_and(wanted)
}

#[test]
fn a_cordoned_node_gives_leadership_away_and_leads_only_if_it_must() {
    let mut cluster = cluster();
    let first = cluster.wait_leader();
    let followers = cluster.followers();
    let caller = Caller::of(cluster.at(followers[0]));
    let volume = caller.create("v", 8 * MIB, "").volume.unwrap().id;
    let mut client = cluster.at(first).connect("v").unwrap();
    let name = cluster.at(first).name().to_owned();
    caller.cordon(&name, true);
    assert_eq!(caller.shard().cordoned, [name.as_str()]);
    wait_until("another leader", || leader_is(&cluster, |at| at != first));
    client.write(0, &[1; 4096]).unwrap();
    // It is not handed back, neither by accident nor by request.
    let request = v1::TransferLeadershipRequest {
        to: Some(v1::ShardAddress { cluster: "test".to_owned(), ..Default::default() }),
        replica: 0,
    };
    let transfer = |replica| {
        let request = v1::TransferLeadershipRequest { replica, ..request.clone() };
        caller.admin(|mut client| {
            let request = request.clone();
            async move { client.transfer_leadership(request).await }
        })
    };
    let members = caller.shard().members.unwrap().members;
    let id = |name: &str| {
        let replicas = members.iter().filter_map(|member| member.replica.as_ref());
        replicas.filter(|replica| replica.node == name).map(|replica| replica.id).next().unwrap()
    };
    assert_eq!(transfer(id(&name)).unwrap_err().code(), Code::FailedPrecondition);
    transfer(0).unwrap();
    wait_until("the third to lead or the second still", || leader_is(&cluster, |at| at != first));
    // Cordoned, both that could take over: one of them does when the last is lost, and the volume
    // stays available.
    let last = cluster.wait_leader();
    let third = followers.iter().copied().find(|at| *at != last).unwrap();
    caller.cordon(cluster.at(third).name(), true);
    cluster.at_mut(last).kill_9();
    wait_until("a cordoned leader", || leader_is(&cluster, |at| at != last));
    let survivor = if last == first { third } else { first };
    let mut client = cluster.at(survivor).connect("v").unwrap();
    client.write(4096, &[2; 4096]).unwrap();
    // And it goes again as soon as there is one that is not.
    cluster.at_mut(last).start();
    wait_until("the one that is not cordoned", || leader_is(&cluster, |at| at == last));
    assert_eq!(client.read(4096, 4096).unwrap(), [2; 4096]);
    let there = Caller::of(cluster.at(last));
    there.cordon(&name, false);
    there.cordon(cluster.at(third).name(), false);
    assert!(there.shard().cordoned.is_empty());
    assert_eq!(there.sessions(volume).len(), 2, "nobody was disconnected but the killed node's");
}

#[test]
fn a_replacement_goes_on_though_its_leader_was_killed() {
    let mut cluster = cluster();
    let leader = cluster.wait_leader();
    let followers = cluster.followers();
    let caller = Caller::of(cluster.at(followers[0]));
    caller.create("v", 64 * MIB, "");
    let mut client = cluster.at(followers[0]).connect("v").unwrap();
    // More than the log keeps, so that the new replica has to fetch it, slowly.
    for round in 0..3 {
        for mib in 0..24 {
            client.write(mib * MIB, &vec![round + 1; 1 << 20]).unwrap();
        }
    }
    let slow = [&FLAGS[..], &["--resync-bytes-per-second=2MiB"]].concat();
    let new = cluster.join("nbd-1-4", &slow);
    let node = cluster.at(new).name().to_owned();
    let (host, port) = cluster.at(new).grpc_address();
    let members = || caller.shard().members.unwrap().members;
    let replica_of = |name: &str| {
        let found = members()
            .into_iter()
            .find(|member| member.replica.as_ref().is_some_and(|replica| replica.node == name));
        found.map(|member| (member.replica.unwrap().id, member.voter))
    };
    wait_until("the new one to be a learner", || replica_of(&node).is_some());
    let (old, _) = replica_of(cluster.at(followers[1]).name()).unwrap();
    let request = v1::ReplaceReplicaRequest {
        to: Some(v1::ShardAddress { cluster: "test".to_owned(), ..Default::default() }),
        replica: old,
        node: node.clone(),
        grpc: format!("{host}:{port}"),
    };
    let replace = || {
        caller.admin(|mut client| {
            let request = request.clone();
            async move { client.replace_replica(request).await }
        })
    };
    let new_id = replace().unwrap().replica;
    assert_eq!(replica_of(&node), Some((new_id, false)), "it votes too soon for this test");
    let replacements = caller.shard().replacements;
    assert_eq!(replacements, [v1::Replacement { old, new: new_id }]);
    cluster.at_mut(leader).kill_9();
    wait_until("another leader", || leader_is(&cluster, |at| at != leader));
    assert_eq!(caller.shard().replacements, replacements, "known to whoever leads");
    cluster.at_mut(leader).start();
    wait_until("the new one to have replaced the old", || {
        replica_of(&node) == Some((new_id, true))
            && members()
                .iter()
                .all(|member| member.replica.as_ref().is_some_and(|replica| replica.id != old))
    });
    assert!(caller.shard().replacements.is_empty());
    assert_eq!(members().len(), 3);
    // Asked again, it is so already.
    assert_eq!(replace().unwrap().replica, new_id);
    assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
}

#[test]
fn no_replica_joins_on_a_cordoned_node() {
    let mut cluster = cluster();
    let caller = Caller::of(cluster.at(0));
    caller.cordon("nbd-1-4", true);
    cluster.join("nbd-1-4", &FLAGS);
    let members = || caller.shard().members.unwrap().members.len();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        assert_eq!(members(), 3);
        std::thread::sleep(Duration::from_millis(100));
    }
    caller.cordon("nbd-1-4", false);
    wait_until("it to join by itself", || members() == 4);
}

#[test]
fn a_node_says_how_it_stands() {
    let cluster = cluster();
    for at in 0..3 {
        let caller = Caller::of(cluster.at(at));
        let request = v1::GetNodeRequest { cluster: "test".to_owned() };
        let node = caller.once(|mut client| async move { client.get_node(request).await }).unwrap();
        assert_eq!(node.node, cluster.at(at).name());
        assert_eq!(node.version, env!("CARGO_PKG_VERSION"));
        assert!(node.started_ms > 1_700_000_000_000, "milliseconds since 1970");
        assert!(node.disk_bytes > node.disk_free_bytes && node.disk_free_bytes > 0);
        assert!(node.writable_bytes > 0 && node.writable_bytes < node.disk_bytes);
        let [shard] = &node.shards[..] else { panic!("{:?}", node.shards) };
        let status = shard.status.as_ref().unwrap();
        let leads = status.role() == v1::status_reply::Role::Leader;
        assert_eq!((shard.shard, leads), (0, cluster.wait_leader() == at));
    }
}
