//! Other processes, by id.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

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

/// Stops the process `pid` where it is, with SIGSTOP, and waits until none of its threads runs: the
/// signal reaches them one by one, and those behind go on for a moment.
///
/// # Panics
/// If there is no such process, it is not ours to signal, or it does not stop.
pub fn stop(pid: u32) {
    send_signal(pid, Signal::STOP);
    let sent = Instant::now();
    while !is_stopped(pid) {
        assert!(sent.elapsed() < STOP_MAX, "{pid} does not stop");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Time for a process to stop: a thread that waits for a disk stops when it has been served.
const STOP_MAX: Duration = Duration::from_secs(60);

/// Whether no thread of the process `pid` runs, because it is stopped.
fn is_stopped(pid: u32) -> bool {
    let path = format!("/proc/{pid}/task");
    let tasks = fs::read_dir(&path).unwrap_or_else(|e| panic!("read {path}: {e}"));
    // A thread may end meanwhile.
    let stats =
        tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
    stats.map(|stat| parse_state(&stat)).all(|state| state == Some('T'))
}

/// The field state, the first behind the program's name in parentheses.
fn parse_state(stat: &str) -> Option<char> {
    stat.rsplit_once(')')?.1.trim_start().chars().next()
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

/// CPU time that the process `pid` has used so far, in user and kernel mode.
///
/// # Panics
/// If there is no such process.
pub fn cpu_time(pid: u32) -> Duration {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {path}: {e}"));
    let ticks = parse_cpu_ticks(&stat).unwrap_or_else(|| panic!("{path} is {stat:?}"));
    Duration::from_millis(ticks * MILLIS_PER_TICK)
}

/// The kernel counts CPU time for user space in hundredths of a second, on all architectures.
const MILLIS_PER_TICK: u64 = 10;

/// The sum of the fields utime and stime, the 14th and 15th. The second is the program's name in
/// parentheses, which may hold anything.
fn parse_cpu_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |place: usize| fields.get(place)?.parse::<u64>().ok();
    Some(field(11)? + field(12)?)
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
    use std::process::Command;

    use super::*;

    #[test]
    fn own_memory_is_there() {
        let pid = std::process::id();
        assert!(rss_bytes(pid) > 0);
        assert!(rss_peak_bytes(pid) >= rss_bytes(pid) / 2);
        assert_eq!(parse_kib("VmHWM:\t  12 kB\nVmRSS:\t  7 kB\n", "VmRSS"), Some(7));
        assert_eq!(parse_kib("VmRSSx: 7 kB", "VmRSS"), None);
    }

    // Goal: what a process that was stopped would have done is not done.
    // Method: it counts, and its count is as it was when it was stopped.
    #[test]
    fn a_stopped_process_does_nothing_more() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count");
        let counting = "while :; do echo >> count; done";
        let mut shell = Command::new("/bin/sh");
        let mut child = shell.args(["-c", counting]).current_dir(&directory).spawn().unwrap();
        let len = || fs::metadata(&count).map_or(0, |count| count.len());
        for _ in 0..20 {
            let before = len();
            while len() == before {
                thread::sleep(Duration::from_millis(1));
            }
            stop(child.id());
            let stopped = len();
            thread::sleep(Duration::from_millis(5));
            assert_eq!(len(), stopped);
            send_signal(child.id(), Signal::CONT);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn own_cpu_time_grows() {
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 30 12 13 14 15";
        assert_eq!(parse_cpu_ticks(stat), Some(42));
        let pid = std::process::id();
        let before = cpu_time(pid);
        while cpu_time(pid) == before {
            std::hint::spin_loop();
        }
    }
}
