//! Waiting until something is so, with a deadline.

use std::thread;
use std::time::{Duration, Instant};

/// Time in which all must be well again, whatever was. Far above what it takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Waits until `look` succeeds.
///
/// # Errors
/// It does not in time: what it said last.
pub(crate) fn wait_for<T>(
    what: &str,
    mut look: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        match look() {
            Err(error) if started.elapsed() > DEADLINE => {
                return Err(error.context(format!("waited {DEADLINE:?} for {what}")));
            }
            Err(_) => thread::sleep(LOOK_AGAIN),
            found => return found,
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn waiting_ends_when_it_is_so() {
        let mut looks = 0;
        let third = wait_for("the third look", || {
            looks += 1;
            if looks < 3 { bail!("not yet") } else { Ok(looks) }
        });
        assert_eq!(third.unwrap(), 3);
    }
}
