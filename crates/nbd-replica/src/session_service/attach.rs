//! One session of another node, attached to this node's group.
//!
//! ```text
//!  stream ──▶ check ──▶ byte budget ──▶ HostedSession ──▶ group task
//!     ▲          └─────▶ read tasks ──────────▶ store
//!     └── replies (few) ◀──┴────── answers ◀──────┘
//! ```
//!
//! A caller that does not take its replies is not read from any more. The task ends when the stream
//! does, when this replica does not serve the shard any more, or when the node stops; what was
//! proposed by then is carried out.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use nbd_front::limits::{MUTATIONS_IN_FLIGHT_MAX, PIECE_BYTES_MAX};
use nbd_front::{Answered, ByteBudget, BytePermit, Failed, GroupStopped, QueryData, RunError};
use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_rpc::{Refusal, v1};
use nbd_session::Query;
use nbd_store::limits::READ_BYTES_MAX;
use nbd_store::{CommandHeader, Epoch, Outcome, SessionId, VolumeId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

use super::{Shared, not_leader, stopping, wire};
use crate::hosted::read::{QueryError, Question};
use crate::hosted::{HostedSession, HostedShard};

/// Queries of one session that may be unanswered; more than any client may have under way.
const QUERIES_MAX: usize = 256;

/// Queries of one session that are worked on at a time, each a piece of at most 1 MiB.
const QUERIES_AT_ONCE: usize = 8;

/// Answers of the group that can be waiting.
const ANSWERS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + QUERIES_MAX;

/// Most bytes that one extent of a block status takes in memory and on the wire.
const EXTENT_BYTES: u64 = 40;

type Replies = mpsc::Sender<Result<v1::AttachReply, Status>>;

/// Why a stream ends.
enum End {
    /// The caller has gone: there is nobody to tell.
    Gone,
    /// The caller is told.
    Told(Status),
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> Self {
        Self::Told(refusal.into())
    }
}

impl From<GroupStopped> for End {
    fn from(_: GroupStopped) -> Self {
        Self::Told(stopping())
    }
}

fn lost() -> End {
    End::Told(Status::aborted("this replica does not lead the shard any more"))
}

/// Serves one stream to its end.
pub(super) async fn serve(
    shared: &Shared,
    mut requests: Streaming<v1::AttachRequest>,
    replies: Replies,
) {
    let served = async {
        let Some((attached, answers)) = open(shared, &mut requests, &replies).await? else {
            return Ok(());
        };
        attached.run(requests, answers).await
    };
    if let Err(End::Told(status)) = served.await {
        let _ = replies.send(Err(status)).await;
    }
}

/// A session that was opened or resumed here.
struct Attached {
    local: HostedSession,
    session: SessionId,
    epoch: Epoch,
    budget: ByteBudget,
    replies: Replies,
    /// Mutations that are not answered.
    unanswered: usize,
    /// Places for queries that are not answered.
    queries: Arc<Semaphore>,
    /// Turns of queries that are worked on.
    turns: Arc<Semaphore>,
}

/// Takes the hello and opens the session. `None` when the verdict is that it is not open.
async fn open(
    shared: &Shared,
    requests: &mut Streaming<v1::AttachRequest>,
    replies: &Replies,
) -> Result<Option<(Attached, mpsc::Receiver<Answered>)>, End> {
    use v1::attach_verdict::Verdict;
    let Some(v1::attach_request::Message::Hello(hello)) = next(requests).await? else {
        return Err(Refusal::Malformed("the first message is a hello").into());
    };
    let shard = shared.shard(hello.target.as_ref())?;
    let session = hello.session[..].try_into();
    let session = session.map_err(|_| Refusal::Malformed("a session's id is 16 bytes"))?;
    let session = SessionId(u128::from_le_bytes(session));
    let (epoch, volume) = (Epoch(hello.epoch), VolumeId(hello.volume));
    let owner = nbd_store::Owner { node: hello.owner_node, incarnation: hello.owner_incarnation };
    let verdict = if shard.group.route().borrow().serving {
        let command = nbd_store::encode_open_session(session, epoch, volume, owner);
        let opened = tokio::select! {
            opened = shard.group.run(command) => opened,
            () = replies.closed() => return Err(End::Gone),
        };
        match opened {
            Ok(Outcome::SessionOpened) => Verdict::Attached(v1::Empty {}),
            Ok(Outcome::Rejected(rejection)) => {
                Verdict::Rejected(wire::rejection_to(rejection).into())
            }
            Ok(_) => return Err(End::Told(Status::internal("not an outcome of opening"))),
            Err(RunError::NotLeader) => Verdict::NotLeader(not_leader(shard)),
            Err(RunError::Lost) => Verdict::Lost(v1::Empty {}),
            Err(RunError::Stopped(_)) => return Err(End::Told(stopping())),
        }
    } else {
        Verdict::NotLeader(not_leader(shard))
    };
    let is_open = matches!(verdict, Verdict::Attached(_));
    let verdict = v1::AttachVerdict { verdict: Some(verdict) };
    send(replies, v1::attach_reply::Message::Verdict(verdict)).await?;
    if !is_open {
        return Ok(None);
    }
    let (sender, answers) = mpsc::channel(ANSWERS_MAX);
    let attached = Attached {
        local: HostedSession::new(shard.clone(), session, volume, sender),
        session,
        epoch,
        budget: shared.budget.clone(),
        replies: replies.clone(),
        unanswered: 0,
        queries: Arc::new(Semaphore::new(QUERIES_MAX)),
        turns: Arc::new(Semaphore::new(QUERIES_AT_ONCE)),
    };
    Ok(Some((attached, answers)))
}

/// The next message. An end of the stream, good or bad, is the caller's leave.
async fn next(
    requests: &mut Streaming<v1::AttachRequest>,
) -> Result<Option<v1::attach_request::Message>, End> {
    match requests.message().await {
        Ok(Some(request)) => Ok(request.message),
        Ok(None) | Err(_) => Err(End::Gone),
    }
}

async fn send(replies: &Replies, message: v1::attach_reply::Message) -> Result<(), End> {
    let reply = v1::AttachReply { message: Some(message) };
    replies.send(Ok(reply)).await.map_err(|_| End::Gone)
}

impl Attached {
    async fn run(
        mut self,
        mut requests: Streaming<v1::AttachRequest>,
        mut answers: mpsc::Receiver<Answered>,
    ) -> Result<(), End> {
        let shutdown = self.local.shard.hosting.shutdown.token();
        let mut route = self.local.shard.group.route();
        let mut deposed = pin!(async move { drop(route.wait_for(|now| !now.serving).await) });
        loop {
            tokio::select! {
                Some(answered) = answers.recv() => self.answer(answered).await?,
                message = next(&mut requests) => match message? {
                    Some(message) => self.take(message, &mut answers).await?,
                    None => return Err(Refusal::Malformed("an empty message").into()),
                },
                () = &mut deposed => return Err(lost()),
                () = shutdown.cancelled() => return Err(End::Told(stopping())),
                () = self.replies.closed() => return Err(End::Gone),
            }
        }
    }

    async fn take(
        &mut self,
        message: v1::attach_request::Message,
        answers: &mut mpsc::Receiver<Answered>,
    ) -> Result<(), End> {
        use v1::attach_request::Message;
        match message {
            Message::Hello(_) => Err(Refusal::Malformed("a second hello").into()),
            Message::Mutation(mutation) => self.mutate(mutation.command, answers).await,
            Message::Read(read) => {
                let (offset, len) = (read.offset, read.length);
                if len == 0 || len > READ_BYTES_MAX || offset.checked_add(len).is_none() {
                    return Err(Refusal::Malformed("a read of an impossible range").into());
                }
                self.query(read.id, Query::Read { offset, len, holes: read.holes })
            }
            Message::Status(status) => {
                let (offset, len) = (status.offset, status.length);
                if len == 0 || offset.checked_add(len).is_none() || status.extents_max == 0 {
                    return Err(Refusal::Malformed("a block status of nothing").into());
                }
                let most = u32::try_from(BLOCK_STATUS_EXTENTS_MAX).unwrap_or(u32::MAX);
                let extents_max = status.extents_max.min(most);
                self.query(status.id, Query::BlockStatus { offset, len, extents_max })
            }
        }
    }

    /// Proposes a mutation once the budget has room for it. Answers go on meanwhile.
    async fn mutate(
        &mut self,
        command: Bytes,
        answers: &mut mpsc::Receiver<Answered>,
    ) -> Result<(), End> {
        let header: CommandHeader = wire::check_mutation(&command)?;
        let mine = (header.session, header.epoch, header.volume)
            == (self.session, self.epoch, self.local.volume);
        if !mine {
            return Err(Refusal::Malformed("a mutation of another session").into());
        }
        if self.unanswered >= MUTATIONS_IN_FLIGHT_MAX {
            let (what, limit) = ("unanswered mutations of a session", MUTATIONS_IN_FLIGHT_MAX);
            return Err(Refusal::TooMany { what, limit }.into());
        }
        self.unanswered += 1;
        let share = self.share(command.len() as u64, answers).await?;
        Ok(self.local.mutate(&header, command, Some(Arc::new(share))).await?)
    }

    async fn share(
        &mut self,
        bytes: u64,
        answers: &mut mpsc::Receiver<Answered>,
    ) -> Result<BytePermit, End> {
        let budget = self.budget.clone();
        if let Some(share) = budget.try_acquire(bytes) {
            return Ok(share);
        }
        let mut share = pin!(budget.acquire(bytes));
        loop {
            tokio::select! {
                share = &mut share => return Ok(share),
                Some(answered) = answers.recv() => self.answer(answered).await?,
                () = self.replies.closed() => return Err(End::Gone),
            }
        }
    }

    /// Tells the caller what came of something.
    async fn answer(&mut self, answered: Answered) -> Result<(), End> {
        use v1::attach_mutation_answer::Answer as Wire;
        let (seq, answer) = match answered {
            Answered::Mutation { seq, outcome } => match outcome {
                Outcome::Done => (seq, Wire::Done(v1::Empty {})),
                Outcome::Rejected(why) => (seq, Wire::Rejected(wire::rejection_to(why).into())),
                _ => return Err(End::Told(Status::internal("not an outcome of a mutation"))),
            },
            Answered::Refused { seq, failed } => {
                (seq, Wire::Failed(wire::failed_to(failed).into()))
            }
            Answered::Granted(granted) => return Ok(self.local.propose(granted).await?),
            Answered::Lost => return Err(lost()),
            // Queries answer for themselves.
            Answered::Query { .. } | Answered::Piece { .. } => return Ok(()),
        };
        self.unanswered -= 1;
        let answer = v1::AttachMutationAnswer { seq, answer: Some(answer) };
        send(&self.replies, v1::attach_reply::Message::Mutation(answer)).await
    }

    /// Has a query answered by a task of its own.
    fn query(&self, id: u64, query: Query) -> Result<(), End> {
        let Ok(place) = Arc::clone(&self.queries).try_acquire_owned() else {
            let (what, limit) = ("unanswered queries of a session", QUERIES_MAX);
            return Err(Refusal::TooMany { what, limit }.into());
        };
        let task = QueryTask {
            id,
            query,
            shard: self.local.shard.clone(),
            volume: self.local.volume,
            budget: self.budget.clone(),
            replies: self.replies.clone(),
            turns: Arc::clone(&self.turns),
            _place: place,
        };
        let answers = self.local.answers.clone();
        self.local.shard.hosting.shutdown.spawn(async move {
            if let Err(QueryError::Lost) = task.run().await {
                let _ = answers.try_send(Answered::Lost);
            }
        });
        Ok(())
    }
}

/// One query that is being answered.
struct QueryTask {
    id: u64,
    query: Query,
    shard: HostedShard,
    volume: VolumeId,
    budget: ByteBudget,
    replies: Replies,
    turns: Arc<Semaphore>,
    _place: OwnedSemaphorePermit,
}

impl QueryTask {
    async fn run(self) -> Result<(), QueryError> {
        let Ok(_turn) = self.turns.acquire().await else { return Ok(()) };
        match self.query {
            Query::Read { offset, len, holes } => {
                let end = offset + len;
                let mut at = offset;
                while at < end {
                    let piece =
                        (PIECE_BYTES_MAX as u64 - at % PIECE_BYTES_MAX as u64).min(end - at);
                    let query = Query::Read { offset: at, len: piece, holes };
                    if !self.piece(query, piece).await? {
                        return Ok(());
                    }
                    at += piece;
                }
            }
            Query::BlockStatus { extents_max, .. } => {
                self.piece(self.query, u64::from(extents_max) * EXTENT_BYTES).await?;
            }
        }
        Ok(())
    }

    /// Answers one part of the query, which takes up to `bytes`. `false` if that was the last, for
    /// it has failed.
    async fn piece(&self, query: Query, bytes: u64) -> Result<bool, QueryError> {
        use v1::attach_reply::Message;
        let share = tokio::select! {
            share = self.budget.acquire(bytes) => share,
            () = self.replies.closed() => return Ok(false),
        };
        let question = Question { shard: self.shard.clone(), volume: self.volume, query };
        // A task, so that a panic is no more than a failure of this query.
        let answer = AbortOnDropHandle::new(tokio::spawn(question.answer())).await;
        let answer = answer.unwrap_or(Err(QueryError::Failed(Failed::Io)));
        let id = self.id;
        let (message, more) = match answer {
            Ok(QueryData::Bytes(data)) => (Message::Read(wire::piece_to(id, data)), true),
            Ok(QueryData::Extents(extents)) => {
                let extents = extents.iter().map(wire::extent_to).collect();
                (Message::Status(v1::AttachStatusAnswer { id, extents, failed: 0 }), true)
            }
            Err(QueryError::Lost) => return Err(QueryError::Lost),
            Err(QueryError::Failed(failed)) => (self.failed(failed), false),
        };
        let sent = send(&self.replies, message).await;
        drop(share);
        Ok(more && sent.is_ok())
    }

    fn failed(&self, failed: Failed) -> v1::attach_reply::Message {
        use v1::attach_reply::Message;
        let (id, failed) = (self.id, wire::failed_to(failed).into());
        match self.query {
            Query::Read { .. } => {
                let piece = v1::AttachReadPiece { id, failed, ..Default::default() };
                Message::Read(piece)
            }
            Query::BlockStatus { .. } => {
                let status = v1::AttachStatusAnswer { id, failed, extents: Vec::new() };
                Message::Status(status)
            }
        }
    }
}
