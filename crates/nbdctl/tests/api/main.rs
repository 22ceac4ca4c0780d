//! `nbdctl` as a person and a program use it, against a control API made for it: what it prints
//! (golden files), what it asks for, and how it ends.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod commands;
mod errors;
mod fake;
mod golden;
mod settings;
mod support;
mod terminal;
