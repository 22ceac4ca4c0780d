//! The metrics of a replica beside those of its front end (`nbd-front`), in Prometheus's terms,
//! always on. Durations are histograms in seconds.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `store_corrupt_reads_total` | | reads that met a block that does not match its checksum |
//! | `log_append_seconds` | | from a group handing over a log write to its being durable |
//! | `log_write_seconds` | | one durable write of the log, all groups together |
//! | `log_write_bytes_total` | | entry data written to the log |
//! | `log_write_jobs` | | log writes of groups that were joined in one durable write |
//! | `log_live_bytes`, `log_max_bytes` | | size of the log's segments in use, and its limit |
//! | `raft_commit_seconds` | `shard` | from an entry's packing to its being applied |
//! | `raft_role` | `shard` | 1 when leader, else 0 |
//! | `raft_term`, `raft_committed`, `raft_applied` | `shard` | as of the last change |
//! | `checkpoint_seconds` | | duration of a checkpoint |
//! | `checkpoint_bytes_total` | | bytes moved from the log to their home |
//! | `store_available_bytes` | | room for data that has none yet, behind the reserve |

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use nbd_consensus::Role;
use nbd_log::log::SegmentPool;
use nbd_store::{CheckpointReport, SpaceGauge};
use nbd_topology::ShardId;

use crate::group_task::GroupStatus;

/// Of the log thread.
pub(crate) struct LogMetrics {
    append: Histogram,
    write: Histogram,
    bytes: Counter,
    jobs: Histogram,
}

impl LogMetrics {
    pub(crate) fn new() -> Self {
        Self {
            append: histogram!("log_append_seconds"),
            write: histogram!("log_write_seconds"),
            bytes: counter!("log_write_bytes_total"),
            jobs: histogram!("log_write_jobs"),
        }
    }

    /// One durable write of `jobs` log writes with `bytes` of entry data.
    pub(crate) fn write(&self, elapsed: Duration, bytes: usize, jobs: usize) {
        self.write.record(elapsed);
        self.bytes.increment(bytes as u64);
        self.jobs.record(u32::try_from(jobs).unwrap_or(u32::MAX));
    }

    /// One group's log write, from handing over to durable.
    pub(crate) fn append(&self, elapsed: Duration) {
        self.append.record(elapsed);
    }
}

/// Of one group.
pub(crate) struct GroupMetrics {
    commit: Histogram,
    role: Gauge,
    term: Gauge,
    committed: Gauge,
    applied: Gauge,
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
const fn float(number: u64) -> f64 {
    number as f64
}

impl GroupMetrics {
    pub(crate) fn new(shard: ShardId) -> Self {
        let shard = shard.to_string();
        Self {
            commit: histogram!("raft_commit_seconds", "shard" => shard.clone()),
            role: gauge!("raft_role", "shard" => shard.clone()),
            term: gauge!("raft_term", "shard" => shard.clone()),
            committed: gauge!("raft_committed", "shard" => shard.clone()),
            applied: gauge!("raft_applied", "shard" => shard),
        }
    }

    /// One entry, from packing to applied.
    pub(crate) fn commit(&self, elapsed: Duration) {
        self.commit.record(elapsed);
    }

    /// The group's state as it is now.
    pub(crate) fn status(&self, status: &GroupStatus) {
        self.role.set(f64::from(u8::from(status.role == Role::Leader)));
        self.term.set(float(status.term.0));
        self.committed.set(float(status.committed.0));
        self.applied.set(float(status.applied.0));
    }
}

/// Of checkpoints, log size and space.
pub(crate) struct CheckpointMetrics {
    seconds: Histogram,
    bytes: Counter,
    live: Gauge,
    max: Gauge,
    available: Gauge,
}

impl CheckpointMetrics {
    pub(crate) fn new() -> Self {
        Self {
            seconds: histogram!("checkpoint_seconds"),
            bytes: counter!("checkpoint_bytes_total"),
            live: gauge!("log_live_bytes"),
            max: gauge!("log_max_bytes"),
            available: gauge!("store_available_bytes"),
        }
    }

    /// One checkpoint that came to its end.
    pub(crate) fn finished(&self, elapsed: Duration, report: &CheckpointReport) {
        self.seconds.record(elapsed);
        self.bytes.increment(report.bytes);
    }

    /// Sizes as they are now.
    pub(crate) fn gauges(&self, segments: &SegmentPool, space: &SpaceGauge) {
        self.live.set(float(segments.live_bytes()));
        self.max.set(float(segments.bytes_max()));
        self.available.set(float(space.available_bytes()));
    }
}
