//! How a world ends: everything heals, comes to rest, and is looked at once more.

use std::collections::BTreeMap;

use bytes::BytesMut;
use nbd_store::{RangeDigest, ReadError, ShardReader, VolumeId};
use nbd_topology::{LogIndex, ShardId};

use super::{Planned, World};
use crate::content;
use crate::failure::Breach;
use crate::history::{SECTOR_BYTES, Value};
use crate::linear::{self, Verdict};
use crate::time::{MILLISECOND, Nanos, SECOND, SimTime};

/// How often somebody looks whether the next phase can begin.
pub(super) const LOOK: Nanos = 40 * MILLISECOND;

/// How long clients are busy at most.
const BUSY_MAX: SimTime = SimTime(12 * SECOND);

/// How long each later phase may take.
const PHASE_MAX: Nanos = 25 * SECOND;

/// Where a world is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Clients ask, faults strike.
    Busy,
    /// No more faults; what is under way comes to its end.
    Healing { since: SimTime },
    /// Every volume is read from end to end.
    Reading,
    /// Replicas catch up.
    Converging { since: SimTime },
    /// Everything was looked at.
    Over,
}

impl World {
    pub(super) fn on_look(&mut self) {
        let now = self.schedule.now();
        let late = |since: SimTime| now.0 - since.0 > PHASE_MAX;
        match self.phase {
            Phase::Busy if self.workload.left == 0 || now > BUSY_MAX => self.heal(),
            Phase::Healing { .. } if self.is_at_rest() => self.begin_reading(),
            Phase::Healing { since } if late(since) => self.fail(Breach::Stuck(self.unrest())),
            Phase::Reading if self.has_read_all() => {
                self.phase = Phase::Converging { since: now };
            }
            Phase::Reading if now.0 > END_OF_READING.0 => {
                self.fail(Breach::Stuck("the last reads are not answered".into()));
            }
            // A command sent again may have come this late.
            Phase::Reading => _ = self.sizes_are_whole(),
            Phase::Converging { .. } if self.has_converged() => self.judge(),
            Phase::Converging { since } if late(since) => {
                self.fail(Breach::Stuck(self.unrest()));
            }
            _ => {}
        }
        self.schedule.after(LOOK, Planned::Look);
    }

    fn heal(&mut self) {
        let now = self.schedule.now();
        self.workload.left = 0;
        self.workload.quiet = false;
        self.phase = Phase::Healing { since: now };
        self.network.calm();
        self.profile.disk.stall_ppm = 0;
        self.paused.fill(SimTime::default());
        for n in 0..self.nodes.len() {
            self.on_relief(super::nemesis::Relief::Room(n));
        }
    }

    /// Whether every node is whole and nobody waits for anything.
    fn is_at_rest(&self) -> bool {
        (0..self.nodes.len()).all(|n| self.is_whole(n))
            && self.fronts.iter().all(|front| front.up && front.chores.is_empty())
            && self.clients.iter().all(|client| {
                client.outstanding.is_empty() && client.link.as_ref().is_some_and(|l| l.opened)
            })
    }

    /// What there is to wait for.
    fn unrest(&self) -> String {
        let mut waits = Vec::new();
        for n in 0..self.nodes.len() {
            if !self.is_whole(n) {
                waits.push(format!("node {n} is not whole"));
            }
        }
        for (at, front) in self.fronts.iter().enumerate() {
            if !front.up || !front.chores.is_empty() {
                waits.push(format!("front end {at} has {} commands to run", front.chores.len()));
            }
        }
        for (at, client) in self.clients.iter().enumerate() {
            let state = client.link.as_ref().map(|link| link.session.attachment());
            let waiting = client.outstanding.len();
            if waiting > 0 || client.link.as_ref().is_none_or(|link| !link.opened) {
                waits.push(format!("client {at} waits for {waiting} answers, {state:?}"));
            }
        }
        for shard in (0..self.profile.shards).map(ShardId) {
            let leader = self.leader_of(shard);
            let last = self.ledger.last(shard);
            waits.push(format!("shard {shard}: leader {leader:?}, {last} entries committed"));
            for (n, node) in self.nodes.iter().enumerate() {
                let group = node.running.as_ref().and_then(|r| r.groups.get(&shard));
                let brief = group.map(|group| group.replica.brief());
                waits.push(format!("node {n}: {brief:?}"));
            }
        }
        waits.join("; ")
    }

    /// Begins to read once every volume has its size again.
    fn begin_reading(&mut self) {
        if !self.sizes_are_whole() {
            return;
        }
        self.phase = Phase::Reading;
        for volume in 0..self.volumes.len() {
            let reader = self.clients.iter().position(|client| client.volume == volume);
            for (at, client) in self.clients.iter_mut().enumerate() {
                if client.volume == volume {
                    let from = if Some(at) == reader { 0 } else { self.profile.sectors };
                    client.reading_from = from;
                    let generation = client.generation;
                    self.schedule.after(0, Planned::Think { client: at, generation });
                }
            }
        }
    }

    fn has_read_all(&self) -> bool {
        self.clients.iter().all(|client| client.reading_from >= self.profile.sectors)
    }

    fn has_converged(&self) -> bool {
        self.nodes.iter().all(|node| {
            node.running.as_ref().is_some_and(|running| {
                running.queue.is_empty()
                    && running.writing.is_empty()
                    && running
                        .groups
                        .iter()
                        .all(|(shard, group)| group.replica.applied() == self.ledger.last(*shard))
            })
        })
    }

    /// Looks at everything there is.
    fn judge(&mut self) {
        self.phase = Phase::Over;
        let judgement = self
            .judge_history()
            .and_then(|()| self.judge_replicas())
            .and_then(|()| self.judge_digests());
        if let Err(breach) = judgement {
            self.fail(breach);
        }
    }

    fn judge_history(&mut self) -> Result<(), Breach> {
        match linear::check(self.history.operations()) {
            Verdict::Linearizable => Ok(()),
            Verdict::Violation(violation) => Err(Breach::NotLinearizable(Box::new(violation))),
            Verdict::Undecided { volume, sector } => Err(Breach::Undecided { volume, sector }),
        }
    }

    /// Every replica holds what applying each committed mutation once comes to.
    fn judge_replicas(&mut self) -> Result<(), Breach> {
        // A good copy is one of the same version: all must have everything home.
        for n in 0..self.nodes.len() {
            self.checkpoint(n);
        }
        for n in 0..self.nodes.len() {
            self.scrub(n);
            for shard in (0..self.profile.shards).map(ShardId) {
                let Some(reader) = self.reader(n, shard) else { continue };
                let expected = self.ledger.volumes(shard);
                Self::judge_catalogue(n, &reader, &expected)?;
                for (volume, (_, sectors)) in expected {
                    self.judge_volume(n, &reader, volume, sectors)?;
                }
            }
        }
        Ok(())
    }

    /// A replica has the volumes that the log has made, and nothing is left of others.
    fn judge_catalogue(
        node: usize,
        reader: &ShardReader,
        expected: &BTreeMap<VolumeId, (String, u64)>,
    ) -> Result<(), Breach> {
        let found = reader.volumes().into_iter();
        let found = found.map(|of| (of.id, (of.name.to_string(), of.size / SECTOR_BYTES)));
        let found: BTreeMap<_, _> = found.collect();
        if found != *expected {
            let (expected, found) = (expected.clone().into_iter(), found.into_iter());
            let (expected, found) = (expected.collect(), found.collect());
            return Err(Breach::CatalogueDiffers { node, expected, found });
        }
        let unreadable = |error: ReadError| Breach::Unreadable { node, reason: error.to_string() };
        let mut after = None;
        loop {
            let page = reader.manifest(LogIndex::ZERO, after, 1 << 16).map_err(unreadable)?;
            let kept = page.present.iter().find(|run| !expected.contains_key(&run.volume));
            if let Some(run) = kept {
                return Err(Breach::ChunksKept { node, volume: run.volume });
            }
            after = page.next;
            if after.is_none() {
                return Ok(());
            }
        }
    }

    fn judge_volume(
        &self,
        n: usize,
        reader: &ShardReader,
        volume: VolumeId,
        sectors: u64,
    ) -> Result<(), Breach> {
        let unreadable = |reason| Breach::Unreadable { node: n, reason };
        let len = sectors * SECTOR_BYTES;
        let mut buffer = BytesMut::zeroed(usize::try_from(len).unwrap_or_default());
        let plan = reader.resolve(volume, 0, len);
        plan.and_then(|mut plan| plan.read_blocking(&mut buffer))
            .map_err(|error| unreadable(error.to_string()))?;
        let found = content::values(&buffer, volume, 0);
        let found = found.map_err(|error| unreadable(error.to_string()))?;
        let expected = self.ledger.content(volume.shard(), volume, sectors);
        let differs = |(found, expected): &(Value, Value)| found != expected;
        let pairs = found.into_iter().zip(expected);
        match (0..).zip(pairs).find(|(_, pair)| differs(pair)) {
            None => Ok(()),
            Some((sector, (found, expected))) => {
                Err(Breach::ReplicaDiffers { node: n, volume, sector, expected, found })
            }
        }
    }

    fn reader(&self, n: usize, shard: ShardId) -> Option<ShardReader> {
        let running = self.nodes[n].running.as_ref()?;
        running.groups.get(&shard).map(|group| group.reader.clone())
    }

    /// Makes good what is damaged.
    fn scrub(&mut self, n: usize) {
        for shard in (0..self.profile.shards).map(ShardId) {
            let Some(reader) = self.reader(n, shard) else { continue };
            if let Ok(page) = reader.scrub(None, 1 << 16) {
                self.repair(n, &page.damaged);
            }
        }
    }

    /// The books of all replicas agree.
    fn judge_digests(&mut self) -> Result<(), Breach> {
        for shard in (0..self.profile.shards).map(ShardId) {
            let mut first: Option<(usize, Vec<RangeDigest>)> = None;
            for n in 0..self.nodes.len() {
                let Some(reader) = self.reader(n, shard) else { continue };
                let Ok(digests) = reader.digests(None, 1 << 16) else { continue };
                match &first {
                    None => first = Some((n, digests)),
                    Some((other, expected)) if *expected != digests => {
                        return Err(Breach::DigestsDiffer { shard, nodes: [*other, n] });
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }
}

/// When the last reads must be answered.
const END_OF_READING: SimTime = SimTime(80 * SECOND);
