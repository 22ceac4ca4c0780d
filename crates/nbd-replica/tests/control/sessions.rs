//! Who is attached, what they move, and how they are ended.

use nbd_testkit::{Cluster, NbdClient};
use tonic::Code;

use crate::support::{Caller, MIB, assert_disconnected, cluster, wait_until};

/// Ends the only session of the volume, and sees to it that its client is disconnected and stays
/// so.
#[track_caller]
fn end_the_session_of(caller: &Caller, volume: u64, client: &mut NbdClient) {
    let sessions = caller.sessions(volume);
    let [session] = &sessions[..] else { panic!("{sessions:?}") };
    caller.end(&session.id).unwrap();
    assert_disconnected(client);
    assert!(caller.sessions(volume).is_empty(), "nobody has opened it again");
    assert_eq!(caller.end(&session.id).unwrap_err().code(), Code::NotFound);
}

// Goal: wherever a client is attached, an operator sees it, and ends it for good.
#[test]
fn a_session_that_is_ended_loses_its_client_wherever_that_is_attached() {
    let cluster = cluster();
    let (leader, follower) = (cluster.wait_leader(), cluster.followers()[0]);
    let caller = Caller::of(cluster.at(follower));
    let volume = caller.create("v", 8 * MIB, "").volume.unwrap().id;
    let balancer = cluster.balancer_with(&["--name=lb-7"]);
    let splicer = cluster.balancer_with(&["--mode=splice"]);
    let servers = [
        (cluster.at(leader).nbd_address(), Some(cluster.at(leader).name())),
        (cluster.at(follower).nbd_address(), Some(cluster.at(follower).name())),
        (balancer.nbd_address(), Some("lb-7")),
        // The session is that of the replica behind it.
        (splicer.nbd_address(), None),
    ];
    for (address, name) in servers {
        for reads_only in [false, true] {
            let mut client = NbdClient::connect(address, "v").unwrap();
            if !reads_only {
                client.write(0, &[1; 4096]).unwrap();
            }
            client.read(0, 4096).unwrap();
            let sessions = caller.sessions(volume);
            let attachment = sessions[0].attachment.as_ref().unwrap();
            if let Some(name) = name {
                assert_eq!(attachment.via, name);
                let own = client.stream().local_addr().unwrap();
                assert_eq!(attachment.client, own.to_string());
            }
            assert!(attachment.since_ms > 0 && attachment.attached_ms >= attachment.since_ms);
            end_the_session_of(&caller, volume, &mut client);
        }
    }
    assert!(balancer.is_ready() && splicer.is_ready());
    let list = balancer.get("/sessions").json();
    assert_eq!(list["total"], 0, "{list}");
}

/// The counts of the only volume that moved something, as `Activity` has them.
fn counts(caller: &Caller) -> nbd_rpc::v1::IoCounts {
    let activity = caller.activity();
    let [volume] = &activity.volumes[..] else { panic!("{activity:?}") };
    assert_eq!(volume.counts, activity.total);
    volume.counts.unwrap()
}

fn load(client: &mut NbdClient) {
    for number in 0..50 {
        client.write(number * 8192, &[5; 8192]).unwrap();
    }
    for number in 0..30 {
        client.read(number * 4096, 4096).unwrap();
    }
    client.trim(0, 65536).unwrap();
    client.flush().unwrap();
}

fn expect_load(counts: &nbd_rpc::v1::IoCounts, times: u64) {
    assert_eq!((counts.writes, counts.write_bytes), (51 * times, 50 * 8192 * times));
    assert_eq!((counts.reads, counts.read_bytes), (30 * times, 30 * 4096 * times));
    assert!(counts.write_us > 0, "a write takes more than a microsecond");
    assert!(counts.write_us < 60_000_000 && counts.read_us < 60_000_000, "{counts:?}");
}

fn counts_follow(cluster: &Cluster, at: usize) {
    let caller = Caller::of(cluster.at(at));
    let volume = caller.create("v", 8 * MIB, "").volume.unwrap().id;
    let incarnation = caller.activity().incarnation;
    assert!(incarnation > 0);
    let mut client = cluster.at(at).connect("v").unwrap();
    load(&mut client);
    let sessions = caller.sessions(volume);
    let attachment = sessions[0].attachment.as_ref().unwrap();
    expect_load(attachment.counts.as_ref().unwrap(), 1);
    assert_eq!((attachment.pending, sessions[0].name.as_str()), (0, "v"));
    expect_load(&counts(&caller), 1);
    // What was counted stays with the volume; an attachment begins anew.
    drop(client);
    wait_until("the session to be closed", || caller.sessions(volume).is_empty());
    expect_load(&counts(&caller), 1);
    let mut client = cluster.at(at).connect("v").unwrap();
    load(&mut client);
    let sessions = caller.sessions(volume);
    expect_load(sessions[0].attachment.as_ref().unwrap().counts.as_ref().unwrap(), 1);
    expect_load(&counts(&caller), 2);
    assert_eq!(caller.activity().volumes[0].sessions, 1);
    assert_eq!(caller.activity().incarnation, incarnation);
    caller.delete(volume, true).unwrap();
    assert!(caller.activity().volumes.is_empty());
}

#[test]
fn counts_are_those_of_a_load_at_the_leader() {
    let cluster = cluster();
    counts_follow(&cluster, cluster.wait_leader());
}

#[test]
fn counts_are_those_of_a_load_through_a_follower() {
    let cluster = cluster();
    counts_follow(&cluster, cluster.followers()[0]);
}

#[test]
fn sessions_come_in_pages() {
    let cluster = cluster();
    let caller = Caller::of(cluster.at(0));
    let volume = caller.create("v", MIB, "").volume.unwrap().id;
    let clients: Vec<_> = (0..5).map(|_| cluster.at(1).connect("v").unwrap()).collect();
    let (mut after, mut seen) = (Vec::new(), Vec::new());
    loop {
        let request = nbd_rpc::v1::ListSessionsRequest {
            target: crate::support::target(),
            volume,
            after: after.clone().into(),
            limit: 2,
        };
        let page = caller.once(|mut client| async move { client.list_sessions(request).await });
        let page = page.unwrap();
        seen.extend(page.sessions.iter().map(|session| session.id.clone()));
        if !page.more {
            break;
        }
        after = seen.last().unwrap().to_vec();
    }
    assert_eq!(seen.len(), 5);
    assert!(seen.is_sorted());
    drop(clients);
}
