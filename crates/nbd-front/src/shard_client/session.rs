//! One session over one attachment at a time: to the replica in this process while it leads, else
//! over gRPC to the node of the one that does.
//!
//! No task of its own: its owner waits in [`SessionClient::wait`] beside whatever else it waits
//! for, and hands what comes of it to [`SessionClient::take`]. So a mutation at the leader costs no
//! hand-off but the one to the group.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use nbd_session::{Attachment, ClientSession, Query, QueryId, Resend, Verdict};
use nbd_store::{Epoch, Extent, Outcome, Rejection, SessionId, VolumeId, encode_close_session};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info};

use super::remote::{self, Remote};
use super::{
    ATTEMPT_MAX, Answered, Backoff, CLOSE_MAX, CLOSE_STOPPING_MAX, Failed, QueryData, ReadData,
    ShardClient, sleep_until,
};
use crate::limits::{MUTATIONS_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX};
use crate::local::{LocalAttachment, LocalReplica, Share};
use crate::route::{GroupStopped, LeaderAt, Route, RunError};

/// Answers of a replica in this process that can be waiting: one for each request under way.
const LOCAL_ANSWERS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + REQUESTS_IN_FLIGHT_MAX;

/// Something that a session's owner asked for has come to an end. `token` is what it was asked
/// with.
#[derive(Debug)]
pub enum Event {
    /// The log has its verdict on a mutation.
    Mutation {
        /// What it was asked with.
        token: usize,
        /// The verdict.
        outcome: Outcome,
    },
    /// A mutation was not carried out, as far as the present leader is concerned.
    Refused {
        /// What it was asked with.
        token: usize,
        /// Why.
        failed: Failed,
    },
    /// The bytes of a read.
    Read {
        /// What it was asked with.
        token: usize,
        /// The bytes, or why there are none.
        result: Result<ReadData, Failed>,
    },
    /// A block status.
    Status {
        /// What it was asked with.
        token: usize,
        /// The extents, or why there are none.
        result: Result<Vec<Extent>, Failed>,
    },
}

/// Why a session cannot go on. What it had under way may or may not have happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SessionEnd {
    /// The log does not have it any more, or not for its volume.
    #[error("the session was ended in the log: {0}")]
    Ended(Rejection),
    /// This process is stopping or has failed.
    #[error(transparent)]
    Stopped(#[from] GroupStopped),
}

/// Why an attempt to attach came to nothing.
#[derive(Debug)]
pub(super) enum AttachError {
    /// The log says no.
    Rejected(Rejection),
    /// Whoever was asked does not lead, or did not answer.
    Elsewhere,
    Stopped,
}

/// Something has happened; see [`SessionClient::take`].
#[derive(Debug)]
pub struct Signal(Happened);

#[derive(Debug)]
enum Happened {
    Answered(Answered),
    /// An attempt to attach has come to its end.
    Attempt(Box<Result<Opened, AttachError>>),
    /// There is news of the leader, or there never will be.
    Route(bool),
    /// It is time for another attempt.
    Woken,
}

/// An attachment that was made.
#[derive(Debug)]
enum Opened {
    Local(Box<dyn LocalAttachment>, mpsc::Receiver<Answered>),
    Remote(Remote, mpsc::Receiver<Answered>),
}

/// Whom to tell, and the share of the byte budget that a mutation holds as long as it is pending.
#[derive(Debug)]
struct Ticket {
    token: usize,
    share: Share,
}

type Attempt = Pin<Box<dyn Future<Output = Result<Opened, AttachError>> + Send>>;

enum State {
    /// For news of the leader, or for `until`.
    Waiting {
        until: Option<Instant>,
    },
    Attaching {
        leader: LeaderAt,
        attempt: Attempt,
    },
    Local {
        local: Box<dyn LocalAttachment>,
        answers: mpsc::Receiver<Answered>,
    },
    Remote {
        leader: LeaderAt,
        remote: Remote,
        answers: mpsc::Receiver<Answered>,
    },
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Waiting { until } => f.debug_struct("Waiting").field("until", until).finish(),
            Self::Attaching { leader, .. } => f.debug_tuple("Attaching").field(leader).finish(),
            Self::Local { .. } => f.write_str("Local"),
            Self::Remote { leader, .. } => f.debug_tuple("Remote").field(leader).finish(),
        }
    }
}

/// A session of a volume.
#[derive(Debug)]
pub struct SessionClient {
    shard: ShardClient,
    volume: VolumeId,
    session: ClientSession<Ticket>,
    route: watch::Receiver<Route>,
    state: State,
    backoff: Backoff,
    /// Reads of which a part is here. Of the current attachment only.
    pieces: HashMap<QueryId, ReadData>,
    /// An attachment was made once: what was sent over it may have taken effect.
    was_attached: bool,
    /// Something was answered over the present attachment. One that is lost before that is worth no
    /// more than a failed attempt: a node that stops takes attachments and drops them.
    has_answered: bool,
    /// Nobody waits for answers: nothing is proposed or sent any more.
    leaving: bool,
}

impl SessionClient {
    /// A session that is not open yet. Nothing happens before [`SessionClient::open`].
    #[must_use]
    pub fn new(shard: ShardClient, volume: VolumeId) -> Self {
        let route = shard.route.clone();
        Self {
            shard,
            volume,
            session: ClientSession::new(SessionId(rand::random())),
            route,
            state: State::Waiting { until: None },
            backoff: Backoff::new(),
            pieces: HashMap::new(),
            was_attached: false,
            has_answered: false,
            leaving: false,
        }
    }

    /// Opens the session; waits for a leader as long as it takes. May be dropped halfway: the
    /// session then has to be [closed](Self::close).
    ///
    /// # Errors
    /// It never will be open.
    pub async fn open(&mut self) -> Result<(), SessionEnd> {
        self.attempt();
        while !self.was_attached {
            let signal = self.wait().await;
            self.take(signal).await?;
        }
        Ok(())
    }

    /// Its identity.
    #[must_use]
    pub const fn id(&self) -> SessionId {
        self.session.id()
    }

    /// The epoch that commands made now should have; a later one is put in as needed.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.session.epoch()
    }

    /// The volume it is for.
    #[must_use]
    pub const fn volume(&self) -> VolumeId {
        self.volume
    }

    /// See [`ClientSession::next_seq`].
    pub(crate) const fn next_seq(&self) -> u64 {
        self.session.next_seq()
    }

    /// See [`ClientSession::reserve`].
    pub const fn reserve(&mut self, count: u64) -> u64 {
        self.session.reserve(count)
    }

    /// Whether it is attached now.
    pub(crate) const fn is_attached(&self) -> bool {
        matches!(self.session.attachment(), Attachment::Attached(_))
    }

    /// Reads past the session, if it is attached to a replica in this process: see
    /// [`LocalAttachment::try_read`].
    pub(crate) fn try_read(&self, offset: u64, len: u64, holes: bool, data: &mut ReadData) -> bool {
        match &self.state {
            State::Local { local, .. } => local.try_read(offset, len, holes, data),
            _ => false,
        }
    }

    /// Takes a mutation in, to be answered with `token`.
    ///
    /// # Errors
    /// The process is stopping.
    pub async fn submit(
        &mut self,
        seq: u64,
        command: Bytes,
        token: usize,
        share: Share,
    ) -> Result<(), GroupStopped> {
        let ticket = Ticket { token, share: share.clone() };
        let Some(command) = self.session.submit(seq, command, ticket) else { return Ok(()) };
        self.send_mutation(command, share).await
    }

    /// Takes a query in, to be answered with `token`.
    pub fn query(&mut self, query: Query, token: usize) {
        let (id, now) = self.session.query(query, Ticket { token, share: None });
        if now {
            self.send_query(id, query);
        }
    }

    /// The client is gone: what is not proposed by now never will be, for it may be sending it
    /// again, and newer writes behind it, over another connection.
    pub(crate) const fn leave(&mut self) {
        self.leaving = true;
    }

    /// Something that has happened already, if anything has.
    pub(crate) fn try_next(&mut self) -> Option<Signal> {
        match &mut self.state {
            State::Local { answers, .. } | State::Remote { answers, .. } => {
                answers.try_recv().ok().map(|answered| Signal(Happened::Answered(answered)))
            }
            State::Waiting { .. } | State::Attaching { .. } => None,
        }
    }

    /// Waits until something happens. May be dropped at any time.
    pub async fn wait(&mut self) -> Signal {
        let route = &mut self.route;
        Signal(match &mut self.state {
            State::Waiting { until } => tokio::select! {
                changed = route.changed() => Happened::Route(changed.is_ok()),
                () = sleep_until(*until) => Happened::Woken,
            },
            State::Attaching { attempt, .. } => tokio::select! {
                opened = attempt => Happened::Attempt(Box::new(opened)),
                changed = route.changed() => Happened::Route(changed.is_ok()),
            },
            State::Local { answers, .. } | State::Remote { answers, .. } => tokio::select! {
                answered = answers.recv() => Happened::Answered(answered.unwrap_or(Answered::Lost)),
                changed = route.changed() => Happened::Route(changed.is_ok()),
            },
        })
    }

    /// Takes in what has happened. Not to be dropped halfway.
    ///
    /// # Errors
    /// The session cannot go on.
    pub async fn take(&mut self, signal: Signal) -> Result<Option<Event>, SessionEnd> {
        match signal.0 {
            Happened::Answered(answered) => return self.answered(answered).await,
            Happened::Attempt(result) => self.attempted(*result).await?,
            Happened::Route(true) => self.rerouted(),
            Happened::Route(false) => return Err(GroupStopped.into()),
            Happened::Woken => self.attempt(),
        }
        Ok(None)
    }

    /// Ends the session in the log, if it can be there; does not wait for that.
    pub async fn close(self) {
        let epoch = self.session.epoch();
        if epoch == Epoch(0) || self.session.attachment() == Attachment::Gone {
            return;
        }
        let command = encode_close_session(self.session.id(), epoch);
        let Self { shard, state, .. } = self;
        if let State::Local { local, .. } = state {
            if local.close(command).await.is_err() {
                debug!("the group stopped before the session was closed");
            }
            return;
        }
        drop(state);
        let shutdown = shard.access.shutdown.clone();
        let stopping = shutdown.started();
        shutdown.spawn(async move {
            let gave_up = async {
                stopping.await;
                tokio::time::sleep(CLOSE_STOPPING_MAX).await;
            };
            tokio::select! {
                closed = tokio::time::timeout(CLOSE_MAX, shard.run(&command)) => match closed {
                    Ok(outcome) => debug!(?outcome, "closed the session"),
                    Err(_) => info!("no leader has closed the session: it stays open"),
                },
                () = gave_up => {}
            }
        });
    }

    /// Begins an attempt to attach to the leader there is, or waits for one.
    fn attempt(&mut self) {
        self.pieces.clear();
        let leader = self.route.borrow_and_update().usable().cloned();
        let Some(leader) = leader.filter(|_| !self.leaving) else {
            self.state = State::Waiting { until: None };
            return;
        };
        let epoch = self.session.begin_attach();
        debug!(%epoch, node = %leader.node, "attaching");
        let shard = self.shard.clone();
        let (id, volume, to) = (self.session.id(), self.volume, leader.clone());
        let attempt = async move {
            let attach = async move {
                if let Some(replica) = shard.replica_at(&to) {
                    return open_here(&shard, replica, id, epoch, volume).await;
                }
                let attached = remote::attach(shard, to, id, epoch, volume).await;
                attached.map(|(remote, answers)| Opened::Remote(remote, answers))
            };
            let attached = tokio::time::timeout(ATTEMPT_MAX, attach).await;
            attached.unwrap_or(Err(AttachError::Elsewhere))
        };
        self.state = State::Attaching { leader, attempt: Box::pin(attempt) };
    }

    async fn attempted(&mut self, result: Result<Opened, AttachError>) -> Result<(), SessionEnd> {
        let epoch = self.session.epoch();
        let rejection = match result {
            Ok(opened) => return Ok(self.opened(epoch, opened).await?),
            Err(AttachError::Stopped) => return Err(GroupStopped.into()),
            Err(AttachError::Elsewhere) => None,
            Err(AttachError::Rejected(rejection)) => Some(rejection),
        };
        self.session.attach_failed(epoch, rejection);
        match rejection {
            // Our own later attempt, that we know nothing of, or one that was given up.
            None | Some(Rejection::StaleEpoch) => {
                self.state = State::Waiting { until: Some(self.backoff.next()) };
                Ok(())
            }
            // The first attempt was lost on its way, and was the only one that could create it.
            // Nothing was ever sent under this id.
            Some(Rejection::UnknownSession) if !self.was_attached => {
                self.session = ClientSession::new(SessionId(rand::random()));
                self.attempt();
                Ok(())
            }
            Some(rejection) => Err(SessionEnd::Ended(rejection)),
        }
    }

    /// An attachment was made: sends all that is pending over it.
    async fn opened(&mut self, epoch: Epoch, opened: Opened) -> Result<(), GroupStopped> {
        let Some(Resend { mutations, queries }) = self.session.attached(epoch) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut self.state, State::Waiting { until: None });
        let State::Attaching { leader, .. } = before else {
            unreachable!("only an attempt under way can succeed")
        };
        if self.was_attached {
            let pending = mutations.len() + queries.len();
            info!(%epoch, node = %leader.node, pending, "resumed");
        }
        self.was_attached = true;
        self.has_answered = false;
        self.state = match opened {
            Opened::Local(local, answers) => State::Local { local, answers },
            Opened::Remote(remote, answers) => State::Remote { leader, remote, answers },
        };
        for (seq, command) in mutations {
            let share = self.session.token(seq).and_then(|ticket| ticket.share.clone());
            self.send_mutation(command, share).await?;
        }
        for (id, query) in queries {
            self.send_query(id, query);
        }
        Ok(())
    }

    async fn send_mutation(&mut self, command: Bytes, share: Share) -> Result<(), GroupStopped> {
        match &self.state {
            State::Local { local, .. } => local.mutate(command, share).await?,
            State::Remote { remote, .. } => remote.mutate(command),
            State::Waiting { .. } | State::Attaching { .. } => {}
        }
        Ok(())
    }

    fn send_query(&self, id: QueryId, query: Query) {
        match &self.state {
            State::Local { local, .. } => local.query(id, query),
            State::Remote { remote, .. } => remote.query(id, query),
            State::Waiting { .. } | State::Attaching { .. } => {}
        }
    }

    /// There is news of the leader: goes after it.
    fn rerouted(&mut self) {
        let now = self.route.borrow_and_update().clone();
        let asked = match &self.state {
            State::Waiting { .. } => {
                self.backoff = Backoff::new();
                return self.attempt();
            }
            State::Attaching { leader, .. } | State::Remote { leader, .. } => {
                !now.leads_away_from(leader)
            }
            State::Local { .. } => now.leader.as_ref().is_none_or(|leader| leader.local),
        };
        if !asked {
            self.backoff = Backoff::new();
            self.attempt();
        }
    }

    /// The attachment is dead.
    fn lost(&mut self) {
        self.session.detached(self.session.epoch());
        if self.has_answered {
            self.backoff = Backoff::new();
            self.attempt();
        } else {
            self.pieces.clear();
            self.state = State::Waiting { until: Some(self.backoff.next()) };
        }
    }

    async fn answered(&mut self, answered: Answered) -> Result<Option<Event>, SessionEnd> {
        let Attachment::Attached(epoch) = self.session.attachment() else { return Ok(None) };
        self.has_answered |= answered.is_from_leader();
        match answered {
            Answered::Mutation { seq, outcome } => {
                return self.mutation_answered(epoch, seq, outcome);
            }
            Answered::Lost => self.lost(),
            Answered::Granted(granted) => {
                if self.leaving {
                    return Ok(self.refused(epoch, granted.seq, Failed::Io));
                }
                if let State::Local { local, .. } = &self.state {
                    local.propose(granted).await?;
                }
            }
            Answered::Refused { seq, failed } => return Ok(self.refused(epoch, seq, failed)),
            Answered::Query { id, result } => {
                self.pieces.remove(&id);
                return Ok(self.query_answered(epoch, id, result));
            }
            Answered::Piece { id, piece } => return Ok(self.piece(epoch, id, piece)),
        }
        Ok(None)
    }

    fn mutation_answered(
        &mut self,
        epoch: Epoch,
        seq: u64,
        outcome: Outcome,
    ) -> Result<Option<Event>, SessionEnd> {
        match self.session.mutation_answered(epoch, seq, outcome) {
            Verdict::Ignored => Ok(None),
            Verdict::Answered(Ticket { token, .. }, outcome) => {
                Ok(Some(Event::Mutation { token, outcome }))
            }
            Verdict::Detached => {
                self.attempt();
                Ok(None)
            }
            Verdict::Gone => Err(SessionEnd::Ended(Rejection::UnknownSession)),
        }
    }

    fn refused(&mut self, epoch: Epoch, seq: u64, failed: Failed) -> Option<Event> {
        let Ticket { token, .. } = self.session.mutation_refused(epoch, seq)?;
        Some(Event::Refused { token, failed })
    }

    fn query_answered(
        &mut self,
        epoch: Epoch,
        id: QueryId,
        result: Result<QueryData, Failed>,
    ) -> Option<Event> {
        let query = self.session.pending_query(id)?;
        let Ticket { token, .. } = self.session.query_answered(epoch, id)?;
        Some(match (query, result) {
            (Query::Read { .. }, Ok(QueryData::Bytes(data))) => {
                Event::Read { token, result: Ok(data) }
            }
            (Query::Read { .. }, result) => {
                Event::Read { token, result: Err(result.err().unwrap_or(Failed::Io)) }
            }
            (Query::BlockStatus { .. }, Ok(QueryData::Extents(extents))) => {
                Event::Status { token, result: Ok(extents) }
            }
            (Query::BlockStatus { .. }, result) => {
                Event::Status { token, result: Err(result.err().unwrap_or(Failed::Io)) }
            }
        })
    }

    /// A part of a read is here. The read is answered with its last.
    fn piece(&mut self, epoch: Epoch, id: QueryId, piece: ReadData) -> Option<Event> {
        let Some(Query::Read { len, holes, .. }) = self.session.pending_query(id) else {
            return None;
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let whole = match self.pieces.remove(&id) {
            None if piece.bytes.len() == len => piece,
            before => {
                let mut data = before.unwrap_or_default();
                if data.bytes.len().saturating_add(piece.bytes.len()) > len {
                    self.lost();
                    return None;
                }
                data.bytes.reserve_exact(len - data.bytes.len());
                append(&mut data, &piece, holes);
                if data.bytes.len() < len {
                    self.pieces.insert(id, data);
                    return None;
                }
                data
            }
        };
        self.query_answered(epoch, id, Ok(QueryData::Bytes(whole)))
    }
}

/// Adds the next part of a read. Without `holes` it stays one run of bytes.
fn append(data: &mut ReadData, piece: &ReadData, holes: bool) {
    let start = data.bytes.len();
    data.bytes.extend_from_slice(&piece.bytes);
    for (run, zero) in &piece.runs {
        match data.runs.last_mut() {
            Some((last, was_zero)) if *was_zero == *zero || !holes => {
                last.end = start + run.end;
                *was_zero &= zero;
            }
            _ => data.runs.push((start + run.start..start + run.end, *zero)),
        }
    }
}

/// Opens or resumes the session through the replica in this process.
async fn open_here(
    shard: &ShardClient,
    replica: &dyn LocalReplica,
    id: SessionId,
    epoch: Epoch,
    volume: VolumeId,
) -> Result<Opened, AttachError> {
    let command = nbd_store::encode_open_session(id, epoch, volume, shard.access.owner);
    match replica.run(command).await {
        Ok(Outcome::SessionOpened) => {
            let (sender, answers) = mpsc::channel(LOCAL_ANSWERS_MAX);
            Ok(Opened::Local(replica.attach(id, volume, sender), answers))
        }
        Ok(Outcome::Rejected(rejection)) => Err(AttachError::Rejected(rejection)),
        Ok(other) => panic!("{other:?} is not an outcome of opening a session"),
        Err(RunError::NotLeader | RunError::Lost) => Err(AttachError::Elsewhere),
        Err(RunError::Stopped(_)) => Err(AttachError::Stopped),
    }
}
