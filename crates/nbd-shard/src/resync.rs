//! The steps of a resync, without I/O: what to do next, given what came of the last step.
//!
//! ```text
//!  Checkpoint ─▶ Snapshot ─▶ Page ─▶ Fetch ─▶ Remove ─┬─▶ Page ...      until the last page
//!                  ▲  ▲                               ▼
//!                  │  └────── took long: again ── Compare ...            against A's digests
//!                  │                                  ├─▶ Fetch ─▶ Compare   what differs
//!                  └── differs after all rounds ──────┤
//!                                                     ▼
//!                                      Ready ─▶ (the group) ─▶ Install ─▶ done
//! ```
//!
//! `compare`: what digests say.
//!
//! Nothing is kept of an interrupted resync but what is in the store: whoever starts over is told
//! by the manifest what there should be, skips what is there, and goes on with the rest.

mod compare;

use std::time::Duration;

use nbd_store::{ChunkKey, ChunkRun, ChunkStamp, ShardSnapshot};
use nbd_topology::LogIndex;

pub use self::compare::{Unfinished, digest_range_from, unequal_ranges, unfinished};

/// A pass over the manifest that took longer is followed by another one, over what changed
/// meanwhile: so that the log behind the snapshot is short when it takes over.
const PASS_SHORT: Duration = Duration::from_secs(5);

/// Passes at most. A node that cannot catch up in so many has a source that writes faster than it
/// may fetch; the log then decides.
const PASSES_MAX: u32 = 8;

/// Times that chunks found to differ are fetched again before everything starts over.
const ROUNDS_MAX: u32 = 3;

/// Chunks found to differ that are kept for the next round; with more, everything starts over.
const DIFFERING_MAX: usize = 65_536;

/// Chunks asked for at a time: 64 MiB if they are full.
const FETCH_CHUNKS_MAX: usize = 1024;

/// Failures in a row after which the snapshot is asked for anew: the source may have moved on.
const FAILURES_MAX: u32 = 4;

/// The first wait after a failure; doubled by each further one.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// The longest wait after a failure.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// The next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Want {
    /// Bring home what was applied here, and say up to where.
    Checkpoint,
    /// Ask the source for its snapshot; chunks that changed since this entry are wanted.
    Snapshot {
        /// What is home here.
        since: LogIndex,
    },
    /// Ask for a page of the manifest.
    Page {
        /// Chunks that changed behind this entry are listed one by one.
        since: LogIndex,
        /// The page begins behind this chunk; `None`: with the first.
        after: Option<ChunkKey>,
    },
    /// Fetch these chunks, of a source that covers entries up to `upto`, and store them, but for
    /// those that are here in this version.
    Fetch {
        /// Which, and in which version.
        chunks: Vec<ChunkStamp>,
        /// What the source covers.
        upto: LogIndex,
    },
    /// Fetch these chunks and store them whatever is here.
    Refetch {
        /// Which.
        chunks: Vec<ChunkKey>,
        /// What the source covers.
        upto: LogIndex,
    },
    /// Remove what the source does not have.
    Remove(Absent),
    /// Compare a page of digests, of what entries up to `upto` made.
    Compare {
        /// The page begins behind the range that this chunk begins; `None`: with the first.
        after: Option<ChunkKey>,
        /// What the source covers.
        upto: LogIndex,
    },
    /// Tell the group that everything is here.
    Ready(Box<ShardSnapshot>),
    /// Do nothing for a while.
    Pause(Duration),
}

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Got {
    /// Everything up to this entry is home.
    Checkpoint {
        /// That entry.
        applied: LogIndex,
    },
    /// The source's snapshot.
    Snapshot {
        /// As of its checkpoint.
        snapshot: Box<ShardSnapshot>,
    },
    /// A page of the manifest.
    Page {
        /// Chunks that changed.
        chunks: Vec<ChunkStamp>,
        /// All chunks that there are within the page.
        present: Vec<ChunkRun>,
        /// The last chunk of the page; `None`: there are no more.
        next: Option<ChunkKey>,
    },
    /// The chunks are in the store.
    Stored,
    /// What the source does not have is gone.
    Removed,
    /// A page was compared.
    Compared {
        /// Chunks that are not as at the source.
        differing: Vec<ChunkKey>,
        /// There are chunks here that the source does not have.
        stale: bool,
        /// Where the next page begins; `None`: all were compared.
        next: Option<ChunkKey>,
    },
    /// The group has been told.
    Told,
    /// The time has passed.
    Paused,
    /// The step failed, and may succeed another time.
    Failed,
}

/// Which chunks a peer has of those with keys in `(after, next]`; `None`: from the first, to the
/// last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absent {
    /// An entry that the peer's list covers.
    pub upto: LogIndex,
    /// Where the list begins.
    pub after: Option<ChunkKey>,
    /// Where it ends.
    pub next: Option<ChunkKey>,
    /// The chunks that the peer has.
    pub present: Vec<ChunkRun>,
}

/// Where a resync stands.
#[derive(Debug)]
pub struct Resync {
    state: State,
    pass: u32,
    pass_began: Duration,
    round: u32,
    failures: u32,
}

#[derive(Debug)]
enum State {
    Start,
    Asking { since: LogIndex },
    Walking(Walk),
    Comparing(Comparison),
    Told,
}

/// A pass over the manifest.
#[derive(Debug)]
struct Walk {
    snapshot: Box<ShardSnapshot>,
    since: LogIndex,
    after: Option<ChunkKey>,
    /// The page in hand: chunks not fetched yet, and what is to be removed behind them.
    page: Option<(Vec<ChunkStamp>, Absent)>,
}

/// A pass over the digests.
#[derive(Debug)]
struct Comparison {
    snapshot: Box<ShardSnapshot>,
    after: Option<ChunkKey>,
    differing: Vec<ChunkKey>,
    stale: bool,
    /// What differed, while it is being fetched again.
    refetch: Vec<ChunkKey>,
    /// All is as it should be.
    verified: bool,
}

impl Comparison {
    fn new(snapshot: Box<ShardSnapshot>) -> Self {
        let (differing, refetch) = (Vec::new(), Vec::new());
        Self { snapshot, after: None, differing, stale: false, refetch, verified: false }
    }
}

impl Default for Resync {
    fn default() -> Self {
        Self::new()
    }
}

impl Resync {
    /// A resync to be begun.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: State::Start, pass: 0, pass_began: Duration::ZERO, round: 0, failures: 0 }
    }

    /// Whether the group has been told and decides what follows.
    #[must_use]
    pub const fn is_told(&self) -> bool {
        matches!(self.state, State::Told)
    }

    /// Another peer is the source from now on. What is in the store stays of use.
    pub fn source_changed(&mut self) {
        *self = Self::new();
    }

    /// The step to begin with.
    #[must_use]
    pub fn begin(&self) -> Want {
        self.want()
    }

    /// Takes what came of the last step, at the time `now` since anything; gives the next one.
    pub fn step(&mut self, now: Duration, got: Got) -> Want {
        match got {
            Got::Failed => return self.failed(),
            Got::Paused => return self.want(),
            _ => self.failures = 0,
        }
        let state = std::mem::replace(&mut self.state, State::Start);
        self.state = match (state, got) {
            (State::Start, Got::Checkpoint { applied }) => State::Asking { since: applied },
            (State::Asking { since }, Got::Snapshot { snapshot }) => {
                self.pass += 1;
                self.pass_began = now;
                State::Walking(Walk { snapshot, since, after: None, page: None })
            }
            (State::Walking(walk), got) => self.walk(now, walk, got),
            (State::Comparing(comparison), got) => self.compare(comparison, got),
            (_, Got::Told) => State::Told,
            // An answer to a question that was given up.
            (state, _) => state,
        };
        self.want()
    }

    fn walk(&self, now: Duration, mut walk: Walk, got: Got) -> State {
        match got {
            Got::Page { chunks, present, next } => {
                let upto = walk.snapshot.applied;
                let absent = Absent { upto, after: walk.after, next, present };
                walk.page = Some((chunks, absent));
                State::Walking(walk)
            }
            Got::Stored => {
                if let Some((chunks, _)) = &mut walk.page {
                    chunks.drain(..chunks.len().min(FETCH_CHUNKS_MAX));
                }
                State::Walking(walk)
            }
            Got::Removed => {
                let next = walk.page.take().and_then(|(_, absent)| absent.next);
                walk.after = next;
                if next.is_some() {
                    return State::Walking(walk);
                }
                let elapsed = now.saturating_sub(self.pass_began);
                if elapsed > PASS_SHORT && self.pass < PASSES_MAX {
                    return State::Asking { since: walk.snapshot.applied };
                }
                State::Comparing(Comparison::new(walk.snapshot))
            }
            _ => State::Walking(walk),
        }
    }

    fn compare(&mut self, mut at: Comparison, got: Got) -> State {
        match got {
            Got::Compared { differing, stale, next } => {
                at.differing.extend(differing);
                at.stale |= stale;
                at.after = next;
                if next.is_some() && at.differing.len() <= DIFFERING_MAX {
                    return State::Comparing(at);
                }
                self.judge(at)
            }
            Got::Stored => {
                at.refetch.drain(..at.refetch.len().min(FETCH_CHUNKS_MAX));
                State::Comparing(at)
            }
            Got::Told => State::Told,
            _ => State::Comparing(at),
        }
    }

    /// All digests were compared.
    fn judge(&mut self, at: Comparison) -> State {
        if at.differing.is_empty() && !at.stale {
            return State::Comparing(Comparison { verified: true, ..at });
        }
        self.round += 1;
        if self.round > ROUNDS_MAX || at.differing.len() > DIFFERING_MAX {
            // As if nothing were here.
            (self.round, self.pass) = (0, 0);
            return State::Asking { since: LogIndex::ZERO };
        }
        if at.stale {
            // Another pass removes them, and fetches what else differs in the end.
            return State::Asking { since: at.snapshot.applied };
        }
        State::Comparing(Comparison { refetch: at.differing, ..Comparison::new(at.snapshot) })
    }

    fn failed(&mut self) -> Want {
        self.failures += 1;
        if self.failures.is_multiple_of(FAILURES_MAX) {
            // The checkpoint too: what was fetched may have been applied meanwhile.
            let failures = self.failures;
            *self = Self { failures, ..Self::new() };
        }
        let doublings = (self.failures - 1).min(16);
        Want::Pause((PAUSE_MIN * 2_u32.pow(doublings)).min(PAUSE_MAX))
    }

    fn want(&self) -> Want {
        match &self.state {
            State::Start => Want::Checkpoint,
            State::Asking { since } => Want::Snapshot { since: *since },
            State::Walking(walk) => match &walk.page {
                None => Want::Page { since: walk.since, after: walk.after },
                Some((chunks, absent)) if chunks.is_empty() => Want::Remove(absent.clone()),
                Some((chunks, _)) => {
                    let chunks = chunks[..chunks.len().min(FETCH_CHUNKS_MAX)].to_vec();
                    Want::Fetch { chunks, upto: walk.snapshot.applied }
                }
            },
            State::Comparing(at) if at.verified => Want::Ready(at.snapshot.clone()),
            State::Comparing(at) if !at.refetch.is_empty() => {
                let chunks = at.refetch[..at.refetch.len().min(FETCH_CHUNKS_MAX)].to_vec();
                Want::Refetch { chunks, upto: at.snapshot.applied }
            }
            State::Comparing(at) => Want::Compare { after: at.after, upto: at.snapshot.applied },
            State::Told => Want::Pause(PAUSE_MAX),
        }
    }
}

#[cfg(test)]
mod tests;
