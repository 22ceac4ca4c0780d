//! One replica of a shard as a pure step function: consensus, state machine, proposals and reads.
//!
//! It joins [`nbd_consensus::Group`] and [`nbd_store::ShardWriter`], and knows of their clocks,
//! sockets, threads and disks only what it is told. The replica service steps it from a task, the
//! simulation from its scheduler; both run the same code.
//!
//! ```text
//!  Propose, Barrier ──────▶ ┌──────────────┐ ──▶ log_writes   log thread ──▶ Persisted stepped
//!  Message, Tick ─────────▶ │ ShardReplica │ ──▶ send         transport
//!  Persisted, Fetched ────▶ │   Group      │ ──▶ answers      sessions, health
//!  Checkpointed, ReadBack ▶ │   writer     │ ──▶ fetch, ...   log reader ──▶ Fetched, ReadBack
//!  ResyncReady, Installed ▶ └──────────────┘ ──▶ install      checkpoint thread ──▶ Installed
//! ```
//!
//! **Invariants.** What is committed is applied within the same step, in order. A message that
//! promises durability is handed out only after the [`Persisted`] of its append was stepped. Each
//! thing asked for is answered once, unless the replica is dropped.
//!
//! - [`replica`]: the owner of the state. [`event`]: the vocabulary. [`log_write`]: what goes to
//!   the node's log. [`resync`]: the steps of fetching what a leader's log no longer holds.
//! - `recovered`: from what the store found to a running group. `places`: where entries lie in the
//!   node's log. `packer`: small commands share an entry.
//! - [`limits`]: every bound, by name.

pub mod event;
pub mod limits;
pub mod log_write;
pub mod replica;
pub mod resync;

mod packer;
mod places;
mod recovered;

pub use event::{Actions, Answer, Checkpointed, Event, FetchPlan, InstallPlan, LogTail, Persisted};
pub use log_write::LogWrite;
pub use recovered::{log_kind, raft_kind};
pub use replica::ShardReplica;
