//! A minute of everything that can happen to three replicas, under a load that checks each answer.
//! `cargo xtask chaos --minutes N` does the same in release for as long as one likes.

use std::time::Duration;

use nbd_testkit::chaos::{ChaosOptions, run};
use nbd_testkit::load::LoadOptions;

/// How long faults go on; start and final checks take some seconds more.
const DURATION: Duration = Duration::from_secs(50);

#[test]
fn three_replicas_keep_their_promises_in_chaos() {
    let seed = nbd_testkit::seed();
    let load = LoadOptions { pace: 200, ..LoadOptions::default() };
    let (balancers, program, directory) = (0, None, None);
    let options = ChaosOptions { seed, duration: DURATION, load, balancers, program, directory };
    let report = run(&options).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report}");
    assert!(report.faults >= 5, "{} faults are too few to show anything", report.faults);
    assert!(report.checked >= 500, "{} operations are too few to show anything", report.checked);
}
