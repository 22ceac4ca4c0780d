//! An attachment to the leader's replica in this process: straight to the group and its store.

use std::sync::Arc;

use bytes::Bytes;
use nbd_session::{Query, QueryId};
use nbd_store::{CommandHeader, SpaceGrant, VolumeId};
use tokio::sync::mpsc;

use super::expiry::Presence;
use super::read::{QueryError, Question};
use super::{Answered, Failed, ShardClient};
use crate::budget::BytePermit;
use crate::group_task::GroupStopped;
use crate::reply::{Hold, Reply};

/// What a mutation needs besides its command; goes with it until it is applied.
pub(crate) type Share = Option<Arc<BytePermit>>;

/// One session's way into a group of this node. Answers come over the channel it was made with,
/// which has room for all that the session may have under way.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) shard: ShardClient,
    pub(crate) volume: VolumeId,
    pub(crate) answers: mpsc::Sender<Answered>,
    /// Keeps the session from expiring.
    pub(crate) _presence: Arc<Presence>,
}

impl Local {
    /// Proposes a mutation once the disk has room for it: at once if that is plain, else
    /// [`Answered::Granted`] comes first.
    pub(crate) async fn mutate(
        &self,
        header: &CommandHeader,
        command: Bytes,
        share: Share,
    ) -> Result<(), GroupStopped> {
        let room = &self.shard.access.room;
        if let Some(grant) = room.admit_fast(header) {
            return self.propose(header.seq, command, share, grant).await;
        }
        let (room, header, answers) = (room.clone(), *header, self.answers.clone());
        let reader = self.shard.group.reader().clone();
        self.shard.access.shutdown.spawn(async move {
            let seq = header.seq;
            let answered = match room.look(&reader, &header).await {
                Ok(grant) => Answered::Granted { seq, command, share, grant },
                Err(failed) => Answered::Refused { seq, failed },
            };
            // An attachment that was given up needs no answer.
            let _ = answers.try_send(answered);
        });
        Ok(())
    }

    /// Proposes a mutation that room was found for.
    pub(crate) async fn propose(
        &self,
        seq: u64,
        command: Bytes,
        share: Share,
        grant: SpaceGrant,
    ) -> Result<(), GroupStopped> {
        let hold = Hold { _share: share, _grant: grant };
        let reply = Reply::Session { answers: self.answers.clone(), seq, hold };
        self.shard.group.propose(command, reply).await
    }

    /// Answers a query on the blocking pool.
    pub(crate) fn query(&self, id: QueryId, query: Query) {
        let question = Question { shard: self.shard.clone(), volume: self.volume, query };
        let answer = Answer::new(self.answers.clone(), id);
        let Some(permit) = self.shard.group.read_permit() else {
            self.shard.access.shutdown.spawn(answer.of(question));
            return;
        };
        let runtime = tokio::runtime::Handle::current();
        tokio::task::spawn_blocking(move || match question.answer_blocking(&permit) {
            Some(data) => answer.send(Answered::Query { id, result: Ok(data) }),
            None => drop(runtime.spawn(answer.of(question))),
        });
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
