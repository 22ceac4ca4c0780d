//! A caller of `Control`, and what tests wait for.

use std::future::Future;
use std::thread;
use std::time::{Duration, Instant};

use nbd_rpc::v1;
use nbd_rpc::v1::admin_client::AdminClient;
use nbd_rpc::v1::control_client::ControlClient;
use nbd_testkit::{Cluster, NbdClient, NodeProcess, read_some};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

pub(crate) const MIB: u64 = 1 << 20;

/// Time for anything that is awaited; nothing takes nearly as long.
const DEADLINE: Duration = Duration::from_secs(60);

/// Time in which a client must be disconnected once its session was ended.
pub(crate) const DISCONNECT_MAX: Duration = Duration::from_secs(2);

/// Flags of nodes with logs so short that checkpoints happen.
pub(crate) const FLAGS: [&str; 4] = [
    "--log-segment-bytes=4MiB",
    "--log-bytes-max=32MiB",
    "--checkpoint-log-bytes=4MiB",
    "--log-cache-bytes=4MiB",
];

/// Three replicas, and no volumes but those created.
pub(crate) fn cluster() -> Cluster {
    let builder = Cluster::builder().replicas(3).auto_create(false);
    let mut cluster = FLAGS.iter().fold(builder, |builder, flag| builder.argument(flag)).start();
    cluster.wait_until_serving();
    cluster
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

/// Waits until the server has ended a client's connection.
#[track_caller]
pub(crate) fn assert_disconnected(client: &mut NbdClient) {
    let started = Instant::now();
    let stream = client.stream();
    stream.set_read_timeout(Some(DISCONNECT_MAX)).unwrap();
    let mut byte = [0];
    // The end of the stream, or a reset.
    let ended = match read_some(stream, &mut byte) {
        Ok(count) => count == 0,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    };
    assert!(ended, "still connected after {:?}", started.elapsed());
}

/// Shard 0 of the cluster.
#[expect(clippy::unnecessary_wraps, reason = "as messages have it")]
pub(crate) fn target() -> Option<v1::ShardTarget> {
    Some(v1::ShardTarget { cluster: "test".to_owned(), shard: 0 })
}

/// Calls one node.
pub(crate) struct Caller {
    runtime: Runtime,
    channel: Channel,
}

impl Caller {
    pub(crate) fn of(node: &NodeProcess) -> Self {
        let runtime = Runtime::new().unwrap();
        let (host, port) = node.grpc_address();
        let channel = runtime.block_on(async {
            nbd_rpc::channel(&format!("{host}:{port}")).unwrap().connect_lazy()
        });
        Self { runtime, channel }
    }

    /// Makes one call.
    pub(crate) fn once<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl FnOnce(ControlClient<Channel>) -> F,
    ) -> Result<T, Status> {
        let client = ControlClient::new(self.channel.clone());
        let answer = self.runtime.block_on(async {
            let answer = tokio::time::timeout(DEADLINE, call(client)).await;
            answer.expect("an answer in time")
        });
        answer.map(Response::into_inner)
    }

    /// Makes a call, again as long as the shard is unavailable.
    pub(crate) fn call<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl Fn(ControlClient<Channel>) -> F,
    ) -> Result<T, Status> {
        let started = Instant::now();
        loop {
            match self.once(&call) {
                Err(status)
                    if status.code() == Code::Unavailable && started.elapsed() < DEADLINE =>
                {
                    thread::sleep(Duration::from_millis(50));
                }
                answer => return answer,
            }
        }
    }

    /// The same for calls about members.
    pub(crate) fn admin<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl Fn(AdminClient<Channel>) -> F,
    ) -> Result<T, Status> {
        let started = Instant::now();
        loop {
            let answer = self.runtime.block_on(call(AdminClient::new(self.channel.clone())));
            match answer.map(Response::into_inner) {
                Err(status)
                    if status.code() == Code::Unavailable && started.elapsed() < DEADLINE =>
                {
                    thread::sleep(Duration::from_millis(50));
                }
                answer => return answer,
            }
        }
    }

    pub(crate) fn create(&self, name: &str, size: u64, key: &str) -> v1::CreateVolumeReply {
        let request = v1::CreateVolumeRequest {
            target: target(),
            name: name.to_owned(),
            size,
            description: format!("about {name}"),
            labels: [("env".to_owned(), "test".to_owned())].into(),
            key: key.to_owned(),
            now_ms: 1_700_000_000_000,
        };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.create_volume(request).await }
        })
        .unwrap()
    }

    pub(crate) fn get(&self, name: &str) -> Result<v1::GetVolumeReply, Status> {
        let request = v1::GetVolumeRequest { target: target(), name: name.to_owned() };
        self.call(|mut client| {
            let request = request.clone();
            async move { client.get_volume(request).await }
        })
    }

    pub(crate) fn list(&self, change: impl Fn(&mut v1::ListVolumesRequest)) -> Vec<v1::Volume> {
        let mut request =
            v1::ListVolumesRequest { target: target(), limit: 1000, ..Default::default() };
        change(&mut request);
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.list_volumes(request).await }
        });
        reply.unwrap().volumes
    }

    pub(crate) fn resize(&self, volume: u64, size: u64, force: bool) -> Result<u64, Status> {
        let request =
            v1::ResizeVolumeRequest { target: target(), volume, size, force, now_ms: 5, from: 0 };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.resize_volume(request).await }
        });
        reply.map(|reply| reply.volume.unwrap().size)
    }

    pub(crate) fn delete(&self, volume: u64, force: bool) -> Result<u32, Status> {
        let request = v1::DeleteVolumeRequest { target: target(), volume, force };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.delete_volume(request).await }
        });
        reply.map(|reply| reply.sessions_ended)
    }

    pub(crate) fn sessions(&self, volume: u64) -> Vec<v1::SessionView> {
        let mut request =
            v1::ListSessionsRequest { target: target(), volume, ..Default::default() };
        request.limit = 1000;
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.list_sessions(request).await }
        });
        reply.unwrap().sessions
    }

    pub(crate) fn end(&self, session: &[u8]) -> Result<(), Status> {
        let session = session.to_vec().into();
        let request = v1::EndSessionRequest { target: target(), session };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.end_session(request).await }
        });
        reply.map(|_| ())
    }

    pub(crate) fn activity(&self) -> v1::ActivityReply {
        let request = v1::ActivityRequest { target: target() };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.activity(request).await }
        });
        reply.unwrap()
    }

    pub(crate) fn shard(&self) -> v1::GetShardReply {
        let request = v1::GetShardRequest { target: target() };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.get_shard(request).await }
        });
        reply.unwrap()
    }

    pub(crate) fn cordon(&self, node: &str, cordoned: bool) {
        let request = v1::CordonNodeRequest { target: target(), node: node.to_owned(), cordoned };
        let reply = self.call(|mut client| {
            let request = request.clone();
            async move { client.cordon_node(request).await }
        });
        reply.unwrap();
    }
}
