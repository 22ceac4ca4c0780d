//! Rules broken on purpose, to show that the checkers can see.

/// A rule that a world breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// One of consensus.
    #[cfg(feature = "planted-faults")]
    Consensus(nbd_consensus::Fault),
    /// One of the store.
    #[cfg(feature = "planted-faults")]
    Store(nbd_store::StoreFault),
    /// One of the session.
    #[cfg(feature = "planted-faults")]
    Session(nbd_session::Fault),
    /// The lease is not looked at again once the bytes were read.
    #[cfg(feature = "planted-faults")]
    LeaseNotCheckedAfterRead,
    /// Entries count as persisted before their payloads have left the disk's own cache.
    #[cfg(feature = "planted-faults")]
    PersistedWithoutPayload,
}

macro_rules! planted {
    ($($name:ident: $pattern:pat => $value:expr, $type:ty, $otherwise:expr;)*) => {
        impl Plant {$(
            pub(crate) const fn $name(self) -> $type {
                #[cfg(feature = "planted-faults")]
                if let $pattern = self {
                    return $value;
                }
                _ = self;
                $otherwise
            }
        )*}
    };
}
planted! {
    store: Self::Store(fault) => Some(fault), Option<nbd_store::StoreFault>, None;
    session: Self::Session(fault) => Some(fault), Option<nbd_session::Fault>, None;
    skips_second_look: Self::LeaseNotCheckedAfterRead => true, bool, false;
    disk_lies: Self::PersistedWithoutPayload => true, bool, false;
}
