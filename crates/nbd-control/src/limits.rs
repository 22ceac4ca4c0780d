//! Bounds of the control API, and how long it waits.

use std::time::Duration;

/// Longest body of a request, in bytes: many times the largest that means something (a volume with
/// 64 labels of full length is 25 KiB).
pub const BODY_BYTES_MAX: usize = 1 << 20;

/// Items of a page if the client does not say, and at most.
pub const PAGE_DEFAULT: u32 = 100;
/// See [`PAGE_DEFAULT`]: what the replicas give at most, too.
pub const PAGE_MAX: u32 = 1000;

/// Shards that one request of a client asks at the same time. Lists over more shards take turns.
pub const SHARDS_AT_ONCE: usize = 32;

/// Time after which a contact that has not answered is no longer waited for alone: the next one is
/// asked beside it. Above what a healthy shard needs for any call, also under load; below the
/// second or so that a frozen leader takes to be replaced.
pub const HEDGE: Duration = Duration::from_millis(250);

/// Longest that one attempt may take: then its contact may be asked again. Covers replicas that
/// froze with a call in hand.
pub const ATTEMPT: Duration = Duration::from_millis(1500);

/// Pause once every contact of a shard has said that it cannot answer: an election takes some
/// hundred milliseconds.
pub const PAUSE: Duration = Duration::from_millis(50);

/// Longest that a list waits for one shard, so that a shard without majority does not hold up what
/// the others have to say. Longer than a failover takes.
pub const LIST_DEADLINE: Duration = Duration::from_secs(2);

/// Longest that a node is waited for when it is asked about itself.
pub const NODE_DEADLINE: Duration = Duration::from_secs(1);

/// What `Retry-After` says, in seconds: a shard that has a majority elects within that.
pub const RETRY_AFTER_S: u32 = 1;

/// Streams of events at the same time; half of the connections there may be, so that the rest of
/// the API stays reachable.
pub const STREAMS_MAX: usize = nbd_service::http::HTTP_CONNECTIONS_MAX / 2;

/// How often a watched operation is looked at.
pub const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// How often an event stream shows that it is alive; below the silence at which connections are
/// closed.
pub const STREAM_KEEPALIVE: Duration = Duration::from_secs(10);

/// How often the token file is looked at.
pub const TOKENS_INTERVAL: Duration = Duration::from_millis(500);

/// Most tokens in a file: each request is compared with all of them.
pub const TOKENS_MAX: usize = 1000;

/// Longest `Idempotency-Key`.
pub const KEY_MAX: usize = 255;

/// Committed entries that a replica may lack before its shard counts as degraded: more than is
/// ever under way with a healthy one.
pub const LAG_MAX: u64 = 10_000;

/// Bytes that can still be written below which a shard counts as degraded.
pub const WRITABLE_MIN: u64 = 64 << 20;

/// Most requests of a client that can be asked to be traced at once.
pub const TRACED_MAX: u32 = 1000;

const _: () = assert!(ATTEMPT.as_millis() > HEDGE.as_millis());
const _: () = assert!(STREAM_KEEPALIVE.as_secs() < nbd_service::http::HTTP_SILENCE_MAX.as_secs());
