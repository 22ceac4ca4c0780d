//! Whether the checks would notice: each mistake that can be planted is caught by a
//! random run, or by a scenario made for it.

use std::panic::catch_unwind;

use nbd_consensus::{Fault, GroupConfig, ReadMode};

use crate::leases;
use crate::random::{Kind, random_run};

/// Seeds to try until the mistake shows.
const SEEDS_MAX: u64 = 20;

fn is_caught(fault: Fault) -> bool {
    let caught = |seed: &u64| {
        let kind = Kind { replicas: 3, moving: false, read_mode: ReadMode::Lease };
        catch_unwind(|| random_run(kind, *seed, move |config| config.fault = Some(fault))).is_err()
    };
    let seed = (0..SEEDS_MAX).find(caught);
    println!("{fault:?} is caught by seed {seed:?}");
    seed.is_some()
}

#[test]
fn votes_before_they_are_durable() {
    assert!(is_caught(Fault::VoteBeforePersist));
}

#[test]
fn acknowledgements_before_they_are_durable() {
    assert!(is_caught(Fault::AppendAckBeforePersist));
}

#[test]
fn votes_right_after_a_restart() {
    let fault = |config: &mut GroupConfig| config.fault = Some(Fault::NoWaitAfterRestart);
    assert!(catch_unwind(|| leases::restart_inside_a_lease(fault)).is_err());
}

#[test]
fn votes_inside_a_lease() {
    let fault = |config: &mut GroupConfig| config.fault = Some(Fault::VoteInsideLease);
    assert!(catch_unwind(|| leases::connections_break(fault)).is_err());
}

#[test]
fn leases_that_last_too_long() {
    let fault = |config: &mut GroupConfig| config.fault = Some(Fault::LeaseOverlong);
    assert!(catch_unwind(|| leases::answers_that_come_late(fault)).is_err());
}
