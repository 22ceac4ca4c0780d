//! Many slow clients at once, driven by one thread.

use std::io::{ErrorKind, Write as _};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::read_some;

/// What is to become of a slow client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The server closes it when the handshake's deadline has passed, not before.
    Dropped,
    /// It is attached in the end, and stays.
    Attached,
    /// The server closes it, early or late.
    Closed,
}

#[derive(Debug)]
struct Slow {
    stream: TcpStream,
    /// What is still to be sent, one byte at a time.
    script: Vec<u8>,
    received: usize,
    fate: Fate,
    /// When the server closed it, counted from the connection.
    closed: Option<Duration>,
}

/// Slow clients, connected at about the same time.
#[derive(Debug)]
pub(crate) struct Herd {
    address: (&'static str, u16),
    began: Instant,
    clients: Vec<Slow>,
}

impl Herd {
    pub(crate) fn new(address: (&'static str, u16)) -> Self {
        Self { address, began: Instant::now(), clients: Vec::new() }
    }

    /// Adds clients that will send `script` a byte at a time, and then nothing.
    pub(crate) fn join(&mut self, count: usize, script: &[u8], fate: Fate) {
        for _ in 0..count {
            let stream = TcpStream::connect(self.address).expect("the server accepts connections");
            stream.set_nodelay(true).expect("set TCP_NODELAY");
            stream.set_nonblocking(true).expect("make a socket non-blocking");
            let script = script.iter().rev().copied().collect();
            self.clients.push(Slow { stream, script, received: 0, fate, closed: None });
        }
    }

    /// Adds clients that say at once that they will send nothing.
    pub(crate) fn half_close(&mut self, count: usize) {
        let start = self.clients.len();
        self.join(count, &[], Fate::Closed);
        for client in &self.clients[start..] {
            client.stream.shutdown(Shutdown::Write).expect("shut down one direction");
        }
    }

    /// Lets every client send a byte per `pace` until all have met their fate; those to be dropped
    /// meet it when `deadline` has passed, within the margin that a busy machine needs.
    pub(crate) fn run(&mut self, pace: Duration, deadline: Duration) {
        let (early, late) = (deadline - deadline / 10, deadline + deadline / 2);
        while self.began.elapsed() < late {
            let began = self.began;
            self.clients.iter_mut().for_each(|client| client.turn(began));
            if self.clients.iter().all(|client| client.is_done(early, began)) {
                break;
            }
            thread::sleep(pace);
        }
        for client in &self.clients {
            match client.fate {
                Fate::Attached => {
                    assert_eq!(client.closed, None, "a patient client was dropped");
                    // The greeting and the answer to NBD_OPT_EXPORT_NAME.
                    assert_eq!(client.received, 18 + 10, "a patient client was not attached");
                }
                Fate::Closed => assert!(client.closed.is_some(), "a half-open client stays"),
                Fate::Dropped => {
                    let closed =
                        client.closed.unwrap_or_else(|| panic!("never dropped: {client:?}"));
                    assert!(closed >= early && closed < late, "dropped after {closed:?}");
                }
            }
        }
    }
}

impl Slow {
    fn is_done(&self, early: Duration, began: Instant) -> bool {
        match self.fate {
            Fate::Attached => began.elapsed() > early,
            Fate::Dropped | Fate::Closed => self.closed.is_some(),
        }
    }

    fn turn(&mut self, began: Instant) {
        if self.closed.is_some() {
            return;
        }
        let sent = match self.script.pop() {
            Some(byte) => self.stream.write_all(&[byte]),
            None => Ok(()),
        };
        let mut buffer = [0; 1024];
        match read_some(&mut self.stream, &mut buffer) {
            Ok(0) => self.closed = Some(began.elapsed()),
            Ok(count) => self.received += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock && sent.is_ok() => {}
            Err(_) => self.closed = Some(began.elapsed()),
        }
    }
}
