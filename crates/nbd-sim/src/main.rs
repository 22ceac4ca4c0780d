//! Runs simulated clusters: `nbd-sim --seeds 1000`, or `nbd-sim --seed 7 --trace` to see one.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use clap::Parser;
use nbd_sim::failure::Failure;
use nbd_sim::plant::Plant;
use nbd_sim::profile::Profile;
use nbd_sim::run;
use nbd_sim::shrink::shrink;
use nbd_sim::world::Tally;

/// Runs a whole cluster in one thread from one seed, many times over.
#[derive(Debug, Parser)]
#[command(name = "nbd-sim")]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100, conflicts_with = "seed")]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1, conflicts_with = "seed")]
    from: u64,
    /// Run this seed alone, twice, and compare the traces.
    #[arg(long)]
    seed: Option<u64>,
    /// Use this profile in place of the one that the seed draws.
    #[arg(long, value_parser = Profile::NAMES)]
    profile: Option<String>,
    /// Print everything that happens.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Do not look for a smaller world that fails as well.
    #[arg(long)]
    no_shrink: bool,
    /// Break this rule on purpose.
    #[cfg(feature = "planted-faults")]
    #[arg(long, value_parser = Plant::ALL.map(|(name, _)| name))]
    plant: Option<String>,
    /// Threads, each with worlds of its own.
    #[arg(long, default_value_t = 2)]
    jobs: u64,
}

impl Arguments {
    fn world(&self, seed: u64) -> Profile {
        let name = self.profile.as_deref();
        name.and_then(|name| Profile::named(name, seed)).unwrap_or_else(|| Profile::draw(seed))
    }

    #[cfg(feature = "planted-faults")]
    fn plant(&self) -> Plant {
        let named = |name: &str| Plant::ALL.into_iter().find(|(of, _)| *of == name);
        let found = self.plant.as_deref().and_then(named);
        found.map_or(Plant::Nothing, |(_, plant)| plant)
    }

    #[cfg(not(feature = "planted-faults"))]
    const fn plant(&self) -> Plant {
        Plant::Nothing
    }

    fn replay(&self, seed: u64) -> String {
        let profile = self.profile.as_ref().map(|name| format!(" --profile {name}"));
        format!("cargo xtask sim --seed {seed}{} --trace", profile.unwrap_or_default())
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A failed assertion is reported with its seed, by whoever runs the world.
    std::panic::set_hook(Box::new(|_| ()));
    let clean = match arguments.seed {
        Some(seed) => one(&arguments, seed),
        None => many(&arguments),
    };
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn one(arguments: &Arguments, seed: u64) -> bool {
    println!("seed {seed}");
    let profile = arguments.world(seed);
    println!("{profile:#?}");
    let first = run::run(seed, profile.clone(), arguments.plant(), arguments.trace);
    for line in &first.lines {
        println!("{line}");
    }
    println!(
        "{} requests, {} events, {} s, trace {:016x}",
        first.operations, first.events, first.lasted, first.trace_hash
    );
    let second = run::run(seed, profile.clone(), arguments.plant(), false);
    if second.trace_hash != first.trace_hash {
        println!("the second run took another course: trace {:016x}", second.trace_hash);
        return false;
    }
    match first.failure {
        None => true,
        Some(failure) => {
            report(arguments, seed, profile, failure);
            false
        }
    }
}

fn report(arguments: &Arguments, seed: u64, profile: Profile, failure: Failure) {
    println!("seed {seed} fails {failure}");
    println!("replay: {}", arguments.replay(seed));
    if !arguments.no_shrink {
        let shrunk = shrink(seed, profile, failure, arguments.plant());
        println!(
            "smallest world that fails: {} requests, faults {:?}: {}",
            shrunk.profile.operations, shrunk.profile.faults, shrunk.failure
        );
    }
}

fn many(arguments: &Arguments) -> bool {
    let (from, end) = (arguments.from, arguments.from.saturating_add(arguments.seeds));
    println!("seeds {from} to {}", end.saturating_sub(1));
    let (next, done, events) = (AtomicU64::new(from), AtomicU64::new(0), AtomicU64::new(0));
    let failed = AtomicBool::new(false);
    let tally = Mutex::new(Tally::new());
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..arguments.jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let profile = arguments.world(seed);
                    let outcome = run::run(seed, profile.clone(), arguments.plant(), false);
                    events.fetch_add(outcome.events, Ordering::Relaxed);
                    if let Ok(mut tally) = tally.lock() {
                        for (what, count) in outcome.tally {
                            *tally.entry(what).or_default() += count;
                        }
                    }
                    if let Some(failure) = outcome.failure {
                        failed.store(true, Ordering::Relaxed);
                        report(arguments, seed, profile, failure);
                    }
                    let count = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if count.is_multiple_of(500) {
                        let seconds = started.elapsed().as_secs();
                        println!("{count} seeds in {seconds} s");
                    }
                }
            });
        }
    });
    for (what, count) in tally.into_inner().unwrap_or_default() {
        println!("{count:>12} {what}");
    }
    let (count, elapsed) = (done.into_inner(), started.elapsed());
    let each = elapsed.as_millis() * u128::from(arguments.jobs) / u128::from(count.max(1));
    println!(
        "{count} seeds, {} events, {} s, {each} ms of one core each: {}",
        events.into_inner(),
        elapsed.as_secs(),
        if failed.load(Ordering::Relaxed) { "FAILED" } else { "clean" }
    );
    !failed.into_inner()
}
