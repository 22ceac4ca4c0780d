//! Clients attached through a load balancer, whose every answer is checked. What counts is, for
//! each leader lost, the longest time that any of them got no answer although it had asked, until
//! the next one is lost: the lost node's return may cost something, too. Times below 20 ms count
//! as none.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nbd_testkit::load::{Load, LoadOptions, Stall};
use nbd_testkit::{ServerProcess, seed};

use super::Way;
use crate::Place;
use crate::server::cluster;

/// Answers that each client gets before the leader is lost, and after.
const ANSWERS_BETWEEN: u64 = 100;

/// What a measurement came to; with anything else it fails.
pub(super) struct Balanced {
    /// For each leader lost.
    pub(super) stalls: Vec<Duration>,
    /// Requests answered, all of them rightly and over the first connection of their client.
    pub(super) answers: u64,
    /// Operations on sectors that all clients share, found to be linearizable.
    pub(super) checked: usize,
}

/// Loses the leader so many times.
///
/// # Errors
/// A connection that broke, an error reply, an answer that does not come, wrong bytes.
pub(super) fn run(way: &Way, times: usize, place: &Place) -> Result<Balanced> {
    let mut cluster = cluster(3, &place.dir, &place.replica);
    let balancer = cluster.balancer();
    let seed = seed();
    let load = Load::start(&[balancer.target()], LoadOptions { seed, ..LoadOptions::default() });
    let mut begins = Vec::new();
    for _ in 0..times {
        cluster.wait_until_serving();
        wait_for_answers(&load, &balancer)?;
        let leader = cluster.wait_leader();
        begins.push(Instant::now());
        (way.lose)(cluster.at_mut(leader));
        wait_for_answers(&load, &balancer)?;
        (way.restore)(cluster.at_mut(leader));
    }
    cluster.wait_until_serving();
    wait_for_answers(&load, &balancer)?;
    let mut finished = load.stop().map_err(|failure| anyhow!(failure))?;
    for target in cluster.targets().iter().chain([&balancer.target()]) {
        finished.verify(target).map_err(|failure| anyhow!(failure))?;
    }
    let checked = finished.check_history().map_err(|failure| anyhow!(failure))?;
    cluster.wait_until_equal();
    let stalls = longest(&begins, &finished.stalls);
    Ok(Balanced { stalls, answers: finished.operations, checked })
}

fn wait_for_answers(load: &Load, balancer: &ServerProcess) -> Result<()> {
    let explain = |failure| anyhow!("{failure}; the load balancer wrote:\n{}", balancer.tail());
    load.wait_for_answers(ANSWERS_BETWEEN).map_err(explain)
}

/// The longest stall from each beginning to the next.
fn longest(begins: &[Instant], stalls: &[Stall]) -> Vec<Duration> {
    let of_one = |(place, begin): (usize, &Instant)| {
        let next = begins.get(place + 1);
        let within =
            |stall: &&Stall| stall.end >= *begin && next.is_none_or(|next| stall.end < *next);
        stalls.iter().filter(within).map(Stall::length).max().unwrap_or_default()
    };
    begins.iter().enumerate().map(of_one).collect()
}
