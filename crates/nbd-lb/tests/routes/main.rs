//! The load balancer and replicas as processes: who leads, found and kept up with.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod finding;
mod health;
mod support;
