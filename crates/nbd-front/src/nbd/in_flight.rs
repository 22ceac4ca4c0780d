//! The requests a session has under way, by token.

use std::collections::BTreeSet;
use std::time::Instant;

use nbd_proto::{CommandKind, NbdError, ReplyTo};
use nbd_service::trace::Span;

use crate::budget::BytePermit;
use crate::limits::{MUTATIONS_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX};

/// One request that was accepted and not yet answered.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) to: ReplyTo,
    pub(crate) kind: CommandKind,
    /// Bytes the request covers.
    pub(crate) len: u64,
    /// Mutations (or other pieces of work) still to finish. The reply goes out at 0.
    pub(crate) parts: usize,
    /// Sequence number of its first mutation.
    pub(crate) first_seq: Option<u64>,
    /// First error of its parts.
    pub(crate) error: Option<NbdError>,
    /// Its share of the byte budget, held until it is answered.
    pub(crate) permit: Option<BytePermit>,
    /// Bytes of its reply that are being made elsewhere. Of a read that is answered in pieces:
    /// those that are not queued yet.
    pub(crate) reply_bytes: usize,
    pub(crate) since: Instant,
    /// Its root, if it is traced: ends when it is answered.
    pub(crate) trace: Option<Span>,
}

impl Pending {
    /// A request of one part, begun now.
    pub(crate) fn new(to: ReplyTo, kind: CommandKind, len: u64) -> Self {
        Self {
            to,
            kind,
            len,
            parts: 1,
            first_seq: None,
            error: None,
            permit: None,
            reply_bytes: 0,
            since: Instant::now(),
            trace: None,
        }
    }
}

/// A session's table of requests under way; bounded by [`REQUESTS_IN_FLIGHT_MAX`] and
/// [`MUTATIONS_IN_FLIGHT_MAX`].
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// First sequence numbers of the mutations under way. The distance from the smallest to the
    /// next one to be given stays within the session's result window, so that the state machine
    /// always knows a new mutation from a repeated one.
    seqs: BTreeSet<u64>,
}

impl InFlight {
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The roots of those that are traced.
    pub(crate) fn traces(&mut self) -> impl Iterator<Item = &mut Span> {
        self.slots.iter_mut().flatten().filter_map(|pending| pending.trace.as_mut())
    }

    /// Whether a request of `mutations` mutations, the first numbered `next_seq`, may be taken in.
    pub(crate) fn has_room(&self, next_seq: u64, mutations: usize) -> bool {
        if self.len() >= REQUESTS_IN_FLIGHT_MAX {
            return false;
        }
        let oldest = self.seqs.first().copied().unwrap_or(next_seq);
        let span = (next_seq - oldest).saturating_add(mutations as u64);
        span <= MUTATIONS_IN_FLIGHT_MAX as u64
    }

    pub(crate) fn insert(&mut self, pending: Pending) -> usize {
        if let Some(seq) = pending.first_seq {
            self.seqs.insert(seq);
        }
        if let Some(token) = self.free.pop() {
            self.slots[token] = Some(pending);
            return token;
        }
        self.slots.push(Some(pending));
        self.slots.len() - 1
    }

    /// Counts so many bytes of a request's reply as queued. Gives the address for them and their
    /// part of the request's share of the byte budget.
    pub(crate) fn reply_queued(
        &mut self,
        token: usize,
        bytes: usize,
    ) -> (ReplyTo, Option<BytePermit>) {
        let Some(pending) = &mut self.slots[token] else {
            panic!("request {token} is not under way");
        };
        pending.reply_bytes -= bytes;
        let share = pending.permit.as_mut().map(|permit| permit.split(bytes as u64));
        (pending.to, share)
    }

    /// Counts one part as finished. Gives the request back when that was its last.
    pub(crate) fn finish_part(&mut self, token: usize, error: Option<NbdError>) -> Option<Pending> {
        let Some(pending) = &mut self.slots[token] else {
            panic!("request {token} was finished twice");
        };
        pending.error = pending.error.or(error);
        pending.parts -= 1;
        if pending.parts > 0 {
            return None;
        }
        let pending = self.slots[token].take();
        self.free.push(token);
        if let Some(seq) = pending.as_ref().and_then(|pending| pending.first_seq) {
            self.seqs.remove(&seq);
        }
        pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(parts: usize, first_seq: Option<u64>) -> Pending {
        let to = ReplyTo { cookie: 0, offset: 0 };
        Pending { parts, first_seq, ..Pending::new(to, CommandKind::Write, 0) }
    }

    #[test]
    fn a_request_ends_with_its_last_part_and_keeps_its_first_error() {
        let mut table = InFlight::default();
        let token = table.insert(pending(3, Some(1)));
        assert!(table.finish_part(token, None).is_none());
        assert!(table.finish_part(token, Some(NbdError::NoSpc)).is_none());
        let done = table.finish_part(token, Some(NbdError::Io)).unwrap();
        assert_eq!(done.error, Some(NbdError::NoSpc));
        assert!(table.is_empty());
    }

    /// A mutation that waits (for room on the disk, say) must not fall out of the window in which
    /// the state machine can tell it from a repeated one: it would be answered without taking
    /// effect.
    #[test]
    fn a_waiting_mutation_holds_back_those_a_window_later() {
        let mut table = InFlight::default();
        let oldest = table.insert(pending(1, Some(1)));
        let window = MUTATIONS_IN_FLIGHT_MAX as u64;
        for seq in 2..=window {
            assert!(table.has_room(seq, 1));
            let token = table.insert(pending(1, Some(seq)));
            table.finish_part(token, None).unwrap();
        }
        assert!(!table.has_room(window + 1, 1));
        table.finish_part(oldest, None).unwrap();
        assert!(table.has_room(window + 1, 1));
    }

    #[test]
    fn requests_are_bounded() {
        let mut table = InFlight::default();
        for _ in 0..REQUESTS_IN_FLIGHT_MAX {
            assert!(table.has_room(1, 0));
            table.insert(pending(1, None));
        }
        assert!(!table.has_room(1, 0));
    }
}
