//! The transmission phase of one connection: requests in, proposals and reads out, replies back as
//! they complete.
//!
//! One task does it all, so that a request costs no hand-off between tasks beyond the one to the
//! group, if its leader is here. What is pending is kept by the [`SessionClient`], which goes after
//! the leader when that moves:
//!
//! ```text
//!            ┌──────────────────── session task ───────────────────┐
//!  socket ──▶│ input ─▶ decode ─▶ payload ─▶ SessionClient ────────│──▶ group task, or leader
//!            │            │                                        │       │
//!            │            └─▶ read (page cache) ─▶ output ─────────│──▶ socket
//!            │                     │ else           ▲              │       │
//!            │                     ▼                └─ events ◀────────────┘
//!            └──────────── blocking pool ─────────────────▲────────┘
//!                              └──────────────────────────┘
//! ```
//!
//! A session that another process takes over ([`super::handover`]) leaves between two requests.
//!
//! The task stops reading its socket while it has [`REQUESTS_IN_FLIGHT_MAX`] requests under way,
//! while the process's byte budget is used up, or while its client leaves replies unread; nothing
//! else waits for that. It ends when the client leaves, breaks the protocol or stalls, or when the
//! process shuts down; requests already received are carried out and, as long as the socket lives,
//! answered.
//!
//! [`REQUESTS_IN_FLIGHT_MAX`]: crate::limits::REQUESTS_IN_FLIGHT_MAX

mod read;
mod write;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;
use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_proto::{
    Command, CommandKind, Decoded, NbdError, Negotiated, Refused, ReplyEncoder, ReplyTo, Request,
    RequestDecoder, TransmissionError,
};
use nbd_relay::Failed;
use nbd_service::trace::{Sampler, Span};
use nbd_store::limits::{BLOCK_BYTES, MUTATION_BYTES_MAX};
use nbd_store::{CommandKind as LogKind, Outcome, Rejection};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, Ready};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use self::write::{DIRECT_READ_BYTES_MIN, PayloadStage};
use super::Front;
use super::handover::departure::{Departed, Departure};
use super::handover::{Parcel, UNREAD_BYTES_MAX};
use super::in_flight::{InFlight, Pending};
use super::output::Output;
use super::trace;
use crate::budget::BytePermit;
use crate::limits::{
    INPUT_READ_BYTES, LINGER, OUTPUT_BYTES_MAX, OUTPUT_PROGRESS_BYTES, OUTPUT_STALL_MAX,
    PAYLOAD_STALL_MAX, SHORT_RATE_MIN, STALL_POLL, TRACED_MAX, is_slow,
};
use crate::route::GroupStopped;
use crate::sessions::{BackendAt, Meter};
use crate::shard_client::{Event, ReadBuffer, SessionClient, SessionEnd as ClientEnd, Signal};

/// Bytes that one extent of a block status takes, in memory and in the widest reply.
const STATUS_EXTENT_BYTES: u64 = 40;

/// Requests decoded before completions and output get their turn again.
const TURN_REQUESTS_MAX: usize = 64;

/// A connection whose handshake is done.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) stream: TcpStream,
    /// Bytes already received behind the handshake.
    pub(super) input: BytesMut,
    pub(super) negotiated: Negotiated,
    pub(super) client: SessionClient,
    pub(super) meter: Meter,
    pub(super) front: Arc<Front>,
}

/// Serves the session until it ends, and gives it back to be closed; unless another process has
/// taken it over.
pub(super) async fn run(attached: Attached) -> Option<SessionClient> {
    let size = attached.negotiated.export.size;
    info!(size, volume = attached.client.volume().0, "attached");
    let mut session = Session::new(attached);
    match session.run().await {
        Ok(End::Closed) => info!("detached"),
        Ok(End::HandedOver) => {
            info!("handed over to another process");
            return None;
        }
        // Of what the client has in flight the outcome is unknown: somebody should know why.
        Err(SessionEnd::Client(end @ ClientEnd::Ended(_))) if !session.in_flight.is_empty() => {
            error!(reason = %end, in_flight = session.in_flight.len(), "connection ended");
        }
        Err(end) => info!(reason = %end, "connection ended"),
    }
    Some(session.client)
}

/// How a connection ended in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client left, or the process stops.
    Closed,
    /// The client is another process's.
    HandedOver,
}

/// Why a connection ended otherwise than by the client's leave.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("{0}")]
    Protocol(#[from] TransmissionError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the client left in the middle of a request")]
    CutOff,
    #[error("the client took no reply for {OUTPUT_STALL_MAX:?}")]
    OutputStalled,
    #[error("the client sent nothing of a write's payload for {PAYLOAD_STALL_MAX:?}")]
    PayloadStalled,
    #[error(
        "the client is slower than {SHORT_RATE_MIN} bytes a second while others wait for memory"
    )]
    InTheWay,
    #[error("{0}")]
    Client(#[from] ClientEnd),
}

impl From<GroupStopped> for SessionEnd {
    fn from(stopped: GroupStopped) -> Self {
        Self::Client(stopped.into())
    }
}

/// What the next input bytes are for.
enum Stage {
    /// A request header.
    Header,
    /// A request that waits for its share of the byte budget.
    Budget { request: Request, permit: Pin<Box<dyn Future<Output = BytePermit> + Send>> },
    /// A request that waits for others to finish.
    Room { request: Request },
    /// The payload of a write.
    Payload(PayloadStage),
    /// Nothing more is read: the client has left or the process shuts down.
    Closing,
}

struct Session {
    stream: TcpStream,
    input: BytesMut,
    decoder: RequestDecoder,
    encoder: ReplyEncoder,
    context: Option<u32>,
    negotiated: Negotiated,
    client: SessionClient,
    meter: Meter,
    /// Bytes received so far, behind the handshake.
    received: u64,
    /// As of when the meter knows whom the session is attached to.
    standing_told: u64,
    front: Arc<Front>,
    departure: Departure,
    stage: Stage,
    in_flight: InFlight,
    output: Output,
    /// The connection was closed without NBD_CMD_DISC.
    client_left: bool,
    /// Bytes of replies that are being made on the blocking pool.
    reading_bytes: usize,
    /// While replies wait for the client: since when it has not taken [`OUTPUT_PROGRESS_BYTES`] of
    /// them, and how much it had taken by then.
    output_since: Option<(Instant, u64)>,
    /// Where small reads are put together.
    scratch: ReadBuffer,
    sampler: Sampler,
    /// The root of the request that was decoded and is not begun yet, if it is traced.
    tracing: Option<Span>,
    /// As of when traced requests know whom the session is attached to.
    standing_traced: u64,
}

impl Session {
    fn new(attached: Attached) -> Self {
        let Attached { stream, input, negotiated, client, meter, front } = attached;
        Self {
            stream,
            received: input.len() as u64,
            input,
            decoder: RequestDecoder::new(&negotiated),
            encoder: ReplyEncoder::new(&negotiated),
            context: negotiated.allocation_context,
            standing_told: client.standing().changes(),
            standing_traced: client.standing().changes(),
            sampler: front.tracer.sampler(),
            tracing: None,
            negotiated,
            client,
            meter,
            departure: Departure::new(&front),
            front,
            stage: Stage::Header,
            in_flight: InFlight::default(),
            output: Output::default(),
            client_left: false,
            reading_bytes: 0,
            output_since: None,
            scratch: ReadBuffer::default(),
        }
    }

    async fn run(&mut self) -> Result<End, SessionEnd> {
        let shutdown = self.front.shutdown.token();
        let served = self.serve(&shutdown).await;
        self.tell_meter();
        if let Err(end) = &served {
            self.in_flight.traces().for_each(|span| span.error(end.to_string()));
        }
        let end = served?;
        if end == End::Closed {
            // A client that is gone already has nothing to wait for.
            let _ = self.linger().await;
        }
        Ok(end)
    }

    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<End, SessionEnd> {
        loop {
            while let Some(signal) = self.client.try_next() {
                self.take_signal(signal).await?;
                // A large read goes out while it still comes in.
                if self.output.len() >= OUTPUT_BYTES_MAX {
                    self.output.try_send(&self.stream)?;
                }
            }
            if self.client_left && !self.client.is_attached() {
                // Nobody waits for what is pending, and its client may be sending it again.
                return Ok(End::Closed);
            }
            let mut more = self.take_input().await?;
            let held_back = !self.output_has_room();
            self.output.try_send(&self.stream)?;
            // Requests that were held back may be here already: no event would tell.
            more |= held_back && self.output_has_room();
            self.note_output();
            self.check_stall()?;
            self.tell_meter();
            if matches!(self.stage, Stage::Closing)
                && self.in_flight.is_empty()
                && self.output.is_empty()
            {
                return Ok(End::Closed);
            }
            if self.may_depart() {
                if self.depart().await == Departed::Gone {
                    return Ok(End::HandedOver);
                }
                // What was held back may be here already.
                more = true;
            } else if self.is_stuck() {
                self.departure.pass();
                more = true;
            }
            if more {
                // Others on this worker get their turn between two bursts of one client.
                tokio::task::yield_now().await;
                continue;
            }
            self.wait(shutdown).await?;
        }
    }

    /// Waits until there is something to do, and reads what the socket has.
    async fn wait(&mut self, shutdown: &CancellationToken) -> Result<(), SessionEnd> {
        let closing = matches!(self.stage, Stage::Closing);
        let interest = self.interest();
        let may_stall = self.may_stall();
        let watched = self.departure.watches_shutdown();
        let mut budget_permit = None;
        tokio::select! {
            signal = self.client.wait() => self.take_signal(signal).await?,
            ready = ready(&self.stream, interest) => {
                let ready = ready?;
                if ready.is_readable() || ready.is_read_closed() {
                    self.receive()?;
                }
            }
            permit = budget_turn(&mut self.stage) => budget_permit = Some(permit),
            () = shutdown.cancelled(), if !closing && !watched => self.close(),
            () = self.departure.news(), if !closing => {}
            () = tokio::time::sleep(STALL_POLL), if may_stall => {}
        }
        if let Some(permit) = budget_permit
            && let Stage::Budget { request, .. } = std::mem::replace(&mut self.stage, Stage::Header)
        {
            self.begin(request, Some(permit)).await?;
        }
        if self.client.standing().changes() != self.standing_traced {
            self.trace_standing();
        }
        Ok(())
    }

    /// Requests that are traced tell that the session was attached anew, or waits for a leader.
    fn trace_standing(&mut self) {
        let standing = self.client.standing();
        self.standing_traced = standing.changes();
        let node = standing.leader().map(|leader| leader.node.to_string());
        let epoch = i64::from(self.client.epoch().0);
        for span in self.in_flight.traces() {
            match &node {
                Some(node) => span.event(
                    "resumed",
                    [
                        ("cinderblock.node", node.clone().into()),
                        ("cinderblock.epoch", epoch.into()),
                    ],
                ),
                None => span.event("leader lost", [("cinderblock.epoch", epoch.into())]),
            }
        }
    }

    /// Stops reading. A payload that is not complete never takes effect; a request that waits for
    /// its turn is turned away.
    fn close(&mut self) {
        let stage = std::mem::replace(&mut self.stage, Stage::Closing);
        if let Stage::Budget { request, .. } | Stage::Room { request } = stage {
            let trace = self.tracing.take();
            self.fail(request.reply_to(), NbdError::Shutdown, trace);
        }
    }

    /// Whether the next request is another process's to read.
    fn is_held_back(&self) -> bool {
        self.departure.is_due() && self.decoder.is_between_requests()
    }

    /// Whether another process may take the session over now: nothing of it is under way.
    fn may_depart(&self) -> bool {
        self.is_held_back()
            && matches!(self.stage, Stage::Header)
            && self.in_flight.is_empty()
            && self.output.is_empty()
            && self.input.len() <= UNREAD_BYTES_MAX
    }

    /// Whether waiting for everything to be answered would take up a turn for nothing.
    fn is_stuck(&self) -> bool {
        self.departure.is_due() && !self.client.is_attached() && !self.client.is_idle()
    }

    async fn depart(&mut self) -> Departed {
        debug_assert!(self.client.is_idle(), "what is under way is in both tables");
        let parcel = Parcel {
            id: self.client.id(),
            epoch: self.client.epoch(),
            next_seq: self.client.next_seq(),
            volume: self.client.volume(),
            negotiated: self.negotiated.clone(),
            input: self.input.clone().freeze(),
        };
        self.departure.offer(&self.stream, &parcel).await
    }

    /// Lets the last replies arrive: closing a socket that has unread input would discard them.
    async fn linger(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        let discard = async {
            loop {
                self.input.clear();
                if self.stream.read_buf(&mut self.input).await? == 0 {
                    return Ok(());
                }
            }
        };
        tokio::time::timeout(LINGER, discard).await.unwrap_or(Ok(()))
    }

    fn output_has_room(&self) -> bool {
        self.output.len() + self.reading_bytes < OUTPUT_BYTES_MAX
    }

    fn interest(&self) -> Option<Interest> {
        let read = match &self.stage {
            Stage::Header => self.output_has_room() && !self.is_held_back(),
            Stage::Payload(_) => true,
            Stage::Budget { .. } | Stage::Room { .. } | Stage::Closing => false,
        };
        let write = !self.output.is_empty();
        match (read, write) {
            (true, true) => Some(Interest::READABLE | Interest::WRITABLE),
            (true, false) => Some(Interest::READABLE),
            (false, true) => Some(Interest::WRITABLE),
            (false, false) => None,
        }
    }

    /// Keeps account of how the client takes its replies.
    fn note_output(&mut self) {
        let sent = self.output.sent();
        self.output_since = match self.output_since {
            _ if self.output.is_empty() => None,
            Some((since, before)) if sent - before < OUTPUT_PROGRESS_BYTES => Some((since, before)),
            _ => Some((Instant::now(), sent)),
        };
    }

    /// Tells the list of sessions and the metrics how things stand.
    fn tell_meter(&mut self) {
        self.meter.tell(self.received, self.output.sent(), self.in_flight.len());
        let standing = self.client.standing();
        if standing.changes() != self.standing_told {
            self.standing_told = standing.changes();
            self.meter.attached(standing.leader().map(BackendAt::from));
        }
    }

    /// Whether the client may be in the way of others by being slow.
    fn may_stall(&self) -> bool {
        !self.output.is_empty() || matches!(self.stage, Stage::Payload(_))
    }

    /// Ends the connection if its client has been too slow for too long.
    fn check_stall(&self) -> Result<(), SessionEnd> {
        if let Some((since, sent)) = self.output_since {
            let (slow_for, moved) = (since.elapsed(), self.output.sent() - sent);
            if slow_for >= OUTPUT_STALL_MAX {
                return Err(SessionEnd::OutputStalled);
            }
            if self.output.is_wanted() && is_slow(moved, slow_for) {
                return Err(SessionEnd::InTheWay);
            }
        }
        if let Stage::Payload(payload) = &self.stage {
            if payload.progress.elapsed() >= PAYLOAD_STALL_MAX {
                return Err(SessionEnd::PayloadStalled);
            }
            let received = payload.len - self.decoder.payload_remaining();
            if payload.permit.is_wanted() && is_slow(received, payload.since.elapsed()) {
                return Err(SessionEnd::InTheWay);
            }
        }
        Ok(())
    }

    /// Reads from the socket: into the payload's own buffer when a large one is arriving, else into
    /// `input`.
    fn receive(&mut self) -> Result<(), SessionEnd> {
        let received = match &mut self.stage {
            Stage::Payload(payload)
                if self.input.is_empty() && payload.room_len() >= DIRECT_READ_BYTES_MIN =>
            {
                let received = self.stream.try_read(payload.room());
                if let Ok(count @ 1..) = received {
                    self.decoder.payload_received(count);
                    payload.filled += count;
                    payload.progress = Instant::now();
                }
                received
            }
            stage => {
                self.input.reserve(INPUT_READ_BYTES);
                let received = self.stream.try_read_buf(&mut self.input);
                if let (Stage::Payload(payload), Ok(1..)) = (stage, &received) {
                    payload.progress = Instant::now();
                }
                received
            }
        };
        match received {
            Ok(0) if matches!(self.stage, Stage::Payload(_)) || !self.input.is_empty() => {
                Err(SessionEnd::CutOff)
            }
            Ok(0) => {
                debug!("the client closed the connection");
                self.client_left = true;
                self.client.leave();
                self.close();
                Ok(())
            }
            Ok(count) => {
                self.received += count as u64;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Decodes and starts requests from what was received. `true` if there may be more to do at
    /// once.
    async fn take_input(&mut self) -> Result<bool, SessionEnd> {
        for _ in 0..TURN_REQUESTS_MAX {
            match &mut self.stage {
                Stage::Closing | Stage::Budget { .. } => return Ok(false),
                Stage::Payload(_) => {
                    if !self.take_payload().await? {
                        return Ok(false);
                    }
                }
                Stage::Room { .. } => {
                    let Stage::Room { request } = std::mem::replace(&mut self.stage, Stage::Header)
                    else {
                        unreachable!("matched above")
                    };
                    if !self.admit(request).await? {
                        return Ok(false);
                    }
                }
                Stage::Header => {
                    if !self.output_has_room() || self.is_held_back() || !self.decode().await? {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Decodes one request. `false` when more input is needed.
    async fn decode(&mut self) -> Result<bool, SessionEnd> {
        match self.decoder.decode(&mut self.input)? {
            Decoded::NeedMore => return Ok(false),
            Decoded::Disconnect => self.close(),
            Decoded::Refused(refused) => self.refuse(&refused),
            Decoded::Request(request) => {
                if self.sampler.take() {
                    let (shard, volume) = (self.client.shard().id(), self.client.volume());
                    let command = &request.command;
                    self.tracing = trace::root(&self.front.tracer, command, shard, volume);
                }
                return self.admit(request).await;
            }
        }
        Ok(true)
    }

    fn refuse(&mut self, refused: &Refused) {
        debug!(command = ?refused.command, error = ?refused.error, refused.message, "refused");
        self.front.metrics.refused.increment(1);
        let to = refused.reply_to();
        self.encoder.error(self.output.buffer(), &to, refused.error, refused.message);
    }

    /// Starts a request if there is room for it; else it waits. `false` when it waits.
    async fn admit(&mut self, request: Request) -> Result<bool, SessionEnd> {
        let (mutations, bytes) = cost(&request.command);
        if !self.in_flight.has_room(self.client.next_seq(), mutations) {
            self.stage = Stage::Room { request };
            return Ok(false);
        }
        let permit = match bytes {
            0 => None,
            bytes => match self.front.budget.try_acquire(bytes) {
                Some(permit) => Some(permit),
                None => {
                    let budget = self.front.budget.clone();
                    let permit = Box::pin(async move { budget.acquire(bytes).await });
                    self.stage = Stage::Budget { request, permit };
                    return Ok(false);
                }
            },
        };
        self.begin(request, permit).await?;
        Ok(true)
    }

    /// Starts a request that has its room and bytes.
    async fn begin(
        &mut self,
        request: Request,
        permit: Option<BytePermit>,
    ) -> Result<(), SessionEnd> {
        let to = request.reply_to();
        let since = Instant::now();
        let trace = self.tracing.take();
        match (request.command, permit) {
            (Command::Write { offset, len }, Some(permit)) => {
                let first_seq = self.client.next_seq();
                let payload = PayloadStage::new(to, (offset, len), first_seq, permit, since, trace);
                self.stage = Stage::Payload(payload);
            }
            (Command::Read { offset, len, dont_fragment }, Some(permit)) => {
                self.begin_read(to, (offset, len), dont_fragment, permit, trace);
            }
            (Command::Trim { offset, len }, _) if len > 0 => {
                self.begin_range(to, LogKind::Trim, (offset, len), false, trace).await?;
            }
            (Command::WriteZeroes { offset, len, no_hole }, _) if len > 0 => {
                self.begin_range(to, LogKind::WriteZeroes, (offset, len), no_hole, trace).await?;
            }
            (Command::BlockStatus { offset, len, req_one }, Some(permit)) => {
                self.begin_status(to, (offset, len), req_one, permit, trace);
            }
            // Every reply that was sent is durable already, there is no cache to warm, and a
            // request of no bytes has nothing to do.
            (command, _) => self.done(to, command.kind(), 0, since),
        }
        Ok(())
    }

    fn done(&mut self, to: ReplyTo, kind: CommandKind, len: u64, since: Instant) {
        self.front.metrics.request(kind, len, since.elapsed());
        self.encoder.done(self.output.buffer(), &to);
    }

    fn fail(&mut self, to: ReplyTo, error: NbdError, trace: Option<Span>) {
        if let Some(mut span) = trace {
            span.error(message(error));
        }
        self.front.metrics.failed.increment(1);
        self.encoder.error(self.output.buffer(), &to, error, message(error));
    }

    async fn take_signal(&mut self, signal: Signal) -> Result<(), SessionEnd> {
        if let Some(event) = self.client.take(signal).await? {
            self.complete(event);
        }
        Ok(())
    }

    fn complete(&mut self, event: Event) {
        match event {
            Event::Mutation { token, outcome } => self.finish(token, outcome_error(&outcome)),
            Event::Refused { token, failed } => self.finish(token, Some(refusal_error(failed))),
            Event::Sample { requests } => self.sampler.want(requests.min(TRACED_MAX)),
            Event::Piece { token, at, data } => self.relay(token, at, data),
            Event::Read { token, at, result } => {
                if let Some((pending, data)) = self.finish_query(token, at, result) {
                    self.send_read(pending.to, at, data, true);
                    self.sent(pending);
                }
            }
            Event::Status { token, result } => {
                let Some((pending, extents)) = self.finish_query(token, 0, result) else { return };
                let Some(context) = self.context else {
                    return self.fail(pending.to, NbdError::Io, pending.trace);
                };
                let extents: Vec<_> = extents.into_iter().map(read::extent).collect();
                let out = self.output.buffer();
                self.encoder.block_status(out, &pending.to, context, &extents, true);
                self.sent(pending);
            }
        }
    }

    /// Counts one mutation of a request as finished, and answers the request with its last.
    fn finish(&mut self, token: usize, error: Option<NbdError>) {
        if let Some(pending) = self.in_flight.finish_part(token, error) {
            self.answer(pending);
        }
    }

    /// Ends a query, and answers it if it has failed. The first `at` bytes of its reply are queued
    /// already.
    fn finish_query<T>(
        &mut self,
        token: usize,
        at: u64,
        result: Result<T, Failed>,
    ) -> Option<(Pending, T)> {
        let error = result.as_ref().err().map(|failed| failure_error(*failed));
        let pending = self.in_flight.finish_part(token, error)?;
        self.reading_bytes -= pending.reply_bytes;
        match (result, error) {
            (Ok(data), _) => return Some((pending, data)),
            (Err(_), error) => {
                let error = error.unwrap_or(NbdError::Io);
                match at {
                    0 => self.fail(pending.to, error, pending.trace),
                    _ => self.break_off(pending.to, at, error, pending.trace),
                }
            }
        }
        None
    }

    /// The reply to a query is queued: its share of the budget goes back when it is sent.
    fn sent(&mut self, mut pending: Pending) {
        if let Some(permit) = pending.permit.take() {
            self.output.hold(permit);
        }
        self.front.metrics.request(pending.kind, pending.len, pending.since.elapsed());
    }

    /// Answers a request whose mutations have all come to an end.
    fn answer(&mut self, pending: Pending) {
        match pending.error {
            None => self.done(pending.to, pending.kind, pending.len, pending.since),
            Some(error) => self.fail(pending.to, error, pending.trace),
        }
    }
}

/// Mutations and budget bytes that a request takes.
fn cost(command: &Command) -> (usize, u64) {
    match *command {
        Command::Write { offset, len } if len > 0 => {
            let first = offset / MUTATION_BYTES_MAX;
            let last = (offset + len - 1) / MUTATION_BYTES_MAX;
            (usize::try_from(last - first + 1).unwrap_or(usize::MAX), len)
        }
        Command::Read { len, .. } => (0, len),
        Command::Trim { .. } | Command::WriteZeroes { .. } => (1, 0),
        Command::BlockStatus { len, req_one, .. } => (0, status_bytes(len, req_one)),
        _ => (0, 0),
    }
}

/// The NBD error of a query that was not carried out.
const fn failure_error(failed: Failed) -> NbdError {
    match failed {
        Failed::NoSpace => NbdError::NoSpc,
        Failed::Io => NbdError::Io,
        // The volume was made smaller since the client attached.
        Failed::PastEnd => NbdError::Inval,
        Failed::Gone => NbdError::Shutdown,
    }
}

/// The NBD error of a mutation that was not carried out: for what lies past the end the protocol
/// has another one than for queries.
const fn refusal_error(failed: Failed) -> NbdError {
    match failed {
        Failed::PastEnd => NbdError::NoSpc,
        _ => failure_error(failed),
    }
}

/// The NBD error of a mutation's outcome; `None` if it took effect.
fn outcome_error(outcome: &Outcome) -> Option<NbdError> {
    match outcome {
        Outcome::Done => None,
        Outcome::Rejected(Rejection::PastEnd) => Some(NbdError::NoSpc),
        // The volume was deleted or the session ended by an operator.
        Outcome::Rejected(Rejection::UnknownVolume | Rejection::UnknownSession) => {
            Some(NbdError::Shutdown)
        }
        Outcome::Rejected(_) => Some(NbdError::Io),
        other => panic!("{other:?} is not an outcome of a mutation"),
    }
}

fn message(error: NbdError) -> &'static str {
    match error {
        NbdError::NoSpc => "no room left on the replica's disk, or past the end of the volume",
        NbdError::Shutdown => "the volume is gone or the server is shutting down",
        NbdError::Io => "the replica could not carry out the request; its log says why",
        NbdError::Inval => "past the end of the volume, which was made smaller",
        _ => "the request was refused",
    }
}

async fn ready(stream: &TcpStream, interest: Option<Interest>) -> io::Result<Ready> {
    match interest {
        Some(interest) => stream.ready(interest).await,
        None => std::future::pending().await,
    }
}

async fn budget_turn(stage: &mut Stage) -> BytePermit {
    match stage {
        Stage::Budget { permit, .. } => permit.await,
        _ => std::future::pending().await,
    }
}

/// Bytes that the reply to a block status request may take.
fn status_bytes(len: u64, req_one: bool) -> u64 {
    let extents = if req_one { 1 } else { len.div_ceil(BLOCK_BYTES) + 1 };
    extents.min(BLOCK_STATUS_EXTENTS_MAX as u64) * STATUS_EXTENT_BYTES
}
