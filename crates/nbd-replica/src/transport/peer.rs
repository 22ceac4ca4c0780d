//! A peer: another node, with an outbox and a task for each lane.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nbd_log::checksum::crc32c;
use nbd_rpc::identity::{PROTOCOL_VERSION, directory_to_bytes};
use nbd_rpc::v1::deliver_frame::Frame;
use nbd_rpc::v1::raft_transport_client::RaftTransportClient;
use nbd_rpc::v1::{DeliverAck, DeliverBatch, DeliverFrame, DeliverHello, RaftMessage, TraceNotes};
use nbd_rpc::{MESSAGE_BYTES_MAX, is_refusal, reason};
use nbd_topology::NodeName;
use prost::Message as _;
use tokio::sync::Notify;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::limits::{
    ACCEPT_TIMEOUT, BULK_KEEPALIVE_TIMEOUT, FLUSH_TIMEOUT, RECONNECT_WAIT_MAX, RECONNECT_WAIT_MIN,
};
use super::metrics::PeerMetrics;
use super::outbox::{Outbox, Waiting};
use super::{Lane, Shared};

/// Another node at one address.
pub(super) struct Peer {
    name: NodeName,
    address: String,
    outboxes: [Outbox; Lane::ALL.len()],
    /// Ends a lane's wait for its next attempt to connect.
    pokes: [Notify; Lane::ALL.len()],
    /// Tells the bulk lane that the control lane lost its connection.
    control_lost: Notify,
    stop: CancellationToken,
}

impl Peer {
    pub(super) fn new(
        name: NodeName,
        address: String,
        stop: CancellationToken,
        metrics: PeerMetrics,
    ) -> Self {
        let outboxes = Lane::ALL.map(|lane| Outbox::new(lane, metrics.lanes[lane.place()].clone()));
        let pokes = Lane::ALL.map(|_| Notify::new());
        Self { name, address, outboxes, pokes, control_lost: Notify::new(), stop }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) const fn outbox(&self, lane: Lane) -> &Outbox {
        &self.outboxes[lane.place()]
    }

    /// The peer gave a sign of life: connects at once instead of waiting.
    pub(super) fn poke(&self) {
        for poke in &self.pokes {
            poke.notify_one();
        }
    }

    /// Ends its tasks, after what is queued has gone out.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }
}

/// Keeps one lane to a peer connected.
pub(super) struct LaneTask {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    lane: Lane,
}

/// Why a lane is not connected.
enum Down {
    /// The connection did not come about.
    Unreachable(String),
    /// The peer turned this node away.
    Refused(String),
    /// An accepted stream broke.
    Lost(String),
    /// The other lane's connection broke.
    LostOther,
    /// The transport stops, or the peer is not needed any more.
    Stopped,
}

impl LaneTask {
    pub(super) const fn new(shared: Arc<Shared>, peer: Arc<Peer>, lane: Lane) -> Self {
        Self { shared, peer, lane }
    }

    /// Connects, and connects again, until stopped.
    pub(super) async fn run(self) {
        let mut wait = RECONNECT_WAIT_MIN;
        let mut complaint = String::new();
        loop {
            let down = self.connection().await;
            self.tell(&down);
            match down {
                Down::Stopped => return,
                Down::Refused(why) => self.complain(&mut complaint, why, true),
                Down::Unreachable(why) => self.complain(&mut complaint, why, false),
                Down::Lost(why) => {
                    info!(peer = %self.peer.name, lane = self.lane.name(), %why, "lost a peer");
                    (wait, complaint) = (RECONNECT_WAIT_MIN, String::new());
                }
                Down::LostOther => (wait, complaint) = (RECONNECT_WAIT_MIN, String::new()),
            }
            tokio::select! {
                () = self.peer.stop.cancelled() => return,
                () = self.peer.pokes[self.lane.place()].notified() => {}
                () = tokio::time::sleep(shortened(wait)) => {}
            }
            wait = (wait * 2).min(RECONNECT_WAIT_MAX);
        }
    }

    /// One connection from the attempt to its end.
    async fn connection(&self) -> Down {
        let outbox = self.outbox();
        let epoch = outbox.open();
        let accepted = tokio::select! {
            () = self.peer.stop.cancelled() => return Down::Stopped,
            accepted = tokio::time::timeout(ACCEPT_TIMEOUT, self.connect(epoch)) => accepted,
        };
        let acks = match accepted {
            Ok(Ok(acks)) => acks,
            Ok(Err(down)) => return down,
            Err(_) => return Down::Unreachable("it does not accept the stream".to_owned()),
        };
        outbox.establish();
        debug!(peer = %self.peer.name, lane = self.lane.name(), "connected to a peer");
        self.watch(acks).await
    }

    async fn connect(&self, epoch: u64) -> Result<Streaming<DeliverAck>, Down> {
        let unreachable =
            |error: &(dyn std::error::Error + 'static)| Down::Unreachable(reason(error));
        let mut endpoint = nbd_rpc::channel(&self.peer.address).map_err(|e| unreachable(&e))?;
        if self.lane == Lane::Bulk {
            endpoint = endpoint.keep_alive_timeout(BULK_KEEPALIVE_TIMEOUT);
        }
        let channel = endpoint.connect().await.map_err(|error| unreachable(&error))?;
        let mut client = RaftTransportClient::new(channel)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let down = |status: Status| {
            if is_refusal(&status) {
                return Down::Refused(status.message().to_owned());
            }
            unreachable(&status)
        };
        let frames = Frames {
            peer: Arc::clone(&self.peer),
            lane: self.lane,
            epoch,
            hello: Some(self.hello()),
        };
        let mut acks = client.deliver(frames).await.map_err(down)?.into_inner();
        match acks.message().await.map_err(down)? {
            Some(DeliverAck {}) => Ok(acks),
            None => Err(Down::Unreachable("it ended the stream".to_owned())),
        }
    }

    fn hello(&self) -> DeliverHello {
        let me = &self.shared.me;
        DeliverHello {
            protocol: PROTOCOL_VERSION,
            cluster: me.cluster.to_string(),
            from_node: me.node.to_string(),
            to_node: self.peer.name.to_string(),
            directory: directory_to_bytes(me.directory),
            incarnation: me.incarnation,
            lane: self.lane.to_wire().into(),
        }
    }

    /// Waits for the end of an accepted stream. The system's word that a process died arrives here,
    /// whether or not anything is being sent.
    async fn watch(&self, mut acks: Streaming<DeliverAck>) -> Down {
        let mut control_lost = pin!(self.peer.control_lost.notified());
        let mut stop = pin!(self.peer.stop.cancelled());
        loop {
            tokio::select! {
                biased;
                () = &mut stop => {
                    self.flush(acks).await;
                    return Down::Stopped;
                }
                ack = acks.message() => match ack {
                    Ok(Some(DeliverAck {})) => {}
                    Ok(None) => return Down::Lost("it ended the stream".to_owned()),
                    Err(status) if is_refusal(&status) => {
                        return Down::Refused(status.message().to_owned());
                    }
                    Err(status) => return Down::Lost(reason(&status)),
                },
                () = &mut control_lost, if self.lane == Lane::Bulk => return Down::LostOther,
            }
        }
    }

    /// Lets what is queued go out, and waits until the peer has seen the end of it.
    async fn flush(&self, mut acks: Streaming<DeliverAck>) {
        self.outbox().finish();
        let ended = async { while let Ok(Some(DeliverAck {})) = acks.message().await {} };
        if tokio::time::timeout(FLUSH_TIMEOUT, ended).await.is_err() {
            debug!(peer = %self.peer.name, lane = self.lane.name(), "a peer took no farewell");
        }
    }

    /// Drops what is queued and tells the groups. The hint comes first: it is the urgent part.
    fn tell(&self, down: &Down) {
        let events = &self.shared.events;
        let lost = match down {
            Down::Lost(_) | Down::LostOther => {
                if self.lane == Lane::Control {
                    self.peer.control_lost.notify_waiters();
                }
                if matches!(down, Down::Lost(_)) {
                    events.connection_lost(&self.peer.name);
                }
                self.shared.book.read().members(&self.peer.name)
            }
            Down::Unreachable(_) | Down::Refused(_) | Down::Stopped => Vec::new(),
        };
        let unreachable = self.outbox().close(&lost);
        if matches!(down, Down::Stopped) {
            return;
        }
        for (shard, replica) in unreachable {
            events.unreachable(shard, replica);
        }
    }

    /// Logs why the lane is down, unless that was the last thing logged. Being turned away needs a
    /// human; a peer that is not there yet does not.
    fn complain(&self, last: &mut String, why: String, refused: bool) {
        if *last == why {
            return;
        }
        let (peer, lane) = (&self.peer.name, self.lane.name());
        if refused {
            warn!(%peer, lane, %why, "refused by a peer");
        } else {
            info!(%peer, lane, %why, "cannot reach a peer");
        }
        *last = why;
    }

    fn outbox(&self) -> &Outbox {
        self.peer.outbox(self.lane)
    }
}

/// A wait less up to a half of it, so that two nodes do not try in step for ever.
fn shortened(wait: Duration) -> Duration {
    wait.mul_f64(rand::random_range(0.5..=1.0))
}

/// The frames of one stream. Polled by the connection when it can take more, so that a batch is
/// whatever has come together since.
struct Frames {
    peer: Arc<Peer>,
    lane: Lane,
    epoch: u64,
    hello: Option<DeliverHello>,
}

impl Stream for Frames {
    type Item = DeliverFrame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<DeliverFrame>> {
        let this = self.get_mut();
        if let Some(hello) = this.hello.take() {
            return Poll::Ready(Some(DeliverFrame { frame: Some(Frame::Hello(hello)) }));
        }
        let batch = ready!(this.peer.outbox(this.lane).poll_batch(this.epoch, cx));
        Poll::Ready(batch.map(|messages| {
            let messages = messages.into_iter().map(to_wire).collect();
            DeliverFrame { frame: Some(Frame::Batch(DeliverBatch { messages })) }
        }))
    }
}

fn to_wire(message: Waiting) -> RaftMessage {
    RaftMessage {
        shard: message.shard.0,
        from_replica: message.from.get(),
        to_replica: message.to.get(),
        crc32c: crc32c(&message.bytes),
        message: message.bytes,
        traces: TraceNotes { notes: message.traces }.encode_to_vec().into(),
    }
}
