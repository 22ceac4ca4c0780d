//! Magic numbers, flags and codes, each with the section of the protocol document it comes from.
//!
//! The document is `doc/proto.md` of NetworkBlockDevice/nbd; what concerns extended headers is in
//! the same file on its branch `extension-ext-header`. All numbers are big-endian on the wire.

/// First 8 bytes a server sends, ASCII `NBDMAGIC` ("Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Next 8 bytes a server sends, and the first 8 of each option: ASCII `IHAVEOPT`
/// ("Newstyle negotiation").
pub const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
/// First 8 bytes of each option reply ("Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of a request with extended headers ("Request message").
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First 4 bytes of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a structured reply chunk ("Structured reply chunk message").
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First 4 bytes of a reply chunk with extended headers ("Extended reply chunk message").
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a server's greeting: two magic numbers and its flags.
pub const GREETING_BYTES: usize = 18;
/// Bytes of an option's header: magic, option, length.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of an option reply's header: magic, option, reply type, length.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// Zero bytes that follow the answer to `NBD_OPT_EXPORT_NAME` unless both sides gave them up.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;
/// Bytes of a compact request's header.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Bytes of an extended request's header.
pub const EXTENDED_REQUEST_HEADER_BYTES: usize = 32;
/// Bytes of a simple reply's header.
pub const SIMPLE_REPLY_HEADER_BYTES: usize = 16;
/// Bytes of a structured reply chunk's header.
pub const STRUCTURED_REPLY_HEADER_BYTES: usize = 20;
/// Bytes of an extended reply chunk's header.
pub const EXTENDED_REPLY_HEADER_BYTES: usize = 32;

/// The one metadata context served ("The `base:allocation` metadata context").
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// Query that stands for every context of the `base` namespace when listing, and for none when
/// selecting ("The `base:` metadata namespace").
pub const BASE_WILDCARD: &str = "base:";
/// Id the server gives to [`ALLOCATION_CONTEXT`]. Clients treat ids as opaque.
pub const ALLOCATION_CONTEXT_ID: u32 = 1;

macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident: $repr:ty {
        $($(#[$flag_doc:meta])* $flag:ident = $bit:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name($repr);

        impl $name {
            /// No flag set.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self(1 << $bit);)*
            /// Every flag this crate knows.
            pub const KNOWN: Self = Self(0 $(| (1 << $bit))*);

            /// The flags as they were on the wire; unknown bits are kept.
            pub const fn from_bits(bits: $repr) -> Self {
                Self(bits)
            }

            /// The flags as they go on the wire.
            pub const fn bits(self) -> $repr {
                self.0
            }

            /// Whether every flag of `other` is set here.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The flags set here or in `other`.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The flags set here and not in `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// Whether no flag is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "{}({:#x})", stringify!($name), self.0)
            }
        }
    };
}

flag_set! {
    /// What the server says of itself in its greeting ("Handshake flags").
    HandshakeFlags: u16 {
        /// Options are answered, unknown ones too.
        FIXED_NEWSTYLE = 0;
        /// The padding after `NBD_OPT_EXPORT_NAME` may be left out.
        NO_ZEROES = 1;
    }
}

flag_set! {
    /// The client's answer to the greeting ("Client flags"). A server drops a client that sets
    /// others.
    ClientFlags: u32 {
        /// The client understands answers to options.
        FIXED_NEWSTYLE = 0;
        /// The client wants no padding after `NBD_OPT_EXPORT_NAME`.
        NO_ZEROES = 1;
    }
}

flag_set! {
    /// What an export can do ("Transmission flags").
    TransmissionFlags: u16 {
        /// Always set.
        HAS_FLAGS = 0;
        /// Commands that write fail with `NBD_EPERM`.
        READ_ONLY = 1;
        /// `NBD_CMD_FLUSH` is understood.
        SEND_FLUSH = 2;
        /// [`CommandFlags::FUA`] is understood.
        SEND_FUA = 3;
        /// The medium likes sequential access.
        ROTATIONAL = 4;
        /// `NBD_CMD_TRIM` is understood.
        SEND_TRIM = 5;
        /// `NBD_CMD_WRITE_ZEROES` is understood.
        SEND_WRITE_ZEROES = 6;
        /// [`CommandFlags::DF`] is understood.
        SEND_DF = 7;
        /// A flush or FUA answered on one connection holds for all connections of the export.
        CAN_MULTI_CONN = 8;
        /// `NBD_CMD_RESIZE` is understood (experimental; never set here).
        SEND_RESIZE = 9;
        /// `NBD_CMD_CACHE` is understood.
        SEND_CACHE = 10;
        /// [`CommandFlags::FAST_ZERO`] is understood.
        SEND_FAST_ZERO = 11;
        /// `NBD_CMD_BLOCK_STATUS` takes a payload (never set here).
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

flag_set! {
    /// Flags of a request ("Command flags").
    CommandFlags: u16 {
        /// The reply is sent only once the command's effect is durable.
        FUA = 0;
        /// `NBD_CMD_WRITE_ZEROES`: allocate, leave no hole.
        NO_HOLE = 1;
        /// `NBD_CMD_READ`: at most one content chunk.
        DF = 2;
        /// `NBD_CMD_BLOCK_STATUS`: exactly one extent, inside the request.
        REQ_ONE = 3;
        /// `NBD_CMD_WRITE_ZEROES`: fail with `NBD_ENOTSUP` rather than be slow.
        FAST_ZERO = 4;
        /// Extended headers: `length` bytes of payload follow.
        PAYLOAD_LEN = 5;
    }
}

flag_set! {
    /// Flags of a reply chunk ("Structured and extended header reply flags").
    ReplyFlags: u16 {
        /// Last chunk of this reply.
        DONE = 0;
    }
}

flag_set! {
    /// Status of an extent in [`ALLOCATION_CONTEXT`].
    AllocationFlags: u32 {
        /// Not allocated; a write here may meet `NBD_ENOSPC`.
        HOLE = 0;
        /// Reads as zeroes.
        ZERO = 1;
    }
}

/// Option codes ("Option types").
pub mod option {
    /// Choose an export and start, without any way to be refused politely.
    pub const EXPORT_NAME: u32 = 1;
    /// End the handshake.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Withdrawn from the document; answered as unknown.
    pub const PEEK_EXPORT: u32 = 4;
    /// Go on over TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Reply in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name an export's metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts for an export.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 64-bit lengths and 32-byte headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Option reply types ("Option reply types").
pub mod option_reply {
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Success, and the end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One aspect of an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    /// The server will not, by its settings.
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    /// The option makes no sense as sent.
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    /// The server can not, where it runs.
    pub const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    /// Only over TLS.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    /// Only for clients that promise to keep to the block size.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    /// Request or answer too large.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    /// Only with, or no longer without, extended headers.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// Information types of `NBD_OPT_INFO` and `NBD_OPT_GO` (under `NBD_REP_INFO`).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The server's own name for the export.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest and preferred block, and the payload bound.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types ("Request types").
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the payload follows the header.
    pub const WRITE: u16 = 1;
    /// End the session; never answered.
    pub const DISC: u16 = 2;
    /// Make every answered write durable.
    pub const FLUSH: u16 = 3;
    /// Forget a range.
    pub const TRIM: u16 = 4;
    /// Bring a range closer.
    pub const CACHE: u16 = 5;
    /// Write zeroes without sending them.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask what is allocated.
    pub const BLOCK_STATUS: u16 = 7;
    /// Experimental; answered as unknown.
    pub const RESIZE: u16 = 8;
}

/// Reply chunk types ("Structured reply types").
pub mod chunk {
    /// Set in every error chunk.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// No content; the last chunk.
    pub const NONE: u16 = 0;
    /// An offset and the bytes found there.
    pub const OFFSET_DATA: u16 = 1;
    /// An offset and how many zeroes are found there.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths, with extended headers only.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Error and text.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// Error, text, and where it struck.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}
