//! Starts and stops a load balancer.
//!
//! ```text
//!  task          ends when
//!  listener      accepting ends: a drain begins, or another process has taken over
//!  takeover      a drain begins; or another has taken over, and shutdown begins
//!  adoption      the process before this one has no more clients to hand over, or shutdown begins
//!  connections   the client leaves or is handed over; or shutdown begins, and what was received is
//!                answered
//!  readiness     the first leader of each shard is reached, or shutdown begins
//!  HTTP server   another process has taken over, or shutdown begins; answers are out
//!  finder        all of the above have ended (a task for each shard, and its followers)
//! ```
//!
//! A stop has two steps: [`LoadBalancer::drain`] lets clients go on until they leave, and
//! [`LoadBalancer::stop`] ends what is left.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nbd_front::{Access, Adopter, ByteBudget, Connections, Front, Links, Listener, ShardClient};
use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::trace::{HttpTraces, Service, Tracer};
use nbd_service::{HostPort, Readiness, Shutdown, health, trace};
use nbd_store::Owner;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::config::{Config, Mode};
use crate::finder::Finder;
use crate::sockets::{self, Found};
use crate::takeover::{Identity, Predecessor, TakeoverError, adopt};

/// A running load balancer.
#[derive(Debug)]
pub struct LoadBalancer {
    nbd: SocketAddr,
    http: SocketAddr,
    finder: Finder,
    readiness: Readiness,
    connections: Connections,
    /// Cancelled once no earlier process hands connections over any more.
    adopted: CancellationToken,
    drain_deadline: Duration,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
    tracer: Tracer,
    /// Cancelled when no more connections are accepted.
    accepting: CancellationToken,
    /// Cancelled when another process accepts them instead.
    superseded: CancellationToken,
    /// Cancelled when nobody asks for a leader any more.
    finder_stop: DropGuard,
}

/// Why a load balancer did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for {what}")]
    Listen {
        /// What would be served there.
        what: &'static str,
        /// The address as configured.
        address: HostPort,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One runs already, and this one cannot take over.
    #[error(transparent)]
    Takeover(#[from] TakeoverError),
}

impl LoadBalancer {
    /// Binds the sockets, starts to look for leaders and to serve clients. Returns at once;
    /// `/readyz` tells when each shard's leader has been reached. Who attaches before waits.
    ///
    /// If it takes over from a running process, it first waits for the leaders, for a few seconds
    /// at most, and returns once it accepts connections in that one's place. That one's clients
    /// follow.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        crate::metrics::describe();
        let identity = Identity::of(&config.cluster);
        let found = sockets::find(&config, &identity).await?;
        let shutdown = Shutdown::new();
        let undo = shutdown.token().drop_guard();
        let finder_stop = CancellationToken::new();
        let finder = Finder::start(&config.cluster, &finder_stop);
        let finder_stop = finder_stop.drop_guard();
        let readiness = readiness(&finder, &shutdown);
        let Found { nbd, http, takeover, before } =
            found.settle(&config, &identity, leaders_reached(&finder)).await?;

        let accepting = shutdown.token().child_token();
        let superseded = shutdown.token().child_token();
        let service =
            Service { name: "nbd-lb", instance: &config.name, version: env!("CARGO_PKG_VERSION") };
        let tracer = Tracer::start(&config.trace, service);
        let front = Arc::new(front(&config, &finder, &shutdown).traced(tracer.clone()));
        let sessions = front.sessions();
        if let Some(takeover) = takeover {
            let handover = front.handover();
            match Predecessor::new(takeover, &nbd.socket, &http.socket, identity, handover) {
                Ok(predecessor) => {
                    let (accepting, superseded) = (accepting.clone(), superseded.clone());
                    shutdown.spawn(predecessor.run(accepting, superseded, shutdown.clone()));
                }
                // The process before has given its place away by now: somebody must serve.
                Err(error) => warn!(%error, "no other load balancer can take over from this one"),
            }
        }
        let listener = Listener::new(nbd.socket, front, config.connections_max as usize);
        let connections = listener.connections();
        let adopting = CancellationToken::new();
        let adopted = adopting.clone().drop_guard();
        if let Some(before) = before {
            let adopter = Adopter::beside(&listener);
            let stop = shutdown.started();
            shutdown.spawn(async move {
                adopt(before, adopter, stop).await;
                drop(adopted);
            });
        }
        shutdown.spawn(listener.run_until(accepting.clone().cancelled_owned()));
        let traces = HttpTraces { tracer: tracer.clone(), by_chance: false };
        let router = health::probes(readiness.clone(), metrics)
            .merge(crate::http::router(finder.clone()))
            .merge(sessions.router())
            .layer(axum::middleware::from_fn_with_state(traces, trace::traced));
        let stop = superseded.clone();
        shutdown.spawn(async move {
            if let Err(error) = serve_http(http.socket, router, stop).await {
                warn!(%error, "the HTTP server ended");
            }
        });
        undo.disarm();
        let (nbd, http) = (nbd.address, http.address);
        info!(cluster = %config.cluster.name(), %nbd, %http, "started");
        Ok(Self {
            nbd,
            http,
            finder,
            readiness,
            connections,
            adopted: adopting,
            drain_deadline: config.drain_deadline,
            shutdown,
            tracer,
            shutdown_deadline: config.shutdown_deadline,
            accepting,
            superseded,
            finder_stop,
        })
    }

    /// Where NBD is served.
    #[must_use]
    pub const fn nbd_address(&self) -> SocketAddr {
        self.nbd
    }

    /// Where HTTP is served.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// The routes to the shards' leaders.
    #[must_use]
    pub const fn finder(&self) -> &Finder {
        &self.finder
    }

    /// Whether each shard's leader has been reached since the start.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.readiness.is_ready()
    }

    /// Connections there are now, in handshake or attached.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.count()
    }

    /// Waits until another process accepts connections in place of this one: it is to be drained
    /// then.
    pub async fn superseded(&self) {
        self.superseded.cancelled().await;
    }

    /// Accepts no more clients, is not ready any more, and waits until those there are have left or
    /// were handed over; not longer than the drain deadline.
    pub async fn drain(&self) {
        self.readiness.drain();
        self.accepting.cancel();
        let (clients, within) = (self.connections.count(), self.drain_deadline);
        info!(clients, ?within, "draining");
        let emptied = async {
            // What an earlier process still hands over is handed on.
            self.adopted.cancelled().await;
            self.connections.none_left().await;
        };
        if tokio::time::timeout(within, emptied).await.is_err() {
            let clients = self.connections.count();
            warn!(clients, "the drain deadline has passed: ending the connections that are left");
        }
    }

    /// Stops: takes no more clients and requests, answers those received, within the configured
    /// deadline, and ends the sessions.
    pub async fn stop(self) {
        self.readiness.drain();
        match self.shutdown.drain(self.shutdown_deadline).await {
            Ok(()) => info!("stopped"),
            Err(late) => warn!(%late, "stopping without waiting any longer"),
        }
        drop(self.finder_stop);
        self.tracer.shutdown().await;
    }
}

/// What serves the volumes of all shards.
fn front(config: &Config, finder: &Finder, shutdown: &Shutdown) -> Front {
    let access = Arc::new(Access {
        cluster: config.cluster.name().clone(),
        // Nobody else's, so that nobody ends the sessions of this process: those it leaves behind
        // when it is killed expire, and those it hands over become their new owner's.
        owner: Owner { node: rand::random(), incarnation: 0 },
        name: Arc::clone(&config.name),
        links: Links::default(),
        shutdown: shutdown.clone(),
    });
    let shards = config.cluster.shard_map().shards().filter_map(|(shard, _)| {
        let route = finder.route(shard)?;
        Some((shard, ShardClient::new(shard, route, None, Arc::clone(&access))))
    });
    let front = Front::new(
        config.cluster.shard_count(),
        shards.collect(),
        config.volumes,
        ByteBudget::new(config.request_bytes_max.bytes()),
        shutdown.clone(),
    );
    match config.mode {
        Mode::Replay => front,
        Mode::Splice => {
            let shards = config.cluster.shard_map().shards();
            let servers = shards.filter_map(|(shard, _)| Some((shard, finder.servers(shard)?)));
            front.splicing(servers.collect())
        }
    }
}

/// Waits until the leader of every shard has been reached.
async fn leaders_reached(finder: &Finder) {
    for mut status in finder.statuses() {
        if status.wait_for(|status| status.reached).await.is_err() {
            return;
        }
    }
}

/// Ready once the leader of every shard has been reached.
fn readiness(finder: &Finder, shutdown: &Shutdown) -> Readiness {
    let (readiness, [latch]) = Readiness::new(["the leader of every shard to be reached"]);
    for mut status in finder.statuses() {
        let (latch, stop) = (latch.clone(), shutdown.started());
        shutdown.spawn(async move {
            let reached = tokio::select! {
                status = status.wait_for(|status| status.reached) => status.is_ok(),
                () = stop => false,
            };
            if reached {
                latch.release();
            } else {
                // Never ready: the condition must not be met by dropping the latch.
                std::mem::forget(latch);
            }
        });
    }
    readiness
}
