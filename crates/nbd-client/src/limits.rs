//! The bounds of a connection.

use std::time::Duration;

/// Time for the server to accept the connection and to attach the export. A cluster that elects a
/// leader meanwhile needs a second or two of it.
pub const CONNECT_MAX: Duration = Duration::from_secs(15);

/// Requests that wait for the socket to take them. Above it callers wait, too.
pub const REQUESTS_WAITING_MAX: usize = 64;

/// Bytes of the input buffer at first: replies without content, and the head of content, which is
/// read past it straight to where it goes. It grows to hold a block status chunk, whose size
/// `nbd-proto` bounds.
pub(crate) const INPUT_BYTES: usize = 64 * 1024;

/// Buffers handed to the socket at once.
pub(crate) const WRITE_SLICES_MAX: usize = 32;
