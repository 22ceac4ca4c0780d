//! A node's log thread and checkpoint thread.

use bytes::BytesMut;
use nbd_consensus::Entry;
use nbd_log::checksum::crc32c;
use nbd_log::log::{LogWriter, Record};
use nbd_shard::log_write::{AppendTo, take_copies, take_urgent, write_first};
use nbd_shard::{Checkpointed, Event, FetchPlan, LogWrite, Persisted, raft_kind};
use nbd_store::{CheckpointError, CheckpointReport, EntryPlace};
use nbd_topology::ShardId;
use rand::Rng;

use super::{Planned, World};
use crate::random::Draw;
use crate::time::{MILLISECOND, Nanos};

/// Wait before another try when the log has no room.
const FULL_WAIT: Nanos = 5 * MILLISECOND;

/// The log's records of a batch, in order.
fn records(batch: &[(ShardId, LogWrite)]) -> Vec<Record<'_>> {
    batch.iter().flat_map(|(shard, write)| write.records(*shard)).collect()
}

impl World {
    pub(super) fn queue_writes(&mut self, n: usize, shard: ShardId, writes: Vec<LogWrite>) {
        if writes.is_empty() {
            return;
        }
        let Some(running) = &mut self.nodes[n].running else { return };
        running.queue.extend(writes.into_iter().map(|write| (shard, write)));
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
        let empty = running.writing.iter().all(|(_, write)| write.is_empty());
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
        let batch = std::mem::take(&mut running.writing);
        match self.write_log(n, life, batch, LogWriter::append_ordinary) {
            None => {}
            Some((_, left)) if left.is_empty() => self.start_log(n),
            Some((_, left)) => self.wait_for_room(n, life, left),
        }
    }

    /// What the log thread does while there is no room for all of a batch.
    fn wait_for_room(&mut self, n: usize, life: u32, mut batch: Vec<(ShardId, LogWrite)>) {
        self.count("log writes without room");
        let Some(running) = &mut self.nodes[n].running else { return };
        batch.extend(running.queue.drain(..));
        let urgent = take_urgent(&mut batch, &running.segments);
        running.writing = batch;
        let Some((wrote, left)) = self.write_log(n, life, urgent, LogWriter::append) else {
            return;
        };
        let Some(running) = &mut self.nodes[n].running else { return };
        running.writing.splice(..0, left);
        let copies = if wrote { Vec::new() } else { take_copies(&mut running.writing) };
        for (shard, _) in copies {
            self.step(n, shard, Event::Persisted(Persisted::given_up()));
        }
        self.checkpoint(n);
        self.schedule.after(FULL_WAIT, Planned::LogDone { node: n, life });
    }

    /// Writes as much of the beginning of a batch as there is room for. Returns whether that was
    /// anything, and the rest; `None` if the node has ended.
    fn write_log(
        &mut self,
        n: usize,
        life: u32,
        mut batch: Vec<(ShardId, LogWrite)>,
        append: AppendTo,
    ) -> Option<(bool, Vec<(ShardId, LogWrite)>)> {
        let running = self.nodes[n].running.as_mut()?;
        let Ok(written) = write_first(&mut running.log, append, &mut batch) else {
            self.fail_node(n);
            return None;
        };
        let wrote = !written.is_empty();
        for ((shard, _), persisted) in written {
            if self.nodes[n].life != life {
                return None;
            }
            let running = self.nodes[n].running.as_mut()?;
            if let Some(ready) = persisted.ready
                && let Some(group) = running.groups.get_mut(&shard)
            {
                group.mirror.persisted(ready.0);
            }
            self.step(n, shard, Event::Persisted(persisted));
        }
        (self.nodes[n].life == life).then_some((wrote, batch))
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
            let first_kept = running.segments.first_kept(shard).unwrap_or_else(|| applied.next());
            let holds_up_log = running.segments.is_held_up_by(shard);
            let term = self.ledger.term(shard, applied);
            let checkpoint = Checkpointed { applied, term, first_kept, holds_up_log };
            self.step(n, shard, Event::Checkpointed(checkpoint));
        }
        self.repair(n, &report.damaged);
    }

    pub(super) fn on_fetched(&mut self, n: usize, life: u32, shard: ShardId, plan: &FetchPlan) {
        if self.nodes[n].life != life {
            return;
        }
        let entries = self.read_entries(n, &plan.places);
        self.count("entries fetched from the log");
        self.step(n, shard, Event::Fetched { first: plan.first, entries });
    }

    pub(super) fn on_read_back(
        &mut self,
        n: usize,
        life: u32,
        shard: ShardId,
        places: &[EntryPlace],
    ) {
        if self.nodes[n].life != life {
            return;
        }
        let entries = self.read_entries(n, places);
        self.count("entries moved to the end of the log");
        self.step(n, shard, Event::ReadBack(entries));
    }

    /// The entries at these places, or none.
    fn read_entries(&self, n: usize, places: &[EntryPlace]) -> Vec<Entry> {
        let Some(running) = &self.nodes[n].running else { return Vec::new() };
        let mut entries = Vec::with_capacity(places.len());
        for place in places {
            let mut data = BytesMut::zeroed(place.len);
            let read = running.log_reader.read(place.position, &mut data);
            if read.is_err() || crc32c(&data) != place.crc {
                return Vec::new();
            }
            let (index, term, kind) = (place.index, place.term, raft_kind(place.kind));
            entries.push(Entry { index, term, kind, data: data.freeze() });
        }
        entries
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
