//! A replica that the log does not reach any more is brought up to date from another one, while
//! that one goes on working.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test may panic, and its numbers are small"
)]

mod common;

use bytes::Bytes;
use common::{CHUNK, Failure, Model, Node, Op, SESSION, SHARD, random_op};
use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::{EntryKind, EntryRecord, HardState, Record};
use nbd_store::{
    Applied, ChunkIndex, ChunkKey, Epoch, OpenError, Outcome, ReceiveError, SessionId,
    ShardSnapshot, VolumeId, encode_add_counter, encode_create_volume, encode_delete_volume,
    encode_open_session, encode_resize_volume, encode_write,
};
use nbd_topology::{LogIndex, Term};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: usize = 12 * CHUNK + 512;
const TERM: Term = Term(9);

/// A shard's history, and what its volume ought to hold.
struct History {
    /// Entry `n` is at `n - 1`.
    entries: Vec<Bytes>,
    volume: VolumeId,
    model: Model,
    rng: StdRng,
    seq: u64,
    /// Volumes created besides the first.
    created: u64,
    /// One that will be deleted.
    passing: Option<VolumeId>,
}

impl History {
    fn change(&mut self) {
        let op = random_op(&mut self.rng, SIZE, self.seq);
        self.seq += 1;
        let mut data = op.encode(self.seq, self.volume);
        self.model.apply(op);
        if self.rng.random_ratio(1, 4) {
            let op = random_op(&mut self.rng, SIZE, self.seq);
            self.seq += 1;
            data = [data, op.encode(self.seq, self.volume)].concat().into();
            self.model.apply(op);
        }
        self.entries.push(data);
        if self.rng.random_ratio(1, 8) {
            self.shrink_and_grow();
        }
        if self.rng.random_ratio(1, 6) {
            self.come_and_go();
        }
    }

    fn shrink_and_grow(&mut self) {
        let small = self.rng.random_range(SIZE / 1024..SIZE / 512) * 512;
        for size in [small, SIZE] {
            self.entries.push(encode_resize_volume(self.volume, None, size as u64, true, 0));
            self.model.resize(size);
        }
    }

    /// A volume is created and written to, and deleted later, attached or not.
    fn come_and_go(&mut self) {
        if let Some(volume) = self.passing.take() {
            self.entries.push(encode_delete_volume(volume, true));
            return;
        }
        let name = format!("passing-{}", self.created);
        let create = encode_create_volume(&name, SIZE as u64, "").unwrap();
        self.created += 1;
        let volume = VolumeId(self.volume.0 + self.created);
        let session = SessionId(0xbeef_0000 + u128::from(self.created));
        self.entries.push(create);
        self.entries.push(encode_open_session(session, Epoch(1), volume, common::OWNER));
        let bytes = vec![0x77; 5 * CHUNK];
        self.entries.push(encode_write(session, Epoch(1), 1, volume, 4096, &bytes));
        self.passing = Some(volume);
    }
}

/// Appends entries of the history behind the last one in the log, and applies as many as asked.
fn follow(node: &mut Node, history: &History, append_to: usize, apply_to: usize) {
    while (node.index.0 as usize) < append_to {
        let (index, kind) = (node.index.next(), EntryKind::Command);
        let data = &history.entries[node.index.0 as usize];
        let entry = EntryRecord { shard: SHARD, index, term: TERM, kind, data };
        let hard_state = HardState { term: TERM, vote: 1, commit: LogIndex(index.0 - 1) };
        let records = [Record::HardState(SHARD, hard_state), Record::Entry(entry)];
        let positions = node.log.append(&records).unwrap();
        node.positions.insert(index, positions[1]);
        node.index = index;
    }
    apply(node, history, apply_to);
}

fn apply(node: &mut Node, history: &History, apply_to: usize) {
    while (node.writer.applied().0 as usize) < apply_to {
        let index = node.writer.applied().next();
        let data = &history.entries[index.0 as usize - 1];
        node.writer.apply(index, TERM, Applied::Command(data), node.positions[&index]);
    }
}

/// A source, far ahead of a receiver that has some of its log still to apply.
struct Setup {
    source: MemoryDisk,
    receiver: MemoryDisk,
    entries: Vec<Bytes>,
    volume: VolumeId,
    model: Model,
    seq: u64,
    created: u64,
    passing: Option<VolumeId>,
    /// Entries that the receiver has in its log.
    appended: usize,
}

fn setup(seed: u64) -> Setup {
    let (source, receiver) = (MemoryDisk::new(seed), MemoryDisk::new(seed + 100));
    let mut node = Node::open(&source).unwrap();
    let volume = node.prepare("v", SIZE as u64).unwrap();
    let create = |name| encode_create_volume(name, SIZE as u64, "").unwrap();
    let open = common::open_session(volume);
    let mut history = History {
        entries: vec![create("v"), open],
        volume,
        model: Model::new(SIZE),
        rng: StdRng::seed_from_u64(seed),
        seq: 0,
        created: 0,
        passing: None,
    };
    assert_eq!(node.index, LogIndex(2));
    (0..60).for_each(|_| history.change());
    history.entries.push(create("second"));
    history.created += 1;
    history.entries.push(encode_add_counter(42));
    (0..20).for_each(|_| history.change());

    let appended = 30;
    let mut behind = Node::open(&receiver).unwrap();
    follow(&mut behind, &history, 20, 15);
    behind.checkpoint().unwrap();
    follow(&mut behind, &history, appended, 22);
    let end = history.entries.len();
    for at in 3..=end {
        follow(&mut node, &history, at, at);
        if at % 17 == 0 {
            node.checkpoint().unwrap();
        }
    }
    node.checkpoint().unwrap();
    let History { entries, volume, model, seq, created, passing, .. } = history;
    Setup { source, receiver, entries, volume, model, seq, created, passing, appended }
}

/// One walk over the manifest, with everything else going on in between.
struct Walk<'a> {
    source: &'a mut Node,
    history: &'a mut History,
    fetched: usize,
    skipped: usize,
}

impl Walk<'_> {
    /// The source changes and brings its changes home.
    fn go_on(&mut self) {
        (0..3).for_each(|_| self.history.change());
        let end = self.history.entries.len();
        follow(self.source, self.history, end, end);
        if self.history.rng.random() {
            self.source.checkpoint().unwrap();
        }
    }

    fn run(&mut self, node: &mut Node, appended: usize) -> Result<ShardSnapshot, ReceiveError> {
        let snapshot = self.source.reader.snapshot().unwrap();
        let since = node.reader.manifest(LogIndex::ZERO, None, 1).unwrap().applied;
        let mut after: Option<ChunkKey> = None;
        loop {
            let page = self.source.reader.manifest(since, after, 3).unwrap();
            let mut images = Vec::new();
            for stamp in &page.chunks {
                self.go_on();
                let (volume, chunk) = (stamp.volume, stamp.chunk);
                if node.reader.has_chunk(volume, chunk, stamp.last_index).unwrap() {
                    self.skipped += 1;
                    continue;
                }
                images.extend(self.source.reader.read_chunk(volume, chunk).unwrap());
                self.fetched += 1;
            }
            let upto = snapshot.applied;
            node.checkpointer.write_chunks(SHARD, upto, images)?;
            node.checkpointer.remove_absent(SHARD, upto, after, page.next, &page.present)?;
            // The old log is applied meanwhile, and comes home over what was fetched.
            let to = (node.writer.applied().0 as usize + 2).min(appended);
            apply(node, self.history, to);
            node.checkpointer.run().map_err(ReceiveError::Store)?;
            after = page.next;
            if after.is_none() {
                return Ok(snapshot);
            }
        }
    }
}

fn install(node: &mut Node, snapshot: &ShardSnapshot) -> Result<(), ReceiveError> {
    let hard_state = HardState { term: TERM, vote: 2, commit: snapshot.applied };
    node.checkpointer.install(SHARD, snapshot, hard_state)?;
    assert_eq!(node.reader.applied(), snapshot.applied);
    node.index = snapshot.applied;
    Ok(())
}

fn same(source: &Node, receiver: &Node) {
    let digests = |node: &Node| node.reader.digests(None, 100).unwrap();
    let chunks = |node: &Node| {
        let volume = source.reader.volumes()[0].id;
        node.reader.chunk_digests(volume, ChunkIndex(0)..ChunkIndex(100)).unwrap()
    };
    assert_eq!(chunks(receiver), chunks(source));
    assert_eq!(digests(receiver), digests(source));
    let of = |node: &Node| node.reader.snapshot().unwrap();
    assert_eq!(of(receiver), of(source), "volumes, sessions, counter, members");
    assert_eq!(receiver.reader.volumes(), source.reader.volumes());
    assert_eq!(receiver.reader.counter(), 42);
}

impl Setup {
    /// Copies, so that a setup can be used again and again.
    fn open(&self, seed: u64) -> (Node, MemoryDisk, History) {
        let source = Node::open(&self.source.after_crash_as(CrashStyle::Kept, 0)).unwrap();
        let history = History {
            entries: self.entries.clone(),
            volume: self.volume,
            model: self.model.clone(),
            rng: StdRng::seed_from_u64(seed),
            seq: self.seq,
            created: self.created,
            passing: self.passing,
        };
        (source, self.receiver.after_crash_as(CrashStyle::Kept, 0), history)
    }
}

/// Opens a receiver without applying what nobody says is committed.
fn reopen(disk: &MemoryDisk) -> Result<Node, OpenError> {
    Node::open_follower(disk, common::options())
}

/// Ends a transfer: installs, applies the log behind the snapshot, compares.
fn finish(node: &mut Node, source: &mut Node, history: &History, snapshot: &ShardSnapshot) {
    install(node, snapshot).unwrap();
    let end = history.entries.len();
    follow(node, history, end, end);
    history.model.check(node, history.volume).unwrap();
    node.checkpoint().unwrap();
    source.checkpoint().unwrap();
    same(source, node);
    history.model.check(node, history.volume).unwrap();
}

#[test]
fn a_replica_is_brought_up_to_date_while_the_source_works() {
    for seed in 0..12 {
        let setup = setup(seed);
        let (mut source, disk, mut history) = setup.open(seed);
        let mut node = reopen(&disk).unwrap();
        let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
        let snapshot = walk.run(&mut node, setup.appended).unwrap();
        assert!(walk.fetched > 3);
        assert!(walk.history.entries.len() > snapshot.applied.0 as usize);
        finish(&mut node, &mut source, &history, &snapshot);

        // The old log is void, also for who opens the directory later.
        drop(node);
        let mut node = Node::open(&disk).unwrap();
        assert_eq!(node.raft.compacted, (snapshot.applied.next(), TERM), "the first that is kept");
        assert_eq!(node.index.0 as usize, history.entries.len());
        history.model.check(&node, history.volume).unwrap();
        assert_eq!(node.raft.hard_state.term, TERM);
        // A mutation that was applied at the source counts here as well.
        let op = Op::Write { offset: 0, len: 512, fill: 0xdead };
        let again = node.propose(op.encode(history.seq, history.volume)).unwrap();
        assert!(matches!(again[..], [Outcome::Done]), "{again:?}");
        history.model.check(&node, history.volume).unwrap();
    }
}

#[test]
fn an_empty_replica_is_filled() {
    let setup = setup(77);
    let (mut source, _, mut history) = setup.open(5);
    let disk = MemoryDisk::new(3);
    let mut node = reopen(&disk).unwrap();
    let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
    let snapshot = walk.run(&mut node, 0).unwrap();
    finish(&mut node, &mut source, &history, &snapshot);
}

/// Power fails at the receiver at durability operation `n` of a transfer. True if it was over by
/// then.
fn cut_at(n: u64, setup: &Setup, style: CrashStyle) -> bool {
    let (mut source, disk, mut history) = setup.open(n);
    let mut node = reopen(&disk).unwrap();
    disk.crash_at(disk.sync_points() + n);
    let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
    let result = walk.run(&mut node, setup.appended);
    let first = walk.fetched;
    let installed = result.and_then(|snapshot| install(&mut node, &snapshot));
    if let Err(error) = &installed {
        assert!(matches!(error, ReceiveError::Store(_)) && disk.crashed(), "{error:?}");
    }
    drop(node);

    let disk = disk.after_crash_as(style, n);
    let mut node = reopen(&disk).unwrap();
    let applied = node.reader.applied();
    let is_old = applied.0 as usize <= setup.appended;
    assert!(is_old || applied.0 as usize >= setup.entries.len(), "one or the other");
    node.checkpoint().unwrap();
    if is_old {
        assert!(installed.is_err(), "what was installed is there for good");
        // What of the old log is committed by now goes on, over whatever was fetched.
        node.positions.extend(node.raft.kept.iter().map(|e| (e.index, e.position)));
        let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
        let snapshot = walk.run(&mut node, setup.appended).unwrap();
        assert!(walk.fetched + walk.skipped >= first.min(3));
        finish(&mut node, &mut source, &history, &snapshot);
    } else {
        node.index = applied;
        let end = history.entries.len();
        follow(&mut node, &history, end, end);
        node.checkpoint().unwrap();
        source.checkpoint().unwrap();
        same(&source, &node);
        history.model.check(&node, history.volume).unwrap();
    }
    installed.is_ok()
}

#[test]
fn power_loss_at_the_receiver_anywhere_in_a_transfer() {
    for (seed, style) in [(200, CrashStyle::Kept), (201, CrashStyle::Blocks)] {
        let setup = setup(seed);
        let cuts = (1..).take_while(|n| !cut_at(*n, &setup, style)).count();
        assert!(cuts > 20, "{cuts}");
    }
}

#[test]
fn a_chunk_that_the_old_log_brings_back_goes_again() {
    let (source_disk, disk) = (MemoryDisk::new(1), MemoryDisk::new(2));
    let (mut source, mut node) = (reopen(&source_disk).unwrap(), reopen(&disk).unwrap());
    let volume = VolumeId((u64::from(SHARD.0) << 32) | 1);
    let size = SIZE as u64;
    let chunk = |at: u64, fill| Op::Write { offset: at * CHUNK as u64, len: 4096, fill };
    let trim = Op::Trim { offset: 0, len: 5 * CHUNK as u64 };
    let zeroes = Op::Zero { offset: 5 * CHUNK as u64, len: 2 * CHUNK as u64, no_hole: true };
    let all = Op::Trim { offset: 5 * CHUNK as u64, len: size - 5 * CHUNK as u64 };
    let ops = [chunk(9, 1), chunk(3, 2), zeroes, trim, all, chunk(11, 3)];
    let mut model = Model::new(SIZE);
    ops.iter().for_each(|op| model.apply(*op));
    let create = encode_create_volume("v", size, "").unwrap();
    let mut entries = vec![create, common::open_session(volume), encode_add_counter(42)];
    entries.extend((1..).zip(ops).map(|(seq, op)| op.encode(seq, volume)));
    let (rng, seq) = (StdRng::seed_from_u64(1), 100);
    let history = History { entries, volume, model, rng, seq, created: 0, passing: None };

    // The receiver has not yet applied what wrote chunks 3, 5 and 6.
    follow(&mut node, &history, 6, 4);
    node.checkpoint().unwrap();
    let end = history.entries.len();
    follow(&mut source, &history, end, end);
    source.checkpoint().unwrap();
    let snapshot = source.reader.snapshot().unwrap();
    let page = source.reader.manifest(LogIndex(4), None, 100).unwrap();
    assert_eq!(page.chunks.len(), 1);
    let image = source.reader.read_chunk(volume, ChunkIndex(11)).unwrap().unwrap();
    let (store, upto) = (&mut node.checkpointer, snapshot.applied);
    store.write_chunks(SHARD, upto, vec![image]).unwrap();
    let removed = store.remove_absent(SHARD, upto, None, page.next, &page.present).unwrap();
    assert_eq!(removed, 1, "chunk 9");
    apply(&mut node, &history, 6);
    node.checkpoint().unwrap();
    assert_eq!(node.reader.manifest(LogIndex(0), None, 100).unwrap().chunks.len(), 4);
    finish(&mut node, &mut source, &history, &snapshot);
}

#[test]
fn a_transfer_that_the_log_has_overtaken_is_refused() {
    let (source_disk, disk) = (MemoryDisk::new(1), MemoryDisk::new(2));
    let (mut source, mut node) = (reopen(&source_disk).unwrap(), reopen(&disk).unwrap());
    let volume = VolumeId((u64::from(SHARD.0) << 32) | 1);
    let create = encode_create_volume("v", SIZE as u64, "").unwrap();
    let write = |at: u64| Op::Write { offset: at * CHUNK as u64, len: 4096, fill: at };
    let trim = Op::Trim { offset: 3 * CHUNK as u64, len: CHUNK as u64 };
    let ops = [write(3), write(5), trim, write(9)];
    let mut model = Model::new(SIZE);
    ops.iter().for_each(|op| model.apply(*op));
    let mut entries = vec![create, common::open_session(volume)];
    entries.extend((1..).zip(ops).map(|(seq, op)| op.encode(seq, volume)));
    let (rng, seq) = (StdRng::seed_from_u64(1), 100);
    let history = History { entries, volume, model, rng, seq, created: 0, passing: None };

    // The source has not yet trimmed chunk 3, nor written chunk 9, when it is asked.
    follow(&mut source, &history, 4, 4);
    source.checkpoint().unwrap();
    let upto = source.reader.snapshot().unwrap().applied;
    let page = source.reader.manifest(LogIndex::ZERO, None, 100).unwrap();
    assert_eq!(page.chunks.len(), 2);
    let image = |at| source.reader.read_chunk(volume, ChunkIndex(at)).unwrap().unwrap();
    let images = vec![image(3), image(5)];
    // Its answer is late: the log has brought all of that home here by then.
    let end = history.entries.len();
    follow(&mut node, &history, end, end);
    node.checkpoint().unwrap();
    let written = node.checkpointer.write_chunks(SHARD, upto, images);
    assert!(matches!(written, Err(ReceiveError::Stale { .. })), "{written:?}");
    let removed = node.checkpointer.remove_absent(SHARD, upto, None, page.next, &page.present);
    assert!(matches!(removed, Err(ReceiveError::Stale { .. })), "{removed:?}");
    history.model.check(&node, volume).unwrap();
}

// Goal: power fails while copies are written, and again later: what was in the log is there.
#[test]
fn copies_cut_short_lose_nothing() {
    let disk = MemoryDisk::new(1);
    let mut node = reopen(&disk).unwrap();
    let data = |index: u64| Bytes::from(vec![u8::try_from(index).unwrap(); 400_000]);
    let append = |node: &mut Node, indexes: std::ops::RangeInclusive<u64>| {
        for index in indexes {
            let data = data(index);
            let (index, kind) = (LogIndex(index), EntryKind::Command);
            let entry = EntryRecord { shard: SHARD, index, term: Term(2), kind, data: &data };
            node.log.append(&[Record::Entry(entry)]).unwrap();
        }
    };
    // Two to a segment. None is committed, as far as is known here.
    append(&mut node, 1..=5);
    append(&mut node, 1..=2);
    for _ in 0..3 {
        drop(node);
        node = reopen(&disk).unwrap();
        let kept: Vec<_> = node.raft.kept.iter().map(|entry| entry.index.0).collect();
        assert_eq!(kept, [1, 2, 3, 4, 5]);
        // Lets go of what nothing keeps, and says so on disk.
        node.checkpoint().unwrap();
        let hard_state = HardState { term: Term(2), vote: 1, commit: LogIndex(0) };
        node.log.append(&[Record::HardState(SHARD, hard_state)]).unwrap();
    }
}

#[test]
fn the_very_last_entry_of_the_old_log_is_void_too() {
    // It may be an empty one, as leaders begin their terms with, whose data ends where it begins:
    // at the end of the log if the record fills its block.
    let (source_disk, mut found) = (MemoryDisk::new(1), 0);
    let mut source = reopen(&source_disk).unwrap();
    source.propose(encode_add_counter(42)).unwrap();
    source.checkpoint().unwrap();
    let snapshot = source.reader.snapshot().unwrap();
    for filling in 0..4096_usize {
        let disk = MemoryDisk::new(2);
        let mut node = reopen(&disk).unwrap();
        let filling = vec![0; filling];
        let entry = |index, data| {
            let (index, kind) = (LogIndex(index), EntryKind::Command);
            Record::Entry(EntryRecord { shard: SHARD, index, term: Term(2), kind, data })
        };
        let empty = Bytes::new();
        let filling = Bytes::from(filling);
        let records = [entry(1, &filling), entry(2, &empty), entry(3, &empty)];
        let positions = node.log.append(&records).unwrap();
        if positions[2] < node.segments.next_position() {
            continue;
        }
        found += 1;
        install(&mut node, &snapshot).unwrap();
        drop(node);
        let node = reopen(&disk).unwrap();
        assert_eq!(node.raft.kept, [], "nothing of it comes back");
        assert_eq!(node.reader.counter(), 42);
    }
    assert!(found > 0, "no record ends where its block does");
}

#[test]
fn what_was_fetched_before_a_crash_is_not_fetched_again() {
    let setup = setup(300);
    let (mut source, disk, mut history) = setup.open(1);
    let mut node = reopen(&disk).unwrap();
    let since = node.reader.manifest(LogIndex::ZERO, None, 1).unwrap().applied;
    let page = source.reader.manifest(since, None, 100).unwrap();
    assert_eq!(page.next, None);
    let images = page.chunks.iter().map(|stamp| {
        let image = source.reader.read_chunk(stamp.volume, stamp.chunk).unwrap().unwrap();
        assert_eq!((image.last_index, image.data.len() as u64), (stamp.last_index, stamp.bytes));
        image
    });
    node.checkpointer.write_chunks(SHARD, page.applied, images.collect()).unwrap();
    node.checkpoint().unwrap();
    drop(node);
    let mut node = reopen(&disk.after_crash_as(CrashStyle::Clean, 1)).unwrap();
    node.checkpoint().unwrap();
    for stamp in &page.chunks {
        let has = node.reader.has_chunk(stamp.volume, stamp.chunk, stamp.last_index).unwrap();
        assert!(has, "{stamp:?}");
    }
    let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
    node.positions.extend(node.raft.kept.iter().map(|e| (e.index, e.position)));
    let snapshot = walk.run(&mut node, setup.appended).unwrap();
    assert!(walk.skipped > 0);
    finish(&mut node, &mut source, &history, &snapshot);
}

#[test]
fn an_abandoned_transfer_does_no_harm() {
    // Chunks have come, newer than the log; then a leader turns up that still has all of the log.
    for seed in 0..10 {
        let setup = setup(400 + seed);
        let (mut source, disk, mut history) = setup.open(seed);
        let mut node = reopen(&disk).unwrap();
        let mut walk = Walk { source: &mut source, history: &mut history, fetched: 0, skipped: 0 };
        walk.run(&mut node, setup.appended).unwrap();
        let end = history.entries.len();
        for at in (0..=end).step_by(7).chain([end]) {
            let at = at.max(node.writer.applied().0 as usize);
            follow(&mut node, &history, at, at);
            node.checkpoint().unwrap();
        }
        source.checkpoint().unwrap();
        history.model.check(&node, history.volume).unwrap();
        same(&source, &node);
    }
}

#[test]
fn nothing_damaged_foreign_or_old_is_taken_over() {
    let setup = setup(500);
    let (source, disk, history) = setup.open(1);
    let mut node = reopen(&disk).unwrap();
    let page = source.reader.manifest(LogIndex::ZERO, None, 1).unwrap();
    let stamp = page.chunks[0];
    let good = source.reader.read_chunk(stamp.volume, stamp.chunk).unwrap().unwrap();
    let mut bad = vec![good.clone(); 6];
    let mut data = good.data.to_vec();
    data[100] ^= 1;
    bad[0].data = data.into();
    bad[1].data = good.data.slice(4096..);
    bad[2].volume = VolumeId(good.volume.0 + (1 << 32));
    bad[3].chunk = ChunkIndex(1 << 30);
    bad[4].zero |= good.present;
    bad[5].crcs[0] ^= 1;
    for image in bad {
        let images = vec![good.clone(), image];
        let result = node.checkpointer.write_chunks(SHARD, page.applied, images);
        assert!(matches!(result, Err(ReceiveError::BadChunk { .. })), "{result:?}");
    }
    assert!(!node.reader.has_chunk(stamp.volume, stamp.chunk, stamp.last_index).unwrap());

    let snapshot = source.reader.snapshot().unwrap();
    let mut body = snapshot.body.to_vec();
    body[50] ^= 1;
    let damaged = ShardSnapshot { body: body.into(), ..snapshot.clone() };
    assert!(matches!(install(&mut node, &damaged), Err(ReceiveError::BadSnapshot)));
    let old = node.reader.snapshot().unwrap();
    apply(&mut node, &history, 25);
    assert!(matches!(install(&mut node, &old), Err(ReceiveError::Stale { .. })));
    // None of it counts as a failure of the disk.
    node.checkpoint().unwrap();
    let write = Op::Write { offset: 0, len: 512, fill: 1 }.encode(9999, history.volume);
    let proposed: Result<Vec<Outcome>, Failure> = {
        node.index = LogIndex(setup.appended as u64);
        apply(&mut node, &history, setup.appended);
        node.propose(write)
    };
    assert_eq!(proposed.unwrap(), [Outcome::Done]);
    assert_eq!(node.reader.sessions()[0].id, SESSION);
}
