//! What servers cost when nothing happens.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nbd_testkit::{Cluster, NbdClient, ServerProcess, process};

use crate::Place;
use crate::server::{EXPORT, cluster};

/// Time for what a start, or clients that attach, leave to be done.
const SETTLE: Duration = Duration::from_secs(3);

/// Bytes that each client reads, as one does that looks for a file system.
const READ_BYTES: usize = 4096;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds to watch.
    #[arg(long, default_value_t = 30)]
    for_seconds: u64,
    /// Clients, each with a volume of its own, attached through a load balancer. 0: one, attached
    /// to the leader.
    #[arg(long, default_value_t = 0)]
    clients: usize,
}

/// Starts three replicas, attaches clients that do nothing, and prints a table.
///
/// # Errors
/// A client that is not served, also after having been idle.
pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    let cluster = cluster(3, &place.dir, &place.replica);
    let balancer = (args.clients > 0).then(|| cluster.balancer());
    let leader = cluster.wait_leader();
    let servers = servers(&cluster, leader, balancer.as_ref());
    thread::sleep(SETTLE);
    let before = resident_mib(&servers);

    let mut clients = Vec::new();
    match &balancer {
        None => clients.push(cluster.at(leader).connect(EXPORT)?),
        Some(balancer) => {
            // A socket for each.
            nbd_service::open_files::raise_limit();
            for number in 0..args.clients {
                clients.push(balancer.connect(&format!("idle-{number}"))?);
            }
        }
    }
    read_all(&mut clients)?;
    thread::sleep(SETTLE);
    let cpu_before = cpu(&servers);
    let watched = Duration::from_secs(args.for_seconds.max(1));
    thread::sleep(watched);
    let cpu_after = cpu(&servers);
    let attached = resident_mib(&servers);
    read_all(&mut clients).context("read after having been idle")?;

    println!("{} clients, idle for {} s", clients.len(), watched.as_secs());
    println!("                 role         CPU %    resident MiB before    with clients");
    for (place, (server, role)) in servers.iter().enumerate() {
        let used = cpu_after[place].saturating_sub(cpu_before[place]);
        println!(
            "{:<16} {:<13} {:>4.2} {:>22.1} {:>15.1}",
            server.name(),
            role,
            used.as_secs_f64() / watched.as_secs_f64() * 100.0,
            before[place],
            attached[place],
        );
    }
    Ok(())
}

/// Every process, with what it does.
fn servers<'a>(
    cluster: &'a Cluster,
    leader: usize,
    balancer: Option<&'a ServerProcess>,
) -> Vec<(&'a ServerProcess, &'static str)> {
    let role = |place| if place == leader { "leader" } else { "follower" };
    let nodes = (0..3).map(|place| (&**cluster.at(place), role(place)));
    nodes.chain(balancer.map(|balancer| (balancer, "balancer"))).collect()
}

#[expect(clippy::cast_precision_loss, reason = "sizes of processes are far below 2^53")]
fn resident_mib(servers: &[(&ServerProcess, &str)]) -> Vec<f64> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    servers.iter().map(|(server, _)| mib(server.rss_bytes())).collect()
}

fn cpu(servers: &[(&ServerProcess, &str)]) -> Vec<Duration> {
    servers.iter().map(|(server, _)| process::cpu_time(server.pid())).collect()
}

/// Each client is served.
fn read_all(clients: &mut [NbdClient]) -> Result<()> {
    for client in clients {
        client.read(0, READ_BYTES)?;
    }
    Ok(())
}
