//! Volumes that change their size, or go, while clients work on them.
//!
//! What that comes to is told by the ledger, when the first replica has it committed: before
//! anybody can see it, and after all that was answered before. Commands that are sent again may
//! come late: a volume may shrink once more, which the ending makes good.

use nbd_store::{Labels, NewVolume, encode_delete_volume, encode_new_volume, encode_resize_volume};
use rand::Rng;

use super::front::Purpose;
use super::{Volume, World};
use crate::history::SECTOR_BYTES;
use crate::ledger::Change;
use crate::profile::FaultKind;
use crate::random::Draw;

/// Sectors of the smallest volume.
const SECTORS_MIN: u64 = 8;

impl Volume {
    pub(super) const fn new(shard: nbd_topology::ShardId, name: String) -> Self {
        let (busy, resized, deleted) = (false, false, false);
        Self { shard, name, id: None, busy, resized, deleted, successor: None }
    }

    const fn is_at_rest(&self) -> bool {
        self.id.is_some() && !self.busy && !self.deleted
    }
}

impl World {
    fn draw_volume(&mut self) -> Option<usize> {
        let at_rest: Vec<usize> =
            (0..self.volumes.len()).filter(|at| self.volumes[*at].is_at_rest()).collect();
        let at = self.nemesis.rng.random_range(0..at_rest.len().max(1));
        at_rest.get(at).copied()
    }

    /// A volume becomes smaller. Once it is, it becomes as large as before.
    pub(super) fn resize_one(&mut self) {
        let Some(volume) = self.draw_volume() else { return };
        self.struck(FaultKind::Resize, 0);
        let size = self.profile.sectors;
        let rng = &mut self.nemesis.rng;
        let sectors = if rng.chance(500_000) {
            size - rng.random_range(1..=(size - SECTORS_MIN).clamp(1, 40))
        } else {
            rng.random_range(SECTORS_MIN..=size)
        };
        self.volumes[volume].resized = true;
        self.resize(volume, sectors.max(SECTORS_MIN), Purpose::Shrink(volume));
    }

    pub(super) fn grow(&mut self, volume: usize) {
        self.resize(volume, self.profile.sectors, Purpose::Grow(volume));
    }

    fn resize(&mut self, volume: usize, sectors: u64, purpose: Purpose) {
        let at = &mut self.volumes[volume];
        let Some(id) = at.id else { return };
        at.busy = true;
        let command = encode_resize_volume(id, None, sectors * SECTOR_BYTES, true, 0);
        let (shard, front) = (at.shard, self.profile.nodes);
        self.add_chore(front, shard, command, purpose);
    }

    /// A volume goes, whoever is attached to it.
    pub(super) fn recreate_one(&mut self) {
        let Some(volume) = self.draw_volume() else { return };
        self.struck(FaultKind::Recreate, 0);
        let at = &mut self.volumes[volume];
        let Some(id) = at.id else { return };
        at.busy = true;
        let (shard, front) = (at.shard, self.profile.nodes);
        let command = encode_delete_volume(id, true);
        self.add_chore(front, shard, command, Purpose::DeleteVolume(volume));
    }

    /// Creates a volume of the same name in the place of one that is gone.
    pub(super) fn create_successor(&mut self, volume: usize) {
        let (new, at) = (self.volumes.len(), &mut self.volumes[volume]);
        (at.busy, at.successor) = (false, Some(new));
        let mut successor = Volume::new(at.shard, at.name.clone());
        successor.busy = true;
        let (shard, front) = (at.shard, self.profile.nodes);
        let (labels, size) = (Labels::new(), self.profile.sectors * SECTOR_BYTES);
        let key = Some(u128::from(self.workload.number()) + 1);
        let name = &successor.name;
        let new_volume = NewVolume { name, size, description: "", labels: &labels, key, now_ms: 1 };
        let Ok(command) = encode_new_volume(&new_volume) else {
            unreachable!("the names of the world's volumes are short")
        };
        self.volumes.push(successor);
        self.add_chore(front, shard, command, Purpose::CreateVolume(new));
    }

    /// Takes over what the log has done to volumes.
    pub(super) fn volumes_changed(&mut self) {
        for change in self.ledger.take_changes() {
            let (Change::CutOff { volume: id, .. } | Change::Deleted(id)) = change;
            let Some(volume) = self.volumes.iter().position(|volume| volume.id == Some(id)) else {
                continue;
            };
            match change {
                Change::CutOff { sectors, .. } => {
                    self.count("volumes shrunk");
                    self.history.cut_off(volume, sectors);
                }
                Change::Deleted(_) => {
                    self.count("volumes deleted");
                    self.volumes[volume].deleted = true;
                    self.history.deleted(volume);
                }
            }
        }
    }

    /// A client finds that its volume is gone: all that it waits for fails, and it turns to what
    /// came in the volume's place.
    pub(super) fn leave_deleted(&mut self, client: usize) {
        self.hang_up(client);
        let at = &mut self.clients[client];
        at.generation += 1;
        at.outstanding.clear();
        if let Some(mut link) = at.link.take() {
            let failed = link.session.abandon().len() as u64;
            *self.tally.entry("requests failed with their volume").or_default() += failed;
        }
        let at = &mut self.clients[client];
        while let Some(next) = self.volumes[at.volume].successor {
            at.volume = next;
        }
        self.plan_reconnect(client);
    }

    pub(super) fn is_on_deleted(&self, client: usize) -> bool {
        self.volumes[self.clients[client].volume].deleted
    }

    /// Whether every volume has its size. Those that have not get it.
    pub(super) fn sizes_are_whole(&mut self) -> bool {
        let mut whole = true;
        for volume in 0..self.volumes.len() {
            let at = &self.volumes[volume];
            let Some(id) = at.id.filter(|_| !at.deleted) else { continue };
            let sectors = self.ledger.volumes(at.shard).get(&id).map(|(_, sectors)| *sectors);
            if sectors.is_some_and(|sectors| sectors != self.profile.sectors) {
                whole = false;
                if !at.busy {
                    self.grow(volume);
                }
            }
        }
        whole
    }
}
