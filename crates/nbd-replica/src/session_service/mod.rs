//! The leader's side of what other nodes forward: the gRPC service `Session`.
//!
//! Everything a peer says is checked before it counts: that it means this cluster and a shard that
//! is here, that lengths are within their bounds, that commands are whole and every piece of a
//! payload has its checksum.
//!
//! - [`attach`]: one session's stream. [`watch`]: who follows a shard. [`wire`]: between the types
//!   here and those of the protocol.
//! - This file: the calls, and the checks that they share.

mod attach;
#[cfg(test)]
mod tests;
mod watch;
mod wire;

use std::collections::HashMap;
use std::sync::Arc;

use nbd_front::{ByteBudget, RunError};
use nbd_rpc::identity::check_cluster;
use nbd_rpc::v1::session_server::{Session, SessionServer};
use nbd_rpc::{MESSAGE_BYTES_MAX, Refusal, v1};
use nbd_store::{CommandKind, VolumeInfo, decode_all};
use nbd_topology::{ClusterName, ShardId};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use self::watch::{VIEWS_MAX, WATCHERS_MAX, Watcher};
use crate::hosted::HostedShard;
use crate::peers::Addresses;

/// Sessions of other nodes that may be attached here. Each costs a few KiB while it is idle.
const ATTACHMENTS_MAX: usize = 16_384;

/// Bytes of requests that all sessions attached from other nodes may hold here together. Apart from
/// the budget of this node's own clients: theirs may be waiting for the other node's, and would
/// wait for ever if it was waiting for them. 64 MiB keep two nodes' worth of writes in the log's
/// pipe.
const BYTES_MAX: u64 = 64 << 20;

/// Messages that wait for a slow caller, 1 MiB each at most.
const REPLIES_MAX: usize = 4;

/// Bytes of volume descriptions in one page.
const PAGE_BYTES_MAX: usize = 1 << 20;

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
    budget: ByteBudget,
    attachments: Arc<Semaphore>,
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
    let budget = ByteBudget::new(BYTES_MAX);
    let attachments = Arc::new(Semaphore::new(ATTACHMENTS_MAX));
    let watchers = Arc::new(Semaphore::new(WATCHERS_MAX));
    let shared = Arc::new(Shared { cluster, shards, budget, attachments, watchers, addresses });
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
    let may_run = !matches!(
        decoded.header.kind,
        CommandKind::Write
            | CommandKind::Trim
            | CommandKind::WriteZeroes
            | CommandKind::OpenSession
            // Through `Admin.Join`, which knows who may.
            | CommandKind::RegisterReplica
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
    type AttachStream = ReceiverStream<Result<v1::AttachReply, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let Ok(place) = Arc::clone(&self.shared.attachments).try_acquire_owned() else {
            let what = "attached sessions of other nodes";
            return Err(Refusal::TooMany { what, limit: ATTACHMENTS_MAX }.into());
        };
        let (replies, outgoing) = mpsc::channel(REPLIES_MAX);
        let shared = Arc::clone(&self.shared);
        let Some(any) = shared.shards.values().next() else { return Err(stopping()) };
        let shutdown = any.hosting.shutdown.clone();
        shutdown.spawn(async move {
            attach::serve(&shared, request.into_inner(), replies).await;
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

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
        let result = match shard.volumes().await {
            Ok(volumes) => {
                let first = volumes.partition_point(|volume| volume.id.0 <= request.after);
                Reply::Page(page(&volumes[first..]))
            }
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
