//! A node's log thread and checkpoint thread.

use bytes::BytesMut;
use nbd_consensus::{Append, Entry};
use nbd_log::checksum::crc32c;
use nbd_log::log::{AppendError, EntryRecord, HardState, LogPosition, Record};
use nbd_shard::{Event, FetchPlan, Persisted, log_kind, raft_kind};
use nbd_store::{CheckpointError, CheckpointReport, EntryPlace};
use nbd_topology::{ReplicaId, ShardId};
use rand::Rng;

use super::{Planned, World};
use crate::random::Draw;
use crate::time::{MILLISECOND, Nanos};

/// Wait before another try when the log has no room.
const FULL_WAIT: Nanos = 5 * MILLISECOND;

/// The log's records of a batch, in order: of each append its hard state, then its entries.
fn records(batch: &[(ShardId, Append)]) -> Vec<Record<'_>> {
    let mut records = Vec::new();
    for (shard, append) in batch {
        if let Some(state) = &append.hard_state {
            let vote = state.vote.map_or(0, ReplicaId::get);
            let state = HardState { term: state.term, vote, commit: state.commit };
            records.push(Record::HardState(*shard, state));
        }
        records.extend(append.entries.iter().map(|entry| {
            let (index, term, kind) = (entry.index, entry.term, log_kind(entry.kind));
            Record::Entry(EntryRecord { shard: *shard, index, term, kind, data: &entry.data })
        }));
    }
    records
}

impl World {
    pub(super) fn queue_appends(&mut self, n: usize, shard: ShardId, appends: Vec<Append>) {
        if appends.is_empty() {
            return;
        }
        let Some(running) = &mut self.nodes[n].running else { return };
        running.queue.extend(appends.into_iter().map(|append| (shard, append)));
        self.start_log(n);
    }

    /// The log thread takes everything that waits, unless it is writing.
    fn start_log(&mut self, n: usize) {
        let life = self.nodes[n].life;
        let Some(running) = &mut self.nodes[n].running else { return };
        if !running.writing.is_empty() || running.queue.is_empty() {
            return;
        }
        running.writing = running.queue.drain(..).collect();
        let empty = running.writing.iter().all(|(_, append)| append.is_empty());
        let wait = if empty { 1_000 } else { self.write_delay() };
        self.schedule.after(wait, Planned::LogDone { node: n, life });
    }

    fn write_delay(&mut self) -> Nanos {
        let disk = &self.profile.disk;
        if self.rng.chance(disk.stall_ppm) {
            self.rng.span(disk.write_max, disk.stall_max)
        } else {
            self.rng.span(disk.write_min, disk.write_max)
        }
    }

    pub(super) fn read_delay(&mut self) -> Nanos {
        self.rng.span(10_000, self.profile.disk.read_max)
    }

    pub(super) fn on_log_done(&mut self, n: usize, life: u32) {
        if self.nodes[n].life != life {
            return;
        }
        self.note_cached(n);
        let Some(running) = &mut self.nodes[n].running else { return };
        let records = records(&running.writing);
        let positions = if records.is_empty() {
            Vec::new()
        } else {
            match running.log.append(&records) {
                Ok(positions) => positions,
                Err(AppendError::Full | AppendError::NoSpace) => {
                    self.count("log writes without room");
                    self.checkpoint(n);
                    self.schedule.after(FULL_WAIT, Planned::LogDone { node: n, life });
                    return;
                }
                Err(_) => {
                    self.fail_node(n);
                    return;
                }
            }
        };
        let batch = std::mem::take(&mut running.writing);
        self.acknowledge(n, life, batch, positions);
        self.start_log(n);
    }

    fn acknowledge(
        &mut self,
        n: usize,
        life: u32,
        batch: Vec<(ShardId, Append)>,
        positions: Vec<LogPosition>,
    ) {
        let mut positions = positions.into_iter();
        let mut persisted = Vec::with_capacity(batch.len());
        for (shard, append) in batch {
            if append.hard_state.is_some() {
                positions.next();
            }
            let place = |(entry, position): (&Entry, LogPosition)| EntryPlace {
                index: entry.index,
                term: entry.term,
                kind: log_kind(entry.kind),
                position,
                len: entry.data.len(),
                crc: crc32c(&entry.data),
            };
            let places = append.entries.iter().zip(positions.by_ref()).map(place).collect();
            persisted.push((shard, Persisted { ready: append.ready, places }));
        }
        for (shard, persisted) in persisted {
            if self.nodes[n].life != life {
                return;
            }
            if let Some(group) =
                self.nodes[n].running.as_mut().and_then(|r| r.groups.get_mut(&shard))
            {
                group.mirror.persisted(persisted.ready.0);
            }
            self.step(n, shard, Event::Persisted(persisted));
        }
    }

    /// A disk that lies keeps log writes in a cache of its own for a while.
    fn note_cached(&mut self, n: usize) {
        if !self.plant.disk_lies() {
            return;
        }
        let node = &mut self.nodes[n];
        if node.cached_since.is_none() || self.disks.chance(200_000) {
            let style = nbd_log::io::CrashStyle::Clean;
            node.cached_since = Some(node.disk.after_crash_as(style, 0));
        }
    }

    pub(super) fn on_checkpoint(&mut self, n: usize, life: u32) {
        if self.nodes[n].life != life || self.nodes[n].running.is_none() {
            return;
        }
        self.checkpoint(n);
        let interval = self.profile.checkpoint_interval;
        let wait = self.rng.span(interval / 2, interval * 3 / 2);
        self.schedule.after(wait, Planned::Checkpoint { node: n, life });
    }

    /// Runs a checkpoint.
    pub(super) fn checkpoint(&mut self, n: usize) {
        // What a disk has cached is older than what a checkpoint syncs.
        self.nodes[n].cached_since = None;
        let Some(running) = &mut self.nodes[n].running else { return };
        let _ = running.segments.prepare_spare();
        let _ = running.space.refresh();
        match running.checkpointer.run() {
            Ok(report) => {
                self.count("checkpoints");
                self.checkpointed(n, &report);
            }
            Err(CheckpointError::NoSpace) => self.count("checkpoints without room"),
            Err(_) => {
                self.finish_log_write(n);
                self.fail_node(n);
            }
        }
    }

    /// The log thread ends what it is at before it hears that the node has failed. Nobody else
    /// hears of that write any more.
    fn finish_log_write(&mut self, n: usize) {
        let Some(running) = &mut self.nodes[n].running else { return };
        if !running.writing.is_empty() {
            let _ = running.log.append(&records(&running.writing));
        }
    }

    fn checkpointed(&mut self, n: usize, report: &CheckpointReport) {
        for (&shard, &applied) in &report.applied {
            let Some(running) = &self.nodes[n].running else { return };
            let first_kept = running.segments.first_kept(shard);
            let term = self.ledger.term(shard, applied);
            self.step(n, shard, Event::Checkpointed { applied, term, first_kept });
        }
        self.repair(n, &report.damaged);
    }

    pub(super) fn on_fetched(&mut self, n: usize, life: u32, shard: ShardId, plan: &FetchPlan) {
        if self.nodes[n].life != life {
            return;
        }
        let Some(running) = &self.nodes[n].running else { return };
        let mut entries = Vec::with_capacity(plan.places.len());
        for place in &plan.places {
            let mut data = BytesMut::zeroed(place.len);
            let read = running.log_reader.read(place.position, &mut data);
            if read.is_err() || crc32c(&data) != place.crc {
                entries.clear();
                break;
            }
            let (index, term, kind) = (place.index, place.term, raft_kind(place.kind));
            entries.push(Entry { index, term, kind, data: data.freeze() });
        }
        self.count("entries fetched from the log");
        self.step(n, shard, Event::Fetched { first: plan.first, entries });
    }

    /// Power fails in the middle of what the log thread is doing.
    pub(super) fn tear_log_write(&mut self, n: usize) {
        let torn = self.disks.random_bool(0.5);
        let node = &mut self.nodes[n];
        let Some(running) = &mut node.running else { return };
        if torn && !running.writing.is_empty() {
            let disk = &node.disk;
            disk.crash_at(disk.sync_points() + 1);
            // It fails, as it must; what of it reached the disk is found after the restart.
            let _ = running.log.append(&records(&running.writing));
        }
    }
}
