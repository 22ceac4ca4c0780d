//! How long clients stand still when the leader is lost.
//!
//! The leader is lost, and back once clients go on; when all replicas serve it is lost again, and
//! so on. Clients are attached to a replica that stays ([`attached`]), or through a load balancer
//! ([`balanced`]).

mod attached;
mod balanced;

use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use nbd_testkit::NodeProcess;

use crate::Place;
use crate::server::cluster;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Times that the leader is killed, and that it is stopped.
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// Times that the leader is frozen. Default: as often as it is killed.
    #[arg(long)]
    freezes: Option<usize>,
    /// What clients are attached to.
    #[arg(long, value_enum, default_value_t = Via::Follower)]
    via: Via,
}

/// What clients are attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    /// A replica that stays; one client, which writes.
    Follower,
    /// A load balancer; four clients, whose every answer is checked.
    Balancer,
}

/// A way of losing the leader, and the stall promised for 99 of 100 cases.
struct Way {
    name: &'static str,
    aim: Duration,
    times: fn(&Args) -> usize,
    lose: fn(&mut NodeProcess),
    restore: fn(&mut NodeProcess),
}

const WAYS: [Way; 3] = [
    Way {
        name: "kill -9",
        aim: Duration::from_millis(500),
        times: |args| args.kills,
        lose: |node| node.kill_9(),
        restore: |node| node.start(),
    },
    Way {
        name: "SIGSTOP",
        aim: Duration::from_millis(1500),
        times: |args| args.freezes.unwrap_or(args.kills),
        lose: |node| node.pause(),
        restore: |node| node.resume(),
    },
    Way {
        name: "SIGTERM",
        aim: Duration::from_millis(500),
        times: |args| args.kills,
        lose: |node| assert!(node.terminate().success(), "a stop ends well"),
        restore: |node| node.start(),
    },
];

/// Measures each way and prints a table.
///
/// # Errors
/// Clients that do not go on; through a load balancer, also one that is disconnected, gets an error
/// or wrong bytes.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    println!("leader lost by    times    p50 ms    p99 ms    max ms    aim p99 ms");
    for way in &WAYS {
        let times = (way.times)(args);
        if times == 0 {
            continue;
        }
        let (mut stalls, note) = match args.via {
            Via::Follower => {
                let mut cluster = cluster(3, &place.dir, &place.replica);
                let stalls = (0..times).map(|_| attached::lose_leader(&mut cluster, way));
                (stalls.collect::<Result<Vec<_>>>()?, None)
            }
            Via::Balancer => {
                let done = balanced::run(way, times, place);
                let done = done.with_context(|| format!("lose leaders by {}", way.name))?;
                let note = format!(
                    "    {} answers, 0 disconnects, 0 errors, 0 wrong bytes; {} operations on \
                     shared sectors linearizable",
                    done.answers, done.checked
                );
                (done.stalls, Some(note))
            }
        };
        stalls.sort_unstable();
        let at = |percent: usize| {
            let place = (stalls.len() * percent).div_ceil(100).max(1) - 1;
            stalls.get(place).map_or(f64::NAN, |stall| stall.as_secs_f64() * 1000.0)
        };
        println!(
            "{:<15} {:>7} {:>9.1} {:>9.1} {:>9.1} {:>13}",
            way.name,
            stalls.len(),
            at(50),
            at(99),
            at(100),
            way.aim.as_millis(),
        );
        if let Some(note) = note {
            println!("{note}");
        }
    }
    Ok(())
}
