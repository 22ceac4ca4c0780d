//! Sessions through a node that does not lead, over a real connection to one that does.

mod support;

use std::time::Duration;

use nbd_front::limits::SHORT_STALL_MAX;
use nbd_front::{Answered, Attaching, Event, Links, LocalReplica as _, SessionEnd};
use nbd_relay::{ALIVE_INTERVAL, FromLeader};
use nbd_session::Query;
use nbd_store::{
    BlockStatus, Epoch, Extent, Outcome, Rejection, SessionId, encode_close_session, encode_trim,
    encode_write,
};

use self::support::{
    Client, DEADLINE, Follower, Leader, RawRelay, Wire, route_to, without_replica,
};

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
    client.session.query(Query::Read { offset: 64 << 20, len: 8192, holes: false }, 3, None);
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
            Event::Read { token, result: Ok(data), .. } => {
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

/// What was read before and after, with how much of it was from before.
async fn read_across_leaders(in_pieces: bool) -> (Vec<u8>, u64) {
    const LEN: usize = 8 << 20;
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    let (first, second) = (Wire::to(&leader.address).await, Wire::to(&leader.address).await);
    follower.route.send_replace(route_to(&first.address, 1));
    let mut client = Client::open(&follower.shard, leader.volume).await;
    let mut other = Client::open(&leader.shard, leader.volume).await;
    let mutations = other.write(0, 512, &pattern(1, LEN)).await;
    other.done(mutations).await;

    first.hold_after((3 << 20) + (1 << 19));
    if in_pieces {
        client.session.read_in_pieces((512, LEN as u64), true, 5, None);
    } else {
        client.session.query(Query::Read { offset: 512, len: LEN as u64, holes: false }, 5, None);
    }
    let mut events = client.events_within(Duration::from_millis(500)).await;
    assert_eq!(in_pieces, !events.is_empty(), "pieces are told as they come, or not at all");
    let mutations = other.write(0, 512, &pattern(2, LEN)).await;
    other.done(mutations).await;
    first.cut();
    client.idle(Duration::from_millis(100)).await;
    follower.route.send_replace(route_to(&second.address, 2));
    while !matches!(events.last(), Some(Event::Read { .. })) {
        events.push(client.event().await);
    }
    let mut bytes = Vec::new();
    for event in events {
        let (Event::Piece { token: 5, at, data } | Event::Read { token: 5, at, result: Ok(data) }) =
            event
        else {
            panic!("{event:?}")
        };
        assert_eq!(at, bytes.len() as u64);
        bytes.extend(data.bytes);
    }
    let came_again = second.passed();
    drop((client, other, follower));
    leader.stop().await;
    (bytes, came_again)
}

// Goal: of a read that was partly answered when its leader was lost, the next one is asked for the
// rest only, and the bytes fit together.
// Method: the first leader is lost behind half of the bytes; then all of them change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_goes_on_where_a_lost_leader_has_left_it() {
    let (old, new) = (pattern(1, 8 << 20), pattern(2, 8 << 20));
    for in_pieces in [true, false] {
        let (bytes, came_again) = read_across_leaders(in_pieces).await;
        assert_eq!(bytes.len(), old.len());
        let kept = bytes.iter().zip(&new).rposition(|(found, new)| found != new).unwrap() + 1;
        assert!(bytes[..kept] == old[..kept], "a place is from one leader or from the other");
        let kept = kept.next_multiple_of(512) as u64;
        assert!((2 << 20..4 << 20).contains(&kept), "{kept} bytes were kept");
        let rest = old.len() as u64 - kept;
        assert!(came_again < rest + (256 << 10), "{came_again} bytes came again, of {rest}");
    }
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
        slow.session.query(Query::Read { offset: 0, len: 32 << 20, holes: false }, token, None);
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
    let trim = encode_trim(SessionId(1), Epoch(1), 1, leader.volume, 0, 4096);
    let target = Some(v1::ShardTarget { cluster: "demo".to_owned(), shard: 0 });
    let run = v1::RunRequest { target: target.clone(), command: trim };
    assert_eq!(client.run(run).await.unwrap_err().code(), Code::InvalidArgument);

    drop(client);

    // A session, and a write that was damaged on its way.
    let mut relay = RawRelay::open(&leader, 1).await;
    let bytes = pattern(1, 4096);
    let (session, epoch) = (SessionId(77), Epoch(1));
    let write = encode_write(session, epoch, 1, leader.volume, 0, &bytes);
    let mut damaged = relay.frame_of(write);
    *damaged.last_mut().unwrap() ^= 1;
    relay.send(&damaged).await;
    let end = relay.next().await;
    assert!(matches!(&end, FromLeader::End { reason } if reason.contains("checksum")), "{end:?}");
    assert!(leader.read(0, 4096).await.iter().all(|byte| *byte == 0), "it never was proposed");
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_of_other_clusters_and_shards_are_told_why_they_end() {
    let leader = Leader::start().await;
    for (cluster, shard, says) in [("other", 0, "other"), ("demo", 7, "shard 7")] {
        let mut relay = RawRelay::connect(&leader).await;
        relay.hello(cluster, shard, 77, 1, leader.volume).await;
        let end = relay.next().await;
        assert!(matches!(&end, FromLeader::End { reason } if reason.contains(says)), "{end:?}");
        assert!(relay.is_closed().await);
    }
    let mut relay = RawRelay::connect(&leader).await;
    relay.send(&[0xff; 64]).await;
    assert!(matches!(relay.next().await, FromLeader::End { .. }), "no frames");
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_owes_an_answer_shows_that_it_is_alive() {
    let leader = Leader::start().await;
    let mut relay = RawRelay::open(&leader, 1).await;
    assert!(relay.is_silent_for(ALIVE_INTERVAL * 2).await, "nothing is owed");
    // A mutation that waits for memory.
    let held = leader.hold_budget();
    let write = encode_write(SessionId(77), Epoch(1), 1, leader.volume, 0, &pattern(1, 4096));
    let frame = relay.frame_of(write);
    relay.send(&frame).await;
    assert_eq!(relay.next().await, FromLeader::Alive);
    assert_eq!(relay.next().await, FromLeader::Alive);
    drop(held);
    assert_eq!(relay.answer().await, FromLeader::Applied { seq: 1, verdict: Ok(()) });
    leader.stop().await;
}

// Bug: a front end that was frozen or cut off with large reads under way kept the memory for them
// for a minute, and those of all others waited.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_that_take_nothing_make_way_for_others() {
    let leader = Leader::start().await;
    let mut frozen = Vec::new();
    for session in 0..4 {
        let mut relay = RawRelay::attach(&leader, 100 + session, 1).await;
        for id in 0..64 {
            relay.ask(id, 0, 1 << 20).await;
        }
        frozen.push(relay);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut quick = RawRelay::open(&leader, 1).await;
    // A write does not wait for the memory of reads.
    let began = std::time::Instant::now();
    let bytes = pattern(1, 1 << 20);
    let write = encode_write(SessionId(77), Epoch(1), 1, leader.volume, 0, &bytes);
    let frame = quick.frame_of(write);
    quick.send(&frame).await;
    assert_eq!(quick.answer().await, FromLeader::Applied { seq: 1, verdict: Ok(()) });
    assert!(began.elapsed() < SHORT_STALL_MAX, "{:?}", began.elapsed());
    // A read waits until those in the way are gone.
    quick.ask(1, 0, 1 << 20).await;
    assert_eq!(quick.read_answer(bytes.len()).await, bytes);
    assert!(began.elapsed() < SHORT_STALL_MAX * 4, "{:?}", began.elapsed());
    drop((frozen, quick));
    leader.stop().await;
}

/// Waits for the end of a session that asks nothing.
async fn end_of(client: &mut Client) -> SessionEnd {
    let end = async {
        loop {
            let signal = client.session.wait().await;
            if let Err(end) = client.session.take(signal).await {
                return end;
            }
        }
    };
    tokio::time::timeout(DEADLINE, end).await.expect("an end in time")
}

// Goal: a session that is ended through the log loses its attachment at once, though its client
// asks nothing, and is not resumed; others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_the_log_has_ended_is_over_wherever_it_is_attached() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    follower.route.send_replace(route_to(&leader.address, 1));
    for shard in [&leader.shard, &follower.shard] {
        let mut client = Client::open(shard, leader.volume).await;
        let mut other = Client::open(shard, leader.volume).await;
        let (id, mutations) = (client.session.id(), client.write(1, 0, &[1; 512]).await);
        client.done(mutations).await;
        let close = encode_close_session(id, Epoch(u32::MAX));
        let closed = leader.hosted.group.run(close).await.unwrap();
        assert_eq!(closed, Outcome::SessionClosed);
        let ended = SessionEnd::Ended(Rejection::UnknownSession);
        assert_eq!(end_of(&mut client).await, ended);
        assert!(leader.hosted.group.reader().session(id).is_none());
        let mutations = other.write(1, 0, &[1; 512]).await;
        other.done(mutations).await;
        client.session.close().await;
        other.session.close().await;
    }
    // What a caller is told is no mere end, after which it would resume the session.
    let mut relay = RawRelay::open(&leader, 1).await;
    let close = encode_close_session(SessionId(77), Epoch(u32::MAX));
    leader.hosted.group.run(close).await.unwrap();
    assert_eq!(relay.answer().await, FromLeader::Ended);
    assert!(matches!(relay.answer().await, FromLeader::End { .. }));
    assert!(relay.is_closed().await);
    // One that was ended between its opening and its attachment is noticed all the same.
    let caller = nbd_relay::Caller::default();
    let (session, epoch, volume) = (SessionId(78), Epoch(1), leader.volume);
    let attaching = Attaching { session, epoch, volume, caller };
    let (answers, mut told) = tokio::sync::mpsc::channel(1);
    let _attached = leader.hosted.attach(attaching, answers);
    assert!(matches!(told.recv().await, Some(Answered::Ended)));
    drop((follower, relay));
    leader.stop().await;
}

// Goal: requests count once each where they are answered, however they come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_session_moves_is_counted_at_the_leader() {
    let leader = Leader::start().await;
    let follower = Follower::of(&leader);
    follower.route.send_replace(route_to(&leader.address, 1));
    for shard in [&leader.shard, &follower.shard] {
        let mut client = Client::open(shard, leader.volume).await;
        let mutations = client.write(1, 0, &pattern(1, 5 << 20)).await;
        client.done(mutations).await;
        client.trim(2, 0, 4096).await;
        client.done(1).await;
        for len in [4096, 3 << 20] {
            client.read(0, len, false).await;
        }
        client.status(0, 4096).await;
        let attachment = leader.hosted.attached.of(client.session.id()).unwrap();
        let moved = attachment.moved();
        assert_eq!((moved.writes, moved.write_bytes), (6, 5 << 20), "a write a MiB, and a trim");
        assert_eq!((moved.reads, moved.read_bytes), (2, 4096 + (3 << 20)));
        assert!(moved.write_ns > 0 && moved.read_ns > 0);
        assert_eq!(attachment.caller.client, "10.0.0.9:4711");
        assert_eq!(attachment.caller.via, "follows");
        client.session.close().await;
    }
    drop(follower);
    leader.stop().await;
}
