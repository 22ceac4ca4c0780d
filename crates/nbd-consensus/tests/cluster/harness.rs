//! Replicas of one group in memory, driven step by step from one seed: a network that loses,
//! repeats and reorders, disks that take their time and lose what is not durable, state machines
//! that apply late, and clocks that do not run alike.
//!
//! The cluster checks every effect against what Raft promises, with nothing but the public API and
//! the disks it keeps itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use bytes::Bytes;
use nbd_consensus::{
    Append, Committed, Effects, Entry, EntryKind, Fetch, Group, GroupConfig, HardState, Input,
    Leadership, MessageError, OutMessage, Proposal, Recovered, RejectReason, Role, Ticket,
    Timestamp, decode_change,
};
use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, ShardId, Term};
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};

/// SplitMix64: small, good enough, and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("below a usize")
    }
}

/// How a proposal ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Applied,
    Superseded,
    Refused,
    /// The replica it was made at restarted, or took a snapshot.
    Unknown,
}

/// One tick, in nanoseconds.
pub(crate) const TICK: u64 = 25_000_000;

/// What survives a crash.
#[derive(Debug)]
struct Disk {
    hard_state: HardState,
    entries: BTreeMap<u64, Entry>,
    compacted: (LogIndex, Term),
    checkpoint: Checkpoint,
}

/// State machine and hard state as of the last checkpoint.
#[derive(Debug, Clone)]
struct Checkpoint {
    index: LogIndex,
    term: Term,
    members: Membership,
    hard_state: HardState,
}

pub(crate) struct Node {
    id: ReplicaId,
    config: GroupConfig,
    group: Group,
    disk: Disk,
    /// Appends handed out and not durable.
    appends: VecDeque<Append>,
    /// Entries handed out and not applied.
    to_apply: VecDeque<Committed>,
    applied: LogIndex,
    applied_term: Term,
    /// As of `applied`.
    members: Membership,
    /// Proposals made here in this life, without an outcome.
    open: BTreeSet<Ticket>,
    leadership: Option<Leadership>,
    /// Nanoseconds of this replica's clock for a thousand of the true one.
    rate: u64,
    /// When this replica's clock shows the next tick.
    next_tick: u64,
    /// Who offered a snapshot that was not yet fetched.
    offer: Option<ReplicaId>,
    held: bool,
}

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    pub(crate) random: Random,
    network: Vec<(usize, ReplicaId, Bytes)>,
    /// True time, in nanoseconds.
    pub(crate) time: u64,
    /// Whether replicas forget their log as soon as they have a checkpoint, so that others need it.
    pub(crate) forgetful: bool,
    change: Box<dyn Fn(&mut GroupConfig)>,
    /// Links that lose everything, by place of sender and receiver.
    pub(crate) cut: BTreeSet<(usize, usize)>,
    /// Every entry that any replica was told is committed.
    pub(crate) committed: BTreeMap<u64, (Term, Bytes)>,
    pub(crate) outcomes: HashMap<Ticket, Outcome>,
    /// For each read under way, the highest index anyone knew to be committed when it began.
    reads: HashMap<Ticket, u64>,
    /// Membership changes proposed.
    changes: BTreeSet<Ticket>,
    refusals: HashMap<Ticket, RejectReason>,
    /// How many replicas the group began with.
    founders: usize,
    pub(crate) reads_served: usize,
    pub(crate) fetches: usize,
    pub(crate) elections: usize,
    /// Snapshots installed.
    pub(crate) installed: usize,
    /// Membership changes in force.
    pub(crate) changed: usize,
    /// Moments at which a leader held a lease.
    pub(crate) leases: usize,
    /// Messages sent so far.
    pub(crate) sent: usize,
    tickets: u64,
}

/// Data that no other proposal has.
pub(crate) fn data_of(ticket: Ticket) -> Bytes {
    Bytes::from(format!("data of {}", ticket.0))
}

impl Cluster {
    /// `size` replicas that wait differently long before they stand for election.
    pub(crate) fn new(size: usize, seed: u64, change: impl Fn(&mut GroupConfig) + 'static) -> Self {
        let mut cluster = Self {
            nodes: Vec::new(),
            random: Random(seed),
            network: Vec::new(),
            time: 1_000_000_000,
            forgetful: false,
            change: Box::new(change),
            cut: BTreeSet::new(),
            committed: BTreeMap::new(),
            outcomes: HashMap::new(),
            reads: HashMap::new(),
            changes: BTreeSet::new(),
            refusals: HashMap::new(),
            founders: size,
            reads_served: 0,
            fetches: 0,
            elections: 0,
            installed: 0,
            changed: 0,
            leases: 0,
            sent: 0,
            tickets: 0,
        };
        let members = Membership::of_voters((1..=size as u64).filter_map(ReplicaId::new));
        for _ in 0..size {
            cluster.add_node(members.clone());
        }
        cluster
    }

    /// A replica that never ran, which takes these for the members.
    fn add_node(&mut self, members: Membership) -> ReplicaId {
        let place = u32::try_from(self.nodes.len()).expect("few");
        let id = ReplicaId::new(u64::from(place) + 1).expect("above 0");
        let mut config = GroupConfig::new(ShardId(0), id);
        config.restarted = false;
        config.election_ticks = 10;
        config.election_ticks_jitter = false;
        config.election_ticks_extra = 4 * place;
        (self.change)(&mut config);
        let recovered = Recovered { membership: members.clone(), ..Recovered::default() };
        let checkpoint = Checkpoint {
            index: LogIndex::ZERO,
            term: Term::ZERO,
            members: members.clone(),
            hard_state: HardState::default(),
        };
        self.nodes.push(Node {
            id,
            group: Group::new(config.clone(), recovered).expect("valid settings"),
            config,
            disk: Disk {
                hard_state: HardState::default(),
                entries: BTreeMap::new(),
                compacted: (LogIndex::ZERO, Term::ZERO),
                checkpoint,
            },
            appends: VecDeque::new(),
            to_apply: VecDeque::new(),
            applied: LogIndex::ZERO,
            applied_term: Term::ZERO,
            members,
            open: BTreeSet::new(),
            leadership: None,
            rate: 1000,
            next_tick: 0,
            offer: None,
            held: false,
        });
        id
    }

    /// Another replica, which nobody knows yet.
    pub(crate) fn newcomer(&mut self) -> ReplicaId {
        let founders = (1..=self.founders as u64).filter_map(ReplicaId::new);
        let members = Membership::of_voters(founders);
        self.add_node(members)
    }

    /// Lets each clock run up to 4 % fast or slow, and start its ticks when it likes.
    pub(crate) fn skew(&mut self) {
        for at in 0..self.nodes.len() {
            self.skew_node(at);
        }
    }

    fn skew_node(&mut self, at: usize) {
        self.nodes[at].rate = 960 + self.random.below(81) as u64;
        let phase = self.random.below(25) as u64 * 1_000_000;
        self.nodes[at].next_tick = self.clock(at) + phase;
    }

    /// What a replica's clock shows.
    pub(crate) fn clock(&self, at: usize) -> u64 {
        self.time / 1000 * self.nodes[at].rate
    }

    /// Lets true time pass, and each replica tick whose clock says so: never two ticks less than
    /// one apart.
    pub(crate) fn pass(&mut self, nanoseconds: u64) {
        self.time += nanoseconds;
        for at in 0..self.nodes.len() {
            let clock = self.clock(at);
            if clock >= self.nodes[at].next_tick {
                self.nodes[at].next_tick = clock + TICK;
                self.step(at, Input::Tick);
            }
        }
        self.check_leases();
    }

    /// At most one leader holds a lease, and while it does nobody leads a later term, nor is
    /// anything committed in one.
    fn check_leases(&mut self) {
        for at in 0..self.nodes.len() {
            let clock = self.clock(at);
            let valid = |until: Timestamp| clock < until.0;
            if !self.nodes[at].group.read_lease().is_some_and(valid) {
                continue;
            }
            self.leases += 1;
            let term = self.nodes[at].leadership.expect("leads").term;
            let later = self.nodes.iter().filter_map(|node| node.leadership);
            let mut later = later.filter(|now| now.role == Role::Leader && now.term > term);
            assert_eq!(later.next(), None, "replica {} holds a lease of {term}", at + 1);
            let last = self.committed.last_key_value();
            let last_term = last.map_or(Term::ZERO, |(_, (term, _))| *term);
            assert!(last_term <= term, "replica {} reads what is stale", at + 1);
        }
    }

    pub(crate) fn group(&self, at: usize) -> &Group {
        &self.nodes[at].group
    }

    pub(crate) fn id(&self, at: usize) -> ReplicaId {
        self.nodes[at].id
    }

    /// Whether a replica has never had a part in the group.
    pub(crate) fn is_fresh(&self, at: usize) -> bool {
        let node = &self.nodes[at];
        at >= self.founders && node.disk.last() == 0 && node.applied == LogIndex::ZERO
    }

    pub(crate) fn place(&self, id: ReplicaId) -> usize {
        self.nodes.iter().position(|node| node.id == id).expect("was made")
    }

    /// The leader of the highest term.
    pub(crate) fn leader(&self) -> Option<usize> {
        let leads = |at: &usize| self.group(*at).status().role == Role::Leader;
        (0..self.nodes.len()).filter(leads).max_by_key(|at| self.group(*at).status().term)
    }

    pub(crate) fn step(&mut self, at: usize, input: Input) {
        let now = Timestamp(self.clock(at));
        let effects = self.nodes[at].group.step(now, input);
        self.absorb(at, effects);
        self.check_leases();
    }

    /// Asks a replica to change the members.
    pub(crate) fn change(&mut self, at: usize, change: MembershipChange) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.nodes[at].open.insert(ticket);
        self.changes.insert(ticket);
        self.step(at, Input::ChangeMembership { ticket, change });
        ticket
    }

    /// As `change`, and says why it was refused, if it was.
    pub(crate) fn change_refused(
        &mut self,
        at: usize,
        change: MembershipChange,
    ) -> Option<RejectReason> {
        let ticket = self.change(at, change);
        self.refusals.get(&ticket).copied()
    }

    pub(crate) fn propose(&mut self, at: usize, count: u64) -> Vec<Ticket> {
        let tickets: Vec<_> = (1..=count).map(|n| Ticket(self.tickets + n)).collect();
        self.tickets += count;
        self.nodes[at].open.extend(&tickets);
        let proposal = |&ticket: &Ticket| Proposal { ticket, data: data_of(ticket) };
        self.step(at, Input::Propose(tickets.iter().map(proposal).collect()));
        tickets
    }

    pub(crate) fn read(&mut self, at: usize) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        let floor = self.committed.last_key_value().map_or(0, |(index, _)| *index);
        self.reads.insert(ticket, floor);
        self.step(at, Input::Read(vec![ticket]));
    }

    /// Makes the oldest append of a replica durable, and then sends what waited for it.
    pub(crate) fn persist(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let Some(append) = node.appends.pop_front() else { return false };
        assert!(append.must_sync != append.is_empty());
        if let Some(hard_state) = append.hard_state {
            assert!(hard_state.term >= node.disk.hard_state.term);
            let last = node.disk.last();
            assert!(hard_state.commit.0 <= last, "a crash before the entries would be fatal");
            node.disk.hard_state = hard_state;
        }
        if let Some(first) = append.entries.first() {
            node.disk.entries.split_off(&first.index.0);
            node.disk.entries.extend(append.entries.iter().map(|e| (e.index.0, e.clone())));
        }
        self.step(at, Input::Persisted(append.ready));
        self.send(at, append.send_after_persist);
        true
    }

    /// Applies the oldest entry handed out to a replica.
    pub(crate) fn apply(&mut self, at: usize) -> bool {
        let node = &mut self.nodes[at];
        let Some(committed) = node.to_apply.pop_front() else { return false };
        let Entry { index, term, kind, data } = &committed.entry;
        (node.applied, node.applied_term) = (*index, *term);
        let change = (*kind != EntryKind::Command).then(|| decode_change(data)).flatten();
        let after = change.and_then(|change| node.members.after(change));
        assert_eq!(after, committed.membership);
        assert_eq!(committed.change, after.as_ref().and(change));
        if let Some(after) = after {
            node.members = after;
            self.changed += 1;
        }
        self.step(at, Input::Applied(committed.entry.index));
        true
    }

    /// Checkpoints a replica's state machine, and forgets the log that is in all checkpoints, or if
    /// forgetful all that is in its own.
    pub(crate) fn checkpoint(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let hard_state = node.group.hard_state();
        assert!(node.applied <= hard_state.commit && hard_state.commit.0 <= node.disk.last());
        let (index, term) = (node.applied, node.applied_term);
        let members = node.members.clone();
        node.disk.checkpoint = Checkpoint { index, term, members, hard_state };
        self.step(at, Input::Checkpointed { index, term });
        let everywhere = self.nodes.iter().map(|node| node.disk.checkpoint.index.0).min();
        let index = if self.forgetful { index.0 } else { everywhere.unwrap_or(0) };
        let node = &mut self.nodes[at];
        if let Some(term) = node.disk.entries.get(&index).map(|entry| entry.term) {
            node.disk.compacted = (LogIndex(index), term);
            node.disk.entries = node.disk.entries.split_off(&(index + 1));
            self.step(at, Input::Compacted(LogIndex(index)));
        }
    }

    /// Loses power: what is not durable is gone, and the state machine is as of its checkpoint.
    pub(crate) fn crash(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        node.appends.clear();
        node.to_apply.clear();
        let Checkpoint { index: applied, term: applied_term, members, hard_state: checkpointed } =
            node.disk.checkpoint.clone();
        let mut hard_state = node.disk.hard_state;
        if checkpointed.term > hard_state.term
            || (checkpointed.term == hard_state.term && checkpointed.vote.is_some())
        {
            (hard_state.term, hard_state.vote) = (checkpointed.term, checkpointed.vote);
        }
        hard_state.commit = hard_state.commit.max(checkpointed.commit);
        let recovered = Recovered {
            hard_state,
            membership: members.clone(),
            applied,
            compacted: node.disk.compacted,
            terms: node.disk.entries.values().map(|entry| entry.term).collect(),
            tail: node.disk.entries.range(applied.0 + 1..).map(|(_, e)| e.clone()).collect(),
        };
        (node.applied, node.applied_term, node.members) = (applied, applied_term, members);
        (node.leadership, node.offer, node.held) = (None, None, false);
        node.config.restarted = true;
        let group = Group::new(node.config.clone(), recovered).expect("a crash is survivable");
        for ticket in std::mem::replace(&mut node.group, group).close() {
            if self.reads.remove(&ticket).is_none() {
                assert!(node.open.remove(&ticket));
                self.outcomes.insert(ticket, Outcome::Unknown);
            }
        }
        assert!(node.open.is_empty(), "tickets forgotten: {:?}", node.open);
        let phase = self.random.below(25) as u64 * 1_000_000;
        self.nodes[at].next_tick = self.clock(at) + phase;
    }

    /// Takes the next step towards the snapshot that a replica was offered: first holds its log,
    /// and once that has settled installs the offerer's last checkpoint, if it is still wanted.
    pub(crate) fn resync(&mut self, at: usize) -> bool {
        let Some(from) = self.nodes[at].offer else { return false };
        if !self.nodes[at].held {
            self.nodes[at].held = true;
            self.step(at, Input::HoldLog(true));
            return true;
        }
        let node = &self.nodes[at];
        let status = node.group.status();
        if status.persisted != status.last || !node.to_apply.is_empty() {
            return false;
        }
        let offered = self.nodes[self.place(from)].disk.checkpoint.clone();
        let node = &mut self.nodes[at];
        (node.offer, node.held) = (None, false);
        let Checkpoint { index, term, members, .. } = offered;
        if !node.group.wants_snapshot(index, term) {
            self.step(at, Input::HoldLog(false));
            return true;
        }
        let hard_state = HardState { commit: index, ..node.group.hard_state() };
        node.disk.checkpoint = Checkpoint { index, term, members: members.clone(), hard_state };
        node.disk.compacted = (index, term);
        node.disk.entries.clear();
        (node.applied, node.applied_term, node.members) = (index, term, members.clone());
        self.installed += 1;
        self.step(at, Input::SnapshotInstalled { index, term, membership: members });
        true
    }

    /// Delivers a message at random; with `chaos` it may be lost or delivered again later.
    pub(crate) fn deliver(&mut self, chaos: bool) -> bool {
        if self.network.is_empty() {
            return false;
        }
        let place = if chaos { self.random.below(self.network.len()) } else { 0 };
        let (from, to, bytes) = self.network.remove(place);
        if chaos && self.random.below(20) == 0 {
            self.network.push((from, to, bytes.clone()));
        }
        let Some(at) = self.nodes.iter().position(|node| node.id == to) else { return true };
        let lost = chaos && self.random.below(20) == 0;
        if !lost && !self.cut.contains(&(from, at)) {
            self.step(at, Input::Message(bytes));
        }
        true
    }

    /// Messages on their way to a replica.
    pub(crate) fn pending_for(&self, at: usize) -> usize {
        let id = self.nodes[at].id;
        self.network.iter().filter(|(_, to, _)| *to == id).count()
    }

    /// Delivers the oldest message to this replica, and lets it answer.
    pub(crate) fn deliver_to(&mut self, at: usize) -> bool {
        let id = self.nodes[at].id;
        let Some(place) = self.network.iter().position(|(_, to, _)| *to == id) else {
            return false;
        };
        let (from, _, bytes) = self.network.remove(place);
        if !self.cut.contains(&(from, at)) {
            self.step(at, Input::Message(bytes));
        }
        while self.persist(at) {}
        true
    }

    /// Settles everything until this replica is offered a snapshot, and leaves the offer alone.
    pub(crate) fn settle_messages(&mut self, offered: usize) {
        while self.nodes[offered].offer.is_none() {
            if !self.deliver(false) {
                self.pass(TICK / 100 * 105);
            }
            for at in 0..self.nodes.len() {
                while self.persist(at) || self.apply(at) {}
            }
        }
    }

    /// Forgets that a replica was offered a snapshot.
    pub(crate) fn lose_offer(&mut self, at: usize) {
        self.nodes[at].offer = None;
    }

    /// Does everything there is to do without time passing.
    pub(crate) fn settle(&mut self) {
        loop {
            let mut busy = self.deliver(false);
            for at in 0..self.nodes.len() {
                busy |= self.persist(at) | self.apply(at);
                busy |= self.resync(at);
            }
            if !busy {
                return;
            }
        }
    }

    /// Lets time pass, settling after each tick.
    pub(crate) fn run(&mut self, ticks: usize) {
        for _ in 0..ticks {
            // A little more than a tick, for the slowest clock.
            self.pass(TICK / 100 * 105);
            self.settle();
        }
    }

    pub(crate) fn isolate(&mut self, at: usize) {
        for other in 0..self.nodes.len() {
            self.cut.extend([(at, other), (other, at)]);
        }
    }

    /// Heals everything and checks that all replicas agree and that each proposal ended the way it
    /// was reported.
    pub(crate) fn check_end(&mut self) {
        self.cut.clear();
        self.run(100);
        let leader = self.leader().expect("a healed cluster has a leader");
        // An entry behind the last open proposal decides them all.
        self.propose(leader, 1);
        self.run(60);
        let last = self.committed.len() as u64;
        let leader = self.leader().expect("a healed cluster has a leader");
        let members = self.nodes[leader].members.clone();
        for node in self.nodes.iter().filter(|node| members.contains(node.id)) {
            assert_eq!(node.applied, LogIndex(last), "replica {} lags", node.id);
            assert_eq!(node.members, members, "replica {} has other members", node.id);
            assert_eq!(node.group.status().membership, members);
            assert!(node.open.is_empty(), "replica {} has {:?}", node.id, node.open);
        }
        assert!(self.reads.is_empty());
        let proposals = self.outcomes.iter().filter(|(ticket, _)| !self.changes.contains(ticket));
        for (ticket, outcome) in proposals {
            let data = data_of(*ticket);
            let times = self.committed.values().filter(|(_, value)| *value == data).count();
            match outcome {
                Outcome::Applied => assert_eq!(times, 1, "{ticket:?}"),
                Outcome::Superseded | Outcome::Refused => assert_eq!(times, 0, "{ticket:?}"),
                Outcome::Unknown => assert!(times <= 1, "{ticket:?}"),
            }
        }
    }

    fn absorb(&mut self, at: usize, effects: Effects) {
        // Of a removed member, what is still on its way.
        let stale = matches!(effects.refused, Some(MessageError::Sender { .. }));
        let stale = stale && !self.changes.is_empty();
        assert!(stale || effects.refused.is_none(), "{:?}", effects.refused);
        self.nodes[at].appends.extend(effects.appends);
        self.send(at, effects.send_now);
        if let Some(now) = effects.role_changed {
            self.elections += usize::from(now.role == Role::Leader);
            self.nodes[at].leadership = Some(now);
        }
        if let Some(offer) = effects.snapshot_offered {
            self.nodes[at].offer = Some(offer.from);
        }
        for committed in effects.apply {
            self.check_committed(at, &committed);
            if let Some(ticket) = committed.ticket {
                let change = self.changes.contains(&ticket);
                assert!(change || committed.entry.data == data_of(ticket));
                self.end(at, ticket, Outcome::Applied);
            }
            self.nodes[at].to_apply.push_back(committed);
        }
        for (ticket, reason) in effects.rejected {
            match reason {
                _ if self.reads.remove(&ticket).is_some() => {}
                RejectReason::Superseded => self.end(at, ticket, Outcome::Superseded),
                RejectReason::Unknown => self.end(at, ticket, Outcome::Unknown),
                _ => {
                    self.refusals.insert(ticket, reason);
                    self.end(at, ticket, Outcome::Refused);
                }
            }
        }
        for (ticket, index) in effects.reads_ready {
            let floor = self.reads.remove(&ticket).expect("a read is answered once");
            assert!(index.0 >= floor, "a read at {index} misses what was committed up to {floor}");
            self.reads_served += 1;
        }
        for Fetch { first, last, .. } in effects.fetch {
            self.fetches += 1;
            let entries = &self.nodes[at].disk.entries;
            let entries = entries.range(first.0..=last.0).map(|(_, e)| e.clone()).collect();
            self.step(at, Input::Fetched { first, entries });
        }
    }

    fn end(&mut self, at: usize, ticket: Ticket, outcome: Outcome) {
        assert!(self.nodes[at].open.remove(&ticket), "{ticket:?} ended twice");
        self.outcomes.insert(ticket, outcome);
    }

    /// Committed entries agree everywhere, come in order, and are durable where they are applied.
    fn check_committed(&mut self, at: usize, committed: &Committed) {
        let Entry { index, term, data, .. } = &committed.entry;
        let node = &self.nodes[at];
        let before = node.to_apply.back().map_or(node.applied, |before| before.entry.index);
        assert_eq!(*index, before.next());
        assert_eq!(node.disk.entries.get(&index.0), Some(&committed.entry), "not durable");
        let known = self.committed.entry(index.0).or_insert_with(|| (*term, data.clone()));
        assert_eq!((known.0, &known.1), (*term, data), "replicas disagree on {index}");
    }

    fn send(&mut self, at: usize, messages: Vec<OutMessage>) {
        for OutMessage { to, bytes, .. } in messages {
            self.check_promise(at, &bytes);
            self.sent += 1;
            self.network.push((at, to, bytes));
        }
    }

    /// Whatever a message promises about its sender's disk is true.
    fn check_promise(&self, at: usize, bytes: &Bytes) {
        let message = Message::parse_from_carllerche_bytes(bytes).expect("our own message");
        let disk = &self.nodes[at].disk;
        let hard_state = disk.hard_state;
        let voted = |id| ReplicaId::new(id) == hard_state.vote && message.term == hard_state.term.0;
        match message.msg_type {
            MessageType::MsgAppendResponse if !message.reject => {
                assert!(message.index <= disk.last(), "acknowledged what is not durable");
            }
            MessageType::MsgRequestVote => assert!(voted(message.from), "own vote not durable"),
            MessageType::MsgRequestVoteResponse if !message.reject => {
                assert!(voted(message.to), "vote not durable");
            }
            MessageType::MsgAppend | MessageType::MsgHeartbeat => {
                assert!(voted(message.from), "leads without a durable vote");
            }
            _ => {}
        }
    }
}

impl Disk {
    fn last(&self) -> u64 {
        self.entries.last_key_value().map_or(self.compacted.0.0, |(index, _)| *index)
    }
}
