//! Bugs to be planted on purpose, to show that the tests would find them.

use bytes::Bytes;
use nbd_store::SessionId;

/// A rule of the session that is broken on purpose. Without the cargo feature `planted-faults`
/// there are none, so that no release can hold one.
///
/// Two that one would expect are not here. Mutations that are pending together are concurrent: by
/// NBD's rules they may take effect in any order, and to send them again in another one harms
/// nobody. And a resume that keeps the epoch fences nothing off, but each sequence number still
/// takes effect once, whichever copy comes first. It is a fault all the same: a late copy of the
/// opening brings a session back that was closed meanwhile, and with it what its client had left in
/// flight. That takes so much to come about that `ReplayWithoutResume` stands for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers of attachments that were given up are handed on.
    #[cfg(feature = "planted-faults")]
    ForwardStaleReply,
    /// Nothing is resumed: each attachment is a session of its own, over which everything pending
    /// is sent as if for the first time. What earlier ones have sent is neither fenced off nor
    /// known by its number.
    #[cfg(feature = "planted-faults")]
    ReplayWithoutResume,
    /// What is pending is sent again in the opposite order, and numbered in that order: a mutation
    /// that was never applied may get the number of one that was, and is answered without effect,
    /// while the other is applied once more.
    #[cfg(feature = "planted-faults")]
    ReplayReordered,
    /// A read of which a part is here is asked from its beginning again, and what comes is taken
    /// for the rest.
    #[cfg(feature = "planted-faults")]
    PartialReadRestarted,
}

/// The fault planted in a session, if any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults(pub(crate) Option<Fault>);

macro_rules! faults {
    ($($name:ident: $fault:ident),*) => {
        impl Faults {$(
            pub(crate) const fn $name(self) -> bool {
                #[cfg(feature = "planted-faults")]
                return matches!(self.0, Some(Fault::$fault));
                #[cfg(not(feature = "planted-faults"))]
                return false;
            }
        )*}
    };
}
faults!(
    forwards_stale_replies: ForwardStaleReply,
    begins_anew: ReplayWithoutResume,
    reorders_replay: ReplayReordered,
    restarts_reads: PartialReadRestarted
);

impl Faults {
    /// A command as it is sent: as it is, unless a fault has changed its session or its number.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn stamped(self, command: Bytes, session: SessionId, seq: u64) -> Bytes {
        match self.0 {
            Some(Fault::ReplayWithoutResume | Fault::ReplayReordered) => {
                crate::command::with_identity(command, session, seq)
            }
            _ => command,
        }
    }

    /// A command as it is sent: as it is.
    #[cfg(not(feature = "planted-faults"))]
    pub(crate) fn stamped(self, command: Bytes, _session: SessionId, _seq: u64) -> Bytes {
        command
    }
}
