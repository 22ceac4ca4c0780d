//! Every bound of the front end in one place. A client past a bound is not served less correctly:
//! the process stops reading from it until there is room.

use std::time::Duration;

/// Requests of one connection that may be under way at once. 128 is what the Linux client keeps in
/// flight by default; fio and qemu stay below. More would only queue here instead of in the client.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 128;

/// Mutations of one connection that may be under way at once: a client's write becomes one mutation
/// a MiB, at most 33 for the largest. Equal to the session's result window, past which the state
/// machine could no longer tell a repeated mutation from a new one.
pub const MUTATIONS_IN_FLIGHT_MAX: usize = 256;

/// Bytes of replies, and of reads under way, that may wait for one connection's client to take
/// them. Past it no further request of that client is decoded. One maximal read (32 MiB)
/// may always be under way. 2 MiB keeps a client busy that reads 1 MiB at a time.
pub const OUTPUT_BYTES_MAX: usize = 2 << 20;

/// Bytes asked of a socket in one read while looking for request headers. 64 KiB holds 15 writes of
/// 4 KiB; larger payloads are read straight into their own buffers.
pub const INPUT_READ_BYTES: usize = 64 << 10;

/// Reads up to this length are tried at once on the connection's own task when the page cache has
/// them (about 10 us of copying); longer ones go to the blocking pool, so that one client's large
/// reads do not hold up the other connections of the same worker.
pub const INLINE_READ_BYTES_MAX: u64 = 128 << 10;

/// Requests of a connection that a leader may ask to be traced.
pub const TRACED_MAX: u32 = 1000;

/// Longest name of a process that serves clients, in bytes: longer ones do not fit into what
/// leaders are told of a session.
pub const PROCESS_NAME_BYTES_MAX: usize = nbd_relay::HELLO_TEXT_BYTES_MAX;

/// Time a client has to finish the handshake, counted from the connection (CVE-2024-7409).
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Time for a shard to tell its volumes to a client that lists them. Several failovers long, and
/// well below [`HANDSHAKE_DEADLINE`].
pub const LIST_MAX: Duration = Duration::from_secs(3);

/// A client that takes less than [`OUTPUT_PROGRESS_BYTES`] of its waiting replies for this long is
/// disconnected.
pub const OUTPUT_STALL_MAX: Duration = Duration::from_secs(60);

/// A client that sends no byte of a write's announced payload for this long is disconnected.
pub const PAYLOAD_STALL_MAX: Duration = Duration::from_secs(30);

/// While requests of others wait for the byte budget, a connection that holds a part of it and has
/// been slower than [`SHORT_RATE_MIN`] for this long is disconnected. 5 s: long enough for a lost
/// packet's retransmissions, short enough for those who wait.
pub const SHORT_STALL_MAX: Duration = Duration::from_secs(5);

/// Bytes a second that a payload must bring, or replies must go at, while the byte budget is short.
/// 1 MiB: a network that is slower is no place for a block device under load.
pub const SHORT_RATE_MIN: u64 = 1 << 20;

/// What a client must take of its waiting replies to count as moving.
pub const OUTPUT_PROGRESS_BYTES: u64 = 256 << 10;

/// Time between looks at a connection that does not move.
pub const STALL_POLL: Duration = Duration::from_millis(500);

/// Longest wait, at the end of a connection, for the client to take its last replies and close.
pub const LINGER: Duration = Duration::from_secs(1);

/// Whether `bytes` in `elapsed` is too slow for a connection that others wait for.
#[must_use]
pub fn is_slow(bytes: u64, elapsed: Duration) -> bool {
    elapsed >= SHORT_STALL_MAX
        && u128::from(bytes) * 1000 < u128::from(SHORT_RATE_MIN) * elapsed.as_millis()
}

const _: () = assert!(MUTATIONS_IN_FLIGHT_MAX as u64 == nbd_store::limits::SESSION_WINDOW);
const _: () = assert!(MUTATIONS_IN_FLIGHT_MAX > 33, "one maximal write must fit the window");
