//! Each planted fault does what it says: a test of the tests that look for it.
#![cfg(feature = "planted-faults")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use common::{BLOCK, CHUNK, Model, Node, OWNER, Op, SESSION, options};
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_store::{Epoch, Outcome, StoreFault, StoreOptions, encode_open_session, encode_write};

const SIZE: usize = 40 * CHUNK;

fn with(fault: Option<StoreFault>) -> StoreOptions {
    StoreOptions { fault, ..options() }
}

/// Whether a volume is not what it ought to be after power failed somewhere in a checkpoint.
fn breaks(fault: Option<StoreFault>, before: &[Op], after: &[Op]) -> bool {
    for n in 1.. {
        let disk = MemoryDisk::new(5);
        let mut node = Node::open_with(&disk, with(fault)).unwrap();
        let volume = node.prepare("v", SIZE as u64).unwrap();
        let (mut model, mut seq) = (Model::new(SIZE), 0);
        for ops in [before, after] {
            node.checkpoint().unwrap();
            for op in ops {
                seq += 1;
                node.propose(op.encode(seq, volume)).unwrap();
                model.apply(*op);
            }
        }
        disk.crash_at(disk.sync_points() + n);
        let finished = node.checkpoint().is_ok();
        if finished {
            return false;
        }
        // The log goes on, and says on disk what was freed.
        drop(node);
        let disk = disk.after_crash_as(CrashStyle::Kept, 1);
        let Ok(node) = Node::open_with(&disk, with(fault)) else { return true };
        if model.check(&node, volume).is_err() {
            return true;
        }
    }
    unreachable!("a checkpoint ends")
}

fn whole(chunk: usize, fill: u64) -> Op {
    Op::Write { offset: (chunk * CHUNK) as u64, len: CHUNK as u64, fill }
}

#[test]
fn faults_of_checkpoints_lose_data_when_power_fails() {
    let part = Op::Write { offset: 5000, len: 1000, fill: 2 };
    let zeroes = Op::Zero { offset: 100, len: 3 * BLOCK as u64, no_hole: false };
    let split = (vec![whole(0, 1)], vec![part, zeroes]);
    // Chunk 0 moves, and chunk 1 gets its old slot.
    let moved = (vec![whole(0, 1)], vec![part, whole(1, 3)]);
    for (fault, (before, after)) in
        [(StoreFault::PartialBlockInPlace, &split), (StoreFault::SlotReusedEarly, &moved)]
    {
        assert!(!breaks(None, before, after), "{fault:?} is not needed");
        assert!(breaks(Some(fault), before, after), "{fault:?}");
    }
}

#[test]
fn log_that_is_freed_early_is_missed() {
    let survives = |fault| {
        let disk = MemoryDisk::new(5);
        let mut node = Node::open_with(&disk, with(fault)).unwrap();
        let volume = node.prepare("v", SIZE as u64).unwrap();
        let mut model = Model::new(SIZE);
        for (seq, chunk) in (1..).zip(0..30) {
            node.propose(whole(chunk, 1).encode(seq, volume)).unwrap();
            model.apply(whole(chunk, 1));
        }
        let points = disk.sync_points();
        disk.fail_sync_at(points + 3);
        let failed = node.checkpoint().is_err();
        assert!(failed, "the data file's sync failed");
        // Somebody else's entry says on disk what was freed.
        let data = whole(0, 1).encode(99, volume);
        node.log
            .append(&[nbd_log::log::Record::Entry(nbd_log::log::EntryRecord {
                shard: common::SHARD,
                index: node.index.next(),
                term: node.term,
                kind: nbd_log::log::EntryKind::Command,
                data: &data,
            })])
            .unwrap();
        drop(node);
        let disk = disk.after_crash_as(CrashStyle::Clean, 1);
        Node::open_with(&disk, with(None)).is_ok_and(|node| model.check(&node, volume).is_ok())
    };
    assert!(survives(None));
    assert!(!survives(Some(StoreFault::LogFreedBeforeSync)));
}

#[test]
fn faults_of_sessions_apply_what_must_not_be() {
    let first_byte = |fault| {
        let mut node = Node::open_with(&MemoryDisk::new(1), with(Some(fault))).unwrap();
        let volume = node.prepare("v", SIZE as u64).unwrap();
        let write =
            |epoch, seq, fill| encode_write(SESSION, Epoch(epoch), seq, volume, 0, &[fill; BLOCK]);
        node.propose(write(1, 1, 1)).unwrap();
        node.propose(write(1, 2, 2)).unwrap();
        let resume = encode_open_session(SESSION, Epoch(2), volume, OWNER);
        assert_eq!(node.propose(resume).unwrap(), [Outcome::SessionOpened]);
        let late = match fault {
            StoreFault::NoResultWindow => write(2, 1, 1),
            _ => write(1, 3, 3),
        };
        assert_eq!(node.propose(late).unwrap(), [Outcome::Done]);
        node.read(volume, 0, 1).unwrap()[0]
    };
    assert_eq!(first_byte(StoreFault::NoResultWindow), 1);
    assert_eq!(first_byte(StoreFault::EpochAtAdmissionOnly), 3);
}
