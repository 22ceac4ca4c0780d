//! The running process, with a new one at its door.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nbd_front::{Handover, Offer};
use nbd_service::Shutdown;
use tokio::net::{TcpListener, UnixListener};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::channel::{Channel, ChannelError, Kind, Message};
use super::{ANSWER_MAX, Identity, TAKE_MAX};

/// What a running process keeps for the one that follows it.
#[derive(Debug)]
pub(crate) struct Predecessor {
    /// Where the next one is awaited.
    takeover: UnixListener,
    nbd: OwnedFd,
    http: OwnedFd,
    identity: Identity,
    handover: Handover,
}

/// Why a new process was not followed by.
#[derive(Debug, thiserror::Error)]
enum NotReplaced {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("it is of another cluster")]
    OtherCluster,
    #[error("it said something out of turn")]
    OutOfTurn,
    #[error("it left before it was ready")]
    Left,
    #[error("it was not heard from in time")]
    Silent,
}

impl Predecessor {
    /// Waits at `takeover` for a process to leave these listening sockets and these sessions to.
    pub(crate) fn new(
        takeover: UnixListener,
        nbd: &TcpListener,
        http: &TcpListener,
        identity: Identity,
        handover: Handover,
    ) -> io::Result<Self> {
        let copy = |listener: &TcpListener| listener.as_fd().try_clone_to_owned();
        Ok(Self { takeover, nbd: copy(nbd)?, http: copy(http)?, identity, handover })
    }

    /// Runs until the process stops. `accepting` is cancelled when it accepts no more connections:
    /// here, if another process does from then on, which `superseded` then tells; otherwise nobody
    /// is waited for any more. Sessions are handed over until `shutdown`.
    pub(crate) async fn run(
        self,
        accepting: CancellationToken,
        superseded: CancellationToken,
        shutdown: Shutdown,
    ) {
        let channel = tokio::select! {
            channel = self.wait_for_successor() => channel,
            () = accepting.cancelled() => return,
        };
        info!("another load balancer has taken over");
        let handover = self.handover.clone();
        // The listening sockets are the other's alone.
        drop(self);
        superseded.cancel();
        accepting.cancel();
        hand_over(channel, &handover, &shutdown).await;
    }

    /// Serves new processes one after the other until one is ready and has been told so.
    async fn wait_for_successor(&self) -> Channel {
        loop {
            let stream = match self.takeover.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "cannot accept a successor");
                    tokio::time::sleep(ANSWER_MAX).await;
                    continue;
                }
            };
            let replaced = match Channel::new(stream) {
                Ok(channel) => self.give_way(channel).await,
                Err(error) => Err(error.into()),
            };
            match replaced {
                Ok(channel) => return channel,
                Err(reason) => warn!(%reason, "a load balancer has not taken over"),
            }
        }
    }

    /// Leaves the place to a new process, once that is ready.
    async fn give_way(&self, mut channel: Channel) -> Result<Channel, NotReplaced> {
        let hello = expect(&mut channel, Kind::Hello, ANSWER_MAX).await?;
        if hello.body != self.identity.0 {
            let why = b"it serves another cluster, or one with another number of shards";
            let refused = channel.send(Kind::Refused, why, &[]);
            timeout(ANSWER_MAX, refused).await.map_err(|_| NotReplaced::Silent)??;
            return Err(NotReplaced::OtherCluster);
        }
        info!("another load balancer prepares to take over");
        let listeners = [self.nbd.as_fd(), self.http.as_fd()];
        let shown = channel.send(Kind::Listeners, &[], &listeners);
        timeout(ANSWER_MAX, shown).await.map_err(|_| NotReplaced::Silent)??;
        expect(&mut channel, Kind::Take, TAKE_MAX).await?;
        let yours = [self.takeover.as_fd()];
        let given = channel.send(Kind::Yours, &[], &yours);
        timeout(ANSWER_MAX, given).await.map_err(|_| NotReplaced::Silent)??;
        Ok(channel)
    }
}

async fn expect(
    channel: &mut Channel,
    kind: Kind,
    within: std::time::Duration,
) -> Result<Message, NotReplaced> {
    match timeout(within, channel.receive()).await {
        Ok(Ok(Some(message))) if message.kind == kind => Ok(message),
        Ok(Ok(Some(_))) => Err(NotReplaced::OutOfTurn),
        Ok(Ok(None)) => Err(NotReplaced::Left),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(NotReplaced::Silent),
    }
}

/// Hands sessions over as they offer themselves, until the process stops or the other is lost.
async fn hand_over(mut channel: Channel, handover: &Handover, shutdown: &Shutdown) {
    let Some(mut offers) = handover.begin() else { return };
    let mut handed = 0_u64;
    loop {
        let offer = tokio::select! {
            offer = offers.recv() => offer,
            () = shutdown.started() => None,
        };
        // Not to be broken off: whose the client is must be known.
        let Some(offer) = offer else { break };
        let (became, is_lost) = hand(&mut channel, &offer).await;
        match became {
            Became::Taken => {
                handed += 1;
                offer.taken();
            }
            Became::Kept => offer.kept(),
        }
        if is_lost {
            warn!(handed, "the other load balancer is lost: the sessions that are left stay here");
            break;
        }
    }
    offers.close();
    while let Some(offer) = offers.recv().await {
        offer.kept();
    }
    info!(handed, "handed over what could be");
}

/// What has become of a session that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Became {
    Taken,
    Kept,
}

/// Offers a session to the other process. The flag says that this was the last: there is nobody to
/// talk to any more.
async fn hand(channel: &mut Channel, offer: &Offer) -> (Became, bool) {
    let exchange = async {
        channel.send(Kind::Session, offer.parcel(), &[offer.socket()]).await?;
        channel.receive().await
    };
    match timeout(ANSWER_MAX, exchange).await {
        Ok(Ok(Some(Message { kind: Kind::Taken, .. }))) => (Became::Taken, false),
        Ok(Ok(Some(Message { kind: Kind::Kept, .. }))) => (Became::Kept, false),
        _ => (last_word(channel).await, true),
    }
}

/// Ends the conversation, and with it any possibility that the session is taken later. What has
/// arrived by then holds.
async fn last_word(channel: &mut Channel) -> Became {
    channel.close();
    while let Ok(Some(message)) = channel.receive().await {
        if message.kind == Kind::Taken {
            return Became::Taken;
        }
    }
    Became::Kept
}
