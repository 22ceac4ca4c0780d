//! The socket under a relay, for both of its sides.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use nbd_relay::{Decoder, Frame, FrameError};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{Interest, Ready};
use tokio::net::TcpStream;

use crate::limits::INPUT_READ_BYTES;
use crate::nbd::Output;

/// Silence after which the kernel asks the other side for a sign of life, and between such
/// questions; with [`PROBES`] of them unanswered, the other host is gone. For idle relays: others
/// have [`nbd_relay::ALIVE_INTERVAL`].
const KEEPALIVE: Duration = Duration::from_secs(10);

/// See [`KEEPALIVE`].
const PROBES: u32 = 3;

/// Time that what was sent may go without an acknowledgement, or find no room at the other side,
/// before the connection is given up. As long as the most that a client may leave its replies
/// unread ([`OUTPUT_STALL_MAX`](crate::limits::OUTPUT_STALL_MAX)).
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(60);

/// Frames in, frames out. Nothing waits in here but [`RelayStream::ready`].
#[derive(Debug)]
pub struct RelayStream {
    stream: TcpStream,
    decoder: Decoder,
    input: BytesMut,
    output: Output,
}

/// What a look at the socket has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Bytes: there may be frames.
    Some,
    /// Nothing yet.
    Nothing,
    /// The other side will send no more.
    End,
}

impl RelayStream {
    /// Of a connection at its first frame, behind the preamble.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        socket.set_tcp_keepalive(&keepalive.with_retries(PROBES))?;
        socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
        Ok(Self {
            stream,
            decoder: Decoder::default(),
            input: BytesMut::new(),
            output: Output::default(),
        })
    }

    /// The next frame of those that have arrived.
    ///
    /// # Errors
    /// The other side sends what are no frames.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        self.decoder.decode(&mut self.input)
    }

    /// Where frames are put that are to be sent.
    pub const fn output(&mut self) -> &mut Output {
        &mut self.output
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn unsent(&self) -> usize {
        self.output.len()
    }

    /// Sends as much as the socket takes now.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn try_send(&mut self) -> io::Result<()> {
        self.output.try_send(&self.stream)
    }

    /// Takes what the socket has now, up to one frame or [`INPUT_READ_BYTES`].
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(&mut self) -> io::Result<Received> {
        let missing = self.decoder.wanted().saturating_sub(self.input.len());
        self.input.reserve(missing.max(INPUT_READ_BYTES));
        match self.stream.try_read_buf(&mut self.input) {
            Ok(0) => Ok(Received::End),
            Ok(_) => Ok(Received::Some),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Waits until there is something to receive, if `read`, or room for what waits to be sent. May
    /// be dropped at any time.
    ///
    /// # Errors
    /// The connection is broken.
    pub async fn ready(&self, read: bool) -> io::Result<Ready> {
        let interest = match (read, self.output.is_empty()) {
            (true, true) => Interest::READABLE,
            (true, false) => Interest::READABLE | Interest::WRITABLE,
            (false, false) => Interest::WRITABLE,
            (false, true) => return std::future::pending().await,
        };
        self.stream.ready(interest).await
    }

    /// Tells the other side that no more will come.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn finish(&self) -> io::Result<()> {
        SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write)
    }
}
