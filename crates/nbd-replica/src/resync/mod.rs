//! Catching up with a peer whose log no longer reaches back far enough.
//!
//! The group says when ([`ResyncHandle::offered`]); the driver then fetches the chunks that
//! changed, a page of the manifest at a time, has the checkpoint thread store them, compares the
//! result with the source's digests, and tells the group. Writes of clients go on meanwhile, at the
//! source.
//!
//! ```text
//!  group task ──offered, install, dropped──▶ driver ◀──chunks── ChunkService of the source
//!      ▲                                       │ write_chunks, remove_absent, install
//!      └──────resync_ready, installed──────────┴──────────────▶ checkpoint thread
//! ```
//!
//! The steps themselves, without I/O, are those of [`nbd_shard::resync`].
//!
//! - [`source`]: the peer. [`compare`]: what digests say of two replicas that run.
//! - `driver`: carries the steps out. [`progress`]: how far they are. [`throttle`]: their pace.

pub(crate) mod compare;
mod driver;
pub(crate) mod progress;
pub(crate) mod source;
pub(crate) mod throttle;

use std::sync::Arc;

use nbd_consensus::SnapshotOffer;
use nbd_front::GroupStopped;
use nbd_shard::InstallPlan;
use nbd_store::{ReplicaInfo, ShardReader, ShardSnapshot};
use parking_lot::Mutex;
use tokio::sync::Notify;

pub(crate) use self::driver::{ResyncDriver, ResyncParts};
pub(crate) use self::progress::ResyncProgress;
pub(crate) use self::source::ChunkPeers;
pub(crate) use self::throttle::Throttle;
use crate::group_task::GroupHandle;

/// The group that a driver works for.
pub(crate) trait ResyncGroup: Send + Sync + 'static {
    /// Reads the group's shard.
    fn reader(&self) -> &ShardReader;

    /// Says that everything this snapshot needs is in the store. The group then has it installed,
    /// or drops it.
    fn resync_ready(
        &self,
        snapshot: ShardSnapshot,
    ) -> impl Future<Output = Result<(), GroupStopped>> + Send;

    /// Says that the store was switched to the snapshot.
    fn installed(&self) -> impl Future<Output = Result<(), GroupStopped>> + Send;
}

impl ResyncGroup for GroupHandle {
    fn reader(&self) -> &ShardReader {
        self.reader()
    }

    async fn resync_ready(&self, snapshot: ShardSnapshot) -> Result<(), GroupStopped> {
        self.resync_ready(snapshot).await
    }

    async fn installed(&self) -> Result<(), GroupStopped> {
        self.installed().await
    }
}

/// A source and what it offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) snapshot: SnapshotOffer,
    pub(crate) source: ReplicaInfo,
}

/// What the group has said and the driver has not taken up.
#[derive(Debug, Default)]
struct Slot {
    /// The newest offer: an older one is of no use any more.
    offer: Option<Offer>,
    install: Option<InstallPlan>,
    dropped: bool,
}

#[derive(Debug, Default)]
struct Shared {
    slot: Mutex<Slot>,
    filled: Notify,
}

/// The group's end: none of the calls waits.
#[derive(Debug, Clone)]
pub(crate) struct ResyncHandle {
    shared: Arc<Shared>,
}

/// The driver's end.
#[derive(Debug)]
pub(crate) struct ResyncInbox {
    shared: Arc<Shared>,
}

/// Something the group said.
#[derive(Debug)]
pub(crate) enum Said {
    Offered(Offer),
    Install(InstallPlan),
    Dropped,
}

/// Makes the two ends.
pub(crate) fn inbox() -> (ResyncHandle, ResyncInbox) {
    let shared = Arc::new(Shared::default());
    (ResyncHandle { shared: Arc::clone(&shared) }, ResyncInbox { shared })
}

impl ResyncHandle {
    /// The leader's log does not reach this replica. Repeated for as long as that is so.
    pub(crate) fn offered(&self, snapshot: SnapshotOffer, source: ReplicaInfo) {
        self.say(|slot| slot.offer = Some(Offer { snapshot, source }));
    }

    /// The store is to be switched to the snapshot that was reported to be ready.
    pub(crate) fn install(&self, plan: InstallPlan) {
        self.say(|slot| slot.install = Some(plan));
    }

    /// The snapshot that was reported to be ready is not needed.
    pub(crate) fn dropped(&self) {
        self.say(|slot| slot.dropped = true);
    }

    fn say(&self, what: impl FnOnce(&mut Slot)) {
        what(&mut self.shared.slot.lock());
        self.shared.filled.notify_one();
    }
}

impl ResyncInbox {
    /// What the group says next. Nothing is lost if the wait is given up.
    async fn next(&self) -> Said {
        loop {
            if let Some(said) = self.take() {
                return said;
            }
            self.shared.filled.notified().await;
        }
    }

    fn take(&self) -> Option<Said> {
        let mut slot = self.shared.slot.lock();
        if let Some(plan) = slot.install.take() {
            return Some(Said::Install(plan));
        }
        if std::mem::take(&mut slot.dropped) {
            return Some(Said::Dropped);
        }
        slot.offer.take().map(Said::Offered)
    }
}

#[cfg(test)]
mod tests;
