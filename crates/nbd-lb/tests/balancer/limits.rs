//! What one client or many may not do to the others.

use std::io::Read as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nbd_front::limits::HANDSHAKE_DEADLINE;
use nbd_proto::{ClientGoal, Command, ReplyStyle};
use nbd_testkit::process::rss_peak_bytes;
use nbd_testkit::{ConnectOptions, NbdClient};

use crate::succession::Place;
use crate::support::{cluster, wait_until};

#[test]
fn connections_past_the_limit_are_closed_and_the_others_served() {
    let cluster = cluster();
    let place = Place::new();
    let _balancer = place.start(&cluster, &["--connections-max=3"]);
    let mut clients: Vec<_> = (0..3).map(|n| place.connect(&format!("v{n}"))).collect();
    let mut fourth = TcpStream::connect(place.target().address()).unwrap();
    let mut greeting = Vec::new();
    // It may be reset, too: either way there is no greeting.
    let _ = fourth.read_to_end(&mut greeting);
    assert!(greeting.is_empty());
    assert_eq!(place.metric("nbd_connections_refused_total"), Some(1.0));
    for client in &mut clients {
        client.write(0, &[1; 512]).unwrap();
    }
    drop(clients.pop());
    wait_until("its place to be given to another", || {
        NbdClient::connect(place.target().address(), "v3").is_ok()
    });
}

#[test]
fn a_client_that_does_not_finish_its_handshake_is_closed_in_time() {
    let cluster = cluster();
    let place = Place::new();
    let _balancer = place.start(&cluster, &[]);
    let began = Instant::now();
    let mut silent = TcpStream::connect(place.target().address()).unwrap();
    silent.set_read_timeout(Some(3 * HANDSHAKE_DEADLINE)).unwrap();
    let mut received = Vec::new();
    silent.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 18, "the greeting, and no more");
    let lasted = began.elapsed();
    assert!(lasted >= HANDSHAKE_DEADLINE && lasted < 2 * HANDSHAKE_DEADLINE, "{lasted:?}");
}

// Goal: what clients have under way is held within the budget, whatever they ask for, and those who
// ask for little are served all the while.
// Method: ask for 1 GiB in reads of the largest size, and take none of it.
#[test]
fn bytes_in_flight_are_bounded_and_small_requests_are_served_beside_large_ones() {
    const BUDGET: u64 = 64 << 20;
    const LARGE: u64 = 32 << 20;
    let cluster = cluster();
    let place = Place::new();
    let balancer = place.start(&cluster, &["--request-bytes-max=64MiB"]);
    let mut small = place.connect("small");
    small.write(0, &[5; 4096]).unwrap();
    let before = rss_peak_bytes(balancer.pid());
    let mut greedy: Vec<_> = (0..8)
        .map(|_| {
            // Simple replies have no holes: every byte takes a byte.
            let options = ConnectOptions {
                export: "large".to_owned(),
                replies: ReplyStyle::Simple,
                goal: ClientGoal::ExportName,
                allocation_context: false,
                ..ConnectOptions::default()
            };
            NbdClient::connect_with(place.target().address(), &options).unwrap()
        })
        .collect();
    for client in &mut greedy {
        for _ in 0..4 {
            let read = Command::Read { offset: 0, len: LARGE, dont_fragment: false };
            client.send(&read, &[]).unwrap();
        }
    }
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(8) {
        let asked = Instant::now();
        assert_eq!(small.read(0, 4096).unwrap(), [5; 4096]);
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let grown = rss_peak_bytes(balancer.pid()) - before;
    // Pieces on their way from the leader come on top of what the budget counts.
    assert!(grown < BUDGET + LARGE, "{} MiB", grown >> 20);
    assert!(grown > LARGE / 2, "{} MiB: nothing was asked for", grown >> 20);
}
