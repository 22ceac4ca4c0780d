//! Two shards on one node: one log, one data file, one database.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use common::{CHUNK, OWNER, Op, SESSION, options};
use nbd_log::io::MemoryDisk;
use nbd_log::log::{EntryKind, EntryRecord, HardState, LogWriter, Record};
use nbd_store::{
    Applied, Epoch, NodeStore, Outcome, RecoveredShard, StoreOptions, VolumeId,
    encode_create_volume, encode_open_session,
};
use nbd_topology::{LogIndex, ShardId, Term};

const SHARDS: [ShardId; 2] = [ShardId(3), ShardId(9)];

fn open(disk: &MemoryDisk) -> NodeStore {
    let options = StoreOptions { shards: SHARDS.to_vec(), ..options() };
    NodeStore::open(Arc::new(disk.clone()), options).unwrap()
}

fn propose(log: &mut LogWriter, shard: &mut RecoveredShard, data: &Bytes) -> Vec<Outcome> {
    let (index, term) = (shard.writer.applied().next(), Term(1));
    let kind = EntryKind::Command;
    let entry = EntryRecord { shard: shard.shard, index, term, kind, data };
    let positions = log.append(&[Record::Entry(entry)]).unwrap();
    shard.writer.apply(index, term, Applied::Command(data), positions[0])
}

fn prepare(log: &mut LogWriter, shard: &mut RecoveredShard) -> VolumeId {
    let create = encode_create_volume("v", 8 * CHUNK as u64, "").unwrap();
    let created = propose(log, shard, &create);
    let [Outcome::VolumeCreated(info)] = &created[..] else { panic!("{created:?}") };
    propose(log, shard, &encode_open_session(SESSION, Epoch(1), info.id, OWNER));
    info.id
}

fn read(shard: &RecoveredShard, volume: VolumeId) -> Vec<u8> {
    let mut plan = shard.reader.resolve(volume, 0, 8 * CHUNK as u64).unwrap();
    let mut buf = vec![0; plan.len()];
    plan.read_blocking(&mut buf).unwrap();
    buf
}

#[test]
fn shards_share_a_node_and_nothing_else() {
    let disk = MemoryDisk::new(1);
    let mut store = open(&disk);
    let volumes: Vec<_> =
        store.shards.iter_mut().map(|shard| prepare(&mut store.log, shard)).collect();
    assert_ne!(volumes[0], volumes[1]);
    let mut models = [common::Model::new(8 * CHUNK), common::Model::new(8 * CHUNK)];
    for seq in 1..60_u64 {
        let which = usize::from(seq % 3 == 0);
        let (offset, len) = (seq * 7919 % 400_000, 1 + seq * 104_729 % 100_000);
        let op = match seq % 5 {
            4 => Op::Trim { offset, len },
            _ => Op::Write { offset, len, fill: seq },
        };
        let shard = &mut store.shards[which];
        let outcomes = propose(&mut store.log, shard, &op.encode(seq, volumes[which]));
        assert_eq!(outcomes, [Outcome::Done]);
        models[which].apply(op);
        if seq % 20 == 0 {
            let report = store.checkpointer.run().unwrap();
            for shard in &store.shards {
                assert_eq!(report.applied[&shard.shard], shard.writer.applied());
            }
        }
        if seq % 31 == 0 {
            drop(store);
            store = open(&disk);
            // Nothing said that the last entries are committed.
            for shard in &mut store.shards {
                for entry in std::mem::take(&mut shard.raft.tail) {
                    let applied = Applied::Command(&entry.data);
                    shard.writer.apply(entry.index, entry.term, applied, entry.position);
                }
            }
        }
        for ((shard, volume), model) in store.shards.iter().zip(&volumes).zip(&models) {
            assert!(read(shard, *volume) == model.bytes, "shard {} after {seq}", shard.shard);
        }
    }
}

#[test]
fn a_vote_cast_during_a_checkpoint_is_not_freed_with_its_segment() {
    let disk = MemoryDisk::new(1);
    let NodeStore { mut log, mut shards, mut checkpointer, lock, segments, .. } = open(&disk);
    let volume = prepare(&mut log, &mut shards[0]);
    for seq in 1..=40 {
        let op = Op::Write { offset: 0, len: CHUNK as u64, fill: seq };
        propose(&mut log, &mut shards[0], &op.encode(seq, volume));
    }
    // Held from within the run, this plan delays its end: the transaction is durable by then.
    let reader = shards[0].reader.clone();
    let (send, receive) = mpsc::channel();
    let run = std::thread::spawn(move || {
        let mut pace = |_| send.send(reader.resolve(volume, 0, 512).unwrap()).unwrap();
        checkpointer.run_paced(&mut pace).unwrap()
    });
    let plan = receive.recv().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(!run.is_finished());
    let vote = |term, vote| HardState { term: Term(term), vote, commit: LogIndex::ZERO };
    log.append(&[Record::HardState(SHARDS[1], vote(88, 2))]).unwrap();
    for term in 1..700 {
        log.append(&[Record::HardState(SHARDS[0], vote(term, 1))]).unwrap();
    }
    drop(plan);
    let report = run.join().unwrap();
    assert!(report.segments_freed > 0);
    // The log takes note on disk of what was freed with its next batch.
    log.append(&[Record::HardState(SHARDS[0], vote(700, 1))]).unwrap();
    drop((log, shards, lock, segments));
    let store = open(&disk);
    assert_eq!(store.shards[0].raft.hard_state.term, Term(700));
    let found = store.shards[1].raft.hard_state;
    assert_eq!((found.term, found.vote), (Term(88), 2), "or it might vote again");
}
