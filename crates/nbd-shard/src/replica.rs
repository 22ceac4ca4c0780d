//! The owner of one replica's state.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use nbd_consensus::{
    Append, Brief, Committed, Effects, Entry, EntryKind, Group, GroupConfig, GroupError, Input,
    OutMessage, Proposal, ReadyNumber, RejectReason, Role, Status, Ticket, Timestamp,
};
use nbd_store::{Applied, EntryPlace, Outcome, RaftRecovered, ShardSnapshot, ShardWriter};
use nbd_topology::{LogIndex, Membership, ReplicaId, ShardId, Term};

use crate::event::{
    Actions, Answer, Checkpointed, Event, FetchPlan, InstallPlan, LogTail, Persisted,
};
use crate::limits::{
    APPENDS_IN_FLIGHT_MAX, APPENDS_OUTSTANDING_MAX, PROPOSE_BYTES_MAX, RETENTION_TICKS,
};
use crate::log_write::LogWrite;
use crate::packer::{Packed, Packer};
use crate::places::Places;
use crate::recovered::{log_hard_state, recovered};

/// Something of a caller that waits for its entry to be applied.
#[derive(Debug)]
enum Work<R> {
    Commands { replies: Vec<R>, since: Timestamp },
    Change(R),
}

/// How far a snapshot is on its way into the store.
#[derive(Debug)]
enum Install {
    /// Nothing of the kind.
    Idle,
    /// Waiting for log writes that were begun before.
    Waiting(ShardSnapshot),
    /// In the hands of whoever owns the store.
    Running { index: LogIndex, term: Term, membership: Membership },
}

/// How far entries are on their way from the log's oldest part to its end.
///
/// Shards share the log, and what is not committed cannot be applied and leave it: entries of a
/// group without a majority would keep all that other groups write behind them, until the log is
/// full for everyone. Copies at the end let the rest go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relocation {
    /// Nothing of the kind.
    Idle,
    /// The log asks for it. Begins when nothing else is on its way to the log, so that nothing
    /// comes between entries and their copies that supersedes them.
    Wanted,
    /// They are being read.
    Reading,
    /// Their copies are being written.
    Writing,
}

/// One replica of a shard. `R` is whom to answer: opaque here.
#[derive(Debug)]
pub struct ShardReplica<R> {
    shard: ShardId,
    group: Group,
    writer: ShardWriter,
    places: Places,
    retention_bytes: u64,
    /// Numbers of log writes handed out and not finished, and what may be sent behind each.
    outstanding: VecDeque<(ReadyNumber, Vec<OutMessage>)>,
    /// Log writes with entries among them.
    appends_in_flight: usize,
    /// Entries that the group would not take now, oldest first; proposed again before new ones.
    waiting: VecDeque<Packed<R>>,
    /// Entries proposed in this term of leading, and not yet applied.
    proposed: HashMap<Ticket, Work<R>>,
    /// Data of proposals that may come back refused, by ticket.
    proposing: HashMap<Ticket, Bytes>,
    /// Barriers whose index is not known yet.
    barriers: HashMap<Ticket, R>,
    /// Barriers whose index is known and not applied yet, by index.
    behind: VecDeque<(LogIndex, R)>,
    next_ticket: u64,
    /// The last durable checkpoint.
    checkpointed: LogIndex,
    first_kept: Option<LogIndex>,
    ticks: u32,
    install: Install,
    relocation: Relocation,
}

impl<R> ShardReplica<R> {
    /// The replica as recovered, not yet stepped: the shard must be formed. `retention_bytes` is
    /// how much log is worth keeping for followers that lag, 0 without any.
    ///
    /// # Errors
    /// What was recovered makes no sense to Raft.
    pub fn new(
        config: GroupConfig,
        writer: ShardWriter,
        mut raft: RaftRecovered,
        retention_bytes: u64,
    ) -> Result<Self, GroupError> {
        let shard = config.shard;
        let group = Group::new(config, recovered(&mut raft))?;
        Ok(Self {
            shard,
            group,
            writer,
            places: Places::new(raft.kept),
            retention_bytes,
            outstanding: VecDeque::new(),
            appends_in_flight: 0,
            waiting: VecDeque::new(),
            proposed: HashMap::new(),
            proposing: HashMap::new(),
            barriers: HashMap::new(),
            behind: VecDeque::new(),
            next_ticket: 0,
            checkpointed: LogIndex::ZERO,
            first_kept: None,
            ticks: 0,
            install: Install::Idle,
            relocation: Relocation::Idle,
        })
    }

    /// The shard.
    #[must_use]
    pub const fn shard(&self) -> ShardId {
        self.shard
    }

    /// How the group stands.
    #[must_use]
    pub fn status(&self) -> Status {
        self.group.status()
    }

    /// The part of [`ShardReplica::status`] that costs nothing.
    #[must_use]
    pub fn brief(&self) -> Brief {
        self.group.brief()
    }

    /// See [`Group::replicated`].
    #[must_use]
    pub fn replicated(&self) -> Option<LogIndex> {
        self.group.replicated()
    }

    /// Until when reads may be answered from this replica's store without asking anyone, by the
    /// clock that steps it. To be checked again once the bytes were read.
    #[must_use]
    pub fn read_lease(&self) -> Option<Timestamp> {
        if matches!(self.install, Install::Idle) { self.group.read_lease() } else { None }
    }

    /// The last entry applied.
    #[must_use]
    pub fn applied(&self) -> LogIndex {
        self.writer.applied()
    }

    /// Whether proposals are taken in at once. While not, the caller leaves them where they are,
    /// so that they gather into fewer entries. A replica that does not lead takes them in to refuse
    /// them.
    #[must_use]
    pub fn accepts_proposals(&self) -> bool {
        !self.leads() || (self.appends_in_flight < APPENDS_IN_FLIGHT_MAX && self.waiting.is_empty())
    }

    /// Takes one event; `actions` grows by what it makes necessary.
    ///
    /// # Panics
    /// If the caller breaks the rules of [`Event`], or an invariant is broken. Messages of peers do
    /// not panic.
    pub fn step(&mut self, now: Timestamp, event: Event<R>, actions: &mut Actions<R>) {
        self.take(now, event, actions);
        self.go_on_installing(now, actions);
        self.propose_waiting(now, actions);
        self.begin_relocation(actions);
    }

    /// Gives up everything that waits for an answer.
    #[must_use]
    pub fn close(self) -> Vec<R> {
        let commands = self.proposed.into_values().flat_map(|work| match work {
            Work::Commands { replies, .. } => replies,
            Work::Change(reply) => vec![reply],
        });
        let waiting = self.waiting.into_iter().flat_map(|packed| packed.replies);
        let reads = self.barriers.into_values().chain(self.behind.into_iter().map(|(_, r)| r));
        commands.chain(waiting).chain(reads).collect()
    }

    fn leads(&self) -> bool {
        self.group.leadership().role == Role::Leader
    }

    fn take(&mut self, now: Timestamp, event: Event<R>, actions: &mut Actions<R>) {
        match event {
            Event::Tick => {
                self.step_group(now, Input::Tick, actions);
                self.ticks += 1;
                if self.ticks >= RETENTION_TICKS {
                    self.ticks = 0;
                    self.review_retention(now, actions);
                }
            }
            Event::Message(bytes) => {
                if self.outstanding.len() < APPENDS_OUTSTANDING_MAX {
                    self.step_group(now, Input::Message(bytes), actions);
                }
            }
            Event::Propose(commands) => self.take_commands(now, commands, actions),
            Event::Barrier(reply) => {
                let ticket = self.ticket();
                self.barriers.insert(ticket, reply);
                self.step_group(now, Input::Read(vec![ticket]), actions);
            }
            Event::ChangeMembership(change, reply) => {
                let ticket = self.ticket();
                self.proposed.insert(ticket, Work::Change(reply));
                self.step_group(now, Input::ChangeMembership { ticket, change }, actions);
            }
            Event::Persisted(persisted) => self.take_persisted(now, persisted, actions),
            Event::Fetched { first, entries } => {
                self.step_group(now, Input::Fetched { first, entries }, actions);
            }
            Event::ReadBack(entries) => self.relocate(entries, actions),
            Event::Checkpointed(checkpoint) => {
                let Checkpointed { applied, term, first_kept, holds_up_log } = checkpoint;
                self.checkpointed = self.checkpointed.max(applied);
                self.first_kept = Some(first_kept);
                if holds_up_log && self.relocation == Relocation::Idle {
                    self.relocation = Relocation::Wanted;
                }
                self.step_group(now, Input::Checkpointed { index: applied, term }, actions);
                self.review_retention(now, actions);
            }
            Event::LeaderLost => self.step_group(now, Input::LeaderLost, actions),
            Event::PeerUnreachable(peer) => {
                self.step_group(now, Input::PeerUnreachable(peer), actions);
            }
            Event::TransferLeader(to) => {
                self.step_group(now, Input::TransferLeader(to), actions);
            }
            Event::Campaign => self.step_group(now, Input::Campaign, actions),
            Event::ResyncReady(snapshot) => self.prepare_install(now, snapshot, actions),
            Event::Installed => self.finish_install(now, actions),
        }
    }

    /// Begins the switch to a snapshot: from here on entries that arrive count as lost, so that
    /// none is acknowledged that is void afterwards.
    fn prepare_install(
        &mut self,
        now: Timestamp,
        snapshot: ShardSnapshot,
        actions: &mut Actions<R>,
    ) {
        let wanted = self.group.wants_snapshot(snapshot.applied, snapshot.applied_term);
        if !matches!(self.install, Install::Idle) || self.leads() || !wanted {
            actions.resync_dropped = true;
            return;
        }
        self.step_group(now, Input::HoldLog(true), actions);
        self.install = Install::Waiting(snapshot);
    }

    /// Once what was on its way to the log has arrived, hands the snapshot to the store, if it is
    /// still wanted.
    fn go_on_installing(&mut self, now: Timestamp, actions: &mut Actions<R>) {
        if !self.log_is_idle() {
            return;
        }
        let snapshot = match std::mem::replace(&mut self.install, Install::Idle) {
            Install::Waiting(snapshot) => snapshot,
            other => {
                self.install = other;
                return;
            }
        };
        let (index, term) = (snapshot.applied, snapshot.applied_term);
        if self.leads() || !self.group.wants_snapshot(index, term) {
            self.step_group(now, Input::HoldLog(false), actions);
            actions.resync_dropped = true;
            return;
        }
        let membership = snapshot.membership.clone();
        self.install = Install::Running { index, term, membership };
        let hard_state = log_hard_state(self.group.hard_state());
        actions.install = Some(InstallPlan { snapshot, hard_state });
    }

    fn finish_install(&mut self, now: Timestamp, actions: &mut Actions<R>) {
        let Install::Running { index, term, membership } =
            std::mem::replace(&mut self.install, Install::Idle)
        else {
            unreachable!("installed before it was asked for")
        };
        assert_eq!(self.writer.applied(), index, "the store has another snapshot");
        self.places.clear();
        self.checkpointed = index;
        self.first_kept = None;
        actions.membership_changed = true;
        // Whatever ended while this replica was away.
        actions.sessions_ended = true;
        let input = Input::SnapshotInstalled { index, term, membership };
        self.step_group(now, input, actions);
    }

    /// Whether nothing of this group is on its way to the log.
    fn log_is_idle(&self) -> bool {
        self.outstanding.is_empty() && self.relocation != Relocation::Writing
    }

    /// Has those entries read that keep the log's oldest part, if that is asked for and possible.
    fn begin_relocation(&mut self, actions: &mut Actions<R>) {
        let ready = self.log_is_idle() && matches!(self.install, Install::Idle);
        if self.relocation != Relocation::Wanted || !ready {
            return;
        }
        let places: Vec<EntryPlace> = self.places.above(self.writer.applied()).collect();
        if places.is_empty() {
            // Applied meanwhile: the next checkpoint lets go of them. Of others that were there
            // nothing counts.
            self.end_relocation(actions);
            return;
        }
        self.relocation = Relocation::Reading;
        actions.read_back = Some(places);
    }

    /// Writes copies of the entries read, if they still are all that is not applied.
    fn relocate(&mut self, entries: Vec<Entry>, actions: &mut Actions<R>) {
        if self.relocation != Relocation::Reading {
            return;
        }
        let applied = self.writer.applied();
        let entries: Vec<Entry> =
            entries.into_iter().filter(|entry| entry.index > applied).collect();
        let read = entries.iter().map(|entry| (entry.index, entry.term));
        let wanted = self.places.above(applied).map(|place| (place.index, place.term));
        let ready = self.log_is_idle() && matches!(self.install, Install::Idle);
        if entries.is_empty() || !ready || !read.eq(wanted) {
            // The next checkpoint asks again if need be.
            self.relocation = Relocation::Idle;
            return;
        }
        self.relocation = Relocation::Writing;
        actions.log_writes.push(LogWrite::of_copies(entries));
    }

    fn end_relocation(&mut self, actions: &mut Actions<R>) {
        self.relocation = Relocation::Idle;
        let applied = self.writer.applied();
        actions.log_tail = Some(LogTail { applied, from: self.places.begin_above(applied) });
    }

    fn take_commands(
        &mut self,
        now: Timestamp,
        commands: Vec<(Bytes, R)>,
        actions: &mut Actions<R>,
    ) {
        if !self.leads() {
            let leader = self.group.leadership().leader;
            let refused = commands.into_iter().map(|(_, r)| (r, Answer::NotLeader(leader)));
            actions.answers.extend(refused);
            return;
        }
        let mut packer = Packer::new(now);
        for (command, reply) in commands {
            packer.add(command, reply);
        }
        self.waiting.extend(packer.finish());
    }

    fn propose_waiting(&mut self, now: Timestamp, actions: &mut Actions<R>) {
        if self.waiting.is_empty() || !self.leads() {
            return;
        }
        if self.appends_in_flight >= APPENDS_IN_FLIGHT_MAX {
            return;
        }
        let (mut proposals, mut bytes) = (Vec::new(), 0);
        while let Some(packed) = self
            .waiting
            .pop_front_if(|packed| bytes == 0 || bytes + packed.data.len() <= PROPOSE_BYTES_MAX)
        {
            bytes += packed.data.len();
            let ticket = self.ticket();
            let Packed { data, replies, since } = packed;
            proposals.push(Proposal { ticket, data: data.clone() });
            self.proposing.insert(ticket, data);
            self.proposed.insert(ticket, Work::Commands { replies, since });
        }
        self.step_group(now, Input::Propose(proposals), actions);
        // Refusals come within the step that proposes, or not at all.
        self.proposing.clear();
    }

    fn take_persisted(&mut self, now: Timestamp, persisted: Persisted, actions: &mut Actions<R>) {
        let Persisted { ready, places } = persisted;
        let Some(ready) = ready else {
            if places.is_empty() {
                self.relocation = Relocation::Idle;
            } else {
                self.places.copied(places);
                self.end_relocation(actions);
            }
            return;
        };
        if !places.is_empty() {
            self.appends_in_flight -= 1;
        }
        self.places.persisted(places);
        self.step_group(now, Input::Persisted(ready), actions);
        while let Some((_, messages)) =
            self.outstanding.pop_front_if(|(number, _)| *number <= ready)
        {
            actions.send.extend(messages);
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Steps the group and carries out what it asks for, as far as that is done here.
    fn step_group(&mut self, now: Timestamp, input: Input, actions: &mut Actions<R>) {
        let effects = self.group.step(now, input);
        self.carry_out(now, effects, actions);
    }

    fn carry_out(&mut self, now: Timestamp, effects: Effects, actions: &mut Actions<R>) {
        let Effects { appends, send_now, apply, rejected, reads_ready, .. } = effects;
        actions.send.extend(send_now);
        for append in appends {
            self.hand_out(append, actions);
        }
        if let Some(refused) = effects.refused {
            tracing::warn!(shard = %self.shard, %refused, "a peer's message makes no sense");
        }
        if effects.snapshot_offered.is_some() {
            actions.snapshot_offered = effects.snapshot_offered;
        }
        for fetch in effects.fetch {
            let places = self.places.range(fetch.first, fetch.last, fetch.bytes_max);
            actions.fetch.push(FetchPlan { first: fetch.first, places });
        }
        self.take_back(rejected, actions);
        for (ticket, index) in reads_ready {
            if let Some(reply) = self.barriers.remove(&ticket) {
                self.behind.push_back((index, reply));
            }
        }
        if let Some(now_leads) = effects.role_changed
            && now_leads.role != Role::Leader
        {
            self.lose_leadership(now_leads.leader, actions);
        }
        let applied = self.apply(now, apply, actions);
        self.answer_barriers(actions);
        if let Some(applied) = applied {
            self.step_group(now, Input::Applied(applied), actions);
        }
    }

    fn hand_out(&mut self, mut append: Append, actions: &mut Actions<R>) {
        if !append.entries.is_empty() {
            self.appends_in_flight += 1;
        }
        let messages = std::mem::take(&mut append.send_after_persist);
        self.outstanding.push_back((append.ready, messages));
        actions.log_writes.push(LogWrite::of_append(append));
    }

    /// Keeps refused entries to propose them again, in their order, where that makes sense. They
    /// cannot take effect twice: every reason but an unknown fate means that the entry is not, and
    /// never will be, in the log.
    fn take_back(&mut self, mut rejected: Vec<(Ticket, RejectReason)>, actions: &mut Actions<R>) {
        rejected.sort_by_key(|(ticket, _)| *ticket);
        for (ticket, reason) in rejected.into_iter().rev() {
            assert!(reason != RejectReason::TooLarge, "commands are packed to fit an entry");
            if let Some(reply) = self.barriers.remove(&ticket) {
                actions.answers.push((reply, refusal(reason)));
                continue;
            }
            let data = self.proposing.remove(&ticket);
            match (self.proposed.remove(&ticket), data) {
                (None, _) => {}
                (Some(Work::Change(reply)), _) => {
                    let answer = match reason {
                        RejectReason::NotLeader { .. } | RejectReason::Unknown => refusal(reason),
                        _ => Answer::Refused(reason),
                    };
                    actions.answers.push((reply, answer));
                }
                (Some(Work::Commands { replies, since }), Some(data))
                    if matches!(reason, RejectReason::Full | RejectReason::Transferring) =>
                {
                    self.waiting.push_front(Packed { data, replies, since });
                }
                (Some(Work::Commands { replies, .. }), _) => {
                    let answer = refusal(reason);
                    actions.answers.extend(replies.into_iter().map(|r| (r, answer.clone())));
                }
            }
        }
    }

    /// What was not logged is refused; what was logged may yet be committed by the next leader, so
    /// its fate is unknown here.
    fn lose_leadership(&mut self, leader: Option<ReplicaId>, actions: &mut Actions<R>) {
        for packed in self.waiting.drain(..) {
            let refused = packed.replies.into_iter().map(|r| (r, Answer::NotLeader(leader)));
            actions.answers.extend(refused);
        }
        let mut lost: Vec<_> = self.proposed.drain().collect();
        lost.sort_by_key(|(ticket, _)| *ticket);
        for (_, work) in lost {
            match work {
                Work::Commands { replies, .. } => {
                    actions.answers.extend(replies.into_iter().map(|r| (r, Answer::Lost)));
                }
                Work::Change(reply) => actions.answers.push((reply, Answer::Lost)),
            }
        }
        for (_, reply) in self.behind.drain(..) {
            actions.answers.push((reply, Answer::NotLeader(leader)));
        }
    }

    /// Applies committed entries and answers their proposers. Returns the last index applied.
    fn apply(
        &mut self,
        now: Timestamp,
        committed: Vec<Committed>,
        actions: &mut Actions<R>,
    ) -> Option<LogIndex> {
        let last = committed.last()?.entry.index;
        for Committed { entry, ticket, change, membership } in committed {
            let Entry { index, term, kind, data } = entry;
            let place = self.places.get(index);
            let Some(place) = place.filter(|place| place.term == term) else {
                panic!("entry {index} of term {term} is applied but not persisted: {place:?}");
            };
            let applied = match (kind, change) {
                (EntryKind::Command, _) => Applied::Command(&data),
                (_, Some(change)) => Applied::Membership(change),
                (_, None) => Applied::Empty,
            };
            let outcomes = self.writer.apply(index, term, applied, place.position);
            actions.membership_changed |= membership.is_some();
            actions.sessions_ended |= outcomes.iter().any(ends_sessions);
            match ticket.and_then(|ticket| self.proposed.remove(&ticket)) {
                None => {}
                Some(Work::Change(reply)) => actions.answers.push((reply, Answer::Changed)),
                Some(Work::Commands { replies, since }) => {
                    self.answer(now, replies, since, outcomes, actions);
                }
            }
        }
        Some(last)
    }

    fn answer(
        &self,
        now: Timestamp,
        replies: Vec<R>,
        since: Timestamp,
        outcomes: Vec<Outcome>,
        actions: &mut Actions<R>,
    ) {
        assert_eq!(outcomes.len(), replies.len(), "one outcome a command");
        actions.commit_times.push(Duration::from_nanos(now.0.saturating_sub(since.0)));
        let answers = outcomes.into_iter().map(Answer::Outcome);
        actions.answers.extend(replies.into_iter().zip(answers));
    }

    fn answer_barriers(&mut self, actions: &mut Actions<R>) {
        let applied = self.writer.applied();
        // Read indexes rise, so that the first one that must wait holds back none that need not.
        while let Some((_, reply)) = self.behind.pop_front_if(|(index, _)| *index <= applied) {
            actions.answers.push((reply, Answer::Ready));
        }
    }

    /// Forgets entries that a checkpoint covers and that are too old to be worth keeping.
    fn review_retention(&mut self, now: Timestamp, actions: &mut Actions<R>) {
        let mut above = self.places.keep_above(self.checkpointed, self.retention_bytes);
        if let Some(first) = self.first_kept {
            // The node's log needed the room.
            above = above.max(LogIndex(first.0.saturating_sub(1)).min(self.checkpointed));
        }
        if above <= self.group.status().compacted {
            return;
        }
        self.places.forget_through(above);
        actions.keep_above = Some(above);
        self.step_group(now, Input::Compacted(above), actions);
    }
}

/// Whether sessions were ended by what this came of.
const fn ends_sessions(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::SessionClosed => true,
        Outcome::SessionsEnded(count) | Outcome::VolumeDeleted { sessions_ended: count } => {
            *count > 0
        }
        _ => false,
    }
}

/// The answer to something that was not logged, or whose fate is unknown.
const fn refusal(reason: RejectReason) -> Answer {
    match reason {
        RejectReason::NotLeader { leader } => Answer::NotLeader(leader),
        RejectReason::Unknown => Answer::Lost,
        _ => Answer::NotLeader(None),
    }
}
