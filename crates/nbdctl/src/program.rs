//! `nbdctl` by another name: the services' programs.
//!
//! The binary holds all of Cinderblock. Called by a service's name (through a link, as in the
//! image) it is that service: with its command line, its environment, its exit codes.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

/// A program.
type Main = fn() -> ExitCode;

/// The services, by the names of their programs.
const PROGRAMS: [(&str, Main); 3] = [
    ("nbd-replica", nbd_replica::program::main),
    ("nbd-lb", nbd_lb::program::main),
    ("nbd-control", nbd_control::program::main),
];

/// The program to be, if it is not `nbdctl`. `called` is the first word of the command line.
pub(crate) fn named(called: Option<&OsStr>) -> Option<Main> {
    let name = Path::new(called?).file_name()?;
    PROGRAMS.into_iter().find(|(program, _)| name == *program).map(|(_, main)| main)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_name_counts_and_nothing_else() {
        let is = |called: &str| named(Some(OsStr::new(called))).is_some();
        for service in ["nbd-lb", "/bin/nbd-replica", "./nbd-lb", "dist/nbd-control"] {
            assert!(is(service), "{service}");
        }
        for other in ["nbdctl", "", "/", "nbd-lb/nbdctl", "nbd-lb.old", "nbd-client", "nbd"] {
            assert!(!is(other), "{other}");
        }
        assert!(named(None).is_none());
    }
}
