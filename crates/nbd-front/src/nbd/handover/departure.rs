//! A session on its way to another process, as its task sees it.

use std::future::Future;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::super::Front;
use super::{Answer, Handover, Offer, Parcel};

/// Time in which everything under way must be answered and sent once a session has its turn.
/// Longer than a failover takes; a shard that has no majority does not answer at all.
const QUIESCE_MAX: Duration = Duration::from_secs(2);

/// Time for which a session that could not be handed over serves its client before the next try.
/// Short beside any drain deadline that is of use, longer than [`QUIESCE_MAX`], in which a client
/// may have waited for nothing.
const RESTING: Duration = Duration::from_secs(3);

type Turn = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

/// Where one session stands.
pub(in super::super) struct Departure {
    handover: Handover,
    state: State,
}

enum State {
    /// Nobody takes sessions over, as far as this one knows.
    Staying,
    Queued(Turn),
    /// No further request is read until it is offered, or `until` has passed.
    Due {
        turn: OwnedSemaphorePermit,
        until: Instant,
    },
    Resting {
        until: Instant,
    },
    /// It ends here.
    Settled,
}

/// What became of a session that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Departed {
    /// It stays: go on as if nothing had been.
    Stayed,
    /// The client is not ours any more: leave its socket and its session alone.
    Gone,
}

impl Departure {
    pub(in super::super) fn new(front: &Front) -> Self {
        Self { handover: front.handover.clone(), state: State::Staying }
    }

    /// Whether [`news`](Self::news) tells of a shutdown too, so that there is no need to watch for
    /// it. (Most sessions never see either: for them the two cost as much as one.)
    pub(in super::super) const fn watches_shutdown(&self) -> bool {
        matches!(self.state, State::Staying)
    }

    /// Whether the session is to come to a point where it can be offered.
    pub(in super::super) const fn is_due(&self) -> bool {
        matches!(self.state, State::Due { .. })
    }

    /// Waits until something has changed. May be dropped at any time.
    pub(in super::super) async fn news(&mut self) {
        match &mut self.state {
            State::Staying => {
                self.handover.stir.cancelled().await;
                self.queue();
            }
            State::Queued(turn) => {
                let turn = turn.await;
                self.state = turn.map_or(State::Settled, |turn| State::Due {
                    turn,
                    until: Instant::now() + QUIESCE_MAX,
                });
            }
            State::Due { until, .. } => {
                tokio::time::sleep_until(*until).await;
                debug!(within = ?QUIESCE_MAX, "not handed over yet: not everything is answered");
                self.pass();
            }
            State::Resting { until } => {
                tokio::time::sleep_until(*until).await;
                self.queue();
            }
            State::Settled => std::future::pending().await,
        }
    }

    /// Joins those who wait for their turn. If no handover has begun, it is the process that ends.
    fn queue(&mut self) {
        let turns = std::sync::Arc::clone(&self.handover.turns);
        self.state = match self.handover.offers.get() {
            Some(_) => State::Queued(Box::pin(async move { turns.acquire_owned().await.ok() })),
            None => State::Settled,
        };
    }

    /// Gives its turn to others: it cannot be handed over now.
    pub(in super::super) fn pass(&mut self) {
        self.state = State::Resting { until: Instant::now() + RESTING };
    }

    /// Offers the session, of which nothing is under way. Not to be dropped halfway.
    pub(in super::super) async fn offer(
        &mut self,
        stream: &TcpStream,
        parcel: &Parcel,
    ) -> Departed {
        let State::Due { turn, .. } = std::mem::replace(&mut self.state, State::Settled) else {
            return Departed::Stayed;
        };
        let Some(offers) = self.handover.offers.get() else { return Departed::Stayed };
        let socket = match stream.as_fd().try_clone_to_owned() {
            Ok(socket) => socket,
            Err(error) => {
                debug!(%error, "cannot be handed over");
                self.pass();
                return Departed::Stayed;
            }
        };
        let (answer, answered) = oneshot::channel();
        let offer = Offer { parcel: parcel.encode(), socket, answer };
        if offers.send(offer).await.is_err() {
            return Departed::Stayed;
        }
        let answer = answered.await;
        drop(turn);
        match answer {
            Ok(Answer::Taken) => Departed::Gone,
            Ok(Answer::Kept) => {
                self.pass();
                Departed::Stayed
            }
            Err(_) => {
                warn!("whether the session was handed over is not known: it is left alone");
                Departed::Gone
            }
        }
    }
}
