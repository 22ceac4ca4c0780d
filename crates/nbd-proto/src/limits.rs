//! Every bound this crate holds a peer to, in one place, tied together at compile time.
//!
//! A peer announces lengths; nothing is allocated, skipped or answered by such a length before it
//! was compared with a number here.

/// Bytes of an export name, description, metadata query or error text ("Conventions": strings are
/// at most 4096 bytes). Part of the protocol, not a choice.
pub const STRING_BYTES_MAX: usize = 4096;

/// Bytes of an export name. The document's bound; 256 is what it advises clients to stay under.
pub const EXPORT_NAME_BYTES_MAX: usize = STRING_BYTES_MAX;

/// Bytes of an export's description as sent. A longer one is cut at a character boundary.
pub const DESCRIPTION_BYTES_MAX: usize = STRING_BYTES_MAX;

/// Bytes of the text beside an error. A longer one is cut at a character boundary.
pub const ERROR_TEXT_BYTES_MAX: usize = STRING_BYTES_MAX;

/// Data bytes of an option that are looked at: the input buffer has to hold this much at once.
/// 64 KiB is a full-length name with 14 full-length queries, far above any client. Known options
/// above it are skipped and answered `NBD_REP_ERR_TOO_BIG`.
pub const OPTION_BYTES_MAX: usize = 64 * 1024;

/// Data bytes of an option that are skipped without being kept. Above it the session is closed:
/// reading on would only serve a peer that burns our time (compare CVE-2017-15119, 4 GiB skips).
pub const OPTION_SKIP_BYTES_MAX: usize = 1024 * 1024;

/// Options in one handshake, after which the session is closed. Real clients send fewer than ten;
/// tools that look at every export of a list send two or three for each.
pub const OPTIONS_MAX: u32 = 256;

/// Queries in one `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`; above it
/// `NBD_REP_ERR_TOO_BIG`. We have one context, so more than a few queries can only be probing.
pub const META_QUERIES_MAX: usize = 32;

/// Bytes of one answer to `NBD_OPT_LIST`, after which it ends in `NBD_REP_ERR_TOO_BIG`. Room for
/// 65,536 exports with names and descriptions of 200 bytes together; the answer is held in memory.
pub const LIST_REPLY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes of one option reply a client accepts. A name and a description take 8 KiB.
pub const OPTION_REPLY_BYTES_MAX: usize = 64 * 1024;

/// Bytes of payload in one request or content chunk, announced in `NBD_INFO_BLOCK_SIZE`. 32 MiB is
/// what the document tells every server to take ("Size constraints").
pub const REQUEST_PAYLOAD_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// Payload bytes that are read and thrown away so that a request which is too long gets an
/// `NBD_EINVAL` instead of a dead connection. Above it the connection is closed.
pub const WRITE_DRAIN_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Smallest addressable unit announced. 1, since a larger one breaks kernel clients (which never
/// ask) or makes qemu read, modify and write on its own, which loses updates between connections.
pub const BLOCK_BYTES_MIN: u32 = 1;

/// Unit announced as cheapest to write: the block of the store.
pub const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Extents in one block status answer. The document allows 2^20; 2^16 keeps an answer at 1 MiB, and
/// clients ask on from where it ends.
pub const BLOCK_STATUS_EXTENTS_MAX: usize = 1 << 16;

/// Extents in one block status chunk a client accepts: the document's bound.
pub const REPLY_EXTENTS_MAX: usize = 1 << 20;

/// Longest extent in the 32-bit form of block status: the largest multiple of
/// [`BLOCK_BYTES_PREFERRED`] in 32 bits, so that a cut extent ends on a block (CVE-2025-47711 was
/// an assertion on one that did not fit).
pub const COMPACT_EXTENT_BYTES_MAX: u32 = u32::MAX - (BLOCK_BYTES_PREFERRED - 1);

/// Separate ranges that the content of one read may come in, as long as they do not meet. Servers
/// send a piece for each stretch of data or zeroes, in order, and those meet; one that scatters
/// crumbs only makes us keep account of them.
pub const READ_PIECES_MAX: usize = 4096;

/// Bytes of an error chunk a client accepts: its fixed fields, a full text, an offset, and as much
/// again for fields a later protocol may add.
pub const ERROR_CHUNK_BYTES_MAX: usize = 2 * (ERROR_TEXT_BYTES_MAX + 14);

/// Bytes of an export. `2^63 - 1`: larger ones crashed clients that hold offsets as signed numbers
/// (CVE-2023-5215).
pub const EXPORT_BYTES_MAX: u64 = (1 << 63) - 1;

const _: () = {
    // A name fits an option together with the fields around it.
    assert!(EXPORT_NAME_BYTES_MAX + 6 <= OPTION_BYTES_MAX);
    assert!(OPTION_BYTES_MAX <= OPTION_SKIP_BYTES_MAX);
    // Whatever one side of this crate sends, the other accepts.
    assert!(4 + EXPORT_NAME_BYTES_MAX + DESCRIPTION_BYTES_MAX <= OPTION_REPLY_BYTES_MAX);
    assert!(OPTION_REPLY_BYTES_MAX <= LIST_REPLY_BYTES_MAX);
    assert!(BLOCK_STATUS_EXTENTS_MAX <= REPLY_EXTENTS_MAX);
    assert!(ERROR_TEXT_BYTES_MAX <= u16::MAX as usize);
    // "Size constraints": preferred is a power of two, at least 512 and the minimum; the payload
    // bound is at least the preferred size.
    assert!(BLOCK_BYTES_MIN.is_power_of_two() && BLOCK_BYTES_MIN <= 65_536);
    assert!(BLOCK_BYTES_PREFERRED.is_power_of_two() && BLOCK_BYTES_PREFERRED >= 512);
    assert!(BLOCK_BYTES_MIN <= BLOCK_BYTES_PREFERRED);
    assert!(BLOCK_BYTES_PREFERRED as u64 <= REQUEST_PAYLOAD_BYTES_MAX);
    // A content chunk's length field (payload and an 8-byte offset) and a hole's length are 32
    // bits.
    assert!(REQUEST_PAYLOAD_BYTES_MAX + 8 <= u32::MAX as u64);
    assert!(REQUEST_PAYLOAD_BYTES_MAX <= WRITE_DRAIN_BYTES_MAX);
    assert!(COMPACT_EXTENT_BYTES_MAX.is_multiple_of(BLOCK_BYTES_PREFERRED));
};

/// `text` cut to at most `max` bytes, at a character boundary.
pub(crate) fn clip(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}
