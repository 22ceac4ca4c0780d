//! Replicas of one group in memory, driven step by step from one seed: a network that loses,
//! repeats and reorders, disks that take their time and lose what is not durable, and state
//! machines that apply late.
//!
//! The cluster checks every effect against what Raft promises, with nothing but the public API and
//! the disks it keeps itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use bytes::Bytes;
use nbd_consensus::{
    Append, Committed, Effects, Entry, Fetch, Group, GroupConfig, HardState, Input, OutMessage,
    Proposal, Recovered, RejectReason, Role, Ticket,
};
use nbd_topology::{LogIndex, ReplicaId, ShardId, Term};
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
    /// The replica it was made at restarted.
    Unknown,
}

/// What survives a crash.
#[derive(Debug, Default)]
struct Disk {
    hard_state: HardState,
    entries: BTreeMap<u64, Entry>,
    compacted: (LogIndex, Term),
    /// State machine and hard state as of the last checkpoint.
    checkpoint: (LogIndex, HardState),
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
    /// Proposals made here in this life, without an outcome.
    open: BTreeSet<Ticket>,
}

pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    pub(crate) random: Random,
    network: Vec<(usize, ReplicaId, Bytes)>,
    /// Links that lose everything, by place of sender and receiver.
    pub(crate) cut: BTreeSet<(usize, usize)>,
    /// Every entry that any replica was told is committed.
    pub(crate) committed: BTreeMap<u64, (Term, Bytes)>,
    pub(crate) outcomes: HashMap<Ticket, Outcome>,
    /// For each read under way, the highest index anyone knew to be committed when it began.
    reads: HashMap<Ticket, u64>,
    pub(crate) reads_served: usize,
    pub(crate) fetches: usize,
    pub(crate) elections: usize,
    tickets: u64,
}

/// Data that no other proposal has.
pub(crate) fn data_of(ticket: Ticket) -> Bytes {
    Bytes::from(format!("data of {}", ticket.0))
}

impl Cluster {
    /// `size` replicas whose election timeouts are pinned, each to its own.
    pub(crate) fn new(size: usize, seed: u64, change: impl Fn(&mut GroupConfig)) -> Self {
        let ids: Vec<_> = (1..=size as u64).filter_map(ReplicaId::new).collect();
        let node = |(place, id): (u32, &ReplicaId)| {
            let mut config = GroupConfig::new(ShardId(0), *id, ids.clone());
            config.election_ticks_jitter = false;
            config.election_ticks = 10 + 4 * place;
            change(&mut config);
            let group = Group::new(config.clone(), Recovered::default()).expect("valid settings");
            Node {
                id: *id,
                config,
                group,
                disk: Disk::default(),
                appends: VecDeque::new(),
                to_apply: VecDeque::new(),
                applied: LogIndex::ZERO,
                open: BTreeSet::new(),
            }
        };
        Self {
            nodes: (0..).zip(&ids).map(node).collect(),
            random: Random(seed),
            network: Vec::new(),
            cut: BTreeSet::new(),
            committed: BTreeMap::new(),
            outcomes: HashMap::new(),
            reads: HashMap::new(),
            reads_served: 0,
            fetches: 0,
            elections: 0,
            tickets: 0,
        }
    }

    pub(crate) fn group(&self, at: usize) -> &Group {
        &self.nodes[at].group
    }

    /// The leader of the highest term.
    pub(crate) fn leader(&self) -> Option<usize> {
        let leads = |at: &usize| self.group(*at).status().role == Role::Leader;
        (0..self.nodes.len()).filter(leads).max_by_key(|at| self.group(*at).status().term)
    }

    pub(crate) fn step(&mut self, at: usize, input: Input) {
        let effects = self.nodes[at].group.step(input);
        self.absorb(at, effects);
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
        node.applied = committed.entry.index;
        self.step(at, Input::Applied(committed.entry.index));
        true
    }

    /// Checkpoints a replica's state machine, and forgets the log that is in all checkpoints.
    pub(crate) fn checkpoint(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let hard_state = node.group.hard_state();
        assert!(node.applied <= hard_state.commit && hard_state.commit.0 <= node.disk.last());
        node.disk.checkpoint = (node.applied, hard_state);
        let everywhere = self.nodes.iter().map(|node| node.disk.checkpoint.0.0).min();
        let index = everywhere.unwrap_or(0);
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
        let (applied, checkpointed) = node.disk.checkpoint;
        let mut hard_state = node.disk.hard_state;
        if checkpointed.term > hard_state.term
            || (checkpointed.term == hard_state.term && checkpointed.vote.is_some())
        {
            (hard_state.term, hard_state.vote) = (checkpointed.term, checkpointed.vote);
        }
        hard_state.commit = hard_state.commit.max(checkpointed.commit);
        let recovered = Recovered {
            hard_state,
            applied,
            compacted: node.disk.compacted,
            terms: node.disk.entries.values().map(|entry| entry.term).collect(),
            tail: node.disk.entries.range(applied.0 + 1..).map(|(_, e)| e.clone()).collect(),
        };
        node.applied = applied;
        let group = Group::new(node.config.clone(), recovered).expect("a crash is survivable");
        for ticket in std::mem::replace(&mut node.group, group).close() {
            if self.reads.remove(&ticket).is_none() {
                assert!(node.open.remove(&ticket));
                self.outcomes.insert(ticket, Outcome::Unknown);
            }
        }
        assert!(node.open.is_empty(), "tickets forgotten: {:?}", node.open);
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

    /// Does everything there is to do without time passing.
    pub(crate) fn settle(&mut self) {
        loop {
            let mut busy = self.deliver(false);
            for at in 0..self.nodes.len() {
                busy |= self.persist(at) | self.apply(at);
            }
            if !busy {
                return;
            }
        }
    }

    /// Lets time pass, settling after each tick.
    pub(crate) fn run(&mut self, ticks: usize) {
        for _ in 0..ticks {
            for at in 0..self.nodes.len() {
                self.step(at, Input::Tick);
            }
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
        self.run(20);
        let last = self.committed.len() as u64;
        for node in &self.nodes {
            assert_eq!(node.applied, LogIndex(last), "replica {} lags", node.id);
            assert!(node.open.is_empty(), "replica {} has {:?}", node.id, node.open);
        }
        assert!(self.reads.is_empty());
        for (ticket, outcome) in &self.outcomes {
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
        assert_eq!(effects.refused, None);
        self.nodes[at].appends.extend(effects.appends);
        self.send(at, effects.send_now);
        if effects.role_changed.is_some_and(|now| now.role == Role::Leader) {
            self.elections += 1;
        }
        for committed in effects.apply {
            self.check_committed(at, &committed);
            if let Some(ticket) = committed.ticket {
                assert_eq!(committed.entry.data, data_of(ticket));
                self.end(at, ticket, Outcome::Applied);
            }
            self.nodes[at].to_apply.push_back(committed);
        }
        for (ticket, reason) in effects.rejected {
            match reason {
                _ if self.reads.remove(&ticket).is_some() => {}
                RejectReason::Superseded => self.end(at, ticket, Outcome::Superseded),
                _ => self.end(at, ticket, Outcome::Refused),
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
