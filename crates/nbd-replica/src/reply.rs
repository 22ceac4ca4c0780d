//! Whom to tell what came of something.

use std::sync::Arc;

use nbd_proto::NbdError;
use nbd_shard::Answer;
use nbd_store::SpaceGrant;
use tokio::sync::{mpsc, oneshot};

use crate::budget::BytePermit;
use crate::nbd::Completion;

/// What a mutation holds until it is applied: bytes of the budget and room on the disk.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) _permit: Option<BytePermit>,
    pub(crate) _grant: SpaceGrant,
}

/// Whom to tell.
#[derive(Debug)]
pub(crate) enum Reply {
    /// A session, by the number it gave the command's request.
    Session { completions: mpsc::Sender<Completion>, token: usize, hold: Arc<Hold> },
    /// One waiting caller.
    Once(oneshot::Sender<Answer>),
    /// Nobody.
    Nobody,
}

impl Reply {
    pub(crate) fn send(self, answer: Answer) {
        match self {
            Self::Session { completions, token, hold } => {
                drop(hold);
                let completion = match answer {
                    Answer::Outcome(outcome) => Completion::Mutation { token, outcome },
                    _ => Completion::Refused { token, error: NbdError::Io },
                };
                let _ = completions.try_send(completion);
            }
            Self::Once(reply) => {
                let _ = reply.send(answer);
            }
            Self::Nobody => {}
        }
    }
}
