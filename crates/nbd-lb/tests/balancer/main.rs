//! The load balancer and replicas as processes: who leads, found and kept up with, and clients
//! whose connection outlives every replica.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod carrying;
mod finding;
mod health;
mod support;
