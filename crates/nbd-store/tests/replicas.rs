//! What replicas of a shard agree on: members, sessions' owners, versions of chunks; and how one
//! makes good what is damaged at another.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use bytes::Bytes;
use common::{
    BLOCK, CHUNK, MIB, Model, Node, OWNER, Op, SESSION, SHARD, encode_change, options, random_op,
};
use nbd_log::checksum::crc32c;
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::{EntryKind, EntryRecord, Record};
use nbd_store::{
    Applied, ChunkIndex, ChunkKey, DamagedChunk, Epoch, FormError, Formation, Outcome, Owner,
    ReadError, Rejection, ReplicaAddresses, ReplicaInfo, ReplicaRegistration, SessionId,
    StoreOptions, VolumeId, encode_close_session, encode_end_sessions, encode_open_session,
    encode_register_replica, encode_write,
};
use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, Term};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

const SIZE: usize = 8 * CHUNK;

fn id(id: u64) -> ReplicaId {
    ReplicaId::new(id).unwrap()
}

fn registration(node: &str, directory: u128) -> ReplicaRegistration {
    let addresses = ReplicaAddresses { grpc: format!("{node}:7400"), ..Default::default() };
    ReplicaRegistration { node: node.parse().unwrap(), directory, addresses }
}

fn formation(replica: u64) -> Formation {
    let info = |n: u64| {
        let ReplicaRegistration { node, directory, addresses } =
            registration(&format!("node-{n}"), u128::from(n));
        ReplicaInfo { id: id(n), node, directory, addresses }
    };
    Formation {
        replica: id(replica),
        membership: Membership::of_voters([id(1), id(2), id(3)]),
        replicas: (1..=3).map(info).collect(),
        next_replica: 4,
    }
}

#[test]
fn a_shard_is_formed_once() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    assert_eq!(node.reader.formation(), None);
    let bad = Formation { next_replica: 3, ..formation(2) };
    assert!(matches!(node.checkpointer.form(SHARD, &bad), Err(FormError::Invalid)));
    node.checkpointer.form(SHARD, &formation(2)).unwrap();
    assert_eq!(node.reader.formation(), Some(formation(2)));
    drop(node);
    let mut node = Node::open(&disk.after_crash_as(CrashStyle::Clean, 1)).unwrap();
    assert_eq!(node.reader.formation(), Some(formation(2)));
    assert_eq!(node.raft.membership, formation(2).membership);
    node.checkpointer.form(SHARD, &formation(2)).unwrap();
    let other = node.checkpointer.form(SHARD, &formation(3));
    assert!(matches!(other, Err(FormError::AlreadyFormed)), "{other:?}");

    let mut old = Node::open(&MemoryDisk::new(2)).unwrap();
    old.prepare("v", SIZE as u64).unwrap();
    let late = old.checkpointer.form(SHARD, &formation(1));
    assert!(matches!(late, Err(FormError::AlreadyFormed)), "it has a history of its own");
}

/// Appends and applies a change of the membership.
fn change(node: &mut Node, change: MembershipChange) {
    let (index, term, kind) = (node.index.next(), node.term, EntryKind::ConfChangeV2);
    let data = encode_change(change);
    let entry = EntryRecord { shard: SHARD, index, term, kind, data: &data };
    let positions = node.log.append(&[Record::Entry(entry)]).unwrap();
    node.writer.apply(index, term, Applied::Membership(change), positions[0]);
    node.index = index;
}

#[test]
fn members_come_and_go_and_are_found_again() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    node.checkpointer.form(SHARD, &formation(2)).unwrap();
    let registered = |node: &mut Node, directory: u128| {
        let next = id(node.reader.formation().unwrap().next_replica);
        let command = encode_register_replica(&registration("node-3", directory), next).unwrap();
        match &node.propose(command).unwrap()[..] {
            [Outcome::ReplicaRegistered(info)] => info.clone(),
            other => panic!("{other:?}"),
        }
    };
    let fourth = registered(&mut node, 33);
    assert_eq!((fourth.id, fourth.directory), (id(4), 33));
    assert_eq!(registered(&mut node, 33), fourth, "asked again");
    assert_eq!(registered(&mut node, 3).id, id(3), "known from the start");
    change(&mut node, MembershipChange::AddLearner(id(4)));
    change(&mut node, MembershipChange::Remove(id(3)));
    change(&mut node, MembershipChange::AddVoter(id(4)));
    let expected = node.reader.formation().unwrap();
    assert_eq!(expected.membership, Membership::of_voters([id(1), id(2), id(4)]));
    assert_eq!(expected.replicas.iter().map(|r| r.id.get()).collect::<Vec<_>>(), [1, 2, 4]);
    // One more entry, so that what came before is known to be committed.
    node.propose(Bytes::new()).unwrap();
    for checkpoint in [false, true, false] {
        if checkpoint {
            node.checkpoint().unwrap();
        }
        drop(node);
        node = Node::open(&disk).unwrap();
        assert_eq!(node.reader.formation(), Some(expected.clone()));
        assert_eq!(node.raft.membership, expected.membership);
        assert_eq!(node.reader.replicas(), expected.replicas);
    }
    assert_eq!(registered(&mut node, 3).id, id(5), "an id that left is never given again");
}

fn propose(node: &mut Node, data: Bytes) -> Outcome {
    let mut outcomes = node.propose(data).unwrap();
    assert_eq!(outcomes.len(), 1);
    outcomes.remove(0)
}

#[test]
fn a_session_is_opened_once_and_resumed_only_while_it_lives() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let other = Owner { node: 0xdef, incarnation: 7 };
    let open = |epoch, owner| encode_open_session(SESSION, Epoch(epoch), volume, owner);
    let rejected = |rejection| Outcome::Rejected(rejection);
    let owner = |node: &Node| node.reader.sessions()[0].owner;
    assert_eq!(propose(&mut node, open(1, OWNER)), Outcome::SessionOpened, "sent again");
    assert_eq!(propose(&mut node, open(1, other)), rejected(Rejection::StaleEpoch));
    assert_eq!(propose(&mut node, open(0, OWNER)), rejected(Rejection::BadCommand));
    assert_eq!(owner(&node), OWNER);
    assert_eq!(propose(&mut node, open(3, other)), Outcome::SessionOpened);
    assert_eq!(propose(&mut node, open(3, OWNER)), rejected(Rejection::StaleEpoch));
    assert_eq!(propose(&mut node, open(2, OWNER)), rejected(Rejection::StaleEpoch));
    assert_eq!(propose(&mut node, open(1, OWNER)), rejected(Rejection::StaleEpoch));
    node.checkpoint().unwrap();
    drop(node);
    let mut node = Node::open(&disk).unwrap();
    assert_eq!((owner(&node), node.reader.sessions()[0].epoch), (other, Epoch(3)));
    let close = encode_close_session(SESSION, Epoch(3));
    assert_eq!(propose(&mut node, close), Outcome::SessionClosed);
    // It would not know what it applied before.
    assert_eq!(propose(&mut node, open(4, other)), rejected(Rejection::UnknownSession));
    assert_eq!(node.reader.sessions(), []);
}

#[test]
fn sessions_of_earlier_lives_of_a_node_are_ended() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let owner = |node, incarnation| Owner { node, incarnation };
    let owners = [owner(1, 1), owner(1, 2), owner(1, 2), owner(1, 3), owner(2, 1), owner(1, 4)];
    for (session, owner) in (10..).map(SessionId).zip(owners) {
        let open = encode_open_session(session, Epoch(1), volume, owner);
        assert_eq!(propose(&mut node, open), Outcome::SessionOpened);
    }
    let end = encode_end_sessions(owner(1, 3));
    assert_eq!(propose(&mut node, end.clone()), Outcome::SessionsEnded(3));
    assert_eq!(propose(&mut node, end), Outcome::SessionsEnded(0));
    let left: Vec<_> = node.reader.sessions().iter().map(|session| session.id.0).collect();
    // The one of a later life stays: the command may have been on its way for long.
    assert_eq!(left, [13, 14, 15, SESSION.0]);
    let write = encode_write(SessionId(11), Epoch(1), 1, volume, 0, &[1; 512]);
    assert_eq!(propose(&mut node, write), Outcome::Rejected(Rejection::UnknownSession));
}

#[test]
fn entries_are_kept_for_followers_until_the_log_needs_the_room() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    node.segments.retain(SHARD, LogIndex(20));
    let write = |seq: u64| {
        let chunk = seq % 8 * CHUNK as u64;
        Op::Write { offset: chunk, len: CHUNK as u64, fill: seq }.encode(seq, volume)
    };
    for seq in 1..=60 {
        node.propose(write(seq)).unwrap();
    }
    node.checkpoint().unwrap();
    let kept = node.segments.first_kept(SHARD).unwrap();
    assert!(kept > LogIndex(2) && kept <= LogIndex(21), "{kept}");
    assert!(node.segments.retained_bytes() >= 2 * MIB);
    assert!(node.segments.live_bytes() < 2 * MIB);
    // The log takes note on disk of what was freed with its next batch.
    node.propose(Bytes::new()).unwrap();
    let index = node.index;
    drop(node);

    // Opened again, they are still there to be sent.
    let mut node = Node::open(&disk).unwrap();
    assert_eq!(node.index, index);
    assert!(node.raft.compacted.0 >= kept && node.raft.compacted.0 <= LogIndex(21));
    assert_eq!(node.raft.kept.len(), node.raft.terms.len());
    let first = node.raft.kept[0];
    assert_eq!(first.index, node.raft.compacted.0.next());
    let mut data = vec![0; first.len];
    node.log_reader.read(first.position, &mut data).unwrap();
    assert!(data == write(first.index.0 - 2));
    assert_eq!(node.raft.kept.last().unwrap().index, index);

    // New entries need the room.
    node.segments.retain(SHARD, LogIndex(20));
    for seq in 61..=200 {
        node.propose(write(seq)).unwrap();
    }
    let kept = node.segments.first_kept(SHARD).unwrap();
    assert!(kept > LogIndex(60), "{kept}");
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Checkpoint,
    /// Power fails at so many durability operations into a checkpoint.
    CutCheckpoint(u64),
    Reopen,
}

fn events() -> impl Strategy<Value = Vec<(usize, Event)>> {
    let event = prop_oneof![
        3 => Just(Event::Checkpoint),
        3 => (1..20_u64).prop_map(Event::CutCheckpoint),
        1 => Just(Event::Reopen),
    ];
    prop::collection::vec((0..60_usize, event), 0..12)
}

/// Applies the same history with its own interruptions, and says what came of it.
fn live_through(
    ops: &[Vec<Op>],
    events: &[(usize, Event)],
    seed: u64,
) -> Vec<(u64, LogIndex, u64)> {
    let mut disk = MemoryDisk::new(seed);
    let mut node = Node::open(&disk).unwrap();
    let (volume, mut seq) = (node.prepare("v", SIZE as u64).unwrap(), 0);
    let mut model = Model::new(SIZE);
    for (at, entry) in ops.iter().enumerate() {
        let mut data = Vec::new();
        for op in entry {
            seq += 1;
            data.extend(op.encode(seq, volume));
            model.apply(*op);
        }
        // Every replica has the same terms.
        node.term = Term(5);
        node.propose(data.into()).unwrap();
        for (_, event) in events.iter().filter(|(when, _)| *when == at) {
            match event {
                Event::Checkpoint => node.checkpoint().unwrap(),
                Event::CutCheckpoint(n) => {
                    disk.crash_at(disk.sync_points() + n);
                    _ = node.checkpoint();
                    drop(node);
                    disk = disk.after_crash_as(CrashStyle::Kept, seed);
                    node = Node::open(&disk).unwrap();
                }
                Event::Reopen => {
                    drop(node);
                    node = Node::open(&disk).unwrap();
                }
            }
        }
    }
    node.checkpoint().unwrap();
    model.check(&node, volume).unwrap();
    let all = ChunkIndex(0)..ChunkIndex(100);
    let chunks = node.reader.chunk_digests(volume, all).unwrap();
    chunks.iter().map(|chunk| (chunk.chunk.0, chunk.last_index, chunk.digest)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn the_same_history_gives_the_same_digests(
        seed in any::<u64>(),
        first in events(),
        second in events(),
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut op = |at| {
            // Ranges of whole chunks above all, in which neighbours could be joined.
            match random_op(&mut rng, SIZE, at) {
                Op::Zero { offset, len, .. } => {
                    let chunk = CHUNK as u64;
                    let end = (offset + len).next_multiple_of(chunk);
                    let offset = offset / chunk * chunk;
                    Op::Zero { offset, len: end - offset, no_hole: true }
                }
                op => op,
            }
        };
        let ops: Vec<Vec<Op>> = (0..60_u64).map(|at| vec![op(at), op(at + 1000)]).collect();
        let found = live_through(&ops, &first, 1);
        prop_assert!(!found.is_empty());
        prop_assert_eq!(&found, &live_through(&ops, &second, 2));
        prop_assert_eq!(&found, &live_through(&ops, &[], 3));
    }
}

/// Two nodes with the same history, all of it home.
fn pair(ops: &[Op]) -> ([MemoryDisk; 2], [Node; 2], VolumeId, Model) {
    let disks = [MemoryDisk::new(1), MemoryDisk::new(2)];
    let mut nodes = [Node::open(&disks[0]).unwrap(), Node::open(&disks[1]).unwrap()];
    let mut model = Model::new(SIZE);
    let mut volume = VolumeId(0);
    for node in &mut nodes {
        volume = node.prepare("v", SIZE as u64).unwrap();
        for (seq, op) in (1..).zip(ops) {
            assert_eq!(propose(node, op.encode(seq, volume)), Outcome::Done);
        }
        node.checkpoint().unwrap();
    }
    ops.iter().for_each(|op| model.apply(*op));
    (disks, nodes, volume, model)
}

fn whole(chunk: u64, fill: u64) -> Op {
    Op::Write { offset: chunk * CHUNK as u64, len: CHUNK as u64, fill }
}

/// Scrubs all, a few chunks at a time.
fn scrub(node: &Node) -> (u64, Vec<DamagedChunk>) {
    let (mut bytes, mut damaged, mut after) = (0, Vec::new(), None::<ChunkKey>);
    loop {
        let page = node.reader.scrub(after, 2).unwrap();
        bytes += page.bytes;
        damaged.extend(page.damaged);
        after = page.next;
        if after.is_none() {
            return (bytes, damaged);
        }
    }
}

#[test]
fn a_scrub_finds_damage_and_a_peer_makes_it_good() {
    let zeroes = Op::Zero { offset: 3 * CHUNK as u64, len: CHUNK as u64, no_hole: true };
    let (disks, [mut node, peer], volume, model) =
        pair(&[whole(0, 1), whole(1, 2), whole(2, 3), zeroes]);
    assert_eq!(scrub(&node), (3 * CHUNK as u64, vec![]));
    disks[0].flip_bit_once("data", CHUNK as u64 + 9);
    assert_eq!(scrub(&node).1, [], "damaged on the way is not damaged");
    disks[0].flip_bit("data", CHUNK as u64 + 2 * BLOCK as u64 + 9);
    let bad = DamagedChunk { volume, chunk: ChunkIndex(1), last_index: LogIndex(4) };
    assert_eq!(scrub(&node), (3 * CHUNK as u64, vec![bad]));
    assert!(matches!(node.reader.read_chunk(volume, bad.chunk), Err(ReadError::Corrupt { .. })));

    // The read that meets it can be served by the peer.
    let block = 16 + 2;
    let error = node.read(volume, block * BLOCK as u64, 100).unwrap_err();
    let ReadError::Corrupt { block: found, crc: Some(crc), .. } = error else { panic!("{error}") };
    assert_eq!(found, block);
    let good = peer.reader.read_block(volume, block, crc).unwrap().unwrap();
    assert!(good == model.bytes[block as usize * BLOCK..][..BLOCK]);
    assert_eq!(node.reader.read_block(volume, block, crc).unwrap(), None);
    assert_eq!(peer.reader.read_block(volume, block, !crc).unwrap(), None);

    // And the chunk as a whole is put right.
    let image = peer.reader.read_chunk(volume, bad.chunk).unwrap().unwrap();
    assert_eq!(image.last_index, bad.last_index);
    assert!(node.checkpointer.replace_chunk(SHARD, &image).unwrap());
    assert_eq!(scrub(&node).1, []);
    model.check(&node, volume).unwrap();
    drop(node);
    let node = Node::open(&disks[0].after_crash_as(CrashStyle::Clean, 1)).unwrap();
    model.check(&node, volume).unwrap();
    assert_eq!(node.reader.digests(None, 9).unwrap(), peer.reader.digests(None, 9).unwrap());
}

#[test]
fn a_chunk_that_has_changed_is_not_replaced() {
    let (_, [mut node, peer], volume, mut model) = pair(&[whole(0, 1), whole(1, 2)]);
    let image = peer.reader.read_chunk(volume, ChunkIndex(1)).unwrap().unwrap();
    let part = Op::Write { offset: CHUNK as u64 + 10, len: 20, fill: 7 };
    assert_eq!(propose(&mut node, part.encode(3, volume)), Outcome::Done);
    model.apply(part);
    // Changed in the log only: what is at home may still be replaced, the change stays on top.
    assert!(node.checkpointer.replace_chunk(SHARD, &image).unwrap());
    model.check(&node, volume).unwrap();
    node.checkpoint().unwrap();
    assert!(!node.checkpointer.replace_chunk(SHARD, &image).unwrap());
    let trim = Op::Trim { offset: 0, len: SIZE as u64 };
    assert_eq!(propose(&mut node, trim.encode(4, volume)), Outcome::Done);
    node.checkpoint().unwrap();
    assert!(!node.checkpointer.replace_chunk(SHARD, &image).unwrap(), "nor does it come back");
    model.apply(trim);
    model.check(&node, volume).unwrap();
}

#[test]
fn damage_that_a_checkpoint_meets_is_reported_and_can_be_made_good() {
    let (disks, [mut node, mut peer], volume, mut model) = pair(&[whole(0, 1), whole(1, 2)]);
    disks[0].flip_bit("data", 5 * BLOCK as u64 + 1);
    // Both a part of the damaged block and another block change, so that the chunk moves.
    for (seq, offset) in [(3, 5 * BLOCK as u64 + 100), (4, 9 * BLOCK as u64)] {
        let op = Op::Write { offset, len: 500, fill: seq };
        for node in [&mut node, &mut peer] {
            assert_eq!(propose(node, op.encode(seq, volume)), Outcome::Done);
        }
        model.apply(op);
    }
    let report = node.checkpointer.run().unwrap();
    let expected = DamagedChunk { volume, chunk: ChunkIndex(0), last_index: LogIndex(6) };
    assert_eq!((report.corrupt_blocks, &report.damaged[..]), (1, &[expected][..]));
    assert_eq!(scrub(&node).1, [expected]);
    peer.checkpoint().unwrap();
    let image = peer.reader.read_chunk(volume, ChunkIndex(0)).unwrap().unwrap();
    assert!(node.checkpointer.replace_chunk(SHARD, &image).unwrap());
    model.check(&node, volume).unwrap();
    assert_eq!(node.reader.digests(None, 9).unwrap(), peer.reader.digests(None, 9).unwrap());
}

#[test]
fn blocks_are_found_in_every_layer() {
    let disk = MemoryDisk::new(1);
    let no_cache = StoreOptions { log_cache_bytes: 0, ..options() };
    let mut node = Node::open_with(&disk, no_cache).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    propose(&mut node, whole(0, 1).encode(1, volume));
    node.checkpoint().unwrap();
    let home = node.read(volume, 0, BLOCK).unwrap();
    propose(&mut node, Op::Write { offset: 5, len: 10, fill: 2 }.encode(2, volume));
    let merged = node.read(volume, 0, BLOCK).unwrap();
    propose(
        &mut node,
        Op::Write { offset: BLOCK as u64, len: BLOCK as u64, fill: 3 }.encode(3, volume),
    );
    let in_log = node.read(volume, BLOCK as u64, BLOCK).unwrap();
    let find = |block, bytes: &[u8]| node.reader.read_block(volume, block, crc32c(bytes)).unwrap();
    for (block, bytes) in [(0, &home), (0, &merged), (1, &in_log), (20, &vec![0; BLOCK])] {
        assert_eq!(find(block, bytes).as_deref(), Some(&bytes[..]));
    }
    assert_eq!(find(2, &home), None);
    let foreign = VolumeId(volume.0 + (1 << 32));
    assert_eq!(node.reader.read_block(foreign, 0, crc32c(&home)).unwrap(), None);
}

#[test]
fn chunks_are_listed_page_by_page() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", 64 * MIB * 3).unwrap();
    for (seq, chunk) in (1..).zip([0, 1, 2, 5, 1023, 1024, 2999]) {
        let op = Op::Write { offset: chunk * CHUNK as u64, len: BLOCK as u64, fill: chunk };
        propose(&mut node, op.encode(seq, volume));
    }
    node.checkpoint().unwrap();
    let (mut after, mut stamps, mut runs) = (None, Vec::new(), Vec::new());
    loop {
        let page = node.reader.manifest(LogIndex(3), after, 2).unwrap();
        assert_eq!(page.applied, LogIndex(9));
        assert!(page.chunks.len() <= 2);
        stamps.extend(page.chunks.iter().map(|stamp| (stamp.chunk.0, stamp.last_index.0)));
        runs.extend(page.present.iter().flat_map(|run| run.start.0..run.end.0));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(stamps, [(1, 4), (2, 5), (5, 6), (1023, 7), (1024, 8), (2999, 9)]);
    assert_eq!(runs, [0, 1, 2, 5, 1023, 1024, 2999]);
    let (mut after, mut ranges) = (None, Vec::new());
    while let Some(range) = node.reader.digests(after, 1).unwrap().first() {
        ranges.push((range.first.0, range.newest.0));
        after = Some((range.volume, range.first));
    }
    assert_eq!(ranges, [(0, 7), (1024, 8), (2048, 9)]);
    let digests = node.reader.chunk_digests(volume, ChunkIndex(2)..ChunkIndex(1024)).unwrap();
    assert_eq!(digests.iter().map(|d| d.chunk.0).collect::<Vec<_>>(), [2, 5, 1023]);
}
