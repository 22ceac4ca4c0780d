//! The calls there are, each to the shard that it is about.

use std::time::Duration;

use nbd_rpc::v1::admin_client::AdminClient;
use nbd_rpc::v1::control_client::ControlClient;
use nbd_rpc::{MESSAGE_BYTES_MAX, reason, v1, within};
use nbd_service::trace::{Span, TRACEPARENT, client_span};
use nbd_topology::ShardId;
use tonic::Request;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;

use super::ask::Sending;
use super::error::Service;
use super::{CallError, Cluster};
use crate::limits::NODE_DEADLINE;

fn control(channel: Channel) -> ControlClient<Channel> {
    ControlClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

fn admin(channel: Channel) -> AdminClient<Channel> {
    AdminClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// A call's part of the trace of the request that it is made for, if that is traced.
struct Traced(Option<Span>);

impl Traced {
    fn begin(name: &'static str, shard: ShardId) -> Self {
        let span = client_span(name);
        Self(span.map(|span| span.with("cinderblock.shard", i64::from(shard.0))))
    }

    /// One attempt, for which there is so much time.
    fn request<T>(&self, left: Duration, message: T) -> Request<T> {
        let mut request = within(left, message);
        let above = self.0.as_ref().map(|span| span.context().traceparent());
        if let Some(Ok(above)) = above.as_deref().map(str::parse::<AsciiMetadataValue>) {
            request.metadata_mut().insert(TRACEPARENT, above);
        }
        request
    }

    fn end<T>(mut self, answer: Result<T, CallError>) -> Result<T, CallError> {
        if let (Some(span), Err(error)) = (&mut self.0, &answer) {
            span.error(error.to_string());
        }
        answer
    }
}

/// A method that sends `message`, addressed to the shard, to one of the two services, as often as
/// [`Sending`] allows.
macro_rules! calls {
    ($service:ident, $client:ident, $field:ident, $address:ident: $(
        $(#[$doc:meta])* $sending:ident $name:ident($request:ident) -> $reply:ident;
    )*) => {
        impl Cluster {$(
            $(#[$doc])*
            pub(crate) async fn $name(
                &self,
                shard: ShardId,
                time: Duration,
                mut message: v1::$request,
            ) -> Result<v1::$reply, CallError> {
                message.$field = Some(self.$address(shard));
                let how = (Service::$service, Sending::$sending);
                let name = concat!(stringify!($service), "/", stringify!($name));
                let traced = Traced::begin(name, shard);
                let answer = self.ask(how, shard, time, |channel, left| {
                    let request = traced.request(left, message.clone());
                    async move {
                        let reply = $client(channel).$name(request).await?;
                        Ok(reply.into_inner())
                    }
                })
                .await;
                traced.end(answer)
            }
        )*}
    };
}

calls! { Control, control, target, target:
    Change create_volume(CreateVolumeRequest) -> CreateVolumeReply;
    Look get_volume(GetVolumeRequest) -> GetVolumeReply;
    Look list_volumes(ListVolumesRequest) -> ListVolumesReply;
    Change update_volume(UpdateVolumeRequest) -> UpdateVolumeReply;
    Change resize_volume(ResizeVolumeRequest) -> ResizeVolumeReply;
    Change delete_volume(DeleteVolumeRequest) -> DeleteVolumeReply;
    Look list_sessions(ListSessionsRequest) -> ListSessionsReply;
    Change end_session(EndSessionRequest) -> EndSessionReply;
    Change trace_volume(TraceVolumeRequest) -> TraceVolumeReply;
    Look activity(ActivityRequest) -> ActivityReply;
    Look get_shard(GetShardRequest) -> GetShardReply;
    Change cordon_node(CordonNodeRequest) -> CordonNodeReply;
}

calls! { Admin, admin, to, address:
    Change add_replica(AddReplicaRequest) -> AddReplicaReply;
    Change remove_replica(RemoveReplicaRequest) -> RemoveReplicaReply;
    Change replace_replica(ReplaceReplicaRequest) -> ReplaceReplicaReply;
    Change transfer_leadership(TransferLeadershipRequest) -> TransferLeadershipReply;
}

impl Cluster {
    /// [`resize_volume`](Self::resize_volume), for a volume that may become smaller: an attempt
    /// that is late must not take away what was added meanwhile.
    pub(crate) async fn shrink_volume(
        &self,
        shard: ShardId,
        time: Duration,
        mut message: v1::ResizeVolumeRequest,
    ) -> Result<v1::ResizeVolumeReply, CallError> {
        message.target = Some(self.target(shard));
        let traced = Traced::begin("Control/resize_volume", shard);
        let how = (Service::Control, Sending::Once);
        let answer = self.ask(how, shard, time, |channel, left| {
            let request = traced.request(left, message.clone());
            async move { Ok(control(channel).resize_volume(request).await?.into_inner()) }
        });
        let answer = answer.await;
        traced.end(answer)
    }

    fn target(&self, shard: ShardId) -> v1::ShardTarget {
        v1::ShardTarget { cluster: self.config().name().to_string(), shard: shard.0 }
    }

    fn address(&self, shard: ShardId) -> v1::ShardAddress {
        let cluster = self.config().name().to_string();
        v1::ShardAddress { cluster, shard: shard.0, forwarded: false }
    }

    /// How the shard stands. What it says of its members is remembered.
    pub(crate) async fn shard(
        &self,
        shard: ShardId,
        time: Duration,
    ) -> Result<v1::GetShardReply, CallError> {
        let reply = self.get_shard(shard, time, v1::GetShardRequest { target: None }).await?;
        match &reply.members {
            Some(members) => self.learn(shard, members),
            None => {
                let reason = "it does not say who its members are".to_owned();
                return Err(CallError::Unavailable { shard, reason });
            }
        }
        Ok(reply)
    }

    /// Asks the node at `grpc` about itself, once.
    ///
    /// # Errors
    /// Why it does not answer.
    pub(crate) async fn node(&self, grpc: &str) -> Result<v1::GetNodeReply, String> {
        let channel = self.inner.channels.to(grpc).map_err(|error| error.to_string())?;
        let request = v1::GetNodeRequest { cluster: self.config().name().to_string() };
        let call = async {
            let reply = control(channel).get_node(within(NODE_DEADLINE, request)).await;
            reply.map(tonic::Response::into_inner).map_err(|status| reason(&status))
        };
        let late = |_| Err(format!("it does not answer within {} s", NODE_DEADLINE.as_secs()));
        tokio::time::timeout(NODE_DEADLINE, call).await.unwrap_or_else(late)
    }
}
