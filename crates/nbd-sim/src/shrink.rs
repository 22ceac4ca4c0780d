//! The smallest world that still fails.

use crate::failure::Failure;
use crate::plant::Plant;
use crate::profile::Profile;
use crate::run;

/// Worlds tried at most.
const TRIES_MAX: u32 = 60;

/// A smaller world of the same seed that fails too.
#[derive(Debug, Clone)]
pub struct Shrunk {
    /// The world.
    pub profile: Profile,
    /// How it fails; not necessarily as the larger one did.
    pub failure: Failure,
}

/// Takes away kinds of faults, then requests, for as long as something still breaks. A smaller
/// world is another world: it fails for the same reason only as a rule.
#[must_use]
pub fn shrink(seed: u64, profile: Profile, failure: Failure, plant: Plant) -> Shrunk {
    let mut best = Shrunk { profile, failure };
    let mut tries = 0;
    loop {
        let mut smaller = Vec::new();
        for kind in best.profile.faults.keys() {
            let mut profile = best.profile.clone();
            profile.faults.remove(kind);
            smaller.push(profile);
        }
        for (numerator, denominator) in [(1, 2), (3, 4), (9, 10)] {
            let operations = best.profile.operations * numerator / denominator;
            if operations > 0 && operations < best.profile.operations {
                smaller.push(Profile { operations, ..best.profile.clone() });
            }
        }
        let found = smaller.into_iter().find_map(|profile| {
            tries += 1;
            if tries > TRIES_MAX {
                return None;
            }
            let failure = run::run(seed, profile.clone(), plant, false).failure?;
            Some(Shrunk { profile, failure })
        });
        match found {
            Some(shrunk) => best = shrunk,
            None => return best,
        }
    }
}
