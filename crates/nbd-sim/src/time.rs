//! Simulated time, and the clocks that nodes read it by.

use std::fmt;
use std::time::Duration;

/// Nanoseconds since the world began, by the one clock that is right. No node can read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SimTime(pub u64);

/// A span of simulated time, in nanoseconds.
pub type Nanos = u64;

/// One millisecond.
pub const MILLISECOND: Nanos = 1_000_000;

/// One second.
pub const SECOND: Nanos = 1_000 * MILLISECOND;

/// Most that a clock runs fast or slow, in millionths: two of them are then less than 10 % apart,
/// which is what leases are made for.
pub const DRIFT_PPM_MAX: i64 = 47_500;

const MILLION: u128 = 1_000_000;

impl SimTime {
    /// The moment `span` later.
    #[must_use]
    pub const fn plus(self, span: Nanos) -> Self {
        Self(self.0 + span)
    }
}

impl fmt::Display for SimTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / SECOND, self.0 % SECOND / 1_000)
    }
}

/// A node's clock: never goes back, goes on during pauses, starts anywhere and runs at a rate of
/// its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeClock {
    offset: Nanos,
    rate_ppm: i64,
}

impl NodeClock {
    /// A clock that shows `offset` at the beginning and runs fast by `rate_ppm` millionths, slow if
    /// that is negative.
    ///
    /// # Panics
    /// If it drifts by more than [`DRIFT_PPM_MAX`].
    #[must_use]
    pub fn new(offset: Nanos, rate_ppm: i64) -> Self {
        assert!(rate_ppm.abs() <= DRIFT_PPM_MAX, "a drift of {rate_ppm} ppm is out of bounds");
        Self { offset, rate_ppm }
    }

    const fn rate(self) -> u128 {
        (1_000_000 + self.rate_ppm).unsigned_abs() as u128
    }

    /// What it shows.
    #[must_use]
    pub fn read(self, now: SimTime) -> Nanos {
        self.offset + to_nanos(u128::from(now.0) * self.rate() / MILLION)
    }

    /// How long it really takes until it shows `span` more.
    #[must_use]
    pub fn true_span(self, span: Duration) -> Nanos {
        to_nanos(span.as_nanos() * MILLION / self.rate())
    }
}

fn to_nanos(value: u128) -> Nanos {
    Nanos::try_from(value).expect("a world does not last for centuries")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_clock_shows_more_and_its_ticks_are_shorter() {
        let fast = NodeClock::new(7, 40_000);
        assert_eq!(fast.read(SimTime(0)), 7);
        assert_eq!(fast.read(SimTime(SECOND)), 7 + 1_040 * MILLISECOND);
        let tick = fast.true_span(Duration::from_millis(26));
        assert_eq!(tick, 25 * MILLISECOND);
    }

    #[test]
    fn any_two_clocks_are_less_than_a_tenth_apart() {
        let slow = NodeClock::new(0, -DRIFT_PPM_MAX).read(SimTime(SECOND));
        let fast = NodeClock::new(0, DRIFT_PPM_MAX).read(SimTime(SECOND));
        assert!(fast * 10 <= slow * 11, "{fast} and {slow}");
    }
}
