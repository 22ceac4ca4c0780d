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

#[cfg(feature = "planted-faults")]
impl Plant {
    /// Every rule that can be broken, by name.
    pub const ALL: [(&'static str, Self); 19] = {
        use nbd_consensus::Fault as Consensus;
        use nbd_session::Fault as Session;
        use nbd_store::StoreFault as Store;
        [
            ("vote-before-persist", Self::Consensus(Consensus::VoteBeforePersist)),
            ("no-wait-after-restart", Self::Consensus(Consensus::NoWaitAfterRestart)),
            ("vote-inside-lease", Self::Consensus(Consensus::VoteInsideLease)),
            ("lease-overlong", Self::Consensus(Consensus::LeaseOverlong)),
            ("ack-before-persist", Self::Consensus(Consensus::AppendAckBeforePersist)),
            ("epoch-at-admission-only", Self::Store(Store::EpochAtAdmissionOnly)),
            ("no-result-window", Self::Store(Store::NoResultWindow)),
            ("slot-reused-early", Self::Store(Store::SlotReusedEarly)),
            ("log-freed-before-sync", Self::Store(Store::LogFreedBeforeSync)),
            ("partial-block-in-place", Self::Store(Store::PartialBlockInPlace)),
            ("overtaken-transfer-taken", Self::Store(Store::OvertakenTransferTaken)),
            ("deleted-chunks-kept", Self::Store(Store::DeletedChunksKept)),
            ("shrunk-bytes-kept", Self::Store(Store::ShrunkBytesKept)),
            ("stale-reply-forwarded", Self::Session(Session::ForwardStaleReply)),
            ("replay-without-resume", Self::Session(Session::ReplayWithoutResume)),
            ("replay-reordered", Self::Session(Session::ReplayReordered)),
            ("partial-read-restarted", Self::Session(Session::PartialReadRestarted)),
            ("lease-not-checked-after-read", Self::LeaseNotCheckedAfterRead),
            ("persisted-without-payload", Self::PersistedWithoutPayload),
        ]
    };
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
    forwards_stale_replies:
        Self::Session(nbd_session::Fault::ForwardStaleReply) => true, bool, false;
    skips_second_look: Self::LeaseNotCheckedAfterRead => true, bool, false;
    disk_lies: Self::PersistedWithoutPayload => true, bool, false;
}
