//! The client side of a session: every request takes effect once and is answered once, over any
//! number of attachments. A read that is partly answered is continued by the next attachment.
//!
//! A session is attached to the leader of its volume's shard, and attached anew, with a higher
//! epoch, whenever that leader may be gone. What was sent and not answered is kept and sent again.
//! The shard's log decides what that means: it has fenced off everything of older epochs by then,
//! and answers what it had applied already from the session's result window.
//!
//! ```text
//!             begin_attach                      attached
//!  Detached ───────────────▶ Attaching(epoch) ───────────▶ Attached(epoch)
//!     ▲                          │   ▲                       │   │
//!     └────────attach_failed─────┘   └──────begin_attach─────┘   │
//!     └───────────────detached, an answer that says so───────────┘
//!  Gone: the log does not know the session (any more); nothing leads out of it
//! ```
//!
//! Pure: whoever owns a [`ClientSession`] carries the attempts, the commands and the answers, and
//! decides when an attachment has failed.
//!
//! - [`session`]: [`ClientSession`], the state machine.
//! - [`command`]: [`with_epoch`], a command as it is sent by a later attachment.
//! - [`fault`]: bugs to be planted on purpose.

pub mod command;
pub mod fault;
pub mod session;

pub use command::with_epoch;
pub use fault::Fault;
pub use session::{Attachment, ClientSession, Piece, Query, QueryId, Resend, Verdict};
