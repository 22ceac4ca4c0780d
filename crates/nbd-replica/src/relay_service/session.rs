//! One session of another process, attached to this node's group.
//!
//! One task does it all, as with a client of this node's own: a mutation costs no hand-off but the
//! one to the group, and a block that is in the page cache is read and sent at once. A caller that
//! does not take its answers is not read from any more.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use nbd_front::limits::{
    INLINE_READ_BYTES_MAX, MUTATIONS_IN_FLIGHT_MAX, OUTPUT_BYTES_MAX, SHORT_STALL_MAX, is_slow,
};
use nbd_front::{
    Answered, Attaching, BytePermit, GroupStopped, LocalAttachment as _, ReadBuffer, Received,
    RelayStream, RunError,
};
use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_relay::{ALIVE_INTERVAL, FromCaller, FromLeader, Hello, Verdict, put_bytes};
use nbd_rpc::Refusal;
use nbd_rpc::identity::check_cluster;
use nbd_service::trace::{Context, Kind, Span};
use nbd_session::{Query, QueryId};
use nbd_store::{CommandHeader, Epoch, Outcome, SessionId, encode_open_session};
use nbd_topology::ShardId;
use tokio::io::Ready;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::query::{Part, QueryTask};
use super::{End, HELLO_MAX, Shared, send};
use crate::hosted::{HostedSession, HostedShard, lead_query};

/// Queries of one session that may be unanswered; more than any client may have under way.
const QUERIES_MAX: usize = 256;

/// Queries of one session that are worked on at a time, each a piece of at most 1 MiB.
const QUERIES_AT_ONCE: usize = 8;

/// Answers that can be waiting: to all that may be under way, that the session was ended, and that
/// requests are to be traced.
const ANSWERS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + QUERIES_MAX + 2;

/// Parts of answers to queries that can be waiting, 1 MiB each at most.
const PARTS_MAX: usize = 8;

/// Requests that are begun before answers and output get their turn again.
const TURN_REQUESTS_MAX: usize = 64;

/// Commands up to this length get a buffer of their own: what the relay is received into is much
/// larger, and a command is kept for as long as its entry is.
const OWN_BUFFER_BYTES_MAX: usize = 32 << 10;

fn lost() -> End {
    End::told("this replica does not lead the shard any more")
}

fn stopping() -> End {
    End::told("this node is stopping")
}

impl From<GroupStopped> for End {
    fn from(_: GroupStopped) -> Self {
        stopping()
    }
}

/// Serves one relay behind its preamble.
pub(super) async fn serve(shared: &Shared, relay: &mut RelayStream) -> Result<(), End> {
    let begin = async {
        let hello = tokio::time::timeout(HELLO_MAX, hello(relay)).await;
        let hello = hello.map_err(|_| End::told("no hello in time"))??;
        let shard = shard(shared, &hello).map_err(End::told)?;
        let verdict = open(shard, &hello).await?;
        Ok::<_, End>((hello, shard, verdict))
    };
    let (hello, shard, verdict) = tokio::select! {
        begun = begin => begun?,
        () = shared.shutdown.started() => return Err(stopping()),
    };
    send(relay, FromLeader::Verdict(verdict));
    relay.try_send()?;
    if verdict != Verdict::Attached {
        return Err(End::told("not attached"));
    }
    Attached::new(shared, shard, &hello, relay).run().await
}

async fn hello(relay: &mut RelayStream) -> Result<Hello, End> {
    loop {
        match next(relay)? {
            Some(FromCaller::Hello(hello)) => return Ok(hello),
            Some(_) => return Err(End::told("the first message is a hello")),
            None => {
                let ready = relay.ready(true).await?;
                receive(relay, ready)?;
            }
        }
    }
}

/// The next message of those that have arrived.
fn next(relay: &mut RelayStream) -> Result<Option<FromCaller>, End> {
    let frame = relay.next_frame().map_err(End::told)?;
    frame.map(FromCaller::decode).transpose().map_err(End::told)
}

fn receive(relay: &mut RelayStream, ready: Ready) -> Result<(), End> {
    let readable = ready.is_readable() || ready.is_read_closed();
    if readable && relay.receive()? == Received::End {
        return Err(End::Gone);
    }
    Ok(())
}

/// The shard that is meant.
fn shard<'a>(shared: &'a Shared, hello: &Hello) -> Result<&'a HostedShard, Refusal> {
    // First: of two clusters that differ in their shards, the cluster is what is wrong.
    check_cluster(&hello.cluster, &shared.cluster)?;
    let shard = ShardId(hello.shard);
    shared.shards.get(&shard).ok_or(Refusal::Shard(shard))
}

/// Opens or resumes the session in the log.
async fn open(shard: &HostedShard, hello: &Hello) -> Result<Verdict, End> {
    if !shard.group.route().borrow().serving {
        return Ok(Verdict::NotLeader);
    }
    let Hello { session, epoch, volume, owner, .. } = *hello;
    match shard.group.run(encode_open_session(session, epoch, volume, owner)).await {
        Ok(Outcome::SessionOpened) => Ok(Verdict::Attached),
        Ok(Outcome::Rejected(rejection)) => Ok(Verdict::Rejected(rejection)),
        Ok(other) => unreachable!("{other:?} is not an outcome of opening a session"),
        Err(RunError::NotLeader) => Ok(Verdict::NotLeader),
        Err(RunError::Lost) => Ok(Verdict::Lost),
        Err(RunError::Stopped(stopped)) => Err(stopped.into()),
    }
}

/// What the next message waits for.
enum Stage {
    /// Nothing.
    Ready,
    /// A mutation before it that has no share of the byte budget yet.
    Budget {
        header: CommandHeader,
        command: Bytes,
        trace: Option<Span>,
        share: Pin<Box<dyn Future<Output = BytePermit> + Send>>,
    },
}

/// A session that was opened or resumed here.
struct Attached<'a> {
    shared: &'a Shared,
    relay: &'a mut RelayStream,
    session: SessionId,
    epoch: Epoch,
    local: HostedSession,
    answers: mpsc::Receiver<Answered>,
    parts: mpsc::Receiver<Part>,
    parts_sender: mpsc::Sender<Part>,
    stage: Stage,
    /// Mutations that are not answered.
    unanswered: usize,
    /// Places for queries that are not answered.
    places: Arc<Semaphore>,
    /// Turns of queries that are worked on.
    turns: Arc<Semaphore>,
    /// Where small reads are put together.
    scratch: ReadBuffer,
    /// Of the next request, by its number, if it is traced.
    traced: Option<(u64, Span)>,
    /// Ticks every [`ALIVE_INTERVAL`].
    clock: Interval,
    /// While answers wait for the caller: since when its pace is measured, and what it had taken
    /// by then.
    pace: Option<(Instant, u64)>,
}

impl<'a> Attached<'a> {
    fn new(
        shared: &'a Shared,
        shard: &HostedShard,
        hello: &Hello,
        relay: &'a mut RelayStream,
    ) -> Self {
        let Hello { session, epoch, volume, .. } = *hello;
        let caller = hello.caller.clone();
        let attaching = Attaching { session, epoch, volume, caller };
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        let (parts_sender, parts) = mpsc::channel(PARTS_MAX);
        let mut clock = tokio::time::interval(ALIVE_INTERVAL);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            shared,
            relay,
            session,
            epoch,
            local: HostedSession::new(shard.clone(), attaching, sender),
            answers,
            parts,
            parts_sender,
            stage: Stage::Ready,
            unanswered: 0,
            places: Arc::new(Semaphore::new(QUERIES_MAX)),
            turns: Arc::new(Semaphore::new(QUERIES_AT_ONCE)),
            scratch: ReadBuffer::default(),
            traced: None,
            clock,
            pace: None,
        }
    }

    async fn run(mut self) -> Result<(), End> {
        let shutdown = self.shared.shutdown.token();
        let mut route = self.local.shard.group.route();
        let mut deposed = pin!(async move { drop(route.wait_for(|now| !now.serving).await) });
        loop {
            while let Ok(answered) = self.answers.try_recv() {
                self.answer(answered).await?;
            }
            let more = self.take_input().await?;
            self.relay.try_send()?;
            if more {
                // Others on this worker get their turn between two bursts of one caller.
                tokio::task::yield_now().await;
            }
            let has_room = self.has_room();
            let reads = has_room && matches!(self.stage, Stage::Ready);
            let owes = self.unanswered > 0 || self.places.available_permits() < QUERIES_MAX;
            tokio::select! {
                Some(answered) = self.answers.recv() => self.answer(answered).await?,
                Some(part) = self.parts.recv(), if has_room => self.part(part),
                ready = self.relay.ready(reads) => {
                    let ready = ready?;
                    if reads {
                        receive(self.relay, ready)?;
                    }
                }
                share = budget_turn(&mut self.stage) => self.propose(share).await?,
                _ = self.clock.tick(), if owes || self.relay.unsent() > 0 => {
                    self.check_pace()?;
                    self.show_life();
                }
                () = std::future::ready(()), if more => {}
                () = &mut deposed => return Err(lost()),
                () = shutdown.cancelled() => return Err(stopping()),
            }
        }
    }

    fn has_room(&self) -> bool {
        self.relay.unsent() < OUTPUT_BYTES_MAX
    }

    /// Ends the relay if its caller is slow to take its answers while others wait for the memory
    /// that they take: the rule for clients (`SHORT_STALL_MAX`), and callers are quicker.
    fn check_pace(&mut self) -> Result<(), End> {
        let sent = self.relay.output().sent();
        match self.pace {
            _ if self.relay.unsent() == 0 => self.pace = None,
            None => self.pace = Some((Instant::now(), sent)),
            Some((since, before)) if since.elapsed() >= SHORT_STALL_MAX => {
                if self.relay.output().is_wanted() && is_slow(sent - before, since.elapsed()) {
                    return Err(End::told("the answers of this session are in the way of others"));
                }
                self.pace = Some((Instant::now(), sent));
            }
            Some(_) => {}
        }
        Ok(())
    }

    fn show_life(&mut self) {
        // What waits to be sent is a sign of life, too.
        if self.relay.unsent() == 0 {
            send(self.relay, FromLeader::Alive);
        }
    }

    /// Begins what has arrived. `true` if there may be more to begin at once.
    async fn take_input(&mut self) -> Result<bool, End> {
        for _ in 0..TURN_REQUESTS_MAX {
            if !self.has_room() || !matches!(self.stage, Stage::Ready) {
                return Ok(false);
            }
            let Some(message) = next(self.relay)? else { return Ok(false) };
            match message {
                FromCaller::Hello(_) => return Err(End::told("a second hello")),
                FromCaller::Mutation { header, command } => self.mutate(header, command).await?,
                FromCaller::Query { id, query } => self.query(id, query)?,
                FromCaller::Trace { id, trace_id, span_id } => {
                    self.traced = Context::new(trace_id, span_id)
                        .and_then(|above| self.local.lead_mutation(above, Kind::Server))
                        .map(|span| (id, span));
                }
            }
        }
        Ok(true)
    }

    /// The trace of the request with this number, which has come now, if it is traced.
    fn trace(&mut self, id: u64) -> Option<Span> {
        let (of, span) = self.traced.take()?;
        drop(span.child("decode").since(span.start()));
        (of == id).then_some(span)
    }

    /// Proposes a mutation, once the budget has room for it.
    async fn mutate(&mut self, header: CommandHeader, command: Bytes) -> Result<(), End> {
        let mine = (header.session, header.epoch, header.volume)
            == (self.session, self.epoch, self.local.volume);
        if !mine {
            return Err(End::told("a mutation of another session"));
        }
        if self.unanswered >= MUTATIONS_IN_FLIGHT_MAX {
            let (what, limit) = ("unanswered mutations of a session", MUTATIONS_IN_FLIGHT_MAX);
            return Err(End::told(Refusal::TooMany { what, limit }));
        }
        self.unanswered += 1;
        let trace = self.trace(header.seq);
        let command = match command.len() {
            0..=OWN_BUFFER_BYTES_MAX => Bytes::copy_from_slice(&command),
            _ => command,
        };
        let bytes = command.len() as u64;
        if let Some(share) = self.shared.mutation_budget.try_acquire(bytes) {
            return Ok(self.local.mutate(&header, command, Some(Arc::new(share)), trace).await?);
        }
        let budget = self.shared.mutation_budget.clone();
        let share = Box::pin(async move { budget.acquire(bytes).await });
        self.stage = Stage::Budget { header, command, trace, share };
        Ok(())
    }

    /// Proposes the mutation that now has its share of the budget.
    async fn propose(&mut self, share: BytePermit) -> Result<(), End> {
        let before = std::mem::replace(&mut self.stage, Stage::Ready);
        if let Stage::Budget { header, command, trace, .. } = before {
            self.local.mutate(&header, command, Some(Arc::new(share)), trace).await?;
        }
        Ok(())
    }

    /// Answers a query at once if it is a small read of what is in memory, else by a task.
    fn query(&mut self, id: QueryId, query: Query) -> Result<(), End> {
        let mut trace = self.trace(id.0);
        if let Some(span) = &mut trace {
            span.rename(lead_query(&query));
        }
        let query = match query {
            Query::Read { offset, len, holes } if len <= INLINE_READ_BYTES_MAX => {
                let cache = trace.as_ref().map(|span| span.child("cache"));
                if self.read_inline(id, offset, len, holes) {
                    return Ok(());
                }
                drop(cache);
                query
            }
            Query::Read { .. } => query,
            Query::BlockStatus { offset, len, extents_max } => {
                let most = u32::try_from(BLOCK_STATUS_EXTENTS_MAX).unwrap_or(u32::MAX);
                Query::BlockStatus { offset, len, extents_max: extents_max.min(most) }
            }
        };
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            let (what, limit) = ("unanswered queries of a session", QUERIES_MAX);
            return Err(End::told(Refusal::TooMany { what, limit }));
        };
        let task = QueryTask {
            id,
            query,
            shard: self.local.shard.clone(),
            volume: self.local.volume,
            budget: self.shared.query_budget.clone(),
            parts: self.parts_sender.clone(),
            answers: self.local.answers.clone(),
            turns: Arc::clone(&self.turns),
            underway: self.local.begin(),
            trace,
            _place: place,
        };
        self.shared.shutdown.spawn(task.run());
        Ok(())
    }

    fn read_inline(&mut self, id: QueryId, offset: u64, len: u64, holes: bool) -> bool {
        let done = self.local.try_read(offset, len, holes, &mut self.scratch);
        if done {
            let ReadBuffer { bytes, runs } = &self.scratch;
            put_bytes(self.relay.output().buffer(), id, bytes, runs);
        }
        done
    }

    /// Sends a part of a query's answer; its share of the budget goes back when it is sent.
    fn part(&mut self, part: Part) {
        send(self.relay, part.message);
        self.relay.output().hold(part.share);
    }

    /// Tells the caller what came of something.
    async fn answer(&mut self, answered: Answered) -> Result<(), End> {
        let mut reply = None;
        let message = match answered {
            Answered::Mutation { seq, outcome, trace, given } => {
                reply = trace;
                if let Some(given) = given {
                    self.local.got(given);
                }
                let verdict = match outcome {
                    Outcome::Done => Ok(()),
                    Outcome::Rejected(rejection) => Err(rejection),
                    other => unreachable!("{other:?} is not an outcome of a mutation"),
                };
                FromLeader::Applied { seq, verdict }
            }
            Answered::Refused { seq, failed } => FromLeader::Refused { seq, failed },
            Answered::Granted(granted) => return Ok(self.local.propose(granted).await?),
            Answered::Lost => return Err(lost()),
            Answered::Ended => return Err(End::Ended),
            Answered::Sample(wanted) => {
                let requests = wanted.swap(0, Ordering::Relaxed);
                send(self.relay, FromLeader::Sample { requests });
                return Ok(());
            }
            // Queries answer for themselves.
            Answered::Query { .. } | Answered::Piece { .. } => return Ok(()),
        };
        self.unanswered -= 1;
        send(self.relay, message);
        drop(reply);
        Ok(())
    }
}

async fn budget_turn(stage: &mut Stage) -> BytePermit {
    match stage {
        Stage::Budget { share, .. } => share.await,
        Stage::Ready => std::future::pending().await,
    }
}
