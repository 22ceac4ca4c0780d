//! fio's nbd engine as the client.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Bytes of the volume that each job works on.
pub(crate) const VOLUME: &str = "1G";

/// One fio job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) name: &'static str,
    pub(crate) rw: &'static str,
    pub(crate) block_kib: u32,
    pub(crate) depth: u32,
    pub(crate) seconds: u32,
}

/// What a run moved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    pub(crate) bytes: f64,
    pub(crate) bytes_per_second: f64,
}

impl Job {
    fn reads(&self) -> bool {
        self.rw.ends_with("read")
    }

    /// Small blocks are judged by requests a second, large ones by MiB a second.
    pub(crate) const fn unit(&self) -> &'static str {
        if self.block_kib >= 128 { "MiB/s" } else { "IOPS" }
    }

    /// Brings the export into the state the job starts from: fully written and, for reads, read
    /// once.
    pub(crate) fn prepare(&self, uri: &str) -> Result<()> {
        let write = ["--rw=write", "--bs=1M", "--iodepth=8", "--name=prepare"];
        fio(uri, &write)?;
        if self.reads() {
            for _ in 0..2 {
                fio(uri, &["--rw=read", "--bs=1M", "--iodepth=8", "--name=warm"])?;
            }
        }
        Ok(())
    }

    /// Runs the job and gives its rate in [`Self::unit`].
    pub(crate) fn run(&self, uri: &str) -> Result<f64> {
        let warm_up = format!("--ramp_time={}", self.seconds.div_ceil(5));
        let figures = self.figures(uri, &[&warm_up])?;
        let rate = match self.unit() {
            "IOPS" => figures["iops"].as_f64(),
            _ => figures["bw_bytes"].as_f64().map(|bytes| bytes / f64::from(1 << 20)),
        };
        rate.with_context(|| format!("fio reported no rate for {}", self.name))
    }

    /// Runs the job without a warm-up, so that all that it moves is counted.
    pub(crate) fn run_counted(&self, uri: &str) -> Result<Moved> {
        let figures = self.figures(uri, &[])?;
        let figure = |name: &str| figures[name].as_f64();
        let moved = figure("io_bytes").zip(figure("bw_bytes"));
        let (bytes, bytes_per_second) =
            moved.with_context(|| format!("fio counted no bytes for {}", self.name))?;
        Ok(Moved { bytes, bytes_per_second })
    }

    /// What fio reports of the side that the job is about.
    fn figures(&self, uri: &str, more: &[&str]) -> Result<Value> {
        let job = [
            &*format!("--name={}", self.name),
            &*format!("--rw={}", self.rw),
            &*format!("--bs={}k", self.block_kib),
            &*format!("--iodepth={}", self.depth),
            &*format!("--runtime={}", self.seconds),
            "--time_based",
        ];
        let report = fio(uri, &[&job[..], more].concat())?;
        let side = if self.reads() { "read" } else { "write" };
        Ok(report["jobs"][0][side].clone())
    }
}

fn fio(uri: &str, args: &[&str]) -> Result<Value> {
    let output = Command::new("fio")
        .args(["--ioengine=nbd", &format!("--uri={uri}"), &format!("--size={VOLUME}")])
        .args(["--output-format=json", "--randrepeat=0", "--norandommap"])
        .args(args)
        .output()
        .context("run fio (package fio)")?;
    if !output.status.success() {
        bail!("fio failed on {uri}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8(output.stdout).context("read fio's report")?;
    let start = text.find('{').context("fio printed no report")?;
    serde_json::from_str(&text[start..]).context("parse fio's report")
}
