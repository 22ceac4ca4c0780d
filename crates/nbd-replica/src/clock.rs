//! The clock that leases are measured by.

use nbd_consensus::Timestamp;
use rustix::time::{ClockId, clock_gettime};

/// The time since the machine started, suspended time included (CLOCK_BOOTTIME): a leader that
/// slept through its lease must not wake up believing in it. Costs some 30 ns.
pub(crate) fn now() -> Timestamp {
    let time = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    Timestamp(seconds * 1_000_000_000 + nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_moves_forward() {
        let before = now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(now().0 - before.0 >= 2_000_000);
    }
}
