//! Sessions through a node that does not lead, over a real connection to one that does.

mod support;

use std::time::Duration;

use nbd_front::{Event, Links};
use nbd_session::Query;
use nbd_store::{BlockStatus, Extent, Outcome};

use self::support::{Client, Follower, Leader, Wire, route_to, without_replica};

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| ((at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_all_sizes_are_forwarded() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    follower.route.send_replace(route_to(&leader.address, 1));
    let mut client = Client::open(&follower.shard, leader.volume).await;
    for (len, offset) in [(1, 511), (512, 4096), (5000, 7), (1 << 20, 0), (32 << 20, 1 << 20)] {
        let bytes = pattern(len as u64, len);
        let mutations = client.write(9, offset, &bytes).await;
        assert_eq!(client.done(mutations).await, vec![9; mutations]);
        let read = client.read(offset, len as u64, false).await;
        assert!(read.bytes == bytes, "{len} bytes at {offset}");
        assert_eq!(read.runs, [(0..len, false)], "one run when holes are not wanted");
        assert!(leader.read(offset, len as u64).await == bytes);
    }
    client.trim(5, 8 << 20, 8 << 20).await;
    assert_eq!(client.done(1).await, [5]);
    let extents = client.status(7 << 20, 10 << 20).await;
    let run = |len, status| Extent { len, status };
    let (hole, data) = (BlockStatus::HOLE, BlockStatus::DATA);
    assert_eq!(extents, [run(1 << 20, data), run(8 << 20, hole), run(1 << 20, data)]);
    let read = client.read(7 << 20, 10 << 20, true).await;
    let mib = 1 << 20;
    assert_eq!(read.runs, [(0..mib, false), (mib..9 * mib, true), (9 * mib..10 * mib, false)]);
    client.session.close().await;
    drop(follower);
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_without_replicas_is_served_like_a_node_that_follows() {
    let leader = Leader::start().await;
    let (shard, route) = without_replica(&leader);
    route.send_replace(route_to(&leader.address, 1));
    let found = shard.describe("vol").await.unwrap().unwrap();
    let mut client = Client::open(&shard, found.id).await;
    let bytes = pattern(1, 2 << 20);
    let mutations = client.write(3, 4096, &bytes).await;
    assert_eq!(client.done(mutations).await, [3, 3]);
    assert!(client.read(4096, 2 << 20, false).await.bytes == bytes);
    client.session.close().await;
    drop((shard, route));
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_when_the_leader_is_lost_is_resumed_and_answered_once() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    let wire = Wire::to(&leader.address).await;
    follower.route.send_replace(route_to(&wire.address, 1));
    let mut client = Client::open(&follower.shard, leader.volume).await;
    let first = client.session.epoch();
    wire.hold();
    let (small, large) = (pattern(1, 4096), pattern(2, 3 << 20));
    client.write(1, 0, &small).await;
    client.write(2, 1 << 20, &large).await;
    client.session.query(Query::Read { offset: 64 << 20, len: 8192, holes: false }, 3);
    client.idle(Duration::from_millis(300)).await;
    assert!(leader.read(0, 4096).await == small, "applied, and the answer is on its way");
    // An older write of the same place must not come back over a newer one.
    let mut other = Client::open(&leader.shard, leader.volume).await;
    let newer = pattern(3, 4096);
    other.write(0, 0, &newer).await;
    other.done(1).await;

    wire.cut();
    client.idle(Duration::from_millis(100)).await;
    follower.route.send_replace(route_to(&leader.address, 2));
    let mut tokens = Vec::new();
    for _ in 0..5 {
        match client.event().await {
            Event::Mutation { token, outcome: Outcome::Done } => tokens.push(token),
            Event::Read { token, result: Ok(data) } => {
                assert!(data.bytes.iter().all(|byte| *byte == 0));
                tokens.push(token);
            }
            other => panic!("{other:?}"),
        }
    }
    tokens.sort_unstable();
    assert_eq!(tokens, [1, 2, 2, 2, 3]);
    client.idle(Duration::from_millis(100)).await;
    assert!(client.session.epoch() > first);
    assert!(leader.read(0, 4096).await == newer, "applied once");
    assert!(leader.read(1 << 20, 3 << 20).await == large);
    drop((client, other, follower));
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_silent_is_left_as_soon_as_there_is_another() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    let wire = Wire::to(&leader.address).await;
    follower.route.send_replace(route_to(&wire.address, 1));
    let mut client = Client::open(&follower.shard, leader.volume).await;
    wire.hold();
    client.write(1, 0, &pattern(1, 4096)).await;
    client.idle(Duration::from_millis(50)).await;
    let began = std::time::Instant::now();
    follower.route.send_replace(route_to(&leader.address, 2));
    assert_eq!(client.done(1).await, [1]);
    assert!(began.elapsed() < Duration::from_secs(1), "before any timeout: {:?}", began.elapsed());
    drop((client, follower));
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_requests_wait_and_leadership_may_come_home() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    follower.route.send_replace(route_to(&leader.address, 1));
    let mut client = Client::open(&follower.shard, leader.volume).await;
    let nowhere = Wire::to("127.0.0.1:1").await;
    nowhere.cut();
    follower.route.send_replace(route_to(&nowhere.address, 2));
    client.write(1, 0, &pattern(1, 4096)).await;
    client.idle(Duration::from_millis(300)).await;
    // This node's own group leads now.
    let mut route = leader.hosted.group.route().borrow().clone();
    route.term = nbd_topology::Term(3);
    follower.route.send_replace(route);
    assert_eq!(client.done(1).await, [1]);
    assert!(follower.hosted.attached.contains(client.session.id()));
    drop((client, follower));
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_take_its_answers_holds_up_the_leader_and_nobody_else() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    follower.route.send_replace(route_to(&leader.address, 1));
    let mut slow = Client::open(&follower.shard, leader.volume).await;
    let mut quick = Client::open(&follower.shard, leader.volume).await;
    let bytes = pattern(4, 32 << 20);
    let mutations = slow.write(0, 0, &bytes).await;
    slow.done(mutations).await;
    for token in 0..8 {
        slow.session.query(Query::Read { offset: 0, len: 32 << 20, holes: false }, token);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let read = quick.read(0, 4096, false).await;
    assert!(read.bytes == bytes[..4096]);
    for _ in 0..8 {
        match slow.event().await {
            Event::Read { result: Ok(data), .. } => assert!(data.bytes == bytes),
            other => panic!("{other:?}"),
        }
    }
    drop((slow, quick, follower));
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_and_commands_are_reached_through_the_leader() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    let shard = follower.shard.clone();
    let add = nbd_store::encode_add_counter(5);
    // Asked while there is no leader, answered when there is one.
    let asked = tokio::spawn(async move { shard.describe("vol").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    follower.route.send_replace(route_to(&leader.address, 1));
    let found = asked.await.unwrap().unwrap().unwrap();
    assert_eq!((found.id, &*found.name, found.size), (leader.volume, "vol", 256 << 20));
    assert_eq!(follower.shard.describe("none").await, Ok(None));
    let long = "d".repeat(4000);
    for number in 0..400 {
        let name = format!("vol{number}");
        let create = nbd_store::encode_create_volume(&name, 4096, &long).unwrap();
        let created = follower.shard.run(&create).await.unwrap();
        assert!(matches!(created, Outcome::VolumeCreated(_)), "{created:?}");
    }
    let listed = follower.shard.volumes().await.unwrap();
    assert_eq!(listed.len(), 401, "more than fit in one page");
    assert_eq!(listed, leader.hosted.group.reader().volumes());
    let before = leader.hosted.group.reader().counter();
    assert_eq!(follower.shard.run(&add).await, Ok(Outcome::Counter(before + 5)));
    drop(follower);
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_or_shard_is_refused_and_damage_is_found() {
    use nbd_rpc::v1;
    use tonic::Code;
    let leader = Leader::start().await;
    let links = Links::default();
    let mut client = links.client(&leader.address).unwrap();
    let describe = |cluster: &str, shard| v1::DescribeRequest {
        target: Some(v1::ShardTarget { cluster: cluster.to_owned(), shard }),
        name: "vol".to_owned(),
    };
    let refused = client.describe(describe("other", 0)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains("other") && refused.message().contains("demo"));
    let refused = client.describe(describe("demo", 7)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    let trim = nbd_store::encode_trim(
        nbd_store::SessionId(1),
        nbd_store::Epoch(1),
        1,
        leader.volume,
        0,
        4096,
    );
    let target = Some(v1::ShardTarget { cluster: "demo".to_owned(), shard: 0 });
    let run = v1::RunRequest { target: target.clone(), command: trim };
    assert_eq!(client.run(run).await.unwrap_err().code(), Code::InvalidArgument);

    // A session, and a write that was damaged on its way.
    let session = nbd_store::SessionId(77);
    let hello = v1::AttachHello {
        target,
        session: session.0.to_le_bytes().to_vec().into(),
        epoch: 1,
        volume: leader.volume.0,
        owner_node: 5,
        owner_incarnation: 6,
    };
    let (requests, outgoing) = tokio::sync::mpsc::channel(4);
    let message = |message| v1::AttachRequest { message: Some(message) };
    let hello = v1::attach_request::Message::Hello(hello);
    requests.send(message(hello)).await.unwrap();
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    let mut replies = client.attach(outgoing).await.unwrap().into_inner();
    let first = replies.message().await.unwrap().unwrap().message;
    assert!(matches!(first, Some(v1::attach_reply::Message::Verdict(_))), "{first:?}");
    let bytes = pattern(1, 4096);
    let epoch = nbd_store::Epoch(1);
    let mut damaged = nbd_store::encode_write(session, epoch, 1, leader.volume, 0, &bytes).to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    let mutation = v1::AttachMutation { command: damaged.into() };
    let mutation = v1::attach_request::Message::Mutation(mutation);
    requests.send(message(mutation)).await.unwrap();
    let end = replies.message().await.unwrap_err();
    assert_eq!(end.code(), Code::DataLoss, "{end}");
    assert!(leader.read(0, 4096).await.iter().all(|byte| *byte == 0), "it never was proposed");
    drop((requests, replies, client));
    leader.stop().await;
}
