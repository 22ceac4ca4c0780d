//! Every bound of the replica service in one place. A client past a bound is not served less
//! correctly: the replica stops reading from it until there is room.

use std::time::Duration;

/// Requests of one connection that may be under way at once. 128 is what the Linux client keeps in
/// flight by default; fio and qemu stay below. More would only queue in the replica instead of in
/// the client.
pub(crate) const REQUESTS_IN_FLIGHT_MAX: usize = 128;

/// Mutations of one connection that may be under way at once: a client's write becomes one mutation
/// a MiB, at most 33 for the largest. Equal to the session's result window, past which the state
/// machine could no longer tell a repeated mutation from a new one.
pub(crate) const MUTATIONS_IN_FLIGHT_MAX: usize = 256;

/// Bytes of replies, and of reads under way, that may wait for one connection's client to take
/// them. Past it the replica decodes no further request of that client. One maximal read (32 MiB)
/// may always be under way. 2 MiB keeps a client busy that reads 1 MiB at a time.
pub(crate) const OUTPUT_BYTES_MAX: usize = 2 << 20;

/// Bytes asked of a socket in one read while looking for request headers. 64 KiB holds 15 writes of
/// 4 KiB; larger payloads are read straight into their own buffers.
pub(crate) const INPUT_READ_BYTES: usize = 64 << 10;

/// Reads up to this length are tried at once on the connection's own task when the page cache has
/// them (about 10 us of copying); longer ones go to the blocking pool, so that one client's large
/// reads do not hold up the other connections of the same worker.
pub(crate) const INLINE_READ_BYTES_MAX: u64 = 128 << 10;

/// Time a client has to finish the handshake, counted from the connection (CVE-2024-7409).
pub(crate) const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// A client that takes less than [`OUTPUT_PROGRESS_BYTES`] of its waiting replies for this long is
/// disconnected.
pub(crate) const OUTPUT_STALL_MAX: Duration = Duration::from_secs(60);

/// A client that sends no byte of a write's announced payload for this long is disconnected.
pub(crate) const PAYLOAD_STALL_MAX: Duration = Duration::from_secs(30);

/// While requests of others wait for the byte budget, a connection that holds a part of it and has
/// been slower than [`SHORT_RATE_MIN`] for this long is disconnected. 5 s: long enough for a lost
/// packet's retransmissions, short enough for those who wait.
pub(crate) const SHORT_STALL_MAX: Duration = Duration::from_secs(5);

/// Bytes a second that a payload must bring, or replies must go at, while the byte budget is short.
/// 1 MiB: a network that is slower is no place for a block device under load.
pub(crate) const SHORT_RATE_MIN: u64 = 1 << 20;

/// What a client must take of its waiting replies to count as moving.
pub(crate) const OUTPUT_PROGRESS_BYTES: u64 = 256 << 10;

/// Time between looks at a connection that does not move.
pub(crate) const STALL_POLL: Duration = Duration::from_millis(500);

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

const _: () = assert!(MUTATIONS_IN_FLIGHT_MAX as u64 == nbd_store::limits::SESSION_WINDOW);
const _: () = assert!(MUTATIONS_IN_FLIGHT_MAX > 33, "one maximal write must fit the window");

/// Longest wait, at the end of a connection, for the client to take its last replies and close.
pub(crate) const LINGER: Duration = Duration::from_secs(1);
