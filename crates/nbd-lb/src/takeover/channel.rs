//! Messages between two processes on one machine, with descriptors beside them.
//!
//! ```text
//! 0        4            6         7              8               12
//! +--------+------------+---------+--------------+---------------+------
//! | "CBTO" | version u16| kind u8 | descriptors u8 | body len u32 | body
//! +--------+------------+---------+--------------+---------------+------
//! ```
//! Little-endian. Descriptors travel with the first byte (`SCM_RIGHTS`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use nbd_front::PARCEL_BYTES_MAX;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Version of the messages and of what is in them.
const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"CBTO";

const HEADER_BYTES: usize = 12;

/// Bytes of the longest body: a session's.
const BODY_BYTES_MAX: usize = PARCEL_BYTES_MAX;

/// Descriptors beside one message.
const DESCRIPTORS_MAX: usize = 2;

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A new process introduces itself. Body: what both must have in common.
    Hello = 1,
    /// The listening sockets, NBD first, then HTTP.
    Listeners = 2,
    /// The new process is not served. Body: why, for people.
    Refused = 3,
    /// The new process is ready.
    Take = 4,
    /// The running process accepts no more. With the Unix socket at which it is found.
    Yours = 5,
    /// A session: its state, and the client's socket.
    Session = 6,
    /// The session offered is the new process's.
    Taken = 7,
    /// The session offered cannot be served by the new process.
    Kept = 8,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        use Kind::*;
        let all = [Hello, Listeners, Refused, Take, Yours, Session, Taken, Kept];
        all.into_iter().find(|kind| *kind as u8 == code)
    }
}

/// A message that has arrived.
#[derive(Debug)]
pub struct Message {
    /// What it says.
    pub kind: Kind,
    /// What belongs to it.
    pub body: Vec<u8>,
    /// What came beside it.
    pub descriptors: Vec<OwnedFd>,
}

/// Why nothing more can be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Io(#[from] io::Error),
    /// The other end went in the middle of a message.
    #[error("the stream ended within a message")]
    CutShort,
    /// Whatever it is, it is not a load balancer.
    #[error("what came is not a message of a load balancer")]
    Foreign,
    /// Of another version of this program, which is not understood.
    #[error("it speaks version {0} of the takeover protocol, this one speaks {VERSION}")]
    Version(u16),
    /// A length or a number of descriptors out of bounds, or others than announced.
    #[error("what came is malformed")]
    Malformed,
    /// Another user's process.
    #[error("it runs as user {theirs}, this one as {ours}")]
    OtherUser {
        /// Who runs the other process.
        theirs: u32,
        /// Who runs this one.
        ours: u32,
    },
}

/// One end of a connection between two processes.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    /// What has arrived of the next message.
    inbox: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// Over a stream whose other end is held by a process of the same user.
    ///
    /// # Errors
    /// It is not.
    pub fn new(stream: UnixStream) -> Result<Self, ChannelError> {
        let theirs = stream.peer_cred()?.uid();
        let ours = rustix::process::geteuid().as_raw();
        if theirs != ours {
            return Err(ChannelError::OtherUser { theirs, ours });
        }
        Ok(Self { stream, inbox: Vec::new(), descriptors: Vec::new() })
    }

    /// Sends a message. If that is given up halfway, nothing more can be sent.
    ///
    /// # Errors
    /// The other end is gone.
    pub async fn send(
        &self,
        kind: Kind,
        body: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let count = u8::try_from(descriptors.len()).map_err(|_| ChannelError::Malformed)?;
        let len = u32::try_from(body.len()).map_err(|_| ChannelError::Malformed)?;
        if body.len() > BODY_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
            return Err(ChannelError::Malformed);
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([kind as u8, count]);
        bytes.extend(len.to_le_bytes());
        bytes.extend(body);
        let mut sent = 0;
        while sent < bytes.len() {
            let beside = if sent == 0 { descriptors } else { &[] };
            let rest = &bytes[sent..];
            let send = || send_some(&self.stream, rest, beside);
            sent += self.stream.async_io(Interest::WRITABLE, send).await?;
        }
        Ok(())
    }

    /// The next message; `None` at the end. May be dropped at any time: what has arrived is kept.
    ///
    /// # Errors
    /// What came is no message, or the other end is gone.
    pub async fn receive(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            let wanted = match self.inbox.first_chunk() {
                None => HEADER_BYTES,
                Some(header) => {
                    let header = *header;
                    let whole = HEADER_BYTES + body_len(&header)?;
                    if self.inbox.len() == whole {
                        return Ok(Some(self.take(&header)?));
                    }
                    whole
                }
            };
            let Self { stream, inbox, descriptors } = self;
            // Never past the end of this message: descriptors belong to the bytes they come with.
            let room = (wanted - inbox.len()).min(READ_BYTES);
            let receive = || receive_some(stream, room, inbox, descriptors);
            let received = stream.async_io(Interest::READABLE, receive).await?;
            match received {
                0 if self.inbox.is_empty() => return Ok(None),
                0 => return Err(ChannelError::CutShort),
                _ => {}
            }
        }
    }

    /// The message in the inbox, which is whole.
    fn take(&mut self, header: &[u8; HEADER_BYTES]) -> Result<Message, ChannelError> {
        let kind = Kind::from_code(header[6]).ok_or(ChannelError::Malformed)?;
        if self.descriptors.len() != usize::from(header[7]) {
            return Err(ChannelError::Malformed);
        }
        let body = std::mem::take(&mut self.inbox).split_off(HEADER_BYTES);
        let descriptors = std::mem::take(&mut self.descriptors);
        Ok(Message { kind, body, descriptors })
    }

    /// Ends both directions. Nothing that is sent from now on, by either end, arrives; what has
    /// arrived here by now can still be received.
    pub fn close(&self) {
        // It is an error only if the other end was first.
        let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
    }
}

/// Length of the body that a header announces.
fn body_len(header: &[u8; HEADER_BYTES]) -> Result<usize, ChannelError> {
    let [m0, m1, m2, m3, v0, v1, _, descriptors, len @ ..] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(ChannelError::Foreign);
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(ChannelError::Version(version));
    }
    let len = u32::from_le_bytes(len) as usize;
    if len > BODY_BYTES_MAX || usize::from(descriptors) > DESCRIPTORS_MAX {
        return Err(ChannelError::Malformed);
    }
    Ok(len)
}

/// Sends as much as the socket takes now.
fn send_some(stream: &UnixStream, bytes: &[u8], beside: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !beside.is_empty() && !control.push(SendAncillaryMessage::ScmRights(beside)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(bytes)];
    Ok(rustix::net::sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
}

/// Receives at most `room` bytes, and what comes beside them.
fn receive_some(
    stream: &UnixStream,
    room: usize,
    inbox: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; room];
    let received = {
        let mut into = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(stream, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other("more descriptors came than are expected"));
    }
    inbox.extend_from_slice(&bytes[..received.bytes]);
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (one, other) = UnixStream::pair().unwrap();
        (Channel::new(one).unwrap(), Channel::new(other).unwrap())
    }

    #[tokio::test]
    async fn messages_arrive_whole_and_each_with_its_own_descriptors() {
        let (here, mut there) = pair();
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let body = vec![7; BODY_BYTES_MAX];
        let sending = async {
            here.send(Kind::Take, &[], &[]).await.unwrap();
            here.send(Kind::Session, &body, &[theirs.as_fd()]).await.unwrap();
            here.send(Kind::Hello, b"hello", &[]).await.unwrap();
        };
        let receiving = async {
            let take = there.receive().await.unwrap().unwrap();
            assert_eq!((take.kind, take.body.len(), take.descriptors.len()), (Kind::Take, 0, 0));
            let session = there.receive().await.unwrap().unwrap();
            assert_eq!((session.kind, session.body == body), (Kind::Session, true));
            let hello = there.receive().await.unwrap().unwrap();
            assert_eq!((hello.kind, &hello.body[..]), (Kind::Hello, &b"hello"[..]));
            assert!(hello.descriptors.is_empty());
            session.descriptors
        };
        let ((), descriptors) = tokio::join!(sending, receiving);
        let [received] = <[OwnedFd; 1]>::try_from(descriptors).unwrap();
        drop(theirs);
        std::os::unix::net::UnixStream::from(received).write_all(b"x").unwrap();
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        drop(here);
        assert!(there.receive().await.unwrap().is_none());
    }

    /// The rule by which two processes agree on whose a client is.
    #[tokio::test]
    async fn once_closed_nothing_arrives_but_what_had_arrived() {
        let (mut here, there) = pair();
        there.send(Kind::Taken, &[], &[]).await.unwrap();
        here.close();
        there.send(Kind::Taken, &[], &[]).await.unwrap_err();
        assert_eq!(here.receive().await.unwrap().unwrap().kind, Kind::Taken);
        assert!(here.receive().await.unwrap().is_none());
        let (mut here, there) = pair();
        here.close();
        there.send(Kind::Taken, &[], &[]).await.unwrap_err();
        assert!(here.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_message_is_told_from_one() {
        let header = |version: u8, kind: u8, descriptors: u8, len: u32| {
            let mut bytes = b"CBTO".to_vec();
            bytes.extend([version, 0, kind, descriptors]);
            bytes.extend(len.to_le_bytes());
            bytes
        };
        let told = |bytes: Vec<u8>| async move {
            let (mut writer, reader) = UnixStream::pair().unwrap();
            writer.write_all(&bytes).await.unwrap();
            drop(writer);
            Channel::new(reader).unwrap().receive().await
        };
        assert!(told(header(1, 4, 0, 0)).await.unwrap().is_some());
        let too_long = u32::try_from(BODY_BYTES_MAX + 1).unwrap();
        for malformed in [header(1, 9, 0, 0), header(1, 4, 1, 0), header(1, 6, 0, too_long)] {
            assert!(matches!(told(malformed).await, Err(ChannelError::Malformed)));
        }
        assert!(matches!(told(header(2, 4, 0, 0)).await, Err(ChannelError::Version(2))));
        assert!(matches!(told(b"GET / HTTP/1.1".to_vec()).await, Err(ChannelError::Foreign)));
        assert!(matches!(told(header(1, 1, 0, 9)).await, Err(ChannelError::CutShort)));
        assert!(matches!(told(b"CBTO".to_vec()).await, Err(ChannelError::CutShort)));
        assert!(told(Vec::new()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn waiting_may_be_given_up_halfway() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(reader).unwrap();
        let message = b"CBTO\x01\x00\x01\x00\x02\x00\x00\x00hi";
        for byte in message {
            let early = std::time::Duration::from_millis(1);
            tokio::time::timeout(early, channel.receive()).await.unwrap_err();
            writer.write_all(&[*byte]).await.unwrap();
        }
        assert_eq!(channel.receive().await.unwrap().unwrap().body, b"hi");
    }
}
