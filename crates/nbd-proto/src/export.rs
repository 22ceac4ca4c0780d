//! Exports as both sides see them, and what a handshake agrees on.

use std::fmt;

use crate::constants::TransmissionFlags;
use crate::limits::{EXPORT_BYTES_MAX, EXPORT_NAME_BYTES_MAX};

/// An export's name: UTF-8 without NUL, at most
/// [`EXPORT_NAME_BYTES_MAX`] bytes, possibly empty (the default export). Compared byte by byte;
/// never a path and never a C string.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ExportName(String);

impl ExportName {
    /// The name in `bytes` as they came from the wire.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ExportNameError> {
        // The length first: no work is spent on a name that is too long anyway.
        if bytes.len() > EXPORT_NAME_BYTES_MAX {
            return Err(ExportNameError::TooLong { length: bytes.len() });
        }
        let name = std::str::from_utf8(bytes).map_err(|_| ExportNameError::NotUtf8)?;
        if name.contains('\0') {
            return Err(ExportNameError::Nul);
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as it is on the wire, which is also what placement hashes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Whether this asks for the default export.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::str::FromStr for ExportName {
    type Err = ExportNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::from_bytes(name.as_bytes())
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why bytes are no export name. Does not repeat them: they came from a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportNameError {
    /// Longer than [`EXPORT_NAME_BYTES_MAX`].
    #[error("an export name has {length} bytes, {EXPORT_NAME_BYTES_MAX} are allowed")]
    TooLong {
        /// Bytes of the refused name.
        length: usize,
    },
    /// Not UTF-8.
    #[error("an export name is not UTF-8")]
    NotUtf8,
    /// Contains a NUL.
    #[error("an export name contains a NUL")]
    Nul,
}

/// An export as the server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The server's own name for the export, sent when asked for. It may differ from the name the
    /// client used (the empty name has one of its own).
    pub name: ExportName,
    /// Text for people, sent when asked for; cut to
    /// [`limits::DESCRIPTION_BYTES_MAX`](crate::limits::DESCRIPTION_BYTES_MAX). Empty: none.
    pub description: String,
    /// Bytes of the export, at most [`EXPORT_BYTES_MAX`].
    pub size: u64,
    /// Whether commands that write are refused.
    pub read_only: bool,
}

impl ExportInfo {
    /// The transmission flags of this export under `replies`.
    ///
    /// `CAN_MULTI_CONN` and `SEND_FUA` are promises the server keeps by answering no write before
    /// it is durable and visible to every connection. Flags of commands that write are left out for
    /// a read-only export, as qemu and nbdkit do.
    ///
    /// # Panics
    ///
    /// If the size is above [`EXPORT_BYTES_MAX`]: the server made such an export, no peer did.
    pub fn transmission_flags(&self, replies: ReplyStyle) -> TransmissionFlags {
        assert!(self.size <= EXPORT_BYTES_MAX, "export of {} bytes", self.size);
        let mut flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_CACHE
            | TransmissionFlags::CAN_MULTI_CONN;
        flags = if self.read_only {
            flags | TransmissionFlags::READ_ONLY
        } else {
            flags
                | TransmissionFlags::SEND_TRIM
                | TransmissionFlags::SEND_WRITE_ZEROES
                | TransmissionFlags::SEND_FAST_ZERO
        };
        if replies != ReplyStyle::Simple {
            flags = flags | TransmissionFlags::SEND_DF;
        }
        flags
    }
}

/// Why a server does not hand out an export. The texts are fixed: a client's name is never echoed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportRefusal {
    /// No such export, or none this client may know of: `NBD_REP_ERR_UNKNOWN`.
    Unknown,
    /// Forbidden by the server's settings: `NBD_REP_ERR_POLICY`.
    Policy,
    /// The server is going down: `NBD_REP_ERR_SHUTDOWN`.
    Shutdown,
    /// The server cannot at the moment (no leader, say), with a text for people:
    /// `NBD_REP_ERR_PLATFORM`.
    Platform(&'static str),
}

/// How replies look, from the poorest to the richest. Extended replies go with extended requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum ReplyStyle {
    /// One header, and data only for a read that succeeded.
    #[default]
    Simple,
    /// Chunks with 20-byte headers.
    Structured,
    /// Chunks with 32-byte headers, requests with 64-bit lengths.
    Extended,
}

/// What a handshake ended in, on the server's side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export attached.
    pub export: ExportInfo,
    /// How requests and replies look.
    pub replies: ReplyStyle,
    /// Id of `base:allocation`, if the client selected it for this export; without it
    /// `NBD_CMD_BLOCK_STATUS` is refused. `Some` only if `replies` is not simple.
    pub allocation_context: Option<u32>,
}
