//! The metrics of a load balancer, in Prometheus's terms, always on.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `lb_shard_reached` | `shard` | 1 while the shard's leader itself says that it can be asked, else 0 |
//! | `lb_shard_term` | `shard` | term of the route |
//! | `lb_shard_contacts` | `shard` | addresses at which nodes of the shard are looked for |
//! | `lb_shard_streams` | `shard` | of them, those that a stream is open from |
//! | `lb_route_changes_total` | `shard` | times that the route led to another leader |

use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use nbd_topology::ShardId;

use crate::finder::ShardStatus;

/// Says what each metric means.
pub(crate) fn describe() {
    for (name, help) in [
        ("lb_shard_reached", "1 while the shard's leader says that it can be asked, else 0."),
        ("lb_shard_term", "Raft term of the route to the shard's leader."),
        ("lb_shard_contacts", "Addresses at which nodes of the shard are looked for."),
        ("lb_shard_streams", "Nodes of the shard that a stream is open from."),
    ] {
        describe_gauge!(name, help);
    }
    describe_counter!("lb_route_changes_total", "Times that the route led to another leader.");
}

/// Of one shard.
pub(crate) struct ShardMetrics {
    reached: Gauge,
    term: Gauge,
    contacts: Gauge,
    streams: Gauge,
    changes: Counter,
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats; 2^53 is far away")]
const fn float(number: u64) -> f64 {
    number as f64
}

impl ShardMetrics {
    pub(crate) fn new(shard: ShardId) -> Self {
        let shard = shard.to_string();
        Self {
            reached: gauge!("lb_shard_reached", "shard" => shard.clone()),
            term: gauge!("lb_shard_term", "shard" => shard.clone()),
            contacts: gauge!("lb_shard_contacts", "shard" => shard.clone()),
            streams: gauge!("lb_shard_streams", "shard" => shard.clone()),
            changes: counter!("lb_route_changes_total", "shard" => shard),
        }
    }

    /// The shard's state as it is now.
    pub(crate) fn status(&self, status: &ShardStatus) {
        self.reached.set(f64::from(u8::from(status.reached)));
        self.term.set(float(status.route.term.0));
        self.contacts.set(float(status.contacts as u64));
        self.streams.set(float(status.streams as u64));
    }

    /// The route leads to another leader.
    pub(crate) fn moved(&self) {
        self.changes.increment(1);
    }
}
