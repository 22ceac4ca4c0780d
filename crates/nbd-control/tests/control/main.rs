//! The control API over HTTP, with replicas that do what the test says: no leader, no answer, a
//! lost answer, every refusal. What real replicas do is tested in `tests/api`.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod access;
mod document;
mod fake;
mod lists;
mod operations;
mod problems;
mod schemathesis;
mod volumes;
