//! A session attached to this node's replica of a shard: straight to the group and its store.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use nbd_consensus::Timestamp;
use nbd_front::{
    Answered, Attaching, Boxed, Granted, GroupStopped, LocalAttachment, ReadBuffer, Share,
};
use nbd_relay::Failed;
use nbd_service::trace::{Context, Kind, Span};
use nbd_session::{Query, QueryId};
use nbd_store::{CommandHeader, CommandKind, VolumeId, decode_all};
use tokio::sync::mpsc;

use super::HostedShard;
use super::attachments::{Attachment, Presence, Underway};
use super::read::{QueryError, Question, read_cached};
use crate::clock;
use crate::group_task::ReadPermit;
use crate::reply::{Hold, Reply};

/// One session's way into a group of this node. Answers come over the channel it was made with,
/// which has room for all that the session may have under way.
#[derive(Debug)]
pub(crate) struct HostedSession {
    pub(crate) shard: HostedShard,
    pub(crate) volume: VolumeId,
    pub(crate) answers: mpsc::Sender<Answered>,
    /// Keeps the session from expiring, and counts what it moves.
    presence: Presence,
}

impl HostedSession {
    /// Of a session that the log has opened.
    pub(crate) fn new(
        shard: HostedShard,
        attaching: Attaching,
        answers: mpsc::Sender<Answered>,
    ) -> Self {
        let (session, volume) = (attaching.session, attaching.volume);
        let presence = shard.attached.enter(attaching, answers.clone());
        presence.look(shard.group.reader().session(session).is_some());
        Self { shard, volume, answers, presence }
    }

    const fn attachment(&self) -> &Arc<Attachment> {
        &self.presence.attachment
    }

    /// Counts a query as pending from now on.
    pub(crate) fn begin(&self) -> Underway {
        Underway::begin(self.attachment(), clock::now())
    }

    /// The leader's part of a mutation's trace, below a span of whoever asks.
    pub(crate) fn lead_mutation(&self, above: Context, kind: Kind) -> Option<Span> {
        self.lead(above, "lead write", kind)
    }

    /// The same of a query.
    pub(crate) fn lead_query(&self, above: Context, query: &Query, kind: Kind) -> Option<Span> {
        self.lead(above, lead_query(query), kind)
    }

    fn lead(&self, above: Context, name: &'static str, kind: Kind) -> Option<Span> {
        let span = self.shard.hosting.tracer.child_of(above, name, kind)?;
        let volume = i64::try_from(self.volume.0).unwrap_or(i64::MAX);
        let span = span.with("cinderblock.shard", i64::from(self.shard.group.shard().0));
        Some(span.with("cinderblock.volume.id", volume))
    }

    /// Proposes a mutation once the disk has room for it: at once if that is plain, else
    /// [`Answered::Granted`] comes first. `trace` is this leader's part of its trace.
    pub(crate) async fn mutate(
        &self,
        header: &CommandHeader,
        command: Bytes,
        share: Share,
        mut trace: Option<Span>,
    ) -> Result<(), GroupStopped> {
        let room = &self.shard.hosting.room;
        let arrived_ns = clock::now().0;
        if let Some(grant) = room.admit_fast(header) {
            let granted = Granted { seq: header.seq, command, share, grant, arrived_ns, trace };
            return self.propose_of(written_bytes(header), granted).await;
        }
        let (room, header, answers) = (room.clone(), *header, self.answers.clone());
        let reader = self.shard.group.reader().clone();
        self.shard.hosting.shutdown.spawn(async move {
            let seq = header.seq;
            let answered = match room.look(&reader, &header).await {
                Ok(grant) => {
                    let granted = Granted { seq, command, share, grant, arrived_ns, trace };
                    Answered::Granted(granted)
                }
                Err(failed) => {
                    if let Some(span) = &mut trace {
                        span.error(failed.reason());
                    }
                    Answered::Refused { seq, failed }
                }
            };
            // An attachment that was given up needs no answer.
            let _ = answers.try_send(answered);
        });
        Ok(())
    }

    /// Proposes a mutation that room was found for.
    pub(crate) async fn propose(&self, granted: Granted) -> Result<(), GroupStopped> {
        let bytes = written_bytes(&header_of(&granted.command));
        self.propose_of(bytes, granted).await
    }

    async fn propose_of(&self, bytes: u64, granted: Granted) -> Result<(), GroupStopped> {
        let Granted { seq, command, share, grant, arrived_ns, trace } = granted;
        let underway = Underway::begin(self.attachment(), Timestamp(arrived_ns));
        let hold = Hold { _share: share, _grant: grant, underway, bytes, trace };
        let reply = Reply::Session { answers: self.answers.clone(), seq, hold };
        self.shard.group.propose(command, reply).await
    }
}

impl LocalAttachment for HostedSession {
    fn mutate(
        &self,
        command: Bytes,
        share: Share,
        trace: Option<Context>,
    ) -> Boxed<'_, Result<(), GroupStopped>> {
        let header = header_of(&command);
        let trace = trace.and_then(|above| self.lead_mutation(above, Kind::Internal));
        Box::pin(async move { self.mutate(&header, command, share, trace).await })
    }

    fn propose(&self, granted: Granted) -> Boxed<'_, Result<(), GroupStopped>> {
        Box::pin(self.propose(granted))
    }

    fn query(&self, id: QueryId, query: Query, trace: Option<Context>) {
        let span = trace.and_then(|above| self.lead_query(above, &query, Kind::Internal));
        let trace = span.as_ref().map(Span::context);
        let question = Question { shard: self.shard.clone(), volume: self.volume, query, trace };
        let permit = self.shard.group.read_permit();
        let arrived = permit.as_ref().map_or_else(clock::now, ReadPermit::since);
        let underway = Underway::begin(self.attachment(), arrived);
        let mut answer = Answer::new(self.answers.clone(), id, underway, query);
        answer.trace = span;
        let Some(permit) = permit else {
            self.shard.hosting.shutdown.spawn(answer.of(question));
            return;
        };
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || match question.answer_blocking(&permit) {
            Some(data) => answer.send(Answered::Query { id, result: Ok(data) }),
            None => drop(runtime.spawn(answer.of(question))),
        });
    }

    fn try_read(&self, offset: u64, len: u64, holes: bool, data: &mut ReadBuffer) -> bool {
        let read = read_cached(&self.shard, self.volume, (offset, len), holes, data);
        if let Some((since, now)) = read {
            self.attachment().read(len, since, now);
        }
        read.is_some()
    }

    fn got(&self, given: Instant) {
        self.shard.hosting.replies.got(given.elapsed());
    }

    fn close(self: Box<Self>, command: Bytes) -> Boxed<'static, Result<(), GroupStopped>> {
        Box::pin(async move { self.shard.group.propose(command, Reply::Nobody).await })
    }
}

/// What the leader's part of a query's trace is called.
pub(crate) const fn lead_query(query: &Query) -> &'static str {
    match query {
        Query::Read { .. } => "lead read",
        Query::BlockStatus { .. } => "lead block-status",
    }
}

/// Bytes that a mutation writes.
const fn written_bytes(header: &CommandHeader) -> u64 {
    match header.kind {
        CommandKind::Write => header.length,
        _ => 0,
    }
}

/// The header of a command of this process's own.
fn header_of(command: &Bytes) -> CommandHeader {
    match decode_all(command).next() {
        Some(Ok(decoded)) => decoded.header,
        other => unreachable!("a command made by this process is none: {other:?}"),
    }
}

/// The answer that work elsewhere owes its session. It goes out when this is dropped, as a failure
/// unless there was something better: a panic is answered, too.
struct Answer {
    answers: mpsc::Sender<Answered>,
    answered: Option<Answered>,
    id: QueryId,
    underway: Option<Underway>,
    /// Bytes of a read; `None` for what is not counted.
    read_bytes: Option<u64>,
    /// The leader's part of its trace.
    trace: Option<Span>,
}

impl Answer {
    fn new(answers: mpsc::Sender<Answered>, id: QueryId, underway: Underway, query: Query) -> Self {
        let failed = Answered::Query { id, result: Err(Failed::Io) };
        let read_bytes = match query {
            Query::Read { len, .. } => Some(len),
            Query::BlockStatus { .. } => None,
        };
        let (answered, underway) = (Some(failed), Some(underway));
        Self { answers, answered, id, underway, read_bytes, trace: None }
    }

    fn send(mut self, answered: Answered) {
        self.answered = Some(answered);
    }

    async fn of(self, question: Question) {
        let id = self.id;
        match question.answer().await {
            Ok(data) => self.send(Answered::Query { id, result: Ok(data) }),
            Err(QueryError::Failed(failed)) => {
                self.send(Answered::Query { id, result: Err(failed) });
            }
            Err(QueryError::Lost) => self.send(Answered::Lost),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(answered) = self.answered.take() {
            if let (Some(span), Answered::Query { result: Err(failed), .. }) =
                (&mut self.trace, &answered)
            {
                span.error(failed.reason());
            }
            let is_read = matches!(answered, Answered::Query { result: Ok(_), .. });
            if let (Some(underway), Some(bytes), true) =
                (self.underway.take(), self.read_bytes, is_read)
            {
                underway.read(bytes, clock::now());
            }
            // A session that is gone needs no answer; a live one has room for all it waits for.
            let _ = self.answers.try_send(answered);
        }
    }
}

#[cfg(test)]
mod tests {
    use nbd_store::{Epoch, SessionId};

    use super::super::attachments::{Attachments, Moved};
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_answered_with_an_error() {
        let (answers, mut answered) = mpsc::channel(1);
        let caller = nbd_relay::Caller::default();
        let (session, epoch, volume) = (SessionId(1), Epoch(1), VolumeId(1));
        let attaching = Attaching { session, epoch, volume, caller };
        let presence = Attachments::default().enter(attaching, answers.clone());
        let underway = Underway::begin(&presence.attachment, clock::now());
        let query = Query::Read { offset: 0, len: 4096, holes: false };
        let answer = Answer::new(answers, QueryId(3), underway, query);
        let work = tokio::task::spawn_blocking(move || {
            let _answer = answer;
            panic!("as the test wants");
        });
        assert!(work.await.is_err());
        let answered = answered.recv().await.unwrap();
        assert!(matches!(answered, Answered::Query { id: QueryId(3), result: Err(Failed::Io) }));
        assert_eq!(presence.attachment.moved(), Moved::default(), "it was not answered");
        assert_eq!(presence.attachment.pending(), 0);
    }
}
