//! Starts and stops a load balancer.
//!
//! ```text
//!  task          ends when
//!  listener      shutdown begins
//!  connections   shutdown begins, and what was received is answered
//!  readiness     the first leader of each shard is reached, or shutdown begins
//!  HTTP server   shutdown begins, answers are out
//!  finder        all of the above have ended (a task for each shard, and its followers)
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nbd_front::{Access, ByteBudget, Front, Links, Listener, ShardClient};
use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{HostPort, Readiness, Shutdown, health};
use nbd_store::Owner;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::config::Config;
use crate::finder::Finder;

/// A running load balancer.
#[derive(Debug)]
pub struct LoadBalancer {
    nbd: SocketAddr,
    http: SocketAddr,
    finder: Finder,
    readiness: Readiness,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
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
}

impl LoadBalancer {
    /// Binds the sockets, starts to look for leaders and to serve clients. Returns at once;
    /// `/readyz` tells when each shard's leader has been reached. Who attaches before waits.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let (listener, http) = listen("HTTP", &config.http).await?;
        let (clients, nbd) = listen("NBD", &config.nbd).await?;
        let shutdown = Shutdown::new();
        let finder_stop = CancellationToken::new();
        let finder = Finder::start(&config.cluster, &finder_stop);
        let finder_stop = finder_stop.drop_guard();
        let readiness = readiness(&finder, &shutdown);
        let front = front(&config, &finder, &shutdown);
        let connections_max = config.connections_max as usize;
        shutdown.spawn(Listener::new(clients, Arc::new(front), connections_max).run());
        let router =
            health::probes(readiness.clone(), metrics).merge(crate::http::router(finder.clone()));
        let stop = shutdown.token();
        shutdown.spawn(async move {
            if let Err(error) = serve_http(listener, router, stop).await {
                warn!(%error, "the HTTP server ended");
            }
        });
        info!(cluster = %config.cluster.name(), %nbd, %http, "started");
        let shutdown_deadline = config.shutdown_deadline;
        Ok(Self { nbd, http, finder, readiness, shutdown, shutdown_deadline, finder_stop })
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

    /// Stops: takes no more clients and requests, answers those received, within the configured
    /// deadline, and ends the sessions.
    pub async fn stop(self) {
        self.readiness.drain();
        match self.shutdown.drain(self.shutdown_deadline).await {
            Ok(()) => info!("stopped"),
            Err(late) => warn!(%late, "stopping without waiting any longer"),
        }
        drop(self.finder_stop);
    }
}

async fn listen(
    what: &'static str,
    address: &HostPort,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let refused = |source| StartError::Listen { what, address: address.clone(), source };
    let listener = TcpListener::bind(address.to_string()).await.map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    Ok((listener, bound))
}

/// What serves the volumes of all shards.
fn front(config: &Config, finder: &Finder, shutdown: &Shutdown) -> Front {
    let access = Arc::new(Access {
        cluster: config.cluster.name().clone(),
        // Nobody else's: sessions that this process leaves behind when it is killed expire.
        owner: Owner { node: rand::random(), incarnation: 0 },
        links: Links::default(),
        shutdown: shutdown.clone(),
    });
    let shards = config.cluster.shard_map().shards().filter_map(|(shard, _)| {
        let route = finder.route(shard)?;
        Some((shard, ShardClient::new(shard, route, None, Arc::clone(&access))))
    });
    Front::new(
        config.cluster.shard_count(),
        shards.collect(),
        config.volumes,
        ByteBudget::new(config.request_bytes_max.bytes()),
        shutdown.clone(),
    )
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
