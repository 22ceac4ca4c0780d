//! What a load balancer costs when it does not take its processor from others: client, balancer and
//! leader, each with the same share of one core, as if each had a machine of its own.
//!
//! On a machine with few cores all of them compete, and a stream through a balancer has to pay for
//! one process more out of the same cores: for large requests, which cost a copy and little else,
//! that alone takes a third off. What a user with machines apart sees is how the slowest process of
//! the chain compares with the slowest one of the shorter chain, and that can be measured on one
//! machine as long as the shares together are less than it has. The other replicas, idle in reads,
//! have what is left.
//!
//! Shares are CPU bandwidth of control groups, version 1 or 2; it takes root to set them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::fio::Job;
use crate::server::{self, EXPORT};
use crate::{Place, jobs, median};

/// Time in which a share is to be kept, in microseconds: short, so that a process which has used
/// its own up does not stand still for long.
const PERIOD_US: u32 = 10_000;

/// Where control groups are.
const GROUPS: &str = "/sys/fs/cgroup";

/// How the chains are compared.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rounds; each runs every job once through the balancer and once at the leader.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// Share of one core that client, balancer and leader have each.
    #[arg(long, default_value_t = 0.4)]
    share: f64,
    /// Runs only the jobs whose name contains this.
    #[arg(long)]
    only: Option<String>,
}

/// A control group with a share of one core; removed when dropped.
struct Group {
    path: PathBuf,
}

impl Group {
    fn new(name: &str, share: f64) -> Result<Self> {
        let version_1 = Path::new(GROUPS).join("cpu");
        let is_1 = version_1.is_dir();
        let parent = if is_1 { version_1 } else { PathBuf::from(GROUPS) };
        let path = parent.join(format!("cinderblock-bench-{}-{name}", std::process::id()));
        fs::create_dir(&path).with_context(|| {
            format!("make a control group in {} (takes root)", parent.display())
        })?;
        let group = Self { path };
        let quota = (share * f64::from(PERIOD_US)).round();
        // The heaviest weights there are: what else runs must not take the share away.
        if is_1 {
            group.set("cpu.shares", "262144")?;
            group.set("cpu.cfs_period_us", &PERIOD_US.to_string())?;
            group.set("cpu.cfs_quota_us", &quota.to_string())?;
        } else {
            group.set("cpu.weight", "10000")?;
            group.set("cpu.max", &format!("{quota} {PERIOD_US}"))?;
        }
        Ok(group)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))
    }

    fn take(&self, pid: u32) -> Result<()> {
        self.set("cgroup.procs", &pid.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Only an empty one can be removed, and who is in it may end a moment later.
        if let Some(parent) = self.path.parent() {
            for pid in
                fs::read_to_string(self.path.join("cgroup.procs")).unwrap_or_default().lines()
            {
                let _ = fs::write(parent.join("cgroup.procs"), pid);
            }
        }
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("{} is left behind: {error}", self.path.display());
        }
    }
}

pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let cluster = server::cluster(3, &place.dir, &place.replica);
    let balancer = cluster.balancer();
    let leader = cluster.wait_leader();
    let (through, at_leader) = (balancer.uri(EXPORT), cluster.at(leader).uri(EXPORT));
    println!("each of client, balancer and leader has {} of one core", args.share);
    println!("job                  balancer       leader         ratio");
    for job in jobs(args.seconds) {
        if args.only.as_ref().is_some_and(|part| !job.name.contains(part)) {
            continue;
        }
        job.prepare(&through)?;
        // Behind the preparation, which may take what it can get.
        let groups = ["client", "balancer", "leader"];
        let [client, middle, end] = groups.map(|name| Group::new(name, args.share));
        let (client, middle, end) = (client?, middle?, end?);
        client.take(std::process::id())?;
        middle.take(balancer.pid())?;
        end.take(cluster.at(leader).pid())?;
        compare(&job, args.rounds, &through, &at_leader)?;
        if cluster.wait_leader() != leader {
            bail!("the leader changed meanwhile: the figures mean nothing");
        }
    }
    Ok(())
}

/// Runs one job on both ways, and prints medians, and that of the rounds' ratios.
fn compare(job: &Job, rounds: usize, through: &str, at_leader: &str) -> Result<()> {
    let (mut of_through, mut of_leader) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        // In turn, so that neither always comes behind the other.
        for second in [round % 2 == 1, round % 2 == 0] {
            let (uri, into) =
                if second { (at_leader, &mut of_leader) } else { (through, &mut of_through) };
            into.push(job.run(uri)?);
        }
    }
    let mut ratios: Vec<f64> = of_through.iter().zip(&of_leader).map(|(a, b)| a / b).collect();
    println!(
        "{:<20} {:>8.0} {:<5} {:>8.0} {:<5} {:>5.2}",
        job.name,
        median(&mut of_through),
        job.unit(),
        median(&mut of_leader),
        job.unit(),
        median(&mut ratios),
    );
    Ok(())
}
