//! One address in front of several load balancers, where the network has none to offer.
//!
//! It moves bytes and knows one thing about NBD: a server speaks first. Whoever greets can serve,
//! and nobody else is given a client: not one that was killed, nor one that is frozen and whose
//! kernel still accepts connections.
//!
//! ```text
//!  client ─▶ app ─▶ choice: who is asked, in which order
//!                     │ race: one after the other, 250 ms apart; the first greeting wins
//!                     ▼
//!                   backend ═══ nbd-splice ═══▶ nbd-lb
//! ```
//!
//! Once a client is given away its bytes are moved until an end ends, and what is behind the
//! handshake is a matter between it and its load balancer. Nothing is kept that could be sent to
//! another one: when a load balancer dies its clients are disconnected, and attach anew.
//!
//! - [`config`]: settings, checked before any socket opens. [`limits`]: bounds and times.
//! - `backend`: one load balancer: its addresses, whether it greets, how many clients it has.
//! - `choice`, `race`: which one gets a client.
//! - [`app`]: starts and stops everything. `http`: `/health`. `metrics`: what is counted.
//! - [`program`]: the whole as a process.

pub mod app;
mod backend;
mod choice;
pub mod config;
mod http;
pub mod limits;
mod metrics;
pub mod program;
mod race;

pub use app::{Balancer, StartError};
pub use config::{Args, Config, InvalidConfig};
