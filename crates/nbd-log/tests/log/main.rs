//! The log through its public interface, on the disk that forgets.
#![expect(clippy::unwrap_used, reason = "clippy excuses test functions, not their helpers")]

mod append;
mod crash;
mod damage;
mod file_disk;
mod golden;
mod model;
mod retention;
mod support;
