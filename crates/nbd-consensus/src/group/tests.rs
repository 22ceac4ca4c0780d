//! Exact effects, rule by rule. All groups here have one voter unless a test says otherwise;
//! several replicas together are in `tests/three_replicas.rs`.

use super::*;
use crate::effect::{Append, Committed, OutMessage, Role};
use crate::error::MessageError;
use crate::input::{EntryKind, Proposal, ReadyNumber};
use crate::limits::{ENTRY_OVERHEAD_BYTES, READS_WAITING_MAX};
use std::time::Duration;

use bytes::Bytes;
use nbd_topology::{Membership, ShardId};
use protobuf::Message as _;
use raft::eraftpb::{self, ConfChange};

/// For steps in which the time does not matter.
const NOW: Timestamp = Timestamp(0);
const ONE: ReplicaId = ReplicaId::new(1).unwrap();
const TWO: ReplicaId = ReplicaId::new(2).unwrap();
const THREE: ReplicaId = ReplicaId::new(3).unwrap();

fn config() -> GroupConfig {
    GroupConfig::new(ShardId(0), ONE)
}

/// A group of one voter that never ran.
fn fresh() -> Recovered {
    Recovered { membership: Membership::of_voters([ONE]), ..Recovered::default() }
}

fn three() -> Membership {
    Membership::of_voters([ONE, TWO, THREE])
}

fn entry(index: u64, term: u64, data: &'static str) -> Entry {
    let data = Bytes::from_static(data.as_bytes());
    Entry { index: LogIndex(index), term: Term(term), kind: EntryKind::Command, data }
}

fn hard_state(term: u64, vote: Option<ReplicaId>, commit: u64) -> HardState {
    HardState { term: Term(term), vote, commit: LogIndex(commit) }
}

fn append(ready: u64, entries: Vec<Entry>, hard_state: Option<HardState>) -> Append {
    let ready = ReadyNumber(ready);
    Append { ready, entries, hard_state, must_sync: true, send_after_persist: vec![] }
}

fn committed(index: u64, term: u64, data: &'static str, ticket: Option<u64>) -> Committed {
    let ticket = ticket.map(Ticket);
    Committed { entry: entry(index, term, data), ticket, change: None, membership: None }
}

fn propose(proposals: &[(u64, &'static str)]) -> Input {
    let proposal = |&(ticket, data): &(u64, &'static str)| Proposal {
        ticket: Ticket(ticket),
        data: Bytes::from_static(data.as_bytes()),
    };
    Input::Propose(proposals.iter().map(proposal).collect())
}

fn persisted(number: u64) -> Input {
    Input::Persisted(ReadyNumber(number))
}

fn applied(index: u64) -> Input {
    Input::Applied(LogIndex(index))
}

/// A group that leads in term 1 and has applied its first entry.
fn leader(config: GroupConfig) -> Group {
    let mut group = Group::new(config, fresh()).unwrap();
    group.step(NOW, Input::Campaign);
    group.step(NOW, persisted(1));
    group.step(NOW, applied(1));
    assert!(group.status().serving);
    group
}

/// `last` entries of term 1 with their index as data, `applied` and `commit` as given.
fn recovered(applied: u64, commit: u64, last: u64) -> Recovered {
    let tail = (applied + 1..=last)
        .map(|index| Entry { data: Bytes::from(index.to_string()), ..entry(index, 1, "") });
    Recovered {
        hard_state: hard_state(1, Some(ONE), commit),
        membership: Membership::of_voters([ONE]),
        applied: LogIndex(applied),
        compacted: (LogIndex::ZERO, Term::ZERO),
        terms: (0..last).map(|_| Term(1)).collect(),
        tail: tail.collect(),
    }
}

#[test]
fn a_new_group_of_one_leads_at_once_and_commits_when_durable() {
    let mut group = Group::new(config(), fresh()).unwrap();
    assert_eq!(group.status().role, Role::Follower);
    // Vote and first entry go into one append: nothing they allow can happen before it is durable.
    let leading = Leadership { role: Role::Leader, term: Term(1), leader: Some(ONE) };
    assert_eq!(
        group.step(NOW, Input::Campaign),
        Effects {
            appends: vec![append(1, vec![entry(1, 1, "")], Some(hard_state(1, Some(ONE), 0)))],
            role_changed: Some(leading),
            ..Effects::default()
        }
    );
    assert_eq!(group.status().committed, LogIndex(0));
    assert_eq!(group.hard_state(), hard_state(1, Some(ONE), 0));
    // No append for the commit index.
    let effects = Effects { apply: vec![committed(1, 1, "", None)], ..Effects::default() };
    assert_eq!(group.step(NOW, persisted(1)), effects);
    assert_eq!(group.hard_state(), hard_state(1, Some(ONE), 1));
    assert!(!group.status().serving);
    assert!(group.step(NOW, applied(1)).is_empty());
    assert!(group.status().serving);
    assert!(group.step(NOW, Input::Campaign).is_empty());
}

#[test]
fn a_batch_of_proposals_costs_one_append() {
    let mut group = leader(config());
    // The commit index of the batch before rides along.
    let hard = Some(hard_state(1, Some(ONE), 1));
    let entries = vec![entry(2, 1, "a"), entry(3, 1, "b")];
    assert_eq!(
        group.step(NOW, propose(&[(7, "a"), (8, "b")])),
        Effects { appends: vec![append(3, entries, hard)], ..Effects::default() }
    );
    assert_eq!(
        group.step(NOW, persisted(3)),
        Effects {
            apply: vec![committed(2, 1, "a", Some(7)), committed(3, 1, "b", Some(8))],
            ..Effects::default()
        }
    );
    assert!(group.step(NOW, applied(3)).is_empty());
    let status = group.status();
    assert_eq!((status.proposals_open, status.uncommitted_bytes), (0, 0));
}

#[test]
fn appends_overlap_and_nothing_is_applied_before_it_is_durable() {
    let mut group = leader(config());
    let first = group.step(NOW, propose(&[(1, "a")]));
    assert_eq!(first.appends[0].ready, ReadyNumber(3));
    let second = group.step(NOW, propose(&[(2, "b")]));
    // Nothing committed in between: the hard state is not repeated.
    assert_eq!(second.appends, [append(4, vec![entry(3, 1, "b")], None)]);
    let third = group.step(NOW, propose(&[(3, "c")]));
    assert_eq!(third.appends, [append(5, vec![entry(4, 1, "c")], None)]);
    for effects in [&first, &second, &third] {
        assert_eq!(effects.apply, []);
    }
    assert_eq!(group.status().appends_outstanding, 3);
    assert!(group.step(NOW, Input::Tick).is_empty());

    assert_eq!(group.step(NOW, persisted(3)).apply, [committed(2, 1, "a", Some(1))]);
    // A number stands for all before it.
    let effects = group.step(NOW, propose(&[(4, "d")]));
    let hard = Some(hard_state(1, Some(ONE), 2));
    assert_eq!(effects.appends, [append(7, vec![entry(5, 1, "d")], hard)]);
    assert_eq!(
        group.step(NOW, persisted(7)).apply,
        [
            committed(3, 1, "b", Some(2)),
            committed(4, 1, "c", Some(3)),
            committed(5, 1, "d", Some(4))
        ]
    );
    assert_eq!(group.status().appends_outstanding, 0);
}

#[test]
#[should_panic(expected = "ready 3 is not outstanding")]
fn a_ready_is_persisted_once() {
    let mut group = leader(config());
    group.step(NOW, propose(&[(1, "a")]));
    group.step(NOW, propose(&[(2, "b")]));
    group.step(NOW, persisted(4));
    group.step(NOW, persisted(3));
}

#[test]
#[should_panic(expected = "applied 2 is not within 1..=1")]
fn applied_never_passes_what_was_handed_out() {
    let mut group = leader(config());
    group.step(NOW, propose(&[(1, "a")]));
    group.step(NOW, applied(2));
}

#[test]
fn a_restart_hands_out_what_was_committed_and_decides_on_the_rest() {
    // 1..=2 applied, 3 committed, 4 and 5 open.
    let mut group = Group::new(config(), recovered(2, 3, 5)).unwrap();
    let status = group.status();
    assert_eq!(
        (status.applied, status.committed, status.last),
        (LogIndex(2), LogIndex(3), LogIndex(5))
    );
    assert_eq!(status.persisted, LogIndex(5));

    let effects = group.step(NOW, Input::Campaign);
    assert_eq!(effects.apply, [committed(3, 1, "3", None)]);
    let hard = Some(hard_state(2, Some(ONE), 3));
    assert_eq!(effects.appends, [append(1, vec![entry(6, 2, "")], hard)]);
    // Entries of an earlier term are committed by one of this term.
    assert_eq!(
        group.step(NOW, persisted(1)).apply,
        [committed(4, 1, "4", None), committed(5, 1, "5", None), committed(6, 2, "", None)]
    );
}

#[test]
fn a_restart_with_everything_committed_applies_before_leading() {
    let mut group = Group::new(config(), recovered(1, 4, 4)).unwrap();
    let effects = group.step(NOW, Input::Tick);
    assert_eq!(
        effects.apply,
        [committed(2, 1, "2", None), committed(3, 1, "3", None), committed(4, 1, "4", None)]
    );
    assert_eq!((effects.appends, effects.role_changed), (vec![], None));
    group.step(NOW, applied(4));
    assert_eq!(group.step(NOW, Input::Campaign).appends[0].entries, [entry(5, 2, "")]);
}

#[test]
fn a_restart_from_a_compacted_log() {
    let from = Recovered {
        hard_state: hard_state(3, None, 10),
        membership: Membership::of_voters([ONE]),
        applied: LogIndex(10),
        compacted: (LogIndex(10), Term(2)),
        terms: vec![],
        tail: vec![],
    };
    let mut group = Group::new(config(), from).unwrap();
    let hard = Some(hard_state(4, Some(ONE), 10));
    assert_eq!(group.step(NOW, Input::Campaign).appends, [append(1, vec![entry(11, 4, "")], hard)]);
    assert_eq!(group.step(NOW, persisted(1)).apply, [committed(11, 4, "", None)]);
}

#[test]
fn a_follower_of_one_still_leads_after_an_election_timeout() {
    let mut group = Group::new(config(), fresh()).unwrap();
    let led = (0..24).find_map(|_| group.step(NOW, Input::Tick).role_changed);
    assert_eq!(led.unwrap().role, Role::Leader);
}

#[test]
fn compaction_forgets_and_goes_on() {
    let mut group = leader(config());
    for ready in 0..10 {
        let effects = group.step(NOW, propose(&[(ready, "x")]));
        group.step(NOW, Input::Persisted(effects.appends[0].ready));
    }
    group.step(NOW, applied(9));
    assert!(group.step(NOW, Input::Compacted(LogIndex(7))).is_empty());
    assert_eq!(group.status().compacted, LogIndex(7));
    assert!(group.step(NOW, Input::Compacted(LogIndex(3))).is_empty());
    assert_eq!(group.status().compacted, LogIndex(7));
    group.step(NOW, applied(11));
    group.step(NOW, Input::Compacted(LogIndex(11)));
    let effects = group.step(NOW, propose(&[(99, "y")]));
    assert_eq!(effects.appends[0].entries, [entry(12, 1, "y")]);
    let ready = effects.appends[0].ready;
    assert_eq!(group.step(NOW, Input::Persisted(ready)).apply, [committed(12, 1, "y", Some(99))]);
}

#[test]
#[should_panic(expected = "compaction to 2 beyond applied 1")]
fn compaction_never_passes_what_is_applied() {
    let mut group = leader(config());
    group.step(NOW, propose(&[(1, "a")]));
    group.step(NOW, persisted(3));
    group.step(NOW, Input::Compacted(LogIndex(2)));
}

#[test]
fn proposals_past_the_uncommitted_bound_are_refused_in_order() {
    let mut config = config();
    config.uncommitted_bytes_max = 256 << 10;
    config.entry_bytes_max = 200 << 10;
    let mut group = leader(config);
    let proposal = |ticket, bytes| Proposal { ticket: Ticket(ticket), data: vec![0; bytes].into() };
    let full = |ticket| (Ticket(ticket), RejectReason::Full);

    let batch = vec![
        proposal(1, 200 << 10),
        proposal(2, (200 << 10) + 1),
        proposal(3, 100 << 10),
        proposal(4, 1),
        proposal(5, 0),
    ];
    let effects = group.step(NOW, Input::Propose(batch));
    assert_eq!(effects.appends[0].entries.len(), 1);
    let too_large = (Ticket(2), RejectReason::TooLarge);
    assert_eq!(effects.rejected, [too_large, full(3), full(4), full(5)]);
    assert_eq!(group.status().uncommitted_bytes, 200 << 10);

    let more = group.step(NOW, Input::Propose(vec![proposal(6, 57 << 10)]));
    assert_eq!((more.rejected, more.appends), (vec![full(6)], vec![]));
    let fits = group.step(NOW, Input::Propose(vec![proposal(7, 56 << 10)]));
    assert_eq!((fits.rejected, fits.appends.len()), (vec![], 1));

    // Room comes with the commit, in the same step.
    group.step(NOW, Input::Persisted(fits.appends[0].ready));
    assert_eq!(group.status().uncommitted_bytes, 0);
    assert_eq!(group.step(NOW, Input::Propose(vec![proposal(8, 200 << 10)])).rejected, []);
}

#[test]
fn applying_comes_in_bounded_readys_without_loss() {
    let mut config = config();
    config.uncommitted_bytes_max = 64 << 20;
    let mut group = leader(config);
    let data = Bytes::from(vec![1; 1 << 20]);
    let batch = (0..20).map(|ticket| Proposal { ticket: Ticket(ticket), data: data.clone() });
    let effects = group.step(NOW, Input::Propose(batch.collect()));
    let apply = group.step(NOW, Input::Persisted(effects.appends[0].ready)).apply;
    let tickets: Vec<_> = apply.iter().map(|committed| committed.ticket.unwrap().0).collect();
    assert_eq!(tickets, (0..20).collect::<Vec<_>>());
    // Shared from proposal to apply, not copied.
    assert!(apply.iter().all(|committed| committed.entry.data.as_ptr() == data.as_ptr()));
}

#[test]
fn reads_wait_for_the_first_commit_and_then_cost_nothing() {
    let mut group = Group::new(config(), fresh()).unwrap();
    let rejected = group.step(NOW, Input::Read(vec![Ticket(1)])).rejected;
    assert_eq!(rejected, [(Ticket(1), RejectReason::NotLeader { leader: None })]);

    group.step(NOW, Input::Campaign);
    assert!(group.step(NOW, Input::Read(vec![Ticket(2), Ticket(3)])).is_empty());
    assert_eq!(group.status().reads_waiting, 2);
    let effects = group.step(NOW, persisted(1));
    assert_eq!(effects.reads_ready, [(Ticket(2), LogIndex(1)), (Ticket(3), LogIndex(1))]);
    assert_eq!(effects.apply.len(), 1);

    let reads_ready = vec![(Ticket(4), LogIndex(1))];
    assert_eq!(
        group.step(NOW, Input::Read(vec![Ticket(4)])),
        Effects { reads_ready, ..Effects::default() }
    );
    // What is only proposed is not waited for, what is committed is.
    let append = group.step(NOW, propose(&[(5, "a")])).appends.remove(0);
    let reads_ready = vec![(Ticket(6), LogIndex(1))];
    assert_eq!(group.step(NOW, Input::Read(vec![Ticket(6)])).reads_ready, reads_ready);
    group.step(NOW, Input::Persisted(append.ready));
    let reads_ready = vec![(Ticket(7), LogIndex(2))];
    assert_eq!(group.step(NOW, Input::Read(vec![Ticket(7)])).reads_ready, reads_ready);
}

#[test]
fn waiting_reads_are_bounded() {
    let mut group = Group::new(config(), fresh()).unwrap();
    group.step(NOW, Input::Campaign);
    let tickets = (0..=READS_WAITING_MAX as u64).map(Ticket).collect();
    let effects = group.step(NOW, Input::Read(tickets));
    assert_eq!(effects.rejected, [(Ticket(READS_WAITING_MAX as u64), RejectReason::Full)]);
}

#[test]
fn a_follower_takes_no_proposals() {
    let mut group = Group::new(config(), fresh()).unwrap();
    let effects = group.step(NOW, propose(&[(1, "a"), (2, "b")]));
    let reason = RejectReason::NotLeader { leader: None };
    let rejected = vec![(Ticket(1), reason), (Ticket(2), reason)];
    assert_eq!(effects, Effects { rejected, ..Effects::default() });
}

#[test]
fn closing_gives_open_tickets_back() {
    let mut group = Group::new(config(), fresh()).unwrap();
    group.step(NOW, Input::Campaign);
    group.step(NOW, propose(&[(1, "a"), (2, "b")]));
    group.step(NOW, Input::Read(vec![Ticket(3)]));
    assert_eq!(group.close(), [Ticket(1), Ticket(2), Ticket(3)]);
}

#[test]
fn settings_are_validated() {
    let error = |change: &dyn Fn(&mut GroupConfig)| {
        let mut config = config();
        change(&mut config);
        Group::new(config, fresh()).unwrap_err()
    };
    for tick in [Duration::ZERO, Duration::from_secs(61)] {
        assert_eq!(error(&|c| c.tick = tick), GroupError::Tick { tick });
    }
    let ticks = |heartbeat, election| GroupError::Ticks { heartbeat, election };
    assert_eq!(error(&|c| c.heartbeat_ticks = 0), ticks(0, 12));
    assert_eq!(error(&|c| c.election_ticks = 2), ticks(2, 2));
    let sizes = |entry, uncommitted| GroupError::Sizes { entry, uncommitted };
    assert_eq!(error(&|c| c.entry_bytes_max = 0), sizes(0, 64 << 20));
    assert_eq!(error(&|c| c.uncommitted_bytes_max = 1 << 20), sizes(2 << 20, 1 << 20));
    assert_eq!(error(&|c| (c.entry_bytes_max, c.uncommitted_bytes_max) = (1, 1)), sizes(1, 1));
}

#[test]
fn what_was_recovered_is_validated() {
    let error = |change: &dyn Fn(&mut Recovered)| {
        let mut from = recovered(2, 3, 5);
        change(&mut from);
        Group::new(config(), from).unwrap_err()
    };
    let of = |ids: std::ops::RangeInclusive<u64>| ids.filter_map(ReplicaId::new);
    let members = |voters, learners| GroupError::Members { voters, learners };
    assert_eq!(error(&|r| r.membership = Membership::default()), members(0, 0));
    assert_eq!(error(&|r| r.membership = Membership::of_voters(of(1..=8))), members(8, 0));
    let learners = Membership::new([ONE], of(2..=9)).unwrap();
    assert_eq!(error(&|r| r.membership = learners.clone()), members(1, 8));
    let indexes = |compacted, applied, commit, last| GroupError::Indexes {
        compacted: LogIndex(compacted),
        applied: LogIndex(applied),
        commit: LogIndex(commit),
        last: LogIndex(last),
    };
    assert_eq!(error(&|r| r.hard_state.commit = LogIndex(6)), indexes(0, 2, 6, 5));
    assert_eq!(error(&|r| r.hard_state.commit = LogIndex(1)), indexes(0, 2, 1, 5));
    assert_eq!(error(&|r| r.compacted.0 = LogIndex(3)), indexes(3, 2, 3, 8));
    let terms = |index, term, current| GroupError::Terms {
        index: LogIndex(index),
        term: Term(term),
        current: Term(current),
    };
    assert_eq!(error(&|r| r.terms[3] = Term(0)), terms(4, 0, 1));
    assert_eq!(error(&|r| r.terms[4] = Term(2)), terms(5, 2, 1));
    assert_eq!(error(&|r| r.compacted.1 = Term(2)), terms(0, 2, 1));
    let tail = |index| GroupError::Tail { applied: LogIndex(2), index: LogIndex(index) };
    assert_eq!(error(&|r| drop(r.tail.pop())), tail(5));
    assert_eq!(error(&|r| drop(r.tail.remove(0))), tail(3));
    assert_eq!(error(&|r| r.tail[1].term = Term(0)), tail(4));
    assert_eq!(error(&|r| r.tail.push(entry(6, 1, ""))), tail(6));
}

#[test]
fn a_voter_alone_in_three_cannot_lead() {
    let from = Recovered { membership: three(), ..Recovered::default() };
    let mut group = Group::new(GroupConfig { restarted: false, ..config() }, from).unwrap();
    let effects = group.step(NOW, Input::Campaign);
    let asks = Leadership { role: Role::PreCandidate, term: Term(0), leader: None };
    assert_eq!(effects.role_changed, Some(asks));
    // Asking whether one could win promises nothing, so it waits for nothing.
    assert_eq!(effects.appends, []);
    assert_eq!(effects.send_now.iter().map(|m| (m.to, m.bulk)).collect::<Vec<_>>().len(), 2);
    for _ in 0..100 {
        let effects = group.step(NOW, Input::Tick);
        assert_eq!((effects.appends, effects.apply), (vec![], vec![]));
    }
    assert_eq!(group.status().term, Term(0));
}

#[test]
fn a_million_entries_of_one_term_stay_small() {
    let last = 1_000_000;
    let from = Recovered {
        hard_state: hard_state(9, None, last),
        membership: Membership::of_voters([ONE]),
        applied: LogIndex(last),
        compacted: (LogIndex(0), Term(0)),
        terms: vec![Term(9); 1_000_000],
        tail: vec![],
    };
    let mut group = Group::new(config(), from).unwrap();
    assert_eq!(group.raw.store().window_first(), last + 1);
    assert_eq!(group.step(NOW, Input::Campaign).appends[0].entries, [entry(last + 1, 10, "")]);
    // What is counted covers what raft-rs keeps of an entry besides its data.
    assert!(size_of::<eraftpb::Entry>() <= ENTRY_OVERHEAD_BYTES);
}

/// A group whose only log entry is a committed membership change with this data.
fn with_membership_change(data: Vec<u8>) -> Group {
    let change = Entry { kind: EntryKind::ConfChange, data: data.into(), ..entry(1, 1, "") };
    let from = Recovered { tail: vec![change], ..recovered(0, 1, 1) };
    Group::new(config(), from).unwrap()
}

// Goal: a lone voter's vote is durable before anyone hears of its term; after a crash it would
// otherwise lead the same term again, with other entries.
// Method: a learner joins, so that there is someone to hear it.
#[test]
fn nobody_hears_of_a_term_before_the_vote_in_it_is_durable() {
    let mut change = ConfChange { node_id: 2, ..ConfChange::default() };
    change.set_change_type(eraftpb::ConfChangeType::AddLearnerNode);
    let mut group = with_membership_change(change.write_to_bytes().unwrap());
    assert_eq!(group.step(NOW, Input::Campaign).apply.len(), 1);
    assert_eq!(group.status().role, Role::Follower, "not while a change is not applied");
    group.step(NOW, applied(1));
    let campaign = group.step(NOW, Input::Campaign);
    assert_eq!((campaign.send_now.len(), campaign.appends.len()), (0, 1));
    assert_eq!(campaign.appends[0].send_after_persist.len(), 1);
    assert_eq!(campaign.appends[0].send_after_persist[0].to, TWO);
    // Nor by what comes next.
    group.step(NOW, Input::Tick);
    let beat = group.step(NOW, Input::Tick);
    assert_eq!((beat.send_now.len(), beat.appends[0].send_after_persist.len()), (0, 1));
    assert!(beat.appends[0].is_empty());
    group.step(NOW, Input::Persisted(campaign.appends[0].ready));
    group.step(NOW, Input::Persisted(beat.appends[0].ready));
    group.step(NOW, Input::Tick);
    assert_eq!(group.step(NOW, Input::Tick).send_now.len(), 1);
    assert_eq!(group.status().peers.len(), 1);
}

#[test]
fn a_membership_change_that_makes_no_sense_is_passed_over() {
    let mut remove = ConfChange { node_id: 1, ..ConfChange::default() };
    remove.set_change_type(eraftpb::ConfChangeType::RemoveNode);
    for data in [vec![0xff; 9], remove.write_to_bytes().unwrap()] {
        let mut group = with_membership_change(data);
        assert_eq!(group.step(NOW, Input::Tick).apply[0].entry.kind, EntryKind::ConfChange);
        group.step(NOW, applied(1));
        let led = group.step(NOW, Input::Campaign).role_changed.unwrap();
        assert_eq!(led.role, Role::Leader);
    }
}

#[test]
fn a_group_can_move_between_threads() {
    const fn is_send<T: Send>() {}
    const { is_send::<Group>() };
}

mod elections;
mod peers;
mod snapshots;
