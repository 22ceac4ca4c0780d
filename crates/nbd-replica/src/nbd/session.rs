//! The transmission phase of one connection: requests in, proposals and reads out, replies back as
//! they complete.
//!
//! One task does it all, so that a request costs no hand-off between tasks beyond the one to the
//! group:
//!
//! ```text
//!            ┌──────────────────── session task ───────────────────┐
//!  socket ──▶│ input ─▶ decode ─▶ payload ─▶ propose ──────────────│──▶ group task
//!            │            │                                        │       │
//!            │            └─▶ read (page cache) ─▶ output ─────────│──▶ socket
//!            │                     │ else           ▲              │       │
//!            │                     ▼                └─ completions ◀───────┘
//!            └──────────── blocking pool ─────────────────▲────────┘
//!                              └──────────────────────────┘
//! ```
//!
//! The task stops reading its socket while it has [`REQUESTS_IN_FLIGHT_MAX`] requests under way,
//! while the process's byte budget is used up, or while its client leaves replies unread; nothing
//! else waits for that. It ends when the client leaves, breaks the protocol or stalls, or when the
//! node shuts down; requests already received are carried out and, as long as the socket lives,
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
use nbd_proto::{
    Command, CommandKind, Decoded, NbdError, Negotiated, Refused, ReplyEncoder, ReplyTo, Request,
    RequestDecoder, TransmissionError,
};
use nbd_store::limits::MUTATION_BYTES_MAX;
use nbd_store::{AdmissionKind, Outcome, Rejection};
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::write::{DIRECT_READ_BYTES_MIN, PayloadStage};
use super::attach::Opened;
use super::in_flight::{InFlight, Pending};
use super::output::Output;
use super::{Completion, Node};
use crate::budget::BytePermit;
use crate::group_task::GroupStopped;
use crate::limits::{
    INPUT_READ_BYTES, MUTATIONS_IN_FLIGHT_MAX, OUTPUT_BYTES_MAX, OUTPUT_STALL_MAX,
    PAYLOAD_STALL_MAX, REQUESTS_IN_FLIGHT_MAX,
};

/// Completions that can be waiting: one for each mutation and each other request under way.
const COMPLETIONS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + REQUESTS_IN_FLIGHT_MAX;

/// Requests decoded before completions and output get their turn again.
const TURN_REQUESTS_MAX: usize = 64;

/// A connection whose handshake is done.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) stream: TcpStream,
    /// Bytes already received behind the handshake.
    pub(super) input: BytesMut,
    pub(super) negotiated: Negotiated,
    pub(super) opened: Opened,
    pub(super) node: Arc<Node>,
}

/// Serves the session until it ends.
pub(super) async fn run(attached: Attached) {
    let size = attached.negotiated.export.size;
    info!(size, volume = attached.opened.volume.id.0, "attached");
    match Session::new(attached).run().await {
        Ok(()) => info!("detached"),
        Err(end) => info!(reason = %end, "connection ended"),
    }
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
    #[error("{0}")]
    Stopped(#[from] GroupStopped),
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
    /// Nothing more is read: the client has left or the node shuts down.
    Closing,
}

struct Session {
    stream: TcpStream,
    input: BytesMut,
    decoder: RequestDecoder,
    encoder: ReplyEncoder,
    context: Option<u32>,
    opened: Opened,
    node: Arc<Node>,
    stage: Stage,
    in_flight: InFlight,
    next_seq: u64,
    output: Output,
    output_progress: Instant,
    /// Where small reads are put together.
    scratch: Vec<u8>,
    completions_tx: mpsc::Sender<Completion>,
    completions: mpsc::Receiver<Completion>,
}

impl Session {
    fn new(attached: Attached) -> Self {
        let Attached { stream, input, negotiated, opened, node } = attached;
        let (completions_tx, completions) = mpsc::channel(COMPLETIONS_MAX);
        Self {
            stream,
            input,
            decoder: RequestDecoder::new(&negotiated),
            encoder: ReplyEncoder::new(&negotiated),
            context: negotiated.allocation_context,
            opened,
            node,
            stage: Stage::Header,
            in_flight: InFlight::default(),
            next_seq: 1,
            output: Output::default(),
            output_progress: Instant::now(),
            scratch: Vec::new(),
            completions_tx,
            completions,
        }
    }

    async fn run(mut self) -> Result<(), SessionEnd> {
        let shutdown = self.node.shutdown.token();
        self.serve(&shutdown).await
    }

    async fn serve(&mut self, shutdown: &CancellationToken) -> Result<(), SessionEnd> {
        loop {
            while let Ok(completion) = self.completions.try_recv() {
                self.complete(completion).await?;
            }
            let more = self.take_input().await?;
            if self.output.try_send(&self.stream)? || self.output.is_empty() {
                self.output_progress = Instant::now();
            }
            if matches!(self.stage, Stage::Closing)
                && self.in_flight.is_empty()
                && self.output.is_empty()
            {
                return Ok(());
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
        let deadline = self.stall_deadline();
        let mut budget_permit = None;
        tokio::select! {
            Some(completion) = self.completions.recv() => self.complete(completion).await?,
            ready = ready(&self.stream, interest) => {
                let ready = ready?;
                if ready.is_readable() || ready.is_read_closed() {
                    self.receive()?;
                }
            }
            permit = budget_turn(&mut self.stage) => budget_permit = Some(permit),
            () = shutdown.cancelled(), if !closing => self.close(),
            () = stalled(deadline) => return Err(self.stall_reason()),
        }
        if let Some(permit) = budget_permit
            && let Stage::Budget { request, .. } = std::mem::replace(&mut self.stage, Stage::Header)
        {
            self.begin(request, Some(permit)).await?;
        }
        Ok(())
    }

    /// Stops reading. A payload that is not complete never takes effect.
    fn close(&mut self) {
        self.stage = Stage::Closing;
    }

    fn interest(&self) -> Option<Interest> {
        let read = match &self.stage {
            Stage::Header => self.output.len() < OUTPUT_BYTES_MAX,
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

    fn stall_deadline(&self) -> Option<Instant> {
        let output = (!self.output.is_empty()).then(|| self.output_progress + OUTPUT_STALL_MAX);
        let payload = match &self.stage {
            Stage::Payload(payload) => Some(payload.progress + PAYLOAD_STALL_MAX),
            _ => None,
        };
        [output, payload].into_iter().flatten().min()
    }

    fn stall_reason(&self) -> SessionEnd {
        if !self.output.is_empty() && self.output_progress.elapsed() >= OUTPUT_STALL_MAX {
            SessionEnd::OutputStalled
        } else {
            SessionEnd::PayloadStalled
        }
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
                self.close();
                Ok(())
            }
            Ok(_) => Ok(()),
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
                    if self.output.len() >= OUTPUT_BYTES_MAX || !self.decode().await? {
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
            Decoded::Request(request) => return self.admit(request).await,
        }
        Ok(true)
    }

    fn refuse(&mut self, refused: &Refused) {
        debug!(command = ?refused.command, error = ?refused.error, refused.message, "refused");
        self.node.metrics.refused.increment(1);
        let to = refused.reply_to();
        self.encoder.error(self.output.buffer(), &to, refused.error, refused.message);
    }

    /// Starts a request if there is room for it; else it waits. `false` when it waits.
    async fn admit(&mut self, request: Request) -> Result<bool, SessionEnd> {
        let (mutations, bytes) = cost(&request.command);
        if !self.in_flight.has_room(self.next_seq, mutations) {
            self.stage = Stage::Room { request };
            return Ok(false);
        }
        let permit = match bytes {
            0 => None,
            bytes => match self.node.budget.try_acquire(bytes) {
                Some(permit) => Some(permit),
                None => {
                    let budget = self.node.budget.clone();
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
        match (request.command, permit) {
            (Command::Write { offset, len }, Some(permit)) => {
                let payload = PayloadStage::new(to, offset, len, self.next_seq, permit, since);
                self.stage = Stage::Payload(payload);
            }
            (Command::Read { offset, len, dont_fragment }, Some(permit)) => {
                self.begin_read(to, offset, len, dont_fragment, permit);
            }
            (Command::Trim { offset, len }, _) if len > 0 => {
                let kind = AdmissionKind::Trim;
                self.begin_range(to, CommandKind::Trim, kind, offset, len).await?;
            }
            (Command::WriteZeroes { offset, len, no_hole }, _) if len > 0 => {
                let kind = AdmissionKind::WriteZeroes { no_hole };
                self.begin_range(to, CommandKind::WriteZeroes, kind, offset, len).await?;
            }
            (Command::BlockStatus { offset, len, req_one }, _) if len > 0 => {
                self.begin_status(to, offset, len, req_one);
            }
            // Every reply that was sent is durable already, there is no cache to warm, and a
            // request of no bytes has nothing to do.
            (command, _) => self.done(to, command.kind(), 0, since),
        }
        Ok(())
    }

    fn done(&mut self, to: ReplyTo, kind: CommandKind, len: u64, since: Instant) {
        self.node.metrics.request(kind, len, since.elapsed());
        self.encoder.done(self.output.buffer(), &to);
    }

    fn fail(&mut self, to: ReplyTo, error: NbdError) {
        self.node.metrics.failed.increment(1);
        self.encoder.error(self.output.buffer(), &to, error, message(error));
    }

    async fn complete(&mut self, completion: Completion) -> Result<(), GroupStopped> {
        match completion {
            Completion::Mutation { token, outcome } => {
                let error = outcome_error(&outcome);
                if let Some(pending) = self.in_flight.finish_part(token, error) {
                    self.answer(&pending);
                }
            }
            Completion::Granted { token, grant, commands } => {
                self.propose_granted(token, grant, commands).await?;
            }
            Completion::Refused { token, error } => {
                if let Some(pending) = self.in_flight.refuse(token, error) {
                    self.answer(&pending);
                }
            }
            Completion::Read { token, result } => {
                let error = result.as_ref().err().copied();
                if let Some(pending) = self.in_flight.finish_part(token, error) {
                    match result {
                        Ok(data) => {
                            self.send_read(pending.to, data);
                            let elapsed = pending.since.elapsed();
                            self.node.metrics.request(pending.kind, pending.len, elapsed);
                        }
                        Err(error) => self.fail(pending.to, error),
                    }
                }
            }
            Completion::Status { token, result } => {
                let error = result.as_ref().err().copied();
                if let Some(pending) = self.in_flight.finish_part(token, error) {
                    match (result, self.context) {
                        (Ok(extents), Some(context)) => {
                            let out = self.output.buffer();
                            self.encoder.block_status(out, &pending.to, context, &extents, true);
                            let elapsed = pending.since.elapsed();
                            self.node.metrics.request(pending.kind, pending.len, elapsed);
                        }
                        _ => self.fail(pending.to, NbdError::Io),
                    }
                }
            }
        }
        Ok(())
    }

    /// Answers a request whose mutations have all come to an end.
    fn answer(&mut self, pending: &Pending) {
        match pending.error {
            None => self.done(pending.to, pending.kind, pending.len, pending.since),
            Some(error) => self.fail(pending.to, error),
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
        _ => (0, 0),
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

async fn stalled(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
