//! Every bound of the transport. Past one, messages are dropped, never queued: Raft repeats what
//! matters.

use std::time::Duration;

use nbd_rpc::MESSAGE_BYTES_MAX;

/// Messages without entries that may wait for one peer. A heartbeat, its answer or a vote each: at
/// 20 heartbeats a second and shard, 100 shards fill it in two seconds, past which a connection is
/// given up anyway.
pub const CONTROL_MESSAGES_MAX: usize = 4096;

/// Bytes of messages without entries that may wait for one peer. Such a message has 50 to 100
/// bytes.
pub const CONTROL_BYTES_MAX: usize = 4 << 20;

/// Messages with entries that may wait for one peer.
pub const BULK_MESSAGES_MAX: usize = 65_536;

/// Bytes of messages with entries that may wait for one peer. A leader has at most 16 MiB of
/// appends a follower and shard on the way, so this is four busy shards; the bytes are shared with
/// the log's cache as long as an entry is a message of its own.
pub const BULK_BYTES_MAX: usize = 64 << 20;

/// Memory a waiting message takes besides its bytes, counted so that empty ones are not free.
pub const MESSAGE_OVERHEAD_BYTES: usize = 64;

/// Messages are put into one frame up to this many bytes; a single larger one still goes. 1 MiB is
/// one HTTP/2 frame.
pub const BATCH_BYTES_MAX: usize = 1 << 20;

/// Messages put into one frame.
pub const BATCH_MESSAGES_MAX: usize = 256;

/// Longest message that is sent: an entry of the largest size with its surroundings, and then some.
pub const MESSAGE_MAX: usize = 3 << 20;

/// Shorter messages are copied out of the frame that they came in, so that one heartbeat that is
/// looked at late does not keep a whole frame of entries in memory.
pub const COPY_BYTES_MAX: usize = 4 << 10;

/// First wait after a connection was lost or refused; doubled each time up to
/// [`RECONNECT_WAIT_MAX`], and shortened by up to a half at random.
pub const RECONNECT_WAIT_MIN: Duration = Duration::from_millis(50);

/// Longest wait between attempts to connect: how late a peer that comes back is noticed, unless it
/// connects itself first.
pub const RECONNECT_WAIT_MAX: Duration = Duration::from_secs(1);

/// Time for a peer that took the TCP connection to accept the stream.
pub const ACCEPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Time for a caller to say who it is.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(3);

/// Time that a connection with entries has to answer a sign of life. Longer than usual, for the
/// question waits behind megabytes of entries; a dead peer is noticed on the other lane, which
/// takes this one with it.
pub const BULK_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time, when stopping, for what is queued to reach the peer.
pub const FLUSH_TIMEOUT: Duration = Duration::from_millis(500);

/// Streams taken from others at the same time: two lanes of 128 nodes.
pub const INCOMING_STREAMS_MAX: usize = 256;

/// What Protobuf and gRPC add to a message in a batch, at most: tags, lengths and numbers.
const ENVELOPE_BYTES_MAX: usize = 64;

/// Notes of traced entries that are sent with one message.
pub const TRACES_MAX: usize = 64;

/// What a note takes in a message, at most.
const TRACE_BYTES_MAX: usize = 64;

/// Bytes of the notes of one message. They are read only if they are no longer: a note takes twenty
/// times as much memory as its shortest form on the wire.
pub const TRACES_BYTES_MAX: usize = TRACES_MAX * TRACE_BYTES_MAX;

/// What Raft adds to the data of an entry, at most.
const ENTRY_ENVELOPE_BYTES_MAX: usize = 1024;

const _: () = assert!(
    nbd_consensus::limits::ENTRY_BYTES_MAX + ENTRY_ENVELOPE_BYTES_MAX <= MESSAGE_MAX,
    "every message of one entry can be sent"
);
const _: () = assert!(
    nbd_consensus::limits::MESSAGE_BYTES_MAX + ENTRY_ENVELOPE_BYTES_MAX as u64
        <= MESSAGE_MAX as u64,
    "every message of several entries can be sent"
);
const _: () = assert!(
    MESSAGE_MAX + ENVELOPE_BYTES_MAX + TRACES_BYTES_MAX <= MESSAGE_BYTES_MAX
        && BATCH_BYTES_MAX + BATCH_MESSAGES_MAX * (ENVELOPE_BYTES_MAX + TRACES_BYTES_MAX)
            <= MESSAGE_BYTES_MAX,
    "every batch is taken by the receiver"
);
const _: () = assert!(BULK_BYTES_MAX >= 2 * MESSAGE_MAX && CONTROL_BYTES_MAX >= MESSAGE_MAX);
