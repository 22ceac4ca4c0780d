//! Watchers of a node over real connections, while a test says who leads.

use std::path::Path;
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use nbd_front::{LeaderAt, Route};
use nbd_rpc::v1::session_client::SessionClient as RpcClient;
use nbd_service::{ByteSize, ClusterConfig, HostPort};
use nbd_topology::{ReplicaId, Term};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch as channel;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

use super::super::*;
use crate::app::Replica;
use crate::config::{Config, Tuning};

/// Longer than anything here takes, also on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(60);

const CLUSTER: &str = r#"
    name = "demo"
    [[nodes]]
    name = "alone"
    nbd = "127.0.0.1:1"
    grpc = "127.0.0.1:2"
    http = "127.0.0.1:3"
    [[shards]]
    replicas = ["alone"]
"#;

fn cluster(text: &str) -> ClusterConfig {
    ClusterConfig::from_toml(text, Path::new("cluster.toml")).unwrap()
}

fn cluster_name() -> ClusterName {
    "demo".parse().unwrap()
}

/// A node with a shard of one replica, and its session service once more, on an address of its own
/// and with a route that the test sets.
struct Scene {
    replica: Replica,
    route: channel::Sender<Route>,
    client: RpcClient<Channel>,
    stop: CancellationToken,
    _directory: TempDir,
}

impl Scene {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut tuning = Tuning::defaults();
        tuning.log_segment_bytes = ByteSize::new(4 << 20);
        tuning.log_bytes_max = ByteSize::new(32 << 20);
        tuning.checkpoint_log_bytes = ByteSize::new(8 << 20);
        let node = "alone".parse().unwrap();
        let data = directory.path().join("data");
        let mut config = Config::new(cluster(CLUSTER), node, data, tuning).unwrap();
        let free: HostPort = "127.0.0.1:0".parse().unwrap();
        config.listen.nbd = free.clone();
        config.listen.grpc = free.clone();
        config.listen.http = free;
        // Not the process's own: that can be installed once only.
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let replica = Replica::start(config, metrics).await.unwrap();
        let led = async {
            while !replica.is_ready() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, led).await.unwrap();

        let (id, shard) = replica.shards.iter().next().unwrap();
        let route = channel::Sender::new(Route::default());
        let group = shard.group.with_route(route.subscribe());
        let shards = HashMap::from([(*id, HostedShard { group, ..shard.clone() })]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // The node has moved since its shard was formed.
        let moved = CLUSTER.replace("127.0.0.1:2", "127.0.0.1:22");
        let moved = cluster(&moved.replace("127.0.0.1:1", "127.0.0.1:11"));
        let stop = CancellationToken::new();
        let server = nbd_rpc::server()
            .add_service(service(cluster_name(), shards, Some(Addresses::new(Arc::new(moved)))))
            .serve_with_incoming_shutdown(
                nbd_rpc::incoming(listener),
                stop.clone().cancelled_owned(),
            );
        tokio::spawn(server);
        let client = RpcClient::new(nbd_rpc::channel(&address).unwrap().connect_lazy());
        Self { replica, route, client, stop, _directory: directory }
    }

    async fn watch(&self, cluster: &str, shard: u32) -> Result<Streaming<v1::ShardView>, Status> {
        watch(self.client.clone(), cluster, shard).await
    }

    async fn stop(self) {
        self.stop.cancel();
        self.replica.stop().await.unwrap();
    }
}

async fn watch(
    mut client: RpcClient<Channel>,
    cluster: &str,
    shard: u32,
) -> Result<Streaming<v1::ShardView>, Status> {
    let target = Some(v1::ShardTarget { cluster: cluster.to_owned(), shard });
    Ok(client.watch(v1::WatchRequest { target }).await?.into_inner())
}

async fn next(views: &mut Streaming<v1::ShardView>) -> v1::ShardView {
    let next = tokio::time::timeout(DEADLINE, views.message()).await;
    next.expect("a view in time").unwrap().expect("the stream goes on")
}

fn route(term: u64, leader: u64, serving: bool) -> Route {
    let leader = LeaderAt {
        replica: ReplicaId::new(leader).unwrap(),
        node: format!("n{leader}").parse().unwrap(),
        grpc: format!("n{leader}:7400"),
        local: serving,
    };
    Route { term: Term(term), leader: Some(leader), serving }
}

fn at(replica: u64, node: &str, grpc: &str, nbd: &str) -> v1::ReplicaAddress {
    let (node, grpc, nbd) = (node.to_owned(), grpc.to_owned(), nbd.to_owned());
    v1::ReplicaAddress { replica, node, grpc, nbd }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_is_told_at_once_and_of_every_change() {
    let scene = Scene::start().await;
    let mut views = scene.watch("demo", 0).await.unwrap();
    let alone = at(1, "alone", "127.0.0.1:22", "127.0.0.1:11");
    let members = vec![v1::ShardMember { at: Some(alone), voter: true }];
    let unknown = v1::ShardView { replica: 1, term: 0, leader: None, serving: false, members };
    assert_eq!(next(&mut views).await, unknown, "at the address that is configured by now");

    scene.route.send_replace(route(4, 2, false));
    let elsewhere =
        v1::ShardView { term: 4, leader: Some(at(2, "n2", "n2:7400", "")), ..unknown.clone() };
    assert_eq!(next(&mut views).await, elsewhere);

    scene.route.send_replace(route(5, 1, true));
    let here = v1::ShardView {
        term: 5,
        leader: Some(at(1, "n1", "n1:7400", "127.0.0.1:11")),
        serving: true,
        ..unknown.clone()
    };
    assert_eq!(next(&mut views).await, here);
    // One who comes later learns the same.
    let mut late = scene.watch("demo", 0).await.unwrap();
    assert_eq!(next(&mut late).await, here);

    // Nothing changes, nothing is said.
    let silence = tokio::time::timeout(Duration::from_millis(700), views.message()).await;
    assert!(silence.is_err(), "{silence:?}");

    // The group ends.
    let Scene { replica, route, client: _, stop, _directory } = scene;
    drop(route);
    let ended = tokio::time::timeout(DEADLINE, views.message()).await.unwrap().unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable);
    drop((views, late));
    stop.cancel();
    replica.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_does_not_belong_is_refused() {
    let scene = Scene::start().await;
    let code = |result: Result<Streaming<v1::ShardView>, Status>| result.unwrap_err().code();
    assert_eq!(code(scene.watch("other", 0).await), Code::FailedPrecondition);
    assert_eq!(code(scene.watch("other", 7).await), Code::FailedPrecondition);
    assert_eq!(code(scene.watch("demo", 7).await), Code::NotFound);
    let nameless = scene.client.clone().watch(v1::WatchRequest { target: None }).await;
    assert_eq!(nameless.unwrap_err().code(), Code::InvalidArgument);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_are_bounded_and_leave_their_places() {
    let scene = Scene::start().await;
    let (id, shard) = scene.replica.shards.iter().next().unwrap();
    let shards = HashMap::from([(*id, shard.clone())]);
    let shared = Shared {
        cluster: cluster_name(),
        shards,
        watchers: Arc::new(Semaphore::new(1)),
        addresses: None,
    };
    let service = SessionService { shared: Arc::new(shared) };
    let target = Some(v1::ShardTarget { cluster: "demo".to_owned(), shard: 0 });
    let request = || Request::new(v1::WatchRequest { target: target.clone() });
    let first = service.watch(request()).await.unwrap();
    let second = service.watch(request()).await;
    assert_eq!(second.map(|_| ()).unwrap_err().code(), Code::ResourceExhausted);
    drop(first);
    let again = async {
        while service.watch(request()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, again).await.expect("the place is free again");
    drop(service);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_ends_its_watchers_streams() {
    let scene = Scene::start().await;
    // The node's own service, as it serves it.
    let own = nbd_rpc::channel(&scene.replica.grpc_address().to_string()).unwrap();
    let mut views = watch(RpcClient::new(own.connect_lazy()), "demo", 0).await.unwrap();
    let first = next(&mut views).await;
    assert!(first.serving && first.leader.unwrap().replica == 1);
    let own = first.members[0].at.as_ref().unwrap();
    assert_eq!((own.grpc.as_str(), own.nbd.as_str()), ("127.0.0.1:2", "127.0.0.1:1"));
    scene.stop().await;
    let ended = tokio::time::timeout(DEADLINE, async {
        loop {
            match views.message().await {
                Ok(Some(_)) => {}
                ended => break ended,
            }
        }
    });
    assert_eq!(ended.await.unwrap().unwrap_err().code(), Code::Unavailable);
}
