//! A checker that has never seen a mistake proves nothing: each rule is broken on purpose here, and
//! the simulation must notice, by itself, within a thousand seeds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nbd_sim::plant::Plant;
use nbd_sim::profile::Profile;
use nbd_sim::run::run;

/// The profile that looks closest at the rule, by the name of the mistake.
const CASES: [(&str, &str); 19] = [
    ("ack-before-persist", "elections"),
    ("deleted-chunks-kept", "volumes"),
    ("epoch-at-admission-only", "sessions"),
    ("lease-not-checked-after-read", "pauses"),
    ("lease-overlong", "leases"),
    ("log-freed-before-sync", "log"),
    ("no-result-window", "sessions"),
    ("no-wait-after-restart", "corner"),
    ("overtaken-transfer-taken", "transfers"),
    ("partial-block-in-place", "checkpoints"),
    ("partial-read-restarted", "sessions"),
    ("persisted-without-payload", "elections"),
    ("replay-reordered", "sessions"),
    ("replay-without-resume", "sessions"),
    ("shrunk-bytes-kept", "volumes"),
    ("slot-reused-early", "checkpoints"),
    ("stale-reply-forwarded", "sessions"),
    ("vote-before-persist", "elections"),
    ("vote-inside-lease", "cut"),
];
/// Of that profile, of which one must fail.
const SEEDS: u64 = 1000;

#[test]
fn every_mistake_is_looked_for() {
    let mut covered: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
    covered.sort_unstable();
    let mut all: Vec<_> = Plant::ALL.iter().map(|(name, _)| *name).collect();
    all.sort_unstable();
    assert_eq!(covered, all);
}

#[test]
fn every_mistake_made_on_purpose_is_noticed() {
    // A world that breaks may say so by failing an assertion of the product.
    std::panic::set_hook(Box::new(|_| ()));
    let mut missed = Vec::new();
    for (name, profile) in CASES {
        let (_, plant) = Plant::ALL.into_iter().find(|(of, _)| *of == name).expect("it is listed");
        let draw = |seed| Profile::named(profile, seed).expect("it is a profile");
        let Some((seed, failure)) = first_failure(plant, draw) else {
            missed.push(format!("{name}: {SEEDS} seeds of {profile} saw nothing"));
            continue;
        };
        let what = failure.lines().next().unwrap_or_default();
        println!("{name}: seed {seed} of {profile} fails {what}");
        // It is the mistake that fails, not the world.
        if let Some(failure) = run(seed, draw(seed), Plant::Nothing, false).failure {
            missed.push(format!("{name}: seed {seed} of {profile} fails without it: {failure}"));
        }
    }
    _ = std::panic::take_hook();
    assert!(missed.is_empty(), "{missed:#?}");
}

/// A seed that fails with that mistake, of the first [`SEEDS`].
fn first_failure(plant: Plant, draw: impl Fn(u64) -> Profile + Sync) -> Option<(u64, String)> {
    let (next, found) = (AtomicU64::new(1), std::sync::Mutex::new(None));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let done = found.lock().map_or(true, |found| found.is_some());
                    if seed > SEEDS || done {
                        return;
                    }
                    let outcome = run(seed, draw(seed), plant, false);
                    if let Some(failure) = outcome.failure
                        && let Ok(mut found) = found.lock()
                    {
                        found.get_or_insert((seed, failure.to_string()));
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_default()
}
