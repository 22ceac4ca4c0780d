//! Power loss at every durability operation: nothing acknowledged is ever lost, nothing is ever
//! mixed.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use common::{BLOCK, CHUNK, Failure, Model, Node, Op, SESSION};
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::AppendError;
use nbd_store::{CheckpointError, ChunkIndex, OpenError, Outcome, VolumeId};
use nbd_topology::Term;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: usize = 6 * CHUNK + 512;

#[derive(Debug, Clone, Copy)]
enum Step {
    Change(Op),
    Checkpoint,
}

/// A workload that overwrites the same few chunks in all ways, with checkpoints in between.
fn workload(seed: u64, steps: usize) -> Vec<Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..steps)
        .map(|step| {
            if step % 7 == 6 {
                return Step::Checkpoint;
            }
            let unit = [1, 512, BLOCK, BLOCK, CHUNK][rng.random_range(0..5)];
            let places = SIZE / unit;
            let first = rng.random_range(0..places);
            let count = rng.random_range(1..=(places - first).min(18));
            let (offset, len) = ((first * unit) as u64, (count * unit) as u64);
            Step::Change(match rng.random_range(0..10) {
                0..7 => Op::Write { offset, len, fill: step as u64 + 1 },
                7..9 => Op::Trim { offset, len },
                _ => Op::Zero { offset, len, no_hole: rng.random() },
            })
        })
        .collect()
}

/// What must be found after a crash.
struct Truth {
    model: Model,
    /// Handed to the log, but not acknowledged: it may have happened or not, wholly.
    in_doubt: Option<Op>,
    seq: u64,
    /// Last term that was promised to the log.
    term: Term,
}

impl Truth {
    fn new() -> Self {
        Self { model: Model::new(SIZE), in_doubt: None, seq: 0, term: Term::ZERO }
    }

    /// Compares, and settles what was in doubt.
    fn check(&mut self, node: &Node, volume: VolumeId) {
        let found = node.raft.hard_state;
        assert!(found.term >= self.term && found.vote == 1, "{found:?}, not {}", self.term);
        let before = self.model.check(node, volume);
        let Some(op) = self.in_doubt.take() else { return before.unwrap() };
        if before.is_err() {
            self.model.apply(op);
            let after = self.model.check(node, volume);
            assert!(after.is_ok(), "neither {before:?} nor, with {op:?}, {after:?}");
        }
    }
}

fn is_crash(failure: &Failure) -> bool {
    matches!(
        failure,
        Failure::Append(AppendError::Write { .. } | AppendError::NoSpace)
            | Failure::Checkpoint(
                CheckpointError::Data { .. }
                    | CheckpointError::Metadata(_)
                    | CheckpointError::Log(_)
            )
    )
}

/// Runs the workload until it is done or power fails.
fn work(node: &mut Node, volume: VolumeId, truth: &mut Truth, steps: &[Step]) -> bool {
    for step in steps {
        let result = match *step {
            Step::Checkpoint => node.checkpoint(),
            Step::Change(op) => {
                truth.seq += 1;
                truth.in_doubt = Some(op);
                let result = node.propose(op.encode(truth.seq, volume));
                if let Ok(outcomes) = &result {
                    assert_eq!(*outcomes, [Outcome::Done]);
                    truth.in_doubt = None;
                    truth.term = node.term;
                    truth.model.apply(op);
                }
                result.map(|_| ())
            }
        };
        if let Err(failure) = result {
            assert!(is_crash(&failure), "{failure:?}");
            return false;
        }
    }
    true
}

/// Opens the disk, losing power `crashes` times on the way.
fn reopen(mut disk: MemoryDisk, seed: u64, crashes: u64) -> (MemoryDisk, Node) {
    for crash in 0..crashes {
        disk.crash_at(1 + (seed + crash * 3) % 9);
        match Node::open(&disk) {
            Ok(node) if !disk.crashed() => {
                disk.crash_at(u64::MAX);
                return (disk, node);
            }
            Ok(_) => {}
            Err(OpenError::Missing(missing)) => panic!("{missing}"),
            Err(_) => assert!(disk.crashed(), "an opening fails only because power does"),
        }
        disk = disk.after_crash(seed.wrapping_mul(31) + crash);
    }
    disk.crash_at(u64::MAX);
    let node = Node::open(&disk).unwrap();
    (disk, node)
}

/// Loses power at durability operation `n`, checks, goes on, loses power again, checks.
fn crash_at(n: u64, seed: u64, first: &[Step], second: &[Step]) {
    let disk = MemoryDisk::new(seed);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let mut truth = Truth::new();
    disk.crash_at(disk.sync_points() + n);
    work(&mut node, volume, &mut truth, first);
    drop(node);

    let (disk, mut node) = reopen(disk.after_crash(seed + n), seed + n, (seed + n) % 3);
    truth.check(&node, volume);
    assert_eq!(node.reader.sessions()[0].id, SESSION);
    let later = disk.sync_points() + 1 + (n * 7 + seed) % 40;
    disk.crash_at(later);
    work(&mut node, volume, &mut truth, second);
    drop(node);

    let (_disk, mut node) = reopen(disk.after_crash(seed ^ n), seed * n, n % 2);
    truth.check(&node, volume);
    node.checkpoint().unwrap();
    truth.check(&node, volume);
}

#[test]
fn power_loss_anywhere_loses_nothing_acknowledged() {
    let mut runs = 0;
    for seed in 0..4 {
        let (first, second) = (workload(seed, 30), workload(seed + 100, 24));
        let disk = MemoryDisk::new(seed);
        let mut node = Node::open(&disk).unwrap();
        let volume = node.prepare("v", SIZE as u64).unwrap();
        let start = disk.sync_points();
        assert!(work(&mut node, volume, &mut Truth::new(), &first));
        let sync_points = disk.sync_points() - start;
        for n in 1..=sync_points + 1 {
            crash_at(n, seed * 1000 + 1, &first, &second);
            runs += 1;
        }
    }
    assert!(runs > 150, "{runs} runs");
}

#[test]
fn power_loss_while_a_directory_is_made() {
    for n in 1..60 {
        for seed in 0..4 {
            let disk = MemoryDisk::new(seed);
            disk.crash_at(n);
            _ = Node::open(&disk);
            let disk = disk.after_crash(seed + 4 * n);
            let mut node = Node::open(&disk).unwrap();
            let volume = node.prepare("v", SIZE as u64).unwrap();
            Model::new(SIZE).check(&node, volume).unwrap();
        }
    }
}

// Goal: a checkpoint that power failed in has overwritten blocks in place by halves. The log has
// all of it, so that no replica that asks for the chunk, and no scrub, takes it for damaged.
#[test]
fn a_checkpoint_that_power_failed_in_leaves_nothing_damaged() {
    let mut torn = 0;
    for seed in 0..40 {
        let disk = MemoryDisk::new(seed);
        let mut node = Node::open(&disk).unwrap();
        let volume = node.prepare("v", SIZE as u64).unwrap();
        let write = |fill| Op::Write { offset: 0, len: CHUNK as u64, fill };
        node.propose(write(1).encode(1, volume)).unwrap();
        node.checkpoint().unwrap();
        node.propose(write(2).encode(2, volume)).unwrap();
        disk.crash_at(disk.sync_points() + 1 + seed % 4);
        node.checkpoint().unwrap_err();
        drop(node);

        let disk = disk.after_crash_as(CrashStyle::Blocks, seed);
        let node = Node::open_follower(&disk, common::options()).unwrap();
        let page = node.reader.scrub(None, 100).unwrap();
        assert_eq!(page.damaged, [], "seed {seed}");
        let image = node.reader.read_chunk(volume, ChunkIndex(0)).unwrap().unwrap();
        assert!(image.is_sound());
        let is = |fill| image.data == common::pattern(fill, 0, CHUNK as u64);
        assert!(is(1) || is(2), "one or the other");
        torn += u32::from(is(2));
    }
    assert!(torn > 0, "none was torn");
}
