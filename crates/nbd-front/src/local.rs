//! What the front end asks of a replica in its own process.
//!
//! The leader's hot path goes through here: a mutation is one call that ends when the shard's group
//! has it in its mailbox, and what is in memory or in the page cache is read on the caller's task.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use nbd_relay::Caller;
use nbd_service::trace::{Context, Span};
use nbd_session::{Query, QueryId};
use nbd_store::{Epoch, Outcome, SessionId, SpaceGrant, VolumeId, VolumeInfo};
use tokio::sync::mpsc;

use crate::budget::BytePermit;
use crate::route::{GroupStopped, RunError};
use crate::shard_client::{Answered, ReadBuffer};

/// A future of a trait object.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A mutation's share of the byte budget: goes with it until it is applied.
pub type Share = Option<Arc<BytePermit>>;

/// A mutation that there is room for on the leader's disk, to be proposed.
#[derive(Debug)]
pub struct Granted {
    /// Its number in its session.
    pub seq: u64,
    /// The mutation as it will be logged.
    pub command: Bytes,
    /// Its share of the byte budget.
    pub share: Share,
    /// The room, kept for it until this is dropped.
    pub grant: SpaceGrant,
    /// When it came, by the replica's own clock, which this crate does not read.
    pub arrived_ns: u64,
    /// The leader's part of its trace, if it is traced.
    pub trace: Option<Span>,
}

/// A session that the log has opened or resumed, as it is attached.
#[derive(Debug, Clone)]
pub struct Attaching {
    /// The session.
    pub session: SessionId,
    /// The epoch that it was opened with.
    pub epoch: Epoch,
    /// The volume it is for.
    pub volume: VolumeId,
    /// Whom it is for, as operators are told.
    pub caller: Caller,
}

/// A shard's replica in this process. A load balancer has none.
///
/// It is asked only while the [`Route`](crate::Route) says that it leads and serves, and says so
/// itself should that have changed.
pub trait LocalReplica: fmt::Debug + Send + Sync {
    /// Proposes a command and waits for its outcome.
    fn run(&self, command: Bytes) -> Boxed<'_, Result<Outcome, RunError>>;

    /// The volume of this name, as of now.
    fn describe<'a>(&'a self, name: &'a str) -> Boxed<'a, Result<Option<VolumeInfo>, RunError>>;

    /// All volumes of the shard as of now, oldest first.
    fn volumes(&self) -> Boxed<'_, Result<Vec<VolumeInfo>, RunError>>;

    /// Attaches a session, which the log has opened. What comes of its requests goes to `answers`,
    /// which has room for all that the session may have under way, and for
    /// [`Answered::Ended`]: sending never waits.
    fn attach(
        &self,
        session: Attaching,
        answers: mpsc::Sender<Answered>,
    ) -> Box<dyn LocalAttachment>;
}

/// A session attached to the replica in this process, until it is dropped. What was proposed by
/// then is carried out.
pub trait LocalAttachment: fmt::Debug + Send + Sync {
    /// Proposes a mutation of the session once the disk has room for it: at once if that is plain,
    /// else [`Answered::Granted`] comes first. Waits in turn while the group's mailbox is full. If
    /// it is traced, `trace` is the span above.
    fn mutate(
        &self,
        command: Bytes,
        share: Share,
        trace: Option<Context>,
    ) -> Boxed<'_, Result<(), GroupStopped>>;

    /// Proposes a mutation that room was found for.
    fn propose(&self, granted: Granted) -> Boxed<'_, Result<(), GroupStopped>>;

    /// Answers a query, elsewhere than on the caller's task. If it is traced, `trace` is the span
    /// above.
    fn query(&self, id: QueryId, query: Query, trace: Option<Context>);

    /// Reads a range into `data` at once: if this replica may answer alone, and can without waiting
    /// for the disk. Otherwise `false`, with anything in `data`: ask by [`Self::query`].
    fn try_read(&self, offset: u64, len: u64, holes: bool, data: &mut ReadBuffer) -> bool;

    /// The session has got a mutation's verdict that was given at this time
    /// ([`Answered::Mutation`]).
    fn got(&self, given: Instant);

    /// Proposes the command that closes the session, behind all that it has proposed, so that the
    /// log ends it only after its last mutation. Nobody is told what comes of it.
    fn close(self: Box<Self>, command: Bytes) -> Boxed<'static, Result<(), GroupStopped>>;
}
