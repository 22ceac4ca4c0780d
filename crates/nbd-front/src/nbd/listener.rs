//! Accepts NBD connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{Instrument, debug, info, info_span, warn};

use super::{Front, attach};

/// Wait before accepting again after the system refused (out of file descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Accepts connections until the process shuts down.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    front: Arc<Front>,
    connections_max: usize,
    connections: Arc<Semaphore>,
}

impl Listener {
    /// Serves at most `connections_max` connections at a time, which come over `socket`.
    #[must_use]
    pub fn new(socket: TcpListener, front: Arc<Front>, connections_max: usize) -> Self {
        let connections = Arc::new(Semaphore::new(connections_max));
        Self { socket, front, connections_max, connections }
    }

    /// Runs until shutdown begins. Each connection is a task that the shutdown waits for.
    pub async fn run(self) {
        let mut connection_number = 0_u64;
        loop {
            let accepted = tokio::select! {
                () = self.front.shutdown.started() => return,
                accepted = self.socket.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    connection_number += 1;
                    self.spawn(stream, peer, connection_number);
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, peer: SocketAddr, number: u64) {
        let Ok(place) = Arc::clone(&self.connections).try_acquire_owned() else {
            // Closing before the greeting is how NBD says no at this point.
            info!(%peer, limit = self.connections_max, "too many connections: closed a new one");
            self.front.metrics.connections_refused.increment(1);
            return;
        };
        if let Err(error) = set_options(&stream) {
            debug!(%peer, %error, "cannot set socket options");
            return;
        }
        let front = Arc::clone(&self.front);
        let span = info_span!("connection", id = number, %peer);
        self.front.shutdown.spawn(
            async move {
                front.metrics.connections.increment(1.0);
                attach::serve(stream, &front).await;
                front.metrics.connections.decrement(1.0);
                drop(place);
            }
            .instrument(span),
        );
    }
}

/// Replies leave at once, and a client whose host is gone is noticed within about a minute.
fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(60)))
}
