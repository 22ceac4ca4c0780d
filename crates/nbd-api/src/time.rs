//! Moments.

/// A moment, in JSON as RFC 3339 has it: `2026-01-31T12:00:00.123Z`.
pub type Timestamp = jiff::Timestamp;

/// The moment so many milliseconds after 1970-01-01 00:00 UTC. `None`: 0, which stands for one that
/// is not known, or more than can be.
#[must_use]
pub fn from_millis(millis: u64) -> Option<Timestamp> {
    let millis = i64::try_from(millis).ok().filter(|millis| *millis != 0)?;
    Timestamp::from_millisecond(millis).ok()
}
