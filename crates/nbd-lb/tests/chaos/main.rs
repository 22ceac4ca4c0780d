//! Half a minute of everything that can happen to three replicas and two load balancers in front of
//! them, under a load that checks each answer. `cargo xtask chaos --balancers 2 --minutes N` does
//! the same in release for as long as one likes.

use std::time::Duration;

use nbd_testkit::chaos::{ChaosOptions, run};
use nbd_testkit::load::LoadOptions;

/// How long faults go on; start and final checks take some seconds more.
const DURATION: Duration = Duration::from_secs(30);

#[test]
fn clients_of_two_load_balancers_are_kept_every_promise_in_chaos() {
    let load = LoadOptions { pace: 200, ..LoadOptions::default() };
    let (seed, program, directory) = (nbd_testkit::seed(), None, None);
    let options = ChaosOptions { seed, duration: DURATION, load, balancers: 2, program, directory };
    let report = run(&options).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{report}");
    assert!(report.faults >= 4, "{} faults are too few to show anything", report.faults);
    assert!(report.checked >= 500, "{} operations are too few to show anything", report.checked);
}
