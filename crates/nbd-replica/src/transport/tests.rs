mod measure;
mod proxy;
mod receiving;
mod sending;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;

const SHARD: ShardId = ShardId(3);
/// Longest wait for something that must happen, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(20);

fn replica(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

/// What a group would see, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Event {
    Message { to: ReplicaId, from: ReplicaId, bytes: Bytes },
    Newcomer { peer: ReplicaId, node: NodeName, directory: u128 },
    Traces(Vec<TraceNote>),
    Lost(NodeName),
    Unreachable(ReplicaId),
}

struct Recorder(mpsc::Sender<Event>);

impl Recorder {
    fn record(&self, event: Event) {
        self.0.try_send(event).expect("a test takes its events in time");
    }
}

impl PeerEvents for Recorder {
    fn message(&self, shard: ShardId, to: ReplicaId, from: ReplicaId, bytes: Bytes) {
        assert_eq!(shard, SHARD);
        self.record(Event::Message { to, from, bytes });
    }

    fn traces(&self, shard: ShardId, traces: Vec<TraceNote>) {
        assert_eq!(shard, SHARD);
        self.record(Event::Traces(traces));
    }

    fn newcomer(&self, shard: ShardId, peer: ReplicaId, node: &NodeName, directory: u128) {
        assert_eq!(shard, SHARD);
        self.record(Event::Newcomer { peer, node: node.clone(), directory });
    }

    fn connection_lost(&self, node: &NodeName) {
        self.record(Event::Lost(node.clone()));
    }

    fn unreachable(&self, shard: ShardId, peer: ReplicaId) {
        assert_eq!(shard, SHARD);
        self.record(Event::Unreachable(peer));
    }
}

/// A node with one replica of [`SHARD`], whose id is also its directory id.
struct Node {
    id: u64,
    address: SocketAddr,
    handle: TransportHandle,
    events: mpsc::Receiver<Event>,
    stop: CancellationToken,
}

impl Node {
    async fn start(id: u64) -> Self {
        Self::start_with(id, |transport| transport).await
    }

    async fn start_with(id: u64, change: impl FnOnce(Transport) -> Transport) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, events) = mpsc::channel(1 << 20);
        let stop = CancellationToken::new();
        let me = Transport::new("demo".parse().unwrap(), node_name(id), id.into(), 100 + id);
        let handle = change(me).spawn(Arc::new(Recorder(sender)), stop.clone());
        let serving = nbd_rpc::server().add_service(handle.service()).serve_with_incoming_shutdown(
            nbd_rpc::incoming(listener),
            stop.clone().cancelled_owned(),
        );
        tokio::spawn(serving);
        Self { id, address, handle, events, stop }
    }

    fn knows(&self, peers: impl IntoIterator<Item = (u64, SocketAddr)>) {
        let peers = peers.into_iter().map(|(id, address)| (replica(id), at(id, address)));
        self.handle.set_peers(SHARD, replica(self.id), peers.collect());
    }

    fn send(&self, to: u64, lane: Lane, bytes: impl Into<Bytes>) {
        let message = OutMessage { to: replica(to), bulk: lane == Lane::Bulk, bytes: bytes.into() };
        self.handle.send(SHARD, replica(self.id), vec![message]);
    }

    async fn event(&mut self) -> Event {
        timeout(PATIENCE, self.events.recv()).await.expect("an event in time").unwrap()
    }

    /// The next message, past hints and the like.
    async fn message(&mut self) -> Bytes {
        loop {
            if let Event::Message { bytes, .. } = self.event().await {
                return bytes;
            }
        }
    }

    async fn lost(&mut self, node: u64) {
        while self.event().await != Event::Lost(node_name(node)) {}
    }

    fn peer(&self, id: u64) -> Arc<Peer> {
        Arc::clone(self.handle.shared.book.read().peer(SHARD, replica(id)).unwrap())
    }
}

fn node_name(id: u64) -> NodeName {
    format!("n{id}").parse().unwrap()
}

fn at(id: u64, address: SocketAddr) -> PeerAddress {
    PeerAddress { node: node_name(id), grpc: address.to_string(), directory: Some(id.into()) }
}

/// Two nodes that have both lanes up, 1 sending to 2.
async fn pair() -> (Node, Node) {
    let (one, mut two) = (Node::start(1).await, Node::start(2).await);
    one.knows([(2, two.address)]);
    two.knows([(1, one.address)]);
    settle(&one, &mut two).await;
    (one, two)
}

/// Waits until both lanes from `one` to `two` work.
async fn settle(one: &Node, two: &mut Node) {
    for lane in Lane::ALL {
        one.send(two.id, lane, "settle");
    }
    for _ in Lane::ALL {
        assert_eq!(two.message().await, "settle");
    }
}
