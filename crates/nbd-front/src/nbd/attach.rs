//! From connection to attached session: carries the handshake, finds or creates the volume, and
//! opens the session in the shard's log.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use nbd_proto::{
    ExportInfo, ExportName, ExportRefusal, HandshakeEvent, Negotiated, Purpose, ServerHandshake,
};
use nbd_store::{Labels, NewVolume, Outcome, VolumeInfo, command};
use nbd_topology::{DEFAULT_VOLUME_NAME, shard_of};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tracing::{Instrument, debug, info, info_span, warn};

use super::Front;
use super::session::{self, Attached};
use super::splice::{self, Backend};
use crate::limits::{HANDSHAKE_DEADLINE, INPUT_READ_BYTES, LIST_MAX};
use crate::route::GroupStopped;
use crate::sessions::{About, BackendAt, Carried, Meter};
use crate::shard_client::{ClientAt, SessionClient, SessionEnd, ShardClient};

/// Longest name that an attach may create a volume under. The protocol advises clients to stay
/// within it; existing volumes are served under any name they have.
const CREATED_NAME_BYTES_MAX: usize = 256;

/// Where a connection comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    /// Its number in this process.
    pub(super) number: u64,
    /// The client's address.
    pub(super) peer: SocketAddr,
}

/// Serves one connection from its first byte to its last.
pub(super) async fn serve(mut stream: TcpStream, origin: Origin, front: &Arc<Front>) {
    let mut input = BytesMut::with_capacity(INPUT_READ_BYTES);
    let client = ClientAt::now(&origin.peer);
    let mut opened = Opened { origin, client, session: None, backend: None };
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
    if let (Some(backend), Some(splicing)) = (opened.backend, &front.splicing) {
        if let Some((negotiated, meter)) = negotiated {
            let (export, stop) = (negotiated.export.name.to_string(), front.shutdown.token());
            let span = info_span!("session", %export);
            backend.serve(stream, input, splicing, &meter, &stop).instrument(span).await;
        }
        return;
    }
    let Some(mut client) = opened.session else { return };
    if let Some((negotiated, meter)) = negotiated {
        let export = negotiated.export.name.to_string();
        let front = Arc::clone(front);
        let attached = Attached { stream, input, negotiated, client, meter, front };
        let span = info_span!("session", %export);
        match session::run(attached).instrument(span).await {
            Some(ended) => client = ended,
            None => return,
        }
    }
    client.close().await;
}

/// What a handshake has opened so far.
#[derive(Debug)]
struct Opened {
    origin: Origin,
    client: ClientAt,
    /// A session of this process, as soon as there may be one: it has to be closed whatever happens
    /// later.
    session: Option<SessionClient>,
    /// Or an attachment to a replica's NBD server.
    backend: Option<Backend>,
}

impl Opened {
    /// Puts the session on the list. `None`: there is none.
    fn meter(&self, negotiated: &Negotiated, front: &Front) -> Option<Meter> {
        let export = negotiated.export.name.as_str();
        if let Some(backend) = &self.backend {
            return Some(backend.meter(self.origin, export, front));
        }
        self.session.as_ref().map(|client| session_meter(client, self.origin, export, front))
    }
}

/// Puts a session of this process on the list.
pub(super) fn session_meter(
    client: &SessionClient,
    origin: Origin,
    export: &str,
    front: &Front,
) -> Meter {
    let shard = client.shard();
    let about = About {
        connection: origin.number,
        client: origin.peer,
        export: export.to_owned(),
        shard: shard.id(),
        volume: client.volume(),
        session: Some(client.id()),
        carried: Carried::Replay,
    };
    let at = client.standing().leader().map(BackendAt::from);
    front.sessions.add(about, at, Arc::clone(shard.metrics()))
}

/// Serves a connection whose handshake was carried elsewhere.
pub(super) async fn resume(attached: Attached) {
    let span = info_span!("session", export = %attached.negotiated.export.name);
    if let Some(ended) = session::run(attached).instrument(span).await {
        ended.close().await;
    }
}

/// Why a handshake ended without a session.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("{0}")]
    Protocol(#[from] nbd_proto::HandshakeError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Carries the handshake to its end. `None` if the client ended it.
async fn negotiate(
    stream: &mut TcpStream,
    input: &mut BytesMut,
    front: &Front,
    opened: &mut Opened,
) -> Result<Option<(Negotiated, Meter)>, AttachError> {
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
                let answer = match (purpose, &front.splicing) {
                    (Purpose::Describe, _) => describe(front, &name).await,
                    (Purpose::Attach, None) => attach(front, &name, opened).await,
                    (Purpose::Attach, Some(splicing)) => {
                        let agreement = handshake.agreement();
                        let attached = splice::attach(front, splicing, &name, agreement).await;
                        attached.map(|(info, backend)| {
                            opened.backend = Some(backend);
                            info
                        })
                    }
                };
                if let Some(negotiated) = handshake.answer_export(answer) {
                    // Before the client knows: whoever is attached is on the list.
                    let meter = opened.meter(&negotiated, front);
                    send(stream, handshake.take_output()).await?;
                    return Ok(meter.map(|meter| (negotiated, meter)));
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

pub(super) fn export_info(volume: &VolumeInfo) -> Result<ExportInfo, ExportRefusal> {
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
    opened: &mut Opened,
) -> Result<ExportInfo, ExportRefusal> {
    let (shard, volume) = find_or_create(front, name).await?;
    let info = export_info(&volume)?;
    // One that another attempt of this connection has left open.
    if let Some(before) = opened.session.take() {
        before.close().await;
    }
    let client = SessionClient::new(shard.clone(), volume.id, opened.client.clone());
    let client = opened.session.insert(client);
    match client.open().await {
        Ok(()) => Ok(info),
        Err(SessionEnd::Stopped(GroupStopped)) => Err(ExportRefusal::Shutdown),
        Err(SessionEnd::Ended(rejection)) => {
            opened.session = None;
            warn!(%rejection, "cannot open a session");
            Err(ExportRefusal::Policy)
        }
    }
}

/// The volume of this name, created if nobody has, and the way to its shard.
pub(super) async fn find_or_create<'a>(
    front: &'a Front,
    name: &ExportName,
) -> Result<(&'a ShardClient, VolumeInfo), ExportRefusal> {
    let name = volume_name(name);
    let shard = shard_client(front, name).ok_or(ExportRefusal::Unknown)?;
    match shard.describe(name).await.map_err(|GroupStopped| ExportRefusal::Shutdown)? {
        Some(volume) => Ok((shard, volume)),
        None if may_create(front, name) => Ok((shard, create(front, shard, name).await?)),
        None => Err(ExportRefusal::Unknown),
    }
}

fn may_create(front: &Front, name: &str) -> bool {
    front.volumes.auto_create
        && name.len() <= CREATED_NAME_BYTES_MAX
        && !name.chars().any(char::is_control)
}

/// Milliseconds since 1970, 0 by a clock that is set to before.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

async fn create(
    front: &Front,
    shard: &ShardClient,
    name: &str,
) -> Result<VolumeInfo, ExportRefusal> {
    let size = front.volumes.default_size;
    let (labels, now_ms) = (Labels::new(), now_ms());
    let new = NewVolume { name, size, description: "", labels: &labels, key: None, now_ms };
    let command = command::encode_new_volume(&new).map_err(|_| ExportRefusal::Unknown)?;
    match shard.run(&command).await.map_err(|GroupStopped| ExportRefusal::Shutdown)? {
        Outcome::VolumeCreated(volume) => {
            info!(volume = %volume.name, size = volume.size, "created a volume");
            Ok(volume)
        }
        Outcome::VolumeExists(volume) | Outcome::VolumeRepeated(volume) => Ok(volume),
        other => {
            warn!(outcome = ?other, "cannot create a volume");
            Err(ExportRefusal::Policy)
        }
    }
}
