//! Taking in sessions of another process.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::BytesMut;
use nbd_proto::Negotiated;
use tokio::net::TcpStream;
use tracing::info_span;

use super::super::attach::{self, Origin, session_meter};
use super::super::connections::{Connections, Place};
use super::super::listener::spawn_connection;
use super::super::session::Attached;
use super::super::{Front, Listener};
use super::parcel::{MalformedParcel, Parcel};
use crate::shard_client::{ClientAt, SessionClient};

/// Takes in sessions that another process offers.
#[derive(Debug)]
pub struct Adopter {
    front: Arc<Front>,
    connections: Connections,
}

/// A session that can be served here. It is not yet: nothing was read, written or logged.
#[derive(Debug)]
pub struct Adopted {
    stream: TcpStream,
    peer: SocketAddr,
    input: BytesMut,
    negotiated: Negotiated,
    client: SessionClient,
    place: Place,
    front: Arc<Front>,
}

/// Why a session cannot be served here.
#[derive(Debug, thiserror::Error)]
pub enum NotAdopted {
    /// It is not known what it is.
    #[error(transparent)]
    Malformed(#[from] MalformedParcel),
    /// Its volume's shard is not served here.
    #[error("its shard is not served here")]
    OtherShard,
    /// There are as many connections as there may be.
    #[error("there is no place for another connection")]
    Full,
    /// What came is no connected socket; its client may have left.
    #[error("its socket cannot be used: {0}")]
    Socket(#[from] io::Error),
}

impl Adopter {
    /// Takes them in beside the connections of this listener, and within its bound.
    #[must_use]
    pub fn beside(listener: &Listener) -> Self {
        Self { front: Arc::clone(listener.front()), connections: listener.connections() }
    }

    /// Looks at a session that is offered, without touching its client.
    ///
    /// # Errors
    /// It cannot be served here.
    pub fn look(&self, parcel: &[u8], socket: OwnedFd) -> Result<Adopted, NotAdopted> {
        let Parcel { id, epoch, next_seq, volume, negotiated, input } = Parcel::decode(parcel)?;
        let shard = self.front.shards.get(&volume.shard()).ok_or(NotAdopted::OtherShard)?;
        let stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        let stream = TcpStream::from_std(stream)?;
        let peer = stream.peer_addr()?;
        // The other process does not say when the client came to it.
        let at = ClientAt::now(&peer);
        let session = (id, epoch, next_seq);
        let client = SessionClient::resumed(shard.clone(), volume, at, session);
        let place = self.connections.enter().ok_or(NotAdopted::Full)?;
        let (input, front) = (BytesMut::from(&input[..]), Arc::clone(&self.front));
        Ok(Adopted { stream, peer, input, negotiated, client, place, front })
    }
}

impl Adopted {
    /// Serves it from now on: the other process must have been told that it is taken, and be unable
    /// to take it back.
    pub fn serve(self) {
        // The options of the socket came with it.
        let Self { stream, peer, input, negotiated, client, place, front } = self;
        let origin = Origin { number: place.number, peer };
        let meter = session_meter(&client, origin, negotiated.export.name.as_str(), &front);
        let span = info_span!("connection", id = origin.number, %peer, adopted = true);
        let shared = Arc::clone(&front);
        let attached = Attached { stream, input, negotiated, client, meter, front };
        spawn_connection(&shared, place, span, attach::resume(attached));
    }
}
