//! A disk that runs full.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use common::{BLOCK, CHUNK, MIB, Model, Node, Op, SESSION};
use nbd_log::io::{CrashStyle, Disk as _, MemoryDisk};
use nbd_store::{
    Admission, AdmissionKind, CheckpointError, Epoch, Outcome, SpaceGrant, VolumeId, encode_write,
};

const SIZE: usize = 400 * CHUNK;
const WRITE: AdmissionKind = AdmissionKind::Write;

fn write(chunk: usize, fill: u64) -> Op {
    Op::Write { offset: (chunk * CHUNK) as u64, len: CHUNK as u64, fill }
}

/// Asks for room as the service would, running a checkpoint when told to.
fn admit(
    node: &mut Node,
    volume: VolumeId,
    (offset, len): (u64, u64),
    kind: AdmissionKind,
) -> Option<SpaceGrant> {
    for _ in 0..3 {
        match node.reader.admit(volume, offset, len, kind).unwrap() {
            Admission::Granted(grant) => return Some(grant),
            Admission::NoSpace => return None,
            Admission::NeedCheckpoint => node.checkpoint().unwrap(),
        }
    }
    panic!("a checkpoint settles the question");
}

struct Filled {
    disk: MemoryDisk,
    node: Node,
    volume: VolumeId,
    model: Model,
    seq: u64,
    chunks: usize,
}

impl Filled {
    fn change(&mut self, op: Op) {
        self.seq += 1;
        let outcomes = self.node.propose(op.encode(self.seq, self.volume)).unwrap();
        assert_eq!(outcomes, [Outcome::Done]);
        self.model.apply(op);
    }

    fn check(&self) {
        self.model.check(&self.node, self.volume).unwrap();
    }
}

/// Fills the disk until there is no room, which must come before anything breaks.
fn filled() -> Filled {
    let disk = MemoryDisk::new(4);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    node.checkpoint().unwrap();
    // Room for the log to grow to its bound, for the reserve, and for some chunks.
    disk.set_capacity(8 * MIB + 12 * MIB + 10 * MIB);
    node.space.refresh().unwrap();
    let (model, seq, chunks) = (Model::new(SIZE), 0, 0);
    let mut all = Filled { disk, node, volume, model, seq, chunks };
    while let Some(_grant) = admit(&mut all.node, volume, write(all.chunks, 1).range(), WRITE) {
        all.change(write(all.chunks, 1));
        all.chunks += 1;
        assert!(all.chunks < 1000, "the disk is smaller than that");
    }
    assert!(all.chunks > 100, "{} chunks fitted", all.chunks);
    all.node.checkpoint().unwrap();
    all.check();
    all
}

#[test]
fn a_full_disk_refuses_new_chunks_and_nothing_else() {
    let mut all = filled();
    let (volume, chunks) = (all.volume, all.chunks);
    // Overwrites of allocated chunks go on, in whole and in part, of all chunks at once, which
    // needs more fresh slots than there are.
    for round in 2..5 {
        for chunk in 0..chunks {
            let op = match (chunk + round) % 3 {
                0 => write(chunk, round as u64),
                _ => Op::Write {
                    offset: (chunk * CHUNK + 300) as u64,
                    len: BLOCK as u64,
                    fill: round as u64,
                },
            };
            let (offset, len) = op.range();
            let grant = admit(&mut all.node, volume, (offset, len), WRITE);
            assert!(grant.is_some(), "chunk {chunk} has a slot");
            all.change(op);
        }
        all.node.checkpoint().unwrap();
        all.check();
        // A chunk or two, for the file has grown by whole slots meanwhile, but no more.
        let some = (((chunks + 10) * CHUNK) as u64, 8 * CHUNK as u64);
        assert!(admit(&mut all.node, volume, some, WRITE).is_none());
    }
    let no_hole = AdmissionKind::WriteZeroes { no_hole: true };
    let some = (((chunks + 10) * CHUNK) as u64, 8 * CHUNK as u64);
    assert!(admit(&mut all.node, volume, some, no_hole).is_none(), "zeroes need room, too");
    let whole = (0, SIZE as u64);
    let hole = AdmissionKind::WriteZeroes { no_hole: false };
    assert!(admit(&mut all.node, volume, whole, hole).is_some());
    assert!(admit(&mut all.node, volume, whole, AdmissionKind::Trim).is_some());
    drop(all.node);
    all.node = Node::open(&all.disk).unwrap();
    all.check();
}

#[test]
fn trims_make_room() {
    let mut all = filled();
    let (volume, chunks) = (all.volume, all.chunks);
    all.change(Op::Trim { offset: 0, len: 20 * CHUNK as u64 });
    let mut taken = 0;
    while let Some(_grant) = admit(&mut all.node, volume, write(chunks + taken, 9).range(), WRITE) {
        all.change(write(chunks + taken, 9));
        taken += 1;
        assert!(taken < 100, "the disk is smaller than that");
    }
    // A chunk more or less, for the database may have grown by a few pages meanwhile.
    assert!((19..=21).contains(&taken), "{taken} chunks took the place of 20 trimmed ones");
    all.node.checkpoint().unwrap();
    all.check();
}

#[test]
fn grants_are_counted_until_they_are_dropped() {
    let all = filled();
    let fast = |len| all.node.space.admit_fast(0, len, WRITE);
    assert!(fast(64 * MIB).is_none());
    assert!(all.node.space.admit_fast(0, u64::MAX, AdmissionKind::Trim).is_some());
    all.disk.set_capacity(200 * MIB);
    all.node.space.refresh().unwrap();
    let first = fast(64 * MIB).unwrap();
    let room = all.node.space.available_bytes();
    let second = fast(room).unwrap();
    assert!(fast(CHUNK as u64).is_none());
    drop(first);
    assert_eq!(all.node.space.available_bytes(), 64 * MIB);
    drop(second);
    assert_eq!(all.node.space.available_bytes(), 64 * MIB + room);
}

#[test]
fn a_checkpoint_without_room_changes_nothing_and_is_made_up_for() {
    let mut all = filled();
    let (volume, chunks) = (all.volume, all.chunks);
    // Somebody else fills the disk: what was admitted does not fit any more. (Nobody was asked
    // here.)
    for chunk in chunks..chunks + 100 {
        let (offset, len) = write(chunk, 5).range();
        let bytes = common::pattern(5, offset, len);
        all.seq += 1;
        let data = encode_write(SESSION, Epoch(1), all.seq, volume, offset, &bytes);
        all.node.propose(data).unwrap();
        all.model.apply(write(chunk, 5));
        if chunk % 20 == 0 {
            let kept = Op::Write { offset: 100, len: 5000, fill: chunk as u64 };
            all.change(kept);
        }
    }
    let full = |node: &mut Node| {
        let result = node.checkpointer.run();
        assert!(matches!(result, Err(CheckpointError::NoSpace)), "{result:?}");
    };
    full(&mut all.node);
    all.check();
    // What comes after it lies over it, also when it is tried again.
    all.change(Op::Trim { offset: (chunks * CHUNK) as u64, len: 10 * CHUNK as u64 });
    all.change(Op::Write { offset: (chunks * CHUNK) as u64 + 77, len: 10_000, fill: 6 });
    all.check();
    full(&mut all.node);
    all.check();
    all.change(Op::Trim { offset: CHUNK as u64, len: 70 * CHUNK as u64 });
    all.check();
    all.node.checkpoint().unwrap();
    all.check();
    let index = all.node.index;
    drop(all.node);
    all.node = Node::open(&all.disk).unwrap();
    assert_eq!(all.node.raft.applied, index);
    all.check();
}

/// Power loss in a checkpoint of many transactions, for slots that are given from hand to hand.
#[test]
fn power_loss_between_the_transactions_of_a_checkpoint() {
    let mut all = filled();
    for chunk in 0..all.chunks {
        let offset = (chunk * CHUNK + 300) as u64;
        all.change(Op::Write { offset, len: 700, fill: 2 });
    }
    all.change(Op::Trim { offset: 3 * CHUNK as u64, len: 5 * CHUNK as u64 });
    let index = all.node.index;
    drop(all.node);
    for n in 1.. {
        let disk = all.disk.after_crash_as(CrashStyle::Kept, n);
        let mut node = Node::open(&disk).unwrap();
        disk.crash_at(disk.sync_points() + n);
        let finished = node.checkpoint().is_ok();
        drop(node);
        let mut node = Node::open(&disk.after_crash(n)).unwrap();
        assert_eq!(node.index, index);
        all.model.check(&node, all.volume).unwrap_or_else(|e| panic!("at {n}: {e}"));
        node.checkpoint().unwrap();
        all.model.check(&node, all.volume).unwrap();
        if finished {
            assert!(n > 10, "more than one transaction");
            return;
        }
    }
}

/// Somebody else takes what the disk had left, so that what is in the log cannot go home and the
/// log cannot be freed. Overwrites must end while there is still log for the trim that helps.
#[test]
fn a_checkpoint_without_room_leaves_log_for_trims() {
    let mut all = filled();
    let volume = all.volume;
    let taken = 4096;
    let whole_disk = all.disk.space_available().unwrap();
    // Partial overwrites of every chunk want fresh slots; there is not even room for one.
    for chunk in 0..all.chunks {
        all.change(Op::Write { offset: (chunk * CHUNK + 300) as u64, len: 512, fill: 7 });
    }
    all.disk.set_capacity(28 * MIB - whole_disk + taken);
    let mut overwrites = 0;
    let refused = loop {
        let starved = all.node.checkpoint().is_err();
        let op = Op::Write { offset: (overwrites % 50 * CHUNK) as u64, len: 65_536, fill: 9 };
        let Admission::Granted(_grant) =
            all.node.reader.admit(volume, op.range().0, op.range().1, WRITE).unwrap()
        else {
            break starved;
        };
        all.change(op);
        overwrites += 1;
        assert!(overwrites < 1000, "the log is smaller than that");
    };
    assert!(refused, "refused although the checkpoint found room");
    // The log still takes what makes room, and then all goes on.
    let trim = Op::Trim { offset: (60 * CHUNK) as u64, len: 30 * CHUNK as u64 };
    assert!(
        all.node.space.admit_fast(trim.range().0, trim.range().1, AdmissionKind::Trim).is_some()
    );
    all.change(trim);
    all.disk.set_capacity(30 * MIB);
    all.node.checkpoint().unwrap();
    let op = write(0, 11);
    assert!(admit(&mut all.node, volume, op.range(), WRITE).is_some());
    all.change(op);
    all.check();
}
