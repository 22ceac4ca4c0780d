//! Sizes and times of every connection between nodes.

use std::time::Duration;

/// Longest gRPC message that is sent or taken. 4 MiB: Raft's messages are cut at 256 KiB or at one
/// entry of 2 MiB, chunks are 64 KiB, so a whole batch fits; a receiver never sets aside more than
/// this on a peer's word.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// HTTP/2 window of one stream. 8 MiB holds two messages of [`MESSAGE_BYTES_MAX`]; the usual 64 KiB
/// would stop a sender after every sixteenth block of 4 KiB.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;

/// HTTP/2 window of one connection, over all its streams: two streams at full speed.
pub const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Largest HTTP/2 frame taken. 1 MiB instead of 16 KiB: a batch of entries is a few frames.
pub const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Time for the TCP connection to come about. A host that is up answers within milliseconds; one
/// that is down, or behind a firewall that drops, never.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Silence after which a caller asks its peer for a sign of life (an HTTP/2 ping).
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Time the peer then has to give it before the connection is closed. Together with
/// [`KEEPALIVE_INTERVAL`], nothing is sent for longer than 2 s into a cut network or to a frozen
/// process.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);

/// The same for the serving side, which only has memory to free: callers watch their own side.
pub const SERVER_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// As [`KEEPALIVE_TIMEOUT`], for the serving side.
pub const SERVER_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

const _: () = assert!(STREAM_WINDOW_BYTES as usize >= 2 * MESSAGE_BYTES_MAX);
const _: () = assert!(CONNECTION_WINDOW_BYTES >= STREAM_WINDOW_BYTES);
