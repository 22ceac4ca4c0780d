//! [`Control`]: volumes, sessions and nodes, as the control API asks for them.
//!
//! Calls about a shard are answered by its leader. A replica that does not lead passes them on,
//! once: a call that was passed on carries [`PASSED_ON`].
//!
//! - [`leader`]: what the calls do. [`check`]: what they may ask for. [`wire`]: what they tell.
//! - This file: the calls, and where they are answered.

mod check;
mod leader;
mod wire;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nbd_rpc::identity::{check_cluster, node_name};
use nbd_rpc::v1::control_client::ControlClient;
use nbd_rpc::v1::control_server::{Control, ControlServer};
use nbd_rpc::{Channels, MESSAGE_BYTES_MAX, Refusal, v1, within};
use nbd_service::trace::{Incoming, Span, TRACEPARENT, Tracer};
use nbd_topology::ShardId;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use self::leader::Leader;
use crate::admin_service::{AdminService, find_leader};
use crate::formation::Oneself;
use crate::hosted::HostedShard;
use crate::steward::Nudge;

/// Name of the metadata of a call that a replica has passed on: it is not passed on again.
const PASSED_ON: &str = "cinderblock-passed-on";

/// Time for the leader to answer. One that has no majority steps down well before.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// One shard of the node.
#[derive(Debug, Clone)]
pub(crate) struct ControlShard {
    pub(crate) hosted: HostedShard,
    /// Has the leader look after what was changed at once.
    pub(crate) steward: Nudge,
}

/// What the service is made of.
#[derive(Debug)]
pub(crate) struct ControlParts {
    pub(crate) oneself: Arc<Oneself>,
    pub(crate) shards: HashMap<ShardId, ControlShard>,
    /// Knows how the node's replicas stand.
    pub(crate) admin: AdminService,
    pub(crate) data_dir: PathBuf,
    /// When the process was started: milliseconds since 1970.
    pub(crate) started_ms: u64,
    /// Tells this life of the process from others.
    pub(crate) incarnation: u64,
}

/// Serves [`Control`].
#[derive(Debug, Clone)]
pub(crate) struct ControlService {
    parts: Arc<ControlParts>,
    channels: Channels,
    tracer: Tracer,
}

/// Where a call is answered.
enum Place<'a> {
    Here(&'a ControlShard),
    There(ControlClient<Channel>),
}

/// The service, to be added to the node's gRPC server.
pub(crate) fn service(parts: ControlParts) -> ControlServer<ControlService> {
    let (parts, channels) = (Arc::new(parts), Channels::default());
    let tracer = parts.shards.values().next().map(|shard| shard.hosted.hosting.tracer.clone());
    let tracer = tracer.unwrap_or_default();
    ControlServer::new(ControlService { parts, channels, tracer })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

fn too_late() -> Status {
    Status::unavailable("the shard's leader does not get an answer from a majority: ask again")
}

impl ControlService {
    /// Finds the leader of the shard that a call is meant for.
    async fn place(
        &self,
        target: Option<&v1::ShardTarget>,
        metadata: &MetadataMap,
    ) -> Result<Place<'_>, Status> {
        let target = target.ok_or(Refusal::Malformed("no shard is named"))?;
        check_cluster(&target.cluster, &self.parts.oneself.cluster)?;
        let id = ShardId(target.shard);
        let shard = self.parts.shards.get(&id).ok_or(Refusal::Shard(id))?;
        let leader = find_leader(&shard.hosted.group).await?;
        if leader.local {
            return Ok(Place::Here(shard));
        }
        let (node, grpc) = (&leader.node, &leader.grpc);
        if metadata.contains_key(PASSED_ON) {
            // Leadership is moving: who has passed it on knows better in a moment.
            let text = format!("shard {id} is led by {node}, at {grpc}: ask again");
            return Err(Status::unavailable(text));
        }
        let channel = self.channels.to(grpc);
        let channel = channel.map_err(|error| Status::internal(error.to_string()))?;
        let client = ControlClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Place::There(client))
    }

    /// The span of a call, if it is traced.
    fn span(&self, metadata: &MetadataMap, method: &'static str) -> Option<Span> {
        if !self.tracer.is_on() {
            return None;
        }
        let incoming = Incoming::read(|name| metadata.get(name)?.to_str().ok());
        let span = self.tracer.server_span(incoming, None, format!("Control/{method}"))?;
        Some(span.with("rpc.system", "grpc").with("rpc.method", method))
    }

    fn leader<'a>(&self, shard: &'a ControlShard) -> Leader<'a> {
        Leader { shard: &shard.hosted, incarnation: self.parts.incarnation }
    }
}

/// A call as it is passed on.
fn passed_on<T>(message: T, span: Option<&Span>) -> Request<T> {
    let mut request = within(ANSWER_DEADLINE, message);
    request.metadata_mut().insert(PASSED_ON, AsciiMetadataValue::from_static("1"));
    if let Some(Ok(above)) =
        span.map(|span| span.context().traceparent().parse::<AsciiMetadataValue>())
    {
        request.metadata_mut().insert(TRACEPARENT, above);
    }
    request
}

/// An answer of the node that a call was passed on to. One that could not be reached may have
/// carried it out: the caller is told to ask again, whatever became of the connection.
fn from_there<T>(answer: Result<Response<T>, Status>) -> Result<Response<T>, Status> {
    answer.map_err(|status| {
        if nbd_rpc::is_refusal(&status) || status.code() == tonic::Code::Internal {
            // Anything else of the status is this connection's.
            let details = status.details().to_vec().into();
            return Status::with_details(status.code(), status.message(), details);
        }
        Status::unavailable(nbd_rpc::reason(&status))
    })
}

/// Answers a call at the leader: here, or by passing it on.
macro_rules! at_leader {
    ($self:ident, $request:ident, $method:ident, |$leader:ident, $message:ident, $shard:ident|
     $here:expr) => {{
        let (metadata, _, $message) = $request.into_parts();
        let mut span = $self.span(&metadata, stringify!($method));
        let answered: Result<_, Status> = async {
            match $self.place($message.target.as_ref(), &metadata).await? {
                Place::Here($shard) => {
                    let $leader = $self.leader($shard);
                    let answer = async { Ok::<_, Status>($here) };
                    let answered = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
                    Ok(Response::new(answered.map_err(|_| too_late())??))
                }
                Place::There(mut client) => {
                    from_there(client.$method(passed_on($message, span.as_ref())).await)
                }
            }
        }
        .await;
        if let (Some(span), Err(status)) = (&mut span, &answered) {
            span.error(status.message().to_owned());
        }
        answered
    }};
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::CreateVolumeReply>, Status> {
        at_leader!(self, request, create_volume, |leader, message, _shard| {
            leader.create(message).await?
        })
    }

    async fn get_volume(
        &self,
        request: Request<v1::GetVolumeRequest>,
    ) -> Result<Response<v1::GetVolumeReply>, Status> {
        at_leader!(self, request, get_volume, |leader, message, _shard| {
            leader.get(message).await?
        })
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesReply>, Status> {
        at_leader!(self, request, list_volumes, |leader, message, _shard| {
            leader.list(message).await?
        })
    }

    async fn update_volume(
        &self,
        request: Request<v1::UpdateVolumeRequest>,
    ) -> Result<Response<v1::UpdateVolumeReply>, Status> {
        at_leader!(self, request, update_volume, |leader, message, _shard| {
            leader.update(message).await?
        })
    }

    async fn resize_volume(
        &self,
        request: Request<v1::ResizeVolumeRequest>,
    ) -> Result<Response<v1::ResizeVolumeReply>, Status> {
        at_leader!(self, request, resize_volume, |leader, message, _shard| {
            leader.resize(message).await?
        })
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeReply>, Status> {
        at_leader!(self, request, delete_volume, |leader, message, _shard| {
            leader.delete(&message).await?
        })
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsReply>, Status> {
        at_leader!(self, request, list_sessions, |leader, message, _shard| {
            leader.sessions(&message).await?
        })
    }

    async fn end_session(
        &self,
        request: Request<v1::EndSessionRequest>,
    ) -> Result<Response<v1::EndSessionReply>, Status> {
        at_leader!(self, request, end_session, |leader, message, _shard| {
            leader.end(&message).await?;
            v1::EndSessionReply {}
        })
    }

    async fn trace_volume(
        &self,
        request: Request<v1::TraceVolumeRequest>,
    ) -> Result<Response<v1::TraceVolumeReply>, Status> {
        at_leader!(self, request, trace_volume, |leader, message, _shard| {
            leader.trace(&message).await?
        })
    }

    async fn activity(
        &self,
        request: Request<v1::ActivityRequest>,
    ) -> Result<Response<v1::ActivityReply>, Status> {
        at_leader!(self, request, activity, |leader, message, _shard| leader.activity().await?)
    }

    async fn get_shard(
        &self,
        request: Request<v1::GetShardRequest>,
    ) -> Result<Response<v1::GetShardReply>, Status> {
        at_leader!(self, request, get_shard, |leader, message, _shard| leader.shard().await?)
    }

    async fn cordon_node(
        &self,
        request: Request<v1::CordonNodeRequest>,
    ) -> Result<Response<v1::CordonNodeReply>, Status> {
        at_leader!(self, request, cordon_node, |leader, message, shard| {
            leader.cordon(&node_name(&message.node)?, message.cordoned).await?;
            shard.steward.now();
            v1::CordonNodeReply {}
        })
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeReply>, Status> {
        let parts = &self.parts;
        check_cluster(&request.into_inner().cluster, &parts.oneself.cluster)?;
        let path = parts.data_dir.clone();
        let looked = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&path)).await;
        let disk = match looked {
            Ok(Ok(disk)) => disk,
            Ok(Err(error)) => {
                return Err(Status::internal(format!(
                    "cannot look at the data directory: {error}"
                )));
            }
            Err(error) => return Err(Status::internal(error.to_string())),
        };
        let mut shards: Vec<_> = parts.shards.keys().copied().collect();
        shards.sort_unstable();
        let shard = |id: &ShardId| v1::NodeShard { shard: id.0, status: parts.admin.standing(*id) };
        // All shards share the disk.
        let space = parts.shards.values().next().map(|shard| &shard.hosted.hosting.room.space);
        Ok(Response::new(v1::GetNodeReply {
            node: parts.oneself.node.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: parts.started_ms,
            disk_bytes: disk.f_blocks.saturating_mul(disk.f_frsize),
            disk_free_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
            writable_bytes: space.map_or(0, |space| space.available_bytes()),
            shards: shards.iter().map(shard).collect(),
        }))
    }
}
