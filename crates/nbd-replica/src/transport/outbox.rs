//! What waits for one peer on one lane.

use std::collections::{HashSet, VecDeque};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use nbd_rpc::v1::TraceNote;
use nbd_topology::{ReplicaId, ShardId};
use parking_lot::Mutex;

use super::limits::{
    BATCH_BYTES_MAX, BATCH_MESSAGES_MAX, BULK_BYTES_MAX, BULK_MESSAGES_MAX, CONTROL_BYTES_MAX,
    CONTROL_MESSAGES_MAX, MESSAGE_MAX, MESSAGE_OVERHEAD_BYTES,
};
use super::metrics::LaneMetrics;
use super::{Lane, Member};

/// A message on its way to the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    pub(super) shard: ShardId,
    pub(super) from: ReplicaId,
    pub(super) to: ReplicaId,
    pub(super) bytes: Bytes,
    /// Of the entries in it or behind it, those that are traced.
    pub(super) traces: Vec<TraceNote>,
}

impl Waiting {
    const fn member(&self) -> Member {
        (self.shard, self.to)
    }

    const fn cost(&self) -> usize {
        self.bytes.len() + MESSAGE_OVERHEAD_BYTES
    }
}

/// What came of handing over a message.
#[derive(Debug)]
pub(super) enum Push {
    /// It waits. Whoever sends must be woken.
    Queued(Option<Waker>),
    /// There is no room, or no connection in sight.
    Dropped {
        /// Whether the group has not been told yet.
        tell: bool,
    },
}

/// A bounded queue between the groups, which push, and one connection at a time, which polls for
/// batches. Nobody waits for room.
pub(super) struct Outbox {
    messages_max: usize,
    bytes_max: usize,
    metrics: LaneMetrics,
    inner: Mutex<Inner>,
}

struct Inner {
    state: State,
    /// Whether the current connection counts as connected in the metrics.
    established: bool,
    /// Number of the current connection attempt: an earlier one gets nothing any more.
    epoch: u64,
    messages: VecDeque<Waiting>,
    /// Sum of the costs of `messages`. `bytes <= bytes_max`.
    bytes: usize,
    /// Who was told that messages were dropped, and has had no reason to think otherwise since.
    told: HashSet<Member>,
    waker: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waiting to try again: messages are dropped.
    Closed,
    /// An attempt is under way: messages wait for its success.
    Connecting,
    /// Messages flow.
    Established,
    /// No more messages are taken; those that wait still flow.
    Finishing,
}

impl Outbox {
    /// An outbox that takes messages for the first attempt.
    pub(super) fn new(lane: Lane, metrics: LaneMetrics) -> Self {
        let (messages_max, bytes_max) = match lane {
            Lane::Control => (CONTROL_MESSAGES_MAX, CONTROL_BYTES_MAX),
            Lane::Bulk => (BULK_MESSAGES_MAX, BULK_BYTES_MAX),
        };
        let inner = Inner {
            state: State::Connecting,
            established: false,
            epoch: 0,
            messages: VecDeque::new(),
            bytes: 0,
            told: HashSet::new(),
            waker: None,
        };
        Self { messages_max, bytes_max, metrics, inner: Mutex::new(inner) }
    }

    /// Hands over a message.
    pub(super) fn push(&self, message: Waiting) -> Push {
        let mut inner = self.inner.lock();
        let takes = matches!(inner.state, State::Connecting | State::Established);
        let room = inner.messages.len() < self.messages_max
            && inner.bytes + message.cost() <= self.bytes_max
            && message.bytes.len() <= MESSAGE_MAX;
        if takes && room {
            inner.bytes += message.cost();
            inner.messages.push_back(message);
            return Push::Queued(inner.waker.take());
        }
        self.metrics.dropped.increment(1);
        Push::Dropped { tell: inner.told.insert(message.member()) }
    }

    /// Begins an attempt to connect; messages are taken from now on. Returns its number.
    pub(super) fn open(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.state = State::Connecting;
        inner.epoch += 1;
        inner.epoch
    }

    /// The attempt succeeded: lets messages flow.
    pub(super) fn establish(&self) {
        self.inner.lock().established = true;
        self.metrics.connected.increment(1.0);
        self.change(State::Established);
    }

    /// Takes no more messages, and ends the stream behind those that wait.
    pub(super) fn finish(&self) {
        self.change(State::Finishing);
    }

    fn change(&self, state: State) {
        let waker = {
            let mut inner = self.inner.lock();
            inner.state = state;
            inner.waker.take()
        };
        wake(waker);
    }

    /// The connection is gone, or did not come about: drops what waits. Returns who must be told:
    /// whose messages these were, and `lost`, whose messages may have been lost on the way; without
    /// those who know.
    pub(super) fn close(&self, lost: &[Member]) -> Vec<Member> {
        let (dropped, waker, tell) = {
            let mut inner = self.inner.lock();
            if inner.established {
                inner.established = false;
                self.metrics.connected.decrement(1.0);
            }
            inner.state = State::Closed;
            inner.epoch += 1;
            inner.bytes = 0;
            let dropped = std::mem::take(&mut inner.messages);
            let affected = lost.iter().copied().chain(dropped.iter().map(Waiting::member));
            let tell = affected.filter(|member| inner.told.insert(*member)).collect();
            (dropped, inner.waker.take(), tell)
        };
        self.metrics.dropped.increment(dropped.len() as u64);
        wake(waker);
        tell
    }

    /// The next batch for the connection of the attempt `epoch`, as much as is there without
    /// waiting for more. `None` when that connection is not to send any more.
    pub(super) fn poll_batch(&self, epoch: u64, cx: &Context<'_>) -> Poll<Option<Vec<Waiting>>> {
        let (batch, bytes) = {
            let mut inner = self.inner.lock();
            if inner.epoch != epoch {
                return Poll::Ready(None);
            }
            match inner.state {
                State::Closed => return Poll::Ready(None),
                State::Finishing if inner.messages.is_empty() => return Poll::Ready(None),
                State::Established | State::Finishing if !inner.messages.is_empty() => {}
                _ => {
                    inner.waker = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
            let taken = inner.take_batch();
            let (messages, bytes) = (inner.messages.len(), inner.bytes);
            if messages <= self.messages_max / 2 && bytes <= self.bytes_max / 2 {
                inner.told.clear();
            }
            taken
        };
        self.metrics.sent_messages.increment(batch.len() as u64);
        self.metrics.sent_bytes.increment(bytes as u64);
        Poll::Ready(Some(batch))
    }

    /// Messages and bytes that wait, as counted against the limits.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> (usize, usize) {
        let inner = self.inner.lock();
        (inner.messages.len(), inner.bytes)
    }
}

impl Inner {
    /// Takes messages for one frame, at least one, and the sum of their bytes.
    fn take_batch(&mut self) -> (Vec<Waiting>, usize) {
        let mut count = 0;
        let mut bytes = 0;
        for message in self.messages.iter().take(BATCH_MESSAGES_MAX) {
            if count > 0 && bytes + message.bytes.len() > BATCH_BYTES_MAX {
                break;
            }
            bytes += message.bytes.len();
            count += 1;
        }
        self.bytes -= bytes + count * MESSAGE_OVERHEAD_BYTES;
        (self.messages.drain(..count).collect(), bytes)
    }
}

/// Outside the lock, for it may run the other side at once.
fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::transport::metrics::PeerMetrics;

    fn outbox(lane: Lane) -> Outbox {
        let name = "peer".parse().unwrap();
        Outbox::new(lane, PeerMetrics::new(&name).lanes[lane.place()].clone())
    }

    fn message(to: u64, len: usize) -> Waiting {
        let id = |id| ReplicaId::new(id).unwrap();
        let (shard, bytes, traces) = (ShardId(0), vec![0; len].into(), Vec::new());
        Waiting { shard, from: id(1), to: id(to), bytes, traces }
    }

    /// The sizes of the next batch, or `None` when there is none now.
    fn batch(outbox: &Outbox, epoch: u64) -> Option<Vec<usize>> {
        match outbox.poll_batch(epoch, &Context::from_waker(Waker::noop())) {
            Poll::Ready(batch) => Some(batch?.iter().map(|message| message.bytes.len()).collect()),
            Poll::Pending => None,
        }
    }

    #[test]
    fn batches_keep_order_and_bounds() {
        let outbox = outbox(Lane::Bulk);
        let epoch = outbox.open();
        let large = BATCH_BYTES_MAX + 1;
        for len in [1, BATCH_BYTES_MAX - 1, 1, large, 2] {
            assert!(matches!(outbox.push(message(2, len)), Push::Queued(_)));
        }
        for _ in 0..BATCH_MESSAGES_MAX + 1 {
            assert!(matches!(outbox.push(message(2, 0)), Push::Queued(_)));
        }
        assert_eq!(batch(&outbox, epoch), None, "not before the peer has accepted");
        outbox.establish();
        assert_eq!(batch(&outbox, epoch), Some(vec![1, BATCH_BYTES_MAX - 1]));
        assert_eq!(batch(&outbox, epoch), Some(vec![1]));
        assert_eq!(batch(&outbox, epoch), Some(vec![large]));
        let full = batch(&outbox, epoch).unwrap();
        assert_eq!((full.len(), full[0]), (BATCH_MESSAGES_MAX, 2));
        assert_eq!(batch(&outbox, epoch), Some(vec![0, 0]));
        assert_eq!(outbox.waiting(), (0, 0));
    }

    #[test]
    fn a_full_outbox_drops_and_tells_once_until_it_has_emptied() {
        let outbox = outbox(Lane::Control);
        let epoch = outbox.open();
        outbox.establish();
        let told = |to| match outbox.push(message(to, 10)) {
            Push::Queued(_) => None,
            Push::Dropped { tell } => Some(tell),
        };
        for _ in 0..CONTROL_MESSAGES_MAX {
            assert_eq!(told(2), None);
        }
        assert_eq!([told(2), told(2), told(3), told(3)], [true, false, true, false].map(Some));
        assert_eq!(outbox.waiting().0, CONTROL_MESSAGES_MAX);
        while batch(&outbox, epoch).is_some() {}
        for _ in 0..CONTROL_MESSAGES_MAX {
            assert_eq!(told(2), None);
        }
        assert_eq!(told(2), Some(true), "a new episode");
    }

    #[test]
    fn a_message_too_long_for_the_peer_is_dropped() {
        let outbox = outbox(Lane::Bulk);
        outbox.open();
        assert!(matches!(outbox.push(message(2, MESSAGE_MAX)), Push::Queued(_)));
        assert!(matches!(outbox.push(message(2, MESSAGE_MAX + 1)), Push::Dropped { tell: true }));
    }

    #[test]
    fn a_lost_connection_drops_what_waits_and_ends_its_stream() {
        let outbox = outbox(Lane::Bulk);
        let former = outbox.open();
        outbox.establish();
        outbox.push(message(2, 10));
        let (two, three) = (message(2, 0).member(), message(3, 0).member());
        assert_eq!(outbox.close(&[three]), [three, two]);
        assert!(matches!(outbox.push(message(2, 10)), Push::Dropped { tell: false }));
        let epoch = outbox.open();
        assert!(matches!(outbox.push(message(2, 20)), Push::Queued(_)));
        assert_eq!(outbox.close(&[]), [], "nothing new to tell");
        let next = outbox.open();
        outbox.push(message(2, 30));
        outbox.establish();
        for stale in [former, epoch] {
            let ended = outbox.poll_batch(stale, &Context::from_waker(Waker::noop()));
            assert_eq!(ended, Poll::Ready(None));
        }
        assert_eq!(batch(&outbox, next), Some(vec![30]));
    }

    #[test]
    fn finishing_lets_out_what_waits_and_takes_nothing_more() {
        let outbox = outbox(Lane::Bulk);
        let epoch = outbox.open();
        outbox.establish();
        outbox.push(message(2, 10));
        outbox.finish();
        assert!(matches!(outbox.push(message(2, 20)), Push::Dropped { .. }));
        assert_eq!(batch(&outbox, epoch), Some(vec![10]));
        let ended = outbox.poll_batch(epoch, &Context::from_waker(Waker::noop()));
        assert_eq!(ended, Poll::Ready(None));
    }
}
