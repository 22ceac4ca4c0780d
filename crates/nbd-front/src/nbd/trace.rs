//! What is told of a request that is traced: its root, and what the front end does for it.
//!
//! ```text
//!  NBD write                      this process, or, through a load balancer, that one
//!  ├─ decode                      header to last payload byte
//!  └─ lead write                  the leader's part: see `group_trace` in nbd-replica
//! ```

use std::time::Instant;

use nbd_proto::{Command, CommandKind};
use nbd_service::trace::{Context, Kind, Span, Tracer, time_of};
use nbd_store::VolumeId;
use nbd_topology::ShardId;

/// A number as an attribute.
fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The root of a request that was decoded just now.
#[cold]
pub(super) fn root(
    tracer: &Tracer,
    command: &Command,
    shard: ShardId,
    volume: VolumeId,
) -> Option<Span> {
    let name = match command.kind() {
        CommandKind::Read => "NBD read",
        CommandKind::Write => "NBD write",
        CommandKind::Trim => "NBD trim",
        CommandKind::WriteZeroes => "NBD write-zeroes",
        CommandKind::BlockStatus => "NBD block-status",
        CommandKind::Flush => "NBD flush",
        _ => "NBD request",
    };
    let mut span = tracer.root(name, Kind::Server)?;
    span.set("cinderblock.shard", i64::from(shard.0));
    span.set("cinderblock.volume.id", number(volume.0));
    if let Command::Write { offset, len }
    | Command::Read { offset, len, .. }
    | Command::Trim { offset, len }
    | Command::WriteZeroes { offset, len, .. }
    | Command::BlockStatus { offset, len, .. } = *command
    {
        span.set("nbd.offset", number(offset));
        span.set("nbd.length", number(len));
    }
    Some(span)
}

/// All of a request is here, and it goes to the leader. What the leader's spans are to be below.
pub(super) fn decoded(root: Option<&Span>) -> Option<Context> {
    let root = root?;
    drop(root.child("decode").since(root.start()));
    Some(root.context())
}

/// A read was answered from memory at once, between `since` and now.
pub(super) fn read_inline(root: Option<Span>, since: Instant) {
    if let Some(root) = root {
        drop(root.child("cache").since(time_of(since)));
    }
}
