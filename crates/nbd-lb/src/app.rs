//! Starts and stops a load balancer.
//!
//! ```text
//!  task          ends when
//!  finder        shutdown begins (a task for each shard, and its followers)
//!  readiness     the first leader of each shard is reached, or shutdown begins
//!  HTTP server   shutdown begins, answers are out
//! ```

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{HostPort, Readiness, Shutdown, health};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::config::Config;
use crate::finder::Finder;

/// A running load balancer.
#[derive(Debug)]
pub struct LoadBalancer {
    http: SocketAddr,
    finder: Finder,
    readiness: Readiness,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
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
    /// Binds the sockets and starts to look for leaders. Returns at once; `/readyz` tells when each
    /// shard's leader has been reached.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let refused =
            |source| StartError::Listen { what: "HTTP", address: config.http.clone(), source };
        let listener = TcpListener::bind(config.http.to_string()).await.map_err(refused)?;
        let http = listener.local_addr().map_err(refused)?;
        let shutdown = Shutdown::new();
        let finder = Finder::start(&config.cluster, &shutdown);
        let readiness = readiness(&finder, &shutdown);
        let router =
            health::probes(readiness.clone(), metrics).merge(crate::http::router(finder.clone()));
        let stop = shutdown.token();
        shutdown.spawn(async move {
            if let Err(error) = serve_http(listener, router, stop).await {
                warn!(%error, "the HTTP server ended");
            }
        });
        info!(cluster = %config.cluster.name(), %http, "started");
        let shutdown_deadline = config.shutdown_deadline;
        Ok(Self { http, finder, readiness, shutdown, shutdown_deadline })
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

    /// Stops: answers what was asked over HTTP, within the configured deadline.
    pub async fn stop(self) {
        self.readiness.drain();
        match self.shutdown.drain(self.shutdown_deadline).await {
            Ok(()) => info!("stopped"),
            Err(late) => warn!(%late, "stopping without waiting any longer"),
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
