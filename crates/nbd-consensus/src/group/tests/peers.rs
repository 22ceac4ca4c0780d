//! One replica of three, and what peers may and may not make it do.

use raft::eraftpb::{Entry as RaftEntry, Message, MessageType};

use super::*;

fn of_three() -> Group {
    let from = Recovered { membership: three(), ..recovered(2, 3, 5) };
    Group::new(GroupConfig { restarted: false, ..config() }, from).unwrap()
}

fn message(kind: MessageType, term: u64) -> Message {
    Message { msg_type: kind, from: 2, to: 1, term, ..Message::default() }
}

fn append_of(term: u64, index: u64, log_term: u64, entries: &[(u64, u64)], commit: u64) -> Message {
    let entry =
        |&(index, term)| RaftEntry { index, term, data: "x".into(), ..RaftEntry::default() };
    let mut append = message(MessageType::MsgAppend, term);
    append.index = index;
    append.log_term = log_term;
    append.commit = commit;
    append.set_entries(entries.iter().map(entry).collect::<Vec<_>>().into());
    append
}

fn deliver(group: &mut Group, message: &Message) -> Effects {
    group.step(NOW, Input::Message(message.write_to_bytes().unwrap().into()))
}

fn decoded(messages: &[OutMessage]) -> Vec<Message> {
    messages.iter().map(|out| codec::decode(&out.bytes).unwrap()).collect()
}

#[test]
fn a_vote_waits_for_the_disk() {
    let mut group = of_three();
    group.step(NOW, Input::Tick);
    let mut ask = message(MessageType::MsgRequestVote, 5);
    (ask.index, ask.log_term) = (5, 1);
    let effects = deliver(&mut group, &ask);
    assert_eq!(effects.send_now, []);
    let append = &effects.appends[0];
    assert_eq!((append.hard_state, append.must_sync), (Some(hard_state(5, Some(TWO), 3)), true));
    let answers = decoded(&append.send_after_persist);
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].msg_type, MessageType::MsgRequestVoteResponse);
    assert!(!answers[0].reject);
    assert!(group.step(NOW, Input::Persisted(append.ready)).is_empty());
}

// Goal: an acknowledgement never overtakes the entries it is for, nor an earlier append's.
#[test]
fn append_responses_wait_for_the_disk_and_for_their_predecessors() {
    let mut group = of_three();
    group.step(NOW, Input::Tick);
    let first = deliver(&mut group, &append_of(2, 5, 1, &[(6, 2)], 3));
    assert_eq!(first.send_now, []);
    assert_eq!(first.appends[0].entries.len(), 1);
    assert_eq!(first.appends[0].hard_state, Some(hard_state(2, None, 3)));

    // A heartbeat has nothing to write; its answer still waits behind the append.
    let beat = Message { commit: 4, ..message(MessageType::MsgHeartbeat, 2) };
    let second = deliver(&mut group, &beat);
    assert_eq!(second.send_now, []);
    let held = &second.appends[0];
    assert!(held.is_empty() && !held.must_sync);
    assert_eq!(held.send_after_persist.len(), 1);
    // Entries that were durable all along can be applied meanwhile.
    assert_eq!(second.apply, [committed(4, 1, "4", None)]);

    assert!(group.step(NOW, Input::Persisted(first.appends[0].ready)).is_empty());
    assert!(group.step(NOW, Input::Persisted(held.ready)).is_empty());
    // With nothing outstanding there is nothing to wait for.
    let third = deliver(&mut group, &beat);
    assert_eq!((third.appends.len(), third.send_now.len()), (0, 1));
}

// Goal: a crash between hard state and entries of one append leaves a log that restarts.
#[test]
fn a_hard_state_claims_nothing_of_its_own_append() {
    let mut group = of_three();
    let effects = deliver(&mut group, &append_of(2, 5, 1, &[(6, 2), (7, 2)], 7));
    assert_eq!(group.status().committed, LogIndex(7));
    assert_eq!(effects.appends[0].hard_state, Some(hard_state(2, None, 5)));
    // A checkpoint meanwhile claims only what is durable.
    assert_eq!(group.hard_state(), hard_state(2, None, 5));
    assert_eq!(effects.apply.len(), 3);
    assert_eq!(group.step(NOW, Input::Persisted(effects.appends[0].ready)).apply.len(), 2);
    assert_eq!(group.hard_state(), hard_state(2, None, 7));
}

#[test]
fn a_conflicting_tail_is_replaced() {
    let mut group = of_three();
    let effects = deliver(&mut group, &append_of(3, 3, 1, &[(4, 3)], 3));
    assert_eq!(effects.appends[0].entries[0].index, LogIndex(4));
    let status = group.status();
    assert_eq!((status.last, status.persisted), (LogIndex(4), LogIndex(3)));
    group.step(NOW, Input::Persisted(effects.appends[0].ready));
    assert_eq!(group.status().persisted, LogIndex(4));
}

#[test]
fn a_vote_that_arrives_before_the_disk_counts_as_lost() {
    let mut group = of_three();
    // Entries on their way to disk, then a transfer makes it a candidate.
    let first = deliver(&mut group, &append_of(2, 5, 1, &[(6, 2)], 3));
    let stands = deliver(&mut group, &message(MessageType::MsgTimeoutNow, 2));
    assert_eq!(stands.role_changed.unwrap().role, Role::Candidate);
    assert_eq!((stands.send_now.len(), stands.appends[0].send_after_persist.len()), (0, 2));
    let grant = message(MessageType::MsgRequestVoteResponse, 3);
    assert!(deliver(&mut group, &grant).is_empty());
    group.step(NOW, Input::Persisted(first.appends[0].ready));
    group.step(NOW, Input::Persisted(stands.appends[0].ready));
    let wins = deliver(&mut group, &grant);
    assert_eq!(wins.role_changed.unwrap().role, Role::Leader);
    assert_eq!(wins.appends[0].entries, [entry(7, 3, "")]);
    // A leader sends before its own disk is done.
    assert_eq!(wins.send_now.len(), 2);
}

#[test]
fn broken_peers_are_refused() {
    let mut group = of_three();
    group.step(NOW, Input::Tick);
    let before = group.status();
    let mut check = |message: &Message, refused: MessageError| {
        let effects = deliver(&mut group, message);
        assert_eq!(
            effects,
            Effects { refused: Some(refused), ..Effects::default() },
            "{message:?}"
        );
    };
    let beat = message(MessageType::MsgHeartbeat, 1);
    check(&Message { to: 2, ..beat.clone() }, MessageError::Recipient { to: 2 });
    check(&Message { to: 0, ..beat.clone() }, MessageError::Recipient { to: 0 });
    check(&Message { from: 1, ..beat.clone() }, MessageError::Sender { from: 1 });
    check(&Message { from: 0, ..beat.clone() }, MessageError::Sender { from: 0 });
    let answer = message(MessageType::MsgHeartbeatResponse, 1);
    check(&Message { from: 4, ..answer }, MessageError::Sender { from: 4 });
    check(&Message { term: 0, ..beat.clone() }, MessageError::Range { value: 0 });
    check(&Message { term: u64::MAX, ..beat.clone() }, MessageError::Range { value: u64::MAX });
    check(&Message { index: u64::MAX, ..beat.clone() }, MessageError::Range { value: u64::MAX });
    let beyond = MessageError::CommitBeyondLog { commit: 6, last: 5 };
    check(&Message { commit: 6, ..beat }, beyond);
    for kind in [
        MessageType::MsgHup,
        MessageType::MsgBeat,
        MessageType::MsgPropose,
        MessageType::MsgUnreachable,
        MessageType::MsgSnapStatus,
        MessageType::MsgCheckQuorum,
        MessageType::MsgTransferLeader,
        MessageType::MsgReadIndex,
        MessageType::MsgReadIndexResp,
    ] {
        check(&message(kind, 1), MessageError::Kind { kind: kind as i32 });
    }
    let out_of_order = |index| MessageError::Entries { index };
    check(&append_of(2, 5, 1, &[(7, 2)], 0), out_of_order(6));
    check(&append_of(2, 5, 1, &[(6, 2), (6, 2)], 0), out_of_order(7));
    check(&append_of(2, 5, 1, &[(6, 3)], 0), out_of_order(6));
    check(&append_of(2, 5, 1, &[(6, 2), (7, 1)], 0), out_of_order(7));
    check(&append_of(2, 5, 3, &[], 0), out_of_order(5));
    let mut large = append_of(2, 5, 1, &[(6, 2)], 0);
    large.mut_entries()[0].data = vec![0; (2 << 20) + 1].into();
    check(&large, MessageError::EntryTooLarge { index: 6, bytes: (2 << 20) + 1 });
    assert_eq!(group.status().term, before.term);
}

#[test]
fn every_truncation_of_a_message_is_survived() {
    let mut group = of_three();
    let bytes = append_of(2, 5, 1, &[(6, 2), (7, 2)], 5).write_to_bytes().unwrap();
    let malformed = Effects { refused: Some(MessageError::Malformed), ..Effects::default() };
    let mut refused = 0;
    for end in 0..bytes.len() {
        let effects = group.step(NOW, Input::Message(bytes[..end].to_vec().into()));
        assert!(effects.refused.is_some() || effects.appends.len() <= 1);
        refused += usize::from(effects == malformed);
    }
    assert!(refused > bytes.len() / 2, "{refused}");
    group.step(NOW, Input::Message(vec![0xff; 100].into()));
}

#[test]
fn a_leader_refuses_acknowledgements_of_what_it_does_not_have() {
    let mut group = of_three();
    group.step(NOW, Input::Campaign);
    let stands = deliver(&mut group, &message(MessageType::MsgRequestPreVoteResponse, 2));
    group.step(NOW, Input::Persisted(stands.appends[0].ready));
    deliver(&mut group, &message(MessageType::MsgRequestVoteResponse, 2));
    assert_eq!(group.status().role, Role::Leader);
    let answer = message(MessageType::MsgAppendResponse, 2);
    let beyond = Some(MessageError::IndexBeyondLog { index: 7, last: 6 });
    assert_eq!(deliver(&mut group, &Message { index: 7, ..answer.clone() }).refused, beyond);
    let hint = Message { reject: true, reject_hint: 7, ..answer.clone() };
    assert_eq!(deliver(&mut group, &hint).refused, beyond);
    let snapshot = Message { request_snapshot: 1, ..answer.clone() };
    let kind = MessageType::MsgSnapshot as i32;
    assert_eq!(deliver(&mut group, &snapshot).refused, Some(MessageError::Kind { kind }));
    // Its own disk is not needed for a majority of the other two.
    deliver(&mut group, &Message { index: 6, ..answer.clone() });
    assert_eq!(group.status().committed, LogIndex(3));
    deliver(&mut group, &Message { index: 6, from: 3, ..answer });
    let status = group.status();
    assert_eq!((status.committed, status.persisted), (LogIndex(6), LogIndex(5)));
    assert_eq!(status.handed_out, LogIndex(5), "and yet it applies only what it has");
}

#[test]
fn merged_appends_are_cut_to_size_again() {
    let entries: Vec<_> = (6..106).map(|index| (index, 2)).collect();
    let mut merged = append_of(2, 5, 1, &entries, 7);
    for entry in merged.mut_entries() {
        entry.data = vec![7; 64 << 10].into();
    }
    merged.mut_entries()[50].data = vec![7; 1 << 20].into();
    let mut pieces = Vec::new();
    codec::encode(merged.clone(), &mut pieces);
    let mut next = (5, 1);
    let mut rejoined = Vec::new();
    for (out, piece) in pieces.iter().zip(decoded(&pieces)) {
        assert_eq!((piece.index, piece.log_term), next);
        assert_eq!((piece.term, piece.commit, piece.to, piece.from), (2, 7, 1, 2));
        assert!(out.bulk && (out.bytes.len() < (256 << 10) + 100 || piece.entries.len() == 1));
        let last = piece.entries.last().unwrap();
        next = (last.index, last.term);
        rejoined.extend(piece.entries.into_vec());
    }
    assert_eq!(rejoined, merged.entries.into_vec());
    assert!(pieces.len() > 30);
}
