//! Three replicas under load, and faults by a schedule that a seed gives.
//!
//! One fault after another hits a node or the network, often the leader; some come two at a time,
//! and some take everything down for a moment. Clients attach to the nodes, or through load
//! balancers, which are then hit as well. Between them a majority can always work. When the
//! time is over everything is healed, all data is read through each replica and held against the
//! load's account, and all replicas' stores must be equal.
//!
//! The seed fixes the kinds, lengths and order of the faults and the load's choices; real processes
//! do not take the same steps twice, though.

mod kind;
mod report;

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::cluster::Cluster;
use crate::load::{Load, LoadOptions};
use crate::network::Fault;
use crate::server::ServerProcess;

use self::kind::Kind;

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
    /// Load balancers that it attaches through; 0: it attaches to the nodes.
    pub balancers: usize,
    /// The `nbd-replica` to run, with `nbd-lb` beside it. Default: those of this workspace, built
    /// if need be.
    pub program: Option<PathBuf>,
    /// Where the nodes keep their data. Default: the system's directory for temporary files.
    pub directory: Option<PathBuf>,
}

/// A fault that was.
#[derive(Debug, Clone)]
struct Event {
    kind: Kind,
    leader: bool,
    /// Whether another node failed within it.
    second: bool,
    /// Names of those whose clients it may stop.
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
    // Above the cluster, whose directory holds their output.
    balancers: Vec<ServerProcess>,
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
        let balancers: Vec<_> = (0..options.balancers).map(|_| cluster.balancer()).collect();
        let targets = match &balancers[..] {
            [] => cluster.targets(),
            some => some.iter().map(ServerProcess::target).collect(),
        };
        let load = Load::start(&targets, load);
        let random = StdRng::seed_from_u64(options.seed);
        Self { balancers, cluster, load, random, started: Instant::now(), events: Vec::new() }
    }

    /// One fault, from its choice to its end and the recovery from it.
    fn fault(&mut self) -> Result<(), String> {
        let (kind, length) = Kind::choose(&mut self.random, !self.balancers.is_empty());
        // Drawn whether needed or not, so that the schedule depends on the seed alone.
        let (at_leader, any) = (self.random.random_bool(0.5), self.random.random_range(0..NODES));
        let (second, second_at) =
            (self.random.random_bool(0.2), self.random.random_range(1..NODES));
        let rest = Duration::from_millis(self.random.random_range(100..900));

        if kind == Kind::Wipe {
            // A copy that is not complete must not be the only one left.
            self.wait_until_voters()?;
        }
        let (victim, leader) = if kind.hits_balancer() {
            (any % self.balancers.len(), false)
        } else {
            let leader = self.cluster.leader();
            let victim = leader.filter(|_| at_leader).unwrap_or(any);
            (victim, leader == Some(victim))
        };
        let other = (victim + second_at) % NODES;
        let begin = Instant::now();
        let mut victims = self.victims(kind, victim, other);
        self.tell(kind, &victims[0], leader, length);
        self.begin(kind, victim, other)?;
        let alone = kind.hits_balancer() || kind == Kind::Wipe || kind == Kind::Outage;
        let second = second && !alone;
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
        let recovery = healed.elapsed();
        self.events.push(Event { kind, leader, second, victims, begin, recovery });
        self.wait(rest)
    }

    /// Names of those that are hit, the one that was chosen first.
    fn victims(&self, kind: Kind, victim: usize, other: usize) -> Vec<String> {
        if kind.hits_balancer() {
            return vec![self.balancers[victim].name().to_owned()];
        }
        let places = match kind {
            Kind::Outage | Kind::Delay => {
                (0..NODES).map(|distance| (victim + distance) % NODES).collect()
            }
            Kind::CutPair | Kind::HoldPair => vec![victim, other],
            _ => vec![victim],
        };
        places.into_iter().map(|place| self.cluster.at(place).name().to_owned()).collect()
    }

    /// A second node fails as well, for a moment within the first one's fault.
    fn second(&mut self, other: usize, length: Duration) -> Result<(), String> {
        let kind = [Kind::Kill, Kind::Pause, Kind::Terminate][self.random.random_range(0..3)];
        self.wait(length / 2)?;
        self.tell(kind, self.cluster.at(other).name(), false, length / 4);
        self.begin(kind, other, other)?;
        self.wait(length / 4)?;
        self.end(kind, other)?;
        self.wait(length / 4)
    }

    fn begin(&mut self, kind: Kind, victim: usize, other: usize) -> Result<(), String> {
        let others = (0..NODES).filter(|place| *place != victim);
        match kind {
            Kind::Kill => self.cluster.at_mut(victim).kill_9(),
            Kind::Terminate => terminate(self.cluster.at_mut(victim))?,
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
            Kind::BalancerKill => self.balancers[victim].kill_9(),
            Kind::BalancerTerminate => terminate(&mut self.balancers[victim])?,
            Kind::BalancerPause => self.balancers[victim].pause(),
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
            Kind::BalancerKill | Kind::BalancerTerminate => self.balancers[victim].spawn(),
            Kind::BalancerPause => self.balancers[victim].resume(),
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
        for server in servers(&mut self.cluster, &mut self.balancers) {
            if let Some(status) = server.ended_by_itself() {
                let (name, tail) = (server.name(), server.tail());
                return Err(format!("{name} ended by itself: {status}; {tail}"));
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

    /// A failure, with what the servers said last.
    fn explain(&mut self, failure: &str) -> String {
        let servers = servers(&mut self.cluster, &mut self.balancers);
        let tail =
            |server: &mut ServerProcess| format!("\n--- {}\n{}", server.name(), server.tail());
        format!("{failure}{}", servers.map(tail).collect::<String>())
    }

    fn tell(&self, kind: Kind, victim: &str, leader: bool, length: Duration) {
        let (at, length) = (self.started.elapsed().as_secs_f64(), length.as_secs_f64());
        println!("{at:7.2} s  {kind}: {victim}{} for {length:.2} s", kind.role(leader));
    }

    fn finish(mut self) -> Result<Report, String> {
        self.cluster.network().heal();
        self.wait_until_voters()?;
        self.load.wait_for_answers(ANSWERS_AT_END).map_err(|why| self.explain(&why))?;
        let Self { load, mut cluster, mut balancers, events, .. } = self;
        let mut finished = load.stop()?;
        for target in cluster.targets() {
            finished.verify(&target)?;
        }
        let checked = finished.check_history()?;
        cluster.wait_until_equal();
        for server in servers(&mut cluster, &mut balancers) {
            if server.stderr().contains("panicked at") {
                return Err(format!("{} panicked: {}", server.name(), server.tail()));
            }
        }
        Ok(Report::new(&events, &finished, checked))
    }
}

/// All processes of a run.
fn servers<'a>(
    cluster: &'a mut Cluster,
    balancers: &'a mut [ServerProcess],
) -> impl Iterator<Item = &'a mut ServerProcess> {
    cluster.nodes().iter_mut().map(|node| &mut **node).chain(balancers)
}

/// Stops a process with SIGTERM, which it must end well after.
fn terminate(server: &mut ServerProcess) -> Result<(), String> {
    let status = server.terminate();
    if status.success() {
        return Ok(());
    }
    Err(format!("{} ended with {status} after SIGTERM", server.name()))
}
