//! The leader's side of what other nodes forward: the gRPC service `Session`.
//!
//! What belongs to an attached session comes over a relay instead: `relay_service`.
//!
//! Everything a peer says is checked before it counts: that it means this cluster and a shard that
//! is here, and that a command is one that may come this way.
//!
//! - [`watch`]: who follows a shard. [`wire`]: between the types here and those of the protocol.
//! - This file: the calls, and the checks that they share.

mod watch;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;

use nbd_front::RunError;
use nbd_rpc::identity::check_cluster;
use nbd_rpc::v1::session_server::{Session, SessionServer};
use nbd_rpc::{MESSAGE_BYTES_MAX, Refusal, v1};
use nbd_store::{CommandKind, VolumeId, VolumeInfo, decode_all};
use nbd_topology::{ClusterName, ShardId};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use self::watch::{VIEWS_MAX, WATCHERS_MAX, Watcher};
use crate::hosted::HostedShard;
use crate::peers::Addresses;

/// Bytes of volume descriptions in one page.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// Volumes in one page, however small: more than fit in if their texts have 1 KiB.
const PAGE_VOLUMES_MAX: usize = 1024;

/// Bytes that a description takes beside its texts, generously.
const PAGE_ITEM_BYTES: usize = 64;

/// Serves the shards of this node to the other nodes.
#[derive(Debug, Clone)]
pub(crate) struct SessionService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cluster: ClusterName,
    shards: HashMap<ShardId, HostedShard>,
    watchers: Arc<Semaphore>,
    /// Where nodes are reached. `None`: where they were registered.
    addresses: Option<Addresses>,
}

/// The service, to be added to the node's gRPC server.
///
/// Watchers are told where nodes are as `addresses` say; without, where they were registered.
pub(crate) fn service(
    cluster: ClusterName,
    shards: HashMap<ShardId, HostedShard>,
    addresses: Option<Addresses>,
) -> SessionServer<SessionService> {
    let watchers = Arc::new(Semaphore::new(WATCHERS_MAX));
    let shared = Arc::new(Shared { cluster, shards, watchers, addresses });
    SessionServer::new(SessionService { shared })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

impl Shared {
    /// The shard that is meant.
    fn shard(&self, target: Option<&v1::ShardTarget>) -> Result<&HostedShard, Refusal> {
        let target = target.ok_or(Refusal::Malformed("no shard is named"))?;
        // First: of two clusters that differ in their shards, the cluster is what is wrong.
        check_cluster(&target.cluster, &self.cluster)?;
        let shard = ShardId(target.shard);
        self.shards.get(&shard).ok_or(Refusal::Shard(shard))
    }
}

/// Who leads instead, as far as is known here.
fn not_leader(shard: &HostedShard) -> v1::NotLeader {
    let route = shard.group.route();
    let route = route.borrow();
    // Who does not serve yet, itself, cannot be asked either.
    let leader = route.leader.as_ref().filter(|leader| !leader.local);
    v1::NotLeader {
        term: route.term.0,
        node: leader.map(|leader| leader.node.to_string()).unwrap_or_default(),
        grpc: leader.map(|leader| leader.grpc.clone()).unwrap_or_default(),
    }
}

fn stopping() -> Status {
    Status::unavailable("this node is stopping")
}

/// A look-up that this replica could not do: somebody else leads, or nobody.
fn not_looked_up(shard: &HostedShard, error: &RunError) -> Result<v1::NotLeader, Status> {
    match error {
        RunError::NotLeader | RunError::Lost => Ok(not_leader(shard)),
        RunError::Stopped(_) => Err(stopping()),
    }
}

/// Refuses commands that belong to an attachment, or that are none.
fn check_run(command: &[u8]) -> Result<(), Refusal> {
    let mut commands = decode_all(command);
    let Some(Ok(decoded)) = commands.next() else {
        return Err(Refusal::Malformed("a command that is none"));
    };
    // Others go through services that know who may.
    let may_run = matches!(
        decoded.header.kind,
        CommandKind::CreateVolume
            | CommandKind::NewVolume
            | CommandKind::CloseSession
            | CommandKind::EndSessions
            | CommandKind::AddCounter
    );
    if !may_run || commands.next().is_some() {
        return Err(Refusal::Malformed("one command that needs no attachment is run at a time"));
    }
    Ok(())
}

/// As many volumes as fit in one page.
fn page(volumes: &[VolumeInfo]) -> v1::VolumePage {
    let mut bytes = 0;
    let fitting = volumes.iter().take_while(|volume| {
        bytes += volume.name.len() + volume.description.len() + PAGE_ITEM_BYTES;
        bytes <= PAGE_BYTES_MAX
    });
    v1::VolumePage { volumes: fitting.map(wire::volume_to).collect() }
}

#[tonic::async_trait]
impl Session for SessionService {
    async fn run(
        &self,
        request: Request<v1::RunRequest>,
    ) -> Result<Response<v1::RunReply>, Status> {
        use v1::run_reply::Result as Reply;
        let request = request.into_inner();
        let shard = self.shared.shard(request.target.as_ref())?;
        check_run(&request.command)?;
        let result = if shard.group.route().borrow().serving {
            match shard.group.run(request.command).await {
                Ok(outcome) => wire::outcome_to(&outcome).map_or_else(
                    || Err(Status::internal("an outcome that cannot be told")),
                    |outcome| Ok(Reply::Outcome(outcome)),
                )?,
                Err(RunError::NotLeader) => Reply::NotLeader(not_leader(shard)),
                Err(RunError::Lost) => Reply::Lost(v1::Empty {}),
                Err(RunError::Stopped(_)) => return Err(stopping()),
            }
        } else {
            Reply::NotLeader(not_leader(shard))
        };
        Ok(Response::new(v1::RunReply { result: Some(result) }))
    }

    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeReply>, Status> {
        use v1::describe_reply::Result as Reply;
        let request = request.into_inner();
        let shard = self.shared.shard(request.target.as_ref())?;
        let result = match shard.describe(&request.name).await {
            Ok(Some(volume)) => Reply::Volume(wire::volume_to(&volume)),
            Ok(None) => Reply::Unknown(v1::Empty {}),
            Err(error) => Reply::NotLeader(not_looked_up(shard, &error)?),
        };
        Ok(Response::new(v1::DescribeReply { result: Some(result) }))
    }

    async fn list(
        &self,
        request: Request<v1::ListRequest>,
    ) -> Result<Response<v1::ListReply>, Status> {
        use v1::list_reply::Result as Reply;
        let request = request.into_inner();
        let shard = self.shared.shard(request.target.as_ref())?;
        let after = VolumeId(request.after);
        let look = || shard.group.reader().volumes_after(after, PAGE_VOLUMES_MAX).0;
        let result = match shard.look(look).await {
            Ok(volumes) => Reply::Page(page(&volumes)),
            Err(error) => Reply::NotLeader(not_looked_up(shard, &error)?),
        };
        Ok(Response::new(v1::ListReply { result: Some(result) }))
    }

    type WatchStream = ReceiverStream<Result<v1::ShardView, Status>>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let shard = self.shared.shard(request.into_inner().target.as_ref())?;
        let Ok(place) = Arc::clone(&self.shared.watchers).try_acquire_owned() else {
            let what = "watchers of its shards";
            return Err(Refusal::TooMany { what, limit: WATCHERS_MAX }.into());
        };
        let (views, outgoing) = mpsc::channel(VIEWS_MAX);
        let shutdown = &shard.hosting.shutdown;
        let watcher = Watcher {
            group: shard.group.clone(),
            addresses: self.shared.addresses.clone(),
            stop: shutdown.token(),
        };
        shutdown.spawn(async move {
            watcher.run(views).await;
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
