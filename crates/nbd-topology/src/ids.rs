//! Identities and counters, each a type of its own so that one cannot be passed for another.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// One hash slot of the cluster, served by one Raft group. Ranges from 0 to the shard count less
/// one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u32);

/// One member of a Raft group. Never 0 (Raft's "nobody") and never reused, least of all after a
/// wiped disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub NonZeroU64);

/// Place of an entry in a group's log. The first entry has index 1; 0 is "before the first".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogIndex(pub u64);

/// A Raft term. 0 is "before the first election".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(pub u64);

impl LogIndex {
    /// Before the first entry.
    pub const ZERO: Self = Self(0);

    /// The index that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Term {
    /// Before the first election.
    pub const ZERO: Self = Self(0);
}

impl ReplicaId {
    /// The id with this number, or `None` for 0.
    #[must_use]
    pub const fn new(id: u64) -> Option<Self> {
        match NonZeroU64::new(id) {
            Some(id) => Some(Self(id)),
            None => None,
        }
    }

    /// The number, as Raft carries it.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

macro_rules! display_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_number!(ShardId, ReplicaId, LogIndex, Term);

/// Longest cluster or node name, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// A cluster or node name that is not 1 to [`NAME_BYTES_MAX`] characters of `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a valid name: use 1 to {NAME_BYTES_MAX} characters of A-Z a-z 0-9 . _ -")]
pub struct InvalidName(pub String);

fn check_name(name: &str) -> Result<(), InvalidName> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(InvalidName(name.to_owned()));
    }
    Ok(())
}

/// Name of a cluster, the same in all its processes and in every data directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

/// Name of a node: one `nbd-replica` process and its data directory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

macro_rules! checked_name {
    ($($name:ident),*) => {$(
        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(name: &str) -> Result<Self, InvalidName> {
                check_name(name)?;
                Ok(Self(name.to_owned()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
checked_name!(ClusterName, NodeName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!("nbd-1-1".parse::<NodeName>().unwrap().as_str(), "nbd-1-1");
        for bad in ["", "a b", "a/b", "é", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert_eq!(bad.parse::<ClusterName>(), Err(InvalidName(bad.to_owned())));
        }
    }

    #[test]
    fn nobody_is_not_a_replica() {
        assert_eq!(ReplicaId::new(0), None);
        assert_eq!(ReplicaId::new(7).unwrap().get(), 7);
    }
}
