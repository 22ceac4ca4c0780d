//! Clients that go on in another process: from here, or to here.
//!
//! A session is handed over between two requests. Its task stops reading, lets everything under way
//! be answered and the answers be sent, and then offers the client's socket, together with what
//! the other process must know ([`Parcel`](parcel)). Since nothing of the session is pending,
//! nothing can be lost, doubled or answered twice: the other process resumes the session in the
//! log with a higher epoch, and numbers its mutations from where this one stopped.
//!
//! ```text
//!            turn                 all answered and sent          taken
//!  Staying ─────▶ Due (reads no  ───────────────────────▶ Offer ──────▶ gone; the socket is closed
//!     ▲           more requests)                            │            here without a goodbye
//!     │                 │ not within QUIESCE_MAX            │ kept
//!     └── Resting ◀─────┘ ◀─────────────────────────────────┘
//! ```
//!
//! A session whose shard has no majority cannot come to that point: it goes on here, and is tried
//! again until this process ends it. So does one whose client leaves its replies unread. (One that
//! is not attached and has requests pending does not even wait for the end of its turn: sessions of
//! other shards need it.)
//!
//! **Safety.** At any time one process owns the client. It changes with the answer to the offer:
//! this process neither reads nor writes the socket from the offer on; the other does neither
//! before it has said that it takes it. Whoever carries offers (not this module) answers "kept"
//! only if it is certain that the other has not taken it and never will; as long as that is open,
//! the session waits. An offer that is dropped unanswered ends the session here without a word to
//! the client, which may be the other's by then.
//!
//! - [`departure`]: the session's side. [`parcel`]: what is told. [`adopt`]: the other process.
//! - This file: [`Handover`], which begins it.

mod adopt;
pub(super) mod departure;
mod parcel;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use nbd_service::Shutdown;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use adopt::{Adopted, Adopter, NotAdopted};
pub use parcel::{MalformedParcel, PARCEL_BYTES_MAX};
pub(super) use parcel::{Parcel, UNREAD_BYTES_MAX};

/// Sessions that stop reading at the same time in order to be handed over. One costs its client a
/// pause of some milliseconds, most of it for the resume in the log; were all to stop at once, the
/// last of thousands would wait for all others.
const DEPARTURES_AT_ONCE: usize = 32;

/// Hands the sessions of a process over. Clones are the same handover; it begins once at most.
#[derive(Debug, Clone)]
pub struct Handover {
    /// Cancelled when it begins, and with the process's shutdown: one thing to watch for sessions.
    stir: CancellationToken,
    offers: Arc<OnceLock<mpsc::Sender<Offer>>>,
    turns: Arc<Semaphore>,
}

/// A session that asks to be taken over.
#[derive(Debug)]
pub struct Offer {
    parcel: Bytes,
    socket: OwnedFd,
    answer: oneshot::Sender<Answer>,
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// The session is the other process's.
    Taken,
    /// The session stays here.
    Kept,
}

impl Handover {
    /// Not begun.
    pub(super) fn new(shutdown: &Shutdown) -> Self {
        Self {
            stir: shutdown.token().child_token(),
            offers: Arc::default(),
            turns: Arc::new(Semaphore::new(DEPARTURES_AT_ONCE)),
        }
    }

    /// Begins: from now on each session, also of clients that have yet to attach, offers itself as
    /// soon as it can. `None` if it has begun before.
    ///
    /// Every offer is to be answered. Once the receiver is closed, sessions stay.
    #[must_use]
    pub fn begin(&self) -> Option<mpsc::Receiver<Offer>> {
        let (sender, offers) = mpsc::channel(1);
        self.offers.set(sender).ok()?;
        self.stir.cancel();
        Some(offers)
    }
}

impl Offer {
    /// What the other process has to be told.
    #[must_use]
    pub fn parcel(&self) -> &[u8] {
        &self.parcel
    }

    /// The client's socket.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The other process has taken it.
    pub fn taken(self) {
        let _ = self.answer.send(Answer::Taken);
    }

    /// The other process has not taken it and never will.
    pub fn kept(self) {
        let _ = self.answer.send(Answer::Kept);
    }
}
