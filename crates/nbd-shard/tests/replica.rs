//! What a replica answers, keeps and forgets, with its log, its store and its peers real and only
//! time, network and disk played.

mod common;

use bytes::Bytes;
use common::Cluster;
use nbd_consensus::HardState;
use nbd_shard::{Answer, Event, LogWrite};
use nbd_store::{Epoch, Outcome, Owner, SessionId, VolumeId, command};
use nbd_topology::{LogIndex, ReplicaId};

fn counter(addend: i64) -> Bytes {
    command::encode_add_counter(addend)
}

fn counted(value: i64) -> Answer {
    Answer::Outcome(Outcome::Counter(value))
}

#[test]
fn the_leader_answers_in_order_and_followers_name_the_leader() {
    let mut cluster = Cluster::led(3, 1 << 20);
    cluster.propose(0, (1..=5).map(|n| (counter(1), n)).collect());
    cluster.settle();
    for n in 1..=5 {
        assert_eq!(cluster.nodes[0].answers[&n], counted(i64::from(n)));
    }
    cluster.propose(1, vec![(counter(1), 9)]);
    let leader = ReplicaId::new(1);
    assert_eq!(cluster.nodes[1].answers[&9], Answer::NotLeader(leader));
    cluster.run(4);
    for node in &cluster.nodes {
        assert_eq!(node.reader.counter(), 5, "every replica applies every command once");
    }
}

#[test]
fn nothing_is_answered_before_a_majority_has_it_on_disk() {
    let mut cluster = Cluster::led(3, 1 << 20);
    cluster.cut.extend([1, 2]);
    cluster.propose(0, vec![(counter(1), 1)]);
    cluster.settle();
    assert!(cluster.nodes[0].answers.is_empty(), "one disk is no majority");
    cluster.cut.remove(&1);
    cluster.run(4);
    assert_eq!(cluster.nodes[0].answers[&1], counted(1));
}

// Goal: whoever waits at a leader that is deposed hears of it, once, and is not told more than is
// known: what was logged may yet be committed, what was not logged cannot be.
#[test]
fn a_deposed_leader_gives_everybody_an_answer() {
    let mut cluster = Cluster::led(3, 1 << 20);
    cluster.cut.insert(0);
    // Two are logged, each in a log write of its own; the third has to wait for those.
    cluster.propose(0, vec![(counter(1), 1)]);
    cluster.propose(0, vec![(counter(1), 2)]);
    cluster.propose(0, vec![(counter(1), 3)]);
    cluster.step(0, Event::Barrier(4));
    cluster.run(60);
    let new = cluster.leader().unwrap();
    assert_ne!(new, 0);
    let answers = &cluster.nodes[0].answers;
    assert_eq!(answers.len(), 4, "{answers:?}");
    assert_eq!(answers[&1], Answer::Lost);
    assert_eq!(answers[&2], Answer::Lost);
    assert!(matches!(answers[&3], Answer::Lost | Answer::NotLeader(_)), "{answers:?}");
    assert!(matches!(answers[&4], Answer::NotLeader(_)));
    cluster.propose(new, vec![(counter(10), 5)]);
    cluster.settle();
    assert_eq!(cluster.nodes[new].answers[&5], counted(10));
    cluster.cut.clear();
    cluster.run(40);
    for node in &cluster.nodes {
        assert_eq!(node.reader.counter(), 10, "what was lost is nowhere");
    }
}

#[test]
fn a_barrier_waits_for_a_majority() {
    let mut cluster = Cluster::led(3, 1 << 20);
    cluster.step(0, Event::Barrier(1));
    cluster.step(1, Event::Barrier(2));
    assert!(!cluster.nodes[0].answers.contains_key(&1));
    assert!(matches!(cluster.nodes[1].answers[&2], Answer::NotLeader(Some(_))));
    cluster.run(3);
    assert_eq!(cluster.nodes[0].answers[&1], Answer::Ready);
}

#[test]
fn only_the_leader_holds_a_lease_and_only_while_it_is_heard() {
    let mut cluster = Cluster::led(3, 1 << 20);
    cluster.run(4);
    assert!(cluster.nodes[0].replica.read_lease().is_some());
    assert!(cluster.nodes[1].replica.read_lease().is_none());
    let until = cluster.nodes[0].replica.read_lease();
    cluster.cut.insert(0);
    cluster.run(4);
    let still = cluster.nodes[0].replica.read_lease();
    assert!(still.is_none() || still == until, "nobody prolonged it");
}

fn write(seq: u64, volume: VolumeId, byte: u8) -> Bytes {
    let payload = vec![byte; 4096];
    let (session, epoch) = (SessionId(7), Epoch(1));
    command::encode_write(session, epoch, seq, volume, 4096 * (seq % 64), &payload)
}

fn volume(cluster: &mut Cluster) -> VolumeId {
    let create = command::encode_create_volume("v", 1 << 20, "").expect("a good name");
    cluster.propose(0, vec![(create, 1000)]);
    cluster.settle();
    let Answer::Outcome(Outcome::VolumeCreated(info)) = cluster.nodes[0].answers[&1000].clone()
    else {
        panic!("{:?}", cluster.nodes[0].answers)
    };
    let owner = Owner { node: 1, incarnation: 1 };
    let open = command::encode_open_session(SessionId(7), Epoch(1), info.id, owner);
    cluster.propose(0, vec![(open, 1001)]);
    cluster.settle();
    assert_eq!(cluster.nodes[0].answers[&1001], Answer::Outcome(Outcome::SessionOpened));
    info.id
}

// Goal: a follower that was away is fed from the leader's log, also past a checkpoint of the
// leader, as long as the log is kept.
#[test]
fn a_follower_is_fed_from_the_log_that_is_kept() {
    let mut cluster = Cluster::led(3, 8 << 20);
    let id = volume(&mut cluster);
    cluster.cut.insert(2);
    for seq in 1..=100 {
        cluster.propose(0, vec![(write(seq, id, 1), u32::try_from(seq).unwrap())]);
        cluster.settle();
    }
    cluster.checkpoint(0);
    cluster.run(50);
    assert_eq!(cluster.fetches, 0);
    cluster.cut.clear();
    cluster.run(60);
    assert!(cluster.fetches > 0, "memory does not reach that far");
    assert_eq!(cluster.nodes[2].replica.applied(), cluster.nodes[0].replica.applied());
}

#[test]
fn log_that_is_too_old_is_let_go() {
    let mut cluster = Cluster::led(3, 64 << 10);
    let id = volume(&mut cluster);
    for seq in 1..=100 {
        cluster.propose(0, vec![(write(seq, id, 1), u32::try_from(seq).unwrap())]);
        cluster.settle();
    }
    let before = cluster.nodes[0].replica.status().compacted;
    assert_eq!(before, LogIndex(0), "no checkpoint covers it");
    cluster.checkpoint(0);
    let status = cluster.nodes[0].replica.status();
    assert!(status.compacted.0 > 80, "{}", status.compacted);
    assert!(status.compacted < status.applied, "the newest entries are kept");
}

// Goal: a follower that the log can no longer feed takes over the leader's chunks and goes on
// behind them, while writes go on.
#[test]
fn a_follower_beyond_the_log_switches_to_a_snapshot() {
    let mut cluster = Cluster::led(3, 4 << 10);
    let id = volume(&mut cluster);
    cluster.run(4);
    cluster.cut.insert(2);
    for seq in 1..=100 {
        cluster.propose(0, vec![(write(seq, id, 1), u32::try_from(seq).unwrap())]);
        cluster.settle();
    }
    cluster.checkpoint(0);
    cluster.run(50);
    cluster.cut.clear();
    cluster.run(60);
    assert!(cluster.nodes[2].offered.is_some(), "the log does not reach back");
    let snapshot = cluster.copy_chunks(0, 2);
    for seq in 101..=110 {
        cluster.propose(0, vec![(write(seq, id, 2), u32::try_from(seq).unwrap())]);
        cluster.settle();
    }
    cluster.step(2, Event::ResyncReady(snapshot));
    let plan = cluster.nodes[2].install.take().expect("nothing is under way");
    let node = &mut cluster.nodes[2];
    node.checkpointer.install(common::SHARD, &plan.snapshot, plan.hard_state).unwrap();
    cluster.step(2, Event::Installed);
    cluster.run(60);
    assert_eq!(cluster.nodes[2].replica.applied(), cluster.nodes[0].replica.applied());
    for at in [0, 2] {
        cluster.checkpoint(at);
    }
    let digests = |at: usize| cluster.nodes[at].reader.digests(None, 100).unwrap();
    assert_eq!(digests(0), digests(2));
}

/// Fills segments of a replica's log, as other shards of its node would.
fn fill_log(cluster: &mut Cluster, at: usize, segments: usize) {
    let node = &mut cluster.nodes[at];
    let status = node.replica.status();
    let (term, commit) = (status.term, status.committed);
    let hard_state = Some(HardState { term, vote: ReplicaId::new(1), commit });
    let write = LogWrite { ready: None, hard_state, entries: Vec::new() };
    (0..segments << 8).for_each(|_| _ = node.write(&write));
}

// Goal: a shard that has nothing to write is no reason never to catch a replica up: what the log
// let go of for other shards, a snapshot makes good.
#[test]
fn a_follower_of_an_idle_shard_is_caught_up_once_the_log_has_moved_on() {
    let mut cluster = Cluster::led(3, 1 << 20);
    let id = volume(&mut cluster);
    cluster.run(4);
    cluster.cut.insert(2);
    for seq in 1..=30 {
        cluster.propose(0, vec![(write(seq, id, 1), u32::try_from(seq).unwrap())]);
        cluster.settle();
    }
    // Of sixteen segments there may be, twice as many as that in turn.
    for _ in 0..3 {
        cluster.checkpoint(0);
        fill_log(&mut cluster, 0, 10);
    }
    cluster.checkpoint(0);
    assert_eq!(cluster.nodes[0].segments.first_kept(common::SHARD), None);
    cluster.cut.clear();
    cluster.run(60);
    assert!(cluster.nodes[2].offered.is_some());
}

#[test]
fn entries_that_cannot_be_committed_do_not_hold_up_the_log() {
    let mut cluster = Cluster::led(3, 0);
    let id = volume(&mut cluster);
    cluster.run(4);
    cluster.cut.extend([1, 2]);
    cluster.propose(0, vec![(write(1, id, 1), 1)]);
    cluster.settle();
    let tail = cluster.nodes[0].replica.status().last;
    assert!(cluster.nodes[0].replica.applied() < tail);

    // Other shards of the node go on: nine of the sixteen segments there may be.
    fill_log(&mut cluster, 0, 9);
    cluster.checkpoint(0);
    cluster.settle();
    assert!(!cluster.nodes[0].segments.is_held_up_by(common::SHARD));
    cluster.checkpoint(0);
    let live = cluster.nodes[0].segments.live_bytes();
    assert!(live < 2 << 20, "{live} bytes");

    // The entry itself is where it has to be, whatever comes of it.
    let raft = cluster.after_crash(0);
    assert_eq!(raft.tail.last().map(|entry| entry.index), Some(tail));
    fill_log(&mut cluster, 0, 12);
    cluster.cut.clear();
    cluster.run(80);
    for at in 0..3 {
        assert!(cluster.nodes[at].replica.applied() >= tail, "replica {at}");
        cluster.checkpoint(at);
    }
    let digests = |at: usize| cluster.nodes[at].reader.digests(None, 100).unwrap();
    assert_eq!(digests(0), digests(1));
}
