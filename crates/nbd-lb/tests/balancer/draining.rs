//! Stopping without a successor: clients go on for a while, and what was received is answered.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::process::Signal;

use crate::succession::Place;
use crate::support::{cluster, wait_until};

fn wait_draining(place: &Place) {
    wait_until("503 from /readyz", || {
        place.get("/readyz").is_some_and(|answer| answer.status == 503)
    });
    assert_eq!(place.get("/readyz").unwrap().body, "draining\n");
    wait_until("connections to be refused", || {
        TcpStream::connect(("127.0.0.1", place.nbd)).is_err()
    });
}

#[test]
fn a_draining_load_balancer_serves_its_clients_until_they_leave() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &["--drain-deadline=1h"]);
    let mut clients = [place.connect("v"), place.connect("w")];
    balancer.signal(Signal::TERM);
    wait_draining(&place);
    assert_eq!(place.get("/livez").unwrap().status, 200);
    assert_eq!(place.metric("nbd_connections"), Some(2.0));
    for (client, byte) in clients.iter_mut().zip([1, 2]) {
        client.write(0, &[byte; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [byte; 4096]);
    }
    let [one, mut other] = clients;
    drop(one);
    other.write(4096, &[3; 4096]).unwrap();
    assert_eq!(balancer.ended(), None);
    drop(other);
    let took = balancer.wait_success();
    assert!(took < Duration::from_secs(5), "{took:?} after the last client had left");
}

#[test]
fn a_drain_has_an_end_and_answers_what_was_received() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &["--drain-deadline=2s"]);
    let mut client = place.connect("v");
    let began = Instant::now();
    balancer.signal(Signal::TERM);
    let mut writes = 0_u64;
    let last = loop {
        match client.write(writes % 64 * 4096, &[7; 4096]) {
            Ok(()) => writes += 1,
            Err(error) => break error,
        }
    };
    let lasted = began.elapsed();
    assert!(writes > 0 && lasted >= Duration::from_secs(2), "{writes} in {lasted:?}: {last}");
    assert!(lasted < Duration::from_secs(10), "{lasted:?}");
    assert_ne!(last.nbd_error(), Some(nbd_proto::NbdError::Io), "{last}");
    balancer.wait_success();
    let mut direct = cluster.at(cluster.wait_leader()).connect("v").unwrap();
    assert_eq!(direct.read(0, 4096).unwrap(), [7; 4096]);
}

#[test]
fn a_second_signal_ends_at_once() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &["--drain-deadline=1h", "--shutdown-deadline=1h"]);
    let mut client = place.connect("v");
    balancer.signal(Signal::TERM);
    wait_draining(&place);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(balancer.ended(), None);
    balancer.signal(Signal::INT);
    let took = balancer.wait_success();
    assert!(took < Duration::from_secs(3), "{took:?}");
    client.read(0, 512).unwrap_err();
}
