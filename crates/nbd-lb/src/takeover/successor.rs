//! A new process, in the place of a running one.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nbd_front::Adopter;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::{info, warn};

use super::channel::{Channel, ChannelError, Kind, Message};
use super::{ANSWER_MAX, Identity, READY_MAX, TakeoverError};

/// A running process that has shown its listening sockets. It serves on.
#[derive(Debug)]
pub(crate) struct Running {
    channel: Channel,
    nbd: TcpListener,
    http: TcpListener,
}

/// What a new process has come into. The listening sockets are its own in either case.
#[derive(Debug)]
pub(crate) enum Succession {
    /// The running process accepts no more, and hands over its clients one by one.
    Orderly { channel: Channel, takeover: UnixListener },
    /// It has died before it could.
    Orphaned,
}

/// The process that runs already, if there is one that can be found at `path`.
pub(crate) async fn find(
    path: &Path,
    identity: &Identity,
) -> Result<Option<Running>, TakeoverError> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) if is_nobody(&error) => return Ok(None),
        Err(source) => return Err(TakeoverError::Socket { path: path.to_owned(), source }),
    };
    let mut channel = Channel::new(stream)?;
    let introduced = async {
        channel.send(Kind::Hello, &identity.0, &[]).await?;
        channel.receive().await
    };
    let answer = timeout(ANSWER_MAX, introduced).await.map_err(|_| TakeoverError::Silent)??;
    let [nbd, http] = match answer {
        Some(Message { kind: Kind::Listeners, descriptors, .. }) => {
            descriptors.try_into().map_err(|_| TakeoverError::OutOfTurn)?
        }
        answer => return Err(other_than_expected(answer)),
    };
    Ok(Some(Running { channel, nbd: listener(nbd)?, http: listener(http)? }))
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn listener(socket: OwnedFd) -> Result<TcpListener, TakeoverError> {
    let listener = std::net::TcpListener::from(socket);
    let usable = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
    usable.map_err(TakeoverError::Listener)
}

fn other_than_expected(answer: Option<Message>) -> TakeoverError {
    match answer {
        Some(Message { kind: Kind::Refused, body, .. }) => {
            TakeoverError::Refused(String::from_utf8_lossy(&body).into_owned())
        }
        Some(_) => TakeoverError::OutOfTurn,
        None => TakeoverError::Channel(ChannelError::CutShort),
    }
}

impl Running {
    /// Where it serves NBD, ...
    pub(crate) const fn nbd(&self) -> &TcpListener {
        &self.nbd
    }

    /// ... and HTTP.
    pub(crate) const fn http(&self) -> &TcpListener {
        &self.http
    }

    /// Takes its place once `ready`, or when that takes too long. Gives the listening sockets, NBD
    /// first, which nobody else accepts from any more.
    pub(crate) async fn replace(
        self,
        ready: impl Future<Output = ()>,
    ) -> Result<(TcpListener, TcpListener, Succession), TakeoverError> {
        let Self { mut channel, nbd, http } = self;
        let answer = tokio::select! {
            // It has nothing to say as long as it is not asked.
            early = channel.receive() => early,
            became_ready = timeout(READY_MAX, ready) => {
                if became_ready.is_err() {
                    warn!(within = ?READY_MAX, "not every leader is reached: taking over anyway");
                }
                let asked = async {
                    channel.send(Kind::Take, &[], &[]).await?;
                    channel.receive().await
                };
                match timeout(ANSWER_MAX, asked).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(Some(last_word(&mut channel).await.ok_or(TakeoverError::Silent)?)),
                }
            }
        };
        let succession = match answer {
            Ok(Some(Message { kind: Kind::Yours, descriptors, .. })) => {
                let [socket] = descriptors.try_into().map_err(|_| TakeoverError::OutOfTurn)?;
                let takeover = std::os::unix::net::UnixListener::from(socket);
                let usable = takeover.set_nonblocking(true);
                let takeover = usable.and_then(|()| UnixListener::from_std(takeover));
                Succession::Orderly {
                    channel,
                    takeover: takeover.map_err(TakeoverError::Listener)?,
                }
            }
            Ok(Some(message)) => return Err(other_than_expected(Some(message))),
            Ok(None) | Err(ChannelError::Io(_) | ChannelError::CutShort) => Succession::Orphaned,
            Err(error) => return Err(error.into()),
        };
        Ok((nbd, http, succession))
    }
}

/// Ends the conversation. Should the answer have come in the very last moment, it holds: the other
/// process accepts no more.
async fn last_word(channel: &mut Channel) -> Option<Message> {
    channel.close();
    channel.receive().await.ok().flatten()
}

/// Takes in the clients of the process before, until it has none or `stop`.
pub(crate) async fn adopt(mut channel: Channel, adopter: Adopter, stop: impl Future<Output = ()>) {
    tokio::pin!(stop);
    let mut adopted = 0_u64;
    let end = loop {
        let message = tokio::select! {
            () = &mut stop => break Ok(()),
            message = channel.receive() => message,
        };
        match message {
            Ok(Some(message)) => match take_in(&channel, &adopter, message).await {
                Ok(taken) => adopted += u64::from(taken),
                Err(error) => break Err(error),
            },
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    match end {
        Ok(()) => info!(adopted, "took over all the clients there were to take"),
        Err(error) => warn!(adopted, %error, "the load balancer before this one was lost"),
    }
}

/// Takes one session in. `false`: it stays where it is.
async fn take_in(
    channel: &Channel,
    adopter: &Adopter,
    message: Message,
) -> Result<bool, ChannelError> {
    let Message { kind: Kind::Session, body, descriptors } = message else {
        return Err(ChannelError::Malformed);
    };
    let [socket] = descriptors.try_into().map_err(|_| ChannelError::Malformed)?;
    match adopter.look(&body, socket) {
        Ok(adopted) => {
            // If this fails the client is not ours: dropping it closes our copy of its socket.
            channel.send(Kind::Taken, &[], &[]).await?;
            adopted.serve();
            Ok(true)
        }
        Err(reason) => {
            warn!(%reason, "a session stays with the load balancer before this one");
            channel.send(Kind::Kept, &[], &[]).await?;
            Ok(false)
        }
    }
}
