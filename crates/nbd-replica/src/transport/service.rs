//! The receiving side: checks who calls, then hands on what arrives.

use std::collections::HashMap;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_rpc::identity::{
    check_cluster, check_node, check_protocol, directory_from_bytes, node_name, replica_id,
};
use nbd_rpc::v1::deliver_frame::Frame;
use nbd_rpc::v1::raft_transport_server::RaftTransport;
use nbd_rpc::v1::{DeliverAck, DeliverFrame, DeliverHello, RaftMessage, TraceNote, TraceNotes};
use nbd_rpc::{Refusal, reason};
use nbd_topology::{NodeName, ShardId};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use super::book::Stranger;
use super::limits::{COPY_BYTES_MAX, HELLO_TIMEOUT, INCOMING_STREAMS_MAX, TRACES_BYTES_MAX};
use super::{Lane, Shared};

/// Serves `RaftTransport`.
pub struct TransportService {
    shared: Arc<Shared>,
}

/// The streams that others have open to this node, at most one for each node and lane.
#[derive(Default)]
pub(super) struct Incoming {
    streams: HashMap<(NodeName, Lane), Open>,
    next_number: u64,
}

struct Open {
    number: u64,
    incarnation: u64,
    superseded: CancellationToken,
}

/// Who calls, once that is checked.
struct Caller {
    node: NodeName,
    directory: u128,
    incarnation: u64,
    lane: Lane,
}

/// How a stream ended.
enum End {
    /// The caller ended it.
    Finished,
    /// The connection broke.
    Broken(Status),
    /// We end it.
    Refused(Refusal),
    /// This node stops.
    Stopping,
}

impl std::fmt::Debug for TransportService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TransportService").field("me", &self.shared.me).finish_non_exhaustive()
    }
}

impl TransportService {
    pub(super) const fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Checks everything that a caller says of itself and of us.
    fn check(&self, hello: &DeliverHello) -> Result<Caller, Refusal> {
        let me = &self.shared.me;
        check_protocol(hello.protocol)?;
        check_cluster(&hello.cluster, &me.cluster)?;
        check_node(&hello.to_node, &me.node)?;
        let node = node_name(&hello.from_node)?;
        if node == me.node {
            return Err(Refusal::Oneself(node));
        }
        let directory = directory_from_bytes(&hello.directory)?;
        let lane =
            Lane::from_wire(hello.lane()).ok_or(Refusal::Malformed("a stream has a lane"))?;
        Ok(Caller { node, directory, incarnation: hello.incarnation, lane })
    }

    /// Enters a caller's stream, in place of an older one of the same lane.
    fn enter(&self, caller: &Caller) -> Result<(u64, CancellationToken), Refusal> {
        let mut reborn = false;
        let entered = {
            let mut incoming = self.shared.incoming.lock();
            incoming.streams.retain(|(node, lane), open| {
                let other = *node != caller.node;
                let dead = !other && open.incarnation != caller.incarnation;
                reborn |= dead;
                let stays = other || (!dead && *lane != caller.lane);
                if !stays {
                    open.superseded.cancel();
                }
                stays
            });
            let limit = INCOMING_STREAMS_MAX;
            if incoming.streams.len() >= limit {
                return Err(Refusal::TooMany { what: "streams of peers", limit });
            }
            let number = incoming.next_number;
            incoming.next_number += 1;
            let superseded = CancellationToken::new();
            let open =
                Open { number, incarnation: caller.incarnation, superseded: superseded.clone() };
            incoming.streams.insert((caller.node.clone(), caller.lane), open);
            (number, superseded)
        };
        if reborn {
            info!(peer = %caller.node, "a peer has started anew, and its former streams are dead");
            self.shared.events.connection_lost(&caller.node);
        }
        // It is there, so it may be connected to.
        if let Some(peer) = self.shared.book.read().node(&caller.node) {
            peer.poke();
        }
        Ok(entered)
    }
}

#[tonic::async_trait]
impl RaftTransport for TransportService {
    type DeliverStream = Acks;

    async fn deliver(
        &self,
        request: Request<Streaming<DeliverFrame>>,
    ) -> Result<Response<Acks>, Status> {
        let mut frames = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, frames.message());
        let hello = match first.await.map(|first| first.map(|frame| frame.and_then(|f| f.frame))) {
            Ok(Ok(Some(Frame::Hello(hello)))) => hello,
            Ok(Err(status)) => return Err(status),
            Ok(Ok(_)) | Err(_) => {
                return Err(Refusal::Malformed("a stream begins with its hello").into());
            }
        };
        let entered = self.check(&hello).and_then(|caller| {
            let (number, superseded) = self.enter(&caller)?;
            Ok((caller, number, superseded))
        });
        let (caller, number, superseded) = entered.inspect_err(|refusal| {
            warn!(peer = %hello.from_node, why = %refusal, "refused a peer");
        })?;
        let (end, ended) = oneshot::channel();
        let receiver = Receiver { shared: Arc::clone(&self.shared), caller, number };
        let tasks = &self.shared.tasks;
        tasks.spawn(async move {
            if let Some(status) = receiver.run(frames, superseded).await {
                // The caller may be gone; then nobody needs the status.
                let _ = end.send(status);
            }
        });
        Ok(Response::new(Acks { accepted: false, ended }))
    }
}

/// The answers of a stream: accepted, and then the status with which it ends.
#[derive(Debug)]
pub struct Acks {
    accepted: bool,
    ended: oneshot::Receiver<Status>,
}

impl Stream for Acks {
    type Item = Result<DeliverAck, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if !this.accepted {
            this.accepted = true;
            return Poll::Ready(Some(Ok(DeliverAck {})));
        }
        // A dropped sender is a stream that ended well.
        Pin::new(&mut this.ended).poll(cx).map(|status| status.ok().map(Err))
    }
}

/// Owner of one incoming stream.
struct Receiver {
    shared: Arc<Shared>,
    caller: Caller,
    number: u64,
}

impl Receiver {
    /// Hands on messages until the stream ends. Returns the status to end it with, if not OK.
    async fn run(
        self,
        frames: Streaming<DeliverFrame>,
        superseded: CancellationToken,
    ) -> Option<Status> {
        let end = self.receive(frames, superseded).await;
        self.leave();
        let (peer, lane) = (&self.caller.node, self.caller.lane.name());
        match end {
            End::Finished => None,
            End::Broken(status) => {
                self.shared.events.connection_lost(peer);
                info!(%peer, lane, why = %reason(&status), "a peer's stream broke");
                None
            }
            End::Refused(Refusal::Superseded) => Some(Refusal::Superseded.into()),
            End::Refused(refusal) => {
                warn!(%peer, lane, why = %refusal, "ended a peer's stream");
                Some(refusal.into())
            }
            End::Stopping => Some(Status::unavailable("this node is stopping")),
        }
    }

    async fn receive(
        &self,
        mut frames: Streaming<DeliverFrame>,
        superseded: CancellationToken,
    ) -> End {
        let mut superseded = pin!(superseded.cancelled());
        let mut stop = pin!(self.shared.stop.cancelled());
        loop {
            let frame = tokio::select! {
                biased;
                () = &mut superseded => return End::Refused(Refusal::Superseded),
                () = &mut stop => return End::Stopping,
                frame = frames.message() => frame,
            };
            let messages = match frame.map(|frame| frame.map(|frame| frame.frame)) {
                Ok(Some(Some(Frame::Batch(batch)))) => batch.messages,
                Ok(Some(_)) => {
                    return End::Refused(Refusal::Malformed("only batches follow the hello"));
                }
                Ok(None) => return End::Finished,
                Err(status) => return End::Broken(status),
            };
            for message in messages {
                if let Err(refusal) = self.message(message) {
                    return End::Refused(refusal);
                }
            }
        }
    }

    /// Hands on one message, or drops it when it is for or from nobody known here.
    fn message(&self, message: RaftMessage) -> Result<(), Refusal> {
        let RaftMessage { shard, from_replica, to_replica, message: bytes, .. } = message;
        let (expected, traces) = (message.crc32c, message.traces);
        let found = crc32c(&bytes);
        if found != expected {
            return Err(Refusal::Checksum { what: "a Raft message", found, expected });
        }
        let (shard, from, to) =
            (ShardId(shard), replica_id(from_replica)?, replica_id(to_replica)?);
        let Caller { node, directory, .. } = &self.caller;
        let admitted = self.shared.book.read().admit((shard, from), to, node, *directory);
        if let Err(stranger) = admitted {
            let drops = &self.shared.drops;
            match stranger {
                Stranger::Shard => drops.ignored_shard.increment(1),
                Stranger::Receiver => drops.ignored_receiver.increment(1),
                Stranger::Sender => drops.ignored_sender.increment(1),
                Stranger::Newcomer => {
                    self.shared.events.newcomer(shard, from, node, *directory);
                }
            }
            if stranger != Stranger::Newcomer {
                return Ok(());
            }
        }
        let notes = notes(traces);
        if !notes.is_empty() {
            self.shared.events.traces(shard, notes);
        }
        self.shared.events.message(shard, to, from, detached(bytes));
        Ok(())
    }

    /// Takes the stream off the list, unless another took its place.
    fn leave(&self) {
        let mut incoming = self.shared.incoming.lock();
        let key = (self.caller.node.clone(), self.caller.lane);
        if incoming.streams.get(&key).is_some_and(|open| open.number == self.number) {
            incoming.streams.remove(&key);
        }
    }
}

/// None if they cannot be read: no message is to be lost for the sake of a trace.
fn notes(traces: Bytes) -> Vec<TraceNote> {
    if traces.len() > TRACES_BYTES_MAX {
        debug!(bytes = traces.len(), "a message's trace notes are too long");
        return Vec::new();
    }
    match TraceNotes::decode(traces) {
        Ok(TraceNotes { notes }) => notes,
        Err(error) => {
            debug!(%error, "a message's trace notes cannot be read");
            Vec::new()
        }
    }
}

/// Large messages stay slices of the frame that they came in; small ones let go of it.
fn detached(bytes: Bytes) -> Bytes {
    if bytes.len() < COPY_BYTES_MAX { Bytes::copy_from_slice(&bytes) } else { bytes }
}
