//! Whom to tell what came of a command.

use nbd_front::{Answered, Share};
use nbd_store::SpaceGrant;
use tokio::sync::{mpsc, oneshot};

use crate::group_task::Answer;

/// What a mutation holds until it is applied or given up, even if whoever sent it is gone by then:
/// its request's bytes of the budget, and room on the disk.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) _share: Share,
    pub(crate) _grant: SpaceGrant,
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

impl Reply {
    /// Gives the answer. Who is gone needs none.
    pub(crate) fn send(self, answer: Answer) {
        match self {
            Self::Session { answers, seq, hold } => {
                drop(hold);
                let answered = match answer {
                    Answer::Outcome(outcome) => Answered::Mutation { seq, outcome },
                    // Whoever proposed it has to ask the next leader.
                    _ => Answered::Lost,
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
