//! From connection to attached session: carries the handshake, finds or creates the volume, and
//! opens the session in the shard's log.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use nbd_proto::{
    ExportInfo, ExportName, ExportRefusal, HandshakeEvent, Negotiated, Purpose, ServerHandshake,
};
use nbd_store::{Outcome, VolumeInfo, command};
use nbd_topology::{DEFAULT_VOLUME_NAME, shard_of};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tracing::{Instrument, debug, info, info_span, warn};

use super::Front;
use super::session::{self, Attached};
use crate::limits::{HANDSHAKE_DEADLINE, INPUT_READ_BYTES, LIST_MAX};
use crate::route::GroupStopped;
use crate::shard_client::{SessionClient, SessionEnd, ShardClient};

/// Longest name that an attach may create a volume under. The protocol advises clients to stay
/// within it; existing volumes are served under any name they have.
const CREATED_NAME_BYTES_MAX: usize = 256;

/// Serves one connection from its first byte to its last.
pub(super) async fn serve(mut stream: TcpStream, front: &Arc<Front>) {
    let mut input = BytesMut::with_capacity(INPUT_READ_BYTES);
    let mut opened = None;
    let negotiation = negotiate(&mut stream, &mut input, front, &mut opened);
    let negotiated = tokio::select! {
        negotiated = tokio::time::timeout(HANDSHAKE_DEADLINE, negotiation) => negotiated,
        () = front.shutdown.started() => Ok(Ok(None)),
    };
    let negotiated = match negotiated {
        Ok(Ok(negotiated)) => negotiated,
        Ok(Err(error)) => {
            info!(%error, "handshake failed");
            None
        }
        Err(_) => {
            info!(deadline = ?HANDSHAKE_DEADLINE, "handshake not finished in time");
            None
        }
    };
    let Some(mut client) = opened else { return };
    if let Some(negotiated) = negotiated {
        let export = negotiated.export.name.to_string();
        let attached = Attached { stream, input, negotiated, client, front: Arc::clone(front) };
        let span = info_span!("session", %export);
        client = session::run(attached).instrument(span).await;
    }
    client.close().await;
}

/// Why a handshake ended without a session.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("{0}")]
    Protocol(#[from] nbd_proto::HandshakeError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Carries the handshake to its end. `None` if the client ended it. `opened` is the session as soon
/// as there is one: the caller closes it whatever happens later.
async fn negotiate(
    stream: &mut TcpStream,
    input: &mut BytesMut,
    front: &Front,
    opened: &mut Option<SessionClient>,
) -> Result<Option<Negotiated>, AttachError> {
    let mut handshake = ServerHandshake::new();
    send(stream, handshake.take_output()).await?;
    loop {
        let event = match handshake.receive(input) {
            Ok(event) => event,
            Err(error) => {
                send(stream, handshake.take_output()).await?;
                return Err(error.into());
            }
        };
        match event {
            None => {
                send(stream, handshake.take_output()).await?;
                input.reserve(INPUT_READ_BYTES);
                if stream.read_buf(input).await? == 0 {
                    debug!("the client left during the handshake");
                    return Ok(None);
                }
            }
            Some(HandshakeEvent::Aborted) => {
                send(stream, handshake.take_output()).await?;
                return Ok(None);
            }
            Some(HandshakeEvent::List) => {
                handshake.answer_list(list(front).await.into_iter());
                // Sent before the next one is made, so that answers never pile up.
                send(stream, handshake.take_output()).await?;
            }
            Some(HandshakeEvent::Resolve { name, purpose }) => {
                let answer = match purpose {
                    Purpose::Describe => describe(front, &name).await,
                    Purpose::Attach => attach(front, &name, opened).await,
                };
                if let Some(negotiated) = handshake.answer_export(answer) {
                    send(stream, handshake.take_output()).await?;
                    return Ok(Some(negotiated));
                }
            }
        }
    }
}

async fn send(stream: &mut TcpStream, output: BytesMut) -> io::Result<()> {
    if output.is_empty() { Ok(()) } else { stream.write_all(&output).await }
}

/// The volume name an export name stands for: the empty name is the default volume.
fn volume_name(name: &ExportName) -> &str {
    if name.as_str().is_empty() { DEFAULT_VOLUME_NAME } else { name.as_str() }
}

fn shard_client<'a>(front: &'a Front, name: &str) -> Option<&'a ShardClient> {
    front.shards.get(&shard_of(name.as_bytes(), front.shard_count))
}

/// The exports of all shards that answer in time. The others are left out: a client that lists has
/// no use for none at all.
async fn list(front: &Front) -> Vec<(ExportName, String)> {
    let mut asked = JoinSet::new();
    for (&id, shard) in &front.shards {
        let shard = shard.clone();
        asked.spawn(async move { (id, tokio::time::timeout(LIST_MAX, shard.volumes()).await) });
    }
    let mut exports = Vec::new();
    while let Some(Ok((shard, answer))) = asked.join_next().await {
        let Ok(Ok(volumes)) = answer else {
            warn!(%shard, "does not answer: its exports are not listed");
            continue;
        };
        exports.extend(volumes.iter().filter_map(|volume| {
            let name = ExportName::from_bytes(volume.name.as_bytes()).ok()?;
            Some((name, volume.description.to_string()))
        }));
    }
    exports.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
    exports
}

fn export_info(volume: &VolumeInfo) -> Result<ExportInfo, ExportRefusal> {
    let name =
        ExportName::from_bytes(volume.name.as_bytes()).map_err(|_| ExportRefusal::Unknown)?;
    let description = volume.description.to_string();
    Ok(ExportInfo { name, description, size: volume.size, read_only: false })
}

/// What an attach would find, without creating anything.
async fn describe(front: &Front, name: &ExportName) -> Result<ExportInfo, ExportRefusal> {
    let name = volume_name(name);
    let shard = shard_client(front, name).ok_or(ExportRefusal::Unknown)?;
    let found = shard.describe(name).await.map_err(|GroupStopped| ExportRefusal::Shutdown)?;
    if let Some(volume) = found {
        return export_info(&volume);
    }
    if !may_create(front, name) {
        return Err(ExportRefusal::Unknown);
    }
    let name = ExportName::from_bytes(name.as_bytes()).map_err(|_| ExportRefusal::Unknown)?;
    let size = front.volumes.default_size;
    Ok(ExportInfo { name, description: String::new(), size, read_only: false })
}

/// Finds or creates the volume and opens a session on it. `opened` is set before the log is asked:
/// should this wait be cut short, the session is closed whether or not it came to be.
async fn attach(
    front: &Front,
    name: &ExportName,
    opened: &mut Option<SessionClient>,
) -> Result<ExportInfo, ExportRefusal> {
    let name = volume_name(name);
    let shard = shard_client(front, name).ok_or(ExportRefusal::Unknown)?;
    let volume = match shard.describe(name).await.map_err(|GroupStopped| ExportRefusal::Shutdown)? {
        Some(volume) => volume,
        None if may_create(front, name) => create(front, shard, name).await?,
        None => return Err(ExportRefusal::Unknown),
    };
    let info = export_info(&volume)?;
    // One that another attempt of this connection has left open.
    if let Some(before) = opened.take() {
        before.close().await;
    }
    let client = opened.insert(SessionClient::new(shard.clone(), volume.id));
    match client.open().await {
        Ok(()) => Ok(info),
        Err(SessionEnd::Stopped(GroupStopped)) => Err(ExportRefusal::Shutdown),
        Err(SessionEnd::Ended(rejection)) => {
            *opened = None;
            warn!(%rejection, "cannot open a session");
            Err(ExportRefusal::Policy)
        }
    }
}

fn may_create(front: &Front, name: &str) -> bool {
    front.volumes.auto_create
        && name.len() <= CREATED_NAME_BYTES_MAX
        && !name.chars().any(char::is_control)
}

async fn create(
    front: &Front,
    shard: &ShardClient,
    name: &str,
) -> Result<VolumeInfo, ExportRefusal> {
    let command = command::encode_create_volume(name, front.volumes.default_size, "")
        .map_err(|_| ExportRefusal::Unknown)?;
    match shard.run(&command).await.map_err(|GroupStopped| ExportRefusal::Shutdown)? {
        Outcome::VolumeCreated(volume) => {
            info!(volume = %volume.name, size = volume.size, "created a volume");
            Ok(volume)
        }
        Outcome::VolumeExists(volume) => Ok(volume),
        other => {
            warn!(outcome = ?other, "cannot create a volume");
            Err(ExportRefusal::Policy)
        }
    }
}
