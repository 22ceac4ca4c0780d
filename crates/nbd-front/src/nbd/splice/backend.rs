//! Finds a replica that serves a volume as its client will be told that it does.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use nbd_proto::limits::{BLOCK_BYTES_MIN, BLOCK_BYTES_PREFERRED, REQUEST_PAYLOAD_BYTES_MAX};
use nbd_proto::option::InfoRequests;
use nbd_proto::{
    Attached, BlockSize, ClientEvent, ClientGoal, ClientHandshake, ClientHandshakeError,
    ClientWish, ExportInfo, ReplyStyle,
};
use nbd_splice::set_options;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::limits::HANDSHAKE_DEADLINE;
use crate::route::NbdAt;

/// Time to find a replica for a client; then the client is told that there is none.
const FIND_MAX: Duration = Duration::from_secs(7);

/// Time for a replica to accept a connection. One whose machine is gone says nothing.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Time for a replica that has accepted to agree: it opens a session in the shard's log, which may
/// have to wait for an election or two. One that is frozen accepts and says nothing.
const AGREE_MAX: Duration = Duration::from_secs(2);

/// Wait before all of them are tried again, if nothing new is known of them by then.
const RETRY: Duration = Duration::from_millis(100);

const _: () = assert!(FIND_MAX.as_secs() < HANDSHAKE_DEADLINE.as_secs(), "the client is told");

/// What the client will be told, and the replica has to agree to.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) export: &'a ExportInfo,
    pub(super) replies: ReplyStyle,
    /// Id of `base:allocation`, if the client has selected it.
    pub(super) allocation_context: Option<u32>,
}

/// Why a replica does not serve a client.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("it does not answer in time")]
    Silent,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it closed the connection")]
    Closed,
    #[error(transparent)]
    Protocol(#[from] ClientHandshakeError),
    #[error("it refuses option {option} with error {error:#x}")]
    Refused { option: u32, error: u32 },
    #[error("it answers what was not asked")]
    Unasked,
    /// A client would be told one thing and get another.
    #[error("it serves the volume with {0} other than what this process tells its clients")]
    Differs(&'static str),
}

/// A connection to the first of `servers` that agrees, attached and not used yet. They are tried in
/// order, and again as long as there is time. `None`: there was none in time.
pub(super) async fn find(
    mut servers: watch::Receiver<Vec<NbdAt>>,
    wanted: &Wanted<'_>,
) -> Option<(TcpStream, NbdAt)> {
    let search = async {
        loop {
            let known = servers.borrow_and_update().clone();
            for at in known {
                match attach(&at, wanted).await {
                    Ok(stream) => return Some((stream, at)),
                    Err(error @ Unfit::Differs(_)) => {
                        warn!(node = %at.node, at = at.nbd, %error, "a replica is passed over");
                    }
                    Err(error) => {
                        debug!(node = %at.node, at = at.nbd, %error, "a replica is passed over");
                    }
                }
            }
            tokio::select! {
                changed = servers.changed() => changed.ok()?,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    };
    timeout(FIND_MAX, search).await.ok().flatten()
}

async fn attach(at: &NbdAt, wanted: &Wanted<'_>) -> Result<TcpStream, Unfit> {
    let connect = timeout(CONNECT_MAX, TcpStream::connect(&at.nbd));
    let mut stream = connect.await.map_err(|_| Unfit::Silent)??;
    set_options(&stream)?;
    let agreed = timeout(AGREE_MAX, agree(&mut stream, wanted));
    let attached = agreed.await.map_err(|_| Unfit::Silent)??;
    match difference(&attached, wanted) {
        None => Ok(stream),
        Some(what) => Err(Unfit::Differs(what)),
    }
}

/// Carries the handshake, as a client that wants exactly that.
async fn agree(stream: &mut TcpStream, wanted: &Wanted<'_>) -> Result<Attached, Unfit> {
    let mut handshake = ClientHandshake::new(ClientWish {
        export: wanted.export.name.clone(),
        goal: ClientGoal::Go,
        replies: wanted.replies,
        allocation_context: wanted.allocation_context.is_some(),
        info: InfoRequests { name: false, description: false, block_size: true },
    });
    let mut input = BytesMut::new();
    loop {
        let event = handshake.receive(&mut input)?;
        stream.write_all(&handshake.take_output()).await?;
        match event {
            // A server has nothing to say before it is asked.
            Some(ClientEvent::Attached(attached)) if input.is_empty() => return Ok(attached),
            Some(ClientEvent::Refused { option, error, .. }) => {
                return Err(Unfit::Refused { option, error });
            }
            Some(_) => return Err(Unfit::Unasked),
            None => {
                if stream.read_buf(&mut input).await? == 0 {
                    return Err(Unfit::Closed);
                }
            }
        }
    }
}

/// In what the replica differs from what the client will be told, if in anything.
fn difference(attached: &Attached, wanted: &Wanted<'_>) -> Option<&'static str> {
    let payload_max = u32::try_from(REQUEST_PAYLOAD_BYTES_MAX).unwrap_or(u32::MAX);
    let sizes =
        BlockSize { minimum: BLOCK_BYTES_MIN, preferred: BLOCK_BYTES_PREFERRED, payload_max };
    let export = &attached.export;
    if export.size != wanted.export.size {
        Some("a size")
    } else if export.flags != wanted.export.transmission_flags(wanted.replies) {
        Some("transmission flags")
    } else if export.block_size != Some(sizes) {
        Some("block sizes")
    } else if attached.replies != wanted.replies {
        Some("replies")
    } else if attached.allocation_context != wanted.allocation_context {
        Some("an allocation context")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use nbd_proto::constants::{ALLOCATION_CONTEXT_ID, TransmissionFlags};
    use nbd_proto::{HandshakeEvent, RemoteExport, ServerHandshake};
    use tokio::net::TcpListener;

    use super::*;

    fn export() -> ExportInfo {
        let description = "a volume".to_owned();
        let name = "vol1".parse().unwrap();
        ExportInfo { name, description, size: 1 << 20, read_only: false }
    }

    const STYLES: [(ReplyStyle, Option<u32>); 5] = [
        (ReplyStyle::Simple, None),
        (ReplyStyle::Structured, None),
        (ReplyStyle::Structured, Some(ALLOCATION_CONTEXT_ID)),
        (ReplyStyle::Extended, None),
        (ReplyStyle::Extended, Some(ALLOCATION_CONTEXT_ID)),
    ];

    /// A server of `export`, or of nothing; its connections stay open.
    async fn server(export: Option<ExportInfo>) -> NbdAt {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nbd = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut handshake = ServerHandshake::new();
                let mut input = BytesMut::new();
                loop {
                    let event = handshake.receive(&mut input).unwrap();
                    let mut attached = false;
                    if let Some(HandshakeEvent::Resolve { .. }) = event {
                        let found = export.clone().ok_or(nbd_proto::ExportRefusal::Unknown);
                        attached = handshake.answer_export(found).is_some();
                    }
                    stream.write_all(&handshake.take_output()).await.unwrap();
                    if attached || event.is_none() && stream.read_buf(&mut input).await.is_err() {
                        break;
                    }
                }
                open.push(stream);
            }
        });
        NbdAt { node: "n1".parse().unwrap(), nbd }
    }

    #[tokio::test]
    async fn a_server_agrees_to_what_clients_agree_on_here() {
        let (export, at) = (export(), server(Some(export())).await);
        for (replies, allocation_context) in STYLES {
            let wanted = Wanted { export: &export, replies, allocation_context };
            attach(&at, &wanted).await.unwrap();
        }
    }

    #[tokio::test]
    async fn the_first_that_agrees_is_taken() {
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let refuses = NbdAt { node: "n0".parse().unwrap(), nbd: nobody.to_string() };
        let smaller = server(Some(ExportInfo { size: 4096, ..export() })).await;
        let fits = server(Some(export())).await;
        let (export, replies) = (export(), ReplyStyle::Structured);
        let wanted = Wanted { export: &export, replies, allocation_context: None };
        let known = vec![refuses, smaller.clone(), server(None).await, fits.clone()];
        let (_sender, servers) = watch::channel(known);
        let (_, at) = find(servers, &wanted).await.unwrap();
        assert_eq!(at, fits);
        let error = attach(&smaller, &wanted).await.unwrap_err();
        assert!(matches!(error, Unfit::Differs("a size")), "{error}");
    }

    #[tokio::test]
    async fn one_that_is_told_of_later_is_taken() {
        let (sender, servers) = watch::channel(Vec::new());
        let (export, at) = (export(), server(Some(export())).await);
        let tell = async {
            tokio::task::yield_now().await;
            sender.send_replace(vec![at.clone()]);
        };
        let replies = ReplyStyle::Simple;
        let wanted = Wanted { export: &export, replies, allocation_context: None };
        let (found, ()) = tokio::join!(find(servers, &wanted), tell);
        assert_eq!(found.unwrap().1, at);
    }

    #[test]
    fn any_difference_counts() {
        let export = export();
        for (replies, allocation_context) in STYLES {
            let wanted = Wanted { export: &export, replies, allocation_context };
            let block_size = BlockSize { minimum: 1, preferred: 4096, payload_max: 32 << 20 };
            let equal = Attached {
                export: RemoteExport {
                    size: export.size,
                    flags: export.transmission_flags(replies),
                    name: None,
                    description: None,
                    block_size: Some(block_size),
                },
                replies,
                allocation_context,
            };
            assert_eq!(difference(&equal, &wanted), None);
            let other = |change: fn(&mut Attached)| {
                let mut attached = equal.clone();
                change(&mut attached);
                difference(&attached, &wanted)
            };
            assert_eq!(other(|it| it.export.size += 512), Some("a size"));
            let fewer = other(|it| it.export.flags = TransmissionFlags::HAS_FLAGS);
            assert_eq!(fewer, Some("transmission flags"));
            assert_eq!(other(|it| it.export.block_size = None), Some("block sizes"));
            assert_eq!(other(|it| it.allocation_context = Some(99)), Some("an allocation context"));
        }
    }
}
