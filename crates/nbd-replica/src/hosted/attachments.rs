//! The sessions that are attached to this node's replica of a shard, as to the leader: whom they
//! are for, what they move, and the end of those that the log has ended.
//!
//! Each attachment counts in atomics of its own, which its session's task and the group task write.
//! The registry's lock is taken when an attachment comes or goes and when somebody asks for all of
//! them, never for a request. What an attachment has counted stays with its volume when it goes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nbd_consensus::Timestamp;
use nbd_front::{Answered, Attaching};
use nbd_relay::Caller;
use nbd_store::{Epoch, SessionId, VolumeId};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tracing::info;

use super::HostedShard;

/// Volumes whose counts are kept after their last attachment has gone. Of more, those that moved
/// the fewest bytes are forgotten. Each takes about 100 bytes.
const VOLUMES_KEPT_MAX: usize = 16_384;

/// Pause between two looks for attachments whose sessions the log has ended: many sessions that end
/// together are found in one look.
const ENDS_PAUSE: Duration = Duration::from_millis(20);

/// What was read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Moved {
    /// Reads that were answered.
    pub(crate) reads: u64,
    pub(crate) read_bytes: u64,
    /// Writes, trims and write-zeroes that took effect; the bytes are those of writes.
    pub(crate) writes: u64,
    pub(crate) write_bytes: u64,
    /// Nanoseconds from arrival to answer, all together.
    pub(crate) read_ns: u64,
    pub(crate) write_ns: u64,
}

impl Moved {
    /// Bytes in both directions.
    pub(crate) const fn bytes(&self) -> u64 {
        self.read_bytes.saturating_add(self.write_bytes)
    }

    pub(crate) const fn add(&mut self, other: &Self) {
        self.reads += other.reads;
        self.read_bytes += other.read_bytes;
        self.writes += other.writes;
        self.write_bytes += other.write_bytes;
        self.read_ns += other.read_ns;
        self.write_ns += other.write_ns;
    }
}

/// [`Moved`], while it moves.
#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    read_ns: AtomicU64,
    write_ns: AtomicU64,
}

impl Counts {
    fn read(&self, bytes: u64, elapsed_ns: u64) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.read_ns.fetch_add(elapsed_ns, Ordering::Relaxed);
    }

    fn written(&self, bytes: u64, elapsed_ns: u64) {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.write_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.write_ns.fetch_add(elapsed_ns, Ordering::Relaxed);
    }

    fn now(&self) -> Moved {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Moved {
            reads: of(&self.reads),
            read_bytes: of(&self.read_bytes),
            writes: of(&self.writes),
            write_bytes: of(&self.write_bytes),
            read_ns: of(&self.read_ns),
            write_ns: of(&self.write_ns),
        }
    }
}

/// One attachment of a session.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) session: SessionId,
    pub(crate) epoch: Epoch,
    pub(crate) volume: VolumeId,
    /// Whom it is for.
    pub(crate) caller: Caller,
    /// Milliseconds since 1970.
    pub(crate) attached_ms: u64,
    counts: Counts,
    /// Requests under way.
    pending: AtomicU32,
    /// Its owner was told that the session was ended.
    is_ended: AtomicBool,
    /// Requests that its owner was asked to trace, and has not heard of yet.
    wanted: Arc<AtomicU32>,
    answers: mpsc::Sender<Answered>,
}

impl Attachment {
    /// What has moved so far.
    pub(crate) fn moved(&self) -> Moved {
        self.counts.now()
    }

    /// Requests under way.
    pub(crate) fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Counts a read that was answered at once.
    pub(super) fn read(&self, bytes: u64, arrived: Timestamp, now: Timestamp) {
        self.counts.read(bytes, now.0.saturating_sub(arrived.0));
    }

    /// Asks its owner to trace the next requests.
    fn sample(&self, requests: u32) {
        if self.wanted.fetch_max(requests, Ordering::Relaxed) == 0 {
            // The channel has a place for this: it is asked again only once this was taken.
            let _ = self.answers.try_send(Answered::Sample(Arc::clone(&self.wanted)));
        }
    }

    /// Tells its owner, once, that the session was ended.
    /// `false` if it knows.
    fn end(&self) -> bool {
        let is_news = !self.is_ended.swap(true, Ordering::Relaxed);
        if is_news {
            // The channel has a place for this.
            let _ = self.answers.try_send(Answered::Ended);
        }
        is_news
    }
}

/// A request under way: pending until it is dropped.
#[derive(Debug)]
pub(crate) struct Underway {
    attachment: Arc<Attachment>,
    arrived: Timestamp,
}

impl Underway {
    pub(super) fn begin(attachment: &Arc<Attachment>, arrived: Timestamp) -> Self {
        attachment.pending.fetch_add(1, Ordering::Relaxed);
        Self { attachment: Arc::clone(attachment), arrived }
    }

    /// When it came.
    pub(crate) const fn arrived(&self) -> Timestamp {
        self.arrived
    }

    /// It was a read, and is answered.
    pub(crate) fn read(&self, bytes: u64, now: Timestamp) {
        self.attachment.read(bytes, self.arrived, now);
    }

    /// It was a mutation that carried so many bytes, and has taken effect.
    pub(crate) fn written(&self, bytes: u64, now: Timestamp) {
        self.attachment.counts.written(bytes, now.0.saturating_sub(self.arrived.0));
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.attachment.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The attachments of a shard. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attachments {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Those of each session: an old one may not have noticed yet that there is a new one.
    live: HashMap<SessionId, Vec<Arc<Attachment>>>,
    /// Those that have gone, but for requests that are still under way.
    leaving: Vec<Arc<Attachment>>,
    /// What those that have gone have counted.
    gone: HashMap<VolumeId, Moved>,
    gone_total: Moved,
}

/// What the volumes of a shard have moved since the process started.
#[derive(Debug, Default)]
pub(crate) struct VolumesMoved {
    pub(crate) total: Moved,
    /// By volume, with how many sessions are attached.
    pub(crate) volumes: HashMap<VolumeId, (Moved, u32)>,
}

impl Known {
    /// Takes over what those have counted of which nothing is under way any more.
    fn settle(&mut self) {
        let Self { leaving, gone, gone_total, .. } = self;
        leaving.retain(|attachment| {
            // Nobody else can begin to hold it again.
            if Arc::strong_count(attachment) > 1 {
                return true;
            }
            let moved = attachment.moved();
            gone_total.add(&moved);
            gone.entry(attachment.volume).or_default().add(&moved);
            false
        });
        while gone.len() > VOLUMES_KEPT_MAX {
            let least = gone.iter().min_by_key(|(id, moved)| (moved.bytes(), **id));
            let Some(least) = least.map(|(id, _)| *id) else { return };
            gone.remove(&least);
        }
    }
}

impl Attachments {
    /// Takes an attachment in, for as long as what is returned lives. What it has to be told goes
    /// to `answers`.
    pub(super) fn enter(&self, of: Attaching, answers: mpsc::Sender<Answered>) -> Presence {
        let Attaching { session, epoch, volume, caller } = of;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let attached_ms = since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        let attachment = Arc::new(Attachment {
            session,
            epoch,
            volume,
            caller,
            attached_ms,
            counts: Counts::default(),
            pending: AtomicU32::new(0),
            is_ended: AtomicBool::new(false),
            wanted: Arc::default(),
            answers,
        });
        self.known.lock().live.entry(session).or_default().push(Arc::clone(&attachment));
        Presence { attachments: self.clone(), attachment }
    }

    /// Whether anything is attached for the session.
    pub(crate) fn contains(&self, session: SessionId) -> bool {
        self.known.lock().live.contains_key(&session)
    }

    /// The newest attachment of a session.
    pub(crate) fn of(&self, session: SessionId) -> Option<Arc<Attachment>> {
        let known = self.known.lock();
        known.live.get(&session)?.iter().max_by_key(|attachment| attachment.epoch).cloned()
    }

    /// Asks the owners of a volume's sessions to trace their next requests. How many there are.
    pub(crate) fn sample(&self, volume: VolumeId, requests: u32) -> usize {
        let known = self.known.lock();
        let of_volume = known.live.values().filter_map(|of_session| {
            let newest = of_session.iter().max_by_key(|attachment| attachment.epoch)?;
            (newest.volume == volume).then_some(newest)
        });
        of_volume.inspect(|attachment| attachment.sample(requests)).count()
    }

    /// All there are.
    fn all(&self) -> Vec<Arc<Attachment>> {
        self.known.lock().live.values().flatten().cloned().collect()
    }

    /// What moved so far, of volumes that are `known` still.
    pub(crate) fn moved(&self, known: impl Fn(VolumeId) -> bool) -> VolumesMoved {
        let mut found = VolumesMoved::default();
        let mut now = self.known.lock();
        now.settle();
        // Ids are never used again.
        now.gone.retain(|volume, _| known(*volume));
        found.total = now.gone_total;
        found.volumes.extend(now.gone.iter().map(|(volume, moved)| (*volume, (*moved, 0))));
        let live = now.live.values().flatten().map(|attachment| (attachment, 1));
        for (attachment, attached) in live.chain(now.leaving.iter().map(|left| (left, 0))) {
            let moved = attachment.moved();
            found.total.add(&moved);
            let volume = found.volumes.entry(attachment.volume).or_default();
            volume.0.add(&moved);
            volume.1 += attached;
        }
        found
    }
}

/// An attachment's place among the others. Dropping it ends the attachment.
#[derive(Debug)]
pub(crate) struct Presence {
    attachments: Attachments,
    pub(super) attachment: Arc<Attachment>,
}

impl Presence {
    /// Tells the session's owner that it was ended, if it was by now. To be asked behind
    /// [`Attachments::enter`]: what ends behind that is found by [`end_attachments`].
    pub(super) fn look(&self, is_open: bool) {
        if !is_open {
            self.attachment.end();
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut known = self.attachments.known.lock();
        let session = self.attachment.session;
        if let Some(live) = known.live.get_mut(&session) {
            live.retain(|other| !Arc::ptr_eq(other, &self.attachment));
            if live.is_empty() {
                known.live.remove(&session);
            }
        }
        known.leaving.push(Arc::clone(&self.attachment));
        known.settle();
    }
}

/// Ends the attachments of sessions that the log has ended, as soon as that is applied here. Runs
/// until the node stops.
pub(crate) async fn end_attachments(shard: HostedShard) {
    let stopping = shard.hosting.shutdown.token();
    let ended = shard.group.sessions_ended();
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = ended.notified() => {}
        }
        let all = shard.attached.all();
        let over = shard.group.reader().not_open(all.iter().map(|attachment| attachment.session));
        for attachment in all.iter().filter(|attachment| over.contains(&attachment.session)) {
            if attachment.end() {
                let (session, client) = (attachment.session, &attachment.caller.client);
                info!(shard = %shard.group.shard(), %session, client, "an attachment is ended");
            }
        }
        tokio::time::sleep(ENDS_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attaching(session: u128, epoch: u32, volume: u64) -> Attaching {
        let caller = Caller::default();
        let (session, epoch, volume) = (SessionId(session), Epoch(epoch), VolumeId(volume));
        Attaching { session, epoch, volume, caller }
    }

    fn enter(attachments: &Attachments, session: u128, volume: u64) -> Presence {
        attachments.enter(attaching(session, 1, volume), mpsc::channel(1).0)
    }

    #[test]
    fn a_session_is_attached_as_long_as_any_attachment_lives() {
        let attachments = Attachments::default();
        let old = enter(&attachments, 1, 1);
        let new = attachments.enter(attaching(1, 2, 1), mpsc::channel(1).0);
        assert_eq!(attachments.of(SessionId(1)).unwrap().epoch, Epoch(2));
        drop(old);
        assert!(attachments.contains(SessionId(1)));
        drop(new);
        assert!(!attachments.contains(SessionId(1)));
    }

    #[test]
    fn counts_outlive_their_attachments_and_never_go_back() {
        let attachments = Attachments::default();
        let present = enter(&attachments, 1, 7);
        present.attachment.read(4096, Timestamp(1000), Timestamp(4000));
        let late = Underway::begin(&present.attachment, Timestamp(10));
        assert_eq!(present.attachment.pending(), 1);
        let read = Moved { reads: 1, read_bytes: 4096, read_ns: 3000, ..Moved::default() };
        let now = |attached| {
            let moved = attachments.moved(|_| true);
            let volume = moved.volumes[&VolumeId(7)];
            assert_eq!((moved.total, attached), volume);
            moved.total
        };
        assert_eq!(now(1), read);
        drop(present);
        assert_eq!(now(0), read, "a request is under way");
        late.written(512, Timestamp(60));
        let both = Moved { writes: 1, write_bytes: 512, write_ns: 50, ..read };
        assert_eq!(now(0), both);
        let again = enter(&attachments, 2, 7);
        assert_eq!(now(1), both);
        again.attachment.read(1, Timestamp(0), Timestamp(0));
        assert_eq!(now(1).reads, 2);
    }

    #[test]
    fn volumes_that_are_gone_are_forgotten_but_stay_in_the_total() {
        let attachments = Attachments::default();
        let volumes = VOLUMES_KEPT_MAX as u64 + 2;
        for volume in 1..=volumes {
            let present = enter(&attachments, u128::from(volume), volume);
            present.attachment.read(volume, Timestamp(0), Timestamp(1));
        }
        let moved = attachments.moved(|volume| volume != VolumeId(volumes));
        assert_eq!(moved.total.reads, volumes);
        assert_eq!(moved.volumes.len(), VOLUMES_KEPT_MAX - 1);
        assert!(!moved.volumes.contains_key(&VolumeId(1)), "it moved the fewest bytes");
        assert!(!moved.volumes.contains_key(&VolumeId(volumes)), "it was deleted");
    }

    #[tokio::test]
    async fn an_end_is_told_once() {
        let attachments = Attachments::default();
        let (answers, mut told) = mpsc::channel(2);
        let present = attachments.enter(attaching(1, 1, 1), answers);
        present.look(true);
        assert!(told.try_recv().is_err());
        present.look(false);
        present.look(false);
        assert!(matches!(told.try_recv(), Ok(Answered::Ended)));
        assert!(told.try_recv().is_err());
    }
}
