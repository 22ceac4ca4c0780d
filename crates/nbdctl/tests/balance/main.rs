//! `nbdctl balance` in front of real load balancers, and what else the one program of the image is
//! asked to be: `nbdctl probe`, and the services by their names.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod attaching;
mod carrying;
mod process;
mod programs;
