//! Every bound of this crate, in one place.

/// Log writes with entries that a leader may have handed out and not seen finished. Two: one being
/// written and one waiting behind it; what arrives meanwhile is packed into fewer, larger entries.
pub const APPENDS_IN_FLIGHT_MAX: usize = 2;

/// Log writes that a follower may have handed out and not seen finished. Past it, messages of peers
/// are dropped, as if the network had lost them: the log is slower than the leader, who sends again
/// at the pace of answers. Twice what raft-rs sends ahead to one follower.
pub const APPENDS_OUTSTANDING_MAX: usize = 128;

/// Commands are packed into one log entry up to this many bytes. Larger commands go alone and are
/// never copied. Half of raft's message size, so that packing never makes a message of its own.
pub const ENTRY_PACK_BYTES_MAX: usize = 128 << 10;

/// Bytes of entries proposed in one step: about what one durable write of the log takes.
pub const PROPOSE_BYTES_MAX: usize = 4 << 20;

/// Entries kept for followers that lag, whatever their size: 48 bytes of memory each.
pub const KEPT_ENTRIES_MAX: usize = 262_144;

/// Steps of the clock between two looks at which entries are still worth keeping.
pub const RETENTION_TICKS: u32 = 40;
