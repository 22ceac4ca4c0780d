//! Several replicas together, with every promise checked at every step.

mod harness;
mod random;
mod replication;
