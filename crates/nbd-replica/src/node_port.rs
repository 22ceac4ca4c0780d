//! The port of a node for other processes: gRPC and relays, told apart by their first byte.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nbd_relay::PREAMBLE;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::relay_service::RelayService;

/// Connections that have not sent their first byte, or have not been taken by the gRPC server.
/// Whoever means well sends it at once.
const UNDECIDED_MAX: usize = 4096;

/// Time for that.
const FIRST_BYTE_MAX: Duration = Duration::from_secs(10);

/// Connections on their way to the gRPC server.
const CALLERS_MAX: usize = 16;

/// Wait before accepting again after the system refused (out of file descriptors, say).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The connections for the gRPC server.
pub(crate) type Callers = ReceiverStream<io::Result<TcpStream>>;

/// Accepts connections and leads them where they want to go.
#[derive(Debug)]
pub(crate) struct NodePort {
    listener: TcpListener,
    relays: RelayService,
    callers: mpsc::Sender<io::Result<TcpStream>>,
    undecided: Arc<Semaphore>,
}

impl NodePort {
    /// A port that is to be [run](Self::run), and what comes of it for the gRPC server.
    pub(crate) fn new(listener: TcpListener, relays: RelayService) -> (Self, Callers) {
        let (callers, incoming) = mpsc::channel(CALLERS_MAX);
        let undecided = Arc::new(Semaphore::new(UNDECIDED_MAX));
        (Self { listener, relays, callers, undecided }, ReceiverStream::new(incoming))
    }

    /// Runs until `stop` is cancelled, or the gRPC server has ended.
    pub(crate) async fn run(self, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                () = self.callers.closed() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => self.decide(stream),
                Err(error) => {
                    warn!(%error, "cannot accept a connection of another process");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn decide(&self, stream: TcpStream) {
        let Ok(place) = Arc::clone(&self.undecided).try_acquire_owned() else {
            debug!(limit = UNDECIDED_MAX, "too many silent connections: closed a new one");
            return;
        };
        let (relays, callers) = (self.relays.clone(), self.callers.clone());
        tokio::spawn(async move {
            let is_relay = match tokio::time::timeout(FIRST_BYTE_MAX, first_byte(&stream)).await {
                Ok(Ok(Some(first))) => first == PREAMBLE[0],
                _ => return,
            };
            if is_relay {
                relays.spawn(stream);
            } else if stream.set_nodelay(true).is_ok() {
                let _ = callers.send(Ok(stream)).await;
            }
            drop(place);
        });
    }
}

/// The first byte, which stays where it is; `None` if none will come.
async fn first_byte(stream: &TcpStream) -> io::Result<Option<u8>> {
    let mut first = [0];
    Ok((stream.peek(&mut first).await? > 0).then_some(first[0]))
}
