//! Bringing replicas up to date: snapshots, chunks, members that come and go, repair.

use nbd_consensus::SnapshotOffer;
use nbd_log::log::HardState;
use nbd_shard::{Answer, Event, InstallPlan};
use nbd_store::{
    ChunkIndex, ChunkKey, DamagedChunk, Formation, Outcome, ReceiveError, ReplicaAddresses,
    ReplicaInfo, ReplicaRegistration, ShardSnapshot, VolumeId, encode_register_replica,
};
use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, ShardId};

use super::node::initial_id;
use super::{Planned, Reply, World};
use crate::failure::Breach;
use crate::profile::FaultKind;
use crate::time::{MILLISECOND, Nanos};

/// How often a node that joins looks how far it is.
const JOIN_INTERVAL: Nanos = 60 * MILLISECOND;

/// Chunks in one page of a manifest.
const PAGE_CHUNKS: usize = 2;

/// How far a replica is in fetching another one's state.
#[derive(Debug)]
pub(super) struct Resync {
    source: usize,
    /// What the own checkpoint covers: older chunks need not be fetched.
    since: LogIndex,
    snapshot: Option<ShardSnapshot>,
    after: Option<ChunkKey>,
    /// Everything is fetched.
    is_done: bool,
}

impl World {
    pub(super) fn on_snapshot_offered(&mut self, n: usize, shard: ShardId, offer: SnapshotOffer) {
        let Some(&source) = self.places.get(&(shard, offer.from)) else { return };
        let since = self.covered(n, shard);
        let Some(group) = self.hosted(n, shard) else { return };
        if group.resync.is_some() {
            return;
        }
        let (snapshot, after) = (None, None);
        group.resync = Some(Resync { source, since, snapshot, after, is_done: false });
        self.plan_resync(n, shard);
    }

    fn hosted(&mut self, n: usize, shard: ShardId) -> Option<&mut super::node::Hosted> {
        self.nodes[n].running.as_mut()?.groups.get_mut(&shard)
    }

    /// What the last checkpoint covers.
    fn covered(&self, n: usize, shard: ShardId) -> LogIndex {
        let running = self.nodes[n].running.as_ref();
        let reader = running.and_then(|r| r.groups.get(&shard)).map(|group| &group.reader);
        reader.and_then(|reader| reader.snapshot().ok()).map_or(LogIndex::ZERO, |s| s.applied)
    }

    pub(super) fn drop_resync(&mut self, n: usize, shard: ShardId) {
        if let Some(group) = self.hosted(n, shard) {
            group.resync = None;
        }
    }

    /// One exchange with the source, if it can be reached; otherwise the next offer begins anew.
    fn plan_resync(&mut self, n: usize, shard: ShardId) {
        let life = self.nodes[n].life;
        let Some(source) = self.hosted(n, shard).and_then(|g| g.resync.as_ref()).map(|r| r.source)
        else {
            return;
        };
        match self.network.round_trip(n, source) {
            Some(wait) => self.schedule.after(wait, Planned::Resync { node: n, life, shard }),
            None => self.drop_resync(n, shard),
        }
    }

    pub(super) fn on_resync(&mut self, n: usize, life: u32, shard: ShardId) {
        if self.nodes[n].life != life {
            return;
        }
        let Some(mut resync) = self.hosted(n, shard).and_then(|group| group.resync.take()) else {
            return;
        };
        if resync.is_done {
            return;
        }
        let reader = self.nodes[resync.source].running.as_ref();
        let Some(reader) = reader.and_then(|r| r.groups.get(&shard)).map(|g| g.reader.clone())
        else {
            return;
        };
        let upto = resync.snapshot.as_ref().map(|snapshot| snapshot.applied);
        if let Some(upto) = upto {
            let Ok(page) = reader.manifest(resync.since, resync.after, PAGE_CHUNKS) else { return };
            let mut images = Vec::new();
            for stamp in &page.chunks {
                match reader.read_chunk(stamp.volume, stamp.chunk) {
                    Ok(image) => images.extend(image),
                    Err(error) => {
                        // The source has it repaired; the next offer begins anew.
                        self.note_damage(resync.source, &error);
                        self.repair_chunk(resync.source, shard, stamp.volume, stamp.chunk);
                        return;
                    }
                }
            }
            let Some(running) = &mut self.nodes[n].running else { return };
            let checkpointer = &mut running.checkpointer;
            let taken = checkpointer.write_chunks(shard, upto, images).and_then(|()| {
                checkpointer.remove_absent(shard, upto, resync.after, page.next, &page.present)
            });
            match taken {
                Ok(_) => {}
                // The log has come further meanwhile: no transfer is needed, or another one.
                Err(ReceiveError::Stale { .. }) => return,
                Err(error) => {
                    self.on_receive_error(n, &error);
                    return;
                }
            }
            resync.after = page.next;
            resync.is_done = page.next.is_none();
        } else {
            let Ok(snapshot) = reader.snapshot() else { return };
            resync.snapshot = Some(snapshot);
        }
        let ready = resync.is_done.then(|| resync.snapshot.clone()).flatten();
        if let Some(group) = self.hosted(n, shard) {
            group.resync = Some(resync);
        }
        match ready {
            Some(snapshot) => self.step(n, shard, Event::ResyncReady(snapshot)),
            None => self.plan_resync(n, shard),
        }
    }

    fn on_receive_error(&mut self, n: usize, error: &ReceiveError) {
        match error {
            ReceiveError::Store(error) if error.is_fatal() => self.fail_node(n),
            // Begun anew with the next offer.
            ReceiveError::Store(_) => {}
            _ => {
                let reason = format!("a transfer failed: {error}");
                self.fail(Breach::Unreadable { node: n, reason });
            }
        }
    }

    pub(super) fn install(&mut self, n: usize, shard: ShardId, plan: &InstallPlan) {
        let index = plan.snapshot.applied;
        if let Some(group) = self.hosted(n, shard) {
            group.mirror.installed(index);
            group.resync = None;
        }
        let Some(running) = &mut self.nodes[n].running else { return };
        let vote = plan.hard_state.vote.map_or(0, ReplicaId::get);
        let (term, commit) = (plan.hard_state.term, plan.hard_state.commit);
        let state = HardState { term, vote, commit };
        match running.checkpointer.install(shard, &plan.snapshot, state) {
            Ok(()) => {
                self.count("snapshots installed");
                self.step(n, shard, Event::Installed);
            }
            Err(ReceiveError::Store(_)) => self.fail_node(n),
            Err(error) => self.on_receive_error(n, &error),
        }
    }

    /// Whether a node runs, and all its replicas are voters that are not about to be replaced.
    pub(super) fn is_whole(&self, n: usize) -> bool {
        let Some(running) = &self.nodes[n].running else { return false };
        running.unformed.is_empty()
            && running.groups.iter().all(|(shard, group)| {
                let membership = self.membership(*shard);
                let mine = |id: &ReplicaId| self.places.get(&(*shard, *id)) == Some(&n);
                membership.is_some_and(|membership| {
                    membership.is_voter(group.id) && membership.all().filter(mine).count() == 1
                })
            })
    }

    /// The members of a group, as its leader has them.
    fn membership(&self, shard: ShardId) -> Option<Membership> {
        let leader = self.leader_of(shard)?;
        let group = self.nodes[leader].running.as_ref()?.groups.get(&shard)?;
        Some(group.replica.status().membership)
    }

    /// Plans the first look of a node that may have to join.
    pub(super) fn plan_join(&mut self, n: usize) {
        let life = self.nodes[n].life;
        self.schedule.after(JOIN_INTERVAL, Planned::Join { node: n, life });
    }

    /// A node with a new disk takes the next step towards being a voter again.
    pub(super) fn on_join(&mut self, n: usize, life: u32) {
        if self.nodes[n].life != life || self.is_whole(n) {
            return;
        }
        for shard in (0..self.profile.shards).map(ShardId) {
            self.join(n, shard);
        }
        self.plan_join(n);
    }

    fn join(&mut self, n: usize, shard: ShardId) {
        let Some(leader) = self.leader_of(shard) else { return };
        if self.network.round_trip(n, leader).is_none() {
            return;
        }
        let Some(running) = &self.nodes[n].running else { return };
        let Some(group) = running.groups.get(&shard) else {
            let registration = ReplicaRegistration {
                node: self.nodes[n].name().clone(),
                directory: running.directory,
                addresses: ReplicaAddresses::default(),
            };
            let Some(next) = self.next_replica(leader, shard) else { return };
            let Ok(command) = encode_register_replica(&registration, next) else { return };
            self.propose(leader, shard, command, Reply::Member { node: n });
            return;
        };
        let id = group.id;
        let Some(membership) = self.membership(shard) else { return };
        let old = membership
            .all()
            .find(|other| *other != id && self.places.get(&(shard, *other)) == Some(&n));
        let change = if !membership.contains(id) {
            MembershipChange::AddLearner(id)
        } else if let Some(old) = old {
            if !self.has_caught_up(leader, shard, id) {
                return;
            }
            MembershipChange::Remove(old)
        } else if membership.is_voter(id) {
            return;
        } else {
            MembershipChange::AddVoter(id)
        };
        self.step(leader, shard, Event::ChangeMembership(change, Reply::Member { node: n }));
    }

    /// The id that the leader would give.
    fn next_replica(&self, leader: usize, shard: ShardId) -> Option<ReplicaId> {
        let group = self.nodes[leader].running.as_ref()?.groups.get(&shard)?;
        ReplicaId::new(group.reader.formation()?.next_replica)
    }

    fn has_caught_up(&self, leader: usize, shard: ShardId, id: ReplicaId) -> bool {
        let running = self.nodes[leader].running.as_ref();
        let Some(group) = running.and_then(|r| r.groups.get(&shard)) else { return false };
        let status = group.replica.status();
        let peer = status.peers.iter().find(|peer| peer.replica == id);
        peer.is_some_and(|peer| peer.active && peer.matched.0 + 20 >= status.committed.0)
    }

    pub(super) fn on_member_answer(&mut self, n: usize, answer: Answer) {
        let Answer::Outcome(Outcome::ReplicaRegistered(info)) = answer else { return };
        let shards: Vec<ShardId> = match &self.nodes[n].running {
            Some(running) if running.directory == info.directory => {
                running.unformed.keys().copied().collect()
            }
            _ => return,
        };
        // Ids of one directory may differ between shards: take the one that gave this id.
        let Some(shard) = shards.into_iter().find(|shard| self.knows(*shard, &info)) else {
            return;
        };
        let members = (0..self.profile.nodes).map(initial_id);
        let formation = Formation {
            replica: info.id,
            membership: Membership::of_voters(members),
            replicas: vec![info.clone()],
            next_replica: info.id.get() + 1,
        };
        self.count("replicas joined");
        self.form_as(n, shard, &formation, false);
    }

    fn knows(&self, shard: ShardId, info: &ReplicaInfo) -> bool {
        let leader = self.leader_of(shard);
        let running = leader.and_then(|leader| self.nodes[leader].running.as_ref());
        let group = running.and_then(|running| running.groups.get(&shard));
        group.is_some_and(|group| group.reader.replicas().contains(info))
    }

    /// Replaces damaged chunks by good copies of peers that can be reached.
    pub(super) fn repair(&mut self, n: usize, damaged: &[DamagedChunk]) {
        for chunk in damaged {
            self.note_damage(n, chunk);
            let shard = chunk.volume.shard();
            self.repair_chunk(n, shard, chunk.volume, chunk.chunk);
        }
    }

    /// Data is damaged by flipped bits and by nothing else.
    pub(super) fn note_damage(&mut self, n: usize, what: &dyn std::fmt::Debug) {
        if !self.profile.faults.contains_key(&FaultKind::BitFlip) {
            let reason = format!("damaged by a crash or by itself: {what:?}");
            self.fail(Breach::Unreadable { node: n, reason });
        }
    }

    pub(super) fn repair_block(&mut self, n: usize, shard: ShardId, volume: VolumeId, block: u64) {
        self.repair_chunk(n, shard, volume, ChunkIndex(block / 16));
    }

    fn repair_chunk(&mut self, n: usize, shard: ShardId, volume: VolumeId, chunk: ChunkIndex) {
        for peer in (0..self.nodes.len()).filter(|peer| *peer != n) {
            if self.network.round_trip(n, peer).is_none() {
                continue;
            }
            let running = self.nodes[peer].running.as_ref();
            let Some(group) = running.and_then(|r| r.groups.get(&shard)) else { continue };
            let Ok(Some(image)) = group.reader.read_chunk(volume, chunk) else { continue };
            let Some(running) = &mut self.nodes[n].running else { return };
            match running.checkpointer.replace_chunk(shard, &image) {
                Ok(true) => {
                    self.count("chunks repaired");
                    return;
                }
                Ok(false) => {}
                Err(error) => {
                    self.on_receive_error(n, &error);
                    return;
                }
            }
        }
    }
}
