//! Queries that are not answered at once: worked on by tasks of their own, piece by piece.

use std::sync::Arc;

use nbd_front::limits::INLINE_READ_BYTES_MAX;
use nbd_front::{Answered, ByteBudget, BytePermit, QueryData, ReadBuffer};
use nbd_relay::{Failed, FromLeader, PIECE_BYTES_MAX};
use nbd_service::trace::Span;
use nbd_session::{Query, QueryId};
use nbd_store::VolumeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::AbortOnDropHandle;

use crate::clock;
use crate::hosted::read::{QueryError, Question, read_cached};
use crate::hosted::{HostedShard, Underway};

/// Most bytes that one extent of a block status takes in memory and on the wire.
const EXTENT_BYTES: u64 = 40;

/// A part of an answer, with the share of the byte budget that its bytes take.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) message: FromLeader,
    pub(super) share: BytePermit,
}

/// One query that is being answered.
pub(super) struct QueryTask {
    pub(super) id: QueryId,
    pub(super) query: Query,
    pub(super) shard: HostedShard,
    pub(super) volume: VolumeId,
    pub(super) budget: ByteBudget,
    /// Closed when the relay has ended.
    pub(super) parts: mpsc::Sender<Part>,
    /// Told when this replica may not answer.
    pub(super) answers: mpsc::Sender<Answered>,
    /// Turns of the relay's queries that are worked on.
    pub(super) turns: Arc<Semaphore>,
    /// Counts it.
    pub(super) underway: Underway,
    /// The leader's part of its trace, if it is traced.
    pub(super) trace: Option<Span>,
    /// One of the places for the relay's queries.
    pub(super) _place: OwnedSemaphorePermit,
}

impl QueryTask {
    pub(super) async fn run(self) {
        let Ok(_turn) = self.turns.acquire().await else { return };
        if let Err(QueryError::Lost) = self.answer().await {
            if let Some(mut span) = self.trace {
                span.error("leadership was lost");
            }
            let _ = self.answers.try_send(Answered::Lost);
        }
    }

    /// What is in memory is read on this thread, in pieces small enough to be sent while the
    /// processor's cache still has them, and not to hold up others; what is not, on the blocking
    /// pool.
    async fn answer(&self) -> Result<(), QueryError> {
        let Query::Read { offset, len, holes } = self.query else {
            return self.status().await;
        };
        let (mut at, end) = (offset, offset + len);
        let mut in_memory = true;
        while at < end {
            // The read is counted before its last part leaves.
            let counted = |piece: u64| (at + piece == end).then_some(len);
            if in_memory {
                let piece = piece_len(at, end, INLINE_READ_BYTES_MAX);
                let Some(share) = self.share(piece).await else { return Ok(()) };
                let mut data = ReadBuffer::default();
                let span = self.trace.as_ref().map(|above| above.child("cache"));
                let read = read_cached(&self.shard, self.volume, (at, piece), holes, &mut data);
                in_memory = read.is_some();
                drop(span);
                if in_memory {
                    let ReadBuffer { bytes, runs } = data;
                    let message = FromLeader::Bytes { id: self.id, bytes: bytes.into(), runs };
                    if !self.send(message, share, counted(piece)).await {
                        return Ok(());
                    }
                    at += piece;
                    continue;
                }
            }
            let piece = piece_len(at, end, PIECE_BYTES_MAX as u64);
            let query = Query::Read { offset: at, len: piece, holes };
            if !self.piece(query, piece, counted(piece)).await? {
                return Ok(());
            }
            at += piece;
        }
        Ok(())
    }

    async fn status(&self) -> Result<(), QueryError> {
        let Query::BlockStatus { extents_max, .. } = self.query else { return Ok(()) };
        self.piece(self.query, u64::from(extents_max) * EXTENT_BYTES, None).await.map(drop)
    }

    /// Answers one part of the query, which takes up to `bytes`; `counted` as for
    /// [`Self::send`]. `false` if nothing more may be sent: it has failed, or the relay has ended.
    async fn piece(
        &self,
        query: Query,
        bytes: u64,
        counted: Option<u64>,
    ) -> Result<bool, QueryError> {
        let Some(share) = self.share(bytes).await else { return Ok(false) };
        let (shard, trace) = (self.shard.clone(), self.trace.as_ref().map(Span::context));
        let question = Question { shard, volume: self.volume, query, trace };
        // A task, so that a panic is no more than a failure of this query.
        let answer = AbortOnDropHandle::new(tokio::spawn(question.answer())).await;
        let id = self.id;
        let message = match answer.unwrap_or(Err(QueryError::Failed(Failed::Io))) {
            Ok(QueryData::Bytes(data)) => {
                FromLeader::Bytes { id, bytes: data.bytes, runs: data.runs }
            }
            Ok(QueryData::Extents(extents)) => FromLeader::Extents { id, extents },
            Err(QueryError::Lost) => return Err(QueryError::Lost),
            Err(QueryError::Failed(failed)) => FromLeader::Failed { id, failed },
        };
        let failed = matches!(message, FromLeader::Failed { .. });
        let counted = counted.filter(|_| !failed);
        Ok(self.send(message, share, counted).await && !failed)
    }

    /// A share of the byte budget; `None` if the relay has ended.
    async fn share(&self, bytes: u64) -> Option<BytePermit> {
        tokio::select! {
            share = self.budget.acquire(bytes) => Some(share),
            () = self.parts.closed() => None,
        }
    }

    /// Sends a part; with the last one of a read, as many bytes are `counted` as the read has.
    /// `false` if the relay has ended.
    async fn send(&self, message: FromLeader, share: BytePermit, counted: Option<u64>) -> bool {
        if let Some(bytes) = counted {
            self.underway.read(bytes, clock::now());
        }
        self.parts.send(Part { message, share }).await.is_ok()
    }
}

/// Bytes from `at` to `end`, up to the next multiple of `unit`.
fn piece_len(at: u64, end: u64, unit: u64) -> u64 {
    (unit - at % unit).min(end - at)
}
