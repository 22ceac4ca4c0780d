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
//! | `raft_commit_seconds` | `shard` | from an entry's packing to its being committed |
//! | `raft_role` | `shard` | 1 when leader, else 0 |
//! | `raft_term`, `raft_committed`, `raft_applied` | `shard` | as of the last change |
//! | `checkpoint_seconds` | | duration of a checkpoint |
//! | `checkpoint_bytes_total` | | bytes moved from the log to their home |
//! | `store_available_bytes` | | room for data that has none yet, behind the reserve |
//! | `store_disk_bytes` | | size of the file system that the data directory is on |
//! | `shard_provisioned_bytes` | `shard` | sizes of all volumes together |
//! | `shard_allocated_bytes` | `shard` | what their data takes |
//! | `raft_member_alive` | `shard`, `member` | on leaders: 1 if the member was heard within an election timeout, else 0; else no number |
//! | `raft_member_lag_entries` | `shard`, `member` | on leaders: committed entries that it is not known to have; else no number |
//! | `request_stage_seconds` | `stage` | where a write's time goes, see below |
//!
//! Stages, at the leader but for the first two, which are of the node's log whoever leads:
//!
//! | stage | from, to | one for each |
//! | --- | --- | --- |
//! | `append` | a group hands entries over, the log's writer begins with them | log write of a group |
//! | `fsync` | the durable write | durable write, all groups together |
//! | `queue` | a mutation is here, its group looks at it | mutation |
//! | `replicate` | entries are sent, enough followers have them durably | entries sent together |
//! | `commit` | a mutation is packed into an entry, a majority has that; the above but `queue` are within it | entry |
//! | `apply` | an entry is committed, its mutations have taken effect | entries applied together |
//! | `reply` | the verdict is given, its session has it | mutation |

use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};
use metrics::{describe_counter, describe_gauge, describe_histogram};
use nbd_consensus::{Role, Timestamp};
use nbd_log::log::SegmentPool;
use nbd_store::{CheckpointReport, SpaceGauge};
use nbd_topology::{LogIndex, ShardId};

use crate::group_task::GroupStatus;

/// Most batches of entries under way to a leader's followers that are timed; more than its limit on
/// bytes that are not committed lets there be, but for very small ones.
const REPLICATING_MAX: usize = 1024;

/// A stage of `request_stage_seconds`.
fn stage(name: &'static str) -> Histogram {
    histogram!("request_stage_seconds", "stage" => name)
}

/// Says what each metric of a replica means, those of other modules included.
pub(crate) fn describe() {
    for (name, help) in [
        ("log_append_seconds", "Time from a group's log write to its being durable."),
        ("log_write_seconds", "Time of one durable write of the log."),
        ("raft_commit_seconds", "Time from packing an entry until it is committed."),
        ("checkpoint_seconds", "Duration of a checkpoint."),
        ("request_stage_seconds", "Where the time of a write goes at the leader, by stage."),
    ] {
        describe_histogram!(name, Unit::Seconds, help);
    }
    describe_histogram!("log_write_jobs", "Log writes of groups joined in one durable write.");
    for (name, help) in [
        ("store_corrupt_reads_total", "Reads that met a block unlike its checksum."),
        ("log_write_bytes_total", "Entry data written to the log."),
        ("checkpoint_bytes_total", "Bytes moved from the log to their home."),
        ("resync_received_bytes_total", "Bytes of chunks received to catch up."),
        ("resync_chunks_total", "Chunks received to catch up."),
        ("integrity_repaired_blocks_total", "Blocks repaired from another replica's copy."),
        ("integrity_unrepairable_total", "Blocks of which no replica had a good copy."),
        ("scrub_bytes_total", "Bytes verified at rest."),
        ("scrub_passes_total", "Passes of the scrub over all that is at rest."),
        ("scrub_mismatches_total", "Copies found to differ from checksum or other replicas."),
        ("shard_sessions_expired_total", "Sessions closed because nobody came back to them."),
        ("raft_dropped_messages_total", "Messages dropped because a queue was full."),
        ("raft_sent_messages_total", "Raft messages sent to a peer."),
        ("raft_sent_bytes_total", "Bytes of Raft messages sent to a peer."),
        ("raft_ignored_messages_total", "Messages that came and were not for this node."),
    ] {
        describe_counter!(name, help);
    }
    for (name, help) in [
        ("log_live_bytes", "Size of the log's segments in use."),
        ("log_max_bytes", "Limit of the log's size."),
        ("raft_role", "1 if this replica leads the shard, else 0."),
        ("raft_term", "The shard's Raft term here."),
        ("raft_committed", "Highest index known to be committed."),
        ("raft_applied", "Highest index applied."),
        ("raft_connected", "1 while there is a connection to the peer, else 0."),
        ("raft_member_alive", "On leaders: 1 if the member was heard lately, else 0."),
        ("raft_member_lag_entries", "On leaders: committed entries that the member may lack."),
        ("store_available_bytes", "Room for data that has none yet."),
        ("store_disk_bytes", "Size of the file system of the data directory."),
        ("shard_provisioned_bytes", "Sizes of the shard's volumes together."),
        ("shard_allocated_bytes", "What the data of the shard's volumes takes."),
        ("shard_sessions", "Sessions that are open in the shard."),
        ("resync_done_bytes", "Of a resync under way: bytes dealt with."),
        ("resync_size_bytes", "Of a resync under way: bytes in all."),
        ("resync_eta_seconds", "Of a resync under way: estimated time to go."),
    ] {
        describe_gauge!(name, help);
    }
}

/// Of the log thread.
pub(crate) struct LogMetrics {
    waited: Histogram,
    fsync: Histogram,
    append: Histogram,
    write: Histogram,
    bytes: Counter,
    jobs: Histogram,
}

impl LogMetrics {
    pub(crate) fn new() -> Self {
        Self {
            waited: stage("append"),
            fsync: stage("fsync"),
            append: histogram!("log_append_seconds"),
            write: histogram!("log_write_seconds"),
            bytes: counter!("log_write_bytes_total"),
            jobs: histogram!("log_write_jobs"),
        }
    }

    /// One durable write of `jobs` log writes with `bytes` of entry data.
    pub(crate) fn write(&self, elapsed: Duration, bytes: usize, jobs: usize) {
        self.write.record(elapsed);
        self.fsync.record(elapsed);
        self.bytes.increment(bytes as u64);
        self.jobs.record(u32::try_from(jobs).unwrap_or(u32::MAX));
    }

    /// One group's log write had to wait for so long before its durable write began.
    pub(crate) fn waited(&self, elapsed: Duration) {
        self.waited.record(elapsed);
    }

    /// One group's log write, from handing over to durable.
    pub(crate) fn append(&self, elapsed: Duration) {
        self.append.record(elapsed);
    }
}

/// Of the ways of answers to sessions.
pub(crate) struct ReplyMetrics(Histogram);

impl fmt::Debug for ReplyMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReplyMetrics")
    }
}

impl ReplyMetrics {
    pub(crate) fn new() -> Self {
        Self(stage("reply"))
    }

    /// A mutation's verdict was with its session so long after it was given.
    pub(crate) fn got(&self, elapsed: Duration) {
        self.0.record(elapsed);
    }
}

/// What a leader has sent to its followers, until enough of them have it.
#[derive(Debug, Default)]
pub(crate) struct Replicating {
    /// The last index of what was sent together, and when; both rise.
    under_way: VecDeque<(LogIndex, Timestamp)>,
}

impl Replicating {
    pub(crate) fn clear(&mut self) {
        self.under_way.clear();
    }

    /// Entries up to `last` were sent now.
    pub(crate) fn sent(&mut self, last: LogIndex, now: Timestamp) {
        if self.under_way.len() < REPLICATING_MAX {
            self.under_way.push_back((last, now));
        }
    }

    /// How long what enough followers have by `now` was under way.
    pub(crate) fn took(
        &mut self,
        replicated: LogIndex,
        now: Timestamp,
    ) -> impl Iterator<Item = Duration> {
        let reached = move |(last, _): &mut (LogIndex, Timestamp)| *last <= replicated;
        std::iter::from_fn(move || self.under_way.pop_front_if(reached))
            .map(move |(_, since)| Duration::from_nanos(now.0.saturating_sub(since.0)))
    }
}

/// Of one group.
pub(crate) struct GroupMetrics {
    queue: Histogram,
    replicate: Histogram,
    commit: Histogram,
    commit_stage: Histogram,
    apply: Histogram,
    role: Gauge,
    term: Gauge,
    committed: Gauge,
    applied: Gauge,
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
pub(crate) const fn float(number: u64) -> f64 {
    number as f64
}

impl GroupMetrics {
    pub(crate) fn new(shard: ShardId) -> Self {
        let shard = shard.to_string();
        Self {
            queue: stage("queue"),
            replicate: stage("replicate"),
            commit: histogram!("raft_commit_seconds", "shard" => shard.clone()),
            commit_stage: stage("commit"),
            apply: stage("apply"),
            role: gauge!("raft_role", "shard" => shard.clone()),
            term: gauge!("raft_term", "shard" => shard.clone()),
            committed: gauge!("raft_committed", "shard" => shard.clone()),
            applied: gauge!("raft_applied", "shard" => shard),
        }
    }

    /// One mutation waited for so long before its group looked at it.
    pub(crate) fn waited(&self, elapsed: Duration) {
        self.queue.record(elapsed);
    }

    /// What was sent together has reached enough followers.
    pub(crate) fn replicated(&self, elapsed: Duration) {
        self.replicate.record(elapsed);
    }

    /// One entry, from packing to being committed.
    pub(crate) fn commit(&self, elapsed: Duration) {
        self.commit.record(elapsed);
        self.commit_stage.record(elapsed);
    }

    /// What was committed together was applied.
    pub(crate) fn applied(&self, elapsed: Duration) {
        self.apply.record(elapsed);
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
