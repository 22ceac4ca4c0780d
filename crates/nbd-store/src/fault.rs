//! Bugs to be planted on purpose, to show that the tests would find them.

/// A rule of the store that is broken on purpose. Without the cargo feature `planted-faults` there
/// are none, so that no release can hold one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// Applying takes mutations of an older epoch.
    #[cfg(feature = "planted-faults")]
    EpochAtAdmissionOnly,
    /// Applying takes a sequence number again that was applied before.
    #[cfg(feature = "planted-faults")]
    NoResultWindow,
    /// A slot that a transaction leaves is given out before that transaction is durable.
    #[cfg(feature = "planted-faults")]
    SlotReusedEarly,
    /// Log segments are freed before what they hold is durable at home.
    #[cfg(feature = "planted-faults")]
    LogFreedBeforeSync,
    /// A block of which a part was overwritten goes home in place.
    #[cfg(feature = "planted-faults")]
    PartialBlockInPlace,
    /// What a source said before the log went on is taken all the same.
    #[cfg(feature = "planted-faults")]
    OvertakenTransferTaken,
    /// What a volume held stays at home when it is deleted.
    #[cfg(feature = "planted-faults")]
    DeletedChunksKept,
    /// What is cut off when a volume shrinks is there again when it grows.
    #[cfg(feature = "planted-faults")]
    ShrunkBytesKept,
}

/// The fault planted in a store, if any.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults(pub(crate) Option<StoreFault>);

macro_rules! faults {
    ($($name:ident: $fault:ident),*) => {
        impl Faults {$(
            pub(crate) const fn $name(self) -> bool {
                #[cfg(feature = "planted-faults")]
                return matches!(self.0, Some(StoreFault::$fault));
                #[cfg(not(feature = "planted-faults"))]
                return false;
            }
        )*}
    };
}
faults!(
    takes_old_epochs: EpochAtAdmissionOnly,
    applies_again: NoResultWindow,
    reuses_slots_early: SlotReusedEarly,
    frees_log_early: LogFreedBeforeSync,
    splits_in_place: PartialBlockInPlace,
    takes_overtaken: OvertakenTransferTaken,
    keeps_deleted_chunks: DeletedChunksKept,
    keeps_what_is_cut_off: ShrunkBytesKept
);
