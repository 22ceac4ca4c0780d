//! Several replicas together, with every promise checked at every step.

#[cfg(feature = "planted-faults")]
mod faults;
mod harness;
mod leases;
mod membership;
mod random;
mod replication;
