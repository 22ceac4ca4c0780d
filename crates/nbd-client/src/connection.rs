//! A connection: its handle, and the task that owns the socket.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use nbd_proto::constants::TransmissionFlags;
use nbd_proto::option::InfoRequests;
use nbd_proto::{
    Answer, Attached, ClientEvent, ClientGoal, ClientHandshake, ClientWish, Command, Exchange,
    ExportName, Extent, Received, ReplyStyle, encode_disconnect,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::address::Address;
use crate::error::{ConnectError, Error, Lost};
use crate::limits::{CONNECT_MAX, INPUT_BYTES, REQUESTS_WAITING_MAX, WRITE_SLICES_MAX};

/// How to attach, and how long to wait.
#[derive(Debug, Clone)]
pub struct Options {
    /// The richest replies to ask for; a server may grant less. Default extended.
    pub replies: ReplyStyle,
    /// Time for the server to attach the export. Default [`CONNECT_MAX`].
    pub connect_max: Duration,
    /// Time in which, with requests in flight, none of them gets on, after which the connection is
    /// given up. Default 30 s: longer than a cluster takes to elect a leader, however loaded.
    pub silence_max: Duration,
}

/// An attached export. Clones are the same connection, which ends once the last of them is dropped
/// and what was asked is answered.
#[derive(Debug, Clone)]
pub struct Connection {
    requests: mpsc::Sender<Request>,
    attached: Arc<Attached>,
    end: Arc<OnceLock<Arc<Lost>>>,
}

#[derive(Debug)]
struct Request {
    command: Command,
    payload: Bytes,
    buffer: Vec<u8>,
    answer: Waiter,
}

type Waiter = oneshot::Sender<Result<Answer, Error>>;

impl Default for Options {
    fn default() -> Self {
        Self {
            replies: ReplyStyle::Extended,
            connect_max: CONNECT_MAX,
            silence_max: Duration::from_secs(30),
        }
    }
}

impl Connection {
    /// Connects, attaches `export`, and starts the connection's task on the runtime of the caller.
    ///
    /// # Errors
    /// No connection in time, a refusal, or a server that breaks the protocol.
    pub async fn open(
        address: &Address,
        export: &ExportName,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        let open = async {
            match address {
                Address::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    let (reader, writer) = stream.into_split();
                    Self::attach(reader, writer, export, options).await
                }
                Address::Unix(path) => {
                    let (reader, writer) = UnixStream::connect(path).await?.into_split();
                    Self::attach(reader, writer, export, options).await
                }
            }
        };
        let silent = |_| ConnectError::Silent(options.connect_max);
        timeout(options.connect_max, open).await.map_err(silent)?
    }

    async fn attach(
        mut reader: impl AsyncRead + Unpin + Send + 'static,
        mut writer: impl AsyncWrite + Unpin + Send + 'static,
        export: &ExportName,
        options: &Options,
    ) -> Result<Self, ConnectError> {
        let mut input = BytesMut::with_capacity(INPUT_BYTES);
        let attached =
            handshake(&mut reader, &mut writer, &mut input, export, options.replies).await?;
        let (requests, incoming) = mpsc::channel(REQUESTS_WAITING_MAX);
        let end = Arc::new(OnceLock::new());
        let task = Task {
            exchange: Exchange::new(&attached),
            replies: attached.replies,
            incoming,
            silence_max: options.silence_max,
            input,
            outgoing: VecDeque::new(),
            waiters: HashMap::new(),
            leaving: false,
        };
        tokio::spawn(task.run(reader, writer, Arc::clone(&end)));
        Ok(Self { requests, attached: Arc::new(attached), end })
    }

    /// What the handshake agreed on.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.attached.export.size
    }

    /// Whether the server says that it can do this.
    pub fn can(&self, flag: TransmissionFlags) -> bool {
        self.attached.export.flags.contains(flag)
    }

    /// Whether it has ended, and each further request fails.
    pub fn has_ended(&self) -> bool {
        self.requests.is_closed()
    }

    /// Whether the other handle is of this connection.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.end, &other.end)
    }

    /// Sends a request and waits for its answer. `payload` belongs to a write; `buffer` is what a
    /// read's content goes into, whatever it holds now (an empty one is made as large as needed).
    ///
    /// # Errors
    /// An error reply, or the end of the connection.
    pub async fn ask(
        &self,
        command: Command,
        payload: Bytes,
        buffer: Vec<u8>,
    ) -> Result<Answer, Error> {
        let (answer, answered) = oneshot::channel();
        let request = Request { command, payload, buffer, answer };
        if self.requests.send(request).await.is_err() {
            return Err(self.why());
        }
        answered.await.unwrap_or_else(|_| Err(self.why()))
    }

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        let command = Command::Read { offset, len, dont_fragment: false };
        match self.ask(command, Bytes::new(), Vec::new()).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Extents(_) => unreachable!("a read is answered with content"),
        }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), Error> {
        let command = Command::Write { offset, len: data.len() as u64 };
        self.ask(command, data, Vec::new()).await.map(drop)
    }

    /// Makes a range read as zeroes, and not take up room if the server can.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Error> {
        let command = Command::WriteZeroes { offset, len, no_hole: false };
        self.ask(command, Bytes::new(), Vec::new()).await.map(drop)
    }

    /// Makes every answered write durable.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn flush(&self) -> Result<(), Error> {
        self.ask(Command::Flush, Bytes::new(), Vec::new()).await.map(drop)
    }

    /// Allocation from `offset` on, as far as the server tells at once: at least one extent, none
    /// beyond `len` bytes. Only if [`Attached::allocation_context`] is there.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Extent>, Error> {
        let command = Command::BlockStatus { offset, len, req_one: false };
        match self.ask(command, Bytes::new(), Vec::new()).await? {
            Answer::Extents(extents) => Ok(extents),
            Answer::Done | Answer::Data(_) => unreachable!("status is answered with extents"),
        }
    }

    fn why(&self) -> Error {
        // The task says why before it drops what was asked of it; one that was aborted with its
        // runtime says nothing.
        let end = self.end.get().cloned();
        Error::Lost(end.unwrap_or_else(|| Arc::new(Lost::Closed)))
    }
}

async fn handshake(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    input: &mut BytesMut,
    export: &ExportName,
    replies: ReplyStyle,
) -> Result<Attached, ConnectError> {
    let mut handshake = ClientHandshake::new(ClientWish {
        export: export.clone(),
        goal: ClientGoal::Go,
        replies,
        allocation_context: true,
        info: InfoRequests { name: false, description: false, block_size: true },
    });
    loop {
        let event = handshake.receive(input)?;
        writer.write_all(&handshake.take_output()).await?;
        match event {
            Some(ClientEvent::Attached(attached)) => return Ok(attached),
            Some(ClientEvent::Refused { error, message, .. }) => {
                return Err(ConnectError::Refused { error, message });
            }
            Some(_) => return Err(ConnectError::Unasked),
            None => {
                if reader.read_buf(input).await? == 0 {
                    return Err(ConnectError::Closed);
                }
            }
        }
    }
}

/// Owns everything of one connection.
struct Task {
    exchange: Exchange,
    replies: ReplyStyle,
    incoming: mpsc::Receiver<Request>,
    silence_max: Duration,
    input: BytesMut,
    outgoing: VecDeque<Bytes>,
    waiters: HashMap<u64, Waiter>,
    /// No more requests will come, and the server is told so.
    leaving: bool,
}

impl Task {
    async fn run(
        mut self,
        mut reader: impl AsyncRead + Unpin,
        mut writer: impl AsyncWrite + Unpin,
        end: Arc<OnceLock<Arc<Lost>>>,
    ) {
        let lost = match self.serve(&mut reader, &mut writer).await {
            Ok(()) => Lost::Closed,
            Err(lost) => lost,
        };
        // Before the waiters are dropped with `self`: they look here.
        let _ = end.set(Arc::new(lost));
        // A server that is gone need not be told; closing tells it all the same.
        let _ = writer.shutdown().await;
    }

    /// Until the last handle is dropped and all is answered.
    async fn serve(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin),
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), Lost> {
        let mut moved = Instant::now();
        loop {
            if self.leaving && self.outgoing.is_empty() {
                return Ok(());
            }
            let busy = self.exchange.in_flight() > 0;
            // Requests wait in the channel, where their callers know of it, while the socket is
            // behind.
            let room = !self.leaving && self.outgoing.len() < 2 * WRITE_SLICES_MAX;
            let slices = slices(&self.outgoing);
            tokio::select! {
                request = self.incoming.recv(), if room => {
                    if !busy {
                        moved = Instant::now();
                    }
                    self.take(request);
                }
                written = writer.write_vectored(&slices), if !slices.is_empty() => {
                    self.written(written?)?;
                }
                read = read(reader, &mut self.input, &mut self.exchange) => {
                    read?;
                    if self.receive()? {
                        moved = Instant::now();
                    }
                }
                () = sleep_until(moved + self.silence_max), if busy => {
                    return Err(Lost::Silent(self.silence_max));
                }
            }
        }
    }

    fn take(&mut self, request: Option<Request>) {
        let mut header = BytesMut::new();
        let Some(Request { command, payload, buffer, answer }) = request else {
            // Only once nothing is in flight: each request holds a handle.
            self.leaving = true;
            encode_disconnect(&mut header, self.replies);
            self.outgoing.push_back(header.freeze());
            return;
        };
        match self.exchange.begin(&mut header, command, buffer) {
            Ok(cookie) => {
                self.waiters.insert(cookie, answer);
                self.outgoing.push_back(header.freeze());
                if !payload.is_empty() {
                    self.outgoing.push_back(payload);
                }
            }
            // Whoever no longer waits need not know.
            Err(error) => drop(answer.send(Err(error.into()))),
        }
    }

    fn written(&mut self, mut count: usize) -> Result<(), Lost> {
        if count == 0 {
            return Err(Lost::Io(io::ErrorKind::WriteZero.into()));
        }
        while let Some(first) = self.outgoing.front_mut() {
            let part = count.min(first.len());
            first.advance(part);
            count -= part;
            if !first.is_empty() {
                break;
            }
            self.outgoing.pop_front();
        }
        Ok(())
    }

    /// Hands out all answers that are there. Whether a request got on: endless replies that answer
    /// nothing do not count.
    fn receive(&mut self) -> Result<bool, Lost> {
        let mut got_on = false;
        while self.exchange.content().is_empty() {
            match self.exchange.receive(&mut self.input)? {
                Received::NeedMore => return Ok(got_on),
                Received::Content => got_on = true,
                Received::Answered { cookie, outcome } => {
                    got_on = true;
                    if let Some(waiter) = self.waiters.remove(&cookie) {
                        // Whoever no longer waits need not know.
                        drop(waiter.send(outcome.map_err(Error::from)));
                    }
                }
            }
        }
        // Content is of a bounded read, each byte once: to receive some is to get on.
        Ok(true)
    }
}

/// What to write next.
fn slices(outgoing: &VecDeque<Bytes>) -> Vec<IoSlice<'_>> {
    outgoing.iter().take(WRITE_SLICES_MAX).map(|bytes| IoSlice::new(bytes)).collect()
}

/// Reads what comes next: content to where it belongs, else into the input. Loses nothing when it
/// is dropped.
async fn read(
    reader: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
    exchange: &mut Exchange,
) -> Result<(), Lost> {
    let content = exchange.content();
    let count = if content.is_empty() {
        input.reserve(INPUT_BYTES / 4);
        reader.read_buf(input).await?
    } else {
        let count = reader.read(content).await?;
        exchange.content_received(count);
        count
    };
    if count == 0 { Err(Lost::Closed) } else { Ok(()) }
}
