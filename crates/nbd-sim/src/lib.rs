//! A whole cluster in one thread from one seed.

pub mod history;
pub mod linear;
pub mod random;
pub mod schedule;
pub mod time;
pub mod trace;
