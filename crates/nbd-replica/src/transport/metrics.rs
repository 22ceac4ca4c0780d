//! The metrics of the transport.
//!
//! | name | labels | meaning |
//! | --- | --- | --- |
//! | `raft_connected` | `peer`, `lane` | 1 while this node's stream to the peer is accepted, else 0 |
//! | `raft_sent_messages_total` | `peer`, `lane` | messages handed to the connection |
//! | `raft_sent_bytes_total` | `peer`, `lane` | their bytes, without what frames add |
//! | `raft_dropped_messages_total` | `peer` | messages that were not sent: no connection, or a queue was full; `unknown` when no address is known |
//! | `raft_ignored_messages_total` | `reason` | messages taken in and thrown away: `shard` not hosted here, `receiver` or `sender` not of the group as known here |

use metrics::{Counter, Gauge, counter, gauge};
use nbd_topology::NodeName;

use super::Lane;

/// Of one peer, outgoing.
pub(super) struct PeerMetrics {
    pub(super) lanes: [LaneMetrics; Lane::ALL.len()],
}

/// Of one lane to a peer.
#[derive(Clone)]
pub(super) struct LaneMetrics {
    pub(super) connected: Gauge,
    pub(super) sent_messages: Counter,
    pub(super) sent_bytes: Counter,
    pub(super) dropped: Counter,
}

impl PeerMetrics {
    pub(super) fn new(peer: &NodeName) -> Self {
        let peer = peer.as_str().to_owned();
        let dropped = counter!("raft_dropped_messages_total", "peer" => peer.clone());
        let lanes = Lane::ALL.map(|lane| {
            let lane = lane.name();
            LaneMetrics {
                connected: gauge!("raft_connected", "peer" => peer.clone(), "lane" => lane),
                sent_messages:
                    counter!("raft_sent_messages_total", "peer" => peer.clone(), "lane" => lane),
                sent_bytes:
                    counter!("raft_sent_bytes_total", "peer" => peer.clone(), "lane" => lane),
                dropped: dropped.clone(),
            }
        });
        Self { lanes }
    }
}

/// Of messages that belong nowhere.
pub(super) struct DropMetrics {
    pub(super) unknown_peer: Counter,
    pub(super) ignored_shard: Counter,
    pub(super) ignored_receiver: Counter,
    pub(super) ignored_sender: Counter,
}

impl DropMetrics {
    pub(super) fn new() -> Self {
        let ignored = |reason| counter!("raft_ignored_messages_total", "reason" => reason);
        Self {
            unknown_peer: counter!("raft_dropped_messages_total", "peer" => "unknown"),
            ignored_shard: ignored("shard"),
            ignored_receiver: ignored("receiver"),
            ignored_sender: ignored("sender"),
        }
    }
}
