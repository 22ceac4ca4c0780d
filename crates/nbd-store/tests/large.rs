//! The largest volume, mostly empty.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use std::time::Instant;

use common::{BLOCK, Node, Op, pattern};
use nbd_log::io::MemoryDisk;
use nbd_store::{BlockStatus, Outcome, VolumeId};

const TIB: u64 = 1 << 40;
const SIZE: u64 = 64 * TIB;

fn change(node: &mut Node, volume: VolumeId, seq: u64, op: Op) {
    assert_eq!(node.propose(op.encode(seq, volume)).unwrap(), [Outcome::Done]);
}

/// Blocks written here and there in the first 20 TiB.
fn places() -> impl Iterator<Item = u64> {
    (0..200_u64).map(|n| (n * (TIB / 10) / 4096 + 3) * 4096)
}

#[test]
fn trims_of_many_tebibytes_are_quick() {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("huge", SIZE).unwrap();
    let mut seq = 0;
    for (n, offset) in places().enumerate() {
        seq += 1;
        change(&mut node, volume, seq, Op::Write { offset, len: BLOCK as u64, fill: n as u64 });
        if n % 100 == 50 {
            node.checkpoint().unwrap();
        }
    }
    let start = Instant::now();
    let trimmed = 16 * TIB + 3 * BLOCK as u64 + 1000;
    change(&mut node, volume, seq + 1, Op::Trim { offset: 5000, len: trimmed - 5000 });
    change(
        &mut node,
        volume,
        seq + 2,
        Op::Zero { offset: 40 * TIB, len: 20 * TIB, no_hole: false },
    );
    let took = start.elapsed();
    assert!(took.as_millis() < 100, "{took:?}");

    for round in 0..3 {
        let start = Instant::now();
        let mut expected = Vec::new();
        let mut at = 0;
        for offset in places().filter(|offset| *offset >= trimmed - 1000) {
            expected.push((offset - at, BlockStatus::HOLE));
            expected.push((BLOCK as u64, BlockStatus::DATA));
            at = offset + BLOCK as u64;
        }
        expected.push((SIZE - at, BlockStatus::HOLE));
        let extents = node.reader.block_status(volume, 0, SIZE, usize::MAX).unwrap();
        let found: Vec<_> = extents.iter().map(|extent| (extent.len, extent.status)).collect();
        assert_eq!(found, expected, "round {round}");
        let some = node.reader.block_status(volume, TIB, SIZE - TIB, 3).unwrap();
        assert_eq!(some.len(), 3);
        let took = start.elapsed();
        assert!(took.as_millis() < 200, "{took:?}");

        for (n, offset) in places().enumerate() {
            let found = node.read(volume, offset, BLOCK).unwrap();
            let is_there = offset >= trimmed - 1000;
            let written = pattern(n as u64, offset, BLOCK as u64);
            assert!(found == if is_there { written } else { vec![0; BLOCK] });
        }
        match round {
            0 => node.checkpoint().unwrap(),
            _ => {
                drop(node);
                node = Node::open(&disk).unwrap();
            }
        }
    }
}

#[test]
fn one_call_looks_at_a_bounded_number_of_chunks() {
    // Every chunk has data and a hole: the longest possible answer, cut by the number of extents.
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", 64 << 20).unwrap();
    for seq in 0..600_u64 {
        change(&mut node, volume, seq + 1, Op::Write { offset: seq << 16, len: 4096, fill: seq });
    }
    for _ in 0..2 {
        let extents = node.reader.block_status(volume, 512, 30 << 20, 1000).unwrap();
        let (first, second) = (extents[0], extents[1]);
        assert_eq!((first.len, first.status), (4096 - 512, BlockStatus::DATA));
        assert_eq!((second.len, second.status), (15 * 4096, BlockStatus::HOLE));
        assert_eq!(extents.len(), 961);
        assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), 30 << 20);
        node.checkpoint().unwrap();
    }
}
