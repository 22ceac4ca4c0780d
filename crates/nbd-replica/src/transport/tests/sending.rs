use std::time::Instant;

use super::proxy::{Mode, Proxy};
use super::*;
use crate::transport::limits::{BULK_BYTES_MAX, CONTROL_MESSAGES_MAX, RECONNECT_WAIT_MAX};

/// Node 1 reaches node 2 through a proxy; both lanes are up. Node 2 does not connect to node 1.
async fn pair_with_proxy() -> (Node, Node, Proxy) {
    let (one, mut two) = (Node::start(1).await, Node::start(2).await);
    let proxy = Proxy::to(two.address).await;
    one.knows([(2, proxy.address)]);
    // Nobody listens there: the test is about one direction.
    two.knows([(1, "127.0.0.1:1".parse().unwrap())]);
    settle(&one, &mut two).await;
    (one, two, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_a_lane_arrive_in_order_and_whole() {
    let (one, mut two) = pair().await;
    let message = |lane: Lane, number: usize| {
        // Around every boundary: short, copied, a slice of its frame, larger than a batch.
        let large = if lane == Lane::Bulk { 1_200_000 } else { 5000 };
        let len = [0, 1, 4080, 4090, 5000, large][number % 6];
        let mut bytes = lane.name().as_bytes()[..1].repeat(len);
        bytes.extend_from_slice(lane.name().as_bytes());
        bytes.extend_from_slice(&number.to_be_bytes());
        Bytes::from(bytes)
    };
    for number in 0..200 {
        let both = Lane::ALL.map(|lane| OutMessage {
            to: replica(2),
            bulk: lane == Lane::Bulk,
            bytes: message(lane, number),
        });
        one.handle.send(SHARD, replica(1), both.into());
        if number % 20 == 19 {
            // Not to outrun the queue of the bulk lane.
            while one.peer(2).outbox(Lane::Bulk).waiting().0 > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }
    let mut next = [0, 0];
    for _ in 0..400 {
        let bytes = two.message().await;
        let lane = Lane::ALL.into_iter().find(|lane| bytes == message(*lane, next[lane.place()]));
        next[lane.expect("the next of one of the lanes").place()] += 1;
    }
    assert_eq!(next, [200, 200]);
}

// Goal: a backlog of entries that a slow network lets through in seconds does not delay heartbeats.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_backlog_does_not_delay_control_messages() {
    let (one, mut two, proxy) = pair_with_proxy().await;
    proxy.set(Mode::Slow(8 << 20));
    for _ in 0..248 {
        one.send(2, Lane::Bulk, vec![0; 256 << 10]);
    }
    let begun = Instant::now();
    let mut latencies = Vec::new();
    for _ in 0..100 {
        let sent = Instant::now();
        one.send(2, Lane::Control, "heartbeat");
        while two.message().await != "heartbeat" {}
        latencies.push(sent.elapsed());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (messages, bytes) = one.peer(2).outbox(Lane::Bulk).waiting();
    assert!(messages > 0, "the backlog was still there: {:?}", begun.elapsed());
    assert!(bytes <= BULK_BYTES_MAX);
    latencies.sort_unstable();
    println!("median {:?}, worst {:?}, {bytes} bytes waiting", latencies[50], latencies[99]);
    // Behind the backlog it would have been seconds; this leaves room for a busy machine.
    assert!(latencies[50] < Duration::from_millis(100), "{:?}", latencies[50]);
    assert!(latencies[99] < Duration::from_millis(500), "{:?}", latencies[99]);
}

// Goal: a frozen peer costs bounded memory, is reported once, gives no hint of death while it may
// merely be slow, and is given up within a few seconds; when it thaws, messages flow again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_peer_fills_a_queue_and_is_given_up() {
    let (mut one, mut two, proxy) = pair_with_proxy().await;
    proxy.set(Mode::Frozen);
    let frozen = Instant::now();
    for _ in 0..400 {
        one.send(2, Lane::Bulk, vec![0; 256 << 10]);
    }
    let (_, bytes) = one.peer(2).outbox(Lane::Bulk).waiting();
    assert!(bytes <= BULK_BYTES_MAX, "{bytes}");
    assert!(bytes > BULK_BYTES_MAX / 2, "{bytes}");
    assert_eq!(one.event().await, Event::Unreachable(replica(2)));
    assert_eq!(one.event().await, Event::Lost(node_name(2)));
    assert!(frozen.elapsed() > Duration::from_millis(1500), "{:?}", frozen.elapsed());
    // It stays unreachable, and nothing piles up.
    for _ in 0..10_000 {
        one.send(2, Lane::Control, "heartbeat");
        one.send(2, Lane::Bulk, vec![0; 256 << 10]);
    }
    let (messages, _) = one.peer(2).outbox(Lane::Control).waiting();
    assert!(messages <= CONTROL_MESSAGES_MAX, "{messages}");
    let (_, bytes) = one.peer(2).outbox(Lane::Bulk).waiting();
    assert!(bytes <= BULK_BYTES_MAX, "{bytes}");

    proxy.set(Mode::Pass);
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "messages flow again");
        one.send(2, Lane::Bulk, "again");
        let arrived = async { while two.message().await != "again" {} };
        if timeout(Duration::from_millis(100), arrived).await.is_ok() {
            return;
        }
    }
}

// Goal: the hint that a peer died comes at once, although nothing is being sent, on both sides; and
// what is sent meanwhile is dropped and told, but not told again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_peer_is_noticed_at_once_and_found_again() {
    let (mut one, mut two, proxy) = pair_with_proxy().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let killed = Instant::now();
    proxy.set(Mode::Dead);
    assert_eq!(one.event().await, Event::Lost(node_name(2)));
    let noticed = killed.elapsed();
    two.lost(1).await;
    println!("noticed in {noticed:?} and {:?}", killed.elapsed());
    // By its silence alone it would have been noticed after 1.5 s, as a frozen one is.
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?}", killed.elapsed());

    tokio::time::sleep(Duration::from_millis(1500)).await;
    for _ in 0..100 {
        one.send(2, Lane::Control, "into the void");
        one.send(2, Lane::Bulk, "into the void");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut told = 0;
    while let Ok(event) = one.events.try_recv() {
        told += usize::from(event == Event::Unreachable(replica(2)));
    }
    assert_eq!(told, 2, "once for each lane");
    assert_eq!(one.peer(2).outbox(Lane::Bulk).waiting(), (0, 0));

    proxy.revive().await;
    let revived = Instant::now();
    while one.peer(2).outbox(Lane::Control).waiting().0 == 0 {
        one.send(2, Lane::Control, "back");
        if timeout(Duration::from_millis(20), two.message()).await.is_ok_and(|m| m == "back") {
            break;
        }
        assert!(revived.elapsed() < PATIENCE);
    }
    println!("back after {:?}", revived.elapsed());
}

// Goal: a peer that comes back is connected to as soon as it calls, not when the wait is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_is_called_back() {
    let one = Node::start(1).await;
    let mut two = Node::start(2).await;
    let proxy = Proxy::to(two.address).await;
    proxy.set(Mode::Dead);
    tokio::time::sleep(Duration::from_millis(50)).await;
    one.knows([(2, proxy.address)]);
    // By now the wait between attempts has grown to its longest.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let mut worst = Duration::ZERO;
    proxy.revive().await;
    let called = Instant::now();
    two.knows([(1, one.address)]);
    loop {
        one.send(2, Lane::Control, "hello");
        if timeout(Duration::from_millis(10), two.message()).await.is_ok() {
            break;
        }
        worst = worst.max(called.elapsed());
        // The wait would be between this and twice as long.
        assert!(worst < RECONNECT_WAIT_MAX / 2, "{worst:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_come_and_go_with_the_membership() {
    let (one, mut two) = pair().await;
    let mut three = Node::start(3).await;
    one.send(3, Lane::Control, "unknown yet");
    three.knows([(1, one.address)]);
    one.knows([(2, two.address), (3, three.address)]);
    settle(&one, &mut three).await;
    let peer = one.peer(2);
    // Another node of the same name took over, at another address.
    let mut other = Node::start(2).await;
    other.knows([(1, one.address)]);
    one.knows([(2, other.address), (3, three.address)]);
    settle(&one, &mut other).await;
    assert!(!Arc::ptr_eq(&peer, &one.peer(2)));
    one.knows([(3, three.address)]);
    one.send(2, Lane::Control, "nobody is there");
    settle(&one, &mut three).await;
    assert!(other.events.try_recv().is_err());
    assert!(two.events.try_recv().is_err());
}

// Goal: what was sent just before a node stops (say, the handing over of leadership) arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_lets_messages_out_first() {
    let (one, mut two) = pair().await;
    for _ in 0..100 {
        one.send(2, Lane::Control, "last words");
    }
    one.stop.cancel();
    timeout(PATIENCE, one.handle.closed()).await.unwrap();
    for _ in 0..100 {
        assert_eq!(two.message().await, "last words");
    }
}
