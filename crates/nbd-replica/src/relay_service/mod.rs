//! The leader's side of relays ([`nbd_relay`]): sessions whose clients are attached to other
//! processes.
//!
//! ```text
//!  relay ──▶ check ──▶ byte budget ──▶ HostedSession ──▶ group task
//!    ▲        │                                             │
//!    │        ├─▶ read (page cache) ──▶ output ─────────────│──▶ relay
//!    │        └─▶ query tasks ──▶ store, blocking           │
//!    └─────────────── answers ◀──────┴──────────────────────┘
//! ```
//!
//! Everything a caller says is checked before it counts: that it means this cluster and a shard
//! that is here, that lengths are within their bounds, that commands are whole and every piece of a
//! payload has its checksum.
//!
//! - [`session`]: one relay, from its hello to its end. [`query`]: what is not answered at once.
//! - This file: the service, what its relays share, and how a relay begins.

mod query;
mod session;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_front::{ByteBudget, RelayStream};
use nbd_relay::{FromLeader, PREAMBLE};
use nbd_service::Shutdown;
use nbd_topology::{ClusterName, ShardId};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tracing::debug;

use crate::hosted::HostedShard;

/// Relays of other processes that may be open. Each costs a few KiB while it is idle.
const RELAYS_MAX: usize = 16_384;

/// Bytes of mutations that all relays may hold here together, and as many again of answers to
/// queries, so that callers which are slow to take theirs do not hold up writes. Apart from the
/// budget of this node's own clients: theirs may be waiting for the other node's, and would wait
/// for ever if it was waiting for them. 64 MiB keep two nodes' worth of writes in the log's pipe.
const BYTES_MAX: u64 = 64 << 20;

/// Time that a caller has to say what it wants.
const HELLO_MAX: Duration = Duration::from_secs(10);

/// Time for the last words of a relay to leave.
const GOODBYE_MAX: Duration = Duration::from_millis(500);

/// Serves the shards of this node to sessions of other processes. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct RelayService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cluster: ClusterName,
    shards: HashMap<ShardId, HostedShard>,
    mutation_budget: ByteBudget,
    query_budget: ByteBudget,
    relays: Arc<Semaphore>,
    /// Relays are its tasks, and end when it begins.
    shutdown: Shutdown,
}

impl RelayService {
    /// Of a node that hosts `shards`.
    pub(crate) fn new(
        cluster: ClusterName,
        shards: HashMap<ShardId, HostedShard>,
        shutdown: Shutdown,
    ) -> Self {
        let shared = Shared {
            cluster,
            shards,
            mutation_budget: ByteBudget::new(BYTES_MAX),
            query_budget: ByteBudget::new(BYTES_MAX),
            relays: Arc::new(Semaphore::new(RELAYS_MAX)),
            shutdown,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Serves a connection that has begun like a relay until the caller goes away, this replica
    /// stops to lead, or the node stops. What was proposed by then is carried out.
    pub(crate) fn spawn(&self, stream: TcpStream) {
        self.shared.shutdown.spawn(self.clone().serve(stream));
    }

    async fn serve(self, mut stream: TcpStream) {
        let Ok(_place) = Arc::clone(&self.shared.relays).try_acquire_owned() else {
            debug!(limit = RELAYS_MAX, "too many relays: closed a new one");
            return;
        };
        let preamble = tokio::select! {
            preamble = tokio::time::timeout(HELLO_MAX, preamble(&mut stream)) => preamble,
            () = self.shared.shutdown.started() => return,
        };
        if !matches!(preamble, Ok(Ok(true))) {
            debug!("a connection is no relay of this version: closed it");
            return;
        }
        let Ok(mut relay) = RelayStream::new(stream) else { return };
        let reason = match session::serve(&self.shared, &mut relay).await {
            Ok(()) | Err(End::Gone) => return,
            Err(End::Told(reason)) => reason,
            Err(End::Ended) => {
                send(&mut relay, FromLeader::Ended);
                "the session was ended".to_owned()
            }
        };
        debug!(reason, "a relay ends");
        send(&mut relay, FromLeader::End { reason });
        let _ = tokio::time::timeout(GOODBYE_MAX, flush(&mut relay)).await;
    }
}

/// Why a relay ends.
#[derive(Debug)]
enum End {
    /// The caller has gone: there is nobody to tell.
    Gone,
    /// The caller is told.
    Told(String),
    /// The log has ended the session, and the caller is told so.
    Ended,
}

impl End {
    fn told(reason: impl ToString) -> Self {
        Self::Told(reason.to_string())
    }
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// Whether the connection begins as it should.
async fn preamble(stream: &mut TcpStream) -> io::Result<bool> {
    let mut found = [0; PREAMBLE.len()];
    stream.read_exact(&mut found).await?;
    Ok(found == PREAMBLE)
}

fn send(relay: &mut RelayStream, message: FromLeader) {
    if let Some(body) = message.put(relay.output().buffer()) {
        relay.output().push(body);
    }
}

/// Sends all that waits.
async fn flush(relay: &mut RelayStream) -> io::Result<()> {
    loop {
        relay.try_send()?;
        if relay.unsent() == 0 {
            return relay.finish();
        }
        relay.ready(false).await?;
    }
}
