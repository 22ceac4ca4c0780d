//! Bringing replicas up to date: snapshots, chunks, members that come and go, repair.
//!
//! The steps of a resync are the product's own; what carries them out does as its driver does. A
//! question takes its time to the source, there, and back again, and the replica that asked goes on
//! meanwhile: it hears leaders, applies, and runs checkpoints.

use nbd_consensus::SnapshotOffer;
use nbd_shard::resync::{self, Got, Want, digest_range_from, unequal_ranges, unfinished};
use nbd_shard::{Answer, Event, InstallPlan};
use nbd_store::{
    ChunkDigest, ChunkImage, ChunkIndex, ChunkKey, DamagedChunk, Formation, ManifestPage, Outcome,
    RangeDigest, ReadError, ReceiveError, ReplicaAddresses, ReplicaInfo, ReplicaRegistration,
    ShardReader, ShardSnapshot, VolumeId, encode_register_replica,
};
use nbd_topology::{LogIndex, Membership, MembershipChange, ReplicaId, ShardId};

use super::node::initial_id;
use super::{Planned, Reply, World};
use crate::failure::Breach;
use crate::profile::FaultKind;
use crate::random::Draw;
use crate::time::{MILLISECOND, Nanos, SimTime};

/// How often a node that joins looks how far it is.
const JOIN_INTERVAL: Nanos = 60 * MILLISECOND;

/// Ranges in one page of digests: more than a world has.
const PAGE_RANGES: usize = 64;

/// After how long an answer that does not come is given up.
const ANSWER_TIMEOUT: Nanos = 500 * MILLISECOND;

/// A resync under way.
#[derive(Debug)]
pub(super) struct Resync {
    offer: SnapshotOffer,
    source: usize,
    plan: resync::Resync,
    began: SimTime,
    /// Of the step under way: what comes of an earlier one is void.
    nth: u64,
    /// That step.
    want: Want,
    /// Of a comparison: where its next page begins.
    next: Option<ChunkKey>,
}

/// What is asked of a source.
#[derive(Debug)]
pub(super) enum Question {
    Snapshot {
        at_least: LogIndex,
    },
    Manifest {
        since: LogIndex,
        after: Option<ChunkKey>,
    },
    Chunks(Vec<ChunkKey>),
    Digests {
        after: Option<ChunkKey>,
    },
    /// Of the ranges that begin with these.
    ChunkDigests(Vec<ChunkKey>),
}

/// What a source says.
#[derive(Debug)]
pub(super) enum Finding {
    Snapshot(ShardSnapshot),
    Page(ManifestPage),
    Images(Vec<ChunkImage>),
    Digests(Vec<RangeDigest>),
    ChunkDigests(Vec<(ChunkKey, Vec<ChunkDigest>)>),
}

/// Where a question comes from, and whom it is for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    node: usize,
    life: u32,
    shard: ShardId,
    id: ReplicaId,
    nth: u64,
    /// The replica that is asked, and its node's life at the time: a connection lasts no longer.
    to: (ReplicaId, u32),
}

/// What happens in a resync.
#[derive(Debug)]
pub(super) enum Progress {
    /// The node comes to the step that it can carry out alone.
    Job,
    /// The source has answered, or never will.
    Answered(Option<Finding>),
}

/// Why a step came to nothing.
enum StepError {
    Store(ReceiveError),
    Read,
}

impl From<ReceiveError> for StepError {
    fn from(error: ReceiveError) -> Self {
        Self::Store(error)
    }
}

impl From<ReadError> for StepError {
    fn from(_: ReadError) -> Self {
        Self::Read
    }
}

impl World {
    pub(super) fn on_snapshot_offered(&mut self, n: usize, shard: ShardId, offer: SnapshotOffer) {
        let Some(&source) = self.places.get(&(shard, offer.from)) else { return };
        let began = self.schedule.now();
        let Some(group) = self.hosted(n, shard) else { return };
        let want = match &mut group.resync {
            Some(resync) if resync.plan.is_told() || resync.offer.from == offer.from => return,
            Some(resync) => {
                (resync.offer, resync.source) = (offer, source);
                resync.plan.source_changed();
                resync.plan.begin()
            }
            None => {
                let plan = resync::Resync::new();
                let want = plan.begin();
                let resync =
                    Resync { offer, source, plan, began, nth: 0, want: want.clone(), next: None };
                group.resync = Some(resync);
                want
            }
        };
        self.begin_step(n, shard, want);
    }

    fn hosted(&mut self, n: usize, shard: ShardId) -> Option<&mut super::node::Hosted> {
        self.nodes[n].running.as_mut()?.groups.get_mut(&shard)
    }

    /// The group does not need what it was told to be ready.
    pub(super) fn drop_resync(&mut self, n: usize, shard: ShardId) {
        if let Some(group) = self.hosted(n, shard) {
            group.resync.take_if(|resync| resync.plan.is_told());
        }
    }

    /// Takes what came of a step, and begins the next one.
    fn end_step(&mut self, n: usize, shard: ShardId, got: Got) {
        let now = self.schedule.now();
        let Some(resync) = self.hosted(n, shard).and_then(|group| group.resync.as_mut()) else {
            return;
        };
        let elapsed = std::time::Duration::from_nanos(now.0 - resync.began.0);
        let want = resync.plan.step(elapsed, got);
        self.begin_step(n, shard, want);
    }

    fn begin_step(&mut self, n: usize, shard: ShardId, want: Want) {
        let Some(group) = self.hosted(n, shard) else { return };
        let Some(resync) = &mut group.resync else { return };
        if resync.plan.is_told() {
            // The group speaks next.
            return;
        }
        if group.reader.applied() >= resync.offer.index {
            group.resync = None;
            self.count("resyncs overtaken by the log");
            return;
        }
        resync.nth += 1;
        resync.want = want.clone();
        let at_least = resync.offer.index;
        let reader = group.reader.clone();
        match want {
            Want::Checkpoint | Want::Remove(_) | Want::Ready(_) => {
                let wait = self.transfer_delay();
                self.plan_job(n, shard, wait);
            }
            Want::Pause(pause) => {
                let wait = Nanos::try_from(pause.as_nanos()).unwrap_or(Nanos::MAX);
                self.plan_job(n, shard, wait);
            }
            Want::Snapshot { .. } => self.ask_source(n, shard, Question::Snapshot { at_least }),
            Want::Page { since, after } => {
                self.ask_source(n, shard, Question::Manifest { since, after });
            }
            Want::Fetch { chunks, .. } => {
                let is_missing = |stamp: &nbd_store::ChunkStamp| {
                    !reader.has_chunk(stamp.volume, stamp.chunk, stamp.last_index).unwrap_or(false)
                };
                let missing = chunks.into_iter().filter(is_missing);
                let missing: Vec<_> = missing.map(|stamp| (stamp.volume, stamp.chunk)).collect();
                if missing.is_empty() {
                    self.end_step(n, shard, Got::Stored);
                } else {
                    self.ask_source(n, shard, Question::Chunks(missing));
                }
            }
            Want::Refetch { chunks, .. } => {
                self.count("chunks fetched again");
                self.ask_source(n, shard, Question::Chunks(chunks));
            }
            Want::Compare { after, .. } => self.ask_source(n, shard, Question::Digests { after }),
        }
    }

    fn transfer_delay(&mut self) -> Nanos {
        self.rng.span(10_000, self.profile.transfer_delay_max)
    }

    fn plan_job(&mut self, n: usize, shard: ShardId, wait: Nanos) {
        self.plan_progress(n, shard, wait, Progress::Job);
    }

    fn plan_progress(&mut self, n: usize, shard: ShardId, wait: Nanos, progress: Progress) {
        let life = self.nodes[n].life;
        let Some(nth) = self.hosted(n, shard).and_then(|g| g.resync.as_ref()).map(|r| r.nth) else {
            return;
        };
        let planned = Planned::Resync { node: n, life, shard, nth, progress: Box::new(progress) };
        self.schedule.after(wait, planned);
    }

    fn ask_source(&mut self, n: usize, shard: ShardId, question: Question) {
        let life = self.nodes[n].life;
        let Some(group) = self.hosted(n, shard) else { return };
        let id = group.id;
        let Some((source, to, nth)) =
            group.resync.as_ref().map(|resync| (resync.source, resync.offer.from, resync.nth))
        else {
            return;
        };
        match self.network.way(n, source) {
            Some(wait) => {
                let to = (to, self.nodes[source].life);
                let asker = Asker { node: n, life, shard, id, nth, to };
                let planned = Planned::Asked { node: source, asker, question: Box::new(question) };
                self.schedule.after(wait, planned);
            }
            None => self.plan_progress(n, shard, ANSWER_TIMEOUT, Progress::Answered(None)),
        }
    }

    /// The source looks up what a replica asks it.
    pub(super) fn on_asked(&mut self, source: usize, asker: Asker, question: &Question) {
        let finding = self.look_up(source, asker, question);
        let slow = self.transfer_delay();
        let wait = match self.network.way(source, asker.node) {
            Some(wait) => wait + if finding.is_some() { slow } else { 0 },
            None => ANSWER_TIMEOUT,
        };
        let reached = wait != ANSWER_TIMEOUT;
        let Asker { node, life, shard, nth, .. } = asker;
        let progress = Box::new(Progress::Answered(finding.filter(|_| reached)));
        self.schedule.after(wait, Planned::Resync { node, life, shard, nth, progress });
    }

    fn look_up(&mut self, source: usize, asker: Asker, question: &Question) -> Option<Finding> {
        let Asker { shard, id, to, .. } = asker;
        if self.nodes[source].life != to.1 || self.nodes[source].replica_id(shard) != Some(to.0) {
            return None;
        }
        let reader = self.reader_of(source, shard)?;
        if !reader.replicas().iter().any(|known| known.id == id) {
            return None;
        }
        match question {
            Question::Snapshot { at_least } => {
                let fits = |snapshot: &ShardSnapshot| {
                    snapshot.applied >= *at_least && snapshot.membership.contains(id)
                };
                let found = reader.snapshot().ok().filter(fits);
                if found.is_none() {
                    self.checkpoint(source);
                }
                let found = found.or_else(|| reader.snapshot().ok().filter(fits));
                found.map(Finding::Snapshot)
            }
            Question::Manifest { since, after } => {
                reader.manifest(*since, *after, self.profile.page_chunks).ok().map(Finding::Page)
            }
            Question::Chunks(chunks) => {
                let mut images = Vec::new();
                for &(volume, chunk) in chunks {
                    match reader.read_chunk(volume, chunk) {
                        Ok(image) => images.extend(image),
                        Err(error) => {
                            // It is repaired, and will be found whole next time.
                            self.note_damage(source, &error);
                            self.repair_chunk(source, shard, volume, chunk);
                            return None;
                        }
                    }
                }
                Some(Finding::Images(images))
            }
            Question::Digests { after } => {
                reader.digests(*after, PAGE_RANGES).ok().map(Finding::Digests)
            }
            Question::ChunkDigests(ranges) => {
                let read = |&(volume, first): &ChunkKey| {
                    let digests = reader.chunk_digests(volume, digest_range_from(first));
                    digests.map(|digests| ((volume, first), digests))
                };
                let found: Result<Vec<_>, _> = ranges.iter().map(read).collect();
                found.ok().map(Finding::ChunkDigests)
            }
        }
    }

    fn reader_of(&self, n: usize, shard: ShardId) -> Option<ShardReader> {
        let running = self.nodes[n].running.as_ref()?;
        running.groups.get(&shard).map(|group| group.reader.clone())
    }

    pub(super) fn on_resync(
        &mut self,
        n: usize,
        life: u32,
        (shard, nth): (ShardId, u64),
        progress: Progress,
    ) {
        if self.nodes[n].life != life {
            return;
        }
        let Some(resync) = self.hosted(n, shard).and_then(|group| group.resync.as_ref()) else {
            return;
        };
        if resync.nth != nth {
            return;
        }
        let want = resync.want.clone();
        let got = match progress {
            Progress::Job => self.carry_out_job(n, shard, want),
            Progress::Answered(Some(finding)) => self.take_finding(n, shard, want, finding),
            Progress::Answered(None) => Ok(Some(Got::Failed)),
        };
        match got {
            Ok(Some(got)) => self.end_step(n, shard, got),
            Ok(None) => {}
            Err(StepError::Read) => self.end_step(n, shard, Got::Failed),
            Err(StepError::Store(error)) => {
                if matches!(error, ReceiveError::Stale { .. }) {
                    self.count("transfers refused as overtaken");
                } else {
                    self.on_receive_error(n, &error);
                }
                self.end_step(n, shard, Got::Failed);
            }
        }
    }

    /// What a node does alone. `None`: the group goes on.
    fn carry_out_job(
        &mut self,
        n: usize,
        shard: ShardId,
        want: Want,
    ) -> Result<Option<Got>, StepError> {
        match want {
            Want::Checkpoint => {
                self.checkpoint(n);
                let Some(reader) = self.reader_of(n, shard) else { return Ok(None) };
                Ok(Some(Got::Checkpoint { applied: reader.snapshot()?.applied }))
            }
            Want::Remove(absent) => {
                let resync::Absent { upto, after, next, present } = absent;
                let Some(running) = &mut self.nodes[n].running else { return Ok(None) };
                running.checkpointer.remove_absent(shard, upto, after, next, &present)?;
                Ok(Some(Got::Removed))
            }
            Want::Ready(snapshot) => {
                self.end_step(n, shard, Got::Told);
                self.step(n, shard, Event::ResyncReady(*snapshot));
                Ok(None)
            }
            Want::Pause(_) => Ok(Some(Got::Paused)),
            _ => unreachable!("it is asked of the source"),
        }
    }

    /// Takes what the source says. `None`: there is more to ask.
    fn take_finding(
        &mut self,
        n: usize,
        shard: ShardId,
        want: Want,
        finding: Finding,
    ) -> Result<Option<Got>, StepError> {
        let Some(reader) = self.reader_of(n, shard) else { return Ok(None) };
        match (want, finding) {
            (Want::Snapshot { .. }, Finding::Snapshot(snapshot)) => {
                Ok(Some(Got::Snapshot { snapshot: Box::new(snapshot) }))
            }
            (Want::Page { .. }, Finding::Page(page)) => {
                let ManifestPage { chunks, present, next, .. } = page;
                Ok(Some(Got::Page { chunks, present, next }))
            }
            (Want::Fetch { upto, .. } | Want::Refetch { upto, .. }, Finding::Images(images)) => {
                let Some(running) = &mut self.nodes[n].running else { return Ok(None) };
                running.checkpointer.write_chunks(shard, upto, images)?;
                Ok(Some(Got::Stored))
            }
            (Want::Compare { after, .. }, Finding::Digests(theirs)) => {
                let mine = reader.digests(after, PAGE_RANGES)?;
                let (ranges, next) = unequal_ranges(&theirs, &mine);
                if ranges.is_empty() {
                    return Ok(self.end_comparison(n, shard, (Vec::new(), false), next));
                }
                if let Some(resync) = self.hosted(n, shard).and_then(|g| g.resync.as_mut()) {
                    resync.next = next;
                }
                self.ask_source(n, shard, Question::ChunkDigests(ranges));
                Ok(None)
            }
            (Want::Compare { upto, .. }, Finding::ChunkDigests(theirs)) => {
                let (mut differing, mut stale) = (Vec::new(), false);
                for ((volume, first), theirs) in theirs {
                    let mine = reader.chunk_digests(volume, digest_range_from(first))?;
                    let found = unfinished(volume, &theirs, &mine, upto);
                    differing.extend(found.differing);
                    stale |= found.stale;
                }
                let resync = self.hosted(n, shard).and_then(|group| group.resync.as_ref());
                let next = resync.and_then(|resync| resync.next);
                Ok(self.end_comparison(n, shard, (differing, stale), next))
            }
            (want, finding) => unreachable!("{finding:?} does not answer {want:?}"),
        }
    }

    fn end_comparison(
        &mut self,
        n: usize,
        shard: ShardId,
        (differing, mut stale): (Vec<ChunkKey>, bool),
        next: Option<ChunkKey>,
    ) -> Option<Got> {
        let reader = self.reader_of(n, shard)?;
        let at_home = reader.snapshot().ok().map(|snapshot| snapshot.applied);
        if next.is_none() && at_home != Some(reader.applied()) {
            // Something was applied here meanwhile, and is yet to come over what was fetched.
            self.checkpoint(n);
            stale = true;
        }
        Some(Got::Compared { differing, stale, next })
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

    /// The checkpoint thread is to switch to a snapshot. The group goes on hearing its peers until
    /// that is done.
    pub(super) fn plan_install(&mut self, n: usize, shard: ShardId, plan: InstallPlan) {
        let life = self.nodes[n].life;
        if let Some(group) = self.hosted(n, shard) {
            group.resync = None;
        }
        let wait = self.transfer_delay();
        let plan = Box::new(plan);
        self.schedule.after(wait, Planned::Install { node: n, life, shard, plan });
    }

    pub(super) fn on_install(&mut self, n: usize, life: u32, shard: ShardId, plan: &InstallPlan) {
        if self.nodes[n].life != life {
            return;
        }
        let index = plan.snapshot.applied;
        if let Some(group) = self.hosted(n, shard) {
            group.mirror.installed(index);
        }
        let Some(running) = &mut self.nodes[n].running else { return };
        match running.checkpointer.install(shard, &plan.snapshot, plan.hard_state) {
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
        // As the leader's answer to a replica that joins has them.
        let leader = self.leader_of(shard).and_then(|leader| self.reader_of(leader, shard));
        let replicas = leader.map_or_else(|| vec![info.clone()], |reader| reader.replicas());
        let formation = Formation {
            replica: info.id,
            membership: Membership::of_voters(members),
            replicas,
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
