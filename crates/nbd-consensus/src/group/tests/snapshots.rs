//! A follower of three whose log the leader cannot feed.

use raft::eraftpb::{Message, MessageType};

use super::*;
use crate::effect::SnapshotOffer;
use crate::membership::to_conf_state;

/// Entries 1 and 2 are applied, 3 is committed, 4 and 5 are open, all of term 1.
fn follower() -> Group {
    let from = Recovered { membership: three(), ..recovered(2, 3, 5) };
    let mut group = Group::new(GroupConfig { restarted: false, ..config() }, from).unwrap();
    group.step(NOW, Input::Tick);
    group.step(NOW, applied(3));
    group
}

fn offer(term: u64, index: u64, index_term: u64) -> Message {
    let mut offer = Message { from: 2, to: 1, term, ..Message::default() };
    offer.set_msg_type(MessageType::MsgSnapshot);
    let metadata = offer.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (index, index_term);
    metadata.set_conf_state(to_conf_state(&three()));
    offer
}

fn append_of(term: u64, index: u64, log_term: u64, entry: (u64, u64), commit: u64) -> Message {
    let mut append =
        Message { from: 2, to: 1, term, index, log_term, commit, ..Message::default() };
    append.set_msg_type(MessageType::MsgAppend);
    let (index, term) = entry;
    let entry = eraftpb::Entry { index, term, ..eraftpb::Entry::default() };
    append.set_entries(vec![entry].into());
    append
}

fn deliver(group: &mut Group, message: &Message) -> Effects {
    group.step(NOW, Input::Message(message.write_to_bytes().unwrap().into()))
}

/// The answers to the leader: kind, index, commit.
fn answers(messages: &[OutMessage]) -> Vec<(MessageType, u64, u64)> {
    let decode = |out: &OutMessage| codec::decode(&out.bytes).unwrap();
    messages.iter().map(decode).map(|m| (m.msg_type, m.index, m.commit)).collect()
}

fn installed(index: u64, term: u64) -> Input {
    Input::SnapshotInstalled { index: LogIndex(index), term: Term(term), membership: three() }
}

const RESPONSE: MessageType = MessageType::MsgAppendResponse;

#[test]
fn an_offer_is_handed_on_and_counts_as_a_word_from_the_leader() {
    let mut group = follower();
    let effects = deliver(&mut group, &offer(4, 9, 3));
    let offered = SnapshotOffer { from: TWO, index: LogIndex(9), term: Term(3) };
    assert_eq!(effects.snapshot_offered, Some(offered));
    let follows = Leadership { role: Role::Follower, term: Term(4), leader: Some(TWO) };
    assert_eq!(effects.role_changed, Some(follows));
    // The leader learns how far the log is known to agree; the log itself is untouched.
    assert_eq!(answers(&effects.appends[0].send_after_persist), [(RESPONSE, 3, 3)]);
    assert_eq!((group.status().last, group.status().committed), (LogIndex(5), LogIndex(3)));
    assert!(group.wants_snapshot(LogIndex(9), Term(3)));
    assert!(!group.wants_snapshot(LogIndex(9), Term(5)), "of a term not heard of");
    assert!(deliver(&mut group, &offer(3, 9, 3)).snapshot_offered.is_none(), "of the past");
}

#[test]
fn what_the_log_covers_is_not_wanted() {
    let mut group = follower();
    for (index, committed) in [(2, 3), (3, 3), (4, 4)] {
        let effects = deliver(&mut group, &offer(1, index, 1));
        assert_eq!(effects.snapshot_offered, None);
        // That the entry is committed is news, and saves the leader the snapshot.
        assert_eq!(answers(&effects.send_now), [(RESPONSE, committed, committed)]);
        assert!(!group.wants_snapshot(LogIndex(index), Term(1)));
    }
    assert_eq!(group.status().committed, LogIndex(4));
}

#[test]
fn a_snapshot_that_makes_no_sense_is_refused() {
    let mut group = follower();
    let mut data = offer(4, 9, 3);
    data.mut_snapshot().data = "contents".into();
    let mut nobody = offer(4, 9, 3);
    nobody.mut_snapshot().mut_metadata().mut_conf_state().voters.clear();
    for (message, index) in
        [(offer(4, 0, 3), 0), (offer(4, 9, 0), 9), (offer(4, 9, 5), 9), (data, 9), (nobody, 9)]
    {
        let refused = Some(MessageError::Snapshot { index });
        assert_eq!(deliver(&mut group, &message), Effects { refused, ..Effects::default() });
    }
    let refused = Some(MessageError::Range { value: u64::MAX });
    assert_eq!(deliver(&mut group, &offer(4, u64::MAX, 3)).refused, refused);
}

#[test]
fn a_held_log_takes_nothing_and_commits_nothing() {
    let mut group = follower();
    group.step(NOW, Input::HoldLog(true));
    let append = append_of(1, 5, 1, (6, 1), 5);
    let effects = deliver(&mut group, &append);
    assert_eq!((effects.appends, effects.apply), (vec![], vec![]));
    assert_eq!(answers(&effects.send_now), [(MessageType::MsgHeartbeatResponse, 0, 3)]);
    deliver(&mut group, &offer(1, 4, 1));
    assert_eq!((group.status().last, group.status().committed), (LogIndex(5), LogIndex(3)));
    (0..50).for_each(|_| assert_eq!(group.step(NOW, Input::Tick).role_changed, None));
    assert!(
        deliver(&mut group, &{
            let mut now = Message { from: 2, to: 1, term: 1, ..Message::default() };
            now.set_msg_type(MessageType::MsgTimeoutNow);
            now
        })
        .is_empty()
    );
    group.step(NOW, Input::HoldLog(false));
    assert_eq!(deliver(&mut group, &append).appends.len(), 1);
    assert_eq!(group.status().committed, LogIndex(5));
}

#[test]
fn an_installed_snapshot_takes_the_place_of_the_log() {
    let mut group = follower();
    let effects = deliver(&mut group, &offer(4, 9, 3));
    group.step(NOW, Input::HoldLog(true));
    // The new term is still on its way to the disk, and what follows waits for it.
    let effects = (effects, group.step(NOW, installed(9, 3)));
    let ready = effects.0.appends[0].ready;
    let answer = &effects.1.appends[0];
    assert!(answer.is_empty() && answer.ready > ready);
    assert_eq!(answers(&answer.send_after_persist), [(RESPONSE, 9, 9)]);
    let status = group.status();
    assert_eq!(
        (status.compacted, status.applied, status.last),
        (LogIndex(9), LogIndex(9), LogIndex(9))
    );
    assert_eq!((status.term, status.leader), (Term(4), Some(TWO)));
    assert_eq!(group.hard_state(), hard_state(4, None, 9));
    assert!(group.step(NOW, Input::Persisted(ready)).is_empty());
    assert!(group.step(NOW, Input::Persisted(answer.ready)).is_empty());

    // The log goes on from there.
    let effects = deliver(&mut group, &append_of(4, 9, 3, (10, 4), 10));
    let append = &effects.appends[0];
    assert_eq!(append.entries, [entry(10, 4, "")]);
    assert_eq!(append.hard_state, Some(hard_state(4, None, 9)));
    assert!(append.ready > answer.ready, "numbers grow on");
    assert_eq!(answers(&append.send_after_persist), [(RESPONSE, 10, 10)]);
    let applied = group.step(NOW, Input::Persisted(append.ready)).apply;
    assert_eq!(applied, [committed(10, 4, "", None)]);
}

#[test]
#[should_panic(expected = "the log covers the snapshot at 4")]
fn a_snapshot_that_the_log_covers_is_not_installed() {
    follower().step(NOW, installed(4, 1));
}

#[test]
#[should_panic(expected = "entries are on their way to the disk")]
fn no_snapshot_is_installed_beside_an_append() {
    let mut group = follower();
    deliver(&mut group, &append_of(1, 5, 1, (6, 1), 3));
    group.step(NOW, installed(9, 1));
}

#[test]
#[should_panic(expected = "checkpoint 4 is beyond what is applied")]
fn a_checkpoint_holds_what_is_applied() {
    let checkpoint = Input::Checkpointed { index: LogIndex(4), term: Term(1) };
    follower().step(NOW, checkpoint);
}

// Goal: a proposal of a deposed leader that a snapshot passed over is neither confirmed nor denied.
#[test]
fn tickets_that_a_snapshot_covers_stay_open_questions() {
    let from = Recovered { membership: three(), ..recovered(3, 3, 5) };
    let mut group = Group::new(GroupConfig { restarted: false, ..config() }, from).unwrap();
    let answer =
        |kind, term| Message { msg_type: kind, from: 2, to: 1, term, ..Message::default() };
    group.step(NOW, Input::Campaign);
    let stands = deliver(&mut group, &answer(MessageType::MsgRequestPreVoteResponse, 2));
    group.step(NOW, Input::Persisted(stands.appends[0].ready));
    let leads = deliver(&mut group, &answer(MessageType::MsgRequestVoteResponse, 2));
    let logged = group.step(NOW, propose(&[(1, "a"), (2, "b"), (3, "c")]));
    assert_eq!(logged.appends[0].entries[0].index, LogIndex(7));
    group.step(NOW, Input::Persisted(leads.appends[0].ready));
    group.step(NOW, Input::Persisted(logged.appends[0].ready));

    // Entries 6 to 9 are another's: deposed, it is offered what covers two of its three proposals.
    let offered = deliver(&mut group, &offer(4, 8, 3));
    assert!(offered.snapshot_offered.is_some());
    group.step(NOW, Input::Persisted(offered.appends[0].ready));
    let rejected = group.step(NOW, installed(8, 3)).rejected;
    let unknown = |ticket| (Ticket(ticket), RejectReason::Unknown);
    assert_eq!(rejected, [unknown(1), unknown(2), (Ticket(3), RejectReason::Superseded)]);
    assert_eq!(group.status().proposals_open, 0);
}
