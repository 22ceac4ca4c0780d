//! Whom to tell what came of a command.

use std::time::Instant;

use nbd_consensus::Timestamp;
use nbd_front::{Answered, Share};
use nbd_service::trace::Span;
use nbd_store::{Outcome, SpaceGrant};
use tokio::sync::{mpsc, oneshot};

use crate::group_task::Answer;
use crate::hosted::Underway;

/// What a mutation holds until it is applied or given up, even if whoever sent it is gone by then:
/// its request's bytes of the budget, and room on the disk; and that it is counted as pending.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) _share: Share,
    pub(crate) _grant: SpaceGrant,
    pub(crate) underway: Underway,
    /// Bytes that it writes.
    pub(crate) bytes: u64,
    /// The leader's part of its trace, if it is traced.
    pub(crate) trace: Option<Span>,
}

/// Whom to tell.
#[derive(Debug)]
pub(crate) enum Reply {
    /// The attachment that a mutation came over, by its sequence number. The channel has room for
    /// all that an attachment may have under way.
    Session { answers: mpsc::Sender<Answered>, seq: u64, hold: Hold },
    /// One waiting caller.
    Once(oneshot::Sender<Answer>),
    /// Nobody.
    Nobody,
}

/// The last part of a trace at the leader: the way back of an answer.
#[cold]
fn on_its_way(mut span: Span, outcome: &Outcome) -> Span {
    if let Outcome::Rejected(rejection) = outcome {
        span.error(rejection.to_string());
    }
    span.into_last_child("reply")
}

impl Reply {
    /// When a session's mutation came.
    pub(crate) const fn arrived(&self) -> Option<Timestamp> {
        match self {
            Self::Session { hold, .. } => Some(hold.underway.arrived()),
            _ => None,
        }
    }

    /// The leader's part of the trace, of a mutation that is traced.
    pub(crate) const fn trace(&self) -> Option<(&Span, &Underway)> {
        match self {
            Self::Session { hold: Hold { trace: Some(span), underway, .. }, .. } => {
                Some((span, underway))
            }
            _ => None,
        }
    }

    /// Gives the answer, which came at `now`, by the two clocks. Who is gone needs none.
    pub(crate) fn send(self, answer: Answer, (now, given): (Timestamp, Instant)) {
        match self {
            Self::Session { answers, seq, hold } => {
                let Hold { underway, bytes, trace, .. } = hold;
                if matches!(answer, Answer::Outcome(Outcome::Done)) {
                    underway.written(bytes, now);
                }
                let answered = match answer {
                    Answer::Outcome(outcome) => {
                        let trace = trace.map(|span| on_its_way(span, &outcome));
                        Answered::Mutation { seq, outcome, trace, given: Some(given) }
                    }
                    // Whoever proposed it has to ask the next leader.
                    _ => {
                        if let Some(mut span) = trace {
                            span.error("leadership was lost");
                        }
                        Answered::Lost
                    }
                };
                let _ = answers.try_send(answered);
            }
            Self::Once(reply) => {
                let _ = reply.send(answer);
            }
            Self::Nobody => {}
        }
    }
}
