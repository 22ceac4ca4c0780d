//! The shard's consensus group as a pure step function.
//!
//! Nothing here reads a clock, a socket or a file, nor a random source other than raft-rs's
//! election jitter, which [`GroupConfig::election_ticks_jitter`] switches off. The caller steps
//! [`Input`]s and carries out [`Effects`]. It is the only crate that sees `raft`: its log is
//! (index, term, bytes) to everyone else.
//!
//! ```text
//!                              ┌─────────┐ ──▶ send_now                     transport
//!  Tick, Message, Propose ───▶ │         │ ──▶ appends ─▶ log thread ─▶ Persisted(n) stepped
//!  Persisted(n), Applied(i) ─▶ │  Group  │                    then ──▶ send_after_persist
//!  Read, Compacted(i) ───────▶ │         │ ──▶ apply ──▶ state machine ─▶ Applied(i) stepped
//!                              └─────────┘ ──▶ rejected, reads_ready       waiting requests
//! ```
//!
//! **Durability rule**: what an append response or a vote promises is on stable storage before it
//! leaves. So [`Append::send_after_persist`] waits for its append, and entries are handed out to be
//! applied only when they are durable here as well as on a majority.
//!
//! **Cost rule**: a batch of proposals costs one append. That the commit index moved is not worth a
//! write of its own: it rides with the next append, and whoever needs it sooner, the checkpoint,
//! takes [`Group::hard_state`] along.
//!
//! **Voting rule**: a replica gives no vote, not even to itself, for an election timeout after it
//! heard from a leader, unless the leader asked for it by handing over, nor for one after a
//! restart. That is what a leader's lease rests on ([`Group::read_lease`]), and it holds whatever
//! connections say: a broken one ([`Input::LeaderLost`]) only takes the random part out of the
//! wait.
//!
//! **Membership** changes one replica at a time and is in force when its entry is handed out to be
//! applied. A newcomer is a learner first.
//!
//! **Snapshots** are offers: a leader whose log no longer reaches back far enough says up to which
//! entry it has a checkpoint ([`Effects::snapshot_offered`]), and the contents travel by other
//! means.
//!
//! The feature `planted-faults` lets tests break some of these rules one by one.
//!
//! Start at [`Group::step`]; the invariants are in its `check_invariants`.
//!
//! - [`config`]: [`GroupConfig`] and [`Recovered`], what a group starts from.
//! - [`input`], [`effect`]: the vocabulary of a step.
//! - [`group`]: the owner of the state. It drives raft-rs's asynchronous ready cycle.
//! - `log_cache`: the log as raft-rs reads it. `readies`: appends under way. `proposals`: tickets
//!   until their index is committed. `reads`: rounds of heartbeats. `lease`, `watch`: what ticks
//!   and rounds allow. `membership`: changes in the log.
//! - `guard`: what is refused from peers. `codec`: raft-rs's types to and from ours and bytes.
//! - [`error`], [`limits`].

pub mod config;
pub mod effect;
pub mod error;
pub mod group;
pub mod input;
pub mod limits;

mod codec;
mod fault;
mod guard;
mod lease;
mod log_cache;
mod logger;
mod membership;
mod proposals;
mod readies;
mod reads;
mod watch;

pub use config::{GroupConfig, ReadMode, Recovered};
pub use effect::{
    Append, Brief, Committed, Effects, Fetch, HardState, Leadership, OutMessage, PeerStatus,
    RejectReason, Role, SnapshotOffer, Status,
};
pub use error::{GroupError, MessageError};
#[cfg(feature = "planted-faults")]
pub use fault::Fault;
pub use group::Group;
pub use input::{Entry, EntryKind, Input, Proposal, ReadyNumber, Ticket, Timestamp};
pub use membership::decode_change;
