//! Mutations: payloads in, commands out.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use nbd_proto::{CommandKind, ReplyTo};
use nbd_service::trace::Span;
use nbd_store::command::{self, WriteBuilder};
use nbd_store::limits::MUTATION_BYTES_MAX;
use nbd_store::{CommandKind as LogKind, Epoch, SessionId, VolumeId};

use super::super::in_flight::Pending;
use super::super::trace;
use super::{Session, SessionEnd, Stage};
use crate::budget::BytePermit;
use crate::route::GroupStopped;

/// Payload bytes from which on the rest is read from the socket straight into the mutation's
/// buffer.
pub(super) const DIRECT_READ_BYTES_MIN: usize = 16 << 10;

/// A write whose payload is arriving. Nothing is proposed before its last byte is here.
pub(super) struct PayloadStage {
    to: ReplyTo,
    offset: u64,
    pub(super) len: u64,
    first_seq: u64,
    pub(super) permit: BytePermit,
    pub(super) since: Instant,
    /// Where the next mutation begins.
    next: u64,
    /// One for each mutation, in order; all but the last are full.
    parts: Vec<WriteBuilder>,
    /// Payload of the last part, in bytes. `filled <= last_len`.
    last_len: usize,
    /// Bytes of the last part that are here.
    pub(super) filled: usize,
    pub(super) progress: Instant,
    /// The request's root, if it is traced.
    trace: Option<Span>,
}

impl Session {
    /// Moves received bytes into the payload and submits it once complete. `false` when more input
    /// is needed.
    pub(super) async fn take_payload(&mut self) -> Result<bool, SessionEnd> {
        let Stage::Payload(payload) = &mut self.stage else { unreachable!("only in this stage") };
        loop {
            if payload.room().is_empty() {
                if self.decoder.payload_remaining() == 0 {
                    break;
                }
                let client = &self.client;
                payload.add_part(client.id(), client.epoch(), client.volume());
                continue;
            }
            let taken = self.decoder.take_payload(&mut self.input, payload.room());
            if taken == 0 {
                return Ok(false);
            }
            payload.filled += taken;
        }
        let Stage::Payload(payload) = std::mem::replace(&mut self.stage, Stage::Header) else {
            unreachable!("only in this stage")
        };
        let PayloadStage { to, len, first_seq, permit, parts, trace, .. } = payload;
        let reserved = self.client.reserve(parts.len() as u64);
        debug_assert_eq!(reserved, first_seq, "nothing else is begun while a payload arrives");
        let context = trace::decoded(trace.as_ref());
        let pending = Pending {
            parts: parts.len(),
            first_seq: Some(first_seq),
            trace,
            ..Pending::new(to, CommandKind::Write, len)
        };
        let token = self.in_flight.insert(pending);
        let share = Arc::new(permit);
        for (seq, part) in (first_seq..).zip(parts) {
            let share = Some(Arc::clone(&share));
            self.client.submit(seq, part.finish(), token, share, context).await?;
        }
        Ok(true)
    }

    /// Begins a trim, or a write-zeroes with or without `no_hole`.
    pub(super) async fn begin_range(
        &mut self,
        to: ReplyTo,
        kind: LogKind,
        (offset, len): (u64, u64),
        no_hole: bool,
        trace: Option<Span>,
    ) -> Result<(), GroupStopped> {
        let seq = self.client.reserve(1);
        let (id, epoch, volume) = (self.client.id(), self.client.epoch(), self.client.volume());
        let (kind, command): (_, Bytes) = match kind {
            LogKind::Trim => {
                let trim = command::encode_trim(id, epoch, seq, volume, offset, len);
                (CommandKind::Trim, trim)
            }
            _ => {
                let zeroes =
                    command::encode_write_zeroes(id, epoch, seq, volume, offset, len, no_hole);
                (CommandKind::WriteZeroes, zeroes)
            }
        };
        let context = trace::decoded(trace.as_ref());
        let pending = Pending { first_seq: Some(seq), trace, ..Pending::new(to, kind, len) };
        let token = self.in_flight.insert(pending);
        self.client.submit(seq, command, token, None, context).await
    }
}

impl PayloadStage {
    pub(super) fn new(
        to: ReplyTo,
        (offset, len): (u64, u64),
        first_seq: u64,
        permit: BytePermit,
        since: Instant,
        trace: Option<Span>,
    ) -> Self {
        let (next, parts, last_len, filled) = (offset, Vec::new(), 0, 0);
        Self {
            to,
            offset,
            len,
            first_seq,
            permit,
            since,
            next,
            parts,
            last_len,
            filled,
            progress: since,
            trace,
        }
    }

    /// Adds the next mutation: up to the next mutation boundary of the volume or the request's end.
    fn add_part(&mut self, session: SessionId, epoch: Epoch, volume: VolumeId) {
        let start = self.next;
        let boundary = (start / MUTATION_BYTES_MAX + 1) * MUTATION_BYTES_MAX;
        let end = boundary.min(self.offset + self.len);
        let seq = self.first_seq + self.parts.len() as u64;
        self.parts.push(WriteBuilder::new(session, epoch, seq, volume, start, end - start));
        self.next = end;
        self.last_len = usize::try_from(end - start).unwrap_or(usize::MAX);
        self.filled = 0;
    }

    /// The part of the last mutation's payload that is still to come; empty if there is none.
    pub(super) fn room(&mut self) -> &mut [u8] {
        match self.parts.last_mut() {
            Some(part) => &mut part.payload_mut()[self.filled..],
            None => &mut [],
        }
    }

    /// Bytes of it.
    pub(super) fn room_len(&self) -> usize {
        self.last_len - self.filled
    }
}
