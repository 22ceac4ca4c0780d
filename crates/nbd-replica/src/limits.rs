//! The bounds of the replica service beside those of its front end ([`nbd_front::limits`]).

/// Proposals waiting for a group to take them in. Behind it, connections wait with theirs.
pub(crate) const GROUP_MAILBOX_MAX: usize = 1024;

/// What the node tells a group (messages of peers, most of all) and it has not taken in. Past it
/// messages are dropped, as if the network had lost them. 4096: a leader's whole window for one
/// follower many times over, and no more than a few MiB of small ones; messages with entries are
/// bounded by what the leader sends ahead.
pub(crate) const GROUP_CONTROL_MAX: usize = 4096;

/// Jobs waiting for the log thread, over all groups of the node. Each group has at most
/// [`nbd_shard::limits::APPENDS_OUTSTANDING_MAX`]; a node hosts at most a few dozen that are busy.
pub(crate) const LOG_QUEUE_MAX: usize = 65_536;

/// Bytes of entries the log thread joins into one durable write.
pub(crate) const LOG_BATCH_BYTES_MAX: usize = 4 << 20;

/// Times a write that found no room waits for a checkpoint to show whether there is some.
pub(crate) const SPACE_ATTEMPTS_MAX: usize = 3;
