//! Mutations: payloads in, proposals out.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use nbd_proto::{CommandKind, NbdError, ReplyTo};
use nbd_store::command::{self, WriteBuilder};
use nbd_store::limits::MUTATION_BYTES_MAX;
use nbd_store::{Admission, AdmissionKind, ShardReader, SpaceGrant, VolumeId};

use super::super::attach::{FIRST_EPOCH, Opened};
use super::super::in_flight::Pending;
use super::super::{Completion, Node};
use super::{Session, SessionEnd, Stage};
use crate::budget::BytePermit;
use crate::group_task::GroupStopped;
use crate::limits::SPACE_ATTEMPTS_MAX;
use crate::reply::{Hold, Reply};
use tracing::error;

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
}

impl Session {
    /// Moves received bytes into the payload and proposes it once complete. `false` when more input
    /// is needed.
    pub(super) async fn take_payload(&mut self) -> Result<bool, SessionEnd> {
        let Stage::Payload(payload) = &mut self.stage else { unreachable!("only in this stage") };
        loop {
            if payload.room().is_empty() {
                if self.decoder.payload_remaining() == 0 {
                    break;
                }
                payload.add_part(&self.opened);
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
        let PayloadStage { to, offset, len, first_seq, permit, parts, .. } = payload;
        self.next_seq += parts.len() as u64;
        let pending = Pending {
            parts: parts.len(),
            first_seq: Some(first_seq),
            permit: Some(permit),
            ..Pending::new(to, CommandKind::Write, len)
        };
        let token = self.in_flight.insert(pending);
        let commands = parts.into_iter().map(WriteBuilder::finish).collect();
        self.propose(token, AdmissionKind::Write, offset, len, commands).await?;
        Ok(true)
    }

    /// Proposes a request's mutations, once the disk has room for them.
    async fn propose(
        &mut self,
        token: usize,
        kind: AdmissionKind,
        offset: u64,
        len: u64,
        commands: Vec<Bytes>,
    ) -> Result<(), GroupStopped> {
        match self.node.space.admit_fast(offset, len, kind) {
            Some(grant) => self.propose_granted(token, grant, commands).await,
            None => {
                let look = SpaceLook {
                    node: Arc::clone(&self.node),
                    reader: self.opened.group.reader().clone(),
                    volume: self.opened.volume.id,
                    offset,
                    len,
                    kind,
                };
                let completions = self.completions_tx.clone();
                self.node.shutdown.spawn(async move {
                    let completion = match look.run().await {
                        Ok(grant) => Completion::Granted { token, grant, commands },
                        Err(error) => Completion::Refused { token, error },
                    };
                    let _ = completions.try_send(completion);
                });
                Ok(())
            }
        }
    }

    /// Proposes a request's mutations and keeps the grant of room until they are applied.
    pub(super) async fn propose_granted(
        &mut self,
        token: usize,
        grant: SpaceGrant,
        commands: Vec<Bytes>,
    ) -> Result<(), GroupStopped> {
        let permit = self.in_flight.take_permit(token);
        let hold = Arc::new(Hold { _permit: permit, _grant: grant });
        for command in commands {
            let (completions, hold) = (self.completions_tx.clone(), Arc::clone(&hold));
            let reply = Reply::Session { completions, token, hold };
            self.opened.group.propose(command, reply).await?;
        }
        Ok(())
    }

    pub(super) async fn begin_range(
        &mut self,
        to: ReplyTo,
        command_kind: CommandKind,
        kind: AdmissionKind,
        offset: u64,
        len: u64,
    ) -> Result<(), SessionEnd> {
        let seq = self.next_seq;
        self.next_seq += 1;
        let pending = Pending { first_seq: Some(seq), ..Pending::new(to, command_kind, len) };
        let token = self.in_flight.insert(pending);
        let (session, volume) = (self.opened.session, self.opened.volume.id);
        let epoch = FIRST_EPOCH;
        let command = match kind {
            AdmissionKind::WriteZeroes { no_hole } => {
                command::encode_write_zeroes(session, epoch, seq, volume, offset, len, no_hole)
            }
            _ => command::encode_trim(session, epoch, seq, volume, offset, len),
        };
        self.propose(token, kind, offset, len, vec![command]).await?;
        Ok(())
    }
}

impl PayloadStage {
    pub(super) fn new(
        to: ReplyTo,
        offset: u64,
        len: u64,
        first_seq: u64,
        permit: BytePermit,
        since: Instant,
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
        }
    }

    /// Adds the next mutation: up to the next mutation boundary of the volume or the request's end.
    fn add_part(&mut self, opened: &Opened) {
        let start = self.next;
        let boundary = (start / MUTATION_BYTES_MAX + 1) * MUTATION_BYTES_MAX;
        let end = boundary.min(self.offset + self.len);
        let seq = self.first_seq + self.parts.len() as u64;
        let (session, volume) = (opened.session, opened.volume.id);
        self.parts.push(WriteBuilder::new(session, FIRST_EPOCH, seq, volume, start, end - start));
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

/// A look for room when it is not plain that there is enough: on the blocking pool, and behind a
/// checkpoint when it takes one to know.
struct SpaceLook {
    node: Arc<Node>,
    reader: ShardReader,
    volume: VolumeId,
    offset: u64,
    len: u64,
    kind: AdmissionKind,
}

impl SpaceLook {
    /// The first look may come at a moment when what a trim gave back is on its way between two
    /// counts, so a refusal stands only behind a checkpoint that began after the request came.
    async fn run(self) -> Result<SpaceGrant, NbdError> {
        for attempt in 0..=SPACE_ATTEMPTS_MAX {
            let reader = self.reader.clone();
            let (volume, offset, len, kind) = (self.volume, self.offset, self.len, self.kind);
            let look = move || reader.admit(volume, offset, len, kind);
            let looked = tokio::task::spawn_blocking(look).await;
            match looked {
                Ok(Ok(Admission::Granted(grant))) => return Ok(grant),
                Ok(Ok(Admission::NoSpace)) if attempt > 0 => return Err(NbdError::NoSpc),
                Ok(Ok(Admission::NoSpace | Admission::NeedCheckpoint)) => {
                    self.node.checkpoints.attempt().await;
                }
                Ok(Err(error)) => {
                    error!(%error, "cannot look for room");
                    return Err(NbdError::Io);
                }
                Err(error) => {
                    error!(%error, "cannot look for room");
                    return Err(NbdError::Io);
                }
            }
        }
        Err(NbdError::NoSpc)
    }
}
