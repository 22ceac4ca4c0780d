//! One shard's state machine: what its log entries have made of its volumes.
//!
//! ```text
//!               ShardWriter::apply (one thread)
//!                     │
//!   ┌───────── state (one lock) ─────────┐
//!   │ active overlay   since the freeze  │ ◀── resolve: newest layer that knows the block
//!   │ frozen overlay   being written home│
//!   │ sessions, volumes, counter, pin    │
//!   └────────────────────────────────────┘
//!     base: chunks at home (shared by all shards of the node, see `chunk`)
//! ```
//!
//! - [`state`]: applying commands; the verdict comes from the log alone.
//! - [`catalogue`], [`sessions`]: which volumes there are, and who is attached to them.
//! - [`session`]: each mutation of a session counts once.
//! - [`reader`]: lookups and [`reader::ShardReader::resolve`].
//! - [`plan`]: [`plan::ReadPlan`], which fetches and verifies without the lock.
//! - [`list`]: volumes, page by page.
//! - [`status`]: which ranges are holes or zeroes.
//! - [`pins`]: when nobody reads a place any more.
//!
//! **Invariant.** The lock is never held across I/O, and only the writer and the checkpointer take
//! it for writing.

pub(crate) mod catalogue;
pub(crate) mod list;
pub(crate) mod pins;
pub(crate) mod plan;
pub(crate) mod reader;
pub(crate) mod session;
pub(crate) mod sessions;
mod source;
pub(crate) mod state;
pub(crate) mod status;

use std::sync::Arc;

use bytes::Bytes;
use nbd_log::log::{LogPosition, LogReader};
use nbd_topology::{LogIndex, Membership, MembershipChange, ShardId, Term};
use parking_lot::RwLock;

use self::state::ShardState;
use crate::chunk::Base;
use crate::dirty::DirtyLog;
use crate::outcome::Outcome;
use crate::space::SpaceGauge;

/// What the writer, the readers and the checkpointer of a shard share.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) id: ShardId,
    pub(crate) state: RwLock<ShardState>,
    pub(crate) base: Arc<Base>,
    pub(crate) log: LogReader,
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) dirty: Arc<DirtyLog>,
}

/// What a committed entry asks for.
#[derive(Debug, Clone, Copy)]
pub enum Applied<'a> {
    /// These commands.
    Command(&'a Bytes),
    /// A change of the group's membership.
    Membership(MembershipChange),
    /// Nothing: a new leader's first entry, or one without effect.
    Empty,
}

impl Applied<'_> {
    /// Bytes of log that are known to belong to the entry.
    const fn data_len(self) -> u64 {
        match self {
            Self::Command(data) => data.len() as u64,
            Self::Membership(_) | Self::Empty => 0,
        }
    }
}

/// Applies a shard's committed entries, in order. There is one for each shard.
#[derive(Debug)]
pub struct ShardWriter {
    shard: Arc<Shard>,
}

impl ShardWriter {
    pub(crate) const fn new(shard: Arc<Shard>) -> Self {
        Self { shard }
    }

    /// Applies the entry at `index`, whose data begins at `data_position` in the log, and returns
    /// one outcome for each of its commands. No I/O, about a microsecond for a 4 KiB write.
    ///
    /// When the data is malformed, the outcome for the bad command is the last.
    ///
    /// # Panics
    /// If `index` does not follow the last one applied: consensus hands out entries in order.
    pub fn apply(
        &mut self,
        index: LogIndex,
        term: Term,
        entry: Applied<'_>,
        data_position: LogPosition,
    ) -> Vec<Outcome> {
        let mut state = self.shard.state.write();
        let pending_before = state.active.pending_chunks();
        let outcomes = state.apply(index, term, entry, data_position);
        let pending = state.active.pending_chunks();
        let has_cleared = state.active.has_cleared();
        // Before the lock is let go: a freeze must not come between the change and its count.
        self.shard.space.pending_changed(pending_before, pending);
        if has_cleared {
            self.shard.space.set_cleared(true);
        }
        drop(state);
        self.shard.dirty.advance(data_position.plus(entry.data_len()));
        outcomes
    }

    /// The group's members as of the last entry applied.
    #[must_use]
    pub fn membership(&self) -> Membership {
        self.shard.state.read().metadata.members.membership.clone()
    }

    /// The last entry applied.
    #[must_use]
    pub fn applied(&self) -> LogIndex {
        self.shard.state.read().metadata.applied
    }
}
