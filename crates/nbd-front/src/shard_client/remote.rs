//! An attachment to a leader on another node: one gRPC stream.

use nbd_rpc::{Refusal, reason, v1};
use nbd_session::{Query, QueryId};
use nbd_store::{Epoch, Outcome, Rejection, SessionId, VolumeId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Streaming;
use tracing::{debug, warn};

use super::session::AttachError;
use super::{Answered, QueryData, ShardClient, wire};
use crate::limits::{MUTATIONS_IN_FLIGHT_MAX, REQUESTS_IN_FLIGHT_MAX};
use crate::route::LeaderAt;

/// Requests that wait to be sent: all that a session may have under way, and the hello.
const REQUESTS_MAX: usize = MUTATIONS_IN_FLIGHT_MAX + REQUESTS_IN_FLIGHT_MAX + 1;

/// Answers that wait for their session; behind them the stream waits, and then the leader.
const ANSWERS_MAX: usize = 16;

/// One session's stream. Dropping it ends the stream.
#[derive(Debug)]
pub(super) struct Remote {
    requests: mpsc::Sender<v1::AttachRequest>,
    _pump: AbortOnDropHandle<()>,
}

/// Opens or resumes a session at `leader`.
pub(super) async fn attach(
    shard: ShardClient,
    leader: LeaderAt,
    session: SessionId,
    epoch: Epoch,
    volume: VolumeId,
) -> Result<(Remote, mpsc::Receiver<Answered>), AttachError> {
    use v1::attach_verdict::Verdict;
    let access = &shard.access;
    let mut client = access.links.client(&leader.grpc).map_err(|error| {
        warn!(node = %leader.node, %error, "a leader cannot be reached");
        AttachError::Elsewhere
    })?;
    let hello = v1::AttachHello {
        target: Some(wire::target(access, shard.shard)),
        session: session.0.to_le_bytes().to_vec().into(),
        epoch: epoch.0,
        volume: volume.0,
        owner_node: access.owner.node,
        owner_incarnation: access.owner.incarnation,
    };
    let (requests, outgoing) = mpsc::channel(REQUESTS_MAX);
    let hello = v1::attach_request::Message::Hello(hello);
    let _ = requests.try_send(v1::AttachRequest { message: Some(hello) });
    let failed = |status: tonic::Status| {
        debug!(node = %leader.node, reason = %reason(&status), "a leader cannot be asked");
        AttachError::Elsewhere
    };
    let stream = client.attach(ReceiverStream::new(outgoing)).await.map_err(failed)?;
    let mut stream = stream.into_inner();
    let first = stream.message().await.map_err(failed)?;
    let Some(v1::attach_reply::Message::Verdict(verdict)) = first.and_then(|reply| reply.message)
    else {
        return Err(AttachError::Elsewhere);
    };
    match verdict.verdict {
        Some(Verdict::Attached(_)) => {}
        Some(Verdict::Rejected(rejection)) => {
            let rejection = wire::rejection_from(rejection).unwrap_or(Rejection::BadCommand);
            return Err(AttachError::Rejected(rejection));
        }
        Some(Verdict::NotLeader(_) | Verdict::Lost(_)) | None => {
            return Err(AttachError::Elsewhere);
        }
    }
    let (answers, receiver) = mpsc::channel(ANSWERS_MAX);
    let pump = tokio::spawn(pump(stream, answers, leader));
    Ok((Remote { requests, _pump: AbortOnDropHandle::new(pump) }, receiver))
}

impl Remote {
    pub(super) fn mutate(&self, command: bytes::Bytes) {
        let mutation = v1::AttachMutation { command };
        self.send(v1::attach_request::Message::Mutation(mutation));
    }

    pub(super) fn query(&self, id: QueryId, query: Query) {
        let id = id.0;
        self.send(match query {
            Query::Read { offset, len, holes } => {
                let read = v1::AttachRead { id, offset, length: len, holes };
                v1::attach_request::Message::Read(read)
            }
            Query::BlockStatus { offset, len, extents_max } => {
                let status = v1::AttachStatus { id, offset, length: len, extents_max };
                v1::attach_request::Message::Status(status)
            }
        });
    }

    fn send(&self, message: v1::attach_request::Message) {
        // There is room for all that can be under way; a stream that has ended says so by itself.
        let _ = self.requests.try_send(v1::AttachRequest { message: Some(message) });
    }
}

/// Carries a leader's answers to the session. Ends with the stream.
async fn pump(
    mut stream: Streaming<v1::AttachReply>,
    answers: mpsc::Sender<Answered>,
    leader: LeaderAt,
) {
    let lost = loop {
        let reply = match stream.message().await {
            Ok(Some(reply)) => reply,
            Ok(None) => break "the stream ended".to_owned(),
            Err(status) => break reason(&status),
        };
        match answered(reply) {
            Ok(answered) => {
                if answers.send(answered).await.is_err() {
                    return;
                }
            }
            Err(refusal) => break refusal.to_string(),
        }
    };
    debug!(node = %leader.node, reason = %lost, "an attachment is lost");
    let _ = answers.send(Answered::Lost).await;
}

fn answered(reply: v1::AttachReply) -> Result<Answered, Refusal> {
    use v1::attach_reply::Message;
    Ok(match reply.message {
        Some(Message::Mutation(answer)) => mutation_answered(&answer)?,
        Some(Message::Read(piece)) => {
            let id = QueryId(piece.id);
            match wire::failed_from(piece.failed) {
                Some(failed) => Answered::Query { id, result: Err(failed) },
                None => Answered::Piece { id, piece: wire::piece_from(&piece)? },
            }
        }
        Some(Message::Status(status)) => {
            let result = match wire::failed_from(status.failed) {
                Some(failed) => Err(failed),
                None if status.extents.is_empty() => {
                    return Err(wire::malformed("a block status of nothing"));
                }
                None => {
                    let extents = status.extents.iter().map(wire::extent_from).collect();
                    Ok(QueryData::Extents(extents))
                }
            };
            Answered::Query { id: QueryId(status.id), result }
        }
        Some(Message::Verdict(_)) | None => {
            return Err(wire::malformed("an answer that is none"));
        }
    })
}

fn mutation_answered(answer: &v1::AttachMutationAnswer) -> Result<Answered, Refusal> {
    use v1::attach_mutation_answer::Answer as Wire;
    let seq = answer.seq;
    let outcome = match answer.answer {
        Some(Wire::Done(_)) => Outcome::Done,
        Some(Wire::Rejected(rejection)) => Outcome::Rejected(
            wire::rejection_from(rejection).ok_or(wire::malformed("an unknown rejection"))?,
        ),
        Some(Wire::Failed(failed)) => {
            let failed =
                wire::failed_from(failed).ok_or(wire::malformed("a failure that is none"))?;
            return Ok(Answered::Refused { seq, failed });
        }
        None => return Err(wire::malformed("an answer that is none")),
    };
    Ok(Answered::Mutation { seq, outcome })
}
