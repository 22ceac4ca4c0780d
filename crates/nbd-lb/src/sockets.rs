//! The listening sockets: bound anew, or those of a process that runs already.

use std::future::Future;
use std::net::SocketAddr;

use nbd_service::HostPort;
use tokio::net::{TcpListener, UnixListener};

use crate::app::StartError;
use crate::config::Config;
use crate::takeover::channel::Channel;
use crate::takeover::{self, Identity, Running, Succession, TakeoverError};

/// A socket that listens.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) socket: TcpListener,
    pub(crate) address: SocketAddr,
}

/// How this process comes by its sockets.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Nobody else has them.
    Own { nbd: Bound, http: Bound },
    /// Another process does, and serves on until it is replaced.
    Another(Running),
}

/// The sockets of a process that accepts from them, and nobody else.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) nbd: Bound,
    pub(crate) http: Bound,
    /// Where the next process is awaited, if one may come.
    pub(crate) takeover: Option<UnixListener>,
    /// The process before this one, with clients to hand over.
    pub(crate) before: Option<Channel>,
}

/// Looks for a process that runs already, and binds the sockets if there is none.
pub(crate) async fn find(config: &Config, identity: &Identity) -> Result<Origin, StartError> {
    if let Some(path) = &config.takeover
        && let Some(running) = takeover::find(path, identity).await?
    {
        same_port("NBD", running.nbd(), &config.nbd)?;
        same_port("HTTP", running.http(), &config.http)?;
        return Ok(Origin::Another(running));
    }
    let http = listen("HTTP", &config.http).await?;
    let nbd = listen("NBD", &config.nbd).await?;
    Ok(Origin::Own { nbd, http })
}

impl Origin {
    /// Makes the sockets this process's own: at once if they are, else once it is `ready` and has
    /// replaced the other.
    pub(crate) async fn settle(
        self,
        config: &Config,
        identity: &Identity,
        ready: impl Future<Output = ()>,
    ) -> Result<Found, StartError> {
        let running = match self {
            Self::Own { nbd, http } => {
                let takeover = config.takeover.as_deref().map(takeover::listen).transpose()?;
                return Ok(Found { nbd, http, takeover, before: None });
            }
            Self::Another(running) => running,
        };
        let (nbd, http, succession) = running.replace(ready).await?;
        let (nbd, http) = (Bound::of(nbd)?, Bound::of(http)?);
        let (takeover, before) = match succession {
            Succession::Orderly { channel, takeover } => (Some(takeover), Some(channel)),
            Succession::Orphaned => (anew(config, identity).await?, None),
        };
        Ok(Found { nbd, http, takeover, before })
    }
}

/// Listens for the next process, the one before being gone; unless it is not.
async fn anew(config: &Config, identity: &Identity) -> Result<Option<UnixListener>, TakeoverError> {
    let Some(path) = &config.takeover else { return Ok(None) };
    match takeover::find(path, identity).await? {
        Some(_) => Err(TakeoverError::GivenUp),
        None => takeover::listen(path).map(Some),
    }
}

impl Bound {
    fn of(socket: TcpListener) -> Result<Self, TakeoverError> {
        let address = socket.local_addr().map_err(TakeoverError::Listener)?;
        Ok(Self { socket, address })
    }
}

/// Whether a running process listens where this one is to. (Hosts are not compared: one has many
/// names.)
fn same_port(
    what: &'static str,
    running: &TcpListener,
    configured: &HostPort,
) -> Result<(), TakeoverError> {
    let running = running.local_addr().map_err(TakeoverError::Listener)?.port();
    let configured = configured.port();
    if configured != 0 && configured != running {
        return Err(TakeoverError::OtherPort { what, running, configured });
    }
    Ok(())
}

async fn listen(what: &'static str, address: &HostPort) -> Result<Bound, StartError> {
    let refused = |source| StartError::Listen { what, address: address.clone(), source };
    let socket = TcpListener::bind(address.to_string()).await.map_err(refused)?;
    let address = socket.local_addr().map_err(refused)?;
    Ok(Bound { socket, address })
}
