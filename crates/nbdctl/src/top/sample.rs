//! What happened between two looks at the cluster.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::time::Instant;

use clap::ValueEnum;
use nbd_api::{Activity, HealthStatus, IoCounts, Shard};

/// What the control API tells at a moment.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) activities: Vec<Activity>,
    pub(super) shards: Vec<Shard>,
}

/// What volumes can be sorted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum VolumeSort {
    #[default]
    Iops,
    Bandwidth,
    Latency,
    Sessions,
    Name,
}

impl VolumeSort {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::Bandwidth => "bandwidth",
            Self::Latency => "latency",
            Self::Sessions => "sessions",
            Self::Name => "name",
        }
    }
}

/// One direction of I/O. Each a second; microseconds, if there was a request.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Flow {
    pub(super) iops: f64,
    pub(super) bandwidth: f64,
    pub(super) latency_us: Option<f64>,
}

/// Both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Rate {
    pub(super) read: Flow,
    pub(super) write: Flow,
}

/// A volume. Without a rate, it is not known: its shard has just got another leader, say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VolumeRate {
    pub(super) name: String,
    pub(super) shard: u32,
    pub(super) sessions: u32,
    pub(super) rate: Option<Rate>,
}

/// A shard.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ShardRate {
    pub(super) shard: u32,
    pub(super) health: HealthStatus,
    pub(super) leader: Option<String>,
    pub(super) sessions: u32,
    pub(super) lag: Option<u64>,
    pub(super) rate: Option<Rate>,
}

/// Everything, as the tables have it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) shards: Vec<ShardRate>,
    pub(super) volumes: Vec<VolumeRate>,
}

impl Rate {
    fn between(old: &IoCounts, new: &IoCounts, seconds: f64) -> Self {
        let flow = |old: [u64; 3], new: [u64; 3]| {
            #[expect(clippy::cast_precision_loss, reason = "some digits are shown")]
            let [count, bytes, us] =
                [0, 1, 2].map(|field| new[field].saturating_sub(old[field]) as f64);
            let latency_us = (count > 0.0).then(|| us / count);
            Flow { iops: count / seconds, bandwidth: bytes / seconds, latency_us }
        };
        Self {
            read: flow(
                [old.reads, old.read_bytes, old.read_us],
                [new.reads, new.read_bytes, new.read_us],
            ),
            write: flow(
                [old.writes, old.write_bytes, old.write_us],
                [new.writes, new.write_bytes, new.write_us],
            ),
        }
    }

    fn iops(&self) -> f64 {
        self.read.iops + self.write.iops
    }

    fn bandwidth(&self) -> f64 {
        self.read.bandwidth + self.write.bandwidth
    }

    /// Of all requests together.
    fn latency_us(&self) -> f64 {
        let total = |flow: &Flow| flow.latency_us.unwrap_or(0.0) * flow.iops;
        let iops = self.iops();
        if iops > 0.0 { (total(&self.read) + total(&self.write)) / iops } else { 0.0 }
    }
}

impl Rates {
    /// What happened between two samples.
    pub(super) fn between(old: &Sample, new: &Sample) -> Self {
        let seconds = new.at.saturating_duration_since(old.at).as_secs_f64();
        let before: HashMap<u32, &Activity> =
            old.activities.iter().map(|activity| (activity.shard, activity)).collect();
        let now: HashMap<u32, &Activity> =
            new.activities.iter().map(|activity| (activity.shard, activity)).collect();
        // Counts of another origin have begun anew.
        let comparable = |activity: &Activity| {
            let before = before.get(&activity.shard).copied();
            before.filter(|before| before.origin == activity.origin && seconds > 0.0)
        };
        let shard = |shard: &Shard| {
            let activity = now.get(&shard.shard).copied();
            let rate = activity.and_then(|activity| {
                let before = comparable(activity)?;
                Some(Rate::between(&before.total, &activity.total, seconds))
            });
            ShardRate {
                shard: shard.shard,
                health: shard.health,
                leader: shard.leader.clone(),
                sessions: shard.sessions,
                lag: activity.map(|activity| activity.lag),
                rate,
            }
        };
        let mut volumes = Vec::new();
        for activity in &new.activities {
            let before = comparable(activity);
            let counts: HashMap<&str, &IoCounts> = before
                .iter()
                .flat_map(|before| &before.volumes)
                .map(|volume| (volume.name.as_str(), &volume.counts))
                .collect();
            let nothing = IoCounts::default();
            volumes.extend(activity.volumes.iter().map(|volume| {
                // One that was not there before has done since all that it has ever done.
                let old = counts.get(volume.name.as_str()).copied().unwrap_or(&nothing);
                VolumeRate {
                    name: volume.name.clone(),
                    shard: activity.shard,
                    sessions: volume.sessions,
                    rate: before.map(|_| Rate::between(old, &volume.counts, seconds)),
                }
            }));
        }
        Self { shards: new.shards.iter().map(shard).collect(), volumes }
    }

    /// Sorts the volumes, by name where nothing else tells them apart.
    pub(super) fn sort(&mut self, by: VolumeSort, reverse: bool) {
        let key = |volume: &VolumeRate| {
            let rate = volume.rate.unwrap_or_default();
            match by {
                VolumeSort::Iops => rate.iops(),
                VolumeSort::Bandwidth => rate.bandwidth(),
                VolumeSort::Latency => rate.latency_us(),
                VolumeSort::Sessions => volume.sessions.into(),
                VolumeSort::Name => 0.0,
            }
        };
        self.volumes.sort_by(|a, b| {
            let order = key(b).total_cmp(&key(a));
            let order = order.then_with(|| match by {
                VolumeSort::Name => a.name.cmp(&b.name),
                _ => Ordering::Equal,
            });
            let order = if reverse { order.reverse() } else { order };
            order.then_with(|| a.name.cmp(&b.name))
        });
    }
}

#[cfg(test)]
mod tests;
