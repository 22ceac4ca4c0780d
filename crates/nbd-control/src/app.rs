//! Starts and stops a control API.
//!
//! ```text
//!  task          ends when
//!  HTTP server   shutdown begins; answers are out
//!  changes       each when it is made or given up, whether its client waits or not
//!  event streams the client leaves, the operation ends, or shutdown begins
//!  token file    shutdown begins
//! ```

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nbd_service::http::{HTTP_CONNECTIONS_MAX, serve_http};
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::trace::{HttpTraces, Service, Tracer, traced};
use nbd_service::{HostPort, Readiness, Shutdown};
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::cluster::Cluster;
use crate::config::Config;
use crate::http::{Api, router};
use crate::tokens::{TokenFileError, Tokens};

/// A running control API.
#[derive(Debug)]
pub struct ControlApi {
    http: SocketAddr,
    readiness: Readiness,
    shutdown: Shutdown,
    shutdown_deadline: Duration,
    tracer: Tracer,
}

/// Why a control API did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address} for HTTP")]
    Listen {
        /// The address as configured.
        address: HostPort,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The token file cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokenFileError),
}

impl ControlApi {
    /// Binds the socket and begins to answer. It needs no node to be there: what does not answer is
    /// what it has to tell about.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        crate::metrics::describe();
        let tokens = config.token_file.as_deref().map(Tokens::load).transpose()?;
        let failed = |source| StartError::Listen { address: config.http.clone(), source };
        let listener = listen(&config.http).await.map_err(failed)?;
        let http = listener.local_addr().map_err(failed)?;
        match &tokens {
            Some(_) => info!(%http, "a token is asked for"),
            None if http.ip().is_loopback() => {
                info!(%http, "no token is asked for: everybody on this machine may do everything");
            }
            None => warn!(
                %http,
                "NO TOKEN IS ASKED FOR: everybody who reaches this address may do everything; give \
                 --token-file, or --http with an address of this machine alone"
            ),
        }
        let shutdown = Shutdown::new();
        if let Some(tokens) = &tokens {
            shutdown.spawn(tokens.clone().follow(shutdown.token()));
        }
        let instance = format!("nbd-control at {http}");
        let service = Service {
            name: "nbd-control",
            instance: &instance,
            version: env!("CARGO_PKG_VERSION"),
        };
        let tracer = Tracer::start(&config.trace, service);
        let (readiness, []) = Readiness::new([]);
        let cluster = Cluster::new(config.cluster, config.deadline);
        let name = cluster.config().name().clone();
        let (hosts, ui) = (config.allowed_hosts, config.jaeger_ui);
        let api = Arc::new(Api::new(cluster, tokens, hosts, ui, shutdown.clone()));
        let traces = HttpTraces { tracer: tracer.clone(), by_chance: true };
        let router = router(api, readiness.clone(), metrics)
            .layer(axum::middleware::from_fn_with_state(traces, traced));
        let stop = shutdown.token();
        shutdown.spawn(async move {
            if let Err(error) = serve_http(listener, router, stop).await {
                warn!(%error, "the HTTP server ended");
            }
        });
        info!(cluster = %name, %http, connections_max = HTTP_CONNECTIONS_MAX, "started");
        let shutdown_deadline = config.shutdown_deadline;
        Ok(Self { http, readiness, shutdown, shutdown_deadline, tracer })
    }

    /// Where HTTP is served.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// Stops: takes no more requests, answers those received, within the configured deadline, and
    /// ends the streams of events.
    pub async fn stop(self) {
        self.readiness.drain();
        match self.shutdown.drain(self.shutdown_deadline).await {
            Ok(()) => info!("stopped"),
            Err(late) => warn!(%late, "stopping without waiting any longer"),
        }
        self.tracer.shutdown().await;
    }
}

async fn listen(address: &HostPort) -> io::Result<TcpListener> {
    TcpListener::bind(address.to_string()).await
}
