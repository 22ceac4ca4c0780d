//! Mode `splice`: behind the handshake, a client's bytes go to a replica and back as they are.
//!
//! ```text
//!           handshake as the server          handshake as a client, for the same
//!  client ◀──────────────────────▶ attach ◀──────────────────────▶ NBD server of a replica
//!
//!  client ══ socket ▶ pipe ▶ socket ══▶ replica     the kernel moves pages from one to the
//!         ◀══ socket ◀ pipe ◀ socket ══             other; no byte passes through this process
//! ```
//!
//! The client is answered only once a replica has agreed to exactly what the client will be told.
//! From then on its session is that replica's, which carries its requests to whoever leads. When
//! the replica is lost the client is disconnected, and attaches anew by itself: nothing is kept
//! here that could be sent again.
//!
//! [`backend`]: a replica is found, and agrees. What moves the bytes is `nbd-splice`.

mod backend;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use nbd_proto::{ExportInfo, ExportName, ExportRefusal, ReplyStyle};
use nbd_splice::{Moved, Pipes, carry};
use nbd_store::VolumeId;
use nbd_topology::ShardId;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::backend::Wanted;
use super::Front;
use super::attach::{self, Origin};
use crate::metrics::ShardMetrics;
use crate::route::NbdAt;
use crate::sessions::{About, BackendAt, Carried, Meter};

/// What spliced connections share.
#[derive(Debug)]
pub(crate) struct Splicing {
    /// Where each shard's volumes are served, best first.
    servers: HashMap<ShardId, watch::Receiver<Vec<NbdAt>>>,
    pipes: Pipes,
}

/// A replica that has agreed to serve a client.
#[derive(Debug)]
pub(super) struct Backend {
    stream: TcpStream,
    at: NbdAt,
    shard: ShardId,
    volume: VolumeId,
    metrics: Arc<ShardMetrics>,
}

impl Splicing {
    pub(crate) fn new(servers: HashMap<ShardId, watch::Receiver<Vec<NbdAt>>>) -> Self {
        Self { servers, pipes: Pipes::default() }
    }
}

/// Finds or creates the volume, and a replica that serves it as `agreement` says: the style of
/// replies, and the id of `base:allocation` if that is selected.
pub(super) async fn attach(
    front: &Front,
    splicing: &Splicing,
    name: &ExportName,
    agreement: (ReplyStyle, Option<u32>),
) -> Result<(ExportInfo, Backend), ExportRefusal> {
    let (client, volume) = attach::find_or_create(front, name).await?;
    let info = attach::export_info(&volume)?;
    let shard = client.id();
    let servers = splicing.servers.get(&shard).ok_or(ExportRefusal::Unknown)?;
    let (replies, allocation_context) = agreement;
    let wanted = Wanted { export: &info, replies, allocation_context };
    let Some((stream, at)) = backend::find(servers.clone(), &wanted).await else {
        let text = "no replica of the volume's shard can be attached to";
        return Err(ExportRefusal::Platform(text));
    };
    let metrics = Arc::clone(client.metrics());
    Ok((info, Backend { stream, at, shard, volume: volume.id, metrics }))
}

impl Backend {
    /// Puts the session on the list.
    pub(super) fn meter(&self, origin: Origin, export: &str, front: &Front) -> Meter {
        let about = About {
            connection: origin.number,
            client: origin.peer,
            export: export.to_owned(),
            shard: self.shard,
            volume: self.volume,
            session: None,
            carried: Carried::Splice,
        };
        let at = BackendAt { node: self.at.node.clone(), address: self.at.nbd.clone() };
        front.sessions.add(about, Some(at), Arc::clone(&self.metrics))
    }

    /// Carries the connection to its end. `input` is what the client has sent behind its handshake
    /// already; `stop` ends the connection in good order: what was received is answered.
    pub(super) async fn serve(
        self,
        client: TcpStream,
        input: BytesMut,
        splicing: &Splicing,
        meter: &Meter,
        stop: &CancellationToken,
    ) {
        let (node, at) = (&self.at.node, &self.at.nbd);
        info!(%node, at, volume = self.volume.0, "attached");
        match self.carry(&client, input, splicing, meter, stop).await {
            Ok(()) => info!("detached"),
            Err(error) => info!(reason = %error, "connection ended"),
        }
    }

    async fn carry(
        &self,
        client: &TcpStream,
        input: BytesMut,
        splicing: &Splicing,
        meter: &Meter,
        stop: &CancellationToken,
    ) -> io::Result<()> {
        let moved = Moved { up: |bytes| meter.received(bytes), down: |bytes| meter.sent(bytes) };
        carry(client, &self.stream, input, &splicing.pipes, stop, moved).await
    }
}
