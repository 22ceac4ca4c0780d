//! Entries read back from the node's log: for followers that lag further than memory reaches, and
//! to be written once more.

use bytes::BytesMut;
use nbd_consensus::Entry;
use nbd_front::GroupStopped;
use nbd_log::checksum::crc32c;
use nbd_log::log::LogReader;
use nbd_shard::{FetchPlan, raft_kind};
use nbd_store::EntryPlace;
use tracing::{debug, error};

use crate::group_task::GroupHandle;

/// Reads plans on the blocking pool and hands the entries to the group that asked.
#[derive(Debug, Clone)]
pub(crate) struct LogFetcher {
    log: LogReader,
}

impl LogFetcher {
    pub(crate) const fn new(log: LogReader) -> Self {
        Self { log }
    }

    /// Begins to read. The group is told in any case: no entries mean that they could not be read,
    /// and it asks again when the follower does.
    pub(crate) fn fetch(&self, plan: FetchPlan, group: GroupHandle) {
        let FetchPlan { first, places } = plan;
        self.begin(places, async move |entries| group.fetched(first, entries).await);
    }

    /// As [`Self::fetch`], for entries to be written once more.
    pub(crate) fn read_back(&self, places: Vec<EntryPlace>, group: GroupHandle) {
        self.begin(places, async move |entries| group.read_back(entries).await);
    }

    fn begin<F>(&self, places: Vec<EntryPlace>, tell: F)
    where
        F: AsyncFnOnce(Vec<Entry>) -> Result<(), GroupStopped> + Send + 'static,
    {
        let log = self.log.clone();
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || {
            let entries = read(&log, &places);
            // A group that has stopped needs no entries.
            let _ = runtime.block_on(tell(entries));
        });
    }
}

/// The entries at these places, or none.
fn read(log: &LogReader, places: &[EntryPlace]) -> Vec<Entry> {
    // Neither freed nor overwritten while it is read.
    let _pin = log.pin();
    let mut entries = Vec::with_capacity(places.len());
    for place in places {
        let mut data = BytesMut::zeroed(place.len);
        if let Err(error) = log.read(place.position, &mut data) {
            debug!(index = %place.index, %error, "an entry is not in the log any more");
            return Vec::new();
        }
        if crc32c(&data) != place.crc {
            let (index, position) = (place.index, place.position);
            error!(%index, %position, "an entry in the log is damaged");
            return Vec::new();
        }
        entries.push(Entry {
            index: place.index,
            term: place.term,
            kind: raft_kind(place.kind),
            data: data.freeze(),
        });
    }
    entries
}
