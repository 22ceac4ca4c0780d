//! Mistakes that can be switched on one by one, to see whether the tests notice.

use crate::config::GroupConfig;

/// A mistake, for `GroupConfig::fault`. Without the feature `planted-faults` none can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(feature = "planted-faults"), allow(unreachable_pub))]
pub enum Fault {
    /// Votes, its own among them, leave before they are on stable storage.
    VoteBeforePersist,
    /// Votes are given right after a restart.
    NoWaitAfterRestart,
    /// A broken connection to the leader is taken for a proof of its death.
    VoteInsideLease,
    /// A lease is counted from the arrival of the answers, and lasts a whole election timeout.
    LeaseOverlong,
    /// Acknowledgements of entries leave before the entries are on stable storage.
    AppendAckBeforePersist,
}

impl GroupConfig {
    /// Whether this mistake is to be made.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn makes(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    /// Whether this mistake is to be made: never.
    #[cfg(not(feature = "planted-faults"))]
    pub(crate) const fn makes(&self, _fault: Fault) -> bool {
        false
    }
}
