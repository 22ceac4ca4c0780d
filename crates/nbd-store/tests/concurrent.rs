//! Readers, a writer and checkpoints at the same time, on real files.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{BLOCK, MIB, Node, Op, SESSION, options, pattern};
use nbd_log::io::FileDisk;
use nbd_store::{Applied, Epoch, Outcome, ReadError, StoreOptions, encode_trim, encode_write};
use nbd_topology::LogIndex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Registers: each a run of blocks that is always written whole, with one number.
const REGISTERS: usize = 96;
/// Three blocks, so that a register often crosses a chunk.
const REGISTER: usize = 3 * BLOCK;
const TIME: Duration = Duration::from_secs(4);

/// The number that a register was written with, if all of it is of one write.
fn number_of(register: usize, bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(register, number), "register {register} is mixed, {number}");
    number
}

fn content(register: usize, number: u64) -> Vec<u8> {
    if number == 0 {
        return vec![0; REGISTER];
    }
    let mut bytes = pattern(number, (register * REGISTER) as u64, REGISTER as u64);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[test]
fn readers_see_old_or_new_but_never_a_mixture() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    // A small log and small caches, so that everything is met: the file of the log, homes not in
    // memory, segments that are used again.
    let options = StoreOptions { meta_cache_bytes: 0, log_bytes_max: 4 * MIB, ..options() };
    let mut node = Node::open_with(&disk, options.clone()).unwrap();
    let volume = node.prepare("v", (REGISTERS * REGISTER) as u64).unwrap();
    let reader = node.reader.clone();
    // For each register: the last number acknowledged, and the last one begun.
    let numbers: Vec<_> = (0..REGISTERS).map(|_| [AtomicU64::new(0), AtomicU64::new(0)]).collect();
    let numbers = Arc::new(numbers);
    let stop = Arc::new(AtomicBool::new(false));

    let readers: Vec<_> = (0..3)
        .map(|seed| {
            let (reader, numbers, stop) = (reader.clone(), Arc::clone(&numbers), Arc::clone(&stop));
            thread::spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed);
                let (mut buf, mut reads) = (vec![0; REGISTER], 0);
                while !stop.load(Ordering::Relaxed) {
                    let register = rng.random_range(0..REGISTERS);
                    let acknowledged = numbers[register][0].load(Ordering::SeqCst);
                    let offset = (register * REGISTER) as u64;
                    let mut plan = reader.resolve(volume, offset, REGISTER as u64).unwrap();
                    if rng.random_ratio(1, 50) {
                        thread::sleep(Duration::from_millis(1));
                    }
                    let done = plan.try_read_cached(&mut buf).unwrap();
                    if !done {
                        plan.read_blocking(&mut buf).unwrap();
                    }
                    drop(plan);
                    let number = number_of(register, &buf);
                    let begun = numbers[register][1].load(Ordering::SeqCst);
                    assert!((acknowledged..=begun).contains(&number), "went back in time");
                    let status = reader.block_status(volume, offset, REGISTER as u64, 10).unwrap();
                    assert_eq!(status.iter().map(|e| e.len).sum::<u64>(), REGISTER as u64);
                    reads += 1;
                }
                reads
            })
        })
        .collect();

    let peer = {
        let (reader, stop) = (reader.clone(), Arc::clone(&stop));
        thread::spawn(move || {
            // What is at home is whole, however often it is overwritten in place meanwhile.
            let mut images = 0;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(reader.scrub(None, 1000).unwrap().damaged, []);
                for stamp in reader.manifest(LogIndex::ZERO, None, 1000).unwrap().chunks {
                    let image = reader.read_chunk(stamp.volume, stamp.chunk).unwrap();
                    if let Some(image) = image {
                        assert!(image.is_sound() && image.last_index >= stamp.last_index);
                        images += 1;
                    }
                }
            }
            images
        })
    };
    let mut checkpointer = node.checkpointer;
    let checkpoints = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || {
            let mut runs = 0;
            while !stop.load(Ordering::Relaxed) {
                checkpointer.run_paced(&mut |_| thread::yield_now()).unwrap();
                runs += 1;
            }
            (checkpointer, runs)
        })
    };

    let mut rng = StdRng::seed_from_u64(99);
    let (start, mut seq) = (Instant::now(), 0);
    let (mut index, mut writer, mut log) = (node.index, node.writer, node.log);
    while start.elapsed() < TIME {
        // Each register in two mutations of one entry when it is to be split.
        seq += 2;
        let register = rng.random_range(0..REGISTERS);
        let number = seq;
        let offset = (register * REGISTER) as u64;
        let bytes = content(register, number);
        numbers[register][1].store(number, Ordering::SeqCst);
        let epoch = Epoch(1);
        let data = if rng.random() {
            let cut = rng.random_range(1..REGISTER);
            let (head, tail) = bytes.split_at(cut);
            let head = encode_write(SESSION, epoch, seq, volume, offset, head);
            let tail = encode_write(SESSION, epoch, seq + 1, volume, offset + cut as u64, tail);
            [head, tail].concat().into()
        } else if rng.random_ratio(1, 4) {
            let clear = encode_trim(SESSION, epoch, seq, volume, offset, REGISTER as u64);
            let write = encode_write(SESSION, epoch, seq + 1, volume, offset, &bytes);
            [clear, write].concat().into()
        } else {
            encode_write(SESSION, epoch, seq, volume, offset, &bytes)
        };
        index = index.next();
        let position = append(&mut log, index, node.term, &data);
        let outcomes = writer.apply(index, node.term, Applied::Command(&data), position);
        assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Done));
        numbers[register][0].store(number, Ordering::SeqCst);
    }
    stop.store(true, Ordering::Relaxed);
    let reads: u64 = readers.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(peer.join().unwrap() > 100);
    let (checkpointer, runs) = checkpoints.join().unwrap();
    assert!(reads > 1000 && runs > 3 && seq > 200, "{reads} reads, {runs} checkpoints, {seq}");
    drop((
        checkpointer,
        writer,
        log,
        node.log_reader,
        node.segments,
        node.reader,
        node.space,
        reader,
    ));
    drop(node.lock);

    let node = Node::open_with(&disk, options).unwrap();
    for (register, numbers) in numbers.iter().enumerate() {
        let bytes = node.read(volume, (register * REGISTER) as u64, REGISTER).unwrap();
        assert_eq!(number_of(register, &bytes), numbers[0].load(Ordering::SeqCst));
    }
}

fn append(
    log: &mut nbd_log::log::LogWriter,
    index: LogIndex,
    term: nbd_topology::Term,
    data: &bytes::Bytes,
) -> nbd_log::log::LogPosition {
    use nbd_log::log::{AppendError, EntryKind, EntryRecord, Record};
    let kind = EntryKind::Command;
    let entry = EntryRecord { shard: common::SHARD, index, term, kind, data };
    loop {
        match log.append(&[Record::Entry(entry)]) {
            Ok(positions) => return positions[0],
            Err(AppendError::Full) => thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_real_directory_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(FileDisk::open(dir.path()).unwrap());
    let mut node = Node::open(&disk).unwrap();
    let volume = node.prepare("v", 10 * MIB).unwrap();
    let mut model = common::Model::new(10 << 20);
    for seq in 1..60 {
        let op = Op::Write { offset: seq * 150_001, len: 100_000, fill: seq };
        node.propose(op.encode(seq, volume)).unwrap();
        model.apply(op);
        if seq % 25 == 0 {
            node.checkpoint().unwrap();
            drop(node);
            node = Node::open(&disk).unwrap();
            model.check(&node, volume).unwrap();
        }
    }
    let missing = node.read(volume, 10 * MIB, 1);
    assert!(matches!(missing, Err(ReadError::PastEnd)));
}
