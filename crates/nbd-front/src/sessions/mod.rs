//! Who is attached: the sessions of this process, as people and the control API see them.
//!
//! Each session keeps its own record by a [`Meter`]. The counters in it are written by nobody else
//! and cost an atomic each; where the session is attached stands behind a lock of the record, which
//! is taken when that changes. The registry's own lock is taken when a session comes or goes, and
//! for a page of the list: never for a request.

mod http;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use nbd_store::{SessionId, VolumeId};
use nbd_topology::{NodeName, ShardId};
use parking_lot::Mutex;

use crate::metrics::{ShardMetrics, float};
use crate::route::LeaderAt;

/// The sessions attached through this process. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Sessions {
    /// By the number of their connection: in the order in which clients came.
    records: Arc<Mutex<BTreeMap<u64, Arc<Record>>>>,
}

/// How a client's requests get to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carried {
    /// Each request is kept until it is answered, and asked again of the next leader.
    Replay,
    /// As bytes, which are moved within the kernel.
    Splice,
}

/// What of a session never changes.
#[derive(Debug, Clone)]
pub(crate) struct About {
    /// Number of its connection in this process, as the log has it.
    pub(crate) connection: u64,
    /// Where the client is.
    pub(crate) client: SocketAddr,
    /// The export, by the volume's own name.
    pub(crate) export: String,
    pub(crate) shard: ShardId,
    pub(crate) volume: VolumeId,
    /// Its id in the shard's log. `None`: it is the replica's own, and not known here.
    pub(crate) session: Option<SessionId>,
    pub(crate) carried: Carried,
}

/// Where a session's requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BackendAt {
    /// The node.
    pub(crate) node: NodeName,
    /// Host and port there: of its gRPC, or of its NBD server if bytes are moved.
    pub(crate) address: String,
}

impl From<&LeaderAt> for BackendAt {
    fn from(leader: &LeaderAt) -> Self {
        Self { node: leader.node.clone(), address: leader.grpc.clone() }
    }
}

#[derive(Debug)]
struct Record {
    about: About,
    since: Instant,
    received_bytes: AtomicU64,
    sent_bytes: AtomicU64,
    requests_pending: AtomicUsize,
    backend: Mutex<Backend>,
}

/// Where a session is attached, and since when that is so. `None`: it waits for a leader.
#[derive(Debug)]
struct Backend {
    at: Option<BackendAt>,
    since: Instant,
}

impl Sessions {
    /// Takes a session into the list, for as long as its meter lives.
    pub(crate) fn add(
        &self,
        about: About,
        at: Option<BackendAt>,
        metrics: Arc<ShardMetrics>,
    ) -> Meter {
        let since = Instant::now();
        let record = Arc::new(Record {
            about,
            since,
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            requests_pending: AtomicUsize::new(0),
            backend: Mutex::new(Backend { at, since }),
        });
        self.records.lock().insert(record.about.connection, Arc::clone(&record));
        metrics.sessions.increment(1.0);
        let sessions = self.clone();
        Meter { record, sessions, metrics, received: 0, sent: 0, pending: 0 }
    }

    /// The first `max` sessions whose connections are numbered above `after`, and how many sessions
    /// there are in all.
    fn page(&self, after: u64, max: usize) -> (Vec<Arc<Record>>, usize) {
        let records = self.records.lock();
        let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        let page = records.range(above).take(max).map(|(_, record)| Arc::clone(record)).collect();
        (page, records.len())
    }
}

/// A session's hold on its record. Dropping it takes the session off the list.
#[derive(Debug)]
pub(crate) struct Meter {
    record: Arc<Record>,
    sessions: Sessions,
    metrics: Arc<ShardMetrics>,
    /// What was told so far by [`Self::tell`].
    received: u64,
    sent: u64,
    pending: usize,
}

impl Meter {
    /// Notes bytes of the connection, behind its handshake, and the requests under way, all as they
    /// stand now.
    pub(crate) fn tell(&mut self, received: u64, sent: u64, pending: usize) {
        if received != self.received {
            self.received(received - self.received);
            self.received = received;
        }
        if sent != self.sent {
            self.sent(sent - self.sent);
            self.sent = sent;
        }
        if pending != self.pending {
            self.record.requests_pending.store(pending, Ordering::Relaxed);
            let gauge = &self.metrics.requests_pending;
            gauge.increment(float(pending as u64) - float(self.pending as u64));
            self.pending = pending;
        }
    }

    /// So many more bytes came from the client.
    pub(crate) fn received(&self, bytes: u64) {
        self.record.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.metrics.received_bytes.increment(bytes);
    }

    /// So many more bytes went to the client.
    pub(crate) fn sent(&self, bytes: u64) {
        self.record.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.metrics.sent_bytes.increment(bytes);
    }

    /// The session is attached there from now on. `None`: it waits for a leader.
    pub(crate) fn attached(&self, at: Option<BackendAt>) {
        let mut backend = self.record.backend.lock();
        if backend.at != at {
            *backend = Backend { at, since: Instant::now() };
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.sessions.records.lock().remove(&self.record.about.connection);
        self.metrics.sessions.decrement(1.0);
        self.metrics.requests_pending.decrement(float(self.pending as u64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn about(connection: u64) -> About {
        About {
            connection,
            client: "10.0.0.9:4711".parse().unwrap(),
            export: "vol1".to_owned(),
            shard: ShardId(2),
            volume: VolumeId(3),
            session: Some(SessionId(0xabc)),
            carried: Carried::Replay,
        }
    }

    pub(super) fn add(sessions: &Sessions, connection: u64) -> Meter {
        let metrics = Arc::new(ShardMetrics::new(ShardId(2)));
        sessions.add(about(connection), None, metrics)
    }

    #[test]
    fn sessions_are_listed_in_pages_as_long_as_they_last() {
        let sessions = Sessions::default();
        let mut meters: Vec<_> = (1..=7).map(|number| add(&sessions, number)).collect();
        meters.remove(2);
        let page = |after, max| {
            let (records, total) = sessions.page(after, max);
            assert_eq!(total, 6);
            records.iter().map(|record| record.about.connection).collect::<Vec<_>>()
        };
        assert_eq!(page(0, 3), [1, 2, 4]);
        assert_eq!(page(4, 3), [5, 6, 7]);
        assert_eq!(page(7, 3), [0; 0]);
        drop(meters);
        assert_eq!(sessions.page(0, 9).1, 0);
    }

    #[test]
    fn a_meter_tells_what_stands_now() {
        let sessions = Sessions::default();
        let mut meter = add(&sessions, 1);
        meter.tell(100, 20, 3);
        meter.tell(150, 20, 1);
        let (records, _) = sessions.page(0, 1);
        let record = &records[0];
        assert_eq!(record.received_bytes.load(Ordering::Relaxed), 150);
        assert_eq!(record.sent_bytes.load(Ordering::Relaxed), 20);
        assert_eq!(record.requests_pending.load(Ordering::Relaxed), 1);
    }
}
