//! Clients and what they ask for.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use nbd_session::Query;
use nbd_store::limits::CHUNK_BYTES;
use nbd_store::{Outcome, Rejection, SessionId, WriteBuilder, encode_trim, encode_write_zeroes};
use nbd_topology::ShardId;
use rand::Rng;
use rand::rngs::StdRng;

use super::ending::Phase;
use super::front::Link;
use super::{Planned, Told, Volume, World};
use crate::content;
use crate::failure::Breach;
use crate::history::{self, Action, OperationId, SECTOR_BYTES};
use crate::random::Draw;
use crate::time::MILLISECOND;

/// Sectors of one read when a volume is read from end to end.
const LAST_READ_SECTORS: u64 = 128;

/// Sectors of a chunk.
const CHUNK_SECTORS: u64 = CHUNK_BYTES / SECTOR_BYTES;

/// What is left to be asked for.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) rng: StdRng,
    pub(super) left: u32,
    /// Clients only read for a while: who was not heard from then misses nothing.
    pub(super) quiet: bool,
    numbers: u64,
}

impl Workload {
    pub(super) const fn new(rng: StdRng, operations: u32) -> Self {
        Self { rng, left: operations, quiet: false, numbers: 0 }
    }

    /// A number not used before.
    pub(super) const fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) front: usize,
    pub(super) volume: usize,
    /// Its session, unless it is between two.
    pub(super) link: Option<Link>,
    /// Rises with each session: events for an earlier one are void.
    pub(super) generation: u32,
    /// What it waits for: of mutations with their sequence number.
    pub(super) outstanding: BTreeMap<OperationId, Option<u64>>,
    /// In the end: where in the volume it is reading.
    pub(super) reading_from: u64,
}

impl World {
    pub(super) fn make_volumes(&mut self) {
        for n in 0..self.profile.volumes {
            let shard = ShardId(u32::try_from(n).unwrap_or_default() % self.profile.shards);
            self.volumes.push(Volume::new(shard, format!("volume-{n}")));
        }
    }

    pub(super) fn make_clients(&mut self) {
        for client in 0..self.profile.clients {
            self.clients.push(Client {
                front: 0,
                volume: client % self.profile.volumes,
                link: None,
                generation: 0,
                outstanding: BTreeMap::new(),
                reading_from: 0,
            });
            self.connect(client);
        }
    }

    /// A client connects to a front end, whichever it finds up.
    fn connect(&mut self, client: usize) {
        let up: Vec<usize> = (0..self.fronts.len()).filter(|at| self.fronts[*at].up).collect();
        let nodes = self.profile.nodes;
        let at_node = self.workload.rng.chance(self.profile.at_nodes_ppm);
        let fits = |front: &usize| (*front < nodes) == at_node;
        let chosen: Vec<usize> = up.iter().copied().filter(fits).collect();
        let among = if chosen.is_empty() { &up } else { &chosen };
        let rng = &mut self.workload.rng;
        if among.is_empty() {
            self.plan_reconnect(client);
            return;
        }
        self.clients[client].front = among[rng.random_range(0..among.len())];
        self.begin_session(client);
    }

    pub(super) fn plan_reconnect(&mut self, client: usize) {
        let generation = self.clients[client].generation;
        let wait = self.workload.rng.span(MILLISECOND, 100 * MILLISECOND);
        self.schedule.after(wait, Planned::Think { client, generation });
    }

    pub(super) fn on_think(&mut self, client: usize, generation: u32) {
        let at = &self.clients[client];
        if at.generation != generation {
            return;
        }
        let Some(link) = &at.link else {
            self.connect(client);
            return;
        };
        if !link.opened {
            return;
        }
        match self.phase {
            Phase::Busy if self.workload.left > 0 => {
                if at.outstanding.len() < self.profile.depth {
                    self.workload.left -= 1;
                    self.ask(client);
                }
                let wait = self.workload.rng.span(10_000, self.profile.think_max);
                self.schedule.after(wait, Planned::Think { client, generation });
            }
            Phase::Reading => self.read_on(client),
            _ => {}
        }
    }

    /// Draws a range: mostly short, mostly in the same few places, so that requests meet.
    fn draw_range(&mut self) -> Range<u64> {
        let rng = &mut self.workload.rng;
        let within =
            if rng.chance(850_000) { self.profile.hot_sectors } else { self.profile.sectors };
        let start = rng.random_range(0..within);
        let longest = match rng.random_range(0..20) {
            _ if rng.chance(self.profile.long_writes_ppm) => 128,
            0..=4 => 24,
            5..=9 => 8,
            _ => 3,
        };
        let len = rng.random_range(1..=longest);
        start..(start + len).min(self.profile.sectors)
    }

    fn ask(&mut self, client: usize) {
        let mut range = self.draw_range();
        let rng = &mut self.workload.rng;
        let only_reads = client < self.profile.readers || self.workload.quiet;
        if rng.chance(self.profile.reads_ppm) || only_reads {
            self.ask_read(client, range);
            return;
        }
        let mut what = rng.random_range(0..10);
        if rng.chance(self.profile.chunk_trims_ppm) {
            what = 8;
            range.start -= range.start % CHUNK_SECTORS;
            range.end = (range.start + CHUNK_SECTORS).min(self.profile.sectors);
        } else if what >= 8 && rng.chance(300_000) {
            // A whole chunk's worth, so that chunks come and go.
            range = range.start..(range.start + 160).min(self.profile.sectors);
        }
        let at = &mut self.clients[client];
        let volume = at.volume;
        let oldest = at.outstanding.values().flatten().min().copied();
        let (Some(link), Some(id)) = (&mut at.link, self.volumes[volume].id) else { return };
        if !link.session.has_room(oldest, 1) {
            return;
        }
        let (session, epoch, seq) =
            (link.session.id(), link.session.epoch(), link.session.reserve(1));
        let (offset, len) = (range.start * SECTOR_BYTES, (range.end - range.start) * SECTOR_BYTES);
        let name = u32::try_from(client).unwrap_or_default();
        let (operation, command) = match what {
            0..8 => {
                let action = Action::Write(range.clone());
                let operation = self.history.ask(name, volume, action);
                let mut write = WriteBuilder::new(session, epoch, seq, id, offset, len);
                content::fill(write.payload_mut(), operation.value(), id, range.start);
                (operation, write.finish())
            }
            8 => {
                let whole = history::trimmed(&range);
                let operation = self.history.ask(name, volume, Action::Zero(whole));
                (operation, encode_trim(session, epoch, seq, id, offset, len))
            }
            _ => {
                let no_hole = seq % 2 == 0;
                let operation = self.history.ask(name, volume, Action::Zero(range));
                let command = encode_write_zeroes(session, epoch, seq, id, offset, len, no_hole);
                (operation, command)
            }
        };
        let now = link.session.submit(seq, command, operation);
        self.clients[client].outstanding.insert(operation, Some(seq));
        self.tell(&Told::Ask { client, operation: operation.0 });
        if let Some(command) = now {
            self.send_mutation(client, seq, command);
        }
    }

    fn ask_read(&mut self, client: usize, range: Range<u64>) {
        let name = u32::try_from(client).unwrap_or_default();
        let volume = self.clients[client].volume;
        let Some(link) = &mut self.clients[client].link else { return };
        let (offset, len) = (range.start * SECTOR_BYTES, (range.end - range.start) * SECTOR_BYTES);
        let operation = self.history.ask(name, volume, Action::Read(range, Vec::new()));
        let query = Query::Read { offset, len, holes: false };
        let (id, now) = link.session.query(query, operation);
        self.clients[client].outstanding.insert(operation, None);
        self.tell(&Told::Ask { client, operation: operation.0 });
        if now {
            self.send_query(client, id, query);
        }
    }

    pub(super) fn on_mutation_done(
        &mut self,
        client: usize,
        operation: OperationId,
        (session, seq): (SessionId, u64),
        outcome: &Outcome,
    ) {
        self.clients[client].outstanding.remove(&operation);
        let shard = self.volumes[self.clients[client].volume].shard;
        match outcome {
            Outcome::Done if self.ledger.has_effect(shard, session, seq) => {
                self.count("mutations answered");
                self.history.answer(operation, Vec::new());
                self.tell(&Told::Answer { operation: operation.0, what: 0 });
            }
            Outcome::Rejected(Rejection::PastEnd)
                if self.volumes[self.clients[client].volume].resized =>
            {
                self.history.refused(operation);
                self.on_operation_failed(client, operation);
            }
            Outcome::Rejected(rejection) => self.fail(Breach::Rejected(operation, *rejection)),
            _ => self.fail(Breach::AnsweredWithoutEffect(operation)),
        }
    }

    /// The request failed; a mutation may have had an effect all the same.
    pub(super) fn on_operation_failed(&mut self, client: usize, operation: OperationId) {
        self.clients[client].outstanding.remove(&operation);
        self.count("requests failed");
        self.tell(&Told::Answer { operation: operation.0, what: 1 });
    }

    pub(super) fn on_read_answer(
        &mut self,
        client: usize,
        operation: OperationId,
        bytes: Option<Bytes>,
    ) {
        let at = &self.clients[client];
        let Some(id) = self.volumes[at.volume].id else { return };
        let Action::Read(range, _) = &self.history.operations()[operation.0].action else {
            unreachable!("only reads are answered with bytes")
        };
        let range = range.clone();
        let Some(bytes) = bytes else {
            self.on_operation_failed(client, operation);
            if self.is_on_deleted(client) {
                self.leave_deleted(client);
                return;
            }
            if self.phase == Phase::Reading {
                let generation = self.clients[client].generation;
                self.schedule.after(5 * MILLISECOND, Planned::Think { client, generation });
            }
            return;
        };
        match content::values(&bytes, id, range.start) {
            Ok(values) => {
                let what = values
                    .iter()
                    .fold(0, |sum: u64, value| sum.wrapping_mul(31).wrapping_add(value.0));
                self.count("reads answered");
                self.history.answer(operation, values);
                self.clients[client].outstanding.remove(&operation);
                self.tell(&Told::Answer { operation: operation.0, what });
            }
            Err(garbled) => {
                let reason = garbled.to_string();
                self.fail(Breach::Unreadable { node: self.nodes.len(), reason });
                return;
            }
        }
        if self.phase == Phase::Reading {
            let at = &mut self.clients[client];
            at.reading_from = at.reading_from.max(range.end);
            self.read_on(client);
        }
    }

    /// The next part of the last read, from one end of the volume to the other.
    fn read_on(&mut self, client: usize) {
        let at = &self.clients[client];
        let (from, sectors) = (at.reading_from, self.profile.sectors);
        if from < sectors && at.outstanding.is_empty() {
            self.ask_read(client, from..(from + LAST_READ_SECTORS).min(sectors));
        }
    }
}
