//! Server side of transmission: bytes in, requests out.

use bytes::{Buf, BytesMut};

use crate::constants::command;
use crate::error::{NbdError, TransmissionError};
use crate::export::Negotiated;
use crate::limits::WRITE_DRAIN_BYTES_MAX;
use crate::request::{Command, CommandKind, Refused, Request, RequestHeader};
use crate::validate::{Refusal, Rules};

/// Cuts a client's bytes into validated requests.
///
/// Call [`decode`](Self::decode) until it wants more. When it yields a write, its payload comes
/// next in the stream: take all of it with [`take_payload`](Self::take_payload) and, for what is
/// not in `input`, by reading from the socket straight into the final buffer and reporting it with
/// [`payload_received`](Self::payload_received). Only then call `decode` again. A write whose
/// payload did not arrive in full never happened.
///
/// Buffers nothing of its own; `input` never needs to hold more than one header.
#[derive(Debug)]
pub struct RequestDecoder {
    rules: Rules,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The next byte begins a header.
    Header,
    /// `remaining > 0` bytes of this write's payload are still to come.
    Payload { request: Request, remaining: u64 },
    /// `remaining` bytes are still to be thrown away before the refusal goes out.
    Drain { refused: Refused, remaining: u64 },
    /// The client said goodbye.
    Disconnected,
}

/// What a call of [`RequestDecoder::decode`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// `input` ends before the next request does, or while a refused payload is being thrown away.
    NeedMore,
    /// A request to carry out. For [`Command::Write`] its payload comes next.
    Request(Request),
    /// A request to answer with an error, and no more. Its payload is already gone.
    Refused(Refused),
    /// `NBD_CMD_DISC`: finish what is under way, then close. Further bytes are not looked at.
    Disconnect,
}

impl RequestDecoder {
    /// A decoder at the first byte after the handshake.
    pub fn new(negotiated: &Negotiated) -> Self {
        Self { rules: Rules::new(negotiated), state: State::Header }
    }

    /// The next request in `input`, consuming exactly its header (and the payload of a refused
    /// one).
    ///
    /// An error is final: the stream can no longer be followed, and each further call returns it
    /// again.
    ///
    /// # Panics
    ///
    /// If a write's payload is still outstanding.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Decoded, TransmissionError> {
        match &mut self.state {
            State::Payload { remaining, .. } => {
                panic!("decode called with {remaining} bytes of payload outstanding")
            }
            State::Disconnected => Ok(Decoded::Disconnect),
            State::Drain { .. } => Ok(self.drain(input)),
            State::Header => self.decode_header(input),
        }
    }

    /// Whether nothing was taken of the next request: a decoder made anew would go on from here all
    /// the same.
    pub fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Header)
    }

    /// Bytes of the last write's payload that are still to come.
    pub fn payload_remaining(&self) -> u64 {
        match self.state {
            State::Payload { remaining, .. } => remaining,
            _ => 0,
        }
    }

    /// Moves payload from `input` to `dest` and returns how much: the least of what `input` has,
    /// what `dest` holds, and what remains.
    pub fn take_payload(&mut self, input: &mut BytesMut, dest: &mut [u8]) -> usize {
        let remaining = usize::try_from(self.payload_remaining()).unwrap_or(usize::MAX);
        let count = input.len().min(dest.len()).min(remaining);
        input.copy_to_slice(&mut dest[..count]);
        self.payload_received(count);
        count
    }

    /// Tells that `count` bytes of payload were read from the socket without passing `input`, which
    /// must have been empty.
    ///
    /// # Panics
    ///
    /// If that is more than remains.
    pub fn payload_received(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let State::Payload { remaining, .. } = &mut self.state else {
            panic!("{count} bytes of payload received, none outstanding");
        };
        let count = count as u64;
        assert!(count <= *remaining, "{count} bytes of payload received, {remaining} outstanding");
        *remaining -= count;
        if *remaining == 0 {
            self.state = State::Header;
        }
    }

    /// Gives up the write whose payload is outstanding: what remains of it is thrown away by the
    /// next calls of [`decode`](Self::decode), and then it comes out as [`Decoded::Refused`].
    ///
    /// # Panics
    ///
    /// If no payload is outstanding.
    pub fn refuse_write(&mut self, error: NbdError, message: &'static str) {
        let State::Payload { request, remaining } = self.state else {
            panic!("refuse_write called with no payload outstanding");
        };
        let Request { cookie, offset, command } = request;
        let refused = Refused { cookie, offset, command: command.kind(), error, message };
        self.state = State::Drain { refused, remaining };
    }

    fn decode_header(&mut self, input: &mut BytesMut) -> Result<Decoded, TransmissionError> {
        let Some(header) = RequestHeader::decode(input, self.rules.replies)? else {
            return Ok(Decoded::NeedMore);
        };
        if header.command == command::DISC {
            input.advance(RequestHeader::encoded_len(self.rules.replies));
            self.state = State::Disconnected;
            return Ok(Decoded::Disconnect);
        }
        let payload = self.rules.payload_len(&header);
        if payload > WRITE_DRAIN_BYTES_MAX {
            return Err(TransmissionError::PayloadTooLong {
                length: payload,
                max: WRITE_DRAIN_BYTES_MAX,
            });
        }
        input.advance(RequestHeader::encoded_len(self.rules.replies));
        let RequestHeader { cookie, offset, .. } = header;
        match self.rules.validate(&header) {
            Ok(command) => {
                let request = Request { cookie, offset, command };
                if matches!(command, Command::Write { .. }) && payload > 0 {
                    self.state = State::Payload { request, remaining: payload };
                }
                Ok(Decoded::Request(request))
            }
            Err(Refusal(error, message)) => {
                let command = CommandKind::from_code(header.command);
                let refused = Refused { cookie, offset, command, error, message };
                self.state = State::Drain { refused, remaining: payload };
                Ok(self.drain(input))
            }
        }
    }

    fn drain(&mut self, input: &mut BytesMut) -> Decoded {
        let State::Drain { refused, remaining } = &mut self.state else { return Decoded::NeedMore };
        let count = usize::try_from(*remaining).unwrap_or(usize::MAX).min(input.len());
        input.advance(count);
        *remaining -= count as u64;
        if *remaining > 0 {
            return Decoded::NeedMore;
        }
        let refused = *refused;
        self.state = State::Header;
        Decoded::Refused(refused)
    }
}
