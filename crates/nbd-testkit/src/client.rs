//! A blocking NBD client for tests.

mod error;
mod pending;

use std::collections::{HashMap, VecDeque};
use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use bytes::BytesMut;
use nbd_proto::option::InfoRequests;
use nbd_proto::{
    Attached, ClientEvent, ClientGoal, ClientHandshake, ClientWish, Command, ExportName, Extent,
    PendingRead, ReplyDecoder, ReplyEvent, ReplyStyle, RequestHeader, encode_disconnect,
    encode_request,
};

pub use self::error::{ClientError, ErrorReply};
use self::pending::Pending;
use crate::read_some;

/// How long a connection may stand still before an operation fails. Well above any stall that a
/// test provokes on purpose.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 64 * 1024;

/// A connection attached to one export.
///
/// The plain operations ([`read`](Self::read), [`write`](Self::write), ...) send one request and
/// wait for its reply. For many at a time, [`send`](Self::send) them and [`receive`](Self::receive)
/// the replies in whatever order they come. Both may be mixed: replies that come while a plain
/// operation waits for its own are kept. To misbehave, use [`send_header`](Self::send_header) and
/// [`stream`](Self::stream).
#[derive(Debug)]
pub struct NbdClient {
    stream: TcpStream,
    attached: Attached,
    input: BytesMut,
    decoder: ReplyDecoder,
    /// Requests sent and not fully answered, by cookie.
    pending: HashMap<u64, Pending>,
    /// Replies received and not handed out.
    finished: VecDeque<(u64, Outcome)>,
    /// Each request gets the next.
    next_cookie: u64,
}

/// How to attach.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The export's name. Default empty.
    pub export: String,
    /// The richest replies to ask for; a server may grant less. Default extended.
    pub replies: ReplyStyle,
    /// `NBD_OPT_GO`, or `NBD_OPT_EXPORT_NAME` as old clients do. Default the former.
    pub goal: ClientGoal,
    /// Select `base:allocation`, which [`NbdClient::block_status`] needs. Default true.
    pub allocation_context: bool,
    /// How long the connection may stand still before an operation fails. Default 60 s.
    pub timeout: Duration,
}

/// What a request was answered with.
pub type Outcome = Result<Reply, ErrorReply>;

/// The answer to a request that succeeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To anything but the two below.
    Done,
    /// To a read: as many bytes as were asked for, holes as zeroes.
    Data(Vec<u8>),
    /// To a block status request.
    Extents(Vec<Extent>),
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            export: String::new(),
            replies: ReplyStyle::Extended,
            goal: ClientGoal::Go,
            allocation_context: true,
            timeout: TIMEOUT,
        }
    }
}

/// The names of the server's exports, in its order.
///
/// # Errors
/// No connection, a refusal, or a server that breaks the protocol.
pub fn list_exports(address: impl ToSocketAddrs) -> Result<Vec<String>, ClientError> {
    let options = ConnectOptions { goal: ClientGoal::List, ..ConnectOptions::default() };
    let (mut stream, mut handshake) = begin(address, &options)?;
    let mut input = BytesMut::new();
    let mut names = Vec::new();
    loop {
        match next_event(&mut stream, &mut handshake, &mut input)? {
            ClientEvent::Listed { name, .. } => names.push(name.as_str().to_owned()),
            ClientEvent::ListEnd => handshake.abort(),
            ClientEvent::Aborted => return Ok(names),
            other => return Err(refusal(other)),
        }
    }
}

fn begin(
    address: impl ToSocketAddrs,
    options: &ConnectOptions,
) -> Result<(TcpStream, ClientHandshake), ClientError> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(options.timeout))?;
    stream.set_write_timeout(Some(options.timeout))?;
    let wish = ClientWish {
        export: ExportName::from_bytes(options.export.as_bytes())?,
        goal: options.goal,
        replies: options.replies,
        allocation_context: options.allocation_context,
        info: InfoRequests { name: true, description: true, block_size: true },
    };
    Ok((stream, ClientHandshake::new(wish)))
}

fn next_event(
    stream: &mut TcpStream,
    handshake: &mut ClientHandshake,
    input: &mut BytesMut,
) -> Result<ClientEvent, ClientError> {
    loop {
        let event = handshake.receive(input)?;
        stream.write_all(&handshake.take_output())?;
        match event {
            Some(event) => return Ok(event),
            None => fill(stream, input)?,
        }
    }
}

fn refusal(event: ClientEvent) -> ClientError {
    match event {
        ClientEvent::Refused { option, error, message } => {
            ClientError::Refused { option, error, message }
        }
        other => ClientError::UnexpectedEvent(Box::new(other)),
    }
}

/// Reads what there is, and waits for at least a byte.
fn fill(stream: &mut TcpStream, input: &mut BytesMut) -> Result<(), ClientError> {
    let start = input.len();
    input.resize(start + READ_BYTES, 0);
    let read = read_some(stream, &mut input[start..]);
    input.truncate(start + *read.as_ref().unwrap_or(&0));
    match read? {
        0 => Err(ClientError::Closed),
        _ => Ok(()),
    }
}

impl NbdClient {
    /// Attaches to `export` with the richest replies the server grants.
    ///
    /// # Errors
    /// No connection, a refusal, or a server that breaks the protocol.
    pub fn connect(address: impl ToSocketAddrs, export: &str) -> Result<Self, ClientError> {
        let export = export.to_owned();
        Self::connect_with(address, &ConnectOptions { export, ..ConnectOptions::default() })
    }

    /// Attaches as `options` say.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_with(
        address: impl ToSocketAddrs,
        options: &ConnectOptions,
    ) -> Result<Self, ClientError> {
        let (mut stream, mut handshake) = begin(address, options)?;
        let mut input = BytesMut::new();
        let attached = match next_event(&mut stream, &mut handshake, &mut input)? {
            ClientEvent::Attached(attached) => attached,
            other => return Err(refusal(other)),
        };
        let decoder = ReplyDecoder::new(attached.replies);
        let (pending, finished) = (HashMap::new(), VecDeque::new());
        Ok(Self { stream, attached, input, decoder, pending, finished, next_cookie: 1 })
    }

    /// What was agreed on.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Size of the export, in bytes.
    pub fn size(&self) -> u64 {
        self.attached.export.size
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// The server's refusal ([`ClientError::nbd_error`]), or the end of the connection.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, ClientError> {
        let len = len as u64;
        match self.call(&Command::Read { offset, len, dont_fragment: false }, &[])? {
            Reply::Data(data) => Ok(data),
            other => Err(ClientError::UnexpectedReply(other)),
        }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.call_done(&Command::Write { offset, len: data.len() as u64 }, data)
    }

    /// Gives up the content of a range.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn trim(&mut self, offset: u64, len: u64) -> Result<(), ClientError> {
        self.call_done(&Command::Trim { offset, len }, &[])
    }

    /// Writes zeroes over a range; with `no_hole` the range stays allocated.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write_zeroes(
        &mut self,
        offset: u64,
        len: u64,
        no_hole: bool,
    ) -> Result<(), ClientError> {
        self.call_done(&Command::WriteZeroes { offset, len, no_hole }, &[])
    }

    /// Waits until all writes answered so far are durable.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn flush(&mut self) -> Result<(), ClientError> {
        self.call_done(&Command::Flush, &[])
    }

    /// Allocation status from `offset` on; may cover less than `len`, and its last extent more.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn block_status(&mut self, offset: u64, len: u64) -> Result<Vec<Extent>, ClientError> {
        match self.call(&Command::BlockStatus { offset, len, req_one: false }, &[])? {
            Reply::Extents(extents) => Ok(extents),
            other => Err(ClientError::UnexpectedReply(other)),
        }
    }

    /// Sends a request, with `payload` if it is a write, and returns the cookie its reply will
    /// bear.
    ///
    /// Whoever sends without receiving for long enough finds the server no longer reading: after
    /// the timeout this fails.
    ///
    /// # Errors
    /// The end of the connection; a length that the agreed headers cannot carry.
    pub fn send(&mut self, command: &Command, payload: &[u8]) -> Result<u64, ClientError> {
        self.send_flagged(command, payload, false)
    }

    /// As [`send`](Self::send), with `NBD_CMD_FLAG_FUA`.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_fua(&mut self, command: &Command, payload: &[u8]) -> Result<u64, ClientError> {
        self.send_flagged(command, payload, true)
    }

    fn send_flagged(
        &mut self,
        command: &Command,
        payload: &[u8],
        fua: bool,
    ) -> Result<u64, ClientError> {
        let cookie = self.take_cookie();
        let mut out = BytesMut::new();
        encode_request(&mut out, self.attached.replies, cookie, command, fua)?;
        out.extend_from_slice(payload);
        let read = match *command {
            Command::Read { offset, len, .. } => Some(PendingRead { offset, len }),
            _ => None,
        };
        self.pending.insert(cookie, Pending::new(read));
        self.stream.write_all(&out)?;
        Ok(cookie)
    }

    /// Sends a header exactly as given, whatever it says, and awaits a reply to its cookie. `read`
    /// is the range whose content the reply may carry.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn send_header(
        &mut self,
        header: &RequestHeader,
        read: Option<PendingRead>,
    ) -> Result<(), ClientError> {
        let mut out = BytesMut::new();
        header.encode(&mut out, self.attached.replies)?;
        self.pending.insert(header.cookie, Pending::new(read));
        self.stream.write_all(&out)?;
        Ok(())
    }

    /// The socket, to send anything at all, or to close one direction.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// How many requests are sent and not fully answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The next reply to any request in flight, with its cookie.
    ///
    /// # Errors
    /// The end of the connection, or a server that breaks the protocol.
    pub fn receive(&mut self) -> Result<(u64, Outcome), ClientError> {
        match self.finished.pop_front() {
            Some(finished) => Ok(finished),
            None => self.receive_next(),
        }
    }

    /// Sends `NBD_CMD_DISC` and returns the replies that still came before the server closed.
    ///
    /// # Errors
    /// A connection that breaks off or stays open, or a server that breaks the protocol.
    pub fn disconnect(mut self) -> Result<Vec<(u64, Outcome)>, ClientError> {
        let mut out = BytesMut::new();
        encode_disconnect(&mut out, self.attached.replies);
        self.stream.write_all(&out)?;
        let mut replies = Vec::new();
        loop {
            match self.receive() {
                Ok(reply) => replies.push(reply),
                Err(ClientError::Closed) => return Ok(replies),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_cookie(&mut self) -> u64 {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        cookie
    }

    fn call_done(&mut self, command: &Command, payload: &[u8]) -> Result<(), ClientError> {
        match self.call(command, payload)? {
            Reply::Done => Ok(()),
            other => Err(ClientError::UnexpectedReply(other)),
        }
    }

    fn call(&mut self, command: &Command, payload: &[u8]) -> Result<Reply, ClientError> {
        let own = self.send(command, payload)?;
        loop {
            let (cookie, outcome) = self.receive_next()?;
            if cookie == own {
                return outcome.map_err(ClientError::Error);
            }
            self.finished.push_back((cookie, outcome));
        }
    }

    fn receive_next(&mut self) -> Result<(u64, Outcome), ClientError> {
        loop {
            let pending = &self.pending;
            let read = |cookie| pending.get(&cookie).and_then(Pending::read);
            let event = self.decoder.decode(&mut self.input, read)?;
            if event == ReplyEvent::NeedMore {
                fill(&mut self.stream, &mut self.input)?;
            } else if let Some(finished) = self.take_event(event)? {
                return Ok(finished);
            }
        }
    }

    /// Adds a piece of a reply to its request, and returns the reply if that was the last piece.
    fn take_event(&mut self, event: ReplyEvent) -> Result<Option<(u64, Outcome)>, ClientError> {
        let (cookie, last) = match event {
            ReplyEvent::NeedMore => return Ok(None),
            ReplyEvent::Done { cookie } => {
                find(&mut self.pending, cookie)?;
                (cookie, true)
            }
            ReplyEvent::Error { cookie, error, message, offset, last } => {
                find(&mut self.pending, cookie)?.fail(ErrorReply { error, message, offset });
                (cookie, last)
            }
            ReplyEvent::Data { cookie, offset, len, last } => {
                let dest = find(&mut self.pending, cookie)?.place(offset, len)?;
                let taken = self.decoder.take_payload(&mut self.input, dest);
                self.stream.read_exact(&mut dest[taken..])?;
                self.decoder.payload_received(dest.len() - taken);
                (cookie, last)
            }
            ReplyEvent::Hole { cookie, offset, len, last } => {
                find(&mut self.pending, cookie)?.place(offset, len)?;
                (cookie, last)
            }
            ReplyEvent::BlockStatus { cookie, extents, last, .. } => {
                find(&mut self.pending, cookie)?.extents(extents);
                (cookie, last)
            }
        };
        if !last {
            return Ok(None);
        }
        let pending = self.pending.remove(&cookie).ok_or(ClientError::UnknownCookie(cookie))?;
        Ok(Some((cookie, pending.finish()?)))
    }
}

fn find(pending: &mut HashMap<u64, Pending>, cookie: u64) -> Result<&mut Pending, ClientError> {
    pending.get_mut(&cookie).ok_or(ClientError::UnknownCookie(cookie))
}
