//! Faults, one after the other, while every answer is checked. Here: those of replicas, and what
//! holds for all; `front`: those of what stands before them.

mod front;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use nbd_testkit::load::{Finished, Load, LoadOptions};

use crate::cluster::{BALANCERS, CONTROL, Cluster, FRONT, ISOLATION_EXIT, REPLICAS, services};
use crate::engine::exit_codes;
use crate::fault::{Fault, Inside};
use crate::steps::Steps;
use crate::waiting::wait_for;

/// How long a fault lasts that does not end by itself; below [`ISOLATION_EXIT`], and above the time
/// in which a leader is missed.
const FAULT_LENGTH: Duration = Duration::from_secs(2);

/// Answers that each client must get while a fault lasts that takes nobody's majority, and after
/// each.
const ANSWERS: u64 = 20;

/// How long a shard without a majority is watched.
const STANDSTILL: Duration = Duration::from_secs(1);

/// The exit code of a replica that ends itself since it is isolated.
const ISOLATED: i64 = 75;

/// How often a replica is tried to be isolated.
const ISOLATION_ATTEMPTS: u32 = 5;

/// The load on each shard: more is not the point, on a machine that runs ten containers.
fn load_options(volume: &str, seed: u64) -> LoadOptions {
    LoadOptions {
        volume: volume.to_owned(),
        threads: 3,
        depth: 4,
        region_bytes: 1 << 20,
        pace: 100,
        seed,
        ..LoadOptions::default()
    }
}

/// A cluster under load.
pub(crate) struct Trial<'a> {
    cluster: &'a Cluster,
    steps: &'a Steps,
    /// A way to do what Docker cannot, if there is one.
    inside: Option<Inside>,
    /// The load on each shard: the first attached to the one published address, the second to each
    /// load balancer.
    loads: [Load; 2],
    /// The volume of the first.
    volume: String,
    faults: usize,
    /// When each container was last started, as far as that was meant to be.
    started: BTreeMap<String, String>,
}

impl<'a> Trial<'a> {
    /// Attaches the loads to two volumes, one on each shard.
    ///
    /// # Errors
    /// Docker fails.
    ///
    /// # Panics
    /// If a load cannot attach.
    pub(crate) fn start(
        cluster: &'a Cluster,
        steps: &'a Steps,
        volumes: [&str; 2],
        seed: u64,
    ) -> anyhow::Result<Self> {
        let inside = match Inside::find(&cluster.container(REPLICAS[0][0])?) {
            Ok(inside) => Some(inside),
            Err(reason) => {
                steps.left_out("faults past Docker (one-way drops, crashes, isolation)", &reason);
                None
            }
        };
        let front = [cluster.target(FRONT).clone()];
        let balancers = BALANCERS.map(|balancer| cluster.target(balancer).clone());
        let loads = [
            Load::start(&front, load_options(volumes[0], seed)),
            Load::start(&balancers, load_options(volumes[1], seed + 1)),
        ];
        let mut trial = Self {
            cluster,
            steps,
            inside,
            loads,
            volume: volumes[0].to_owned(),
            faults: 0,
            started: BTreeMap::new(),
        };
        trial.note_starts()?;
        trial.wait_for_answers()?;
        Ok(trial)
    }

    /// All faults. Those that cost no client its connection come first: until then none may break.
    ///
    /// # Errors
    /// Whatever was wrong.
    pub(crate) fn run(&mut self) -> anyhow::Result<()> {
        for (fault, shard, at_leader) in [
            (Fault::Kill, 0, true),
            (Fault::Kill, 1, false),
            (Fault::Pause, 1, true),
            (Fault::Pause, 0, false),
            (Fault::Disconnect, 0, true),
            (Fault::Disconnect, 1, false),
            (Fault::Restart, 1, true),
            (Fault::Unheard, 0, false),
            (Fault::Deaf, 1, true),
            (Fault::Crash, 0, true),
        ] {
            if self.inside.is_some() || !fault.needs_inside() {
                self.replica_fault(fault, shard, at_leader)?;
            }
        }
        if self.inside.is_some() {
            self.isolation()?;
        }
        self.lost_majority()?;
        self.lost_shard()?;
        self.control_restart()?;
        self.balancer_fault(Fault::Kill, BALANCERS[0])?;
        self.balancer_fault(Fault::Pause, BALANCERS[1])?;
        self.balancer_fault(Fault::Restart, BALANCERS[2])?;
        self.front_kill()
    }

    /// A fault of one replica, which its shard does without.
    fn replica_fault(&mut self, fault: Fault, shard: usize, at_leader: bool) -> anyhow::Result<()> {
        let (leader, followers) = self.cluster.roles(shard)?;
        let victim = if at_leader { leader } else { followers[0] };
        let role = if at_leader { "leader" } else { "follower" };
        let others: Vec<&str> = [leader, followers[0], followers[1]]
            .into_iter()
            .filter(|other| *other != victim)
            .collect();
        let inside = self.inside.as_ref();
        let begin = Instant::now();
        fault.begin(self.cluster, inside, victim, &others)?;
        let going_on = self.wait_for_answers()?;
        if fault.lasts() {
            thread::sleep(FAULT_LENGTH.saturating_sub(begin.elapsed()));
        }
        let lasted = begin.elapsed();
        fault.end(self.cluster, inside, victim, &others)?;
        let changed = if fault.ends_process() { &[victim][..] } else { &[] };
        let well = self.settle(changed)?;
        self.tell(&format!("{fault}: {victim}, {role}"), lasted, going_on, well);
        Ok(())
    }

    /// What a follower sends to its leader is lost: it ends itself, and Docker starts it again.
    fn isolation(&mut self) -> anyhow::Result<()> {
        for _ in 0..ISOLATION_ATTEMPTS {
            if self.isolated_once()? {
                return Ok(());
            }
            self.steps.note("leadership moved meanwhile: isolating again");
            self.settle(&[])?;
        }
        bail!("leadership moved again and again");
    }

    /// The same, unless leadership moves meanwhile, as it may on a loaded machine: then it may be
    /// another replica that is not heard, and `false` is returned at once.
    fn isolated_once(&mut self) -> anyhow::Result<bool> {
        let (leader, [victim, _]) = self.cluster.roles(1)?;
        let inside = self.inside.as_ref().context("a way into containers")?;
        let (container, since) = (self.cluster.container(victim)?, SystemTime::now());
        let begin = Instant::now();
        Fault::Unheard.begin(self.cluster, Some(inside), victim, &[leader])?;
        let going_on = self.wait_for_answers()?;
        // A new process has a network of its own, in which nothing is dropped.
        let ended = wait_for("an isolated replica to be started again", || {
            let now = self.cluster.container(victim)?;
            if now.restarts == container.restarts + 1 && now.status == "running" {
                return Ok(true);
            }
            if self.cluster.role(leader).is_ok_and(|role| role != "leader") {
                return Ok(false);
            }
            bail!("{victim} is as it was: {now:?}")
        })?;
        if !ended {
            // If it ended itself just now, its network went with it, and the fault.
            let ending = Fault::Unheard.end(self.cluster, Some(inside), victim, &[leader]);
            if self.cluster.container(victim)?.restarts == container.restarts {
                ending?;
            }
            return Ok(false);
        }
        let lasted = begin.elapsed();
        if lasted < ISOLATION_EXIT {
            bail!("{victim} ended after {lasted:?}, before it was to");
        }
        let codes = exit_codes(&container, since)?;
        if codes != [ISOLATED] {
            bail!("{victim} ended with {codes:?}, and not with {ISOLATED}");
        }
        let well = self.settle(&[victim])?;
        let what = format!("not heard by its leader: {victim}, which ended itself");
        self.tell(&what, lasted, going_on, well);
        Ok(true)
    }

    /// Two of three replicas die: requests wait, health checks tell of it, and the other shard is
    /// not concerned.
    fn lost_majority(&mut self) -> anyhow::Result<()> {
        let (leader, followers) = self.cluster.roles(0)?;
        let begin = Instant::now();
        for follower in followers {
            self.cluster.act("kill", follower)?;
        }
        let unavailable = [BALANCERS.as_slice(), &[leader, CONTROL]].concat();
        wait_for("a lost majority to be told of", || {
            for service in &unavailable {
                let answer = self.cluster.get(service, "/health")?;
                if answer.status != 503 {
                    bail!("{service} answers {}: {}", answer.status, answer.body);
                }
            }
            Ok(())
        })?;
        // Of a process it says nothing that others are gone: probes of an orchestrator stay calm.
        for service in &unavailable {
            let alive = self.cluster.get(service, "/livez")?;
            if alive.status != 200 {
                bail!("{service} is not alive without a majority: {alive:?}");
            }
        }
        wait_for("those that have all they need to be well", || {
            for service in [FRONT].into_iter().chain(REPLICAS[1]) {
                let answer = self.cluster.get(service, "/health")?;
                if answer.status != 200 {
                    bail!("{service} answers {answer:?}");
                }
            }
            Ok(())
        })?;
        let before = self.loads[0].answers();
        self.loads[1].wait_for_answers(ANSWERS).map_err(|failure| anyhow!(failure))?;
        thread::sleep(STANDSTILL);
        let during = self.loads[0].answers();
        // What is read from memory under a lease would be answers, too: but there is none left.
        if before != during {
            bail!("answers without a majority: {before:?}, then {during:?}");
        }
        let lasted = begin.elapsed();
        for follower in followers {
            self.cluster.act("start", follower)?;
        }
        let well = self.settle(&followers)?;
        let what = "two of three replicas killed: 503 from all concerned";
        self.faults += 1;
        self.steps.done(&format!(
            "{what}, for {:.1} s; well after {:.1} s more",
            lasted.as_secs_f64(),
            well.as_secs_f64()
        ));
        Ok(())
    }

    /// All replicas of a shard die.
    fn lost_shard(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        for replica in REPLICAS[1] {
            self.cluster.act("kill", replica)?;
        }
        self.loads[0].wait_for_answers(ANSWERS).map_err(|failure| anyhow!(failure))?;
        let going_on = begin.elapsed();
        for replica in REPLICAS[1] {
            self.cluster.act("start", replica)?;
        }
        let lasted = begin.elapsed();
        let well = self.settle(&REPLICAS[1])?;
        self.tell("kill: all replicas of a shard", lasted, going_on, well);
        Ok(())
    }

    /// Waits until all is well again after a fault that has ended, and every client has answers;
    /// and sees that no process is another one but those of `changed`.
    fn settle(&mut self, changed: &[&str]) -> anyhow::Result<Duration> {
        let well = self.cluster.wait_well()?;
        self.wait_for_answers()?;
        let before = std::mem::take(&mut self.started);
        self.note_starts()?;
        let differs = |service: &&str| before.get(*service) != self.started.get(*service);
        let surprising: Vec<&str> =
            services().filter(differs).filter(|service| !changed.contains(service)).collect();
        if !surprising.is_empty() {
            bail!("started anew, and nobody meant them to be: {surprising:?}");
        }
        Ok(well)
    }

    fn note_starts(&mut self) -> anyhow::Result<()> {
        let containers = self.cluster.containers()?.into_iter();
        self.started = containers.map(|container| (container.service, container.started)).collect();
        Ok(())
    }

    /// Waits until every client has had some more answers.
    fn wait_for_answers(&self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        for load in &self.loads {
            load.wait_for_answers(ANSWERS).map_err(|failure| anyhow!(failure))?;
        }
        Ok(started.elapsed())
    }

    fn tell(&mut self, what: &str, lasted: Duration, going_on: Duration, well: Duration) {
        self.faults += 1;
        self.steps.done(&format!(
            "{what}; for {:.1} s, {ANSWERS} answers each after {:.1} s, well {:.1} s after the end",
            lasted.as_secs_f64(),
            going_on.as_secs_f64(),
            well.as_secs_f64()
        ));
    }

    /// Stops the loads, and holds what is on the volumes against their accounts, through each load
    /// balancer and the address in front of them. Gives the loads' accounts, for another look.
    ///
    /// # Errors
    /// A wrong byte; any failure of a load.
    pub(crate) fn finish(self) -> anyhow::Result<Verified> {
        let mut verified = Verified { faults: self.faults, loads: Vec::new() };
        let mut histories = 0;
        for load in self.loads {
            let load = load.stop().map_err(|failure| anyhow!(failure))?;
            histories += load.check_history().map_err(|failure| anyhow!(failure))?;
            verified.loads.push(load);
        }
        verified.verify(self.cluster)?;
        let sum = |of: fn(&Finished) -> u64| verified.loads.iter().map(of).sum::<u64>();
        self.steps.done(&format!(
            "{} faults, {} requests answered, no wrong byte, no error; {} lost with what was \
             ended, {} times attached again; {histories} operations linearizable",
            self.faults,
            sum(|load| load.operations),
            sum(|load| load.lost),
            sum(|load| load.reconnects),
        ));
        Ok(verified)
    }
}

/// What the loads have left on their volumes.
#[derive(Debug)]
pub(crate) struct Verified {
    /// Faults that there were.
    pub(crate) faults: usize,
    loads: Vec<Finished>,
}

impl Verified {
    /// Reads all of it through each load balancer and the address in front of them.
    ///
    /// # Errors
    /// A byte that cannot be there; a read that fails.
    pub(crate) fn verify(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        for load in &mut self.loads {
            for service in [FRONT].into_iter().chain(BALANCERS) {
                load.verify(cluster.target(service)).map_err(|failure| anyhow!(failure))?;
            }
        }
        Ok(())
    }
}
