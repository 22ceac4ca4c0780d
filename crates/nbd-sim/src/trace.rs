//! What happened, in brief: a hash that two runs of one seed must share, and text on demand.

use std::fmt::Debug;
use std::hash::{Hash, Hasher};

use crate::time::SimTime;

/// Lines kept for the report of a failure.
const LINES_MAX: usize = 400_000;

/// A record of everything that happened. Each event is hashed; as text it is only kept if asked
/// for.
#[derive(Debug)]
pub struct Trace {
    hasher: Fnv,
    events: u64,
    lines: Option<Vec<String>>,
}

/// Fowler-Noll-Vo: the same on every run, unlike the standard library's.
#[derive(Debug)]
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn write_u64(&mut self, value: u64) {
        // A whole word at a time: the trace must not be what a simulation spends its time on.
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

impl Trace {
    /// An empty trace; `with_text` keeps its events to be printed.
    #[must_use]
    pub fn new(with_text: bool) -> Self {
        let lines = with_text.then(Vec::new);
        Self { hasher: Fnv(0xcbf2_9ce4_8422_2325), events: 0, lines }
    }

    /// Notes an event.
    pub fn note<E: Hash + Debug>(&mut self, now: SimTime, event: &E) {
        self.events += 1;
        self.hasher.write_u64(now.0);
        event.hash(&mut self.hasher);
        if let Some(lines) = &mut self.lines
            && lines.len() < LINES_MAX
        {
            lines.push(format!("{now} {event:?}"));
        }
    }

    /// Stands for everything noted so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    /// Events noted.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.events
    }

    /// The events as text, if kept.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}
