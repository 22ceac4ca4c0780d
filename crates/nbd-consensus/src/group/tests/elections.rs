//! When a replica of three votes, stands, and changes its members.

use raft::eraftpb::{ConfChangeType, Message, MessageType};

use super::*;
use crate::config::ReadMode;
use crate::membership::encode_change;
use nbd_topology::MembershipChange;

/// The first of three, with nothing in its log but its term.
fn replica(change: impl Fn(&mut GroupConfig)) -> Group {
    let mut config = GroupConfig { restarted: false, ..config() };
    change(&mut config);
    let hard_state = hard_state(1, None, 0);
    let from = Recovered { membership: three(), hard_state, ..Recovered::default() };
    Group::new(config, from).unwrap()
}

fn message(kind: MessageType, from: u64, term: u64) -> Message {
    Message { msg_type: kind, from, to: 1, term, ..Message::default() }
}

fn deliver(group: &mut Group, message: &Message) -> Effects {
    group.step(NOW, Input::Message(message.write_to_bytes().unwrap().into()))
}

/// What the replica says when asked for votes in these ways, in the next term.
fn votes(group: &mut Group) -> usize {
    let ask = |group: &mut Group, kind| {
        let term = group.status().term.0;
        let effects = deliver(group, &message(kind, 3, term + 1));
        let held = effects.appends.iter().map(|append| append.send_after_persist.len());
        effects.send_now.len() + held.sum::<usize>()
    };
    ask(group, MessageType::MsgRequestPreVote) + ask(group, MessageType::MsgRequestVote)
}

fn ticks(group: &mut Group, count: usize) {
    (0..count).for_each(|_| drop(group.step(NOW, Input::Tick)));
}

#[test]
fn no_vote_inside_a_lease_whatever_connections_say() {
    let mut group = replica(|_| ());
    for kind in [MessageType::MsgHeartbeat, MessageType::MsgAppend] {
        deliver(&mut group, &message(kind, 2, 1));
        ticks(&mut group, 11);
        group.step(NOW, Input::LeaderLost);
        assert!(group.step(NOW, Input::Campaign).is_empty(), "its own vote least of all");
        assert_eq!(votes(&mut group), 0);
    }
    ticks(&mut group, 1);
    assert_eq!(group.status().role, Role::PreCandidate, "the hint had it wait no longer");
    assert_eq!(votes(&mut group), 2);
}

#[test]
fn a_vote_that_the_leader_asked_for_is_granted_at_once() {
    let mut group = replica(|_| ());
    deliver(&mut group, &message(MessageType::MsgHeartbeat, 2, 1));
    let mut ask = message(MessageType::MsgRequestVote, 3, 2);
    ask.context = raft::CAMPAIGN_TRANSFER.into();
    let effects = deliver(&mut group, &ask);
    assert_eq!(effects.appends[0].hard_state, Some(hard_state(2, Some(THREE), 0)));
    // Or asked this replica to take over.
    let mut group = replica(|_| ());
    deliver(&mut group, &message(MessageType::MsgHeartbeat, 2, 1));
    let effects = deliver(&mut group, &message(MessageType::MsgTimeoutNow, 2, 1));
    assert_eq!(effects.role_changed.unwrap().role, Role::Candidate);
}

#[test]
fn after_a_restart_nothing_makes_it_vote_for_an_election_timeout() {
    let mut group = replica(|config| config.restarted = true);
    for _ in 0..13 {
        assert_eq!(votes(&mut group), 0);
        assert!(group.step(NOW, Input::Campaign).is_empty());
        assert!(deliver(&mut group, &message(MessageType::MsgTimeoutNow, 2, 1)).is_empty());
        let mut forced = message(MessageType::MsgRequestVote, 3, 2);
        forced.context = raft::CAMPAIGN_TRANSFER.into();
        assert!(deliver(&mut group, &forced).is_empty());
        group.step(NOW, Input::Tick);
    }
    assert_eq!(votes(&mut group), 2);
}

#[test]
fn in_quorum_mode_a_hint_is_enough() {
    let mut group = replica(|config| config.read_mode = ReadMode::Quorum);
    deliver(&mut group, &message(MessageType::MsgHeartbeat, 2, 1));
    assert_eq!(votes(&mut group), 0, "the leader is heard from");
    let effects = group.step(NOW, Input::LeaderLost);
    let asks = Leadership { role: Role::PreCandidate, term: Term(1), leader: None };
    assert_eq!((effects.role_changed, effects.send_now.len()), (Some(asks), 2));
    assert_eq!(votes(&mut group), 2);
}

/// The first of three, which leads in term 2.
fn leader_of_three() -> Group {
    let mut group = replica(|_| ());
    group.step(NOW, Input::Campaign);
    let stands = deliver(&mut group, &message(MessageType::MsgRequestPreVoteResponse, 2, 2));
    group.step(NOW, Input::Persisted(stands.appends[0].ready));
    deliver(&mut group, &message(MessageType::MsgRequestVoteResponse, 2, 2));
    assert_eq!(group.status().role, Role::Leader);
    group
}

#[test]
fn a_leader_outlasts_a_moment_of_silence_and_no_more() {
    let mut group = leader_of_three();
    ticks(&mut group, 23);
    assert_eq!(group.status().role, Role::Leader, "a new one as well");
    let hear = |group: &mut Group| {
        deliver(group, &message(MessageType::MsgHeartbeatResponse, 2, 2));
    };
    hear(&mut group);
    // Each silence is twice as long as the time after which raft-rs would step down.
    for _ in 0..5 {
        ticks(&mut group, 23);
        assert_eq!(group.status().role, Role::Leader);
        hear(&mut group);
    }
    ticks(&mut group, 24);
    assert_eq!(group.status().role, Role::Leader);
    ticks(&mut group, 12);
    assert_eq!(group.status().role, Role::Follower, "nobody follows it");
}

#[test]
fn without_a_leader_there_is_none_to_lose() {
    let mut group = replica(|config| config.read_mode = ReadMode::Quorum);
    assert!(group.step(NOW, Input::LeaderLost).is_empty());
}

/// A log whose entries above the first are these changes, of which none is known to be committed.
fn with_changes(changes: &[MembershipChange]) -> Recovered {
    let change = |(index, change): (u64, &MembershipChange)| Entry {
        kind: EntryKind::ConfChange,
        data: encode_change(*change).into(),
        ..entry(index, 1, "")
    };
    let tail: Vec<_> = (2..).zip(changes).map(change).collect();
    Recovered {
        terms: vec![Term(1); 1 + tail.len()],
        tail,
        membership: three(),
        ..recovered(1, 1, 1)
    }
}

// Goal: a restart forgets no membership change that another change in the log proves committed. By
// an older membership it could be elected beside the leader.
#[test]
fn a_change_in_the_log_proves_the_one_before_it() {
    let (four, five) = (ReplicaId::new(4).unwrap(), ReplicaId::new(5).unwrap());
    let changes = [MembershipChange::AddVoter(four), MembershipChange::AddVoter(five)];
    let mut group = Group::new(config(), with_changes(&changes[..1])).unwrap();
    assert_eq!(group.status().committed, LogIndex(1));
    assert_eq!(group.step(NOW, Input::Tick).apply, []);
    let mut group = Group::new(config(), with_changes(&changes)).unwrap();
    assert_eq!(group.status().committed, LogIndex(2));
    let apply = group.step(NOW, Input::Tick).apply;
    let after = Membership::of_voters([ONE, TWO, THREE, four]);
    assert_eq!((apply[0].change, apply[0].membership.as_ref()), (Some(changes[0]), Some(&after)));
    assert_eq!((apply.len(), group.status().membership), (1, after));
}

#[test]
fn a_leader_of_one_adds_a_learner() {
    let mut group = leader(config());
    let change = MembershipChange::AddLearner(TWO);
    let propose = |ticket| Input::ChangeMembership { ticket: Ticket(ticket), change };
    let effects = group.step(NOW, propose(1));
    let entry = effects.appends[0].entries[0].clone();
    let raw = ConfChange::parse_from_bytes(&entry.data).unwrap();
    assert_eq!((raw.change_type, raw.node_id), (ConfChangeType::AddLearnerNode, 2));
    assert_eq!(entry.kind, EntryKind::ConfChange);
    let busy = vec![(Ticket(2), RejectReason::MembershipBusy)];
    assert_eq!(group.step(NOW, propose(2)).rejected, busy);

    let effects = group.step(NOW, persisted(3));
    let membership = Membership::new([ONE], [TWO]);
    let ticket = Some(Ticket(1));
    let expected = Committed { entry, ticket, change: Some(change), membership };
    assert_eq!(effects.apply, [expected]);
    // In force, but the next has to wait until the caller has applied it.
    assert_eq!(group.status().peers.len(), 1);
    assert_eq!(group.step(NOW, propose(2)).rejected, busy);
    group.step(NOW, applied(2));
    let no_effect = vec![(Ticket(3), RejectReason::NoEffect)];
    assert_eq!(group.step(NOW, propose(3)).rejected, no_effect);
}

#[test]
fn a_new_leader_changes_no_members_before_it_serves() {
    let from = Recovered { membership: three(), ..recovered(5, 5, 5) };
    let mut group = Group::new(GroupConfig { restarted: false, ..config() }, from).unwrap();
    group.step(NOW, Input::Campaign);
    let stands = deliver(&mut group, &message(MessageType::MsgRequestPreVoteResponse, 2, 2));
    group.step(NOW, Input::Persisted(stands.appends[0].ready));
    let leads = deliver(&mut group, &message(MessageType::MsgRequestVoteResponse, 2, 2));
    assert_eq!(leads.role_changed.unwrap().role, Role::Leader);
    let four = ReplicaId::new(4).unwrap();
    let change = MembershipChange::AddLearner(four);
    let effects = group.step(NOW, Input::ChangeMembership { ticket: Ticket(1), change });
    assert_eq!(effects.rejected, [(Ticket(1), RejectReason::MembershipBusy)]);
}

// Goal: what one set of voters granted does not bind the next but one.
#[test]
fn a_lease_ends_when_the_voters_change() {
    let mut group = leader(config());
    let change = |ticket, change| Input::ChangeMembership { ticket: Ticket(ticket), change };
    group.step(NOW, change(1, MembershipChange::AddLearner(TWO)));
    group.step(NOW, persisted(3));
    group.step(NOW, applied(2));
    group.step(NOW, Input::Read(vec![Ticket(2)]));
    let answer = Message { index: 2, ..message(MessageType::MsgAppendResponse, 2, 1) };
    deliver(&mut group, &answer);
    assert_eq!(group.read_lease(), Some(Timestamp::MAX));
    let effects = group.step(NOW, change(3, MembershipChange::AddVoter(TWO)));
    assert_eq!(effects.rejected, []);
    let effects = group.step(NOW, Input::Persisted(effects.appends[0].ready));
    assert_eq!((effects.apply.len(), group.read_lease()), (1, None));
    // A round among the new voters begins at once.
    let is_beat = |out: &OutMessage| {
        let message = codec::decode(&out.bytes).unwrap();
        (message.msg_type == MessageType::MsgHeartbeat).then_some(message.context)
    };
    let context = effects.send_now.iter().find_map(is_beat).unwrap();
    let answer = Message { context, ..message(MessageType::MsgHeartbeatResponse, 2, 1) };
    deliver(&mut group, &answer);
    assert_eq!(group.read_lease(), Some(NOW.after(Duration::from_micros(247_500))));
}
