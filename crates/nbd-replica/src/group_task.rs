//! The task that owns one replica of a shard: it feeds it events, and carries out what it asks for.
//!
//! ```text
//!  sessions, health ──Request──▶ ┌──────────────┐ ──LogJob──▶ log thread
//!  peers, checkpoints ─Control─▶ │  group task  │ ◀──Persisted──     │
//!  clock ─────────────Tick─────▶ │ ShardReplica │ ──OutMessage─▶ transport
//!                                │              │ ──Answer─────▶ whoever asked
//!                                └──────────────┘ ──Route──────▶ sessions, health (watch)
//! ```
//!
//! Exit: when the last [`GroupKeeper`] is dropped, the node fails, or the process stops waiting.
//! Whoever waits for an answer then sees the channel closed.
//!
//! Requests are taken in only while the replica accepts them; what gathers meanwhile goes into the
//! next entry together. Control events are always taken in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use nbd_consensus::{Role, SnapshotOffer, Status, Timestamp};
use nbd_front::{GroupStopped, LeaderAt, Route, RunError};
use nbd_rpc::v1::TraceNote;
use nbd_service::trace::{Span, Tracer};
use nbd_shard::{Actions, Checkpointed, Event, LogWrite, Persisted, ShardReplica};
use nbd_store::{Outcome, ReplicaInfo, ShardReader, ShardSnapshot};
use nbd_topology::{LogIndex, MembershipChange, NodeName, ReplicaId, ShardId, Term};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub(crate) use nbd_shard::Answer;

use crate::clock;
use crate::failure::{FailOnPanic, Failure};
use crate::fetch::LogFetcher;
use crate::group_trace::{Follower, GroupTrace};
use crate::limits::{GROUP_CONTROL_MAX, GROUP_MAILBOX_MAX};
use crate::log_thread::{LogHandle, LogJob};
use crate::metrics::{GroupMetrics, Replicating};
use crate::peers::{Addresses, peer_addresses};
use crate::reply::Reply;
use crate::resync::ResyncHandle;
use crate::transport::TransportHandle;

/// Requests taken from the mailbox in one turn.
const TURN_REQUESTS_MAX: usize = 256;

/// Replicas that joined while this one was away and that are answered before it knows them as
/// members.
const NEWCOMERS_MAX: usize = 16;

/// Control events taken in one turn.
const TURN_CONTROL_MAX: usize = 64;

/// Ticks by which one may be late before that is told: half of an election timeout.
const LATE_TICKS: u32 = 6;

/// Acknowledgements of log writes that may wait for the task; the log thread waits when there are
/// more.
const PERSISTED_MAX: usize = 64;

/// What somebody asks of the shard.
#[derive(Debug)]
enum Request {
    Propose { command: Bytes, reply: Reply },
    Barrier(Reply),
    Change(MembershipChange, Reply),
}

/// What the node tells the replica.
#[derive(Debug)]
enum Control {
    Message(Bytes),
    Traces(Vec<TraceNote>),
    ConnectionLost(NodeName),
    Newcomer { peer: ReplicaId, node: NodeName, directory: u128 },
    Unreachable(ReplicaId),
    Checkpointed(Checkpointed),
    ReadBack(Vec<nbd_consensus::Entry>),
    Fetched { first: LogIndex, entries: Vec<nbd_consensus::Entry> },
    Transfer(ReplicaId),
    ResyncReady(Box<ShardSnapshot>),
    Installed,
    Status(oneshot::Sender<Status>),
}

/// What others may know of the replica at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupStatus {
    /// Role of this replica.
    pub(crate) role: Role,
    /// Current term.
    pub(crate) term: Term,
    /// Highest index known committed.
    pub(crate) committed: LogIndex,
    /// Highest index applied. `applied <= committed`.
    pub(crate) applied: LogIndex,
    /// Whether this replica votes; if not, its copy does not count towards a majority.
    pub(crate) voter: bool,
}

/// Until when reads may be answered from this node's store alone, in nanoseconds of [`clock`]; 0:
/// not at all. Written by the group task, read by sessions.
#[derive(Debug, Default)]
struct LeaseCell(AtomicU64);

/// Permission to begin a read under the leader's lease.
#[derive(Debug, Clone)]
pub(crate) struct ReadPermit {
    lease: Arc<LeaseCell>,
    since: Timestamp,
}

impl ReadPermit {
    /// Whether the lease still runs. To be asked once the bytes were read, before they leave.
    pub(crate) fn holds(&self) -> bool {
        self.still().is_some()
    }

    /// The time, if the lease still runs.
    pub(crate) fn still(&self) -> Option<Timestamp> {
        let now = clock::now();
        (now.0 < self.lease.0.load(Ordering::Acquire)).then_some(now)
    }

    /// When it was given.
    pub(crate) const fn since(&self) -> Timestamp {
        self.since
    }
}

/// Proposes to a group and reads its shard.
#[derive(Debug, Clone)]
pub(crate) struct GroupHandle {
    shard: ShardId,
    mailbox: mpsc::WeakSender<Request>,
    control: mpsc::WeakSender<Control>,
    status: watch::Receiver<GroupStatus>,
    route: watch::Receiver<Route>,
    lease: Arc<LeaseCell>,
    /// Told when sessions were ended by what was applied.
    ended: Arc<Notify>,
    reader: ShardReader,
}

/// Keeps the group's task alive. Dropped at the end of a graceful shutdown.
#[derive(Debug)]
pub(crate) struct GroupKeeper {
    _mailbox: mpsc::Sender<Request>,
    _control: mpsc::Sender<Control>,
}

impl GroupHandle {
    pub(crate) const fn shard(&self) -> ShardId {
        self.shard
    }

    pub(crate) const fn reader(&self) -> &ShardReader {
        &self.reader
    }

    pub(crate) fn status(&self) -> GroupStatus {
        self.status.borrow().clone()
    }

    /// Where the leader is, now and as it changes.
    pub(crate) fn route(&self) -> watch::Receiver<Route> {
        self.route.clone()
    }

    /// Told when sessions were ended by what this replica has applied. For one who waits.
    pub(crate) fn sessions_ended(&self) -> Arc<Notify> {
        Arc::clone(&self.ended)
    }

    /// The same group, but with its leader where a test says.
    #[cfg(test)]
    pub(crate) fn with_route(&self, route: watch::Receiver<Route>) -> Self {
        Self { route, ..self.clone() }
    }

    /// Hands a command to the group; waits in turn when the mailbox is full. A replica that does
    /// not lead answers so at once.
    pub(crate) async fn propose(&self, command: Bytes, reply: Reply) -> Result<(), GroupStopped> {
        self.ask(Request::Propose { command, reply }).await
    }

    /// Proposes a command here and waits for its outcome.
    pub(crate) async fn run(&self, command: Bytes) -> Result<Outcome, RunError> {
        let (reply, answer) = oneshot::channel();
        self.propose(command, Reply::Once(reply)).await?;
        match answer.await.map_err(|_| GroupStopped)? {
            Answer::Outcome(outcome) => Ok(outcome),
            Answer::NotLeader(_) => Err(RunError::NotLeader),
            Answer::Lost | Answer::Ready | Answer::Changed | Answer::Refused(_) => {
                Err(RunError::Lost)
            }
        }
    }

    /// Permission to read from this replica's store without asking its peers, if it holds a lease.
    pub(crate) fn read_permit(&self) -> Option<ReadPermit> {
        let since = clock::now();
        let holds = since.0 < self.lease.0.load(Ordering::Acquire);
        holds.then(|| ReadPermit { lease: Arc::clone(&self.lease), since })
    }

    /// Waits until a read that starts afterwards sees everything acknowledged before this call.
    pub(crate) async fn barrier(&self) -> Result<(), RunError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Barrier(Reply::Once(reply))).await?;
        match answer.await.map_err(|_| GroupStopped)? {
            Answer::Ready => Ok(()),
            _ => Err(RunError::NotLeader),
        }
    }

    /// Changes who belongs to the group. The answer comes when the change is in force.
    pub(crate) async fn change_membership(
        &self,
        change: MembershipChange,
    ) -> Result<Answer, GroupStopped> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Change(change, Reply::Once(reply))).await?;
        answer.await.map_err(|_| GroupStopped)
    }

    /// How the group stands in detail.
    pub(crate) async fn details(&self) -> Result<Status, GroupStopped> {
        let (reply, answer) = oneshot::channel();
        self.tell(Control::Status(reply)).await?;
        answer.await.map_err(|_| GroupStopped)
    }

    /// Hands leadership to another replica, if this one leads.
    pub(crate) async fn transfer(&self, to: ReplicaId) -> Result<(), GroupStopped> {
        self.tell(Control::Transfer(to)).await
    }

    /// A checkpoint is durable.
    pub(crate) fn checkpointed(&self, checkpoint: Checkpointed) {
        // Only memory and log are at stake, and the next checkpoint says it again.
        self.try_tell(Control::Checkpointed(checkpoint));
    }

    /// A Raft message of a peer, whole. Dropped when too many wait.
    pub(crate) fn message(&self, bytes: Bytes) {
        self.try_tell(Control::Message(bytes));
    }

    /// Entries to come are traced.
    pub(crate) fn traces(&self, notes: Vec<TraceNote>) {
        self.try_tell(Control::Traces(notes));
    }

    /// A replica that this one does not know as a member has sent a message: this one may have been
    /// away while it joined.
    pub(crate) fn newcomer(&self, peer: ReplicaId, node: &NodeName, directory: u128) {
        self.try_tell(Control::Newcomer { peer, node: node.clone(), directory });
    }

    /// The connection to this node broke.
    pub(crate) fn connection_lost(&self, node: &NodeName) {
        self.try_tell(Control::ConnectionLost(node.clone()));
    }

    /// Messages for this peer were dropped.
    pub(crate) fn unreachable(&self, peer: ReplicaId) {
        self.try_tell(Control::Unreachable(peer));
    }

    /// Everything that this snapshot needs is in the store.
    pub(crate) async fn resync_ready(&self, snapshot: ShardSnapshot) -> Result<(), GroupStopped> {
        self.tell(Control::ResyncReady(Box::new(snapshot))).await
    }

    /// The store was switched to the snapshot asked for.
    pub(crate) async fn installed(&self) -> Result<(), GroupStopped> {
        self.tell(Control::Installed).await
    }

    /// Entries read from the log.
    pub(crate) async fn fetched(
        &self,
        first: LogIndex,
        entries: Vec<nbd_consensus::Entry>,
    ) -> Result<(), GroupStopped> {
        self.tell(Control::Fetched { first, entries }).await
    }

    /// Entries read from the log to be written once more.
    pub(crate) async fn read_back(
        &self,
        entries: Vec<nbd_consensus::Entry>,
    ) -> Result<(), GroupStopped> {
        self.tell(Control::ReadBack(entries)).await
    }

    async fn ask(&self, request: Request) -> Result<(), GroupStopped> {
        let mailbox = self.mailbox.upgrade().ok_or(GroupStopped)?;
        mailbox.send(request).await.map_err(|_| GroupStopped)
    }

    async fn tell(&self, control: Control) -> Result<(), GroupStopped> {
        let mailbox = self.control.upgrade().ok_or(GroupStopped)?;
        mailbox.send(control).await.map_err(|_| GroupStopped)
    }

    fn try_tell(&self, control: Control) {
        if let Some(mailbox) = self.control.upgrade() {
            let _ = mailbox.try_send(control);
        }
    }
}

/// What a group task starts from.
pub(crate) struct GroupParts {
    pub(crate) replica_id: ReplicaId,
    pub(crate) replica: ShardReplica<Reply>,
    pub(crate) reader: ShardReader,
    pub(crate) log: LogHandle,
    pub(crate) fetcher: LogFetcher,
    pub(crate) addresses: Addresses,
    pub(crate) transport: TransportHandle,
    pub(crate) resync: ResyncHandle,
    pub(crate) failure: Failure,
    /// Time of one Raft tick.
    pub(crate) tick: Duration,
    /// Whether this group has no other voter, and so may elect itself at once.
    pub(crate) sole_voter: bool,
    /// Cancelled when the process will not wait any longer for what is under way.
    pub(crate) abandon: CancellationToken,
    pub(crate) tracer: Tracer,
}

/// The two ends of a group that is not started yet: the node is wired before its shards are formed.
pub(crate) struct GroupMailbox {
    requests: mpsc::Receiver<Request>,
    control: mpsc::Receiver<Control>,
    status: watch::Sender<GroupStatus>,
    route: watch::Sender<Route>,
    lease: Arc<LeaseCell>,
}

/// Makes a group's handle, what keeps it alive, and the mailbox of the task to come.
pub(crate) fn mailbox(reader: ShardReader) -> (GroupHandle, GroupKeeper, GroupMailbox) {
    let (mailbox, requests) = mpsc::channel(GROUP_MAILBOX_MAX);
    let (control_tx, control) = mpsc::channel(GROUP_CONTROL_MAX);
    let status = watch::Sender::new(GroupStatus {
        role: Role::Follower,
        term: Term::ZERO,
        committed: LogIndex::ZERO,
        applied: reader.applied(),
        voter: false,
    });
    let route = watch::Sender::new(Route::default());
    let lease = Arc::new(LeaseCell::default());
    let handle = GroupHandle {
        shard: reader.shard(),
        mailbox: mailbox.downgrade(),
        control: control_tx.downgrade(),
        status: status.subscribe(),
        route: route.subscribe(),
        lease: Arc::clone(&lease),
        ended: Arc::default(),
        reader,
    };
    let keeper = GroupKeeper { _mailbox: mailbox, _control: control_tx };
    (handle, keeper, GroupMailbox { requests, control, status, route, lease })
}

/// Owner of the replica.
pub(crate) struct GroupTask {
    parts: GroupParts,
    shard: ShardId,
    handle: GroupHandle,
    mailbox: GroupMailbox,
    persisted_tx: mpsc::Sender<Persisted>,
    persisted: mpsc::Receiver<Persisted>,
    /// Members of the group and where they are, from the shard's replicated state.
    members: Vec<ReplicaInfo>,
    /// Of those, the ones that this replica's state does not know yet.
    newcomers: Vec<ReplicaInfo>,
    actions: Actions<Reply>,
    /// What the route was last made from.
    routed: Option<(Term, Option<ReplicaId>, bool)>,
    metrics: GroupMetrics,
    replicating: Replicating,
    trace: GroupTrace,
}

impl GroupTask {
    pub(crate) fn new(parts: GroupParts, handle: GroupHandle, mailbox: GroupMailbox) -> Self {
        let (persisted_tx, persisted) = mpsc::channel(PERSISTED_MAX);
        let shard = parts.replica.shard();
        let mut task = Self {
            shard,
            handle,
            mailbox,
            persisted_tx,
            persisted,
            members: Vec::new(),
            newcomers: Vec::new(),
            actions: Actions::default(),
            routed: None,
            metrics: GroupMetrics::new(shard),
            replicating: Replicating::default(),
            trace: GroupTrace::new(parts.tracer.clone()),
            parts,
        };
        task.learn_members();
        task
    }

    /// Runs until the last keeper is dropped or the node fails.
    pub(crate) async fn run(mut self) {
        let _guard = FailOnPanic::new(&self.parts.failure, "group task");
        let mut clock = tokio::time::interval(self.parts.tick);
        // A pause of the process must not turn into a burst of ticks.
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let failure = self.parts.failure.clone();
        let failed = failure.wait();
        tokio::pin!(failed);
        let mut turn = Vec::with_capacity(TURN_REQUESTS_MAX);
        let mut told = Vec::with_capacity(TURN_CONTROL_MAX);
        if self.parts.sole_voter {
            self.step(Event::Campaign);
        }
        loop {
            let accepting = self.parts.replica.accepts_proposals();
            tokio::select! {
                biased;
                _ = &mut failed => break,
                () = self.parts.abandon.cancelled() => break,
                // Before what may come without end: heartbeats must not wait for it.
                due = clock.tick() => {
                    self.note_lateness(due.elapsed());
                    self.step(Event::Tick);
                    if self.trace.is_active() {
                        self.trace.expire();
                    }
                }
                Some(persisted) = self.persisted.recv() => self.step(Event::Persisted(persisted)),
                count = self.mailbox.control.recv_many(&mut told, TURN_CONTROL_MAX) => {
                    if count == 0 {
                        break;
                    }
                    for control in told.drain(..) {
                        self.on_control(control);
                    }
                }
                count = self.mailbox.requests.recv_many(&mut turn, TURN_REQUESTS_MAX),
                    if accepting => {
                    if count == 0 {
                        break;
                    }
                    self.on_requests(&mut turn);
                }
            }
        }
        self.mailbox.lease.0.store(0, Ordering::Release);
    }

    /// Tells of a tick that came so late that peers may take this replica for dead: whoever looks
    /// for the cause of an election finds it here.
    fn note_lateness(&self, late: Duration) {
        if late > self.parts.tick * LATE_TICKS {
            warn!(
                shard = %self.shard, late_ms = late.as_millis(),
                "stood still: the processors are overrun, or the process was stopped"
            );
        }
    }

    fn on_control(&mut self, control: Control) {
        match control {
            Control::Message(bytes) => self.step(Event::Message(bytes)),
            Control::Traces(notes) => self.trace.noted(notes),
            Control::ConnectionLost(node) => self.on_connection_lost(&node),
            Control::Newcomer { peer, node, directory } => self.on_newcomer(peer, node, directory),
            Control::Unreachable(peer) => self.step(Event::PeerUnreachable(peer)),
            Control::Checkpointed(checkpoint) => self.step(Event::Checkpointed(checkpoint)),
            Control::ReadBack(entries) => self.step(Event::ReadBack(entries)),
            Control::Fetched { first, entries } => self.step(Event::Fetched { first, entries }),
            Control::Transfer(to) => {
                // Before the request can reach the other replica.
                self.mailbox.lease.0.store(0, Ordering::Release);
                self.step(Event::TransferLeader(to));
            }
            Control::ResyncReady(snapshot) => self.step(Event::ResyncReady(*snapshot)),
            Control::Installed => self.step(Event::Installed),
            Control::Status(reply) => {
                let _ = reply.send(self.parts.replica.status());
            }
        }
    }

    fn on_connection_lost(&mut self, node: &NodeName) {
        let leader = self.parts.replica.brief().leader;
        let replicas: Vec<_> =
            self.members.iter().filter(|member| member.node == *node).map(|m| m.id).collect();
        for replica in replicas {
            self.step(Event::PeerUnreachable(replica));
            if leader == Some(replica) {
                self.step(Event::LeaderLost);
            }
        }
    }

    /// Makes a replica known that may be a member by now, so that it gets answers: they are how
    /// this one learns of it. Only at an address of this node's own configuration.
    fn on_newcomer(&mut self, peer: ReplicaId, node: NodeName, directory: u128) {
        let known = |member: &ReplicaInfo| member.id == peer;
        let newest = self.members.iter().map(|member| member.id).max();
        // Ids rise: one that is not above those known was removed.
        if self.members.iter().any(known)
            || newest >= Some(peer)
            || self.newcomers.len() >= NEWCOMERS_MAX
        {
            return;
        }
        let Some(addresses) = self.parts.addresses.of(&node) else {
            warn!(shard = %self.shard, %peer, %node, "a message of a node that is not configured");
            return;
        };
        info!(shard = %self.shard, %peer, %node, "a replica that joined meanwhile");
        self.newcomers.push(ReplicaInfo { id: peer, node, directory, addresses });
        self.learn_members();
    }

    fn on_requests(&mut self, turn: &mut Vec<Request>) {
        let mut commands = Vec::with_capacity(turn.len());
        let now = clock::now();
        for request in turn.drain(..) {
            match request {
                Request::Propose { command, reply } => {
                    if let Some(arrived) = reply.arrived() {
                        let waited = now.0.saturating_sub(arrived.0);
                        self.metrics.waited(Duration::from_nanos(waited));
                    }
                    if let Some((span, underway)) = reply.trace() {
                        self.trace.arrived(&command, span, underway);
                    }
                    commands.push((command, reply));
                }
                Request::Barrier(reply) => self.step(Event::Barrier(reply)),
                Request::Change(change, reply) => {
                    self.step(Event::ChangeMembership(change, reply));
                }
            }
        }
        if !commands.is_empty() {
            self.step(Event::Propose(commands));
        }
    }

    /// Steps the replica and carries out what it asks for.
    fn step(&mut self, event: Event<Reply>) {
        let now = clock::now();
        let traced = self.trace.is_active().then(SystemTime::now);
        self.parts.replica.step(now, event, &mut self.actions);
        let traced = traced.map(|began| (began, SystemTime::now()));
        let actions = std::mem::take(&mut self.actions);
        if !actions.commit_times.is_empty() {
            // One more look at the clock for all that was applied together.
            let took = clock::now().0.saturating_sub(now.0);
            self.metrics.applied(Duration::from_nanos(took));
        }
        if actions.membership_changed {
            self.learn_members();
        }
        self.time_replication(now, &actions.log_writes);
        let mut appends = match traced {
            Some(_) => self.trace_writes(&actions.log_writes),
            None => Vec::new(),
        }
        .into_iter();
        let (from, notes) = (self.parts.replica_id, self.trace.notes());
        self.parts.transport.send_traced(self.shard, from, actions.send, notes);
        for write in actions.log_writes {
            self.parts.log.submit(LogJob {
                shard: self.shard,
                write,
                queued_at: Instant::now(),
                persisted: self.persisted_tx.clone(),
                traced: appends.next().unwrap_or_default(),
            });
        }
        if let Some(times) = traced {
            let replica = &self.parts.replica;
            self.trace.stepped(replica.brief(), || replica.status().peers, times);
        }
        if !actions.answers.is_empty() {
            let given = Instant::now();
            for (reply, answer) in actions.answers {
                reply.send(answer, (now, given));
            }
        }
        for elapsed in actions.commit_times {
            self.metrics.commit(elapsed);
        }
        for plan in actions.fetch {
            self.parts.fetcher.fetch(plan, self.handle.clone());
        }
        if let Some(places) = actions.read_back {
            self.parts.fetcher.read_back(places, self.handle.clone());
        }
        if let Some(tail) = actions.log_tail {
            self.parts.log.tail_begins(self.shard, tail);
        }
        if let Some(above) = actions.keep_above {
            self.parts.log.retain(self.shard, above);
        }
        if let Some(offer) = actions.snapshot_offered {
            self.begin_resync(offer);
        }
        if let Some(plan) = actions.install {
            self.parts.resync.install(plan);
        }
        if actions.resync_dropped {
            self.parts.resync.dropped();
        }
        if actions.sessions_ended {
            self.handle.ended.notify_one();
        }
        self.publish();
    }

    /// Times how long what goes to the log here takes to reach enough followers, while this replica
    /// leads.
    fn time_replication(&mut self, now: Timestamp, writes: &[LogWrite]) {
        let Some(replicated) = self.parts.replica.replicated() else {
            self.replicating.clear();
            return;
        };
        // Copies of old entries go to no follower.
        let sent = writes.iter().rev().filter(|write| write.ready.is_some());
        if let Some(newest) = sent.filter_map(|write| write.entries.last()).next() {
            self.replicating.sent(newest.index, now);
        }
        for elapsed in self.replicating.took(replicated, now) {
            self.metrics.replicated(elapsed);
        }
    }

    /// The `append` of each traced entry, write by write.
    #[cold]
    fn trace_writes(&mut self, writes: &[LogWrite]) -> Vec<Vec<Span>> {
        let Self { trace, members, parts, .. } = self;
        let followers = || {
            let peers = parts.replica.status().peers;
            let is_active = |id| peers.iter().any(|peer| peer.replica == id && peer.active);
            let others = members.iter().filter(|member| member.id != parts.replica_id);
            let follower = |member: &ReplicaInfo| Follower {
                id: member.id,
                node: member.node.clone(),
                active: is_active(member.id),
            };
            others.map(follower).collect()
        };
        writes.iter().map(|write| trace.logged(write, followers)).collect()
    }

    fn begin_resync(&self, offer: SnapshotOffer) {
        let Some(source) = self.members.iter().find(|member| member.id == offer.from) else {
            warn!(shard = %self.shard, from = %offer.from, "a snapshot from an unknown replica");
            return;
        };
        self.parts.resync.offered(offer, source.clone());
    }

    /// Looks up who belongs to the group now, and lets the transport know.
    fn learn_members(&mut self) {
        self.members = self.parts.addresses.resolve(self.parts.reader.replicas());
        let members = &self.members;
        self.newcomers.retain(|new| members.iter().all(|member| member.id < new.id));
        self.members.extend(self.newcomers.iter().cloned());
        self.routed = None;
        let peers = peer_addresses(&self.members);
        self.parts.transport.set_peers(self.shard, self.parts.replica_id, peers);
        debug!(shard = %self.shard, members = self.members.len(), "members");
    }

    /// Makes the replica's state known.
    fn publish(&mut self) {
        let brief = self.parts.replica.brief();
        let lease = self.parts.replica.read_lease().map_or(0, |until| until.0);
        self.mailbox.lease.0.store(lease, Ordering::Release);
        let now = GroupStatus {
            role: brief.role,
            term: brief.term,
            committed: brief.committed,
            applied: brief.applied,
            voter: brief.voter,
        };
        let changed = self.mailbox.status.send_if_modified(|status| {
            let changed = *status != now;
            if status.role != now.role {
                info!(shard = %self.shard, role = ?now.role, term = %now.term, "role");
            }
            *status = now.clone();
            changed
        });
        if changed {
            self.metrics.status(&now);
        }
        let routed = (brief.term, brief.leader, brief.serving);
        if self.routed != Some(routed) {
            self.routed = Some(routed);
            let leader = brief.leader.and_then(|id| self.leader_at(id));
            let route = Route { term: brief.term, serving: brief.serving, leader };
            self.mailbox.route.send_if_modified(|now| {
                let changed = *now != route;
                *now = route;
                changed
            });
        }
    }

    fn leader_at(&self, id: ReplicaId) -> Option<LeaderAt> {
        let member = self.members.iter().find(|member| member.id == id)?;
        Some(LeaderAt {
            replica: id,
            node: member.node.clone(),
            grpc: member.addresses.grpc.clone(),
            local: id == self.parts.replica_id,
        })
    }
}
