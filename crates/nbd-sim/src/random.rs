//! Randomness, all of it from one seed.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::time::Nanos;

/// Streams of random numbers of one world, one for each purpose: that a fault draws one number more
/// then does not change what clients do.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    seed: u64,
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Which faults a world has, and how strong.
    Profile,
    /// Delays and losses on the way.
    Network,
    /// What clients ask for.
    Workload,
    /// When which fault strikes.
    Nemesis,
    /// Delays inside nodes.
    Nodes,
    /// What is left on a disk after a crash.
    Disks,
}

impl Streams {
    /// The streams of a world.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The stream for this purpose, from its beginning.
    #[must_use]
    pub fn of(self, purpose: Purpose) -> StdRng {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&self.seed.to_le_bytes());
        bytes[8] = purpose as u8 + 1;
        StdRng::from_seed(bytes)
    }
}

/// Draws the world needs again and again.
pub trait Draw {
    /// True once in a million times `ppm`.
    fn chance(&mut self, ppm: u32) -> bool;

    /// A span within `least..=most`.
    fn span(&mut self, least: Nanos, most: Nanos) -> Nanos;
}

impl<R: Rng> Draw for R {
    fn chance(&mut self, ppm: u32) -> bool {
        ppm > 0 && self.random_range(0..1_000_000) < ppm
    }

    fn span(&mut self, least: Nanos, most: Nanos) -> Nanos {
        self.random_range(least..=most.max(least))
    }
}
