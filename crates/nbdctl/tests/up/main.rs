//! `nbdctl up` as a person runs it.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod managed;
mod one_process;
mod processes;
mod refusals;
mod shape;
mod support;
