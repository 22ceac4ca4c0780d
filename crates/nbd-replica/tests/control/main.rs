//! What the control API asks of replicas, by gRPC, of three real processes.
//!
//! [`volumes`]: the life of volumes, also while the leader is lost. [`sessions`]: who is attached,
//! what they move, and how they are ended. [`nodes`]: cordoned nodes, replaced replicas.
//! [`support`]: the caller.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod nodes;
mod sessions;
mod support;
mod volumes;
