//! One session over one attachment at a time: to the replica in this process while it leads, else
//! over a relay to the node of the one that does.
//!
//! No task of its own: its owner waits in [`SessionClient::wait`] beside whatever else it waits
//! for, and hands what comes of it to [`SessionClient::take`]. So a mutation at the leader costs no
//! hand-off but the one to the group.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use nbd_relay::Failed;
use nbd_service::trace::Context;
use nbd_session::{Attachment, ClientSession, Piece, Query, QueryId, Resend, Verdict};
use nbd_store::{Epoch, Extent, Outcome, Rejection, SessionId, VolumeId, encode_close_session};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info};

use super::remote::{self, Remote};
use super::standing::Standing;
use super::{
    ATTEMPT_MAX, Answered, Backoff, CLOSE_MAX, CLOSE_STOPPING_MAX, ClientAt, QueryData, ReadBuffer,
    ReadData, ShardClient, sleep_until,
};
use crate::limits::{MUTATIONS_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX};
use crate::local::{Attaching, LocalAttachment, LocalReplica, Share};
use crate::route::{GroupStopped, LeaderAt, Route, RunError};

/// Answers of a replica in this process that can be waiting: one for each request under way, that
/// the session was ended, and that requests are to be traced.
const LOCAL_ANSWERS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + REQUESTS_IN_FLIGHT_MAX + 2;

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
    /// Some bytes of a read that was asked for in pieces. More will come.
    Piece {
        /// What it was asked with.
        token: usize,
        /// Where they belong, in bytes from the read's first.
        at: u64,
        /// The bytes.
        data: ReadData,
    },
    /// The bytes of a read: all of them, or the last piece.
    Read {
        /// What it was asked with.
        token: usize,
        /// Bytes that came in pieces before.
        at: u64,
        /// The bytes, or why there are no more.
        result: Result<ReadData, Failed>,
    },
    /// An operator wants the next requests to be traced.
    Sample {
        /// How many.
        requests: u32,
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
    Remote(Box<Remote>),
}

/// Whom to tell, and how.
#[derive(Debug)]
struct Ticket {
    token: usize,
    /// Of the byte budget: held by a mutation for as long as it is pending.
    share: Share,
    /// A read is told piece by piece.
    in_pieces: bool,
    /// The span that the leader's are to be below, if it is traced.
    trace: Option<Context>,
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
    Remote(Box<Remote>),
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Waiting { until } => f.debug_struct("Waiting").field("until", until).finish(),
            Self::Attaching { leader, .. } => f.debug_tuple("Attaching").field(leader).finish(),
            Self::Local { .. } => f.write_str("Local"),
            Self::Remote(remote) => f.debug_tuple("Remote").field(remote.leader()).finish(),
        }
    }
}

/// A session of a volume.
#[derive(Debug)]
pub struct SessionClient {
    shard: ShardClient,
    volume: VolumeId,
    client: ClientAt,
    session: ClientSession<Ticket>,
    route: watch::Receiver<Route>,
    state: State,
    backoff: Backoff,
    /// Of reads that are wanted whole, the part that is here. Kept from one attachment to the next.
    gathered: HashMap<QueryId, ReadBuffer>,
    /// An attachment was made once: what was sent over it may have taken effect.
    was_attached: bool,
    /// Something was answered over the present attachment. One that is lost before that is worth no
    /// more than a failed attempt: a node that stops takes attachments and drops them.
    has_answered: bool,
    /// Nobody waits for answers: nothing is proposed or sent any more.
    leaving: bool,
    standing: Standing,
}

impl SessionClient {
    /// A session that is not open yet. Nothing happens before [`SessionClient::open`].
    #[must_use]
    pub fn new(shard: ShardClient, volume: VolumeId, client: ClientAt) -> Self {
        let route = shard.route.clone();
        Self {
            shard,
            volume,
            client,
            session: ClientSession::new(SessionId(rand::random())),
            route,
            state: State::Waiting { until: None },
            backoff: Backoff::new(),
            gathered: HashMap::new(),
            was_attached: false,
            has_answered: false,
            leaving: false,
            standing: Standing::default(),
        }
    }

    /// A session that another process leaves to this one: see [`ClientSession::resumed`]. It
    /// attaches once it is [waited](Self::wait) for; what is asked of it before is kept.
    pub(crate) fn resumed(
        shard: ShardClient,
        volume: VolumeId,
        client: ClientAt,
        (id, epoch, next_seq): (SessionId, Epoch, u64),
    ) -> Self {
        Self {
            session: ClientSession::resumed(id, epoch, next_seq),
            state: State::Waiting { until: Some(Instant::now()) },
            was_attached: true,
            ..Self::new(shard, volume, client)
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

    /// Whether nothing of it is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.session.is_idle()
    }

    /// Whether it is attached now.
    pub(crate) const fn is_attached(&self) -> bool {
        matches!(self.session.attachment(), Attachment::Attached(_))
    }

    /// Whom it is attached to, for those who watch.
    pub(crate) const fn standing(&self) -> &Standing {
        &self.standing
    }

    /// The shard that it goes to.
    pub(crate) const fn shard(&self) -> &ShardClient {
        &self.shard
    }

    /// Reads past the session, if it is attached to a replica in this process: see
    /// [`LocalAttachment::try_read`].
    pub(crate) fn try_read(
        &self,
        offset: u64,
        len: u64,
        holes: bool,
        data: &mut ReadBuffer,
    ) -> bool {
        match &self.state {
            State::Local { local, .. } => local.try_read(offset, len, holes, data),
            _ => false,
        }
    }

    /// Takes a mutation in, to be answered with `token`. If it is traced, `trace` is the span above
    /// the leader's.
    ///
    /// # Errors
    /// The process is stopping.
    pub async fn submit(
        &mut self,
        seq: u64,
        command: Bytes,
        token: usize,
        share: Share,
        trace: Option<Context>,
    ) -> Result<(), GroupStopped> {
        self.note_asked();
        let ticket = Ticket { token, share: share.clone(), in_pieces: false, trace };
        let Some(command) = self.session.submit(seq, command, ticket) else { return Ok(()) };
        self.send_mutation(seq, command, share, trace).await
    }

    /// Takes a query in, to be answered with `token` at once and whole.
    pub fn query(&mut self, query: Query, token: usize, trace: Option<Context>) {
        self.ask(query, Ticket { token, share: None, in_pieces: false, trace });
    }

    /// Takes a read in, to be answered with `token` in pieces, as they come.
    pub fn read_in_pieces(
        &mut self,
        (offset, len): (u64, u64),
        holes: bool,
        token: usize,
        trace: Option<Context>,
    ) {
        let ticket = Ticket { token, share: None, in_pieces: true, trace };
        self.ask(Query::Read { offset, len, holes }, ticket);
    }

    fn ask(&mut self, query: Query, ticket: Ticket) {
        self.note_asked();
        let trace = ticket.trace;
        let (id, now) = self.session.query(query, ticket);
        if now {
            self.send_query(id, query, trace);
        }
    }

    fn note_asked(&mut self) {
        if self.standing.leader().is_none() {
            self.standing.asked_in_vain(Instant::now());
        }
    }

    /// The client is gone: what is not proposed by now should not be, for it may be sending it
    /// again, and newer writes behind it, over another connection.
    ///
    /// What is on its way to a leader elsewhere cannot be called back. That attachment is given up,
    /// so that the session is closed in the log next: what comes behind that is refused.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
        if matches!(self.state, State::Remote(_)) {
            self.session.detached(self.session.epoch());
            self.state = State::Waiting { until: None };
        }
    }

    /// Something that has happened already, if anything has.
    pub(crate) fn try_next(&mut self) -> Option<Signal> {
        let answered = match &mut self.state {
            State::Local { answers, .. } => answers.try_recv().ok(),
            State::Remote(remote) => remote.try_next(),
            State::Waiting { .. } | State::Attaching { .. } => None,
        };
        answered.map(|answered| Signal(Happened::Answered(answered)))
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
            State::Local { answers, .. } => tokio::select! {
                answered = answers.recv() => Happened::Answered(answered.unwrap_or(Answered::Lost)),
                changed = route.changed() => Happened::Route(changed.is_ok()),
            },
            State::Remote(remote) => tokio::select! {
                answered = remote.wait(!self.session.is_idle()) => Happened::Answered(answered),
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
        // Whatever attachment there was is given up, also if there is nobody to attach to.
        self.session.detached(self.session.epoch());
        self.standing.detached(Instant::now(), !self.session.is_idle());
        let leader = self.route.borrow_and_update().usable().cloned();
        let Some(leader) = leader.filter(|_| !self.leaving) else {
            self.state = State::Waiting { until: None };
            return;
        };
        let epoch = self.session.begin_attach();
        debug!(%epoch, node = %leader.node, "attaching");
        let shard = self.shard.clone();
        let (session, volume, to) = (self.session.id(), self.volume, leader.clone());
        let caller = self.shard.caller(&self.client);
        let attaching = Attaching { session, epoch, volume, caller };
        let attempt = async move {
            let attach = async move {
                if let Some(replica) = shard.replica_at(&to) {
                    return open_here(&shard, replica, attaching).await;
                }
                let attached = remote::attach(shard, to, attaching).await;
                attached.map(|remote| Opened::Remote(Box::new(remote)))
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
        let Some(resend) = self.session.attached(epoch) else { return Ok(()) };
        let Resend { mutations, queries, continued } = resend;
        let before = std::mem::replace(&mut self.state, State::Waiting { until: None });
        let State::Attaching { leader, .. } = before else {
            unreachable!("only an attempt under way can succeed")
        };
        if self.was_attached {
            let pending = mutations.len() + queries.len();
            info!(%epoch, node = %leader.node, pending, continued, "resumed");
        }
        if self.standing.attached(&leader) {
            self.shard.metrics.failovers.increment(1);
        }
        self.was_attached = true;
        self.has_answered = false;
        self.state = match opened {
            Opened::Local(local, answers) => State::Local { local, answers },
            Opened::Remote(remote) => State::Remote(remote),
        };
        for (seq, command) in mutations {
            let ticket = self.session.token(seq);
            let trace = ticket.and_then(|ticket| ticket.trace);
            let share = ticket.and_then(|ticket| ticket.share.clone());
            self.send_mutation(seq, command, share, trace).await?;
        }
        for (id, query) in queries {
            let trace = self.session.query_token(id).and_then(|ticket| ticket.trace);
            self.send_query(id, query, trace);
        }
        Ok(())
    }

    async fn send_mutation(
        &mut self,
        seq: u64,
        command: Bytes,
        share: Share,
        trace: Option<Context>,
    ) -> Result<(), GroupStopped> {
        match &mut self.state {
            State::Local { local, .. } => local.mutate(command, share, trace).await?,
            State::Remote(remote) => remote.mutate(seq, command, trace),
            State::Waiting { .. } | State::Attaching { .. } => {}
        }
        Ok(())
    }

    fn send_query(&mut self, id: QueryId, query: Query, trace: Option<Context>) {
        match &mut self.state {
            State::Local { local, .. } => local.query(id, query, trace),
            State::Remote(remote) => remote.query(id, query, trace),
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
            State::Attaching { leader, .. } => !now.leads_away_from(leader),
            State::Remote(remote) => !now.leads_away_from(remote.leader()),
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
        self.standing.detached(Instant::now(), !self.session.is_idle());
        if self.has_answered {
            self.backoff = Backoff::new();
            self.attempt();
        } else {
            self.state = State::Waiting { until: Some(self.backoff.next()) };
        }
    }

    async fn answered(&mut self, answered: Answered) -> Result<Option<Event>, SessionEnd> {
        let Attachment::Attached(epoch) = self.session.attachment() else { return Ok(None) };
        if answered.is_from_leader() {
            self.has_answered = true;
            self.note_answered();
        }
        match answered {
            Answered::Mutation { seq, outcome, given, .. } => {
                if let (State::Local { local, .. }, Some(given)) = (&self.state, given) {
                    local.got(given);
                }
                return self.mutation_answered(epoch, seq, outcome);
            }
            Answered::Lost => self.lost(),
            Answered::Sample(wanted) => {
                return Ok(Some(Event::Sample { requests: wanted.swap(0, Ordering::Relaxed) }));
            }
            Answered::Ended => {
                self.session.ended(epoch);
                return Err(SessionEnd::Ended(Rejection::UnknownSession));
            }
            Answered::Granted(granted) => {
                if self.leaving {
                    return Ok(self.refused(epoch, granted.seq, Failed::Io));
                }
                if let State::Local { local, .. } = &self.state {
                    local.propose(granted).await?;
                }
            }
            Answered::Refused { seq, failed } => return Ok(self.refused(epoch, seq, failed)),
            Answered::Query { id, result: Ok(QueryData::Bytes(rest)) } => {
                return Ok(self.piece(epoch, id, rest));
            }
            Answered::Query { id, result } => return Ok(self.query_answered(epoch, id, result)),
            Answered::Piece { id, piece } => return Ok(self.piece(epoch, id, piece)),
        }
        Ok(None)
    }

    fn note_answered(&mut self) {
        if self.standing.is_stalled()
            && let Some(stall) = self.standing.answered(Instant::now())
        {
            self.shard.metrics.stall.record(stall);
        }
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

    /// A query is done with, otherwise than by the last piece of a read.
    fn query_answered(
        &mut self,
        epoch: Epoch,
        id: QueryId,
        result: Result<QueryData, Failed>,
    ) -> Option<Event> {
        self.gathered.remove(&id);
        let query = self.session.pending_query(id)?;
        let (Ticket { token, in_pieces, .. }, done) = self.session.query_answered(epoch, id)?;
        let failed = |result: Result<_, _>| result.err().unwrap_or(Failed::Io);
        Some(match (query, result) {
            (Query::Read { .. }, result) => {
                let at = if in_pieces { done } else { 0 };
                Event::Read { token, at, result: Err(failed(result)) }
            }
            (Query::BlockStatus { .. }, Ok(QueryData::Extents(extents))) => {
                Event::Status { token, result: Ok(extents) }
            }
            (Query::BlockStatus { .. }, result) => {
                Event::Status { token, result: Err(failed(result)) }
            }
        })
    }

    /// Some bytes of a read are here, or all that were asked for.
    fn piece(&mut self, epoch: Epoch, id: QueryId, piece: ReadData) -> Option<Event> {
        let (len, holes) = match self.session.pending_query(id) {
            Some(Query::Read { len, holes, .. }) => (len, holes),
            _ => (0, false),
        };
        match self.session.read_piece(epoch, id, piece.bytes.len() as u64) {
            Piece::Ignored => None,
            Piece::Detached => {
                self.lost();
                None
            }
            Piece::Part { at, token: &Ticket { token, in_pieces: true, .. } } => {
                Some(Event::Piece { token, at, data: piece })
            }
            Piece::Part { .. } => {
                let data = self.gathered.entry(id).or_default();
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                data.bytes.reserve_exact(len - data.bytes.len());
                append(data, &piece, holes);
                None
            }
            Piece::Last { at, token: Ticket { token, .. } } => {
                let (at, data) = match self.gathered.remove(&id) {
                    Some(mut data) => {
                        append(&mut data, &piece, holes);
                        (0, ReadData { bytes: data.bytes.into(), runs: data.runs })
                    }
                    None => (at, piece),
                };
                Some(Event::Read { token, at, result: Ok(data) })
            }
        }
    }
}

/// Adds the next part of a read. Without `holes` it stays one run of bytes.
fn append(data: &mut ReadBuffer, piece: &ReadData, holes: bool) {
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
    attaching: Attaching,
) -> Result<Opened, AttachError> {
    let Attaching { session, epoch, volume, .. } = attaching;
    let command = nbd_store::encode_open_session(session, epoch, volume, shard.access.owner);
    match replica.run(command).await {
        Ok(Outcome::SessionOpened) => {
            let (sender, answers) = mpsc::channel(LOCAL_ANSWERS_MAX);
            Ok(Opened::Local(replica.attach(attaching, sender), answers))
        }
        Ok(Outcome::Rejected(rejection)) => Err(AttachError::Rejected(rejection)),
        Ok(other) => panic!("{other:?} is not an outcome of opening a session"),
        Err(RunError::NotLeader | RunError::Lost) => Err(AttachError::Elsewhere),
        Err(RunError::Stopped(_)) => Err(AttachError::Stopped),
    }
}
