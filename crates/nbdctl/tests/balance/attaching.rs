//! Who gets a client, and what a client sees when a load balancer is gone.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::process::Signal;

use crate::process::{Stack, wait_until};

/// What attaching may take when one of the load balancers does not answer: a quarter of a second to
/// find that out, and what a loaded machine adds.
const ATTACH_MAX: Duration = Duration::from_secs(3);

#[test]
fn clients_spread_over_all() {
    let stack = Stack::start(3, &[]);
    let clients: Vec<_> = (0..9).map(|_| stack.balance.connect("v")).collect();
    assert_eq!(stack.spread(), [3, 3, 3]);
    drop(clients);
    wait_until("all to be gone", || stack.balance.connections() == 0);
}

// Goal: attaching goes on when one is killed or stands still; those attached elsewhere notice
// nothing; and it gets clients again once it is back.
#[test]
fn one_that_is_lost_costs_a_moment() {
    let mut stack = Stack::start(2, &[]);
    let mut clients: Vec<_> = (0..2).map(|_| stack.balance.connect("v")).collect();
    assert_eq!(stack.spread(), [1, 1]);
    stack.lbs[0].pause();
    for round in 0..4_u8 {
        let began = Instant::now();
        let mut client = stack.balance.connect("v");
        assert!(began.elapsed() < ATTACH_MAX, "{:?}", began.elapsed());
        client.write(0, &[round; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [round; 4096]);
    }
    wait_until("it to be seen", || stack.balance.up() == 1);
    stack.lbs[0].resume();
    wait_until("it to be back", || stack.balance.up() == 2);
    stack.lbs[0].kill_9();
    for _ in 0..4 {
        let began = Instant::now();
        drop(stack.balance.connect("v"));
        assert!(began.elapsed() < ATTACH_MAX, "{:?}", began.elapsed());
    }
    assert_eq!(stack.balance.get("/health").status, 200);
    let alive = clients.iter_mut().filter_map(|client| client.read(0, 512).ok()).count();
    assert_eq!(alive, 1, "the other one's client goes on");
    stack.lbs[1].kill_9();
    wait_until("nobody to be left", || stack.balance.get("/health").status == 503);
    assert_eq!(stack.balance.get("/livez").status, 200);
    for lb in &mut stack.lbs {
        lb.start();
    }
    wait_until("both to be back", || stack.balance.up() == 2);
    drop(stack.balance.connect("v"));
}

// Goal: who attaches while nobody is there waits, and is served once somebody is.
#[test]
fn a_client_waits_for_a_load_balancer() {
    let mut stack = Stack::start(1, &[]);
    stack.lbs[0].kill_9();
    let address = stack.balance.nbd();
    let waiting = thread::spawn(move || nbd_testkit::NbdClient::connect(address, "v"));
    thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    stack.lbs[0].spawn();
    waiting.join().unwrap().unwrap().write(0, &[1; 512]).unwrap();
}

#[test]
fn the_limit_of_connections_holds() {
    let stack = Stack::start(1, &["--connections-max=2"]);
    let held = [stack.balance.connect("v"), stack.balance.connect("v")];
    nbd_testkit::NbdClient::connect(stack.balance.nbd(), "v").unwrap_err();
    let page = stack.balance.get("/metrics").body;
    assert!(page.contains("balance_refused_total 1\n"), "{page}");
    assert!(page.contains("# HELP balance_refused_total "), "{page}");
    drop(held);
    wait_until("both to be gone", || stack.balance.connections() == 0);
    drop(stack.balance.connect("v"));
}

#[test]
fn a_stop_serves_clients_until_they_leave() {
    let mut stack = Stack::start(1, &["--drain-deadline=1h"]);
    let mut client = stack.balance.connect("v");
    stack.balance.signal(Signal::TERM);
    wait_until("connections to be refused", || TcpStream::connect(stack.balance.nbd()).is_err());
    assert_eq!(stack.balance.get("/readyz").body, "draining\n");
    client.write(0, &[3; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [3; 4096]);
    drop(client);
    assert!(stack.balance.wait().success());
}
