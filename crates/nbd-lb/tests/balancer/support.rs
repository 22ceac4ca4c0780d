//! A load balancer in this process, beside a cluster of real ones.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser as _;
use metrics_exporter_prometheus::PrometheusBuilder;
use nbd_front::Route;
use nbd_lb::{Args, Config, LoadBalancer};
use nbd_service::ClusterConfig;
use nbd_testkit::http::{self, Response};
use nbd_testkit::{Cluster, ClusterBuilder, NbdClient, NodeProcess, Target};
use nbd_topology::ShardId;
use tokio::runtime::Runtime;

/// Time for anything that is awaited; nothing takes nearly as long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const SHARD: ShardId = ShardId(0);

/// Three replicas that serve.
pub(crate) fn cluster() -> Cluster {
    start(Cluster::builder().replicas(3))
}

/// A cluster that serves, with logs of a size for tests.
pub(crate) fn start(builder: ClusterBuilder) -> Cluster {
    let mut cluster = builder
        .argument("--log-segment-bytes=4MiB")
        .argument("--log-bytes-max=32MiB")
        .argument("--checkpoint-log-bytes=4MiB")
        .start();
    cluster.wait_until_serving();
    cluster
}

/// A load balancer that runs until it is dropped.
pub(crate) struct Balancer {
    balancer: Option<LoadBalancer>,
    runtime: Runtime,
}

impl Balancer {
    /// Of the cluster that this text describes.
    pub(crate) fn of(cluster: &str) -> Self {
        Self::with(cluster, &[])
    }

    /// The same, with these flags.
    pub(crate) fn with(cluster: &str, flags: &[&str]) -> Self {
        let cluster = ClusterConfig::from_toml(cluster, Path::new("cluster.toml")).unwrap();
        let flags = [&["nbd-lb", "--nbd=127.0.0.1:0", "--http=127.0.0.1:0"], flags].concat();
        let config = Config::new(cluster, Args::parse_from(flags)).unwrap();
        let runtime = Runtime::new().unwrap();
        // Not the process's own: that can be installed once only.
        let metrics = PrometheusBuilder::new().build_recorder().handle();
        let balancer = runtime.block_on(LoadBalancer::start(config, metrics)).unwrap();
        Self { balancer: Some(balancer), runtime }
    }

    fn balancer(&self) -> &LoadBalancer {
        self.balancer.as_ref().unwrap()
    }

    /// Waits until a route is published that `holds`.
    #[track_caller]
    pub(crate) fn wait_route(&self, what: &str, holds: impl Fn(&Route) -> bool) -> Route {
        let mut route = self.balancer().finder().route(SHARD).unwrap();
        let status = self.balancer().finder().status(SHARD).unwrap();
        let found = self.runtime.block_on(async {
            let found = tokio::time::timeout(DEADLINE, route.wait_for(|route| holds(route))).await;
            found.map(|route| route.unwrap().clone())
        });
        found.unwrap_or_else(|_| panic!("no route {what}: {:?}", *status.borrow()))
    }

    /// The route to the node of this name.
    #[track_caller]
    pub(crate) fn wait_leader(&self, node: &NodeProcess) -> Route {
        let name = node.name();
        self.wait_route(&format!("to {name}"), |route| {
            route.leader.as_ref().is_some_and(|leader| leader.node.as_str() == name)
        })
    }

    /// Waits until the shard's leader is reached, on another node than this one.
    #[track_caller]
    pub(crate) fn wait_reached_elsewhere(&self, shard: ShardId, node: &str) -> Route {
        let mut status = self.balancer().finder().status(shard).unwrap();
        let reached = self.runtime.block_on(async {
            let elsewhere = status.wait_for(|status| {
                let leader = status.route.leader.as_ref();
                status.reached && leader.is_some_and(|leader| leader.node.as_str() != node)
            });
            let reached = tokio::time::timeout(DEADLINE, elsewhere).await;
            reached.map(|status| status.unwrap().route.clone())
        });
        let now = self.balancer().finder().status(shard).unwrap();
        reached.unwrap_or_else(|_| panic!("not reached elsewhere: {:?}", *now.borrow()))
    }

    /// Waits until streams from so many nodes are open.
    #[track_caller]
    pub(crate) fn wait_streams(&self, count: usize) {
        let mut status = self.balancer().finder().status(SHARD).unwrap();
        let found = self.runtime.block_on(async {
            let found = status.wait_for(|status| status.streams == count);
            tokio::time::timeout(DEADLINE, found).await.is_ok()
        });
        assert!(found, "{:?}", self.balancer().finder().status(SHARD).unwrap().borrow());
    }

    /// Where clients attach.
    pub(crate) fn target(&self) -> Target {
        Target::lasting("lb", self.balancer().nbd_address().port())
    }

    /// A client that is attached.
    pub(crate) fn connect(&self, export: &str) -> NbdClient {
        NbdClient::connect(self.target().address(), export).unwrap()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        http::get(self.balancer().http_address(), path).unwrap()
    }

    pub(crate) fn stop(mut self) {
        let balancer = self.balancer.take().unwrap();
        self.runtime.block_on(balancer.stop());
    }
}

/// The `cluster.toml` of the nodes.
pub(crate) fn toml(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.cluster_file()).unwrap()
}

/// The same with every gRPC address but that of the node at `right` leading nowhere.
pub(crate) fn stale_but(cluster: &mut Cluster, right: usize) -> String {
    let mut text = toml(cluster);
    // Nobody listens there: privileged, and of no service in use.
    let mut nowhere = 2..;
    for (place, node) in cluster.nodes().iter().enumerate() {
        if place != right {
            let (host, port) = node.grpc_address();
            let old = format!("grpc = \"{host}:{port}\"");
            assert!(text.contains(&old), "{text}");
            let new = format!("grpc = \"{host}:{}\"", nowhere.next().unwrap());
            text = text.replace(&old, &new);
        }
    }
    text
}

/// Waits for a condition.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "waited {DEADLINE:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
