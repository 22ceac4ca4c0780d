//! The task that owns one shard's group: it steps the consensus, hands log writes to the log
//! thread, applies what is committed, and answers the proposers.
//!
//! ```text
//!  sessions, health ──Mutate──▶ ┌────────────┐ ──AppendJob──▶ log thread
//!  checkpointer ────Compacted─▶ │ group task │ ◀──Persisted──     │
//!  clock ───────────Tick──────▶ │  Group     │
//!                               │  writer    │ ──Completion─▶ the session that proposed
//!                               └────────────┘ ──status─────▶ health, readers (watch)
//! ```
//!
//! Exit: when the last [`GroupKeeper`] is dropped, the node fails, or the process stops waiting.
//! Proposers then see their reply channel closed.
//!
//! Requests are taken in only while fewer than
//! [`APPENDS_IN_FLIGHT_MAX`] log writes are under way; what
//! gathers meanwhile goes into the next entry together.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use nbd_consensus::{
    Committed, Effects, EntryKind, Group, Input, Proposal, RejectReason, Role, Ticket,
};
use nbd_log::log::LogPosition;
use nbd_store::{Outcome, SessionInfo, ShardReader, ShardWriter};
use nbd_topology::{LogIndex, NodeName, ReplicaId, ShardId, Term};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::failure::{FailOnPanic, Failure};
use crate::limits::{
    APPENDS_IN_FLIGHT_MAX, ENTRY_PACK_BYTES_MAX, GROUP_MAILBOX_MAX, LOG_BATCH_BYTES_MAX,
};
use crate::log_thread::{AppendJob, LogHandle, Persisted};
use crate::metrics::GroupMetrics;
use crate::reply::Reply;

/// Requests taken from the mailbox in one turn.
const TURN_REQUESTS_MAX: usize = 256;

/// Acknowledgements of log writes that may wait for the task; the log thread waits when there are
/// more.
const PERSISTED_MAX: usize = 64;

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(dead_code)]
pub(crate) enum Answer {
    /// The command was applied.
    Outcome(Outcome),
    /// A read may be served.
    Ready,
    /// Nothing was logged: this replica does not lead.
    NotLeader(Option<ReplicaId>),
    /// It may or may not have happened.
    Lost,
}

/// Why a command has no outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(dead_code)]
pub(crate) enum RunError {
    #[error("this replica does not lead the shard")]
    NotLeader,
    #[error("leadership was lost meanwhile")]
    Lost,
    #[error(transparent)]
    Stopped(#[from] GroupStopped),
}

/// Where the shard's leader is, as far as this node knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Route {
    pub(crate) term: Term,
    pub(crate) leader: Option<LeaderAt>,
    pub(crate) serving: bool,
}

/// A leader and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeaderAt {
    pub(crate) replica: ReplicaId,
    pub(crate) node: NodeName,
    pub(crate) grpc: String,
    pub(crate) local: bool,
}

/// Permission to begin a read under the leader's lease.
#[derive(Debug, Clone)]
pub(crate) struct ReadPermit;

impl ReadPermit {
    pub(crate) fn holds(&self) -> bool {
        true
    }
}

#[derive(Debug)]
enum Request {
    Mutate { command: Bytes, reply: Reply },
    Compacted(LogIndex),
}

/// What others may know of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupStatus {
    /// Role of this replica.
    pub(crate) role: Role,
    /// Current term.
    pub(crate) term: Term,
    /// The leader this replica knows of.
    pub(crate) leader: Option<ReplicaId>,
    /// Highest index known committed.
    pub(crate) committed: LogIndex,
    /// Highest index applied. `applied <= committed`.
    pub(crate) applied: LogIndex,
    /// Whether this replica leads and has applied an entry of its own term: from then on its store
    /// shows everything that was ever acknowledged.
    pub(crate) serving: bool,
}

/// The group is gone: the node is stopping or has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the shard's group has stopped")]
pub(crate) struct GroupStopped;

/// Proposes to a group and reads its shard.
#[derive(Debug, Clone)]
pub(crate) struct GroupHandle {
    shard: ShardId,
    mailbox: mpsc::WeakSender<Request>,
    status: watch::Receiver<GroupStatus>,
    route: watch::Receiver<Route>,
    reader: ShardReader,
}

/// Keeps the group's task alive. Dropped at the end of a graceful shutdown.
#[derive(Debug)]
pub(crate) struct GroupKeeper {
    _mailbox: mpsc::Sender<Request>,
}

impl GroupHandle {
    pub(crate) fn shard(&self) -> ShardId {
        self.shard
    }

    pub(crate) fn reader(&self) -> &ShardReader {
        &self.reader
    }

    pub(crate) fn status(&self) -> GroupStatus {
        self.status.borrow().clone()
    }

    /// A sender of commands for one session; it waits in turn when the mailbox is full.
    pub(crate) async fn propose(&self, command: Bytes, reply: Reply) -> Result<(), GroupStopped> {
        let mailbox = self.mailbox.upgrade().ok_or(GroupStopped)?;
        mailbox.send(Request::Mutate { command, reply }).await.map_err(|_| GroupStopped)
    }

    /// Proposes a command and waits for its outcome.
    pub(crate) async fn run(&self, command: Bytes) -> Result<Outcome, RunError> {
        let (reply, outcome) = oneshot::channel();
        self.propose(command, Reply::Once(reply)).await?;
        match outcome.await.map_err(|_| GroupStopped)? {
            Answer::Outcome(outcome) => Ok(outcome),
            _ => Err(RunError::Lost),
        }
    }

    pub(crate) fn route(&self) -> watch::Receiver<Route> {
        self.route.clone()
    }

    pub(crate) fn read_permit(&self) -> Option<ReadPermit> {
        self.status.borrow().serving.then_some(ReadPermit)
    }

    pub(crate) async fn barrier(&self) -> Result<(), RunError> {
        Ok(self.serving().await?)
    }

    /// The same group as seen by a node that gets to know of its leader in another way.
    #[cfg(test)]
    pub(crate) fn with_route(&self, route: watch::Receiver<Route>) -> Self {
        Self { route, ..self.clone() }
    }

    /// Waits until the shard can be read and written here.
    pub(crate) async fn serving(&self) -> Result<(), GroupStopped> {
        let mut status = self.status.clone();
        status.wait_for(|status| status.serving).await.map(|_| ()).map_err(|_| GroupStopped)
    }

    /// Tells the group that its log is no longer needed up to `index`.
    pub(crate) fn compacted(&self, index: LogIndex) {
        if let Some(mailbox) = self.mailbox.upgrade() {
            // Only memory is at stake, and the next checkpoint says it again.
            let _ = mailbox.try_send(Request::Compacted(index));
        }
    }
}

/// What a group task starts from.
pub(crate) struct GroupParts {
    pub(crate) shard: ShardId,
    pub(crate) group: Group,
    pub(crate) writer: ShardWriter,
    pub(crate) reader: ShardReader,
    /// Where the data of the recovered entries above `applied` lies.
    pub(crate) positions: VecDeque<(LogIndex, LogPosition)>,
    pub(crate) log: LogHandle,
    pub(crate) failure: Failure,
    /// Time of one Raft tick.
    pub(crate) tick: Duration,
    /// Whether this group has no other voter, and so may elect itself at once.
    pub(crate) sole_voter: bool,
    /// Cancelled when the process will not wait any longer for what is under way.
    pub(crate) abandon: CancellationToken,
}

/// Makes the task and its handle. The caller spawns the task.
pub(crate) fn new(parts: GroupParts) -> (GroupTask, GroupHandle, GroupKeeper) {
    let (mailbox, requests) = mpsc::channel(GROUP_MAILBOX_MAX);
    let (persisted_tx, persisted) = mpsc::channel(PERSISTED_MAX);
    let status = watch::Sender::new(status_of(&parts.group));
    let route = watch::Sender::new(Route::default());
    let handle = GroupHandle {
        shard: parts.shard,
        mailbox: mailbox.downgrade(),
        status: status.subscribe(),
        route: route.subscribe(),
        reader: parts.reader.clone(),
    };
    let task = GroupTask {
        shard: parts.shard,
        metrics: GroupMetrics::new(parts.shard),
        group: parts.group,
        writer: parts.writer,
        stale_sessions: parts.reader.sessions(),
        positions: parts.positions,
        log: parts.log,
        failure: parts.failure,
        tick: parts.tick,
        sole_voter: parts.sole_voter,
        abandon: parts.abandon,
        requests,
        persisted_tx,
        persisted,
        appends_in_flight: 0,
        waiting: VecDeque::new(),
        proposed: HashMap::new(),
        next_ticket: 0,
        status,
        route,
    };
    (task, handle, GroupKeeper { _mailbox: mailbox })
}

/// One log entry's worth of commands and who waits for each.
#[derive(Debug)]
struct Packed {
    data: Bytes,
    replies: Vec<Reply>,
    since: Instant,
}

/// Owner of the group and of the shard's writer.
pub(crate) struct GroupTask {
    shard: ShardId,
    group: Group,
    writer: ShardWriter,
    /// Sessions that recovery found open, until they are closed.
    stale_sessions: Vec<SessionInfo>,
    /// Data positions of entries that are persisted (or recovered) and not yet applied, by index.
    positions: VecDeque<(LogIndex, LogPosition)>,
    log: LogHandle,
    failure: Failure,
    tick: Duration,
    sole_voter: bool,
    abandon: CancellationToken,
    requests: mpsc::Receiver<Request>,
    persisted_tx: mpsc::Sender<Persisted>,
    persisted: mpsc::Receiver<Persisted>,
    /// Log writes with entries that were handed over and not acknowledged.
    appends_in_flight: usize,
    /// Entries that the group would not take now, oldest first; proposed again before new ones.
    waiting: VecDeque<Packed>,
    /// Entries proposed and not yet applied.
    proposed: HashMap<Ticket, Packed>,
    next_ticket: u64,
    status: watch::Sender<GroupStatus>,
    route: watch::Sender<Route>,
    metrics: GroupMetrics,
}

impl GroupTask {
    /// Runs until the last keeper is dropped or the node fails.
    pub(crate) async fn run(mut self) {
        let _guard = FailOnPanic::new(&self.failure, "group task");
        let mut clock = tokio::time::interval(self.tick);
        // A pause of the process must not turn into a burst of ticks.
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let failure = self.failure.clone();
        let failed = failure.wait();
        tokio::pin!(failed);
        let mut turn = Vec::with_capacity(TURN_REQUESTS_MAX);
        if self.sole_voter {
            self.step(Input::Campaign);
        }
        loop {
            let accepting = self.accepting();
            tokio::select! {
                biased;
                _ = &mut failed => return,
                () = self.abandon.cancelled() => return,
                Some(persisted) = self.persisted.recv() => self.on_persisted(persisted),
                count = self.requests.recv_many(&mut turn, TURN_REQUESTS_MAX), if accepting => {
                    if count == 0 {
                        return;
                    }
                    self.on_requests(&mut turn);
                }
                _ = clock.tick() => self.step(Input::Tick),
            }
            self.propose_waiting();
        }
    }

    fn accepting(&self) -> bool {
        self.status.borrow().role == Role::Leader
            && self.appends_in_flight < APPENDS_IN_FLIGHT_MAX
            && self.waiting.is_empty()
    }

    fn on_persisted(&mut self, persisted: Persisted) {
        if !persisted.positions.is_empty() {
            self.appends_in_flight -= 1;
        }
        for (index, position) in persisted.positions {
            // A newer record of an index replaces the older one and all behind it.
            while self.positions.back().is_some_and(|(last, _)| *last >= index) {
                self.positions.pop_back();
            }
            self.positions.push_back((index, position));
        }
        self.step(Input::Persisted(persisted.ready));
    }

    fn on_requests(&mut self, turn: &mut Vec<Request>) {
        let mut packer = Packer::default();
        for request in turn.drain(..) {
            match request {
                Request::Mutate { command, reply } => packer.add(command, reply),
                Request::Compacted(index) => self.step(Input::Compacted(index)),
            }
        }
        self.waiting.extend(packer.finish());
    }

    fn propose_waiting(&mut self) {
        if self.waiting.is_empty() || self.status.borrow().role != Role::Leader {
            return;
        }
        if self.appends_in_flight >= APPENDS_IN_FLIGHT_MAX {
            return;
        }
        let (mut proposals, mut bytes) = (Vec::new(), 0);
        while let Some(packed) = self
            .waiting
            .pop_front_if(|packed| bytes == 0 || bytes + packed.data.len() <= LOG_BATCH_BYTES_MAX)
        {
            bytes += packed.data.len();
            let ticket = Ticket(self.next_ticket);
            self.next_ticket += 1;
            proposals.push(Proposal { ticket, data: packed.data.clone() });
            self.proposed.insert(ticket, packed);
        }
        self.step(Input::Propose(proposals));
    }

    /// Steps the group and carries out what it asks for.
    fn step(&mut self, input: Input) {
        let effects = self.group.step(input);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Effects) {
        assert!(effects.send_now.is_empty(), "a group of one voter has nobody to send to");
        for append in effects.appends {
            if !append.entries.is_empty() {
                self.appends_in_flight += 1;
            }
            self.log.submit(AppendJob {
                shard: self.shard,
                append,
                queued_at: Instant::now(),
                persisted: self.persisted_tx.clone(),
            });
        }
        self.take_back(effects.rejected);
        let applied = self.apply(effects.apply);
        if let Some(applied) = applied {
            let effects = self.group.step(Input::Applied(applied));
            self.carry_out(effects);
        } else {
            self.publish();
        }
    }

    /// Keeps rejected entries to propose them again, in their order. They cannot take effect twice:
    /// every reason for a rejection means that the entry is not, and never will be, in the log.
    fn take_back(&mut self, mut rejected: Vec<(Ticket, RejectReason)>) {
        rejected.sort_by_key(|(ticket, _)| *ticket);
        for (ticket, reason) in rejected.into_iter().rev() {
            assert!(reason != RejectReason::TooLarge, "commands are packed to fit an entry");
            if let Some(packed) = self.proposed.remove(&ticket) {
                debug!(shard = %self.shard, ?reason, "a proposal waits");
                self.waiting.push_front(packed);
            }
        }
    }

    /// Applies committed entries and answers their proposers. Returns the last index applied.
    fn apply(&mut self, committed: Vec<Committed>) -> Option<LogIndex> {
        let last = committed.last()?.entry.index;
        for Committed { entry, ticket } in committed {
            let position = self.take_position(entry.index);
            // Membership changes are consensus's own affair: to the shard they are an empty entry.
            let data = match entry.kind {
                EntryKind::Command => entry.data,
                EntryKind::ConfChange | EntryKind::ConfChangeV2 => Bytes::new(),
            };
            let outcomes = self.writer.apply(entry.index, entry.term, &data, position);
            let Some(packed) = ticket.and_then(|ticket| self.proposed.remove(&ticket)) else {
                continue;
            };
            self.metrics.commit(packed.since.elapsed());
            assert_eq!(outcomes.len(), packed.replies.len(), "one outcome a command");
            for (reply, outcome) in packed.replies.into_iter().zip(outcomes) {
                reply.send(Answer::Outcome(outcome));
            }
        }
        Some(last)
    }

    fn take_position(&mut self, index: LogIndex) -> LogPosition {
        match self.positions.pop_front() {
            Some((at, position)) if at == index => position,
            other => panic!("entry {index} is applied but not known to be persisted: {other:?}"),
        }
    }

    /// Makes the group's state known, and ends the sessions that a restart cut off once this
    /// replica serves.
    fn publish(&mut self) {
        let before = self.status.borrow().clone();
        let now = status_of(&self.group);
        if now == before {
            return;
        }
        self.metrics.status(&now);
        self.status.send_replace(now.clone());
        let leader = now.leader.map(|replica| LeaderAt {
            replica,
            node: "this-node".parse().expect("a name"),
            grpc: String::new(),
            local: true,
        });
        self.route.send_replace(Route { term: now.term, leader, serving: now.serving });
        if now.role != before.role {
            info!(shard = %self.shard, role = ?now.role, term = %now.term, "role");
        }
        if now.serving && !self.stale_sessions.is_empty() {
            self.end_stale_sessions();
        }
    }

    /// Sessions belong to connections of the process that opened them, and none of those outlives
    /// it: what recovery found open is over.
    fn end_stale_sessions(&mut self) {
        let mut packer = Packer::default();
        for session in std::mem::take(&mut self.stale_sessions) {
            let close = nbd_store::encode_close_session(session.id, session.epoch);
            packer.add(close, Reply::Nobody);
        }
        self.waiting.extend(packer.finish());
    }
}

fn status_of(group: &Group) -> GroupStatus {
    let status = group.status();
    GroupStatus {
        role: status.role,
        term: status.term,
        leader: status.leader,
        committed: status.committed,
        applied: status.applied,
        serving: status.serving,
    }
}

/// Joins small commands into entries, in order.
#[derive(Debug, Default)]
struct Packer {
    done: Vec<Packed>,
    commands: Vec<Bytes>,
    replies: Vec<Reply>,
    bytes: usize,
}

impl Packer {
    fn add(&mut self, command: Bytes, reply: Reply) {
        if self.bytes + command.len() > ENTRY_PACK_BYTES_MAX {
            self.seal();
        }
        self.bytes += command.len();
        self.commands.push(command);
        self.replies.push(reply);
    }

    fn seal(&mut self) {
        if self.commands.is_empty() {
            return;
        }
        let data = if self.commands.len() == 1 {
            self.commands.remove(0)
        } else {
            let mut data = BytesMut::with_capacity(self.bytes);
            for command in self.commands.drain(..) {
                data.extend_from_slice(&command);
            }
            data.freeze()
        };
        self.bytes = 0;
        let replies = std::mem::take(&mut self.replies);
        self.done.push(Packed { data, replies, since: Instant::now() });
    }

    fn finish(mut self) -> Vec<Packed> {
        self.seal();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_commands_share_an_entry_and_large_ones_go_alone_in_order() {
        let mut packer = Packer::default();
        for len in [10, 20, ENTRY_PACK_BYTES_MAX + 1, 30] {
            packer.add(Bytes::from(vec![0; len]), Reply::Nobody);
        }
        let packed = packer.finish();
        let lens: Vec<_> = packed.iter().map(|p| (p.data.len(), p.replies.len())).collect();
        assert_eq!(lens, [(30, 2), (ENTRY_PACK_BYTES_MAX + 1, 1), (30, 1)]);
    }
}
