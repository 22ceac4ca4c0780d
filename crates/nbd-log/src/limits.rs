//! Every bound of this crate. Sizes are in bytes unless the name says otherwise.

/// Unit of every durable write and of batch alignment: what direct I/O needs on all common disks,
/// and the page size, so that a durable write never shares a page with another one.
pub const BLOCK_BYTES: usize = 4096;

/// Most data one log entry may carry. 2 MiB = twice the largest mutation, so that an entry with one
/// maximal write and its headers always fits. Higher lengthens the longest single disk write.
pub const ENTRY_BYTES_MAX: usize = 2 << 20;

/// Most bytes of one batch on disk, header and padding included. One batch is one device write:
/// 8 MiB is far past the knee of throughput, and is the size that the staging buffer grows to.
pub const BATCH_BYTES_MAX: usize = 8 << 20;

/// Smallest segment. Lower would spend a noticeable share of the writes on segment headers; the
/// largest entry shrinks with it (see `LogOptions::entry_bytes_max`).
pub const SEGMENT_BYTES_MIN: u64 = 1 << 20;

/// Largest segment. A segment is prefilled before use and scanned whole after a crash, so that more
/// would make both noticeable.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Fewest segments that fit in `log_bytes_max`: the one being written, one that a checkpoint is
/// about to free, and a spare.
pub const SEGMENTS_MIN: u64 = 3;

/// Piece in which a segment is prefilled with zeroes, and in which recovery reads.
pub const SCAN_BYTES: usize = 1 << 20;

/// Writes that `write_many_at` keeps in flight at once. Random direct writes stop gaining at about
/// this depth on a single NVMe or virtio disk.
pub const WRITES_IN_FLIGHT_MAX: usize = 8;

/// Fewest separate writes for which `write_many_at` starts threads; for fewer, starting them costs
/// more than it saves.
pub const PARALLEL_WRITES_MIN: usize = 8;

/// Most adjacent buffers gathered into one vectored write: the kernel takes at most 1,024.
pub const GATHER_BUFFERS_MAX: usize = 256;

/// Most bytes gathered into one vectored write, so that a long sequential run still keeps several
/// writes in flight.
pub const GATHER_BYTES_MAX: usize = 1 << 20;

const _: () = {
    assert!(BLOCK_BYTES.is_power_of_two());
    assert!(BATCH_BYTES_MAX.is_multiple_of(BLOCK_BYTES) && SCAN_BYTES.is_multiple_of(BLOCK_BYTES));
    // An entry, its record header and the batch header always fit in one batch.
    assert!(ENTRY_BYTES_MAX + BLOCK_BYTES <= BATCH_BYTES_MAX);
    // Block numbers inside a segment are stored in 32 bits, body lengths too.
    assert!(SEGMENT_BYTES_MAX / (BLOCK_BYTES as u64) < u32::MAX as u64);
};
