//! An attachment to a leader on another node: one relay.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use nbd_relay::{
    ALIVE_INTERVAL, FrameError, FromCaller, FromLeader, Hello, MalformedMessage, PREAMBLE, Verdict,
    put_mutation,
};
use nbd_rpc::CONNECT_TIMEOUT;
use nbd_service::trace::Context;
use nbd_session::{Query, QueryId};
use nbd_store::Outcome;
use tokio::io::{AsyncWriteExt as _, Ready};
use tokio::net::TcpStream;
use tokio::time::{Interval, MissedTickBehavior};
use tracing::debug;

use super::session::AttachError;
use super::{Answered, QueryData, ReadData, ShardClient};
use crate::local::Attaching;
use crate::relay_stream::{Received, RelayStream};
use crate::route::LeaderAt;

/// Times [`ALIVE_INTERVAL`] without a word of a leader that owes an answer, after which it is given
/// up: the way to it is cut or its process is frozen. More than two, for a machine under load.
const SILENT_INTERVALS_MAX: u32 = 3;

/// One session's relay. Dropping it ends the attachment.
#[derive(Debug)]
pub(super) struct Remote {
    relay: RelayStream,
    leader: LeaderAt,
    /// Ticks every [`ALIVE_INTERVAL`]; looked at only while the leader owes an answer.
    clock: Interval,
    /// Ticks since the last word of the leader.
    silent: u32,
    /// Of no use any more; it has been told, or is about to be.
    is_lost: bool,
}

/// Why a relay is of no use any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Message(#[from] MalformedMessage),
    #[error("the leader closed the connection")]
    Closed,
    #[error("the leader is silent")]
    Silent,
    #[error("a verdict nobody asked for")]
    Verdict,
    #[error("{0}")]
    Ended(String),
}

/// Opens or resumes a session at `leader`.
pub(super) async fn attach(
    shard: ShardClient,
    leader: LeaderAt,
    attaching: Attaching,
) -> Result<Remote, AttachError> {
    let Attaching { session, epoch, volume, caller } = attaching;
    let hello = Hello {
        cluster: shard.access.cluster.to_string(),
        shard: shard.shard.0,
        session,
        epoch,
        volume,
        owner: shard.access.owner,
        caller,
    };
    let attached = async {
        let mut relay = connect(&leader.grpc).await?;
        send(&mut relay, FromCaller::Hello(hello));
        Ok::<_, Lost>((next(&mut relay).await?, relay))
    };
    let failed = |error: Lost| {
        debug!(node = %leader.node, %error, "a leader cannot be asked");
        AttachError::Elsewhere
    };
    match attached.await.map_err(failed)? {
        (FromLeader::Verdict(Verdict::Attached), relay) => {
            let mut clock = tokio::time::interval(ALIVE_INTERVAL);
            clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Ok(Remote { relay, leader, clock, silent: 0, is_lost: false })
        }
        (FromLeader::Verdict(Verdict::Rejected(rejection)), _) => {
            Err(AttachError::Rejected(rejection))
        }
        (FromLeader::End { reason }, _) => Err(failed(Lost::Ended(reason))),
        _ => Err(AttachError::Elsewhere),
    }
}

async fn connect(address: &str) -> Result<RelayStream, Lost> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let mut stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    // Goes out at once: a new socket has room for it.
    stream.write_all(&PREAMBLE).await?;
    Ok(RelayStream::new(stream)?)
}

fn send(relay: &mut RelayStream, message: FromCaller) {
    if let Some(body) = message.put(relay.output().buffer()) {
        relay.output().push(body);
    }
}

/// The next message. May be dropped at any time.
async fn next(relay: &mut RelayStream) -> Result<FromLeader, Lost> {
    loop {
        if let Some(frame) = relay.next_frame()? {
            return Ok(FromLeader::decode(frame)?);
        }
        relay.try_send()?;
        let ready = relay.ready(true).await?;
        receive(relay, ready)?;
    }
}

fn receive(relay: &mut RelayStream, ready: Ready) -> Result<(), Lost> {
    let readable = ready.is_readable() || ready.is_read_closed();
    if readable && relay.receive()? == Received::End {
        return Err(Lost::Closed);
    }
    Ok(())
}

impl Remote {
    /// Whose it is.
    pub(super) const fn leader(&self) -> &LeaderAt {
        &self.leader
    }

    /// Sends a mutation, with the next [`Self::wait`].
    pub(super) fn mutate(&mut self, seq: u64, command: bytes::Bytes, trace: Option<Context>) {
        self.trace(seq, trace);
        if let Some(body) = put_mutation(self.relay.output().buffer(), command) {
            self.relay.output().push(body);
        }
    }

    /// Sends a query, with the next [`Self::wait`].
    pub(super) fn query(&mut self, id: QueryId, query: Query, trace: Option<Context>) {
        self.trace(id.0, trace);
        send(&mut self.relay, FromCaller::Query { id, query });
    }

    /// Says of the request that comes next that it is traced, if it is.
    fn trace(&mut self, id: u64, trace: Option<Context>) {
        if let Some(trace) = trace {
            let (trace_id, span_id) = (trace.trace_id(), trace.span_id());
            send(&mut self.relay, FromCaller::Trace { id, trace_id, span_id });
        }
    }

    /// An answer that has arrived, if there is one.
    pub(super) fn try_next(&mut self) -> Option<Answered> {
        while !self.is_lost {
            let message = match self.relay.next_frame() {
                Ok(None) => return None,
                Ok(Some(frame)) => FromLeader::decode(frame).map_err(Lost::from),
                Err(error) => Err(error.into()),
            };
            match message.and_then(answered) {
                Ok(None) => {}
                Ok(Some(answered)) => return Some(answered),
                Err(error) => return Some(self.lost(&error)),
            }
        }
        None
    }

    /// Sends what there is to be sent and waits for the next answer; `owes` says whether the leader
    /// owes any. May be dropped at any time.
    pub(super) async fn wait(&mut self, owes: bool) -> Answered {
        loop {
            if self.is_lost {
                return Answered::Lost;
            }
            if let Some(answered) = self.try_next() {
                return answered;
            }
            if let Err(error) = self.turn(owes).await {
                return self.lost(&error);
            }
        }
    }

    /// Sends and receives once.
    async fn turn(&mut self, owes: bool) -> Result<(), Lost> {
        self.relay.try_send()?;
        tokio::select! {
            ready = self.relay.ready(true) => {
                self.silent = 0;
                receive(&mut self.relay, ready?)
            }
            _ = self.clock.tick(), if owes => {
                self.silent += 1;
                if self.silent > SILENT_INTERVALS_MAX { Err(Lost::Silent) } else { Ok(()) }
            }
        }
    }

    fn lost(&mut self, error: &Lost) -> Answered {
        debug!(node = %self.leader.node, %error, "an attachment is lost");
        self.is_lost = true;
        Answered::Lost
    }
}

/// What a message answers, if anything.
fn answered(message: FromLeader) -> Result<Option<Answered>, Lost> {
    Ok(Some(match message {
        FromLeader::Applied { seq, verdict } => {
            let outcome = verdict.map_or_else(Outcome::Rejected, |()| Outcome::Done);
            Answered::Mutation { seq, outcome, trace: None, given: None }
        }
        FromLeader::Refused { seq, failed } => Answered::Refused { seq, failed },
        FromLeader::Bytes { id, bytes, runs } => {
            Answered::Piece { id, piece: ReadData { bytes, runs } }
        }
        FromLeader::Extents { id, extents } => {
            Answered::Query { id, result: Ok(QueryData::Extents(extents)) }
        }
        FromLeader::Failed { id, failed } => Answered::Query { id, result: Err(failed) },
        FromLeader::Sample { requests } => Answered::Sample(Arc::new(AtomicU32::new(requests))),
        FromLeader::Alive => return Ok(None),
        FromLeader::Ended => Answered::Ended,
        FromLeader::End { reason } => return Err(Lost::Ended(reason)),
        FromLeader::Verdict(_) => return Err(Lost::Verdict),
    }))
}
