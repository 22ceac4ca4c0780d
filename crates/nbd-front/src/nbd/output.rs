//! Bytes on their way to one client, or over a relay.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf, Bytes, BytesMut};
use tokio::net::TcpStream;

use crate::budget::BytePermit;

/// Slices handed to one vectored write.
const SLICES_MAX: usize = 64;

/// Spare capacity kept in the buffer for small replies.
const BUFFER_BYTES: usize = 64 << 10;

/// Bytes to send, in order: small replies gather in one buffer, large read data is queued as it is.
#[derive(Debug, Default)]
pub struct Output {
    queue: VecDeque<Bytes>,
    queued_bytes: usize,
    buffer: BytesMut,
    /// Bytes sent so far, over the life of the connection.
    sent: u64,
    /// Shares of the byte budget, each with the value of `sent` at which it is given back.
    permits: VecDeque<(u64, BytePermit)>,
}

impl Output {
    /// Where replies are encoded.
    pub fn buffer(&mut self) -> &mut BytesMut {
        if self.buffer.capacity() - self.buffer.len() < 512 {
            self.buffer.reserve(BUFFER_BYTES);
        }
        &mut self.buffer
    }

    /// Queues bytes behind all that was encoded so far, without copying them.
    pub fn push(&mut self, bytes: Bytes) {
        self.seal();
        self.queued_bytes += bytes.len();
        self.queue.push_back(bytes);
    }

    /// Keeps a share of the byte budget until all that is queued by now is sent.
    pub fn hold(&mut self, permit: BytePermit) {
        self.permits.push_back((self.sent + self.len() as u64, permit));
    }

    /// Whether others wait for what is held here.
    pub fn is_wanted(&self) -> bool {
        self.permits.iter().any(|(_, permit)| permit.is_wanted())
    }

    /// Bytes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes that wait to be sent.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queued_bytes + self.buffer.len()
    }

    /// Whether all has been sent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn seal(&mut self) {
        if !self.buffer.is_empty() {
            self.queued_bytes += self.buffer.len();
            self.queue.push_back(self.buffer.split().freeze());
        }
    }

    /// Sends as much as the socket takes now.
    pub fn try_send(&mut self, stream: &TcpStream) -> io::Result<()> {
        self.seal();
        while !self.queue.is_empty() {
            let slices: Vec<IoSlice<'_>> =
                self.queue.iter().take(SLICES_MAX).map(|bytes| IoSlice::new(bytes)).collect();
            match stream.try_write_vectored(&slices) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => self.consume(sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn consume(&mut self, mut sent: usize) {
        self.queued_bytes -= sent;
        self.sent += sent as u64;
        while self.permits.pop_front_if(|(at, _)| *at <= self.sent).is_some() {}
        while sent > 0 {
            let Some(front) = self.queue.front_mut() else { return };
            if front.len() > sent {
                front.advance(sent);
                return;
            }
            sent -= front.len();
            self.queue.pop_front();
        }
    }
}
