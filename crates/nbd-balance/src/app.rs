//! Starts and stops the balancer.
//!
//! ```text
//!  task          ends when
//!  listener      accepting ends: a drain begins, or shutdown begins
//!  connections   an end ends; or shutdown begins, and what was received is answered
//!  looks         shutdown begins (two tasks for each load balancer: its name, its greeting)
//!  HTTP server   shutdown begins; answers are out
//! ```
//!
//! A stop has two steps: [`Balancer::drain`] lets clients go on until they leave, and
//! [`Balancer::stop`] ends what is left.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use nbd_service::http::serve_http;
use nbd_service::telemetry::PrometheusHandle;
use nbd_service::{HostPort, Readiness, Shutdown, health};
use nbd_splice::{Moved, Pipes, carry, send, set_options};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, info_span, warn};

use crate::backend::{Backend, Greeted};
use crate::config::Config;
use crate::metrics::{self, BalanceMetrics};
use crate::race::Backends;

/// Wait before accepting again after the system refused (out of file descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How long a stop waits for what was received to be answered.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// A running balancer.
#[derive(Debug)]
pub struct Balancer {
    nbd: SocketAddr,
    http: SocketAddr,
    readiness: Readiness,
    shared: Arc<Shared>,
    shutdown: Shutdown,
    /// Cancelled when no more connections are accepted.
    accepting: CancellationToken,
    drain_deadline: Duration,
}

/// What connections share.
struct Shared {
    backends: Arc<Backends>,
    pipes: Pipes,
    metrics: BalanceMetrics,
    /// A permit for each connection that may be carried.
    places: Arc<Semaphore>,
    connections_max: u32,
}

/// Why a balancer did not start.
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

impl Balancer {
    /// Binds the sockets and serves clients. Returns at once; `/readyz` tells when the first load
    /// balancer has greeted. Who attaches before waits.
    ///
    /// # Errors
    /// See [`StartError`]. Nothing is left running.
    pub async fn start(config: Config, metrics: PrometheusHandle) -> Result<Self, StartError> {
        let nbd = listen("NBD", &config.nbd).await?;
        let http = listen("HTTP", &config.http).await?;
        metrics::describe();
        let (nbd, nbd_at) = nbd;
        let (http, http_at) = http;
        let shutdown = Shutdown::new();
        let all = config.backends.iter().map(Backend::new).collect();
        let backends = Arc::new(Backends::new(all));
        let readiness = look(&backends, &shutdown);
        let shared = Arc::new(Shared {
            backends: Arc::clone(&backends),
            pipes: Pipes::default(),
            metrics: BalanceMetrics::new(),
            places: Arc::new(Semaphore::new(config.connections_max as usize)),
            connections_max: config.connections_max,
        });
        let accepting = shutdown.token().child_token();
        let listener = Arc::clone(&shared).accept(nbd, shutdown.clone());
        let stop = accepting.clone();
        shutdown.spawn(async move {
            stop.run_until_cancelled(listener).await;
        });
        let router =
            health::probes(readiness.clone(), metrics).merge(crate::http::router(backends));
        let stop = shutdown.token();
        shutdown.spawn(async move {
            if let Err(error) = serve_http(http, router, stop).await {
                warn!(%error, "the HTTP server ended");
            }
        });
        info!(nbd = %nbd_at, http = %http_at, "started");
        let drain_deadline = config.drain_deadline;
        Ok(Self {
            nbd: nbd_at,
            http: http_at,
            readiness,
            shared,
            shutdown,
            accepting,
            drain_deadline,
        })
    }

    /// Where clients attach.
    #[must_use]
    pub const fn nbd_address(&self) -> SocketAddr {
        self.nbd
    }

    /// Where HTTP is served.
    #[must_use]
    pub const fn http_address(&self) -> SocketAddr {
        self.http
    }

    /// Accepts no more clients, is not ready any more, and waits until those there are have left;
    /// not longer than the drain deadline.
    pub async fn drain(&self) {
        self.readiness.drain();
        self.accepting.cancel();
        let Shared { places, connections_max, .. } = &*self.shared;
        let clients = *connections_max as usize - places.available_permits();
        info!(clients, within = ?self.drain_deadline, "draining");
        // All permits are back when all clients have gone.
        let emptied = places.acquire_many(*connections_max);
        if tokio::time::timeout(self.drain_deadline, emptied).await.is_err() {
            let clients = *connections_max as usize - places.available_permits();
            warn!(clients, "the drain deadline has passed: ending the connections that are left");
        }
    }

    /// Stops: ends the connections that are left, once what was received is answered.
    pub async fn stop(self) {
        self.readiness.drain();
        match self.shutdown.drain(STOP_DEADLINE).await {
            Ok(()) => info!("stopped"),
            Err(late) => warn!(%late, "stopping without waiting any longer"),
        }
    }
}

/// There is nothing to see in pipes and permits.
impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("backends", &self.backends).finish_non_exhaustive()
    }
}

async fn listen(
    what: &'static str,
    address: &HostPort,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let refused = |source| StartError::Listen { what, address: address.clone(), source };
    let socket = TcpListener::bind(address.to_string()).await.map_err(refused)?;
    let address = socket.local_addr().map_err(refused)?;
    Ok((socket, address))
}

/// Keeps an eye on all load balancers. Ready once one has greeted.
fn look(backends: &Backends, shutdown: &Shutdown) -> Readiness {
    let (readiness, [latch]) = Readiness::new(["a load balancer to greet"]);
    let latch = Arc::new(Mutex::new(Some(latch)));
    for backend in backends.all() {
        shutdown.spawn(Arc::clone(backend).resolve(shutdown.token()));
        let latch = Arc::clone(&latch);
        let greeted = move || {
            let latch = latch.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(latch);
        };
        shutdown.spawn(Arc::clone(backend).look(shutdown.token(), greeted));
    }
    readiness
}

impl Shared {
    async fn accept(self: Arc<Self>, listener: TcpListener, shutdown: Shutdown) {
        let mut number = 0_u64;
        loop {
            let (client, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() else {
                // Closing before the greeting is how NBD says no at this point.
                let limit = self.connections_max;
                info!(%peer, limit, "too many connections: closed a new one");
                self.metrics.refused();
                continue;
            };
            if let Err(error) = set_options(&client) {
                debug!(%peer, %error, "cannot set socket options");
                continue;
            }
            number += 1;
            let (shared, stop) = (Arc::clone(&self), shutdown.token());
            let serve = async move {
                shared.serve(client, stop).await;
                drop(permit);
            };
            shutdown.spawn(serve.instrument(info_span!("connection", id = number, %peer)));
        }
    }

    async fn serve(&self, client: TcpStream, stop: CancellationToken) {
        let began = Instant::now();
        let Some(found) = stop.run_until_cancelled(self.backends.find()).await else { return };
        let Some(Greeted { stream, greeting, place }) = found else {
            info!(waited = ?began.elapsed(), "no load balancer greets: closed the connection");
            self.metrics.unserved();
            return;
        };
        let backend = place.backend();
        self.metrics.served(began.elapsed());
        backend.metrics.attached();
        info!(backend = backend.name(), "attached");
        let sent = |bytes| backend.metrics.sent(bytes);
        let carried = async {
            send(&client, BytesMut::from(&greeting[..]), sent).await?;
            let moved = Moved { up: |bytes| backend.metrics.received(bytes), down: sent };
            carry(&client, &stream, BytesMut::new(), &self.pipes, &stop, moved).await
        };
        match carried.await {
            Ok(()) => info!("detached"),
            Err(error) => info!(reason = %error, "connection ended"),
        }
    }
}
