//! Random use against a model.

use std::collections::BTreeMap;
use std::sync::Arc;

use nbd_log::io::MemoryDisk;
use nbd_log::log::{AppendError, LogOptions, LogPin, LogPosition};
use nbd_topology::{LogIndex, ShardId};
use proptest::prelude::*;

use crate::support::{Kept, OPTIONS, Opened, SEGMENT, entry, free, hard_state, open_with, payload};

#[derive(Debug, Clone)]
enum Step {
    /// Sizes of entries; `None` is a hard state.
    Append(Vec<Option<usize>>),
    /// Free all but the newest so many entries.
    Free(usize),
    PrepareSpare,
    Reopen,
    Pin,
    Unpin,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![3 => 0..10_000_usize, 1 => 100_000..900_000_usize];
    let records = prop::collection::vec(prop::option::weighted(0.8, size), 0..6);
    let step = prop_oneof![
        8 => records.prop_map(Step::Append),
        2 => (0..10_usize).prop_map(Step::Free),
        1 => Just(Step::PrepareSpare),
        1 => Just(Step::Reopen),
        1 => Just(Step::Pin),
        1 => Just(Step::Unpin),
    ];
    prop::collection::vec(step, 1..40)
}

struct Model {
    disk: MemoryDisk,
    options: LogOptions,
    log: Opened,
    /// Everything appended, with its position.
    written: Vec<(Kept, LogPosition)>,
    /// Records below this may be gone from the log.
    freeable: usize,
    /// Pins, each with the first record that was live when it was taken.
    pins: Vec<(LogPin, usize)>,
}

impl Model {
    fn step(&mut self, step: Step) {
        match step {
            Step::Append(sizes) => self.append(&sizes),
            Step::Free(keep) => self.free(keep),
            Step::PrepareSpare => _ = self.log.log.segments.prepare_spare().unwrap(),
            Step::Reopen => self.reopen(),
            Step::Pin => self.pins.push((self.log.log.reader.pin(), self.freeable)),
            Step::Unpin => _ = self.pins.pop(),
        }
        self.check();
    }

    fn append(&mut self, sizes: &[Option<usize>]) {
        let first = self.written.len() as u64;
        let record = |(number, size): (u64, &Option<usize>)| match size {
            Some(size) => entry(0, number, payload(number, *size)),
            None => hard_state(0, 1, 1, number),
        };
        let records: Vec<_> = (first..).zip(sizes).map(record).collect();
        match self.log.append(&records) {
            Ok(positions) => self.written.extend(records.into_iter().zip(positions)),
            Err(AppendError::Full) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn free(&mut self, keep: usize) {
        let end = self.written.len().saturating_sub(keep);
        let entries = self.written[..end].iter().filter(|(record, _)| record.data().is_some());
        let Some((Kept::Entry { index, .. }, _)) = entries.last() else { return };
        let uncovered =
            |(record, _): &(Kept, _)| matches!(record, Kept::Entry { index: i, .. } if i > index);
        let first = self.written.iter().position(uncovered).unwrap_or(self.written.len());
        self.freeable = self.freeable.max(first);
        let covered: BTreeMap<ShardId, LogIndex> = [(ShardId(0), *index)].into();
        free(&self.log.log.segments, &covered);
    }

    fn reopen(&mut self) {
        self.pins.clear();
        let opened =
            open_with(Arc::new(self.disk.clone()), self.options, self.written.len() as u64);
        self.log = opened.unwrap();
        let start = self.written.len() - self.log.found.len();
        assert!(start <= self.freeable);
        assert!(self.log.found == self.written[start..]);
    }

    /// What is neither freed nor unpinned reads back; positions rise.
    fn check(&self) {
        assert!(self.written.windows(2).all(|pair| pair[0].1 < pair[1].1));
        let pinned = self.pins.iter().map(|(_, first)| *first).min();
        let readable = pinned.unwrap_or(self.freeable).min(self.freeable);
        let mut buf = Vec::new();
        for (record, position) in self.written[readable..].iter().rev().take(30) {
            let Some(data) = record.data() else { continue };
            let cached = self.log.log.reader.cached(*position, data.len());
            assert!(cached.is_none_or(|cached| cached == data));
            buf.resize(data.len(), 0);
            self.log.log.reader.read(*position, &mut buf).unwrap();
            assert!(buf == data[..]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60, failure_persistence: None, ..Default::default()
    })]

    #[test]
    fn the_log_is_what_was_appended(steps in steps()) {
        let disk = MemoryDisk::new(0);
        let (log_bytes_max, cache_bytes_max) = (4 * SEGMENT, 200_000);
        let options = LogOptions { log_bytes_max, cache_bytes_max, ..OPTIONS };
        let log = open_with(Arc::new(disk.clone()), options, 999).unwrap();
        let mut model =
            Model { disk, options, log, written: Vec::new(), freeable: 0, pins: Vec::new() };
        for step in steps {
            model.step(step);
        }
        model.step(Step::Reopen);
    }
}
