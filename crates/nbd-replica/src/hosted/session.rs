//! A session attached to this node's replica of a shard: straight to the group and its store.

use bytes::Bytes;
use nbd_front::{Answered, Boxed, Failed, Granted, GroupStopped, LocalAttachment, ReadData, Share};
use nbd_session::{Query, QueryId};
use nbd_store::{CommandHeader, SessionId, VolumeId, decode_all};
use tokio::sync::mpsc;

use super::HostedShard;
use super::expiry::Presence;
use super::read::{QueryError, Question, runs};
use crate::reply::{Hold, Reply};

/// One session's way into a group of this node. Answers come over the channel it was made with,
/// which has room for all that the session may have under way.
#[derive(Debug)]
pub(crate) struct HostedSession {
    pub(crate) shard: HostedShard,
    pub(crate) volume: VolumeId,
    pub(crate) answers: mpsc::Sender<Answered>,
    /// Keeps the session from expiring.
    _presence: Presence,
}

impl HostedSession {
    /// Of a session that the log has opened.
    pub(crate) fn new(
        shard: HostedShard,
        session: SessionId,
        volume: VolumeId,
        answers: mpsc::Sender<Answered>,
    ) -> Self {
        let presence = shard.attached.enter(session);
        Self { shard, volume, answers, _presence: presence }
    }

    /// Proposes a mutation once the disk has room for it: at once if that is plain, else
    /// [`Answered::Granted`] comes first.
    pub(crate) async fn mutate(
        &self,
        header: &CommandHeader,
        command: Bytes,
        share: Share,
    ) -> Result<(), GroupStopped> {
        let room = &self.shard.hosting.room;
        if let Some(grant) = room.admit_fast(header) {
            return self.propose(Granted { seq: header.seq, command, share, grant }).await;
        }
        let (room, header, answers) = (room.clone(), *header, self.answers.clone());
        let reader = self.shard.group.reader().clone();
        self.shard.hosting.shutdown.spawn(async move {
            let seq = header.seq;
            let answered = match room.look(&reader, &header).await {
                Ok(grant) => Answered::Granted(Granted { seq, command, share, grant }),
                Err(failed) => Answered::Refused { seq, failed },
            };
            // An attachment that was given up needs no answer.
            let _ = answers.try_send(answered);
        });
        Ok(())
    }

    /// Proposes a mutation that room was found for.
    pub(crate) async fn propose(&self, granted: Granted) -> Result<(), GroupStopped> {
        let Granted { seq, command, share, grant } = granted;
        let hold = Hold { _share: share, _grant: grant };
        let reply = Reply::Session { answers: self.answers.clone(), seq, hold };
        self.shard.group.propose(command, reply).await
    }
}

impl LocalAttachment for HostedSession {
    fn mutate(&self, command: Bytes, share: Share) -> Boxed<'_, Result<(), GroupStopped>> {
        let header = header_of(&command);
        Box::pin(async move { self.mutate(&header, command, share).await })
    }

    fn propose(&self, granted: Granted) -> Boxed<'_, Result<(), GroupStopped>> {
        Box::pin(self.propose(granted))
    }

    fn query(&self, id: QueryId, query: Query) {
        let question = Question { shard: self.shard.clone(), volume: self.volume, query };
        let answer = Answer::new(self.answers.clone(), id);
        let Some(permit) = self.shard.group.read_permit() else {
            self.shard.hosting.shutdown.spawn(answer.of(question));
            return;
        };
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || match question.answer_blocking(&permit) {
            Some(data) => answer.send(Answered::Query { id, result: Ok(data) }),
            None => drop(runtime.spawn(answer.of(question))),
        });
    }

    fn try_read(&self, offset: u64, len: u64, holes: bool, data: &mut ReadData) -> bool {
        let Some(permit) = self.shard.group.read_permit() else { return false };
        // What cannot be read is looked at again, by the book, on the blocking pool.
        let Ok(mut plan) = self.shard.group.reader().resolve(self.volume, offset, len) else {
            return false;
        };
        data.bytes.resize(plan.len(), 0);
        if !matches!(plan.try_read_cached(&mut data.bytes), Ok(true)) || !permit.holds() {
            return false;
        }
        data.runs = runs(&plan, holes);
        true
    }

    fn close(self: Box<Self>, command: Bytes) -> Boxed<'static, Result<(), GroupStopped>> {
        Box::pin(async move { self.shard.group.propose(command, Reply::Nobody).await })
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
}

impl Answer {
    fn new(answers: mpsc::Sender<Answered>, id: QueryId) -> Self {
        let failed = Answered::Query { id, result: Err(Failed::Io) };
        Self { answers, answered: Some(failed), id }
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
            // A session that is gone needs no answer; a live one has room for all it waits for.
            let _ = self.answers.try_send(answered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_answered_with_an_error() {
        let (answers, mut answered) = mpsc::channel(1);
        let answer = Answer::new(answers, QueryId(3));
        let work = tokio::task::spawn_blocking(move || {
            let _answer = answer;
            panic!("as the test wants");
        });
        assert!(work.await.is_err());
        let answered = answered.recv().await.unwrap();
        assert!(matches!(answered, Answered::Query { id: QueryId(3), result: Err(Failed::Io) }));
    }
}
