//! Which requests are traced.

/// Decides for each request of a session whether it is traced: by chance, and because somebody has
/// asked for the next ones.
#[derive(Debug, Clone)]
pub struct Sampler {
    /// Whether any request can be picked.
    is_active: bool,
    /// Of 2^64 draws, so many pick a request; `u64::MAX`: all of them.
    threshold: u64,
    /// Of the generator; never 0.
    state: u64,
    /// Requests still to be picked because they were asked for.
    wanted: u32,
    is_on: bool,
}

/// Of 2^64 draws, how many a ratio stands for.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a ratio from 0 to 1, and chance needs no last digit"
)]
pub(super) fn threshold(ratio: f64) -> u64 {
    (ratio * u64::MAX as f64) as u64
}

impl Sampler {
    /// With the threshold of a tracer; `None` of one that makes no spans.
    pub(super) fn new(threshold: Option<u64>) -> Self {
        let is_on = threshold.is_some();
        let threshold = threshold.unwrap_or(0);
        let state = rand::random::<u64>() | 1;
        Self { is_active: threshold > 0, threshold, state, wanted: 0, is_on }
    }

    /// Whether the next request is traced.
    pub const fn take(&mut self) -> bool {
        self.is_active && self.draw()
    }

    const fn draw(&mut self) -> bool {
        if self.wanted > 0 {
            self.wanted -= 1;
            self.is_active = self.wanted > 0 || self.threshold > 0;
            return true;
        }
        // xorshift64: a few instructions, and good enough to be in step with nothing.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state <= self.threshold
    }

    /// Traces the next `count` requests, whatever chance says; nothing if no spans are made.
    pub fn want(&mut self, count: u32) {
        if self.is_on && count > 0 {
            self.wanted = self.wanted.max(count);
            self.is_active = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(sampler: &mut Sampler, of: u32) -> u32 {
        (0..of).map(|_| u32::from(sampler.take())).sum()
    }

    #[test]
    fn chance_picks_the_share_asked_for() {
        let mut all = Sampler::new(Some(threshold(1.0)));
        assert_eq!(picked(&mut all, 1000), 1000);
        let mut none = Sampler::new(Some(threshold(0.0)));
        assert_eq!(picked(&mut none, 100_000), 0);
        let mut few = Sampler::new(Some(threshold(0.01)));
        let count = picked(&mut few, 1_000_000);
        // Ten standard deviations.
        assert!((9_000..11_000).contains(&count), "{count}");
    }

    #[test]
    fn requests_that_are_asked_for_are_picked_once() {
        let mut sampler = Sampler::new(Some(threshold(0.0)));
        sampler.want(3);
        assert_eq!(picked(&mut sampler, 100), 3);
        // Two people who ask for the same requests get the same.
        sampler.want(3);
        sampler.want(2);
        assert_eq!(picked(&mut sampler, 100), 3);
        let mut off = Sampler::new(None);
        off.want(3);
        assert_eq!(picked(&mut off, 100), 0);
    }
}
