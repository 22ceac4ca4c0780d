//! Reads and block status: from memory and the page cache at once if the leader is here, else by
//! way of the session.

use std::ops::Range;

use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_proto::{CommandKind, Extent, NbdError, ReplyTo};
use nbd_service::trace::Span;
use nbd_session::Query;

use super::super::in_flight::Pending;
use super::super::trace;
use super::{Session, message, status_bytes};
use crate::budget::BytePermit;
use crate::limits::INLINE_READ_BYTES_MAX;
use crate::shard_client::ReadData;

/// Data up to this length is copied behind other replies rather than queued as a buffer of its own.
const COPIED_REPLY_BYTES_MAX: usize = 64 << 10;

impl Session {
    pub(super) fn begin_read(
        &mut self,
        to: ReplyTo,
        (offset, len): (u64, u64),
        dont_fragment: bool,
        permit: BytePermit,
        trace: Option<Span>,
    ) {
        let mut pending = Pending::new(to, CommandKind::Read, len);
        let in_chunks = self.encoder.can_send_holes() && !dont_fragment;
        if len <= INLINE_READ_BYTES_MAX && self.read_inline(to, offset, len, in_chunks) {
            self.output.hold(permit);
            trace::read_inline(trace, pending.since);
            return self.front.metrics.request(CommandKind::Read, len, pending.since.elapsed());
        }
        pending.permit = Some(permit);
        pending.reply_bytes = usize::try_from(len).unwrap_or(usize::MAX);
        self.reading_bytes += pending.reply_bytes;
        let context = trace::decoded(trace.as_ref());
        pending.trace = trace;
        let token = self.in_flight.insert(pending);
        if in_chunks {
            self.client.read_in_pieces((offset, len), true, token, context);
        } else {
            self.client.query(Query::Read { offset, len, holes: false }, token, context);
        }
    }

    /// Answers a read if a replica in this process may, and can without waiting for the disk.
    fn read_inline(&mut self, to: ReplyTo, offset: u64, len: u64, holes: bool) -> bool {
        let mut data = std::mem::take(&mut self.scratch);
        let done = self.client.try_read(offset, len, holes, &mut data);
        if done {
            self.send_runs(to, 0, &data.runs, true, |output, run| {
                output.buffer().extend_from_slice(&data.bytes[run]);
            });
        }
        self.scratch = data;
        done
    }

    /// Passes some bytes of a read on, which belong `at` bytes behind its first. More will come.
    /// Their share of the budget goes back when they are sent, so that what a slow client has not
    /// taken stays paid for.
    pub(super) fn relay(&mut self, token: usize, at: u64, data: ReadData) {
        let len = data.bytes.len();
        let (to, share) = self.in_flight.reply_queued(token, len);
        self.reading_bytes -= len;
        self.send_read(to, at, data, false);
        if let Some(share) = share {
            self.output.hold(share);
        }
    }

    /// Ends a read of which the first `at` bytes were passed on.
    pub(super) fn break_off(&mut self, to: ReplyTo, at: u64, error: NbdError, trace: Option<Span>) {
        if let Some(mut span) = trace {
            span.error(message(error));
        }
        self.front.metrics.failed.increment(1);
        let out = self.output.buffer();
        self.encoder.read_error_after_data(out, &to, to.offset + at, error, message(error));
    }

    /// Sends bytes of a read that went by way of the session, which belong `at` bytes behind its
    /// first; with `last` they are the read's last.
    pub(super) fn send_read(&mut self, to: ReplyTo, at: u64, data: ReadData, last: bool) {
        let ReadData { bytes, runs } = data;
        self.send_runs(to, at, &runs, last, |output, run| {
            if run.len() <= COPIED_REPLY_BYTES_MAX {
                output.buffer().extend_from_slice(&bytes[run]);
            } else {
                output.push(bytes.slice(run));
            }
        });
    }

    /// Sends content chunks of a read, the read's last among them if `last`; `send_data` queues the
    /// bytes of one run. Runs count from `at` bytes behind the read's first.
    fn send_runs(
        &mut self,
        to: ReplyTo,
        at: u64,
        runs: &[(Range<usize>, bool)],
        last: bool,
        mut send_data: impl FnMut(&mut super::Output, Range<usize>),
    ) {
        for (number, (run, zero)) in runs.iter().enumerate() {
            let (at, len) = (to.offset + at + run.start as u64, run.len() as u64);
            let last = last && number == runs.len() - 1;
            let out = self.output.buffer();
            if *zero {
                self.encoder.read_hole(out, &to, at, len, last);
            } else {
                self.encoder.read_prefix(out, &to, at, len, last);
                send_data(&mut self.output, run.clone());
            }
        }
    }

    pub(super) fn begin_status(
        &mut self,
        to: ReplyTo,
        (offset, len): (u64, u64),
        req_one: bool,
        permit: BytePermit,
        trace: Option<Span>,
    ) {
        let mut pending = Pending::new(to, CommandKind::BlockStatus, len);
        pending.permit = Some(permit);
        pending.reply_bytes = usize::try_from(status_bytes(len, req_one)).unwrap_or(usize::MAX);
        self.reading_bytes += pending.reply_bytes;
        let context = trace::decoded(trace.as_ref());
        pending.trace = trace;
        let token = self.in_flight.insert(pending);
        let extents_max = if req_one { 1 } else { BLOCK_STATUS_EXTENTS_MAX };
        let extents_max = u32::try_from(extents_max).unwrap_or(u32::MAX);
        self.client.query(Query::BlockStatus { offset, len, extents_max }, token, context);
    }
}

pub(super) const fn extent(extent: nbd_store::Extent) -> Extent {
    Extent { len: extent.len, hole: extent.status.hole, zero: extent.status.zero }
}
