//! Every bound of this crate, in one place.

use std::time::Duration;

/// Default for [`GroupConfig::tick`](crate::GroupConfig::tick).
pub const TICK: Duration = Duration::from_millis(25);

/// Largest [`GroupConfig::tick`](crate::GroupConfig::tick).
pub const TICK_MAX: Duration = Duration::from_secs(60);

/// Bytes of entries raft-rs puts into one append message, and the size at which an outgoing message
/// is split. 256 KiB keeps a heartbeat from waiting long behind bulk on one connection; raft-rs's
/// own default of 0 means one entry per message.
pub const MESSAGE_BYTES_MAX: u64 = 256 << 10;

/// Append messages on the way to one follower and not yet answered. Worst memory in flight for a
/// follower is this times [`MESSAGE_BYTES_MAX`]: 16 MiB.
pub const INFLIGHT_MESSAGES_MAX: usize = 64;

/// Default for [`GroupConfig::uncommitted_bytes_max`](crate::GroupConfig::uncommitted_bytes_max).
pub const UNCOMMITTED_BYTES_MAX: usize = 64 << 20;

/// Bytes of committed entries one raft-rs ready hands out to be applied, so that a burst is cut
/// into pieces. Unlimited by raft-rs's own default.
pub const APPLY_BYTES_MAX: u64 = 8 << 20;

/// Default for [`GroupConfig::entry_bytes_max`](crate::GroupConfig::entry_bytes_max): the largest
/// mutation (1 MiB) with its header and checksums, and as much again for batching small ones.
pub const ENTRY_BYTES_MAX: usize = 2 << 20;

/// Default for [`GroupConfig::cache_bytes_max`](crate::GroupConfig::cache_bytes_max).
pub const CACHE_BYTES_MAX: usize = 16 << 20;

/// Memory an entry in the cache takes besides its data; counted so that a million empty entries are
/// not free. The size of a raft-rs `Entry` rounded up.
pub const ENTRY_OVERHEAD_BYTES: usize = 160;

/// Reads waiting for a barrier in one group. Past it they are refused as
/// [`RejectReason::Full`](crate::RejectReason::Full).
pub const READS_WAITING_MAX: usize = 65_536;

/// Requests for entries no longer in memory that may be open at once: two for each possible
/// follower. Past it a follower's turn comes with its next heartbeat response.
pub const FETCHES_MAX: usize = 2 * (VOTERS_MAX + LEARNERS_MAX);

/// Voters in one group.
pub const VOTERS_MAX: usize = 7;

/// Learners in one group.
pub const LEARNERS_MAX: usize = 7;

/// Entries by which a learner may lag behind the leader's log and still become a voter. A few
/// hundred are on their way to any follower under load; one that lags further would, as a voter,
/// hold up every commit that needs it.
pub const PROMOTION_LAG_MAX: u64 = 512;

/// Ticks after which a follower that was offered a snapshot, and has not caught up with it, is
/// offered one again: the offer may have been lost, or the answer.
pub const SNAPSHOT_OFFER_TICKS: u32 = 40;

/// Election timeouts for which a leader may hear nothing from a majority before it steps down.
/// raft-rs does so after one, by windows of one: on a machine whose processors are overrun for a
/// third of a second, that turns each such moment into an election, whereas the followers still
/// hear their leader and would go on with it. What stepping down is for can wait: reads need a
/// lease, which is shorter, and others elect a leader without asking this one.
pub const STEP_DOWN_ELECTIONS: u64 = 2;

/// Largest term and index taken from a peer. Far beyond reach in honest operation, and far enough
/// below `u64::MAX` that adding to one cannot wrap.
pub const COUNTER_MAX: u64 = u64::MAX / 2;

const _: () = assert!(UNCOMMITTED_BYTES_MAX as u64 >= MESSAGE_BYTES_MAX);
const _: () = assert!(UNCOMMITTED_BYTES_MAX >= ENTRY_BYTES_MAX);
