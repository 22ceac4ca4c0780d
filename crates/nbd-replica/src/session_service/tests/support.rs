//! A node that leads, another that forwards to it, and a network between them that can be cut.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nbd_front::{
    Access, Event, LeaderAt, Links, QueryData, ReadData, Route, SessionClient, ShardClient,
};
use nbd_service::telemetry::{PrometheusHandle, metrics_recorder};
use nbd_service::{ClusterConfig, Shutdown};
use nbd_session::Query;
use nbd_store::{Extent, Outcome, Owner, VolumeId, command, encode_trim, encode_write};
use nbd_topology::{ReplicaId, Term};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::app::Replica;
use crate::config::{Config, Tuning};
use crate::hosted::read::Question;
use crate::hosted::{AttachedSessions, HostedShard};
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
        let server = nbd_rpc::server()
            .add_service(service)
            .serve_with_incoming_shutdown(nbd_rpc::incoming(listener), stopped);
        tokio::spawn(server);
        Self { hosted, shard, volume: volume.id, address, replica, stop, _directory: directory }
    }

    pub(super) async fn stop(self) {
        self.stop.cancel();
        drop((self.hosted, self.shard));
        self.replica.stop().await.unwrap();
    }

    /// Bytes of the volume as the leader has them.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let query = Query::Read { offset, len, holes: false };
        let question = Question { shard: self.hosted.clone(), volume: self.volume, query };
        match question.answer().await.unwrap() {
            QueryData::Bytes(data) => data.bytes,
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
        let hosted = HostedShard { attached: AttachedSessions::default(), ..leader.hosted.clone() };
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

/// A session and the requests made over it.
pub(super) struct Client {
    pub(super) session: SessionClient,
}

impl Client {
    pub(super) async fn open(shard: &ShardClient, volume: VolumeId) -> Self {
        let mut session = SessionClient::new(shard.clone(), volume);
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
            self.session.submit(seq, command, token, None).await.unwrap();
        }
        count
    }

    pub(super) async fn trim(&mut self, token: usize, offset: u64, len: u64) {
        let seq = self.session.reserve(1);
        let (id, epoch, volume) = (self.session.id(), self.session.epoch(), self.session.volume());
        let command = encode_trim(id, epoch, seq, volume, offset, len);
        self.session.submit(seq, command, token, None).await.unwrap();
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
        let idling = async {
            loop {
                let signal = self.session.wait().await;
                let event = self.session.take(signal).await.unwrap();
                assert!(event.is_none(), "{event:?}");
            }
        };
        let _ = tokio::time::timeout(time, idling).await;
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
        self.session.query(Query::Read { offset, len, holes }, 0);
        match self.event().await {
            Event::Read { result: Ok(data), .. } => data,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn status(&mut self, offset: u64, len: u64) -> Vec<Extent> {
        self.session.query(Query::BlockStatus { offset, len, extents_max: 100 }, 0);
        match self.event().await {
            Event::Status { result: Ok(extents), .. } => extents,
            other => panic!("{other:?}"),
        }
    }
}

/// A wire to `to` that can be held (nothing comes back any more) and cut.
pub(super) struct Wire {
    pub(super) address: String,
    hold: watch::Sender<bool>,
    cut: CancellationToken,
}

impl Wire {
    pub(super) async fn to(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (hold, cut) = (watch::Sender::new(false), CancellationToken::new());
        let (held, to, stop) = (hold.subscribe(), to.to_owned(), cut.clone());
        tokio::spawn(cut.clone().run_until_cancelled_owned(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let Ok(far) = TcpStream::connect(&to).await else { continue };
                tokio::spawn(stop.clone().run_until_cancelled_owned(carry(
                    near,
                    far,
                    held.clone(),
                )));
            }
        }));
        Self { address, hold, cut }
    }

    /// What the other side sends stays on its way from now on.
    pub(super) fn hold(&self) {
        self.hold.send_replace(true);
    }

    /// The connections break, and nobody answers there any more.
    pub(super) fn cut(&self) {
        self.cut.cancel();
    }
}

async fn carry(near: TcpStream, far: TcpStream, mut held: watch::Receiver<bool>) {
    let (mut near_read, mut near_write) = near.into_split();
    let (mut far_read, mut far_write) = far.into_split();
    let there = tokio::io::copy(&mut near_read, &mut far_write);
    let back = async {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = far_read.read(&mut bytes).await {
            if held.wait_for(|held| !held).await.is_err()
                || near_write.write_all(&bytes[..count]).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        _ = there => {}
        () = back => {}
    }
}
