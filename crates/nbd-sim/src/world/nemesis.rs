//! What goes wrong.

use nbd_consensus::Timestamp;
use nbd_log::io::{Disk, MemoryDisk, OpenMode};
use nbd_shard::Event;
use nbd_topology::ShardId;
use rand::Rng;
use rand::rngs::StdRng;

use super::ending::Phase;
use super::node::DISK_BYTES;
use super::{Planned, Told, World};
use crate::network::{Host, Side};
use crate::profile::FaultKind;
use crate::random::Draw;
use crate::time::{MILLISECOND, Nanos, SECOND};

/// How often somebody looks whether a round has come to its end.
const LOOK_INTERVAL: Nanos = MILLISECOND / 5;

/// How often at most: for longer than a leader that is heard waits from one round to the next.
const LOOKS_MAX: u32 = 1_000;

/// Draws faults.
#[derive(Debug)]
pub(super) struct Nemesis {
    pub(super) rng: StdRng,
    /// The one node whose data changes by itself: were there two, they might have the same block
    /// damaged, and no good copy be left.
    flipped: Option<usize>,
}

/// The end of a fault.
#[derive(Debug)]
pub(super) enum Relief {
    /// These hosts reach those again.
    Unblock(Vec<(Host, Host)>),
    /// One node, which has everything, hears a leader no more.
    Deafen {
        leader: usize,
        deaf: usize,
    },
    /// That node is about to stand for election: the leader is cut off altogether, and the others
    /// forget when they heard from it.
    Forget {
        leader: usize,
        deaf: usize,
    },
    /// Connections between these hosts are not refused any more.
    Accept(Vec<(Host, Host)>),
    /// A leader is cut off as soon as its lease lasts longer than this.
    AwaitRound {
        leader: usize,
        lease: Timestamp,
        looks: u32,
    },
    /// Leadership moves on to another node than this one, which has just come back, and then to it.
    PassOn {
        back: usize,
    },
    PassTo {
        node: usize,
    },
    /// The node's disk has room again.
    Room(usize),
}

impl Nemesis {
    pub(super) const fn new(rng: StdRng) -> Self {
        Self { rng, flipped: None }
    }
}

impl World {
    pub(super) fn plan_faults(&mut self) {
        let faults: Vec<_> = self.profile.faults.clone().into_iter().collect();
        for (kind, mean) in faults {
            let wait = self.nemesis.rng.span(50 * MILLISECOND, 2 * mean);
            self.schedule.after(wait, Planned::Strike(kind));
        }
    }

    pub(super) fn on_strike(&mut self, kind: FaultKind) {
        if self.phase != Phase::Busy {
            return;
        }
        let Some(mean) = self.profile.faults.get(&kind).copied() else { return };
        let wait = self.nemesis.rng.span(mean / 4, 7 * mean / 4);
        self.schedule.after(wait, Planned::Strike(kind));
        if self.volumes.iter().take(self.profile.volumes).any(|volume| volume.id.is_none()) {
            // Nobody would notice yet.
            return;
        }
        match kind {
            FaultKind::Partition => self.partition(),
            FaultKind::CutLeader => self.cut_leader(),
            FaultKind::CornerLeader => self.corner_leader(),
            FaultKind::CutAfterRound => self.cut_after_round(),
            FaultKind::PauseLeader => self.pause_leader(),
            FaultKind::Crash => self.crash_one(),
            FaultKind::CrashInCheckpoint => self.crash_in_checkpoint(),
            FaultKind::Blackout => self.blackout(),
            FaultKind::Pause => self.pause_one(),
            FaultKind::Reset => self.reset_two(),
            FaultKind::Disconnect => self.disconnect_one(),
            FaultKind::FrontCrash => self.crash_front(),
            FaultKind::Transfer => self.transfer(),
            FaultKind::Strand => self.strand(),
            FaultKind::FailedSync => self.fail_sync(),
            FaultKind::FullDisk => self.fill_disk(),
            FaultKind::BitFlip => self.flip_bit(),
            FaultKind::Wipe => self.wipe_one(),
            FaultKind::Resize => self.resize_one(),
            FaultKind::Recreate => self.recreate_one(),
        }
    }

    pub(super) fn struck(&mut self, kind: FaultKind, host: Host) {
        self.count("faults");
        self.tell(&Told::Strike { kind, host });
    }

    /// A running node; a leader more often than not.
    fn draw_node(&mut self) -> Option<usize> {
        let running: Vec<usize> =
            (0..self.nodes.len()).filter(|n| self.nodes[*n].running.is_some()).collect();
        let leader = self.leader_of(ShardId(0));
        if self.nemesis.rng.chance(500_000) && leader.is_some() {
            return leader;
        }
        (!running.is_empty()).then(|| running[self.nemesis.rng.random_range(0..running.len())])
    }

    fn partition(&mut self) {
        let hosts = self.paused.len();
        let mut apart: Vec<Host> =
            (0..hosts).filter(|_| self.nemesis.rng.random_bool(0.4)).collect();
        if self.nemesis.rng.chance(400_000) {
            apart = self.draw_node().into_iter().collect();
        }
        let (out, back) = [(true, true), (true, true), (true, false), (false, true)]
            [self.nemesis.rng.random_range(0..4)];
        let mut pairs = Vec::new();
        for &from in &apart {
            for to in (0..hosts).filter(|to| !apart.contains(to)) {
                pairs.extend(out.then_some((from, to)));
                pairs.extend(back.then_some((to, from)));
            }
        }
        for &(from, to) in &pairs {
            self.network.block(from, to, true);
        }
        // A firewall that rejects looks like a death to both ends.
        if self.nemesis.rng.chance(300_000) {
            for &(from, to) in &pairs {
                self.hint(from, to);
            }
        }
        self.struck(FaultKind::Partition, apart.first().copied().unwrap_or(hosts));
        let wait = self.nemesis.rng.span(30 * MILLISECOND, 2 * SECOND);
        self.schedule.after(wait, Planned::Relief(Relief::Unblock(pairs)));
    }

    /// Blocks both ways between a node and all hosts but itself, for a while.
    fn isolate(&mut self, n: usize, wait: Nanos) -> Vec<(Host, Host)> {
        let others = (0..self.paused.len()).filter(|host| *host != n);
        let pairs: Vec<_> = others.flat_map(|host| [(n, host), (host, n)]).collect();
        for &(from, to) in &pairs {
            self.network.block(from, to, true);
        }
        self.schedule.after(wait, Planned::Relief(Relief::Unblock(pairs.clone())));
        pairs
    }

    fn cut_leader(&mut self) {
        let Some(leader) = self.leader_of(ShardId(0)) else { return };
        self.struck(FaultKind::CutLeader, leader);
        let wait = self.nemesis.rng.span(200 * MILLISECOND, SECOND);
        self.isolate(leader, wait);
        if self.nemesis.rng.chance(600_000) {
            self.refuse_connections(leader);
        }
    }

    /// Everybody else sees a node's connections break, as if a firewall rejected them.
    fn refuse_connections(&mut self, host: Host) {
        for n in 0..self.nodes.len() {
            self.hint(n, host);
        }
        for (connection, side) in self.network.ends_at(host) {
            if self.network.host(connection, side.other()) != Some(host) {
                self.on_broken(connection, side.other());
            }
        }
    }

    fn corner_leader(&mut self) {
        let Some(leader) = self.leader_of(ShardId(0)).filter(|_| !self.workload.quiet) else {
            return;
        };
        self.struck(FaultKind::CornerLeader, leader);
        let others = (0..self.nodes.len()).filter(|n| *n != leader);
        let soonest = others.min_by_key(|n| self.election_wait(*n));
        let deaf = soonest.unwrap_or_default();
        self.workload.quiet = true;
        let next = Relief::Deafen { leader, deaf };
        self.schedule.after(120 * MILLISECOND, Planned::Relief(next));
    }

    /// Lets one node hear nothing of the leader any more, and takes the others' memory just before
    /// it stands for election.
    fn deafen(&mut self, leader: usize, deaf: usize) {
        self.network.block(leader, deaf, true);
        let early = self.nemesis.rng.span(5 * MILLISECOND, 90 * MILLISECOND);
        let wait = self.election_wait(deaf).saturating_sub(early);
        self.schedule.after(wait, Planned::Relief(Relief::Forget { leader, deaf }));
    }

    /// The last part of cornering a leader.
    fn make_forget(&mut self, leader: usize, deaf: usize) {
        self.network.block(leader, deaf, false);
        self.workload.quiet = false;
        if self.phase != Phase::Busy || self.leader_of(ShardId(0)) != Some(leader) {
            return;
        }
        let wait = self.nemesis.rng.span(150 * MILLISECOND, 500 * MILLISECOND);
        self.isolate(leader, wait);
        self.refuse_connections(leader);
        for n in (0..self.nodes.len()).filter(|n| *n != leader && *n != deaf) {
            if self.nodes[n].running.is_some() {
                self.stop_node(n, false);
                self.lose_power(n);
                let wait = self.nemesis.rng.span(100_000, 3 * MILLISECOND);
                self.schedule.after(wait, Planned::Restart { node: n });
            }
        }
    }

    fn cut_after_round(&mut self) {
        let Some(leader) = self.leader_of(ShardId(0)) else { return };
        if let Some(lease) = self.lease_of(leader) {
            self.await_round(leader, lease, LOOKS_MAX);
        }
    }

    fn lease_of(&self, n: usize) -> Option<Timestamp> {
        let running = self.nodes[n].running.as_ref()?;
        running.groups.get(&ShardId(0))?.replica.read_lease()
    }

    /// Cuts a leader off once its lease has become longer than `lease`.
    fn await_round(&mut self, leader: usize, lease: Timestamp, looks: u32) {
        if self.phase != Phase::Busy || looks == 0 {
            return;
        }
        if self.lease_of(leader).is_none_or(|until| until <= lease) {
            let next = Relief::AwaitRound { leader, lease, looks: looks - 1 };
            self.schedule.after(LOOK_INTERVAL, Planned::Relief(next));
            return;
        }
        self.struck(FaultKind::CutAfterRound, leader);
        let wait = self.nemesis.rng.span(300 * MILLISECOND, 600 * MILLISECOND);
        let pairs = self.isolate(leader, wait);
        for &(from, to) in &pairs {
            self.network.refuse(from, to, true);
        }
        self.schedule.after(wait, Planned::Relief(Relief::Accept(pairs)));
        self.refuse_connections(leader);
    }

    fn pause_leader(&mut self) {
        let Some(leader) = self.leader_of(ShardId(0)) else { return };
        self.struck(FaultKind::PauseLeader, leader);
        self.refuse_connections(leader);
        let wait = self.nemesis.rng.span(300 * MILLISECOND, 900 * MILLISECOND);
        self.paused[leader] = self.paused[leader].max(self.schedule.now().plus(wait));
    }

    /// Tells a node that its connection to a peer broke.
    fn hint(&mut self, node: Host, peer: Host) {
        if node < self.nodes.len() && peer < self.nodes.len() && node != peer {
            let life = self.nodes[node].life;
            let wait = self.nemesis.rng.span(10_000, 5 * MILLISECOND);
            self.schedule.after(wait, Planned::ConnectionLost { node, life, peer });
        }
    }

    pub(super) fn on_relief(&mut self, relief: Relief) {
        match relief {
            Relief::Unblock(pairs) => {
                for (from, to) in pairs {
                    self.network.block(from, to, false);
                }
            }
            Relief::PassOn { back } => self.pass_on(back),
            Relief::PassTo { node } => self.pass_to(|n| n == node),
            Relief::Accept(pairs) => {
                for (from, to) in pairs {
                    self.network.refuse(from, to, false);
                }
            }
            Relief::AwaitRound { leader, lease, looks } => self.await_round(leader, lease, looks),
            Relief::Deafen { leader, deaf } => self.deafen(leader, deaf),
            Relief::Forget { leader, deaf } => self.make_forget(leader, deaf),
            Relief::Room(n) => {
                self.nodes[n].cramped = false;
                self.nodes[n].disk.set_capacity(DISK_BYTES);
            }
        }
    }

    fn crash(&mut self, n: usize) {
        self.struck(FaultKind::Crash, n);
        self.tear_log_write(n);
        let noticed = self.nemesis.rng.random_bool(0.5);
        self.stop_node(n, noticed);
        self.lose_power(n);
        let longest = if self.nemesis.rng.random_bool(0.5) { 60 * MILLISECOND } else { 2 * SECOND };
        let wait = self.nemesis.rng.span(5 * MILLISECOND, longest);
        self.schedule.after(wait, Planned::Restart { node: n });
    }

    fn crash_one(&mut self) {
        if let Some(n) = self.draw_node() {
            self.crash(n);
        }
    }

    fn blackout(&mut self) {
        for n in 0..self.nodes.len() {
            if self.nodes[n].running.is_some() {
                self.crash(n);
            }
        }
    }

    fn crash_in_checkpoint(&mut self) {
        let Some(n) = self.draw_node() else { return };
        self.struck(FaultKind::CrashInCheckpoint, n);
        let disk = &self.nodes[n].disk;
        disk.crash_at(disk.sync_points() + self.nemesis.rng.random_range(1..=14));
        self.checkpoint(n);
    }

    fn pause_one(&mut self) {
        let balancer = self.nemesis.rng.random_range(0..self.paused.len());
        let node = self.draw_node();
        let host = node.filter(|_| self.nemesis.rng.chance(850_000)).unwrap_or(balancer);
        self.struck(FaultKind::Pause, host);
        let longest =
            if self.nemesis.rng.random_bool(0.5) { 400 * MILLISECOND } else { 2 * SECOND };
        let wait = self.nemesis.rng.span(MILLISECOND, longest);
        if self.nemesis.rng.chance(300_000) {
            self.refuse_connections(host);
        }
        self.paused[host] = self.paused[host].max(self.schedule.now().plus(wait));
    }

    fn reset_two(&mut self) {
        let a = self.draw_node().unwrap_or_default();
        let b = self.nemesis.rng.random_range(0..self.paused.len());
        if a == b {
            return;
        }
        self.struck(FaultKind::Reset, a);
        self.hint(a, b);
        self.hint(b, a);
        for (connection, side) in self.network.ends_at(a) {
            let peer = self.network.host(connection, side.other());
            if peer == Some(b) || self.nemesis.rng.chance(100_000) {
                let first = if self.nemesis.rng.random() { Side::Client } else { Side::Server };
                self.on_broken(connection, first);
            }
        }
    }

    fn disconnect_one(&mut self) {
        let client = self.nemesis.rng.random_range(0..self.clients.len());
        if self.clients[client].link.is_some() {
            self.struck(FaultKind::Disconnect, client);
            self.drop_client(client, true);
            self.plan_reconnect(client);
        }
    }

    fn crash_front(&mut self) {
        let front = self.nemesis.rng.random_range(self.nodes.len()..self.fronts.len());
        if self.fronts[front].up {
            self.struck(FaultKind::FrontCrash, front);
            for (connection, side) in self.network.ends_at(front) {
                self.post(connection, side.other(), crate::network::Parcel::Closed);
            }
            self.kill_front(front);
            let wait = self.nemesis.rng.span(5 * MILLISECOND, SECOND);
            self.schedule.after(wait, Planned::FrontUp { front });
        }
    }

    fn transfer(&mut self) {
        let shard = ShardId(self.nemesis.rng.random_range(0..self.profile.shards));
        let Some(leader) = self.leader_of(shard) else { return };
        let Some(running) = &self.nodes[leader].running else { return };
        let Some(group) = running.groups.get(&shard) else { return };
        let others: Vec<_> = group.replica.status().membership.voters().iter().copied().collect();
        let others: Vec<_> = others.into_iter().filter(|id| *id != group.id).collect();
        if others.is_empty() {
            return;
        }
        let to = others[self.nemesis.rng.random_range(0..others.len())];
        self.struck(FaultKind::Transfer, leader);
        self.step(leader, shard, Event::TransferLeader(to));
    }

    /// Cuts a follower off, until the log may not reach it any more.
    fn strand(&mut self) {
        let Some(leader) = self.leader_of(ShardId(0)) else { return };
        let others: Vec<usize> = (0..self.nodes.len()).filter(|n| *n != leader).collect();
        let back = others[self.nemesis.rng.random_range(0..others.len())];
        self.struck(FaultKind::Strand, back);
        let wait = self.nemesis.rng.span(100 * MILLISECOND, 500 * MILLISECOND);
        self.isolate(back, wait);
        // In the middle of a transfer, if there is one: it takes some steps.
        let step = self.profile.transfer_delay_max;
        let more = self.nemesis.rng.span(step / 2, 4 * step);
        self.schedule.after(wait + more, Planned::Relief(Relief::PassOn { back }));
    }

    fn pass_on(&mut self, back: usize) {
        self.pass_to(|n| n != back);
        let wait = self.nemesis.rng.span(50 * MILLISECOND, 300 * MILLISECOND);
        self.schedule.after(wait, Planned::Relief(Relief::PassTo { node: back }));
    }

    /// Hands leadership over to a voter on one of these nodes.
    fn pass_to(&mut self, fits: impl Fn(usize) -> bool) {
        let shard = ShardId(0);
        let Some(leader) = self.leader_of(shard).filter(|_| self.phase == Phase::Busy) else {
            return;
        };
        let Some(running) = &self.nodes[leader].running else { return };
        let Some(group) = running.groups.get(&shard) else { return };
        let membership = group.replica.status().membership;
        let next = membership.voters().iter().copied().find(|id| {
            let place = self.places.get(&(shard, *id));
            place.is_some_and(|at| *at != leader && fits(*at))
        });
        if let Some(next) = next {
            self.step(leader, shard, Event::TransferLeader(next));
        }
    }

    fn fail_sync(&mut self) {
        let Some(n) = self.draw_node() else { return };
        self.struck(FaultKind::FailedSync, n);
        let disk = &self.nodes[n].disk;
        disk.fail_sync_at(disk.sync_points() + self.nemesis.rng.random_range(1..=5));
        if self.nemesis.rng.random() {
            self.checkpoint(n);
        }
    }

    fn fill_disk(&mut self) {
        let Some(n) = self.draw_node() else { return };
        if self.nodes[n].cramped {
            return;
        }
        self.struck(FaultKind::FullDisk, n);
        let node = &mut self.nodes[n];
        let available = node.disk.space_available().unwrap_or(DISK_BYTES);
        let left = self.nemesis.rng.random_range(0..6 << 20);
        node.disk.set_capacity(DISK_BYTES - available + left);
        node.cramped = true;
        let wait = self.nemesis.rng.span(50 * MILLISECOND, 3 * SECOND);
        self.schedule.after(wait, Planned::Relief(Relief::Room(n)));
    }

    fn flip_bit(&mut self) {
        let drawn = self.nemesis.rng.random_range(0..self.nodes.len());
        let n = *self.nemesis.flipped.get_or_insert(drawn);
        let disk = &self.nodes[n].disk;
        let file = disk.open("data", OpenMode::Existing);
        let len = file.and_then(|file| file.len()).unwrap_or_default();
        let likely = 4 * self.profile.volumes as u64 * self.profile.sectors * 512;
        if len > 0 {
            disk.flip_bit("data", self.nemesis.rng.random_range(0..likely.min(len)));
            self.struck(FaultKind::BitFlip, n);
        }
    }

    /// A node's disk is lost, if no other node is down or still being replaced.
    fn wipe_one(&mut self) {
        let whole = (0..self.nodes.len()).all(|n| self.is_whole(n));
        let Some(n) = self.draw_node().filter(|_| whole) else { return };
        self.struck(FaultKind::Wipe, n);
        self.stop_node(n, true);
        let disk = MemoryDisk::new(self.nemesis.rng.random());
        disk.set_capacity(DISK_BYTES);
        self.nodes[n].disk = disk;
        self.forget_log(n);
        let wait = self.nemesis.rng.span(5 * MILLISECOND, SECOND);
        self.schedule.after(wait, Planned::Restart { node: n });
    }
}
