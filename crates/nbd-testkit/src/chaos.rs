//! Three replicas under load, and faults by a schedule that a seed gives.
//!
//! One fault after another hits a node or the network, often the leader; some come two at a time,
//! and some take everything down for a moment. Between them a majority can always work. When the
//! time is over everything is healed, all data is read through each replica and held against the
//! load's account, and all replicas' stores must be equal.
//!
//! The seed fixes the kinds, lengths and order of the faults and the load's choices; real processes
//! do not take the same steps twice, though.

mod report;

use std::fmt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::cluster::Cluster;
use crate::load::{Load, LoadOptions};
use crate::network::Fault;

pub use self::report::Report;

/// Replicas.
const NODES: usize = 3;

/// What makes checkpoints, log recycling and resyncs happen in a run of a minute. A node that is to
/// stop without a majority waits for requests under way in vain: not for long here.
const FLAGS: [&str; 5] = [
    "--shutdown-deadline=2s",
    "--log-segment-bytes=4MiB",
    "--log-bytes-max=32MiB",
    "--checkpoint-log-bytes=4MiB",
    "--log-cache-bytes=4MiB",
];

/// Answers that each thread must get after a fault before the next may come.
const ANSWERS_BETWEEN: u64 = 3;

/// Answers that each thread must get when all faults are over.
const ANSWERS_AT_END: u64 = 50;

/// What a run is to be.
#[derive(Debug, Clone)]
pub struct ChaosOptions {
    /// Where the schedule comes from.
    pub seed: u64,
    /// How long faults go on.
    pub duration: Duration,
    /// The load.
    pub load: LoadOptions,
    /// The `nbd-replica` to run. Default: the one of this workspace, built if need be.
    pub program: Option<PathBuf>,
    /// Where the nodes keep their data. Default: the system's directory for temporary files.
    pub directory: Option<PathBuf>,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// SIGKILL, and a start.
    Kill,
    /// SIGTERM, and a start.
    Terminate,
    /// SIGSTOP and SIGCONT.
    Pause,
    /// SIGKILL, an empty data directory, and a start.
    Wipe,
    /// The node's connections to all others break, and new ones are refused.
    Cut,
    /// Nothing passes between the node and all others.
    Hold,
    /// Nothing that the node sends reaches the others.
    HoldOut,
    /// Nothing that the others send reaches the node.
    HoldIn,
    /// Connections between the node and one other break, and new ones are refused.
    CutPair,
    /// Nothing passes between the node and one other.
    HoldPair,
    /// What the node sends and receives takes longer.
    Delay,
    /// SIGKILL to all nodes, and a start of all.
    Outage,
}

/// How often each kind comes, of [`weight_sum`], and how long it lasts, in milliseconds.
const KINDS: [(Kind, u32, u64, u64); 12] = [
    (Kind::Kill, 25, 0, 2500),
    (Kind::Terminate, 10, 0, 1500),
    (Kind::Pause, 15, 100, 3500),
    (Kind::Wipe, 6, 0, 1000),
    (Kind::Cut, 8, 200, 3500),
    (Kind::Hold, 10, 200, 3500),
    (Kind::HoldOut, 6, 200, 3500),
    (Kind::HoldIn, 6, 200, 3500),
    (Kind::CutPair, 4, 200, 3500),
    (Kind::HoldPair, 4, 200, 3500),
    (Kind::Delay, 3, 500, 2500),
    (Kind::Outage, 3, 0, 1000),
];

fn weight_sum() -> u32 {
    KINDS.iter().map(|(_, weight, _, _)| weight).sum()
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill -9",
            Self::Terminate => "SIGTERM",
            Self::Pause => "SIGSTOP",
            Self::Wipe => "kill -9, wipe",
            Self::Cut => "cut off",
            Self::Hold => "silent",
            Self::HoldOut => "not heard",
            Self::HoldIn => "deaf",
            Self::CutPair => "pair cut",
            Self::HoldPair => "pair silent",
            Self::Delay => "slow",
            Self::Outage => "full outage",
        })
    }
}

/// A fault that was.
#[derive(Debug, Clone)]
struct Event {
    kind: Kind,
    leader: bool,
    /// Whether another node failed within it.
    second: bool,
    /// Names of the nodes whose clients it may stop.
    victims: Vec<String>,
    begin: Instant,
    /// When the last thread of the load had answers again, counted from the end of the fault.
    recovery: Duration,
}

/// Runs the schedule to its end.
///
/// # Errors
/// What was wrong.
///
/// # Panics
/// If a node does not start, or the replicas do not serve or become equal in time.
pub fn run(options: &ChaosOptions) -> Result<Report, String> {
    let mut chaos = Chaos::start(options);
    while chaos.started.elapsed() < options.duration {
        chaos.fault()?;
    }
    chaos.finish()
}

struct Chaos {
    cluster: Cluster,
    load: Load,
    random: StdRng,
    started: Instant,
    events: Vec<Event>,
}

impl Chaos {
    fn start(options: &ChaosOptions) -> Self {
        let size = format!("{}B", options.load.volume_bytes());
        let mut builder = Cluster::builder().replicas(NODES).proxied().default_size(&size);
        for flag in FLAGS {
            builder = builder.argument(flag);
        }
        if let Some(program) = &options.program {
            builder = builder.program(program);
        }
        if let Some(directory) = &options.directory {
            builder = builder.under(directory);
        }
        let mut cluster = builder.start();
        cluster.wait_until_serving();
        let load = LoadOptions { seed: options.seed, ..options.load.clone() };
        let load = Load::start(&cluster.targets(), load);
        let random = StdRng::seed_from_u64(options.seed);
        Self { cluster, load, random, started: Instant::now(), events: Vec::new() }
    }

    /// One fault, from its choice to its end and the recovery from it.
    fn fault(&mut self) -> Result<(), String> {
        let (kind, length) = self.choose();
        // Drawn whether needed or not, so that the schedule depends on the seed alone.
        let (at_leader, any) = (self.random.random_bool(0.5), self.random.random_range(0..NODES));
        let (second, second_at) =
            (self.random.random_bool(0.2), self.random.random_range(1..NODES));
        let rest = Duration::from_millis(self.random.random_range(100..900));

        if kind == Kind::Wipe {
            // A copy that is not complete must not be the only one left.
            self.wait_until_voters()?;
        }
        let leader = self.cluster.leader();
        let victim = leader.filter(|_| at_leader).unwrap_or(any);
        let other = (victim + second_at) % NODES;
        let begin = Instant::now();
        self.tell(kind, victim, leader == Some(victim), length);
        self.begin(kind, victim, other)?;
        let mut victims = self.victims(kind, victim, other);
        let second = second && kind != Kind::Wipe && kind != Kind::Outage;
        if second {
            self.second(other, length)?;
            victims.push(self.cluster.at(other).name().to_owned());
        } else {
            self.wait(length)?;
        }
        self.end(kind, victim)?;
        let healed = Instant::now();
        if kind == Kind::Wipe {
            self.wait_until_voters()?;
        }
        self.load.wait_for_answers(ANSWERS_BETWEEN).map_err(|why| self.explain(&why))?;
        let leader = leader == Some(victim);
        let recovery = healed.elapsed();
        self.events.push(Event { kind, leader, second, victims, begin, recovery });
        self.wait(rest)
    }

    fn choose(&mut self) -> (Kind, Duration) {
        let mut pick = self.random.random_range(0..weight_sum());
        for (kind, weight, least, most) in KINDS {
            if pick < weight {
                return (kind, Duration::from_millis(self.random.random_range(least..most)));
            }
            pick -= weight;
        }
        unreachable!("the pick is below the sum of the weights")
    }

    fn victims(&self, kind: Kind, victim: usize, other: usize) -> Vec<String> {
        let places = match kind {
            Kind::Outage | Kind::Delay => (0..NODES).collect(),
            Kind::CutPair | Kind::HoldPair => vec![victim, other],
            _ => vec![victim],
        };
        places.into_iter().map(|place| self.cluster.at(place).name().to_owned()).collect()
    }

    /// A second node fails as well, for a moment within the first one's fault.
    fn second(&mut self, other: usize, length: Duration) -> Result<(), String> {
        let kind = [Kind::Kill, Kind::Pause, Kind::Terminate][self.random.random_range(0..3)];
        self.wait(length / 2)?;
        self.tell(kind, other, false, length / 4);
        self.begin(kind, other, other)?;
        self.wait(length / 4)?;
        self.end(kind, other)?;
        self.wait(length / 4)
    }

    fn begin(&mut self, kind: Kind, victim: usize, other: usize) -> Result<(), String> {
        let others = (0..NODES).filter(|place| *place != victim);
        match kind {
            Kind::Kill => self.cluster.at_mut(victim).kill_9(),
            Kind::Terminate => {
                let node = self.cluster.at_mut(victim);
                let status = node.terminate();
                if !status.success() {
                    return Err(format!("{} ended with {status} after SIGTERM", node.name()));
                }
            }
            Kind::Pause => self.cluster.at_mut(victim).pause(),
            Kind::Wipe => {
                let node = self.cluster.at_mut(victim);
                node.kill_9();
                node.wipe();
            }
            Kind::Outage => self.cluster.nodes().iter_mut().for_each(|node| node.kill_9()),
            Kind::Cut => self.cluster.network().set_around(victim, Fault::Cut),
            Kind::Hold => self.cluster.network().set_around(victim, Fault::Hold),
            Kind::HoldOut => {
                others.for_each(|to| self.cluster.network().set(victim, to, Fault::Hold));
            }
            Kind::HoldIn => {
                others.for_each(|from| self.cluster.network().set(from, victim, Fault::Hold));
            }
            Kind::CutPair => self.cluster.network().set_between(victim, other, Fault::Cut),
            Kind::HoldPair => self.cluster.network().set_between(victim, other, Fault::Hold),
            Kind::Delay => {
                let delay = Duration::from_millis(self.random.random_range(2..30));
                self.cluster.network().set_around(victim, Fault::Delay(delay));
            }
        }
        Ok(())
    }

    fn end(&mut self, kind: Kind, victim: usize) -> Result<(), String> {
        match kind {
            Kind::Kill | Kind::Terminate | Kind::Wipe => self.cluster.at_mut(victim).spawn(),
            Kind::Pause => self.cluster.at_mut(victim).resume(),
            Kind::Outage => self.cluster.nodes().iter_mut().for_each(|node| node.spawn()),
            Kind::Cut
            | Kind::Hold
            | Kind::HoldOut
            | Kind::HoldIn
            | Kind::CutPair
            | Kind::HoldPair
            | Kind::Delay => self.cluster.network().heal(),
        }
        self.check()
    }

    /// Lets time pass, and the load fail.
    fn wait(&mut self, length: Duration) -> Result<(), String> {
        let until = Instant::now() + length;
        while Instant::now() < until {
            self.check()?;
            let left = until.saturating_duration_since(Instant::now());
            thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// Nothing has gone wrong so far.
    fn check(&mut self) -> Result<(), String> {
        if let Some(failure) = self.load.failure() {
            return Err(self.explain(&failure));
        }
        for node in self.cluster.nodes() {
            if let Some(status) = node.ended_by_itself() {
                return Err(format!("{} ended by itself: {status}; {}", node.name(), node.tail()));
            }
        }
        Ok(())
    }

    /// Every node's copy is complete again and counts.
    fn wait_until_voters(&mut self) -> Result<(), String> {
        self.cluster.wait_until_serving();
        let started = Instant::now();
        loop {
            self.check()?;
            let votes = |role: &str| role == "leader" || role == "follower";
            let healths: Vec<_> = self.cluster.nodes().iter().map(|node| node.health()).collect();
            let voters = healths.iter().flatten().filter(|health| {
                health.is_ok() && health.shards.iter().all(|shard| votes(&shard.role))
            });
            if voters.count() == NODES {
                return Ok(());
            }
            if started.elapsed() > Duration::from_secs(60) {
                return Err(self.explain(&format!("not all replicas are voters: {healths:?}")));
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// A failure, with what the nodes said last.
    fn explain(&self, failure: &str) -> String {
        let tail = |place| {
            let node = self.cluster.at(place);
            format!("\n--- {}\n{}", node.name(), node.tail())
        };
        format!("{failure}{}", (0..NODES).map(tail).collect::<String>())
    }

    fn tell(&self, kind: Kind, victim: usize, leader: bool, length: Duration) {
        let at = self.started.elapsed().as_secs_f64();
        let node = self.cluster.at(victim).name();
        let role = if leader { "leader" } else { "follower" };
        println!("{at:7.2} s  {kind}: {node} ({role}) for {:.2} s", length.as_secs_f64());
    }

    fn finish(mut self) -> Result<Report, String> {
        self.cluster.network().heal();
        self.wait_until_voters()?;
        self.load.wait_for_answers(ANSWERS_AT_END).map_err(|why| self.explain(&why))?;
        let Self { load, mut cluster, events, .. } = self;
        let mut finished = load.stop()?;
        for target in cluster.targets() {
            finished.verify(&target)?;
        }
        let checked = finished.check_history()?;
        cluster.wait_until_equal();
        for node in cluster.nodes() {
            if node.stderr().contains("panicked at") {
                return Err(format!("{} panicked: {}", node.name(), node.tail()));
            }
        }
        Ok(Report::new(&events, &finished, checked))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_share() {
        let kinds: std::collections::BTreeSet<_> = KINDS.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds.len(), KINDS.len());
        assert!(KINDS.iter().all(|(_, weight, least, most)| *weight > 0 && least < most));
        assert_eq!(weight_sum(), 100);
    }
}
