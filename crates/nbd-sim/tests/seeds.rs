//! Whole clusters from fixed seeds: nothing that was promised breaks, and a seed tells all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nbd_sim::plant::Plant;
use nbd_sim::profile::Profile;
use nbd_sim::run::run;

/// As many as a few seconds allow; `cargo xtask sim --seeds N` runs more.
const SEEDS: u64 = 150;
/// Of each named profile.
const SEEDS_OF_PROFILE: u64 = 6;

#[test]
fn the_same_seed_takes_the_same_course() {
    for seed in [1, 7, 42] {
        let once = run(seed, Profile::draw(seed), Plant::Nothing, false);
        let again = run(seed, Profile::draw(seed), Plant::Nothing, false);
        assert!(once.operations > 0 && once.events > 0, "seed {seed}: nothing happened");
        assert_eq!(once.trace_hash, again.trace_hash, "seed {seed}");
        assert_eq!(once.events, again.events, "seed {seed}");
    }
}

#[test]
fn different_seeds_take_different_courses() {
    let traces =
        [1, 2].map(|seed| run(seed, Profile::draw(seed), Plant::Nothing, false).trace_hash);
    assert_ne!(traces[0], traces[1]);
}

#[test]
fn no_seed_breaks_a_promise() {
    all_clean(SEEDS, Profile::draw, "");
}

#[test]
fn no_seed_of_a_named_profile_breaks_a_promise() {
    for name in Profile::NAMES {
        let draw = |seed| Profile::named(name, seed).expect("it is one of the names");
        all_clean(SEEDS_OF_PROFILE, draw, &format!(" --profile {name}"));
    }
}

/// Runs seeds 1 to `seeds` on both cores; a failure says how to see it again.
fn all_clean(seeds: u64, draw: impl Fn(u64) -> Profile + Sync, options: &str) {
    let next = AtomicU64::new(1);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > seeds {
                        return;
                    }
                    let outcome = run(seed, draw(seed), Plant::Nothing, false);
                    if let Some(failure) = outcome.failure {
                        panic!(
                            "seed {seed} fails {failure}\n\
                             replay: cargo xtask sim --seed {seed}{options} --trace"
                        );
                    }
                }
            });
        }
    });
}
