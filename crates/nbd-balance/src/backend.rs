//! One load balancer: where it is, whether it greets, and how many clients it has.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nbd_service::HostPort;
use nbd_splice::set_options;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::choice::Candidate;
use crate::limits::{ADDRESSES_MAX, GREETING_BYTES, GREETING_MAX, LOOK_INTERVAL, RESOLVE_INTERVAL};
use crate::metrics::BackendMetrics;

/// With what a greeting begins.
const MAGIC: &[u8] = b"NBDMAGIC";

/// One of the load balancers.
#[derive(Debug)]
pub(crate) struct Backend {
    name: String,
    /// What its name last led to; nothing until it has for the first time.
    addresses: watch::Sender<Vec<SocketAddr>>,
    /// Whether it greeted when it was last asked.
    up: AtomicBool,
    /// Clients that it has, and those that are just being given to it.
    connections: AtomicUsize,
    /// Number of the choice that it was last the first of.
    chosen: AtomicU64,
    pub(crate) metrics: BackendMetrics,
}

/// A connection to a load balancer that has greeted.
#[derive(Debug)]
pub(crate) struct Greeted {
    pub(crate) stream: TcpStream,
    /// What it said, which the client is told.
    pub(crate) greeting: [u8; GREETING_BYTES],
    pub(crate) place: Place,
}

/// A client's place at a load balancer; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Place {
    backend: Arc<Backend>,
}

/// Why a load balancer takes no client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("its name leads nowhere so far")]
    Unresolved,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it does not greet in time")]
    Silent,
    #[error("what it says is no NBD server's greeting")]
    Stranger,
}

impl Backend {
    pub(crate) fn new(at: &HostPort) -> Arc<Self> {
        let name = at.to_string();
        let metrics = BackendMetrics::new(&name);
        Arc::new(Self {
            name,
            addresses: watch::Sender::new(Vec::new()),
            up: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            chosen: AtomicU64::new(0),
            metrics,
        })
    }

    /// Where it is, as configured.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it greeted when it was last asked.
    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// What it takes to choose.
    pub(crate) fn candidate(&self) -> Candidate {
        Candidate {
            up: self.is_up(),
            connections: self.connections.load(Ordering::Relaxed),
            chosen: self.chosen.load(Ordering::Relaxed),
        }
    }

    /// It is the first of this choice.
    pub(crate) fn note_chosen(&self, number: u64) {
        self.chosen.store(number, Ordering::Relaxed);
    }

    /// A place for a client. Taken before it greets, so that clients that come together spread.
    pub(crate) fn enter(self: &Arc<Self>) -> Place {
        let connections = self.connections.fetch_add(1, Ordering::Relaxed) + 1;
        self.metrics.connections(connections);
        Place { backend: Arc::clone(self) }
    }

    /// Connects, and waits for the greeting.
    pub(crate) async fn greet(self: &Arc<Self>) -> Result<Greeted, Unfit> {
        let place = self.enter();
        let (stream, greeting) = self.ask().await?;
        Ok(Greeted { stream, greeting, place })
    }

    async fn ask(&self) -> Result<(TcpStream, [u8; GREETING_BYTES]), Unfit> {
        let asked = timeout(GREETING_MAX, self.connect());
        let asked = asked.await.map_err(|_| Unfit::Silent).and_then(|asked| asked);
        self.note(&asked);
        asked
    }

    async fn connect(&self) -> Result<(TcpStream, [u8; GREETING_BYTES]), Unfit> {
        // At the start its name may be just being looked up.
        let mut addresses = self.addresses.subscribe();
        let known = addresses.wait_for(|addresses| !addresses.is_empty()).await;
        let known = known.map_err(|_| Unfit::Unresolved)?.clone();
        let mut stream = TcpStream::connect(known.as_slice()).await?;
        set_options(&stream)?;
        let mut greeting = [0; GREETING_BYTES];
        stream.read_exact(&mut greeting).await?;
        if greeting.starts_with(MAGIC) { Ok((stream, greeting)) } else { Err(Unfit::Stranger) }
    }

    fn note<T>(&self, asked: &Result<T, Unfit>) {
        let up = asked.is_ok();
        self.metrics.up(up);
        match (self.up.swap(up, Ordering::Relaxed), asked) {
            (false, Ok(_)) => info!(backend = self.name, "it greets"),
            (true, Err(error)) => warn!(backend = self.name, %error, "it does not greet any more"),
            (false, Err(error)) => debug!(backend = self.name, %error, "it does not greet"),
            (true, Ok(_)) => {}
        }
    }

    /// Looks again and again whether it greets, until `stop`. `greeted` is told of each time it
    /// does.
    pub(crate) async fn look(self: Arc<Self>, stop: CancellationToken, greeted: impl Fn()) {
        let looking = async {
            loop {
                if self.ask().await.is_ok() {
                    greeted();
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        };
        stop.run_until_cancelled(looking).await;
    }

    /// Looks its name up again and again, until `stop`. What it led to last holds until it leads to
    /// something else: a resolver may take its time over a name whose container is gone.
    pub(crate) async fn resolve(self: Arc<Self>, stop: CancellationToken) {
        let resolving = async {
            loop {
                match tokio::net::lookup_host(&self.name).await {
                    Ok(found) => self.found(found.take(ADDRESSES_MAX).collect()),
                    Err(error) => debug!(backend = self.name, %error, "cannot look its name up"),
                }
                tokio::time::sleep(RESOLVE_INTERVAL).await;
            }
        };
        stop.run_until_cancelled(resolving).await;
    }

    fn found(&self, found: Vec<SocketAddr>) {
        let changed = self.addresses.send_if_modified(|known| {
            // Some resolvers give them in another order each time.
            let same = known.len() == found.len() && found.iter().all(|it| known.contains(it));
            let changed = !found.is_empty() && !same;
            if changed {
                known.clone_from(&found);
            }
            changed
        });
        if changed {
            debug!(backend = self.name, ?found, "its name leads there now");
        }
    }
}

impl Place {
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let connections = self.backend.connections.fetch_sub(1, Ordering::Relaxed) - 1;
        self.backend.metrics.connections(connections);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    const GREETING: &[u8; GREETING_BYTES] = b"NBDMAGICIHAVEOPT\0\x03";

    /// What a server in a test does with a connection.
    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Habit {
        /// Greets at once.
        Greets,
        /// Greets after so many milliseconds.
        Late(u64),
        /// Accepts and says nothing, as one that is stopped does.
        Silent,
        /// Accepts and closes, as one that is full does.
        Closes,
        /// Speaks something else.
        Stranger,
    }

    /// A server of that habit, known by its address. It ends with the test's runtime.
    pub(crate) async fn backend(habit: Habit) -> Arc<Backend> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let backend = Backend::new(&address.to_string().parse().unwrap());
        backend.found(vec![address]);
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    match habit {
                        Habit::Greets => stream.write_all(GREETING).await.unwrap(),
                        Habit::Late(ms) => {
                            tokio::time::sleep(Duration::from_millis(ms)).await;
                            let _ = stream.write_all(GREETING).await;
                        }
                        Habit::Silent => {}
                        Habit::Closes => return,
                        Habit::Stranger => {
                            stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n").await.unwrap();
                        }
                    }
                    // Open until the other side closes.
                    let _ = stream.read(&mut [0; 64]).await;
                });
            }
        });
        backend
    }

    #[tokio::test]
    async fn only_a_greeting_counts() {
        let greets = backend(Habit::Greets).await;
        let greeted = greets.greet().await.unwrap();
        assert_eq!(&greeted.greeting, GREETING);
        assert!(greets.is_up());
        assert_eq!(greets.candidate().connections, 1);
        drop(greeted);
        assert_eq!(greets.candidate().connections, 0);
        let closes = backend(Habit::Closes).await;
        assert!(matches!(closes.greet().await, Err(Unfit::Io(_))));
        let stranger = backend(Habit::Stranger).await;
        assert!(matches!(stranger.greet().await, Err(Unfit::Stranger)));
        let silent = backend(Habit::Silent).await;
        assert!(matches!(silent.greet().await, Err(Unfit::Silent)));
        for unfit in [closes, stranger, silent] {
            assert!(!unfit.is_up() && unfit.candidate().connections == 0);
        }
    }

    #[tokio::test]
    async fn the_last_known_addresses_are_kept() {
        let backend = Backend::new(&"nowhere.invalid:10809".parse().unwrap());
        let (one, other) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.2:1".parse().unwrap());
        backend.found(vec![one, other]);
        let mut addresses = backend.addresses.subscribe();
        backend.found(Vec::new());
        backend.found(vec![other, one]);
        assert!(!addresses.has_changed().unwrap());
        assert_eq!(*addresses.borrow_and_update(), [one, other]);
        backend.found(vec![other]);
        assert_eq!(*addresses.borrow_and_update(), [other]);
    }

    #[tokio::test]
    async fn a_name_is_looked_up_beside_the_path() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let backend = Backend::new(&format!("localhost:{port}").parse().unwrap());
        let stop = CancellationToken::new();
        let resolving = tokio::spawn(Arc::clone(&backend).resolve(stop.clone()));
        // It waits for the first answer, and then takes whichever address is listened at.
        let greet = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(GREETING).await.unwrap();
            stream
        };
        let (greeted, _stream) = tokio::join!(backend.greet(), greet);
        greeted.unwrap();
        stop.cancel();
        resolving.await.unwrap();
    }
}
