//! Accepts NBD connections.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nbd_splice::set_options;
use tokio::net::{TcpListener, TcpStream};
use tracing::{Instrument, Span, debug, info, info_span, warn};

use super::Front;
use super::attach::{self, Origin};
use super::connections::{Connections, Place};

/// Wait before accepting again after the system refused (out of file descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Accepts connections until the process shuts down.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    front: Arc<Front>,
    connections: Connections,
}

impl Listener {
    /// Serves at most `connections_max` connections at a time, which come over `socket`.
    #[must_use]
    pub fn new(socket: TcpListener, front: Arc<Front>, connections_max: usize) -> Self {
        let connections_max = u32::try_from(connections_max).unwrap_or(u32::MAX);
        Self { socket, front, connections: Connections::new(connections_max) }
    }

    /// The connections that it has accepted.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.connections.clone()
    }

    pub(super) const fn front(&self) -> &Arc<Front> {
        &self.front
    }

    /// Runs until shutdown begins. Each connection is a task that the shutdown waits for.
    pub async fn run(self) {
        let shutdown = self.front.shutdown.started();
        self.run_until(shutdown).await;
    }

    /// Runs until `stop`; the connections accepted by then go on.
    pub async fn run_until(self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => return,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.spawn(stream, peer),
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr) {
        let Some(place) = self.connections.enter() else {
            // Closing before the greeting is how NBD says no at this point.
            info!(%peer, limit = self.connections.max(), "too many connections: closed a new one");
            self.front.metrics.connections_refused.increment(1);
            return;
        };
        if let Err(error) = set_options(&stream) {
            debug!(%peer, %error, "cannot set socket options");
            return;
        }
        let front = Arc::clone(&self.front);
        let origin = Origin { number: place.number, peer };
        let span = info_span!("connection", id = origin.number, %peer);
        let serve = async move { attach::serve(stream, origin, &front).await };
        spawn_connection(&self.front, place, span, serve);
    }
}

/// Runs a connection to its end, as a task that the shutdown waits for.
pub(super) fn spawn_connection(
    front: &Arc<Front>,
    place: Place,
    span: Span,
    connection: impl Future<Output = ()> + Send + 'static,
) {
    let counted = Arc::clone(front);
    let task = async move {
        counted.metrics.connections.increment(1.0);
        connection.await;
        counted.metrics.connections.decrement(1.0);
        drop(place);
    };
    front.shutdown.spawn(task.instrument(span));
}
