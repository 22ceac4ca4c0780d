//! The whole store against a plain array of bytes.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use common::{BLOCK, CHUNK, Model, Node, Op};
use nbd_log::io::MemoryDisk;
use nbd_store::Outcome;
use proptest::prelude::*;

/// Seven chunks and a bit: the last block is not whole.
const SIZE: usize = 7 * CHUNK + 3 * 512;

#[derive(Debug, Clone, Copy)]
enum Step {
    Change(Op),
    Read { offset: u64, len: u64 },
    Checkpoint,
    Reopen,
}

/// Ranges of all sorts: aligned or not, one byte to the whole volume, across chunks and up to the
/// end.
fn ranges() -> impl Strategy<Value = (u64, u64)> {
    let size = SIZE as u64;
    let any = (0..size, 1..size).prop_map(move |(offset, len)| (offset, len.min(size - offset)));
    let small = (0..size, 1..600_u64).prop_map(move |(o, len)| (o, len.min(size - o)));
    let blocks = (0..SIZE / BLOCK, 1..20_usize).prop_map(|(first, count)| {
        let end = ((first + count) * BLOCK).min(SIZE / BLOCK * BLOCK);
        ((first * BLOCK) as u64, (end - first * BLOCK) as u64)
    });
    let chunks = (0..7_usize, 1..8_usize).prop_map(|(first, count)| {
        let end = ((first + count) * CHUNK).min(SIZE);
        ((first * CHUNK) as u64, (end - first * CHUNK) as u64)
    });
    let tail = (1..2 * CHUNK as u64).prop_map(move |len| (size - len, len));
    prop_oneof![2 => any, 4 => small, 4 => blocks, 2 => chunks, 1 => tail, 1 => Just((0, size))]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (ranges(), any::<u64>()).prop_map(|((offset, len), fill)| {
            Step::Change(Op::Write { offset, len, fill })
        }),
        3 => ranges().prop_map(|(offset, len)| Step::Change(Op::Trim { offset, len })),
        3 => (ranges(), any::<bool>()).prop_map(|((offset, len), no_hole)| {
            Step::Change(Op::Zero { offset, len, no_hole })
        }),
        4 => ranges().prop_map(|(offset, len)| Step::Read { offset, len }),
        3 => Just(Step::Checkpoint),
        1 => Just(Step::Reopen),
    ]
}

fn run(steps: &[Step]) -> Result<(), TestCaseError> {
    let disk = MemoryDisk::new(1);
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let mut model = Model::new(SIZE);
    for (seq, step) in steps.iter().enumerate() {
        match *step {
            Step::Change(op) => {
                let outcomes = node.propose(op.encode(seq as u64 + 1, volume)).unwrap();
                prop_assert_eq!(&outcomes, &[Outcome::Done]);
                model.apply(op);
            }
            Step::Read { offset, len } => {
                let found = node.read(volume, offset, len as usize).unwrap();
                prop_assert!(found == model.bytes[offset as usize..(offset + len) as usize]);
                let status = model.check_status(&node, volume, offset, len);
                prop_assert!(status.is_ok(), "{:?}", status);
            }
            Step::Checkpoint => node.checkpoint().unwrap(),
            Step::Reopen => {
                drop(node);
                node = Node::open(&disk).unwrap();
            }
        }
        let checked = model.check(&node, volume);
        prop_assert!(checked.is_ok(), "after {:?}: {:?}", step, checked);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
    #[test]
    fn a_volume_is_an_array_of_bytes(steps in prop::collection::vec(steps(), 1..40)) {
        run(&steps)?;
    }
}
