//! Reads and block status: from memory and the page cache at once if the leader is here, else by
//! way of the session.

use std::ops::Range;

use bytes::Bytes;
use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_proto::{CommandKind, Extent, ReplyTo};
use nbd_session::Query;

use super::super::in_flight::Pending;
use super::{Session, status_bytes};
use crate::budget::BytePermit;
use crate::limits::INLINE_READ_BYTES_MAX;
use crate::shard_client::ReadData;

/// Data up to this length is copied behind other replies rather than queued as a buffer of its own.
const COPIED_REPLY_BYTES_MAX: usize = 64 << 10;

impl Session {
    pub(super) fn begin_read(
        &mut self,
        to: ReplyTo,
        offset: u64,
        len: u64,
        dont_fragment: bool,
        permit: BytePermit,
    ) {
        let mut pending = Pending::new(to, CommandKind::Read, len);
        let holes = self.encoder.can_send_holes() && !dont_fragment;
        if len <= INLINE_READ_BYTES_MAX && self.read_inline(to, offset, len, holes) {
            self.output.hold(permit);
            return self.front.metrics.request(CommandKind::Read, len, pending.since.elapsed());
        }
        pending.permit = Some(permit);
        pending.reply_bytes = usize::try_from(len).unwrap_or(usize::MAX);
        self.reading_bytes += pending.reply_bytes;
        let token = self.in_flight.insert(pending);
        self.client.query(Query::Read { offset, len, holes }, token);
    }

    /// Answers a read if a replica in this process may, and can without waiting for the disk.
    fn read_inline(&mut self, to: ReplyTo, offset: u64, len: u64, holes: bool) -> bool {
        let mut data = std::mem::take(&mut self.scratch);
        let done = self.client.try_read(offset, len, holes, &mut data);
        if done {
            self.send_runs(to, &data.runs, |output, run| {
                output.buffer().extend_from_slice(&data.bytes[run]);
            });
        }
        self.scratch = data;
        done
    }

    /// Answers a read that went by way of the session.
    pub(super) fn send_read(&mut self, to: ReplyTo, data: ReadData) {
        let bytes = Bytes::from(data.bytes);
        self.send_runs(to, &data.runs, |output, run| {
            if run.len() <= COPIED_REPLY_BYTES_MAX {
                output.buffer().extend_from_slice(&bytes[run]);
            } else {
                output.push(bytes.slice(run));
            }
        });
    }

    /// Sends the content chunks of a read; `send_data` queues the bytes of one run.
    fn send_runs(
        &mut self,
        to: ReplyTo,
        runs: &[(Range<usize>, bool)],
        mut send_data: impl FnMut(&mut super::Output, Range<usize>),
    ) {
        let last = runs.len() - 1;
        for (number, (run, zero)) in runs.iter().enumerate() {
            let (at, len) = (to.offset + run.start as u64, run.len() as u64);
            let out = self.output.buffer();
            if *zero {
                self.encoder.read_hole(out, &to, at, len, number == last);
            } else {
                self.encoder.read_prefix(out, &to, at, len, number == last);
                send_data(&mut self.output, run.clone());
            }
        }
    }

    pub(super) fn begin_status(
        &mut self,
        to: ReplyTo,
        offset: u64,
        len: u64,
        req_one: bool,
        permit: BytePermit,
    ) {
        let mut pending = Pending::new(to, CommandKind::BlockStatus, len);
        pending.permit = Some(permit);
        pending.reply_bytes = usize::try_from(status_bytes(len, req_one)).unwrap_or(usize::MAX);
        self.reading_bytes += pending.reply_bytes;
        let token = self.in_flight.insert(pending);
        let extents_max = if req_one { 1 } else { BLOCK_STATUS_EXTENTS_MAX };
        let extents_max = u32::try_from(extents_max).unwrap_or(u32::MAX);
        self.client.query(Query::BlockStatus { offset, len, extents_max }, token);
    }
}

pub(super) const fn extent(extent: nbd_store::Extent) -> Extent {
    Extent { len: extent.len, hole: extent.status.hole, zero: extent.status.zero }
}
