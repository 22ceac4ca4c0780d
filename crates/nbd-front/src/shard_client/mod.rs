//! Reaching a shard, wherever its leader is.
//!
//! ```text
//!  NBD session ─▶ SessionClient ─┬─ leader here ──▶ LocalAttachment ──▶ its group, its store
//!                  (what is      │
//!                   pending)     └─ leader there ─▶ Remote ══ relay ══▶ relay service of its node
//! ```
//!
//! - [`session`]: [`SessionClient`], one session over one attachment at a time, kept through moves
//!   of the leader.
//! - [`remote`]: attachments to leaders elsewhere, by relays ([`nbd_relay`]). [`links`]: gRPC
//!   connections to their nodes, for all else. What an attachment to a leader here does is up to
//!   the replica ([`LocalReplica`]).
//! - [`answer`]: what attachments of both kinds answer. [`standing`]: what a session's client feels
//!   when the leader changes.
//! - [`wire`]: between the types here and those of the protocol.
//! - This file: [`ShardClient`], for commands and look-ups that need no session.
//!
//! A process's own budget of request bytes is held by its clients' requests until they are
//! answered, whoever leads. What a leader holds for requests of other processes is counted apart,
//! over there: with one budget for both, two nodes that forward to each other could wait for one
//! another.

mod answer;
mod links;
mod remote;
mod session;
mod standing;
mod wire;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nbd_relay::Caller;
use nbd_service::Shutdown;
use nbd_store::{Outcome, Owner, VolumeId, VolumeInfo, command};
use nbd_topology::{ClusterName, ShardId};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::info;

use self::wire::Elsewhere;
use crate::local::LocalReplica;
use crate::metrics::ShardMetrics;
use crate::route::{GroupStopped, LeaderAt, Route};

pub use answer::{Answered, QueryData, ReadBuffer, ReadData};
pub use links::Links;
pub use session::{Event, SessionClient, SessionEnd, Signal};

/// Time that one attempt to reach a leader has. A leader that lives answers within milliseconds;
/// one that has no majority steps down well before this.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// Wait after a failed attempt while nothing new is known of the leader: doubled each time, up to
/// [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(20);

/// Longest wait between attempts: what a failover may be late by when news of it comes late.
const BACKOFF_MAX: Duration = Duration::from_millis(200);

/// Time that the end of a session is tried to be put into the log. A session that stays open costs
/// memory, until its owner starts again or it expires.
const CLOSE_MAX: Duration = Duration::from_secs(30);

/// The same once the process stops: its next start ends what is left.
const CLOSE_STOPPING_MAX: Duration = Duration::from_millis(500);

/// What all that reaches shards from this process shares.
#[derive(Debug)]
pub struct Access {
    /// The cluster that is meant, as every call to another node says.
    pub cluster: ClusterName,
    /// This life of this process, as sessions name their owner.
    pub owner: Owner,
    /// Name of this process, as operators are told who serves a client: a node's, or a load
    /// balancer's.
    pub name: Arc<str>,
    /// Connections to the nodes.
    pub links: Links,
    /// The process's shutdown.
    pub shutdown: Shutdown,
}

/// The client of a session, as operators are told. Nothing is decided by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientAt {
    /// Where it is, as this process sees it: host:port.
    pub address: String,
    /// When it was connected: milliseconds since 1970.
    pub since_ms: u64,
}

impl ClientAt {
    /// A client that has connected just now.
    #[must_use]
    pub fn now(address: &impl ToString) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let since_ms = since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        Self { address: address.to_string(), since_ms }
    }
}

/// Reaches one shard. Clones are cheap.
#[derive(Debug, Clone)]
pub struct ShardClient {
    shard: ShardId,
    route: watch::Receiver<Route>,
    /// The replica in this process, if there is one.
    replica: Option<Arc<dyn LocalReplica>>,
    access: Arc<Access>,
    metrics: Arc<ShardMetrics>,
}

/// The wait between attempts.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    const fn new() -> Self {
        Self(BACKOFF_MIN)
    }

    fn next(&mut self) -> Instant {
        let wait = self.0;
        self.0 = (wait * 2).min(BACKOFF_MAX);
        Instant::now() + wait
    }
}

impl ShardClient {
    /// Reaches `shard` through its leader, which is where `route` says, now and as that changes.
    /// `replica` is the one in this process, if there is one: it is asked while the route says that
    /// the leader is local.
    #[must_use]
    pub fn new(
        shard: ShardId,
        route: watch::Receiver<Route>,
        replica: Option<Arc<dyn LocalReplica>>,
        access: Arc<Access>,
    ) -> Self {
        Self { shard, route, replica, access, metrics: Arc::new(ShardMetrics::new(shard)) }
    }

    /// Which shard it reaches.
    pub(crate) const fn id(&self) -> ShardId {
        self.shard
    }

    /// What is counted of its sessions.
    pub(crate) const fn metrics(&self) -> &Arc<ShardMetrics> {
        &self.metrics
    }

    /// Runs a command through the leader, and again until it has an outcome: only for commands that
    /// may take effect twice without harm. Waits for a leader as long as there is none.
    ///
    /// # Errors
    /// The process is stopping.
    pub async fn run(&self, command: &Bytes) -> Result<Outcome, GroupStopped> {
        self.at_leader(|leader| async move {
            match self.replica_at(&leader) {
                Some(replica) => Ok(replica.run(command.clone()).await?),
                None => wire::run(&self.access, self.shard, &leader, command.clone()).await,
            }
        })
        .await
    }

    /// The volume of this name, as of now. Waits for a leader as long as there is none.
    ///
    /// # Errors
    /// The process is stopping.
    pub async fn describe(&self, name: &str) -> Result<Option<VolumeInfo>, GroupStopped> {
        self.at_leader(|leader| async move {
            match self.replica_at(&leader) {
                Some(replica) => Ok(replica.describe(name).await?),
                None => wire::describe(&self.access, self.shard, &leader, name).await,
            }
        })
        .await
    }

    /// All volumes of the shard, oldest first. Waits for a leader as long as there is none.
    ///
    /// # Errors
    /// The process is stopping.
    pub async fn volumes(&self) -> Result<Vec<VolumeInfo>, GroupStopped> {
        let mut volumes = Vec::<VolumeInfo>::new();
        loop {
            let after = volumes.last().map_or(VolumeId(0), |volume| volume.id);
            let (page, last) = self
                .at_leader(|leader| async move {
                    if let Some(replica) = self.replica_at(&leader) {
                        // The rest at once.
                        let mut all = replica.volumes().await?;
                        all.retain(|volume| volume.id > after);
                        return Ok((all, true));
                    }
                    let page = wire::list(&self.access, self.shard, &leader, after).await?;
                    let last = page.is_empty();
                    Ok((page, last))
                })
                .await?;
            volumes.extend(page);
            if last {
                return Ok(volumes);
            }
        }
    }

    /// Whom a session is for, as its leader is told.
    fn caller(&self, client: &ClientAt) -> Caller {
        let ClientAt { address, since_ms } = client;
        let (client, via) = (address.clone(), self.access.name.to_string());
        Caller { client, via, since_ms: *since_ms }.bounded()
    }

    /// The replica in this process, if it is the leader.
    fn replica_at(&self, leader: &LeaderAt) -> Option<&dyn LocalReplica> {
        self.replica.as_deref().filter(|_| leader.local)
    }

    /// Asks the leader, whoever that is by now, until it has answered.
    async fn at_leader<T, F, Asking>(&self, ask: F) -> Result<T, GroupStopped>
    where
        F: Fn(LeaderAt) -> Asking,
        Asking: Future<Output = Result<T, Elsewhere>>,
    {
        let mut route = self.route.clone();
        let mut backoff = Backoff::new();
        loop {
            let leader = route.borrow_and_update().usable().cloned();
            let until = match leader {
                None => None,
                Some(leader) => tokio::select! {
                    asked = tokio::time::timeout(ATTEMPT_MAX, ask(leader.clone())) => match asked {
                        Ok(Ok(answer)) => return Ok(answer),
                        Ok(Err(Elsewhere::Stopped)) => return Err(GroupStopped),
                        Ok(Err(Elsewhere::NotLeader | Elsewhere::Lost)) | Err(_) => {
                            Some(backoff.next())
                        }
                    },
                    moved = moved_from(&mut route, &leader) => {
                        moved?;
                        continue;
                    }
                },
            };
            tokio::select! {
                changed = route.changed() => changed.map_err(|_| GroupStopped)?,
                () = sleep_until(until) => {}
            }
        }
    }
}

/// Waits until another leader than `asked` is known.
async fn moved_from(
    route: &mut watch::Receiver<Route>,
    asked: &LeaderAt,
) -> Result<(), GroupStopped> {
    route.wait_for(|now| now.leads_away_from(asked)).await.map(|_| ()).map_err(|_| GroupStopped)
}

/// Sleeps until `until`; for ever if there is no such time.
async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Ends the sessions that earlier lives of this process's owner have left in a shard: what their
/// clients had in flight is over. To be spawned once at start, for each shard; it waits for a
/// leader.
pub async fn end_earlier_sessions(shard: ShardClient) {
    let command = command::encode_end_sessions(shard.access.owner);
    let stop = shard.access.shutdown.started();
    tokio::select! {
        ended = shard.run(&command) => {
            if let Ok(outcome) = ended {
                info!(shard = %shard.shard, ?outcome, "ended earlier sessions");
            }
        }
        // The next life of the owner does it.
        () = stop => info!(shard = %shard.shard, "stopping before earlier sessions were ended"),
    }
}
