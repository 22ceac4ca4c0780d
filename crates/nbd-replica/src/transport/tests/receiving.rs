use nbd_log::checksum::crc32c;
use nbd_rpc::identity::{PROTOCOL_VERSION, directory_to_bytes};
use nbd_rpc::v1::deliver_frame::Frame;
use nbd_rpc::v1::raft_transport_client::RaftTransportClient;
use nbd_rpc::v1::{
    DeliverAck, DeliverBatch, DeliverFrame, DeliverHello, RaftMessage, TraceNote, TraceNotes,
};
use prost::Message as _;
use tokio_stream::Stream;
use tonic::{Code, Status, Streaming};

use super::*;

/// Makes one thing wrong.
type Change<T> = fn(&mut T);

/// Node 2's hello to node 1, as it should be.
fn hello() -> DeliverHello {
    DeliverHello {
        protocol: PROTOCOL_VERSION,
        cluster: "demo".to_owned(),
        from_node: "n2".to_owned(),
        to_node: "n1".to_owned(),
        directory: directory_to_bytes(2),
        incarnation: 102,
        lane: DeliverLane::Control.into(),
    }
}

fn message(bytes: &'static str) -> RaftMessage {
    RaftMessage {
        shard: SHARD.0,
        from_replica: 2,
        to_replica: 1,
        message: bytes.into(),
        crc32c: crc32c(bytes.as_bytes()),
        traces: Bytes::new(),
    }
}

fn frame(frame: Frame) -> DeliverFrame {
    DeliverFrame { frame: Some(frame) }
}

/// Frames from a test, for as long as it keeps the sender.
struct Script(mpsc::Receiver<DeliverFrame>);

impl Stream for Script {
    type Item = DeliverFrame;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<DeliverFrame>> {
        self.0.poll_recv(cx)
    }
}

/// A caller with a script.
struct Call {
    frames: mpsc::Sender<DeliverFrame>,
    acks: Streaming<DeliverAck>,
}

impl Call {
    async fn begin(node: &Node, first: DeliverFrame) -> Result<Self, Status> {
        let endpoint = nbd_rpc::channel(&node.address.to_string()).unwrap();
        let mut client = RaftTransportClient::new(endpoint.connect().await.unwrap());
        let (frames, script) = mpsc::channel(100);
        frames.send(first).await.unwrap();
        let mut acks = client.deliver(Script(script)).await?.into_inner();
        assert_eq!(acks.message().await?, Some(DeliverAck {}));
        Ok(Self { frames, acks })
    }

    async fn send(&self, messages: Vec<RaftMessage>) {
        self.frames.send(frame(Frame::Batch(DeliverBatch { messages }))).await.unwrap();
    }

    async fn end(mut self) -> Status {
        match timeout(PATIENCE, self.acks.message()).await.unwrap() {
            Err(status) => status,
            Ok(more) => panic!("a status was due, and not {more:?}"),
        }
    }
}

/// Node 1, which knows node 2.
async fn callee() -> Node {
    let one = Node::start(1).await;
    one.knows([(2, "127.0.0.1:1".parse().unwrap())]);
    one
}

#[tokio::test]
async fn a_caller_that_does_not_belong_is_refused() {
    let one = callee().await;
    let cases: [(&str, Change<DeliverHello>, Code, &str); 8] = [
        ("protocol", |h| h.protocol = 2, Code::FailedPrecondition, "protocol version 2"),
        ("cluster", |h| h.cluster = "other".into(), Code::FailedPrecondition, "cluster \"other\""),
        ("node", |h| h.to_node = "n9".into(), Code::FailedPrecondition, "wants the node \"n9\""),
        ("oneself", |h| h.from_node = "n1".into(), Code::FailedPrecondition, "this very node"),
        ("name", |h| h.from_node = "a b".into(), Code::InvalidArgument, "not a valid name"),
        ("short id", |h| h.directory = "x".into(), Code::InvalidArgument, "16 bytes"),
        ("lane", |h| h.lane = 0, Code::InvalidArgument, "lane"),
        ("unknown lane", |h| h.lane = 9, Code::InvalidArgument, "lane"),
    ];
    for (what, change, code, text) in cases {
        let mut hello = hello();
        change(&mut hello);
        let Err(status) = Call::begin(&one, frame(Frame::Hello(hello))).await else {
            panic!("wrong {what} was accepted");
        };
        assert_eq!(status.code(), code, "{what}: {status}");
        assert!(status.message().contains(text), "{what}: {}", status.message());
    }
    let batch = Frame::Batch(DeliverBatch { messages: vec![message("x")] });
    let Err(status) = Call::begin(&one, frame(batch)).await else {
        panic!("no hello was accepted");
    };
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn strangers_messages_are_dropped_and_others_taken() {
    let mut one = callee().await;
    let call = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    let cases: [(&str, Change<RaftMessage>); 2] =
        [("shard", |m| m.shard = 99), ("receiver", |m| m.to_replica = 4)];
    let mut messages = Vec::new();
    for (what, change) in cases {
        let mut message = message(what);
        change(&mut message);
        messages.push(message);
    }
    messages.push(message("good"));
    call.send(messages).await;
    let good = Event::Message { to: replica(1), from: replica(2), bytes: "good".into() };
    assert_eq!(one.event().await, good);

    // Replica 2 has moved to another directory, and what it still sends from the old one is worth
    // nothing; replica 4 lives in the old one.
    let address = at(2, "127.0.0.1:1".parse().unwrap());
    let elsewhere = PeerAddress { directory: Some(7), ..address.clone() };
    let peers = [(replica(2), elsewhere), (replica(4), address)];
    one.handle.set_peers(SHARD, replica(1), peers.into());
    let neighbour = RaftMessage { from_replica: 4, ..message("from the neighbour") };
    call.send(vec![message("from the old directory"), neighbour]).await;
    assert_eq!(one.message().await, "from the neighbour");
}

// A wiped node comes back in a new directory: what it says under the old id is worth nothing, and
// under a new one it may have joined while this node was away.
#[tokio::test]
async fn a_replica_that_is_not_known_is_announced_and_heard() {
    let mut one = callee().await;
    let reborn = DeliverHello { directory: directory_to_bytes(7), ..hello() };
    let call = Call::begin(&one, frame(Frame::Hello(reborn))).await.unwrap();
    let newcomer = RaftMessage { from_replica: 9, ..message("under a new id") };
    call.send(vec![message("under the old id"), newcomer]).await;
    let announced = Event::Newcomer { peer: replica(9), node: node_name(2), directory: 7 };
    assert_eq!(one.event().await, announced);
    let heard = Event::Message { to: replica(1), from: replica(9), bytes: "under a new id".into() };
    assert_eq!(one.event().await, heard);
}

#[tokio::test]
async fn damaged_and_malformed_messages_end_the_stream() {
    let one = Node::start(1).await;
    one.knows([(2, "127.0.0.1:1".parse().unwrap())]);
    let cases: [(Change<RaftMessage>, Code, &str); 3] = [
        (|m| m.crc32c ^= 1, Code::DataLoss, "CRC32C"),
        (|m| m.message = "other bytes".into(), Code::DataLoss, "CRC32C"),
        (|m| m.from_replica = 0, Code::InvalidArgument, "never 0"),
    ];
    for (change, code, text) in cases {
        let call = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
        let mut message = message("x");
        change(&mut message);
        call.send(vec![message]).await;
        let status = call.end().await;
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(text), "{status}");
    }
    let call = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    call.frames.send(frame(Frame::Hello(hello()))).await.unwrap();
    assert_eq!(call.end().await.code(), Code::InvalidArgument);
}

// Goal: what is wrong with notes of traces costs no message.
#[tokio::test]
async fn notes_of_traces_are_taken_if_they_are_sound_and_short() {
    let mut one = callee().await;
    let call = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    let note = |index| TraceNote { term: 1, index, span_id: 7, ..TraceNote::default() };
    let notes: Vec<TraceNote> = (0..64).map(note).collect();
    let sound = TraceNotes { notes: notes.clone() }.encode_to_vec();
    let cases: [(Vec<u8>, &[TraceNote]); 3] =
        [(sound, &notes), (b"no notes".to_vec(), &[]), ([0x0a, 0].repeat(2049), &[])];
    for (traces, taken) in cases {
        call.send(vec![RaftMessage { traces: traces.into(), ..message("x") }]).await;
        if !taken.is_empty() {
            assert_eq!(one.event().await, Event::Traces(taken.to_vec()));
        }
        let message = Event::Message { to: replica(1), from: replica(2), bytes: "x".into() };
        assert_eq!(one.event().await, message);
    }
}

// Goal: a stream of the same process takes its predecessor's place in silence; one of a new process
// proves that the old one is dead.
#[tokio::test]
async fn a_newer_stream_supersedes_older_ones() {
    let mut one = callee().await;
    let first = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    let bulk = DeliverHello { lane: DeliverLane::Bulk.into(), ..hello() };
    let other_lane = Call::begin(&one, frame(Frame::Hello(bulk))).await.unwrap();
    let second = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    assert_eq!(first.end().await.code(), Code::Aborted);
    second.send(vec![message("still here")]).await;
    let message = Event::Message { to: replica(1), from: replica(2), bytes: "still here".into() };
    assert_eq!(one.event().await, message, "and no hint before it");

    let reborn = DeliverHello { incarnation: 7, ..hello() };
    let _third = Call::begin(&one, frame(Frame::Hello(reborn))).await.unwrap();
    assert_eq!(one.event().await, Event::Lost(node_name(2)));
    assert_eq!(second.end().await.code(), Code::Aborted);
    assert_eq!(other_lane.end().await.code(), Code::Aborted);
}

#[tokio::test]
async fn a_stream_that_ends_well_is_no_hint() {
    let mut one = callee().await;
    let call = Call::begin(&one, frame(Frame::Hello(hello()))).await.unwrap();
    let Call { frames, mut acks } = call;
    drop(frames);
    assert_eq!(acks.message().await.unwrap(), None);
    assert_eq!(one.events.try_recv(), Err(mpsc::error::TryRecvError::Empty));
}

#[tokio::test]
async fn a_refused_node_is_told_why_and_gives_no_hint() {
    let mut one = Node::start_with(1, |mut transport| {
        transport.cluster = "other".parse().unwrap();
        transport
    })
    .await;
    let mut two = Node::start(2).await;
    two.knows([(1, one.address)]);
    one.knows([(2, two.address)]);
    one.send(2, Lane::Control, "hello?");
    assert_eq!(one.event().await, Event::Unreachable(replica(2)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(one.events.try_recv().is_err());
    assert!(two.events.try_recv().is_err());
}
