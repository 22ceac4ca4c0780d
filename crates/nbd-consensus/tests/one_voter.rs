//! A group of one voter under any interleaving of its events.

use std::collections::VecDeque;

use bytes::Bytes;
use nbd_consensus::{
    Append, Committed, Effects, Entry, Group, GroupConfig, HardState, Input, Proposal, Recovered,
    RejectReason, Ticket, Timestamp,
};
use nbd_topology::{LogIndex, Membership, ReplicaId, ShardId, Term};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Event {
    /// Propose entries of these sizes in one batch.
    Propose(Vec<usize>),
    /// Make this many appends durable, reporting only the last.
    Persist(usize),
    /// Apply this many entries.
    Apply(usize),
    Read,
    Tick,
    /// Forget this many of the applied entries.
    Compact(u64),
    /// Lose what is not durable, and start again from what is.
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => prop::collection::vec(0_usize..150_000, 1..5).prop_map(Event::Propose),
        6 => (1_usize..4).prop_map(Event::Persist),
        6 => (1_usize..9).prop_map(Event::Apply),
        2 => Just(Event::Read),
        1 => Just(Event::Tick),
        1 => (0_u64..20).prop_map(Event::Compact),
        1 => Just(Event::Restart),
    ]
}

struct Driver {
    group: Group,
    appends: VecDeque<Append>,
    /// Durable entries; the first has index 1.
    log: Vec<Entry>,
    durable: HardState,
    to_apply: VecDeque<Committed>,
    /// Taken in this life and not handed out again, in order.
    accepted: VecDeque<(Ticket, Bytes)>,
    reads: Vec<(Ticket, LogIndex)>,
    applied: LogIndex,
    tickets: u64,
}

fn config() -> GroupConfig {
    let one = ReplicaId::new(1).expect("not 0");
    let mut config = GroupConfig::new(ShardId(0), one);
    config.entry_bytes_max = 140_000;
    config.uncommitted_bytes_max = 500_000;
    config.cache_bytes_max = 100_000;
    config
}

fn fresh() -> Recovered {
    Recovered { membership: Membership::of_voters(ReplicaId::new(1)), ..Recovered::default() }
}

impl Driver {
    fn new() -> Self {
        let mut driver = Self {
            group: Group::new(config(), fresh()).expect("valid"),
            appends: VecDeque::new(),
            log: Vec::new(),
            durable: HardState::default(),
            to_apply: VecDeque::new(),
            accepted: VecDeque::new(),
            reads: Vec::new(),
            applied: LogIndex::ZERO,
            tickets: 0,
        };
        driver.step(Input::Campaign);
        driver
    }

    fn step(&mut self, input: Input) -> Effects {
        let mut effects = self.group.step(Timestamp(0), input);
        assert!(effects.appends.len() <= 1, "one voter never needs two appends in a step");
        assert!(effects.send_now.is_empty() && effects.fetch.is_empty());
        self.appends.extend(effects.appends.drain(..));
        for committed in effects.apply.drain(..) {
            let index = committed.entry.index;
            let place = usize::try_from(index.0 - 1).expect("small");
            assert_eq!(self.log.get(place), Some(&committed.entry), "applied but not durable");
            let last = self.to_apply.back().map_or(self.applied, |last| last.entry.index);
            assert_eq!(index, last.next());
            if let Some(ticket) = committed.ticket {
                let (expected, data) = self.accepted.pop_front().expect("was accepted");
                assert_eq!((ticket, &committed.entry.data), (expected, &data));
            }
            self.to_apply.push_back(committed);
        }
        for (ticket, index) in effects.reads_ready.drain(..) {
            let place = self.reads.iter().position(|(read, _)| *read == ticket);
            let (_, floor) = self.reads.swap_remove(place.expect("answered once"));
            assert!(index >= floor, "read at {index} misses entries up to {floor}");
        }
        effects
    }

    fn propose(&mut self, sizes: &[usize]) {
        let mut batch = Vec::new();
        for size in sizes {
            self.tickets += 1;
            let data = Bytes::from(vec![self.tickets.to_le_bytes()[0]; *size]);
            batch.push(Proposal { ticket: Ticket(self.tickets), data });
        }
        // Taken off again if refused; nothing is handed out within the step.
        self.accepted.extend(batch.iter().map(|p| (p.ticket, p.data.clone())));
        let effects = self.step(Input::Propose(batch));
        for (ticket, reason) in effects.rejected {
            let place = self.accepted.iter().position(|(taken, _)| *taken == ticket);
            let (_, data) = self.accepted.remove(place.expect("refused once")).expect("found");
            assert_eq!(reason == RejectReason::TooLarge, data.len() > 140_000);
            assert!(matches!(reason, RejectReason::TooLarge | RejectReason::Full));
        }
    }

    fn persist(&mut self, count: usize) {
        let count = count.min(self.appends.len());
        let Some(last) = count.checked_sub(1) else { return };
        let ready = self.appends[last].ready;
        for append in self.appends.drain(..count) {
            assert!(append.must_sync && append.send_after_persist.is_empty());
            self.durable = append.hard_state.unwrap_or(self.durable);
            assert!(self.durable.commit.0 <= self.log.len() as u64);
            self.log.extend(append.entries);
        }
        self.step(Input::Persisted(ready));
    }

    fn apply(&mut self, count: usize) {
        let count = count.min(self.to_apply.len());
        let last = self.to_apply.drain(..count).next_back();
        if let Some(last) = last {
            self.applied = last.entry.index;
            self.step(Input::Applied(self.applied));
        }
    }

    fn restart(&mut self) {
        let checkpoint = self.group.hard_state();
        assert!(self.applied <= checkpoint.commit);
        let applied = usize::try_from(self.applied.0).expect("small");
        let recovered = Recovered {
            hard_state: HardState { commit: checkpoint.commit, ..self.durable },
            membership: fresh().membership,
            applied: self.applied,
            compacted: (LogIndex::ZERO, Term::ZERO),
            terms: self.log.iter().map(|entry| entry.term).collect(),
            tail: self.log[applied..].to_vec(),
        };
        let group = Group::new(config(), recovered).expect("a crash is survivable");
        let open = std::mem::replace(&mut self.group, group).close();
        assert_eq!(open.len(), self.accepted.len() + self.reads.len());
        self.appends.clear();
        self.to_apply.clear();
        self.accepted.clear();
        self.reads.clear();
        self.step(Input::Campaign);
    }

    fn run(&mut self, event: Event) {
        match event {
            Event::Propose(sizes) => self.propose(&sizes),
            Event::Persist(count) => self.persist(count),
            Event::Apply(count) => self.apply(count),
            Event::Read => {
                self.tickets += 1;
                let ticket = Ticket(self.tickets);
                self.reads.push((ticket, self.group.status().committed));
                self.step(Input::Read(vec![ticket]));
            }
            Event::Tick => drop(self.step(Input::Tick)),
            Event::Compact(keep) => {
                let index = LogIndex(self.applied.0.saturating_sub(keep));
                self.step(Input::Compacted(index));
            }
            Event::Restart => self.restart(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    // Goal: every accepted proposal is handed out once, in order, only when durable, whatever
    // happens between; a restart loses nothing that was durable.
    #[test]
    fn every_accepted_proposal_is_applied_once_and_in_order(
        events in prop::collection::vec(event(), 1..120),
    ) {
        let mut driver = Driver::new();
        for event in events {
            driver.run(event);
        }
        driver.persist(usize::MAX);
        driver.persist(usize::MAX);
        driver.apply(usize::MAX);
        prop_assert!(driver.accepted.is_empty() && driver.reads.is_empty());
        prop_assert_eq!(driver.applied.0, driver.log.len() as u64);
        let status = driver.group.status();
        prop_assert!(status.serving);
        prop_assert_eq!((status.proposals_open, status.appends_outstanding), (0, 0));
        prop_assert_eq!(status.uncommitted_bytes, 0);
    }
}
