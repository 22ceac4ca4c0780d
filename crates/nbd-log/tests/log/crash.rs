//! Power lost at every durability operation.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbd_log::io::{CrashStyle, MemoryDisk};
use nbd_log::log::{AppendError, LogOpenError, LogOptions};
use nbd_topology::{LogIndex, ShardId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{Kept, OPTIONS, Opened, SEGMENT, entry, free, hard_state, open_with, payload};

/// Three segments: every rotation but the first ones recycles, often a file freed just before.
const SMALL: LogOptions = LogOptions { log_bytes_max: 3 * SEGMENT, ..OPTIONS };

const STYLES: [CrashStyle; 4] =
    [CrashStyle::Clean, CrashStyle::Kept, CrashStyle::Blocks, CrashStyle::Sectors];

/// What the log must, and may, hold.
#[derive(Debug, Clone, Default)]
struct Ledger {
    /// Every record issued and not known to be lost, in order. No two are equal.
    issued: Vec<Kept>,
    /// The first so many of them were acknowledged, or were shown by a recovery.
    acknowledged: usize,
    /// The first so many of them need not be there any more: they were freed, or could be.
    freeable: usize,
    /// Numbers given to records, those of lost ones included.
    numbers: u64,
}

/// A crash, as planned; anything else panics where it happens.
struct Crashed;

impl Ledger {
    /// Checks what a recovery showed, and takes it as the truth from here on.
    fn check(&mut self, found: &[Kept]) {
        let Some(oldest) = found.first() else {
            assert_eq!(self.acknowledged, 0, "the log is empty");
            self.issued.clear();
            return;
        };
        let start = self.issued.iter().position(|record| record == oldest).unwrap();
        assert!(start <= self.freeable, "{} records are missing", start - self.freeable);
        let end = start + found.len();
        assert!(end >= self.acknowledged, "{} records are lost", self.acknowledged - end);
        assert!(end <= self.issued.len(), "more was found than was written");
        assert!(found == &self.issued[start..end], "records changed");
        self.issued.truncate(end);
        self.acknowledged = end;
    }

    fn next_records(&mut self, rng: &mut StdRng) -> Vec<Kept> {
        let count = rng.random_range(1..5);
        let records = (0..count).map(|_| {
            self.numbers += 1;
            if rng.random_ratio(1, 4) {
                return hard_state(rng.random_range(0..2), 1, 1, self.numbers);
            }
            let len_max = if rng.random_ratio(1, 3) { 250_000 } else { 9_000 };
            let len = rng.random_range(0..len_max);
            entry(rng.random_range(0..2), self.numbers, payload(self.numbers, len))
        });
        let records: Vec<_> = records.collect();
        self.issued.extend_from_slice(&records);
        records
    }

    /// Frees everything up to some acknowledged record.
    fn free(&mut self, log: &Opened, rng: &mut StdRng) {
        let keep = rng.random_range(0..8);
        let mut through = 0;
        for record in &self.issued[..self.acknowledged.saturating_sub(keep)] {
            if let Kept::Entry { index, .. } = record {
                through = index.0;
            }
        }
        let uncovered =
            |record: &Kept| matches!(record, Kept::Entry { index, .. } if index.0 > through);
        let freeable = self.issued.iter().position(uncovered).unwrap_or(self.issued.len());
        self.freeable = self.freeable.max(freeable);
        let covered = [0, 1].map(|shard| (ShardId(shard), LogIndex(through)));
        free(&log.log.segments, &BTreeMap::from(covered));
    }
}

/// Opens the log, checks it, and works on it for a while.
fn run(disk: &MemoryDisk, ledger: &mut Ledger, seed: u64, steps: u32) -> Result<(), Crashed> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut log = match open_with(Arc::new(disk.clone()), SMALL, seed + 1) {
        Ok(log) => log,
        Err(LogOpenError::Io { source, .. }) if MemoryDisk::is_crash(&source) => {
            return Err(Crashed);
        }
        Err(error) => panic!("{error}"),
    };
    ledger.check(&log.records());
    let mut pins = Vec::new();
    for _ in 0..steps {
        match rng.random_range(0..12) {
            0 | 1 => ledger.free(&log, &mut rng),
            2 => match log.log.segments.prepare_spare() {
                Ok(_) => {}
                Err(error) if MemoryDisk::is_crash(&error) => return Err(Crashed),
                Err(error) => panic!("{error}"),
            },
            3 => pins.push(log.log.reader.pin()),
            4 => pins.clear(),
            _ => append(&mut log, ledger, &mut rng)?,
        }
    }
    Ok(())
}

fn append(log: &mut Opened, ledger: &mut Ledger, rng: &mut StdRng) -> Result<(), Crashed> {
    let before = ledger.issued.len();
    let records = ledger.next_records(rng);
    match log.append(&records) {
        Ok(positions) => {
            assert_eq!(positions.len(), records.len());
            ledger.acknowledged = ledger.issued.len();
        }
        Err(AppendError::Full) => {
            ledger.issued.truncate(before);
            ledger.free(log, rng);
        }
        Err(AppendError::Write { source, .. }) if MemoryDisk::is_crash(&source) => {
            return Err(Crashed);
        }
        Err(error) => panic!("{error}"),
    }
    Ok(())
}

// Goal: whatever was acknowledged is there after a crash at any point, in order, and nothing that
// was never written; also after a second crash, during the recovery from the first or soon after.
// Method: run a workload once to count its sync points; then for each of them crash there, and from
// there in every style go on to a second crash at a random sync point.
#[test]
fn acknowledged_records_survive_a_crash_at_every_sync_point() {
    let (mut crashes, mut rotations) = (0, 0);
    for seed in [1, 2, 3] {
        let disk = MemoryDisk::new(seed);
        let mut ledger = Ledger::default();
        assert!(run(&disk, &mut ledger, seed, 90).is_ok());
        rotations += ledger.numbers;
        for n in 1..=disk.sync_points() {
            let disk = MemoryDisk::new(seed);
            disk.crash_at(n);
            let mut ledger = Ledger::default();
            assert!(run(&disk, &mut ledger, seed, 90).is_err());
            for (style, salt) in STYLES.into_iter().zip(0..) {
                let case = (seed * 1000 + n) * 10 + salt;
                second_crash(&disk.after_crash_as(style, case), ledger.clone(), case);
                crashes += 2;
            }
        }
    }
    println!("{crashes} crashes, {rotations} records");
}

fn second_crash(disk: &MemoryDisk, mut ledger: Ledger, case: u64) {
    let mut rng = StdRng::seed_from_u64(case);
    disk.crash_at(rng.random_range(1..20));
    if run(disk, &mut ledger, case, 8).is_ok() {
        disk.crash();
    }
    let disk = disk.after_crash(case);
    assert!(run(&disk, &mut ledger, case + 5, 3).is_ok());
}

// Goal: a segment header that is torn when a file is recycled loses nothing, even inside a sector.
// Method: the file was freed just before, so that no batch could have said so; crash while its new
// header is written, then spoil the header.
#[test]
fn a_torn_header_of_a_recycled_segment_is_no_loss() {
    let disk = MemoryDisk::new(1);
    let mut log = open_with(Arc::new(disk.clone()), SMALL, 1).unwrap();
    let entries: Vec<_> = (1..=7).map(|i| entry(0, i, payload(i, 400_000))).collect();
    log.append(&entries[..6]).unwrap();
    free(&log.log.segments, &BTreeMap::from([(ShardId(0), LogIndex(2))]));
    // A closing batch, then the header.
    disk.crash_at(disk.sync_points() + 2);
    assert!(matches!(log.append(&entries[6..]), Err(AppendError::Write { .. })));
    let disk = disk.after_crash_as(CrashStyle::Kept, 0);
    disk.flip_bit("log/000000.seg", 20);
    let mut log = open_with(Arc::new(disk.clone()), SMALL, 2).unwrap();
    assert_eq!(log.records(), entries[2..6]);
    log.append(&entries[6..]).unwrap();
    let log = open_with(Arc::new(disk), SMALL, 3).unwrap();
    assert_eq!(log.records(), entries[2..]);
}
