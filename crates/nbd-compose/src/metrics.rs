//! What the services measure, as Prometheus would scrape it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nbd_testkit::tools::tool;

use crate::bounded;
use crate::cluster::{BALANCERS, CONTROL, Cluster, FRONT, services};

/// Time for promtool to read one scrape.
const PROMTOOL_MAX: Duration = Duration::from_secs(30);

/// What every process measures.
const OF_ALL: [&str; 2] = ["process_resident_memory_bytes", "process_open_fds"];

/// What a service measures as soon as it has served a client.
fn of_service(service: &str) -> &'static [&'static str] {
    match service {
        FRONT => &["balance_attached_total", "balance_backend_up"],
        CONTROL => &["control_requests_total", "control_request_seconds_count"],
        _ if BALANCERS.contains(&service) => &["nbd_requests_seconds_count", "lb_shard_reached"],
        _ => &["raft_applied", "log_write_seconds_count", "request_stage_seconds_count"],
    }
}

/// One value of a scrape.
#[derive(Debug, Clone, PartialEq)]
struct Sample<'a> {
    name: &'a str,
    /// What is in braces.
    labels: &'a str,
    value: f64,
}

fn samples(scrape: &str) -> impl Iterator<Item = Option<Sample<'_>>> {
    let lines = scrape.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| {
        // Labels may hold spaces; what follows them does not.
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let labels = labels.strip_suffix('}')?;
        Some(Sample { name, labels, value: value.parse().ok()? })
    })
}

/// The sum of all samples of a name whose labels contain `label`.
fn sum(scrape: &str, name: &str, label: &str) -> f64 {
    let wanted = |sample: &Sample<'_>| sample.name == name && sample.labels.contains(label);
    samples(scrape).flatten().filter(wanted).map(|sample| sample.value).sum()
}

/// What every service answered at `/metrics`.
#[derive(Debug)]
pub(crate) struct Scrapes(BTreeMap<&'static str, String>);

impl Scrapes {
    /// Asks all services.
    ///
    /// # Errors
    /// One does not answer, or with what is not a scrape.
    pub(crate) fn take(cluster: &Cluster) -> anyhow::Result<Self> {
        let mut scrapes = BTreeMap::new();
        for service in services() {
            let answer = cluster.get(service, "/metrics").with_context(|| service.to_owned())?;
            if answer.status != 200 {
                bail!("{service}: /metrics answers {}", answer.status);
            }
            if samples(&answer.body).any(|sample| sample.is_none()) {
                bail!("{service}: /metrics has a line that is no sample:\n{}", answer.body);
            }
            scrapes.insert(service, answer.body);
        }
        Ok(Self(scrapes))
    }

    /// Holds each to what its service measures, and to promtool's rules if promtool is there.
    /// Gives what was checked, for people.
    ///
    /// # Errors
    /// What is missing or breaks a rule.
    pub(crate) fn check(&self) -> anyhow::Result<String> {
        for (service, scrape) in &self.0 {
            for name in OF_ALL.iter().chain(of_service(service)) {
                if !samples(scrape).flatten().any(|sample| sample.name == *name) {
                    bail!("{service} does not measure {name}:\n{scrape}");
                }
            }
        }
        let count: usize = self.0.values().map(|scrape| samples(scrape).count()).sum();
        let by = match tool("promtool") {
            None => "promtool is not there".to_owned(),
            Some(promtool) => {
                let mut faults = Vec::new();
                for (service, scrape) in &self.0 {
                    let mut file: File = tempfile::tempfile()?;
                    file.write_all(scrape.as_bytes()).and_then(|()| file.rewind())?;
                    let mut check = Command::new(&promtool);
                    check.args(["check", "metrics"]);
                    let ended = bounded::run_reading(&mut check, Stdio::from(file), PROMTOOL_MAX)?;
                    if !ended.status.success() {
                        faults.push(format!("{service}: {}{}", ended.stdout, ended.stderr));
                    }
                }
                if !faults.is_empty() {
                    bail!("promtool finds\n{}", faults.join("\n"));
                }
                "promtool finds no fault".to_owned()
            }
        };
        Ok(format!("{count} series of {} services; {by}", self.0.len()))
    }

    /// A sum over some services.
    pub(crate) fn sum(&self, of: &[&str], name: &str, label: &str) -> f64 {
        let scrapes = self.0.iter().filter(|(service, _)| of.contains(service));
        scrapes.map(|(_, scrape)| sum(scrape, name, label)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# HELP bytes_total Bytes.\n# TYPE bytes_total counter\n\
        bytes_total{op=\"write\",shard=\"0\"} 12\nbytes_total{op=\"read\",shard=\"0\"} 5\n\
        bytes_total{op=\"write\",shard=\"1\"} 30\n\nup{name=\"a b\"} 1e3\nplain 2.5\n";

    #[test]
    fn samples_are_read_and_summed() {
        let read: Option<Vec<_>> = samples(SCRAPE).collect();
        let read = read.unwrap();
        assert_eq!(read.len(), 5);
        assert_eq!(read[3], Sample { name: "up", labels: "name=\"a b\"", value: 1000.0 });
        assert_eq!(read[4], Sample { name: "plain", labels: "", value: 2.5 });
        assert!((sum(SCRAPE, "bytes_total", "op=\"write\"") - 42.0).abs() < 1e-9);
        assert!(sum(SCRAPE, "bytes", "").abs() < 1e-9);
    }

    #[test]
    fn what_is_no_sample_is_told() {
        assert!(samples("<html> 1\n").flatten().next().is_some(), "a name is not looked into");
        assert!(samples("up one\n").any(|sample| sample.is_none()));
        assert!(samples("up\n").any(|sample| sample.is_none()));
    }
}
