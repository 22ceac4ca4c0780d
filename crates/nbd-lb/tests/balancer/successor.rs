//! Successors that break off in the middle: whose a client is must be plain at any time.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_lb::takeover::channel::{Channel, ChannelError, Kind, Message};
use nbd_proto::{Command as Request, ReplyStyle};
use nbd_testkit::{ConnectOptions, NbdClient};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use crate::beside::Beside;
use crate::succession::Place;
use crate::support::{cluster, wait_until};

const PATIENT: &str = "--drain-deadline=10m";

/// The cluster's name.
const CLUSTER: &str = "test";

/// One that speaks the protocol as far as it is told to.
struct Successor {
    channel: Channel,
    runtime: Runtime,
    /// What it was given: the listening sockets and the Unix socket.
    _given: Vec<OwnedFd>,
}

impl Successor {
    fn connect(place: &Place) -> Self {
        let runtime = Runtime::new().unwrap();
        let channel = runtime.block_on(async {
            Channel::new(UnixStream::connect(place.takeover()).await.unwrap()).unwrap()
        });
        Self { channel, runtime, _given: Vec::new() }
    }

    fn send(&self, kind: Kind, body: &[u8]) -> Result<(), ChannelError> {
        self.runtime.block_on(self.channel.send(kind, body, &[]))
    }

    fn receive(&mut self) -> Message {
        self.runtime.block_on(self.channel.receive()).unwrap().unwrap()
    }

    /// Takes over, up to where sessions come.
    fn take(place: &Place) -> Self {
        let mut successor = Self::connect(place);
        let hello = [&1_u32.to_le_bytes(), CLUSTER.as_bytes()].concat();
        successor.send(Kind::Hello, &hello).unwrap();
        let listeners = successor.receive();
        assert_eq!((listeners.kind, listeners.descriptors.len()), (Kind::Listeners, 2));
        successor._given.extend(listeners.descriptors);
        successor.send(Kind::Take, &[]).unwrap();
        let yours = successor.receive();
        assert_eq!((yours.kind, yours.descriptors.len()), (Kind::Yours, 1));
        successor._given.extend(yours.descriptors);
        successor
    }

    fn session(&mut self) -> OwnedFd {
        let message = self.receive();
        assert_eq!(message.kind, Kind::Session);
        let [socket] = <[OwnedFd; 1]>::try_from(message.descriptors).unwrap();
        socket
    }
}

fn use_it(client: &mut NbdClient, byte: u8) {
    client.write(0, &[byte; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [byte; 4096]);
}

// Goal: a client that was offered, and whose new owner dies before it says that it takes it, goes
// on where it was.
#[test]
fn a_session_that_was_offered_and_not_taken_goes_on() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    use_it(&mut client, 1);
    let mut successor = Successor::take(&place);
    let socket = successor.session();
    drop((socket, successor));
    use_it(&mut client, 2);
    balancer.wait_log("the other load balancer is lost");
    use_it(&mut client, 3);
    drop(client);
    balancer.wait_success();
}

// Goal: so do requests that were here already and not looked at any more when it was offered.
// Method: a client sends more at once than may be under way, and nothing behind it that would wake
// the session. It is not taken twice, for one reason and the other.
#[test]
fn requests_that_were_held_back_are_carried_out_when_the_session_stays() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let options = ConnectOptions {
        export: "v".to_owned(),
        replies: ReplyStyle::Simple,
        allocation_context: false,
        ..ConnectOptions::default()
    };
    let mut client = NbdClient::connect_with(place.target().address(), &options).unwrap();
    let mut burst = BytesMut::new();
    for cookie in 0..300 {
        let read = Request::Read { offset: 0, len: 512, dont_fragment: false };
        nbd_proto::encode_request(&mut burst, options.replies, cookie, &read, false).unwrap();
    }
    let mut replies = vec![0; 300 * (16 + 512)];
    let bursts = Beside::start(move || {
        client.stream().write_all(&burst).unwrap();
        client.stream().read_exact(&mut replies).unwrap();
    });
    wait_until("bursts", || bursts.rounds() > 3);
    let mut successor = Successor::take(&place);
    drop(successor.session());
    successor.send(Kind::Kept, &[]).unwrap();
    let kept = bursts.rounds();
    wait_until("more of them", || bursts.rounds() > kept + 3);
    let socket = successor.session();
    drop((socket, successor));
    balancer.wait_log("the other load balancer is lost");
    // It is offered once more after a rest, when there is nobody any more: look behind that.
    thread::sleep(Duration::from_secs(5));
    let lost = bursts.rounds();
    wait_until("more of them", || bursts.rounds() > lost + 3);
    bursts.stop();
    balancer.wait_success();
}

// Goal: a new owner that says too late that it takes a client does not get it: there are never two.
// Method: it does not answer for longer than it is waited for; then its word must not arrive, which
// is what it goes by.
#[test]
fn a_session_that_is_taken_too_late_stays_where_it_is() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    use_it(&mut client, 1);
    let mut successor = Successor::take(&place);
    let _socket = successor.session();
    let asked = Instant::now();
    let writer = thread::spawn(move || {
        use_it(&mut client, 2);
        client
    });
    balancer.wait_log("the other load balancer is lost");
    assert!(asked.elapsed() >= Duration::from_secs(4), "{:?}", asked.elapsed());
    successor.send(Kind::Taken, &[]).unwrap_err();
    let mut client = writer.join().unwrap();
    use_it(&mut client, 3);
    drop(client);
    balancer.wait_success();
}

// Goal: the word of a new owner counts once it is given, also if it dies right after: the client's
// connection ends with it, and is not served by two.
#[test]
fn a_session_that_was_taken_is_left_alone() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    use_it(&mut client, 1);
    let mut successor = Successor::take(&place);
    let socket = successor.session();
    successor.send(Kind::Taken, &[]).unwrap();
    balancer.wait_success();
    assert!(balancer.log().contains("handed over to another process"), "{}", balancer.log());
    drop((socket, successor));
    client.read(0, 512).unwrap_err();
}

#[test]
fn a_session_that_a_successor_cannot_serve_stays_and_is_offered_again() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    let mut successor = Successor::take(&place);
    drop(successor.session());
    successor.send(Kind::Kept, &[]).unwrap();
    use_it(&mut client, 1);
    let socket = successor.session();
    successor.send(Kind::Taken, &[]).unwrap();
    balancer.wait_success();
    drop(socket);
}

#[test]
fn strangers_are_turned_away() {
    let cluster = cluster();
    let place = Place::new();
    let mut balancer = place.start(&cluster, &[PATIENT]);
    let mut client = place.connect("v");
    for (shards, name) in [(2, CLUSTER), (1, "another")] {
        let mut successor = Successor::connect(&place);
        successor
            .send(Kind::Hello, &[&u32::to_le_bytes(shards), name.as_bytes()].concat())
            .unwrap();
        let answer = successor.receive();
        assert_eq!(answer.kind, Kind::Refused);
        let why = String::from_utf8(answer.body).unwrap();
        assert!(why.contains("another cluster"), "{why}");
    }
    let successor = Successor::connect(&place);
    successor.send(Kind::Take, &[]).unwrap();
    drop(successor);
    balancer.wait_log("it said something out of turn");
    use_it(&mut client, 1);

    // A program that cannot take over says so, and what runs goes on.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cluster.toml");
    let text = crate::support::toml(&cluster);
    std::fs::write(&file, text.replace(&format!("\"{CLUSTER}\""), "\"another\"")).unwrap();
    let mut other = place.spawn_with(&file, &[]);
    wait_until("it to give up", || other.ended().is_some());
    assert!(other.log().contains("the running load balancer refuses"), "{}", other.log());
    let mut elsewhere = place.elsewhere().spawn(&cluster, &[]);
    wait_until("it to give up", || elsewhere.ended().is_some());
    assert!(elsewhere.log().contains("serves NBD on port"), "{}", elsewhere.log());
    use_it(&mut client, 2);
    assert_eq!(place.get("/readyz").unwrap().status, 200);
}
