//! Other processes, by id.

use std::fs;

use rustix::process::{Pid, kill_process};

pub use rustix::process::Signal;

/// Sends `signal` to the process `pid`.
///
/// # Panics
/// If there is no such process, or it is not ours to signal.
pub fn send_signal(pid: u32, signal: Signal) {
    let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let id = id.unwrap_or_else(|| panic!("{pid} is not a process id"));
    kill_process(id, signal).unwrap_or_else(|e| panic!("send {signal:?} to {pid}: {e}"));
}

/// Memory of the process `pid` that is resident now, in bytes.
///
/// # Panics
/// If there is no such process.
pub fn rss_bytes(pid: u32) -> u64 {
    status_kib(pid, "VmRSS") * 1024
}

/// The most memory of the process `pid` that was ever resident, in bytes.
///
/// # Panics
/// If there is no such process.
pub fn rss_peak_bytes(pid: u32) -> u64 {
    status_kib(pid, "VmHWM") * 1024
}

fn status_kib(pid: u32, key: &str) -> u64 {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}"));
    parse_kib(&status, key).unwrap_or_else(|| panic!("{path} has no {key}"))
}

/// The number in a line such as `VmRSS:    1234 kB`.
fn parse_kib(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_there() {
        let pid = std::process::id();
        assert!(rss_bytes(pid) > 0);
        assert!(rss_peak_bytes(pid) >= rss_bytes(pid) / 2);
        assert_eq!(parse_kib("VmHWM:\t  12 kB\nVmRSS:\t  7 kB\n", "VmRSS"), Some(7));
        assert_eq!(parse_kib("VmRSSx: 7 kB", "VmRSS"), None);
    }
}
