//! One world from beginning to end.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::failure::{Breach, Failure};
use crate::plant::Plant;
use crate::profile::Profile;
use crate::time::SimTime;
use crate::world::{Tally, World};

/// What came of a world.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Stands for everything that happened: the same seed gives the same.
    pub trace_hash: u64,
    /// Events.
    pub events: u64,
    /// Requests of clients.
    pub operations: usize,
    /// How long it lasted.
    pub lasted: SimTime,
    /// What broke.
    pub failure: Option<Failure>,
    /// How often what happened.
    pub tally: Tally,
    /// Everything that happened as text, if asked for.
    pub lines: Vec<String>,
}

/// Lives through the world of a seed.
#[must_use]
pub fn run(seed: u64, profile: Profile, plant: Plant, with_text: bool) -> Outcome {
    let mut world = World::new(seed, profile, plant, with_text);
    let failure = match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(failure) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            let breach = Breach::Panicked(text.unwrap_or_default());
            Some(Failure { at: world.now(), breach })
        }
    };
    Outcome {
        trace_hash: world.trace().hash(),
        events: world.trace().events(),
        operations: world.history().operations().len(),
        lasted: world.now(),
        failure,
        tally: world.tally().clone(),
        lines: world.trace().lines().to_vec(),
    }
}
