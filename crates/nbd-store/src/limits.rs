//! Every size and bound of the store, with the relations between them checked at compile time.

/// Unit of checksum: every block has a CRC32C of its own. Also the alignment of direct I/O.
pub const BLOCK_BYTES: u64 = 4096;

/// Unit of allocation: one slot of the data file.
pub const CHUNK_BYTES: u64 = 64 * 1024;

/// Blocks in a chunk. The bitmaps of a chunk are `u16` because of it.
pub const BLOCKS_PER_CHUNK: usize = 16;

/// Longest payload of one write mutation, in bytes. A longer request of a client is split at chunk
/// boundaries; larger mutations would delay everything queued behind them in the log.
pub const MUTATION_BYTES_MAX: u64 = 1024 * 1024;

/// Most block-sized pieces that one write can touch: one more than its blocks when it starts inside
/// one.
pub const FRAGMENTS_MAX: u64 = MUTATION_BYTES_MAX / BLOCK_BYTES + 1;

/// Longest range that one read plan covers, in bytes: a plan takes 24 bytes of memory a block.
pub const READ_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Smallest volume, in bytes.
pub const VOLUME_BYTES_MIN: u64 = BLOCK_BYTES;

/// Largest volume, in bytes: 64 TiB, 2^30 chunks.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// A volume's size is a multiple of this: the sector that clients count in.
pub const VOLUME_SIZE_MULTIPLE: u64 = 512;

/// Longest volume name, in bytes of UTF-8 (NBD's bound for export names).
pub const VOLUME_NAME_BYTES_MAX: usize = 4096;

/// Longest description of a volume, in bytes of UTF-8 (NBD's bound for descriptions).
pub const DESCRIPTION_BYTES_MAX: usize = 4096;

/// Labels of one volume.
pub const LABELS_MAX: usize = 64;

/// Longest name of a label, in bytes of `[A-Za-z0-9._/-]`.
pub const LABEL_NAME_BYTES_MAX: usize = 63;

/// Longest value of a label, in bytes of UTF-8.
pub const LABEL_VALUE_BYTES_MAX: usize = 255;

/// Volumes, or sessions, that a listing looks at before it lets go of the lock for a moment.
pub(crate) const LOOKED_AT_PER_LOCK: usize = 512;

/// Volumes in one shard. Each costs about 400 bytes of memory besides its texts.
pub const VOLUMES_MAX: usize = 65_536;

/// Open sessions in one shard. Each costs about 150 bytes of memory.
pub const SESSIONS_MAX: usize = 65_536;

/// Mutations of one session that may be under way at a time: a sequence number this far behind the
/// newest one applied is out of the window and is refused.
pub const SESSION_WINDOW: u64 = 256;

/// Longest address of a replica's node, in bytes: a host name and a port.
pub const ADDRESS_BYTES_MAX: usize = 300;

/// Replicas known in one shard, members and those about to be.
pub const REPLICAS_KNOWN_MAX: usize = 64;

/// Nodes that can be cordoned in one shard.
pub const CORDONED_MAX: usize = 64;

/// Chunks of the largest volume.
pub const CHUNKS_PER_VOLUME_MAX: u64 = VOLUME_BYTES_MAX / CHUNK_BYTES;

/// Chunks that one digest of replicas' content stands for: 64 MiB.
pub const DIGEST_CHUNKS: u64 = 1024;

/// Chunks that one page of a manifest, of digests, or of a scrub walks over at most.
pub const PAGE_CHUNKS_MAX: usize = 16_384;

/// Payload that the checkpointer holds in memory and writes at a time, in bytes.
pub const CHECKPOINT_BATCH_BYTES: u64 = 8 * 1024 * 1024;

/// The data file grows by this many slots (64 MiB) while there is room: few extents, few calls.
pub const GROWTH_SLOTS: u64 = 1024;

/// Slots kept back from admission (4 MiB), so that a checkpoint can always rewrite chunks that were
/// overwritten in part: such a chunk needs a fresh slot before its old one is free.
pub const SPARE_SLOTS: u64 = 64;

/// Disk space kept for the metadata database, in bytes: neither admission nor the data file's
/// growth takes it. The database must never meet a full disk, for it refuses all service after a
/// failed write; and it writes each page that it changes to a new place first.
pub const META_HEADROOM_BYTES: u64 = 4 * 1024 * 1024;

/// Disk space below which no checkpoint begins, in bytes.
pub const META_HEADROOM_LEAST_BYTES: u64 = META_HEADROOM_BYTES / 4;

/// Disk space that one changed chunk may take in the database while a transaction and its
/// predecessor are both kept, in bytes: twice a leaf page, and its share of everything else.
pub const META_BYTES_PER_CHANGE: u64 = 16 * 1024;

/// Disk space that one chunk takes in the database for good, in bytes: its entry, twice because
/// pages are half empty at worst, rounded up.
pub const META_BYTES_PER_CHUNK: u64 = 512;

/// Chunks that one metadata transaction changes at most, however much room there is: it bounds the
/// memory for what changed.
pub const CHANGES_PER_TRANSACTION_MAX: usize = 65_536;

/// Cache of the metadata database, in bytes.
pub const META_DB_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Chunks that one `block_status` call looks at before it answers for the part it has seen.
pub const STATUS_CHUNKS_MAX: u64 = 65_536;

/// Slots in the data file at most: 2^36 of them are 4 PiB. A slot number past this is damage.
pub const SLOTS_MAX: u64 = 1 << 36;

const _: () = assert!(BLOCKS_PER_CHUNK as u64 * BLOCK_BYTES == CHUNK_BYTES);
const _: () = assert!(BLOCKS_PER_CHUNK == u16::BITS as usize);
const _: () = assert!(MUTATION_BYTES_MAX.is_multiple_of(CHUNK_BYTES));
const _: () = assert!(FRAGMENTS_MAX == 257);
const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(CHUNK_BYTES));
const _: () = assert!(CHECKPOINT_BATCH_BYTES >= 2 * CHUNK_BYTES);
const _: () = assert!(SESSION_WINDOW.is_multiple_of(64));
const _: () = assert!(usize::BITS == 64, "lengths in bytes are held in usize");

/// `value` as a `usize`.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, asserted above")]
pub(crate) const fn to_usize(value: u64) -> usize {
    value as usize
}
