//! A new load balancer in the place of a running one: no connection is refused, no client notices.
//!
//! The running one listens at a Unix socket (`--takeover`). A new one that finds it there:
//!
//! ```text
//!  new                                    running
//!   │ ── Hello: cluster, shards ───────────▶ │   who it is: same user, version and cluster
//!   │ ◀─────────── Listeners: NBD, HTTP ──── │   both hold the listening sockets now
//!   │ (reaches the leader of every shard)    │   serves on
//!   │ ── Take ─────────────────────────────▶ │
//!   │ ◀── Yours: the Unix socket itself ──── │   from here on the new one accepts; it does not
//!   │                                        │
//!   │ ◀─────────── Session: state, client ── │   for each attached client, between two requests
//!   │ ── Taken, or Kept ───────────────────▶ │   (see nbd-front, handover)
//!   │ ◀──────────────────── end of stream ── │   it has no clients any more, or its time is up
//! ```
//!
//! Listening sockets stay open throughout, and with them what waits in their backlogs. If the new
//! one dies before `Take`, nothing has changed. If the running one dies before `Yours`, the new one
//! holds the listening sockets alone, and begins.
//!
//! **Whose a client is** is decided by one thing: whether `Taken` has reached the running one's
//! receive queue. The new one touches a client only after it has sent `Taken` with success. The
//! running one, when no answer comes in time or the stream breaks, shuts its end down first, from
//! which moment nothing more can arrive, and then looks at what has arrived: if there is no
//! `Taken`, the client is its own, for good.
//!
//! The file of the Unix socket has mode 0600, and each side checks the other's user besides. It
//! stays behind when a process ends; the next one finds that nobody answers, and replaces it. The
//! directory it is in should be writable for that user only.
//!
//! - [`channel`]: messages and descriptors over a Unix socket.
//! - `successor`: what a new process does. `predecessor`: what the running one does.

pub mod channel;
mod predecessor;
mod successor;

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use nbd_service::ClusterConfig;
use tokio::net::UnixListener;

use self::channel::ChannelError;
pub(crate) use self::predecessor::Predecessor;
pub(crate) use self::successor::{Running, Succession, adopt, find};

/// Time for an answer of the other process, which has nothing to wait for.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Time that a new process has to reach the leader of every shard. One without a leader must not
/// keep an upgrade from happening: clients of that shard wait, whoever serves them.
const READY_MAX: Duration = Duration::from_secs(10);

/// Time for which a running process waits to be told to stop accepting.
const TAKE_MAX: Duration = Duration::from_secs(60);

const _: () = assert!(TAKE_MAX.as_secs() > READY_MAX.as_secs() + 2 * ANSWER_MAX.as_secs());

/// Why one process cannot take over from another.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// The Unix socket cannot be used.
    #[error("cannot use {path} for takeovers")]
    Socket {
        /// Where it is.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// What is there is something else.
    #[error("{0} is not a socket: it is left alone")]
    NotASocket(PathBuf),
    /// The running process cannot be talked to.
    #[error("cannot talk to the running load balancer")]
    Channel(#[from] ChannelError),
    /// It has not answered.
    #[error("the running load balancer did not answer within {ANSWER_MAX:?}")]
    Silent,
    /// It says no.
    #[error("the running load balancer refuses: {0}")]
    Refused(String),
    /// It has said something out of turn.
    #[error("the running load balancer broke the protocol")]
    OutOfTurn,
    /// It has given this process up, and serves on.
    #[error("the running load balancer waits for this one no longer, and serves on")]
    GivenUp,
    /// It listens where this one should not.
    #[error("the running load balancer serves {what} on port {running}, not on {configured}")]
    OtherPort {
        /// What is served there.
        what: &'static str,
        /// Where it is served now.
        running: u16,
        /// Where it should be.
        configured: u16,
    },
    /// What came is no listening socket.
    #[error("the running load balancer handed over a socket that cannot be used")]
    Listener(#[source] io::Error),
}

/// What both processes must have in common: its bytes are compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity(Vec<u8>);

impl Identity {
    pub(crate) fn of(cluster: &ClusterConfig) -> Self {
        let mut bytes = cluster.shard_count().get().to_le_bytes().to_vec();
        bytes.extend_from_slice(cluster.name().as_str().as_bytes());
        Self(bytes)
    }
}

/// Listens for successors at `path`, in place of whatever socket is there.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, TakeoverError> {
    let failed = |source| TakeoverError::Socket { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Ok(data) if !data.file_type().is_socket() => {
            return Err(TakeoverError::NotASocket(path.to_owned()));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // Under its name only once nobody else can connect.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let _ = fs::remove_file(&temporary);
    let bound = UnixListener::bind(&temporary).map_err(failed)?;
    let moved = fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
        .and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = moved {
        let _ = fs::remove_file(&temporary);
        return Err(failed(error));
    }
    Ok(bound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("takeover");
        drop(listen(&path).unwrap());
        assert!(path.exists(), "it stays behind");
        let _listener = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(matches!(listen(&file), Err(TakeoverError::NotASocket(_))));
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        assert!(listen(&directory.path().join("absent/takeover")).is_err());
    }
}
