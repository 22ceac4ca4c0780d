//! A bound on bytes a second.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Time for which unused rate is kept: a burst is at most this long at full rate.
const BURST: Duration = Duration::from_millis(250);

/// A token bucket in bytes, shared by all who are to stay within it together.
#[derive(Debug)]
pub(crate) struct Throttle {
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    bytes_per_second: u64,
    /// When everything taken so far is paid for.
    paid_until: Option<Instant>,
}

impl Throttle {
    /// A bound of `bytes_per_second`; 0: none.
    pub(crate) const fn new(bytes_per_second: u64) -> Self {
        let bucket = Bucket { bytes_per_second, paid_until: None };
        Self { bucket: Mutex::new(bucket) }
    }

    /// Takes `bytes`, after waiting for those taken before. A large piece is let through and paid
    /// for by whoever comes next.
    pub(crate) async fn take(&self, bytes: u64) {
        let now = Instant::now();
        let from = self.bucket.lock().take(now, bytes);
        if from > now {
            tokio::time::sleep_until(from.into()).await;
        }
    }
}

impl Bucket {
    /// When these bytes may go.
    fn take(&mut self, now: Instant, bytes: u64) -> Instant {
        if self.bytes_per_second == 0 {
            return now;
        }
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = self.paid_until.map_or(earliest, |paid| paid.max(earliest));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // So far ahead that nobody waits that long for bytes that can be sent.
        self.paid_until = Some(from.checked_add(cost).unwrap_or(from));
        from.max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_time_and_a_pause_buys_a_short_burst() {
        let start = Instant::now();
        let mut bucket = Bucket { bytes_per_second: 1000, paid_until: None };
        let mut now = start;
        for _ in 0..40 {
            now = bucket.take(now, 100);
        }
        let elapsed = now - start;
        assert!((3600..=3900).contains(&elapsed.as_millis()), "{elapsed:?}");
        let later = now + Duration::from_secs(60);
        let burst = (0..40).filter(|_| bucket.take(later, 100) == later).count();
        assert_eq!(burst, 3, "250 ms at 1000 bytes a second");
    }

    #[test]
    fn without_a_bound_nobody_waits() {
        let now = Instant::now();
        let mut bucket = Bucket { bytes_per_second: 0, paid_until: None };
        assert_eq!([bucket.take(now, u64::MAX), bucket.take(now, u64::MAX)], [now, now]);
    }
}
