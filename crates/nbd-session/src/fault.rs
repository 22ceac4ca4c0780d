//! Bugs to be planted on purpose, to show that the tests would find them.

/// A rule of the session that is broken on purpose. Without the cargo feature `planted-faults`
/// there are none, so that no release can hold one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Answers of attachments that were given up are handed on.
    #[cfg(feature = "planted-faults")]
    ForwardStaleReply,
}

/// The fault planted in a session, if any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults(pub(crate) Option<Fault>);

impl Faults {
    pub(crate) const fn forwards_stale_replies(self) -> bool {
        #[cfg(feature = "planted-faults")]
        return matches!(self.0, Some(Fault::ForwardStaleReply));
        #[cfg(not(feature = "planted-faults"))]
        return false;
    }
}
