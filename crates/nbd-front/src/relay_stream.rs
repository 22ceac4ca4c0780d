//! The socket under a relay, for both of its sides.

use std::io;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use nbd_relay::{Decoder, Frame, FrameError, HEADER_BYTES};
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
    /// Whether the last frame's body was longer than [`INPUT_READ_BYTES`].
    after_long: bool,
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
            after_long: false,
            output: Output::default(),
        })
    }

    /// The next frame of those that have arrived.
    ///
    /// # Errors
    /// The other side sends what are no frames.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let frame = self.decoder.decode(&mut self.input)?;
        if let Some(frame) = &frame {
            self.after_long = frame.body.len() > INPUT_READ_BYTES;
        }
        Ok(frame)
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

    /// Takes what the socket has now: at most [`INPUT_READ_BYTES`], or of a long frame the rest and
    /// the header behind it.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(&mut self) -> io::Result<Received> {
        let wanted = self.decoder.wanted();
        let missing = wanted.saturating_sub(self.input.len());
        // What is read of a long frame before its length is known has to be copied, to where there
        // is room for all of it. So long frames are read up to the header behind them, and after
        // one another is expected.
        let most = if wanted > INPUT_READ_BYTES {
            missing + HEADER_BYTES
        } else if self.after_long && !self.decoder.is_midway() && missing > 0 {
            missing
        } else {
            INPUT_READ_BYTES
        };
        self.input.reserve(most);
        match self.stream.try_read_buf(&mut (&mut self.input).limit(most)) {
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

#[cfg(test)]
mod tests {
    use nbd_relay::{BODY_BYTES_MAX, put_bytes};
    use nbd_session::QueryId;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, RelayStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        (far, RelayStream::new(near).unwrap())
    }

    fn frame(len: usize, fill: u8) -> BytesMut {
        let mut out = BytesMut::new();
        put_bytes(&mut out, QueryId(1), &vec![fill; len], &[(0..len, false)]);
        assert!(out.len() > len);
        out
    }

    async fn next(relay: &mut RelayStream) -> Frame {
        loop {
            if let Some(frame) = relay.next_frame().unwrap() {
                return frame;
            }
            relay.ready(true).await.unwrap();
            assert_ne!(relay.receive().unwrap(), Received::End);
        }
    }

    #[tokio::test]
    async fn frames_of_all_lengths_follow_each_other() {
        let (mut far, mut relay) = pair().await;
        let long = 1 << 20;
        let lens = [1, long, long, 512, long, INPUT_READ_BYTES, 1, 1, BODY_BYTES_MAX, long, 1];
        let frames: Vec<BytesMut> = (0..).zip(lens).map(|(fill, len)| frame(len, fill)).collect();
        let sent = frames.concat();
        let sending = tokio::spawn(async move { far.write_all(&sent).await });
        for frame in &frames {
            let received = next(&mut relay).await;
            assert!(received.body == frame[HEADER_BYTES..], "{} bytes", frame.len());
        }
        sending.await.unwrap().unwrap();
    }

    // Goal: of the second and later of several long frames no byte is copied within this process,
    // whether they come at once or one by one.
    // Method: bytes that are received while there is no room for all of the frame are copied, once
    // its header is known: so nothing but the header is received till then.
    #[tokio::test]
    async fn the_beginning_of_a_long_frame_is_not_copied() {
        for at_once in [1, 8] {
            let (mut far, mut relay) = pair().await;
            let sending = tokio::spawn(async move {
                for _ in 0..8 / at_once {
                    far.write_all(&frame(1 << 20, 7).repeat(at_once)).await.unwrap();
                    // Until it is taken.
                    assert_eq!(far.read_u8().await.unwrap(), 1);
                }
            });
            for count in 1..=8 {
                let received = loop {
                    if let Some(frame) = relay.next_frame().unwrap() {
                        break frame;
                    }
                    let begun = relay.decoder.is_midway();
                    relay.ready(true).await.unwrap();
                    assert_ne!(relay.receive().unwrap(), Received::End);
                    let have = relay.input.len();
                    assert!(count == 1 || begun || have <= HEADER_BYTES, "{have} bytes");
                };
                assert_eq!(received.body.len(), 1 << 20);
                if count % at_once == 0 {
                    relay.output().buffer().extend_from_slice(&[1]);
                    relay.try_send().unwrap();
                }
            }
            sending.await.unwrap();
        }
    }
}
