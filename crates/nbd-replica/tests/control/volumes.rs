//! The life of volumes.

use std::collections::HashMap;

use nbd_proto::NbdError;
use nbd_rpc::{conflict_of, v1};
use nbd_testkit::NbdClient;
use tonic::Code;

use crate::support::{Caller, MIB, assert_disconnected, cluster, target, wait_until};

fn conflict(status: &tonic::Status) -> (v1::Conflict, v1::ConflictDetail) {
    let detail = conflict_of(status).unwrap_or_else(|| panic!("{status:?}"));
    (v1::Conflict::try_from(detail.conflict).unwrap(), detail)
}

#[test]
fn volumes_are_created_listed_changed_and_deleted_through_a_follower() {
    let cluster = cluster();
    let follower = Caller::of(cluster.at(cluster.followers()[0]));
    let leader = Caller::of(cluster.at(cluster.wait_leader()));
    let made = follower.create("vol/1", 8 * MIB, "key-1");
    let volume = made.volume.unwrap();
    assert!(!made.repeated && volume.id != 0);
    assert_eq!((volume.size, volume.labels["env"].as_str()), (8 * MIB, "test"));
    assert_eq!((volume.created_ms, volume.modified_ms), (1_700_000_000_000, 1_700_000_000_000));
    // The same call again, and others that are not the same.
    let again = leader.create("vol/1", 8 * MIB, "key-1");
    assert_eq!((again.repeated, again.volume.as_ref()), (true, Some(&volume)));
    let create = |size, key: &str| {
        let request = v1::CreateVolumeRequest {
            target: target(),
            name: "vol/1".to_owned(),
            size,
            key: key.to_owned(),
            ..Default::default()
        };
        let refused =
            follower.once(|mut client| async move { client.create_volume(request).await });
        conflict(&refused.unwrap_err())
    };
    let (kind, detail) = create(8 * MIB, "");
    assert_eq!((kind, detail.volume.as_ref()), (v1::Conflict::VolumeExists, Some(&volume)));
    assert_eq!(create(16 * MIB, "key-1").0, v1::Conflict::KeyReused);

    leader.create("b", 16 * MIB, "");
    leader.create("a", 4 * MIB, "");
    let names = |change: fn(&mut v1::ListVolumesRequest)| {
        follower.list(change).into_iter().map(|volume| volume.name).collect::<Vec<_>>()
    };
    assert_eq!(names(|_| ()), ["a", "b", "vol/1"]);
    assert_eq!(names(|query| query.prefix = "vol".to_owned()), ["vol/1"]);
    let by_size = names(|query| {
        (query.order, query.descending) = (v1::VolumeOrder::Size.into(), true);
    });
    assert_eq!(by_size, ["b", "vol/1", "a"]);
    let behind = names(|query| {
        query.after = Some(v1::VolumePosition { name: "a".to_owned(), value: 0 });
        query.limit = 1;
    });
    assert_eq!(behind, ["b"]);
    assert!(
        names(|query| query.labels = [("env".to_owned(), "prod".to_owned())].into()).is_empty()
    );

    let request = v1::UpdateVolumeRequest {
        target: target(),
        volume: volume.id,
        description: Some("new".to_owned()),
        set_labels: [("tier".to_owned(), "1".to_owned())].into(),
        remove_labels: vec!["env".to_owned(), "none".to_owned()],
        now_ms: 1_700_000_000_001,
    };
    let updated = follower.once(|mut client| async move { client.update_volume(request).await });
    let updated = updated.unwrap().volume.unwrap();
    assert_eq!(updated.description, "new");
    assert_eq!(updated.labels, HashMap::from([("tier".to_owned(), "1".to_owned())]));
    assert_eq!(updated.modified_ms, 1_700_000_000_001);

    let shard = follower.shard();
    assert_eq!((shard.volumes, shard.provisioned), (3, 28 * MIB));
    assert_eq!(shard.members.unwrap().members.len(), 3);
    assert_eq!(follower.delete(volume.id, false).unwrap(), 0);
    assert_eq!(follower.delete(volume.id, false).unwrap_err().code(), Code::NotFound);
    assert_eq!(follower.get("vol/1").unwrap_err().code(), Code::NotFound);
    assert_eq!(names(|_| ()), ["a", "b"]);
}

// Goal: a caller that asks again until it has its answer creates each volume once, whichever answer
// got lost with a leader.
#[test]
fn volumes_are_created_once_though_the_leader_is_lost() {
    let mut cluster = cluster();
    let (leader, follower) = (cluster.wait_leader(), cluster.followers()[0]);
    let caller = Caller::of(cluster.at(follower));
    let mut ids = HashMap::new();
    for number in 0..40 {
        if number == 15 {
            cluster.at_mut(leader).kill_9();
        }
        let name = format!("v{number}");
        let made = caller.create(&name, MIB, &format!("key of {name}"));
        ids.insert(name, made.volume.unwrap().id);
    }
    let listed = caller.list(|_| ());
    assert_eq!(listed.len(), 40, "{listed:?}");
    for volume in listed {
        assert_eq!(ids[&volume.name], volume.id);
        let again = caller.create(&volume.name, MIB, &format!("key of {}", volume.name));
        assert_eq!((again.repeated, again.volume.unwrap().id), (true, volume.id));
    }
    cluster.at_mut(leader).start();
    cluster.wait_until_equal();
}

// Goal: deletion is refused while attached; forced, the client is disconnected at once, the space
// comes back, and what is created under the name is empty.
#[test]
fn a_deleted_volume_takes_its_clients_along_and_gives_its_space_back() {
    let cluster = cluster();
    let caller = Caller::of(cluster.at(0));
    let volume = caller.create("v", 32 * MIB, "").volume.unwrap().id;
    let other = caller.create("other", 32 * MIB, "").volume.unwrap().id;
    let mut clients: Vec<_> = (0..3).map(|at| cluster.at(at).connect("v").unwrap()).collect();
    let mut bystander = cluster.at(0).connect("other").unwrap();
    for mib in 0..16 {
        clients[0].write(mib * MIB, &vec![7; 1 << 20]).unwrap();
    }
    wait_until("what was written to be at home", || caller.shard().allocated >= 16 * MIB);
    assert!(caller.get("v").unwrap().allocated >= 16 * MIB);
    let (kind, detail) = conflict(&caller.delete(volume, false).unwrap_err());
    assert_eq!((kind, detail.sessions), (v1::Conflict::Attached, 3));
    assert_eq!(clients[1].read(0, 4096).unwrap(), [7; 4096], "nothing has happened");

    assert_eq!(caller.delete(volume, true).unwrap(), 3);
    clients.iter_mut().for_each(assert_disconnected);
    bystander.write(0, &[1; 4096]).unwrap();
    assert_eq!(bystander.read(0, 4096).unwrap(), [1; 4096]);
    let anew = caller.create("v", 32 * MIB, "").volume.unwrap().id;
    assert!(anew > volume, "ids are never used again");
    let mut client = cluster.at(1).connect("v").unwrap();
    assert!(client.read(0, 16 << 20).unwrap().iter().all(|byte| *byte == 0));
    wait_until("the space", || {
        // Whatever makes checkpoints happen.
        bystander.write(0, &vec![2; 1 << 20]).unwrap();
        caller.shard().allocated <= 2 * MIB
    });
    assert_eq!(caller.get("v").unwrap().allocated, 0);
    assert_eq!(caller.sessions(other).len(), 1);
    drop((client, bystander));
    cluster.wait_until_equal();
}

// Goal: clients see a new size when they attach next, and one whose volume was made smaller gets
// errors, not wrong bytes or a disconnect.
#[test]
fn a_volume_that_is_resized_under_its_clients_stays_usable() {
    let cluster = cluster();
    let caller = Caller::of(cluster.at(0));
    let volume = caller.create("v", 8 * MIB, "").volume.unwrap().id;
    let mut clients: Vec<_> = (0..3).map(|at| cluster.at(at).connect("v").unwrap()).collect();
    clients[0].write(6 * MIB, &vec![3; 1 << 20]).unwrap();
    assert_eq!(caller.resize(volume, 16 * MIB, false).unwrap(), 16 * MIB);
    for client in &mut clients {
        assert_eq!(client.size(), 8 * MIB, "as when it attached");
        client.write(0, &[1; 512]).unwrap();
    }
    let mut large = cluster.at(1).connect("v").unwrap();
    assert_eq!(large.size(), 16 * MIB);
    large.write(15 * MIB, &vec![5; 1 << 20]).unwrap();

    let (kind, detail) = conflict(&caller.resize(volume, 4 * MIB + 512, false).unwrap_err());
    assert_eq!((kind, detail.sessions), (v1::Conflict::Shrinks, 4));
    assert_eq!(caller.resize(volume, 4 * MIB + 512, true).unwrap(), 4 * MIB + 512);
    let error = |result: Result<(), nbd_testkit::ClientError>| result.unwrap_err().nbd_error();
    clients.push(large);
    let past_end = |client: &mut NbdClient| {
        assert_eq!(error(client.write(6 * MIB, &[9; 4096])), Some(NbdError::NoSpc));
        assert_eq!(error(client.trim(6 * MIB, 4096)), Some(NbdError::NoSpc));
        assert_eq!(error(client.read(6 * MIB, 4096).map(|_| ())), Some(NbdError::Inval));
        assert_eq!(error(client.block_status(6 * MIB, 4096).map(|_| ())), Some(NbdError::Inval));
        client.write(MIB, &[2; 512]).unwrap();
        assert_eq!(client.read(MIB, 512).unwrap(), [2; 512]);
    };
    clients.iter_mut().for_each(past_end);
    assert_eq!(caller.resize(volume, 16 * MIB, false).unwrap(), 16 * MIB);
    let mut again = cluster.at(2).connect("v").unwrap();
    assert!(again.read(4 * MIB, 12 << 20).unwrap().iter().all(|byte| *byte == 0));
    drop(clients);
    cluster.wait_until_equal();
}

#[test]
fn values_out_of_bounds_are_refused_by_name() {
    let cluster = cluster();
    let caller = Caller::of(cluster.at(cluster.followers()[0]));
    let good = v1::CreateVolumeRequest {
        target: target(),
        name: "v".to_owned(),
        size: MIB,
        ..Default::default()
    };
    let one = |name: &str, value: &str| HashMap::from([(name.to_owned(), value.to_owned())]);
    let long = |bytes: usize| "x".repeat(bytes);
    for (words, bad) in [
        (["name has 0", "1 to 4096"], v1::CreateVolumeRequest { name: long(0), ..good.clone() }),
        (["name has 4097", "4096"], v1::CreateVolumeRequest { name: long(4097), ..good.clone() }),
        (["size is 1000", "512"], v1::CreateVolumeRequest { size: 1000, ..good.clone() }),
        (
            ["description has 5000", "4096"],
            v1::CreateVolumeRequest { description: long(5000), ..good.clone() },
        ),
        (
            ["the name of a label", "1 to 63"],
            v1::CreateVolumeRequest { labels: one(&long(64), ""), ..good.clone() },
        ),
        (
            ["labels: the name", "letters"],
            v1::CreateVolumeRequest { labels: one("a b", ""), ..good.clone() },
        ),
        (
            ["the value of a label has 256", "255"],
            v1::CreateVolumeRequest { labels: one("a", &long(256)), ..good.clone() },
        ),
        (["key has 256", "255"], v1::CreateVolumeRequest { key: long(256), ..good.clone() }),
    ] {
        let refused = caller.once(|mut client| async move { client.create_volume(bad).await });
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let text = status.message();
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
    let request = v1::ListVolumesRequest { target: target(), limit: 1001, ..Default::default() };
    let refused = caller.once(|mut client| async move { client.list_volumes(request).await });
    assert!(refused.unwrap_err().message().contains("limit is 1001: allowed is 1 to 1000"));
    let short = caller.end(&[1; 15]).unwrap_err();
    assert!(short.message().contains("session has 15 bytes"), "{short:?}");
    let elsewhere = v1::ShardTarget { cluster: "other".to_owned(), shard: 0 };
    let request = v1::GetShardRequest { target: Some(elsewhere) };
    let refused = caller.once(|mut client| async move { client.get_shard(request).await });
    let status = refused.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(conflict_of(&status), None, "no conflict, another cluster");
    let unknown = v1::ShardTarget { cluster: "test".to_owned(), shard: 7 };
    let request = v1::GetShardRequest { target: Some(unknown) };
    let refused = caller.once(|mut client| async move { client.get_shard(request).await });
    assert_eq!(refused.unwrap_err().code(), Code::NotFound);
    assert!(caller.list(|_| ()).is_empty());
}
