//! A whole cluster in one thread from one seed.

pub mod content;
pub mod failure;
pub mod history;
pub mod ledger;
pub mod linear;
pub mod network;
pub mod plant;
pub mod profile;
pub mod random;
pub mod run;
pub mod schedule;
pub mod shrink;
pub mod time;
pub mod trace;
pub mod world;
