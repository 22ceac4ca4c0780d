//! What a world is like: how large, and which faults strike how often.

use std::collections::BTreeMap;

use nbd_consensus::ReadMode;
use rand::Rng;
use rand::rngs::StdRng;

use crate::random::{Draw, Purpose, Streams};
use crate::time::{MILLISECOND, Nanos, SECOND};

/// Sectors of a piece of a read in the product: 1 MiB.
const PIECE_SECTORS: u64 = 2_048;

/// Something that goes wrong, or is done to the cluster, now and then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultKind {
    /// Some hosts cannot reach some others; both ways or one way.
    Partition,
    /// A leader is cut off from its followers, but not from the front end on its own node: what
    /// leases must survive. Its followers may take it for dead.
    CutLeader,
    /// The same while one follower has not heard from it for long, and the other has just lost
    /// power and comes back at once.
    CornerLeader,
    /// A leader is cut off from everything but its own node as soon as a majority has confirmed its
    /// lease once more: that then lasts for as long as it may, and nobody hears from the leader
    /// again after the round that it counts from.
    CutAfterRound,
    /// A leader stands still for longer than its lease, and its connections break meanwhile.
    PauseLeader,
    /// A node loses power, and comes back.
    Crash,
    /// A node loses power in the middle of a checkpoint, and comes back.
    CrashInCheckpoint,
    /// Every node loses power at once.
    Blackout,
    /// A host stands still for a while.
    Pause,
    /// Connections between two hosts break, though nobody died.
    Reset,
    /// A client's connection to its front end breaks.
    Disconnect,
    /// A front end dies with its clients' connections, and comes back as another.
    FrontCrash,
    /// Leadership is handed over.
    Transfer,
    /// A follower is cut off for a while; shortly after it is back, leadership is handed over to
    /// another one, and then to itself.
    Strand,
    /// A sync of a node's disk fails.
    FailedSync,
    /// A node's disk has hardly any room for a while.
    FullDisk,
    /// A bit of a node's data changes by itself.
    BitFlip,
    /// A node loses its disk, and joins anew.
    Wipe,
    /// A volume becomes smaller and then as large as before, while clients work on it.
    Resize,
    /// A volume is deleted by force while clients work on it, and another one of its name created.
    Recreate,
}

impl FaultKind {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::Partition,
        Self::CutLeader,
        Self::CornerLeader,
        Self::CutAfterRound,
        Self::PauseLeader,
        Self::Crash,
        Self::CrashInCheckpoint,
        Self::Blackout,
        Self::Pause,
        Self::Reset,
        Self::Disconnect,
        Self::FrontCrash,
        Self::Transfer,
        Self::Strand,
        Self::FailedSync,
        Self::FullDisk,
        Self::BitFlip,
        Self::Wipe,
        Self::Resize,
        Self::Recreate,
    ];

    /// How often it strikes by default, when it does: the mean time between two of a kind.
    const fn mean_interval(self) -> Nanos {
        match self {
            Self::Pause | Self::Reset | Self::Transfer => 700 * MILLISECOND,
            Self::Partition | Self::Crash | Self::Disconnect => SECOND,
            Self::CutLeader | Self::CornerLeader | Self::CutAfterRound | Self::PauseLeader => {
                1_500 * MILLISECOND
            }
            Self::CrashInCheckpoint | Self::Strand | Self::Resize | Self::Recreate => SECOND,
            Self::BitFlip | Self::FrontCrash | Self::FailedSync => 2 * SECOND,
            Self::FullDisk | Self::Blackout | Self::Wipe => 3 * SECOND,
        }
    }
}

/// How the rates of nodes' clocks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drift {
    /// Not at all.
    None,
    /// Each has a rate of its own, within the bound.
    Any,
    /// One is as slow, the others are as fast as the bound allows: the worst for what the one
    /// promises itself for as long as the others wait.
    Apart,
}

/// How messages travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkProfile {
    /// Chance of a message to be lost, in millionths.
    pub loss_ppm: u32,
    /// Chance of a message to come twice, in millionths.
    pub duplicate_ppm: u32,
    /// Shortest way.
    pub delay_min: Nanos,
    /// Longest way, as a rule.
    pub delay_max: Nanos,
    /// Chance of a message to take up to `spike_max` longer, in millionths.
    pub spike_ppm: u32,
    /// Longest extra delay.
    pub spike_max: Nanos,
}

/// How long disks take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskProfile {
    /// Shortest write of the log.
    pub write_min: Nanos,
    /// Longest write of the log, as a rule.
    pub write_max: Nanos,
    /// Chance of a write to take up to `stall_max`, in millionths.
    pub stall_ppm: u32,
    /// Longest stall.
    pub stall_max: Nanos,
    /// Longest read.
    pub read_max: Nanos,
}

/// A world to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Nodes, each with a replica of every shard.
    pub nodes: usize,
    /// Front ends of their own; further ones are part of the nodes.
    pub balancers: usize,
    /// Shards.
    pub shards: u32,
    /// Volumes, dealt out to the shards in turn.
    pub volumes: usize,
    /// Size of a volume, in sectors. A multiple of 8.
    pub sectors: u64,
    /// Sectors that most requests fall on.
    pub hot_sectors: u64,
    /// Clients.
    pub clients: usize,
    /// How many of them only read.
    pub readers: usize,
    /// Chance of a client to choose a node's own front end rather than a balancer, in millionths.
    pub at_nodes_ppm: u32,
    /// Requests of all clients together.
    pub operations: u32,
    /// Requests that a client has under way, at most.
    pub depth: usize,
    /// Longest time that a client thinks between two requests.
    pub think_max: Nanos,
    /// Chance of a request to be a read, in millionths; most others are writes.
    pub reads_ppm: u32,
    /// Chance of a write to be long, in millionths.
    pub long_writes_ppm: u32,
    /// Chance of a mutation to trim a whole chunk, in millionths.
    pub chunk_trims_ppm: u32,
    /// Sectors that leaders answer reads in at a time: pieces end at multiples of it.
    pub piece_sectors: u64,
    /// How leaders know that they still lead.
    pub read_mode: ReadMode,
    /// How clocks differ in rate.
    pub drift: Drift,
    /// Bytes of log entries that nodes keep in memory.
    pub log_cache_bytes: usize,
    /// Bytes of log that nodes keep for followers that lag: dealt out to the nodes in turn.
    pub retention_bytes: Vec<u64>,
    /// Mean time between two checkpoints of a node.
    pub checkpoint_interval: Nanos,
    /// Longest time that either end of a transfer takes for a step of it: to look something up, or
    /// until its checkpoint thread comes to the job.
    pub transfer_delay_max: Nanos,
    /// Chunks in one page of a transfer.
    pub page_chunks: usize,
    /// How messages travel.
    pub network: NetworkProfile,
    /// How long disks take.
    pub disk: DiskProfile,
    /// Which faults strike, and the mean time between two of a kind.
    pub faults: BTreeMap<FaultKind, Nanos>,
}

impl Profile {
    /// The profile that belongs to a seed.
    #[must_use]
    pub fn draw(seed: u64) -> Self {
        let mut rng = Streams::new(seed).of(Purpose::Profile);
        let mut profile = Self::calm(&mut rng);
        // Few kinds at a time reach further than all at once.
        let kinds = rng.random_range(0..=5);
        for _ in 0..kinds {
            let kind = FaultKind::ALL[rng.random_range(0..FaultKind::ALL.len())];
            let mean = kind.mean_interval();
            profile.faults.insert(kind, rng.span(mean / 3, mean * 2));
        }
        if rng.chance(500_000) {
            profile.network.loss_ppm = rng.random_range(0..100_000);
            profile.network.duplicate_ppm = rng.random_range(0..50_000);
        }
        if rng.chance(400_000) {
            profile.network.spike_ppm = rng.random_range(0..100_000);
            profile.network.spike_max = rng.span(MILLISECOND, 400 * MILLISECOND);
        }
        if rng.chance(400_000) {
            profile.disk.stall_ppm = rng.random_range(0..50_000);
        }
        if rng.chance(500_000) {
            profile.cut_reads(&mut rng);
        }
        profile
    }

    /// Small pieces: most reads take several, and attachments are lost between them.
    fn cut_reads(&mut self, rng: &mut StdRng) {
        self.piece_sectors = rng.random_range(1..=8);
    }

    /// A world in which nothing goes wrong.
    #[must_use]
    pub fn calm(rng: &mut StdRng) -> Self {
        let nodes = [3, 3, 3, 3, 4, 5][rng.random_range(0..6)];
        let shards = if rng.chance(150_000) { 2 } else { 1 };
        let sectors = 8 * rng.random_range(2..=64_u64);
        let delay_min = rng.span(20_000, MILLISECOND);
        Self {
            nodes,
            balancers: rng.random_range(1..=2),
            shards,
            volumes: rng.random_range(1..=2).max(shards as usize),
            sectors,
            hot_sectors: rng.random_range(4..=48).min(sectors),
            clients: rng.random_range(2..=4),
            readers: 0,
            at_nodes_ppm: 300_000,
            operations: rng.random_range(80..=300),
            depth: rng.random_range(1..=4),
            think_max: rng.span(MILLISECOND, 60 * MILLISECOND),
            reads_ppm: rng.random_range(200_000..=700_000),
            long_writes_ppm: if rng.chance(200_000) { 400_000 } else { 30_000 },
            chunk_trims_ppm: 0,
            piece_sectors: PIECE_SECTORS,
            read_mode: if rng.chance(200_000) { ReadMode::Quorum } else { ReadMode::Lease },
            drift: if rng.chance(700_000) { Drift::Any } else { Drift::None },
            log_cache_bytes: if rng.chance(500_000) { 0 } else { 1 << 20 },
            retention_bytes: vec![[0, 64 << 10, 1 << 20][rng.random_range(0..3)]],
            checkpoint_interval: rng.span(30 * MILLISECOND, 2 * SECOND),
            transfer_delay_max: 3 * MILLISECOND,
            page_chunks: 2,
            network: NetworkProfile {
                loss_ppm: 0,
                duplicate_ppm: 0,
                delay_min,
                delay_max: delay_min + rng.span(0, 3 * MILLISECOND),
                spike_ppm: 0,
                spike_max: 0,
            },
            disk: DiskProfile {
                write_min: rng.span(30_000, 500_000),
                write_max: rng.span(500_000, 4 * MILLISECOND),
                stall_ppm: 0,
                stall_max: 300 * MILLISECOND,
                read_max: rng.span(50_000, 2 * MILLISECOND),
            },
            faults: BTreeMap::new(),
        }
    }
}

impl Profile {
    /// The names of [`Self::named`].
    pub const NAMES: [&'static str; 11] = [
        "calm",
        "elections",
        "cut",
        "corner",
        "leases",
        "pauses",
        "sessions",
        "checkpoints",
        "log",
        "transfers",
        "volumes",
    ];

    /// A profile of a certain kind; what else there is to it comes from the seed. `calm` is without
    /// faults; the others look at one thing closely: elections with nodes that lose power, reads
    /// while leaders are cut off, cornered or standing still, leases at the very end of which there
    /// may be another leader, sessions that are attached anew, checkpoints that power fails in, a
    /// log that goes round, transfers that the log overtakes, volumes that change their size or go,
    /// also while a replica is away.
    #[must_use]
    pub fn named(name: &str, seed: u64) -> Option<Self> {
        let mut rng = Streams::new(seed).of(Purpose::Profile);
        let mut profile = Self::calm(&mut rng);
        let faults: &[(FaultKind, Nanos)] = match name {
            "calm" => &[],
            "elections" => {
                profile.disk.write_max = rng.span(MILLISECOND, 15 * MILLISECOND);
                profile.network.loss_ppm = 50_000;
                &[
                    (FaultKind::Crash, 250 * MILLISECOND),
                    (FaultKind::CornerLeader, 1_500 * MILLISECOND),
                    (FaultKind::Blackout, 1_500 * MILLISECOND),
                    (FaultKind::Transfer, 500 * MILLISECOND),
                ]
            }
            "cut" | "corner" | "pauses" => {
                profile.watch_leases(&mut rng);
                match name {
                    "cut" => &[(FaultKind::CutLeader, 1_200 * MILLISECOND)],
                    "corner" => &[(FaultKind::CornerLeader, 1_800 * MILLISECOND)],
                    _ => &[(FaultKind::PauseLeader, 1_200 * MILLISECOND)],
                }
            }
            "leases" => {
                profile.watch_lease_ends(&mut rng);
                &[(FaultKind::CutAfterRound, 700 * MILLISECOND)]
            }
            "sessions" => {
                (profile.hot_sectors, profile.reads_ppm) = (4, 400_000);
                profile.think_max = 8 * MILLISECOND;
                profile.cut_reads(&mut rng);
                &[
                    (FaultKind::Reset, 120 * MILLISECOND),
                    (FaultKind::Transfer, 500 * MILLISECOND),
                    (FaultKind::Partition, 700 * MILLISECOND),
                    (FaultKind::Disconnect, 600 * MILLISECOND),
                    (FaultKind::FrontCrash, 900 * MILLISECOND),
                ]
            }
            "checkpoints" => {
                profile.sectors = 512;
                profile.hot_sectors = 500;
                profile.reads_ppm = 200_000;
                profile.checkpoint_interval = rng.span(50 * MILLISECOND, 200 * MILLISECOND);
                &[(FaultKind::CrashInCheckpoint, 250 * MILLISECOND)]
            }
            "log" => {
                profile.sectors = 512;
                profile.hot_sectors = 500;
                (profile.clients, profile.depth, profile.operations) = (4, 4, 500);
                (profile.reads_ppm, profile.long_writes_ppm) = (100_000, 700_000);
                profile.think_max = 5 * MILLISECOND;
                profile.checkpoint_interval = rng.span(400 * MILLISECOND, 1_500 * MILLISECOND);
                &[
                    (FaultKind::FailedSync, 300 * MILLISECOND),
                    (FaultKind::CrashInCheckpoint, 500 * MILLISECOND),
                ]
            }
            "transfers" => {
                profile.watch_transfers(&mut rng);
                &[(FaultKind::Strand, 500 * MILLISECOND)]
            }
            "volumes" => {
                profile.watch_transfers(&mut rng);
                profile.volumes = 2;
                (profile.sectors, profile.hot_sectors) = (1_024, 1_000);
                (profile.operations, profile.long_writes_ppm) = (800, 300_000);
                profile.transfer_delay_max = rng.span(MILLISECOND, 50 * MILLISECOND);
                &[
                    (FaultKind::Resize, 250 * MILLISECOND),
                    (FaultKind::Recreate, 600 * MILLISECOND),
                    (FaultKind::Strand, 900 * MILLISECOND),
                    (FaultKind::Crash, 900 * MILLISECOND),
                ]
            }
            _ => return None,
        };
        profile.faults.extend(faults.iter().copied());
        Some(profile)
    }

    /// Many short requests for the same few sectors, at nodes that may still take themselves for
    /// leaders.
    fn watch_leases(&mut self, rng: &mut StdRng) {
        self.nodes = 3;
        (self.clients, self.volumes, self.shards) = (4, 1, 1);
        (self.hot_sectors, self.reads_ppm, self.operations) = (3, 600_000, 4_000);
        (self.depth, self.think_max, self.long_writes_ppm) = (2, 10 * MILLISECOND, 0);
        (self.read_mode, self.drift) = (ReadMode::Lease, Drift::Any);
        self.at_nodes_ppm = 900_000;
        self.network.spike_ppm = if rng.random() { 100_000 } else { 0 };
        self.network.spike_max = 250 * MILLISECOND;
    }

    /// The same with clocks as far apart, and with messages and disks as quick as can be: only a
    /// few milliseconds lie between the end of a lease and what the next leader does.
    fn watch_lease_ends(&mut self, rng: &mut StdRng) {
        self.watch_leases(rng);
        self.drift = Drift::Apart;
        (self.clients, self.readers, self.operations) = (8, 4, 12_000);
        (self.hot_sectors, self.reads_ppm) = (2, 500_000);
        (self.depth, self.think_max) = (2, 6 * MILLISECOND);
        let delay_min = rng.span(10_000, 100_000);
        self.network.delay_min = delay_min;
        self.network.delay_max = delay_min + rng.span(0, 300_000);
        self.network.spike_ppm = 0;
        self.disk.write_min = rng.span(20_000, 100_000);
        self.disk.write_max = rng.span(100_000, 400_000);
        self.disk.read_max = rng.span(20_000, 500_000);
    }

    /// Chunks that come and go, sources that take their time, and logs that reach back far on some
    /// nodes and not at all on others.
    fn watch_transfers(&mut self, rng: &mut StdRng) {
        (self.nodes, self.shards, self.volumes) = (3, 1, 1);
        (self.sectors, self.hot_sectors) = (4_096, 4_000);
        (self.clients, self.depth, self.operations) = (4, 4, 1_500);
        (self.reads_ppm, self.think_max) = (200_000, 25 * MILLISECOND);
        self.chunk_trims_ppm = 120_000;
        let long = 4 << 20;
        self.retention_bytes = if rng.random() { vec![0, long] } else { vec![long, 0] };
        self.checkpoint_interval = rng.span(10 * MILLISECOND, 40 * MILLISECOND);
        self.page_chunks = if rng.random() { 8 } else { 64 };
        self.transfer_delay_max = rng.span(20 * MILLISECOND, 150 * MILLISECOND);
    }
}
