//! What the process takes of the machine, by the names that Prometheus's own clients use.
//!
//! | name | meaning |
//! | --- | --- |
//! | `process_open_fds`, `process_max_fds` | files and sockets open, and how many may be |
//! | `process_resident_memory_bytes` | memory in use |

use std::fs;

use metrics::{Unit, describe_gauge, gauge};
use rustix::process::{Resource, getrlimit};

/// Looks, and sets the metrics of this thread's recorder. Called when somebody asks for them: files
/// of `/proc` are made up by the kernel, so that this waits for no disk. What cannot be known is
/// left out.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
pub(crate) fn observe() {
    describe_gauge!("process_open_fds", "Files and sockets that the process has open.");
    describe_gauge!("process_max_fds", "Files and sockets that it may have open.");
    describe_gauge!("process_resident_memory_bytes", Unit::Bytes, "Memory of it that is resident.");
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One is the directory itself.
        gauge!("process_open_fds").set(open.count().saturating_sub(1) as f64);
    }
    if let Some(max) = getrlimit(Resource::Nofile).current {
        gauge!("process_max_fds").set(max as f64);
    }
    if let Some(bytes) =
        resident_bytes(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    {
        gauge!("process_resident_memory_bytes").set(bytes as f64);
    }
}

/// What `/proc/self/status` says of it.
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_where_it_stands() {
        let status = "Name:\tnbd-lb\nVmHWM:\t  999 kB\nVmRSS:\t   12345 kB\nThreads:\t4\n";
        assert_eq!(resident_bytes(status), Some(12345 * 1024));
        assert_eq!(resident_bytes("Name:\tnbd-lb\n"), None);
        let own = fs::read_to_string("/proc/self/status").unwrap();
        assert!(resident_bytes(&own).unwrap() > 100_000);
    }
}
