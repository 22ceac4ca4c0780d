//! The rules that keep data whole, one test each.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::{BLOCK, CHUNK, MIB, Model, Node, OWNER, Op, SESSION, SHARD, options, pattern};
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::{EntryKind, EntryRecord, HardState, LogPosition, Record};
use nbd_store::{
    Applied, Epoch, OpenError, Outcome, Place, ReadError, Rejection, SessionId, StoreOptions,
    VolumeId, encode_add_counter, encode_close_session, encode_create_volume, encode_open_session,
    encode_trim, encode_write,
};
use nbd_topology::{LogIndex, ShardId, Term};

const SIZE: usize = 8 * CHUNK;

fn whole_chunk(chunk: usize, fill: u64) -> Op {
    Op::Write { offset: (chunk * CHUNK) as u64, len: CHUNK as u64, fill }
}

/// A node whose volume was changed by `before`, checkpointed, and changed by `after`.
fn prepared(disk: &MemoryDisk, before: &[Op], after: &[Op]) -> (Node, VolumeId, Model) {
    let mut node = Node::open(disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let mut model = Model::new(SIZE);
    let mut seq = 0;
    for (at, op) in before.iter().chain(after).enumerate() {
        if at == before.len() {
            node.checkpoint().unwrap();
        }
        seq += 1;
        assert_eq!(node.propose(op.encode(seq, volume)).unwrap(), [Outcome::Done]);
        model.apply(*op);
    }
    (node, volume, model)
}

/// Stops power at each durability operation of a checkpoint, with everything written so far kept,
/// and looks at the volume as replayed.
fn survives_a_cut_checkpoint(before: &[Op], after: &[Op]) {
    for n in 1.. {
        let disk = MemoryDisk::new(5);
        let (mut node, volume, model) = prepared(&disk, before, after);
        let applied = node.index;
        disk.crash_at(disk.sync_points() + n);
        let finished = node.checkpoint().is_ok();
        drop(node);
        let disk = disk.after_crash_as(CrashStyle::Kept, 1);
        let mut node = Node::open(&disk).unwrap();
        model.check(&node, volume).unwrap_or_else(|e| panic!("cut at {n}: {e}"));
        assert_eq!(node.index, applied);
        node.checkpoint().unwrap();
        model.check(&node, volume).unwrap();
        if finished {
            assert!(n > 4, "a checkpoint has an intent, a data sync and a commit");
            return;
        }
    }
}

#[test]
fn a_partly_overwritten_block_does_not_go_in_place() {
    let part = Op::Write { offset: 5000, len: 1000, fill: 2 };
    survives_a_cut_checkpoint(&[whole_chunk(0, 1)], &[part]);
    let edge = Op::Zero { offset: 100, len: 3 * BLOCK as u64, no_hole: false };
    survives_a_cut_checkpoint(&[whole_chunk(0, 1)], &[edge]);
}

#[test]
fn a_left_slot_is_not_reused_in_the_same_transaction() {
    // Chunk 0 moves, for a part of it was overwritten; chunk 1 must not get its old slot.
    let part = Op::Write { offset: 10, len: 10, fill: 2 };
    survives_a_cut_checkpoint(&[whole_chunk(0, 1)], &[part, whole_chunk(1, 3)]);
}

#[test]
fn whole_blocks_overwritten_in_place_are_replayed() {
    let block = Op::Write { offset: 3 * BLOCK as u64, len: 2 * BLOCK as u64, fill: 2 };
    let trim = Op::Trim { offset: 4 * BLOCK as u64, len: BLOCK as u64 };
    survives_a_cut_checkpoint(&[whole_chunk(0, 1)], &[block, trim]);
}

#[test]
fn recovery_replays_at_least_what_was_overwritten_in_place() {
    // Raft's commit in the log lags behind; the checkpoint's intent must not.
    let disk = MemoryDisk::new(9);
    let (mut node, ..) = prepared(&disk, &[whole_chunk(0, 1)], &[whole_chunk(0, 2)]);
    let applied = node.index;
    // Past the intent, in the middle of writing home.
    let start = disk.sync_points();
    node.checkpointer.run_paced(&mut |_| disk.crash()).unwrap_err();
    assert!(disk.sync_points() > start, "the intent was made durable");
    drop(node);
    let disk = disk.after_crash_as(CrashStyle::Kept, 1);
    let node = Node::open(&disk).unwrap();
    assert_eq!(node.raft.applied, applied);
    assert!(node.raft.hard_state.commit >= applied);
}

#[test]
fn a_checkpoint_waits_for_older_readers() {
    let disk = MemoryDisk::new(2);
    let (mut node, volume, _) = prepared(&disk, &[whole_chunk(0, 1)], &[whole_chunk(1, 7)]);
    let mut plan = node.reader.resolve(volume, 0, CHUNK as u64).unwrap();
    node.propose(whole_chunk(0, 2).encode(100, volume)).unwrap();
    let reader = node.reader.clone();
    let checkpoint = std::thread::spawn(move || node.checkpointer.run());
    std::thread::sleep(Duration::from_millis(100));
    assert!(!checkpoint.is_finished(), "the slot that the plan names must not be overwritten");
    let mut buf = vec![0; CHUNK];
    plan.read_blocking(&mut buf).unwrap();
    assert!(buf == pattern(1, 0, CHUNK as u64), "the plan sees what it was made for");
    drop(plan);
    checkpoint.join().unwrap().unwrap();
    let mut plan = reader.resolve(volume, 0, CHUNK as u64).unwrap();
    plan.read_blocking(&mut buf).unwrap();
    assert!(buf == pattern(2, 0, CHUNK as u64));
}

fn corrupt_block(node: &Node, volume: VolumeId, offset: u64) -> (u64, Place) {
    for cached in [true, false] {
        let mut plan = node.reader.resolve(volume, offset, 10).unwrap();
        let mut buf = [0; 10];
        let result = if cached { plan.try_read_cached(&mut buf) } else { Ok(false) };
        let result = match result {
            Ok(true) => Ok(()),
            Ok(false) => plan.read_blocking(&mut buf),
            Err(error) => Err(error),
        };
        match result {
            Err(ReadError::Corrupt { volume: found, block, place, .. }) => {
                assert_eq!(found, volume);
                if !cached {
                    return (block, place);
                }
            }
            other => panic!("{other:?}"),
        }
    }
    unreachable!("the second round returns")
}

#[test]
fn a_flipped_bit_at_home_is_never_served() {
    let disk = MemoryDisk::new(3);
    let (mut node, volume, mut model) = prepared(&disk, &[whole_chunk(0, 1)], &[whole_chunk(2, 1)]);
    disk.flip_bit("data", 2 * BLOCK as u64 + 77);
    let at = 2 * BLOCK as u64 + 4000;
    let place = Place::Data(2 * BLOCK as u64);
    assert_eq!(corrupt_block(&node, volume, at), (2, place));
    assert_eq!(node.read(volume, 0, 2 * BLOCK).unwrap(), model.bytes[..2 * BLOCK]);
    // Moving the chunk, or overwriting a part of the block, does not make it whole.
    for (seq, offset) in [(50, 20 * 7), (51, at - 500)] {
        let op = Op::Write { offset, len: 20, fill: 3 };
        node.propose(op.encode(seq, volume)).unwrap();
        model.apply(op);
        let report = node.checkpointer.run().unwrap();
        assert_eq!(report.corrupt_blocks, 1);
        assert_eq!(corrupt_block(&node, volume, at).0, 2);
    }
    assert_eq!(node.read(volume, 0, 2 * BLOCK).unwrap(), model.bytes[..2 * BLOCK]);
    // Overwriting all of it does.
    let op = Op::Write { offset: 2 * BLOCK as u64, len: BLOCK as u64, fill: 4 };
    node.propose(op.encode(52, volume)).unwrap();
    model.apply(op);
    model.check(&node, volume).unwrap();
    assert_eq!(node.checkpointer.run().unwrap().corrupt_blocks, 0);
    model.check(&node, volume).unwrap();
}

#[test]
fn a_flipped_bit_in_the_log_is_never_served() {
    let disk = MemoryDisk::new(3);
    let no_cache = StoreOptions { log_cache_bytes: 0, ..options() };
    let mut node = Node::open_with(&disk, no_cache).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let mut model = Model::new(SIZE);
    // Two whole blocks, and parts of their neighbours.
    let op = Op::Write { offset: 4000, len: 2 * BLOCK as u64 + 500, fill: 8 };
    node.propose(op.encode(1, volume)).unwrap();
    model.apply(op);
    model.check(&node, volume).unwrap();
    let payload = node.last_position.plus(64 + 4 * 4).0;
    let (seq, offset) = (payload / MIB, payload % MIB);
    assert_eq!(seq, 1, "the first segment");
    let flip = |at: u64| disk.flip_bit("log/000000.seg", offset + at);
    for (at, block) in [(10, 0), (96 + 5, 1), (96 + 4096 + 7, 2), (2 * 4096 + 96 + 1, 3)] {
        flip(at);
        let start = 4000 + at - 5;
        assert_eq!(corrupt_block(&node, volume, start).0, block);
        flip(at);
        model.check(&node, volume).unwrap();
    }
    // Brought home while it is damaged, it stays damaged.
    flip(96 + 5);
    assert_eq!(node.checkpointer.run().unwrap().corrupt_blocks, 1);
    assert_eq!(corrupt_block(&node, volume, 5000).0, 1);
    let rest = 2 * BLOCK as u64;
    let found = node.read(volume, rest, SIZE - rest as usize).unwrap();
    assert!(found == model.bytes[rest as usize..]);
}

#[test]
fn each_mutation_counts_once() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let rejected = |rejection| [Outcome::Rejected(rejection)];
    let (epoch, older) = (Epoch(1), Epoch(0));
    let write = |epoch, seq, fill: u8| encode_write(SESSION, epoch, seq, volume, 0, &[fill; BLOCK]);
    let first_byte = |node: &Node| node.read(volume, 0, 1).unwrap()[0];

    assert_eq!(node.propose(write(epoch, 1, 1)).unwrap(), [Outcome::Done]);
    assert_eq!(node.propose(write(epoch, 2, 2)).unwrap(), [Outcome::Done]);
    assert_eq!(node.propose(write(epoch, 1, 1)).unwrap(), [Outcome::Done], "as recorded");
    assert_eq!(first_byte(&node), 2, "not applied again");
    assert_eq!(node.propose(write(older, 3, 3)).unwrap(), rejected(Rejection::StaleEpoch));

    // Two commands in one entry, the second past the end; its verdict is remembered.
    let past = encode_trim(SESSION, epoch, 5, volume, SIZE as u64 - 10, 11);
    let both = [write(epoch, 4, 4), past.clone()].concat();
    let outcomes = node.propose(Bytes::from(both)).unwrap();
    assert_eq!(outcomes, [Outcome::Done, Outcome::Rejected(Rejection::PastEnd)]);

    // All of this survives checkpoint and restart.
    node.checkpoint().unwrap();
    drop(node);
    let mut node = Node::open(&disk).unwrap();
    assert_eq!(node.propose(past).unwrap(), rejected(Rejection::PastEnd));
    assert_eq!(node.propose(write(epoch, 2, 2)).unwrap(), [Outcome::Done]);
    assert_eq!(first_byte(&node), 4);

    // Resumed: the older epoch is refused, what it applied is still known.
    let resume = encode_open_session(SESSION, Epoch(2), volume, OWNER);
    assert_eq!(node.propose(resume).unwrap(), [Outcome::SessionOpened]);
    assert_eq!(node.propose(write(epoch, 6, 6)).unwrap(), rejected(Rejection::StaleEpoch));
    assert_eq!(node.propose(write(Epoch(2), 4, 9)).unwrap(), [Outcome::Done]);
    assert_eq!(first_byte(&node), 4);
    assert_eq!(node.propose(write(Epoch(2), 6, 7)).unwrap(), [Outcome::Done]);
    assert_eq!(first_byte(&node), 7);
    let stale = encode_open_session(SESSION, epoch, volume, OWNER);
    assert_eq!(node.propose(stale).unwrap(), rejected(Rejection::StaleEpoch));
    let stale = encode_close_session(SESSION, epoch);
    assert_eq!(node.propose(stale).unwrap(), rejected(Rejection::StaleEpoch));

    // Far ahead, the window moves, and what fell out of it is refused.
    assert_eq!(node.propose(write(Epoch(2), 1000, 8)).unwrap(), [Outcome::Done]);
    assert_eq!(node.propose(write(Epoch(2), 700, 9)).unwrap(), rejected(Rejection::BadCommand));
    assert_eq!(node.propose(write(Epoch(2), 800, 9)).unwrap(), [Outcome::Done]);

    let close = encode_close_session(SESSION, Epoch(2));
    assert_eq!(node.propose(close.clone()).unwrap(), [Outcome::SessionClosed]);
    assert_eq!(node.propose(write(Epoch(2), 9, 9)).unwrap(), rejected(Rejection::UnknownSession));
    assert_eq!(node.propose(close).unwrap(), rejected(Rejection::UnknownSession));
    assert!(node.reader.sessions().is_empty());
}

#[test]
fn volumes_and_counters() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("first", SIZE as u64).unwrap();
    let create = |name: &str, size| encode_create_volume(name, size, "text").unwrap();
    let bad = [Outcome::Rejected(Rejection::BadCommand)];
    for size in [0, 512, 4095, 4097, (64 << 40) + 512, u64::MAX] {
        assert_eq!(node.propose(create("bad", size)).unwrap(), bad, "{size}");
    }
    let created = node.propose(create("näme/ 2", 64 << 40)).unwrap();
    let Outcome::VolumeCreated(info) = &created[0] else { panic!("{created:?}") };
    assert!(info.id > volume && info.id.shard() == SHARD);
    let again = node.propose(create("näme/ 2", 4096)).unwrap();
    assert_eq!(again, [Outcome::VolumeExists(info.clone())]);
    assert_eq!(node.propose(encode_add_counter(5)).unwrap(), [Outcome::Counter(5)]);
    assert_eq!(node.propose(encode_add_counter(-7)).unwrap(), [Outcome::Counter(-2)]);
    // A session is for the volume that it was opened on.
    let foreign = encode_write(SESSION, Epoch(1), 1, info.id, 0, &[1; 512]);
    assert_eq!(node.propose(foreign).unwrap(), bad);
    let nowhere = encode_open_session(SessionId(8), Epoch(1), VolumeId(999), OWNER);
    assert_eq!(node.propose(nowhere).unwrap(), [Outcome::Rejected(Rejection::UnknownVolume)]);
    assert_eq!(node.propose(Bytes::from_static(b"nonsense")).unwrap(), bad);
    assert_eq!(node.propose(Bytes::new()).unwrap(), []);

    for checkpoint in [false, true] {
        if checkpoint {
            node.checkpoint().unwrap();
        }
        drop(node);
        node = Node::open(&disk).unwrap();
        assert_eq!(node.reader.counter(), -2);
        assert_eq!(node.reader.volume_by_name("näme/ 2").as_ref(), Some(info));
        assert_eq!(node.reader.volume(info.id).as_ref(), Some(info));
        assert_eq!(node.reader.volumes().len(), 2);
        assert_eq!(node.reader.sessions()[0].volume, volume);
    }
    let next = node.propose(create("third", 4096)).unwrap();
    let Outcome::VolumeCreated(third) = &next[0] else { panic!("{next:?}") };
    assert_eq!(third.id.0, info.id.0 + 1, "ids are never given twice");
}

/// Appends to the log only, as a replica does that does not know yet what is committed.
fn append(node: &mut Node, index: u64, term: u64, commit: u64, data: &Bytes) -> LogPosition {
    let hard_state = HardState { term: Term(term), vote: 2, commit: LogIndex(commit) };
    let (index, term, kind) = (LogIndex(index), Term(term), EntryKind::Command);
    let entry = EntryRecord { shard: SHARD, index, term, kind, data };
    let records = [Record::Entry(entry), Record::HardState(SHARD, hard_state)];
    node.log.append(&records).unwrap()[0]
}

#[test]
fn only_committed_entries_are_replayed_and_newer_ones_supersede() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    assert_eq!((node.raft.applied, node.raft.compacted), (LogIndex(0), (LogIndex(0), Term(0))));
    let add = |n| encode_add_counter(n);
    append(&mut node, 1, 1, 0, &add(1));
    append(&mut node, 2, 1, 1, &add(10));
    append(&mut node, 3, 1, 1, &add(100));
    append(&mut node, 4, 1, 1, &add(1000));
    // A new leader overwrites entry 3: entry 4 is void with it.
    let third = append(&mut node, 3, 2, 2, &add(5000));
    drop(node);
    let mut store =
        nbd_store::NodeStore::open(std::sync::Arc::new(disk.clone()), options()).unwrap();
    let shard = store.shards.remove(0);
    assert_eq!(shard.reader.counter(), 11);
    assert_eq!(shard.raft.applied, LogIndex(2));
    assert_eq!(shard.raft.terms, [Term(1), Term(1), Term(2)]);
    let expected = HardState { term: Term(2), vote: 2, commit: LogIndex(2) };
    assert_eq!(shard.raft.hard_state, expected);
    assert_eq!(shard.raft.tail.len(), 1);
    let tail = &shard.raft.tail[0];
    assert_eq!((tail.index, tail.term, tail.position), (LogIndex(3), Term(2), third));
    assert_eq!(tail.data, add(5000));
}

#[test]
fn freed_segments_take_no_hard_state_with_them() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    node.term = Term(77);
    let mut freed = 0;
    for seq in 1..120 {
        node.propose(whole_chunk(seq as usize % 8, seq).encode(seq, volume)).unwrap();
        if seq % 40 == 0 {
            let report = node.checkpointer.run().unwrap();
            assert_eq!(report.applied[&SHARD], node.index);
            freed += report.segments_freed;
        }
    }
    assert!(freed >= 3, "{freed} segments were freed");
    drop(node);
    let node = Node::open(&disk).unwrap();
    assert_eq!((node.raft.hard_state.term, node.raft.hard_state.vote), (Term(77), 1));
    assert!(node.raft.compacted.0 > LogIndex(20) && node.raft.compacted.1 == Term(77));
}

#[test]
fn a_foreign_directory_is_refused() {
    let disk = MemoryDisk::new(1);
    drop(Node::open(&disk).unwrap());
    let open = |options| match Node::open_with(&disk, options) {
        Err(error) => error,
        Ok(_) => panic!("opened"),
    };
    let error = open(StoreOptions { cluster: "other".parse().unwrap(), ..options() });
    assert_eq!(error.to_string(), "the data directory belongs to cluster test, not other");
    let error = open(StoreOptions { node: "node-2".parse().unwrap(), ..options() });
    assert_eq!(error.to_string(), "the data directory belongs to node node-1, not node-2");
    let error = open(StoreOptions { segment_bytes: 2 * MIB, ..options() });
    assert!(error.to_string().contains("segments of 1048576 bytes, not 2097152"), "{error}");
    for shards in [vec![ShardId(4)], vec![SHARD, ShardId(4)]] {
        let error = open(StoreOptions { shards, ..options() });
        assert!(matches!(error, OpenError::Shards { .. }), "{error}");
    }
    for shards in [vec![], vec![SHARD, SHARD]] {
        let error = open(StoreOptions { shards, ..options() });
        assert!(matches!(error, OpenError::ShardList), "{error}");
    }
    let node = Node::open(&disk).unwrap();
    let error = open(options());
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    drop(node);
    disk.flip_bit("identity", 50);
    assert_eq!(open(options()).to_string(), "the identity file is damaged");

    let disk = MemoryDisk::new(1);
    let foreign: &dyn nbd_log::io::Disk = &disk;
    foreign.open("important.txt", nbd_log::io::OpenMode::CreateNew).unwrap();
    let error = Node::open(&disk).err().unwrap();
    assert!(error.to_string().contains("important.txt"), "{error}");
}

#[test]
fn a_failed_sync_is_final() {
    let disk = MemoryDisk::new(1);
    let (mut node, volume, model) = prepared(&disk, &[], &[whole_chunk(0, 1)]);
    for n in 1..20 {
        disk.fail_sync_at(disk.sync_points() + n);
        if let Err(error) = node.checkpointer.run() {
            assert!(error.is_fatal());
            assert!(node.checkpointer.run().unwrap_err().is_fatal(), "never retried");
            model.check(&node, volume).unwrap();
            return;
        }
    }
    panic!("no checkpoint failed");
}

#[test]
fn a_log_full_of_what_is_home_is_freed_at_opening() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let mut seq = 0;
    // Until it is full, as a disk may be when power fails behind the checkpoint's commit.
    loop {
        seq += 1;
        let (index, term, kind) = (node.index.next(), node.term, EntryKind::Command);
        let data = whole_chunk(seq as usize % 8, seq).encode(seq, volume);
        let entry = EntryRecord { shard: SHARD, index, term, kind, data: &data };
        let Ok(positions) = node.log.append(&[Record::Entry(entry)]) else { break };
        node.writer.apply(index, term, Applied::Command(&data), positions[0]);
        node.index = index;
    }
    node.checkpoint().unwrap();
    // Freed in memory only: nothing was written to the log since.
    drop(node);
    let mut node = Node::open(&disk).unwrap();
    assert_eq!(node.raft.tail, []);
    for more in 0..100 {
        let op = whole_chunk(0, more);
        assert_eq!(node.propose(op.encode(seq + more, volume)).unwrap(), [Outcome::Done]);
    }
}

#[test]
fn plans_are_bounded() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", 1 << 40).unwrap();
    let resolve = |offset, len| node.reader.resolve(volume, offset, len).map(|plan| plan.len());
    assert_eq!(resolve(512, 64 << 20).unwrap(), 64 << 20);
    assert!(matches!(resolve(0, (64 << 20) + 1), Err(ReadError::TooLong)));
    for (offset, len) in [(0, 0), (1 << 40, 1), ((1 << 40) - 1, 2), (u64::MAX, 2)] {
        assert!(matches!(resolve(offset, len), Err(ReadError::PastEnd)));
    }
    let nowhere = node.reader.resolve(VolumeId(7), 0, 1);
    assert!(matches!(nowhere, Err(ReadError::UnknownVolume)));
}
