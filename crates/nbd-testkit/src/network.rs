//! The network between nodes, with faults: a TCP proxy for each ordered pair of them.
//!
//! ```text
//!   node a ──dials──▶ proxy (a, b) ──▶ node b      bytes a to b pass direction (a, b),
//!   node b ──dials──▶ proxy (b, a) ──▶ node a      bytes b to a pass direction (b, a),
//!                                                  whichever of the two had dialled
//! ```
//!
//! A fault is set for a direction, so that partitions can be one-way, and concerns all connections
//! between the two nodes. Each connection has two threads that copy, one a direction; each listener
//! has one that accepts. All end when the [`Network`] is dropped.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Bytes copied at once: large enough that bulk data costs little CPU on a small machine.
const COPY_BYTES: usize = 256 * 1024;

/// What becomes of the bytes of one direction between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    /// Nothing: they pass.
    #[default]
    None,
    /// All connections between the two nodes are closed, and new ones at once, as by a firewall
    /// that rejects. Both directions of a connection end with it.
    Cut,
    /// Nothing passes, and no connection ends, as behind a firewall that drops. What was sent
    /// meanwhile is delivered when the fault is over, late and in order, as TCP would.
    Hold,
    /// Each piece waits at least this long.
    Delay(Duration),
}

/// The proxies between all nodes of a cluster, by the nodes' places in the order of their names.
#[derive(Debug)]
pub struct Network {
    directions: BTreeMap<(usize, usize), Arc<Direction>>,
    proxies: BTreeMap<(usize, usize), Proxy>,
    nodes: usize,
}

impl Network {
    /// Proxies in front of the nodes that listen on these ports of 127.0.0.1.
    ///
    /// # Panics
    /// If a socket cannot be bound.
    pub fn new(ports: &[u16]) -> Self {
        let nodes = ports.len();
        let pairs = || (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        let pairs = || pairs().filter(|(a, b)| a != b);
        let directions: BTreeMap<_, _> =
            pairs().map(|pair| (pair, Arc::new(Direction::default()))).collect();
        let proxy = |(from, to): (usize, usize)| {
            let there = Arc::clone(&directions[&(from, to)]);
            let back = Arc::clone(&directions[&(to, from)]);
            ((from, to), Proxy::start(ports[to], there, back))
        };
        let proxies = pairs().map(proxy).collect();
        Self { directions, proxies, nodes }
    }

    /// The port of 127.0.0.1 where node `from` reaches node `to`.
    ///
    /// # Panics
    /// If there are no two such nodes.
    pub fn port(&self, from: usize, to: usize) -> u16 {
        self.proxies[&(from, to)].port
    }

    /// Sets the fault of one direction.
    ///
    /// # Panics
    /// If there are no two such nodes.
    pub fn set(&self, from: usize, to: usize, fault: Fault) {
        self.directions[&(from, to)].set(fault);
        if fault == Fault::Cut {
            self.proxies[&(from, to)].close_all();
            self.proxies[&(to, from)].close_all();
        }
    }

    /// Sets the fault of both directions between two nodes.
    ///
    /// # Panics
    /// As [`set`](Self::set).
    pub fn set_between(&self, one: usize, other: usize, fault: Fault) {
        self.set(one, other, fault);
        self.set(other, one, fault);
    }

    /// Sets the fault between one node and all others.
    ///
    /// # Panics
    /// As [`set`](Self::set).
    pub fn set_around(&self, node: usize, fault: Fault) {
        for other in (0..self.nodes).filter(|other| *other != node) {
            self.set_between(node, other, fault);
        }
    }

    /// Ends every fault.
    pub fn heal(&self) {
        for direction in self.directions.values() {
            direction.set(Fault::None);
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Copying threads that hold bytes back see it and end.
        for direction in self.directions.values() {
            direction.set(Fault::Cut);
        }
    }
}

#[derive(Debug, Default)]
struct Direction {
    fault: Mutex<Fault>,
    changed: Condvar,
}

impl Direction {
    fn set(&self, fault: Fault) {
        *lock(&self.fault) = fault;
        self.changed.notify_all();
    }

    fn is_cut(&self) -> bool {
        *lock(&self.fault) == Fault::Cut
    }

    /// Waits as the fault says. `false`: the connection is to end.
    fn pass(&self) -> bool {
        let mut fault = lock(&self.fault);
        while *fault == Fault::Hold {
            fault = self.changed.wait(fault).unwrap_or_else(PoisonError::into_inner);
        }
        let fault = *fault;
        if let Fault::Delay(time) = fault {
            thread::sleep(time);
        }
        fault != Fault::Cut
    }
}

/// A panic in a thread of the network leaves nothing half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One listener, and the connections through it.
#[derive(Debug)]
struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: u16,
    there: Arc<Direction>,
    back: Arc<Direction>,
    connections: Mutex<Vec<Arc<Connection>>>,
    stopping: AtomicBool,
}

/// The two ends of one proxied connection.
#[derive(Debug)]
struct Connection {
    near: TcpStream,
    far: TcpStream,
    ended: AtomicBool,
}

impl Connection {
    fn close(&self) {
        self.ended.store(true, Ordering::Relaxed);
        // Either may be closed already.
        let _ = self.near.shutdown(Shutdown::Both);
        let _ = self.far.shutdown(Shutdown::Both);
    }
}

impl Proxy {
    fn start(target: u16, there: Arc<Direction>, back: Arc<Direction>) -> Self {
        let port = crate::ports::free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("bind a proxy's port");
        let (connections, stopping) = (Mutex::default(), AtomicBool::new(false));
        let shared = Arc::new(Shared { target, there, back, connections, stopping });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || accepting.accept(&listener));
        Self { port, shared, acceptor: Some(acceptor) }
    }

    fn close_all(&self) {
        lock(&self.shared.connections).drain(..).for_each(|connection| connection.close());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // Wakes the acceptor.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.close_all();
    }
}

impl Shared {
    fn accept(&self, listener: &TcpListener) {
        for near in listener.incoming() {
            if self.stopping.load(Ordering::Relaxed) {
                return;
            }
            // A node that is down refuses; its peer then finds its own connection closed at once.
            if let Ok(near) = near
                && !self.is_cut()
                && let Ok(far) = TcpStream::connect(("127.0.0.1", self.target))
            {
                self.carry(near, far);
            }
        }
    }

    fn is_cut(&self) -> bool {
        self.there.is_cut() || self.back.is_cut()
    }

    fn carry(&self, near: TcpStream, far: TcpStream) {
        // Best effort: a connection that is gone already shows when bytes are copied.
        let _ = near.set_nodelay(true);
        let _ = far.set_nodelay(true);
        let connection = Arc::new(Connection { near, far, ended: AtomicBool::new(false) });
        {
            let mut connections = lock(&self.connections);
            connections.retain(|other| !other.ended.load(Ordering::Relaxed));
            connections.push(Arc::clone(&connection));
        }
        // A cut that came since the look above has not seen this connection.
        if self.is_cut() {
            connection.close();
            return;
        }
        for backward in [false, true] {
            let connection = Arc::clone(&connection);
            let direction = Arc::clone(if backward { &self.back } else { &self.there });
            thread::spawn(move || {
                let (near, far) = (&connection.near, &connection.far);
                let (from, to) = if backward { (far, near) } else { (near, far) };
                if copy(from, to, &direction).is_none() {
                    connection.close();
                }
            });
        }
    }
}

/// Copies until the end of `from`, which it passes on. `None`: the connection is broken or cut.
fn copy(mut from: &TcpStream, mut to: &TcpStream, direction: &Direction) -> Option<()> {
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let len = from.read(&mut buffer).ok()?;
        if !direction.pass() {
            return None;
        }
        if len == 0 {
            return to.shutdown(Shutdown::Write).ok();
        }
        to.write_all(&buffer[..len]).ok()?;
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::Instant;

    use super::*;
    use crate::read_some;

    /// A node that sends back what it is sent.
    fn echo() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                thread::spawn(move || io::copy(&mut &stream, &mut &stream));
            }
        });
        port
    }

    fn network() -> Network {
        Network::new(&[echo(), echo(), echo()])
    }

    fn dial(network: &Network, from: usize, to: usize) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", network.port(from, to))).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn ask(mut stream: &TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(text)?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).map(|()| answer)
    }

    /// Whether nothing comes for a while.
    fn silent(mut stream: &TcpStream) -> bool {
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let ended = read_some(&mut stream, &mut [0]);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        ended.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    #[test]
    fn bytes_and_ends_pass() {
        let network = network();
        let mut stream = dial(&network, 0, 1);
        assert_eq!(ask(&stream, b"hello").unwrap(), b"hello");
        let large = vec![7; 3 << 20];
        let mut writer = stream.try_clone().unwrap();
        let sent = large.clone();
        let writing = thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        writing.join().unwrap();
        assert!(received == large);
    }

    #[test]
    fn a_cut_ends_connections_old_and_new_of_that_pair_only() {
        let network = network();
        let (old, reverse, other) =
            (dial(&network, 0, 1), dial(&network, 1, 0), dial(&network, 2, 1));
        for stream in [&old, &reverse, &other] {
            ask(stream, b"x").unwrap();
        }
        network.set(1, 0, Fault::Cut);
        assert!(ask(&old, b"x").is_err());
        assert!(ask(&reverse, b"x").is_err());
        assert!(ask(&dial(&network, 0, 1), b"x").is_err());
        ask(&other, b"x").unwrap();
        network.heal();
        ask(&dial(&network, 0, 1), b"x").unwrap();
    }

    #[test]
    fn what_was_held_is_delivered_late() {
        let network = network();
        let mut stream = dial(&network, 0, 1);
        ask(&stream, b"x").unwrap();
        // The echo's answers travel from 1 to 0.
        network.set(1, 0, Fault::Hold);
        stream.write_all(b"late").unwrap();
        assert!(silent(&stream));
        network.heal();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"late");
    }

    #[test]
    fn a_hold_is_one_way() {
        let network = network();
        let (forward, backward) = (dial(&network, 0, 1), dial(&network, 1, 0));
        ask(&forward, b"x").unwrap();
        network.set_around(2, Fault::Hold);
        ask(&backward, b"x").unwrap();
        network.set(0, 1, Fault::Hold);
        (&forward).write_all(b"y").unwrap();
        assert!(silent(&forward));
    }

    #[test]
    fn a_delay_takes_its_time() {
        let network = network();
        let stream = dial(&network, 0, 1);
        network.set_between(0, 1, Fault::Delay(Duration::from_millis(20)));
        let started = Instant::now();
        ask(&stream, b"x").unwrap();
        assert!(started.elapsed() >= Duration::from_millis(40));
    }

    #[test]
    fn dropping_the_network_ends_everything() {
        let network = network();
        let stream = dial(&network, 0, 1);
        ask(&stream, b"x").unwrap();
        let port = network.port(0, 1);
        drop(network);
        assert!(ask(&stream, b"x").is_err());
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}
