//! A node that leads, another that forwards to it, and a network between them that can be cut.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::BytesMut;
use nbd_front::{
    Access, BytePermit, ClientAt, Event, LeaderAt, Links, QueryData, ReadData, Route,
    SessionClient, ShardClient,
};
use nbd_relay::{Caller, Decoder, FromCaller, FromLeader, Hello, PREAMBLE, Verdict, put_mutation};
use nbd_service::telemetry::{PrometheusHandle, metrics_recorder};
use nbd_service::{ClusterConfig, Shutdown};
use nbd_session::{Query, QueryId};
use nbd_store::{
    Epoch, Extent, Outcome, Owner, SessionId, VolumeId, command, encode_trim, encode_write,
};
use nbd_topology::{ReplicaId, Term};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::app::Replica;
use crate::config::{Config, Tuning};
use crate::hosted::read::Question;
use crate::hosted::{Attachments, HostedShard};
use crate::node_port::NodePort;
use crate::relay_service::RelayService;
use crate::session_service;

/// Longer than anything here takes, also on a loaded machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

const CLUSTER: &str = r#"
    name = "demo"
    [[nodes]]
    name = "leads"
    nbd = "127.0.0.1:1"
    grpc = "127.0.0.1:2"
    http = "127.0.0.1:3"
    [[shards]]
    replicas = ["leads"]
"#;

fn recorder() -> PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER.get_or_init(|| metrics_recorder().unwrap()).clone()
}

/// What a node needs to reach the shards of the cluster.
fn access() -> Arc<Access> {
    Arc::new(Access {
        cluster: "demo".parse().unwrap(),
        owner: Owner { node: 1, incarnation: 1 },
        name: "follows".into(),
        links: Links::default(),
        shutdown: Shutdown::new(),
    })
}

/// A node with a shard of one replica, and its session service on an address of its own.
pub(super) struct Leader {
    pub(super) hosted: HostedShard,
    /// The shard as the node's own clients reach it.
    pub(super) shard: ShardClient,
    pub(super) volume: VolumeId,
    pub(super) address: String,
    relays: RelayService,
    replica: Replica,
    stop: CancellationToken,
    _directory: TempDir,
}

impl Leader {
    pub(super) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cluster = ClusterConfig::from_toml(CLUSTER, Path::new("cluster.toml")).unwrap();
        let mut tuning = Tuning::defaults();
        tuning.log_segment_bytes = nbd_service::ByteSize::new(16 << 20);
        tuning.log_bytes_max = nbd_service::ByteSize::new(256 << 20);
        tuning.checkpoint_log_bytes = nbd_service::ByteSize::new(64 << 20);
        let node = "leads".parse().unwrap();
        let data = directory.path().join("data");
        let mut config = Config::new(cluster, node, data, tuning).unwrap();
        let free: nbd_service::HostPort = "127.0.0.1:0".parse().unwrap();
        config.listen.nbd = free.clone();
        config.listen.grpc = free.clone();
        config.listen.http = free;
        let replica = Replica::start(config, recorder()).await.unwrap();
        let hosted = replica.shards.values().next().unwrap().clone();
        let shard = hosted.client(access());
        let create = command::encode_create_volume("vol", 256 << 20, "").unwrap();
        let Outcome::VolumeCreated(volume) = shard.run(&create).await.unwrap() else {
            panic!("the volume was there")
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let cluster = "demo".parse().unwrap();
        let service = session_service::service(cluster, replica.shards.clone(), None);
        let (cluster, shards) = (access().cluster.clone(), replica.shards.clone());
        let relays = RelayService::new(cluster, shards, hosted.hosting.shutdown.clone());
        let (port, callers) = NodePort::new(listener, relays.clone());
        tokio::spawn(port.run(stop.clone()));
        let server =
            nbd_rpc::server().add_service(service).serve_with_incoming_shutdown(callers, stopped);
        tokio::spawn(server);
        let volume = volume.id;
        Self { hosted, shard, volume, address, relays, replica, stop, _directory: directory }
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        drop((self.hosted, self.shard));
        self.replica.stop().await.unwrap();
    }

    /// Takes all memory that small requests of relays have, until what is returned is dropped.
    pub(super) fn hold_budget(&self) -> Vec<BytePermit> {
        let budget = &self.relays.shared.mutation_budget;
        std::iter::from_fn(|| budget.try_acquire(4096)).collect()
    }

    /// Bytes of the volume as the leader has them.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let query = Query::Read { offset, len, holes: false };
        let (shard, volume) = (self.hosted.clone(), self.volume);
        let question = Question { shard, volume, query, trace: None };
        match question.answer().await.unwrap() {
            QueryData::Bytes(data) => data.bytes.into(),
            other => panic!("{other:?}"),
        }
    }
}

/// A node that hosts a follower: it learns of the leader by `route` alone.
pub(super) struct Follower {
    pub(super) hosted: HostedShard,
    pub(super) shard: ShardClient,
    pub(super) route: watch::Sender<Route>,
}

pub(super) fn route_to(address: &str, term: u64) -> Route {
    let leader = LeaderAt {
        replica: ReplicaId::new(term).unwrap(),
        node: "leads".parse().unwrap(),
        grpc: address.to_owned(),
        local: false,
    };
    Route { term: Term(term), leader: Some(leader), serving: false }
}

impl Follower {
    pub(super) fn of(leader: &Leader) -> Self {
        let route = watch::Sender::new(Route::default());
        let hosted = HostedShard { attached: Attachments::default(), ..leader.hosted.clone() };
        let (id, replica) = (hosted.group.shard(), Arc::new(hosted.clone()));
        let shard = ShardClient::new(id, route.subscribe(), Some(replica), access());
        Self { hosted, shard, route }
    }
}

/// The shard as a process without replicas reaches it, which learns of the leader by the route.
pub(super) fn without_replica(leader: &Leader) -> (ShardClient, watch::Sender<Route>) {
    let route = watch::Sender::new(Route::default());
    let id = leader.hosted.group.shard();
    (ShardClient::new(id, route.subscribe(), None, access()), route)
}

/// Whom sessions are for.
fn client() -> ClientAt {
    ClientAt { address: "10.0.0.9:4711".to_owned(), since_ms: 1_700_000_000_000 }
}

/// A session and the requests made over it.
pub(super) struct Client {
    pub(super) session: SessionClient,
}

impl Client {
    pub(super) async fn open(shard: &ShardClient, volume: VolumeId) -> Self {
        let mut session = SessionClient::new(shard.clone(), volume, client());
        tokio::time::timeout(DEADLINE, session.open()).await.unwrap().unwrap();
        Self { session }
    }

    /// Writes, in mutations of at most 1 MiB; each is answered with `token`. How many there are.
    pub(super) async fn write(&mut self, token: usize, offset: u64, bytes: &[u8]) -> usize {
        let parts = bytes.chunks(1 << 20);
        let count = parts.len();
        for (number, part) in parts.enumerate() {
            let seq = self.session.reserve(1);
            let (id, epoch, volume) =
                (self.session.id(), self.session.epoch(), self.session.volume());
            let at = offset + (number << 20) as u64;
            let command = encode_write(id, epoch, seq, volume, at, part);
            self.session.submit(seq, command, token, None, None).await.unwrap();
        }
        count
    }

    pub(super) async fn trim(&mut self, token: usize, offset: u64, len: u64) {
        let seq = self.session.reserve(1);
        let (id, epoch, volume) = (self.session.id(), self.session.epoch(), self.session.volume());
        let command = encode_trim(id, epoch, seq, volume, offset, len);
        self.session.submit(seq, command, token, None, None).await.unwrap();
    }

    pub(super) async fn event(&mut self) -> Event {
        let event = async {
            loop {
                let signal = self.session.wait().await;
                if let Some(event) = self.session.take(signal).await.unwrap() {
                    return event;
                }
            }
        };
        tokio::time::timeout(DEADLINE, event).await.expect("an answer in time")
    }

    /// Lets the session get on with what is not an answer, for a while.
    pub(super) async fn idle(&mut self, time: Duration) {
        let events = self.events_within(time).await;
        assert!(events.is_empty(), "{events:?}");
    }

    /// Everything that comes of the session within some time.
    pub(super) async fn events_within(&mut self, time: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let gathering = async {
            loop {
                let signal = self.session.wait().await;
                events.extend(self.session.take(signal).await.unwrap());
            }
        };
        let _ = tokio::time::timeout(time, gathering).await;
        events
    }

    /// Waits for so many mutations, which must all succeed.
    pub(super) async fn done(&mut self, mutations: usize) -> Vec<usize> {
        let mut tokens = Vec::new();
        while tokens.len() < mutations {
            match self.event().await {
                Event::Mutation { token, outcome: Outcome::Done } => tokens.push(token),
                other => panic!("{other:?}"),
            }
        }
        tokens
    }

    pub(super) async fn read(&mut self, offset: u64, len: u64, holes: bool) -> ReadData {
        self.session.query(Query::Read { offset, len, holes }, 0, None);
        match self.event().await {
            Event::Read { result: Ok(data), .. } => data,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn status(&mut self, offset: u64, len: u64) -> Vec<Extent> {
        self.session.query(Query::BlockStatus { offset, len, extents_max: 100 }, 0, None);
        match self.event().await {
            Event::Status { result: Ok(extents), .. } => extents,
            other => panic!("{other:?}"),
        }
    }
}

/// A relay without a session client at its end.
pub(super) struct RawRelay {
    stream: TcpStream,
    decoder: Decoder,
    input: BytesMut,
}

impl RawRelay {
    /// A connection behind its preamble.
    pub(super) async fn connect(leader: &Leader) -> Self {
        let mut stream = TcpStream::connect(&leader.address).await.unwrap();
        stream.write_all(&PREAMBLE).await.unwrap();
        Self { stream, decoder: Decoder::default(), input: BytesMut::new() }
    }

    /// The session 77 of the leader's volume, attached.
    pub(super) async fn open(leader: &Leader, epoch: u32) -> Self {
        Self::attach(leader, 77, epoch).await
    }

    /// A session of the leader's volume, attached.
    pub(super) async fn attach(leader: &Leader, session: u128, epoch: u32) -> Self {
        let mut relay = Self::connect(leader).await;
        relay.hello("demo", 0, session, epoch, leader.volume).await;
        assert_eq!(relay.next().await, FromLeader::Verdict(Verdict::Attached));
        relay
    }

    pub(super) async fn hello(
        &mut self,
        cluster: &str,
        shard: u32,
        session: u128,
        epoch: u32,
        volume: VolumeId,
    ) {
        let hello = Hello {
            cluster: cluster.to_owned(),
            shard,
            session: SessionId(session),
            epoch: Epoch(epoch),
            volume,
            owner: Owner { node: 5, incarnation: 6 },
            caller: Caller::default(),
        };
        let mut out = BytesMut::new();
        assert_eq!(FromCaller::Hello(hello).put(&mut out), None);
        self.send(&out).await;
    }

    /// Asks for bytes.
    pub(super) async fn ask(&mut self, id: u64, offset: u64, len: u64) {
        let query = Query::Read { offset, len, holes: false };
        let mut out = BytesMut::new();
        assert_eq!(FromCaller::Query { id: QueryId(id), query }.put(&mut out), None);
        self.send(&out).await;
    }

    /// The frame that a command is sent in.
    pub(super) fn frame_of(&self, command: bytes::Bytes) -> Vec<u8> {
        let mut out = BytesMut::new();
        let behind = put_mutation(&mut out, command);
        [&out[..], behind.as_deref().unwrap_or_default()].concat()
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message of the leader.
    pub(super) async fn next(&mut self) -> FromLeader {
        let next = async {
            loop {
                if let Some(frame) = self.decoder.decode(&mut self.input).unwrap() {
                    return FromLeader::decode(frame).unwrap();
                }
                let received = self.stream.read_buf(&mut self.input).await.unwrap();
                assert!(received > 0, "the leader closed the connection");
            }
        };
        tokio::time::timeout(DEADLINE, next).await.expect("an answer in time")
    }

    /// The next message that says more than that the leader is alive.
    pub(super) async fn answer(&mut self) -> FromLeader {
        loop {
            match self.next().await {
                FromLeader::Alive => {}
                answer => return answer,
            }
        }
    }

    /// The bytes of the one read that is asked for, in however many pieces they come.
    pub(super) async fn read_answer(&mut self, len: usize) -> Vec<u8> {
        let mut found = Vec::new();
        while found.len() < len {
            match self.answer().await {
                FromLeader::Bytes { bytes, .. } => found.extend_from_slice(&bytes),
                other => panic!("no bytes but {other:?}"),
            }
        }
        found
    }

    pub(super) async fn is_closed(&mut self) -> bool {
        let closed = self.stream.read_buf(&mut self.input);
        tokio::time::timeout(DEADLINE, closed).await.is_ok_and(|read| matches!(read, Ok(0)))
    }

    pub(super) async fn is_silent_for(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.stream.read_buf(&mut self.input)).await.is_err()
    }
}

/// A wire to `to` that can be held (nothing comes back any more) and cut.
pub(super) struct Wire {
    pub(super) address: String,
    back: Arc<Back>,
    cut: CancellationToken,
}

/// What comes back over a wire.
struct Back {
    /// Bytes that have come.
    passed: AtomicU64,
    /// Nothing more comes once it is as many as this.
    allowed: watch::Sender<u64>,
}

impl Wire {
    pub(super) async fn to(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (passed, allowed) = (AtomicU64::new(0), watch::Sender::new(u64::MAX));
        let (back, cut) = (Arc::new(Back { passed, allowed }), CancellationToken::new());
        let (of_all, to, stop) = (Arc::clone(&back), to.to_owned(), cut.clone());
        tokio::spawn(cut.clone().run_until_cancelled_owned(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let Ok(far) = TcpStream::connect(&to).await else { continue };
                let back = Arc::clone(&of_all);
                tokio::spawn(stop.clone().run_until_cancelled_owned(carry(near, far, back)));
            }
        }));
        Self { address, back, cut }
    }

    /// What the other side sends stays on its way from now on.
    pub(super) fn hold(&self) {
        self.hold_after(0);
    }

    /// The same once so many bytes more have come, or a few more than that.
    pub(super) fn hold_after(&self, bytes: u64) {
        self.back.allowed.send_replace(self.passed() + bytes);
    }

    /// Bytes that have come back so far.
    pub(super) fn passed(&self) -> u64 {
        self.back.passed.load(Ordering::Relaxed)
    }

    /// The connections break, and nobody answers there any more.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }
}

async fn carry(near: TcpStream, far: TcpStream, of_all: Arc<Back>) {
    let mut allowed = of_all.allowed.subscribe();
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let there = tokio::io::copy(&mut near_read, &mut far_write);
    let back = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = far_read.read(&mut bytes).await {
            let may_pass = |allowed: &u64| of_all.passed.load(Ordering::Relaxed) < *allowed;
            if allowed.wait_for(may_pass).await.is_err()
                || near_write.write_all(&bytes[..count]).await.is_err()
            {
                return;
            }
            of_all.passed.fetch_add(count as u64, Ordering::Relaxed);
        }
    };
    tokio::select! {
        _ = there => {}
        () = back => {}
    }
}
