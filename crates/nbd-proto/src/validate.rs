//! The rules a request has to pass, each with the error the client gets.
//!
//! | what is wrong | reply |
//! | --- | --- |
//! | unknown command, unknown flag, flag of another command | `NBD_EINVAL` |
//! | another command than write with `PAYLOAD_LEN` | `NBD_EINVAL`, its payload consumed |
//! | write, trim or write zeroes on a read-only export | `NBD_EPERM` |
//! | write or write zeroes past the end | `NBD_ENOSPC` |
//! | read, trim, cache or block status past the end | `NBD_EINVAL` |
//! | read of more than the payload bound | `NBD_EOVERFLOW` |
//! | write of more than the payload bound | `NBD_EINVAL` |
//! | flush with an offset or a length | `NBD_EINVAL` |
//! | block status without a context, or of nothing | `NBD_EINVAL` |
//!
//! `NBD_EOVERFLOW` for a read is what the document provides for "a command without payload
//! requests a length larger than an advertised maximum payload length" ("Error values").
//! `NBD_ENOTSUP` never appears, since zeroing is always fast. An empty block status is refused
//! because its answer needs an extent, and extents are not empty.

use crate::constants::CommandFlags;
use crate::error::NbdError;
use crate::export::{Negotiated, ReplyStyle};
use crate::limits::REQUEST_PAYLOAD_BYTES_MAX;
use crate::request::{Command, CommandKind, RequestHeader};

/// What requests are checked against: fixed for the life of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    size: u64,
    read_only: bool,
    pub(crate) replies: ReplyStyle,
    block_status: bool,
}

impl Rules {
    pub(crate) fn new(negotiated: &Negotiated) -> Self {
        Self {
            size: negotiated.export.size,
            read_only: negotiated.export.read_only,
            replies: negotiated.replies,
            block_status: negotiated.allocation_context.is_some(),
        }
    }

    /// Payload bytes that follow `header`: a write always has some, with extended headers also
    /// whatever carries the payload flag.
    ///
    /// The document demands the flag on extended writes, but qemu's client (10.0) leaves it out,
    /// and its payload follows all the same. Nobody sends a write without a payload, so a missing
    /// flag is forgiven, as qemu's server does.
    pub(crate) fn payload_len(&self, header: &RequestHeader) -> u64 {
        let flagged = self.replies == ReplyStyle::Extended
            && header.flags.contains(CommandFlags::PAYLOAD_LEN);
        if flagged || CommandKind::from_code(header.command) == CommandKind::Write {
            header.length
        } else {
            0
        }
    }

    /// The command in `header`, or what to tell the client.
    pub(crate) fn validate(&self, header: &RequestHeader) -> Result<Command, Refusal> {
        let kind = CommandKind::from_code(header.command);
        self.check_flags(kind, header.flags)?;
        if self.read_only && writes(kind) {
            return Err(Refusal(NbdError::Perm, "the export is read-only"));
        }
        let RequestHeader { offset, length: len, .. } = *header;
        self.check_range(kind, offset, len)?;
        Ok(match kind {
            CommandKind::Read => {
                let dont_fragment = header.flags.contains(CommandFlags::DF);
                Command::Read { offset, len, dont_fragment }
            }
            CommandKind::Write => Command::Write { offset, len },
            CommandKind::Flush => Command::Flush,
            CommandKind::Trim => Command::Trim { offset, len },
            CommandKind::Cache => Command::Cache { offset, len },
            CommandKind::WriteZeroes => {
                let no_hole = header.flags.contains(CommandFlags::NO_HOLE);
                Command::WriteZeroes { offset, len, no_hole }
            }
            CommandKind::BlockStatus => {
                if !self.block_status {
                    return Err(invalid("no metadata context was selected"));
                }
                let req_one = header.flags.contains(CommandFlags::REQ_ONE);
                Command::BlockStatus { offset, len, req_one }
            }
            CommandKind::Unknown => return Err(invalid("unknown command")),
        })
    }

    fn check_flags(&self, kind: CommandKind, flags: CommandFlags) -> Result<(), Refusal> {
        let chunked = self.replies != ReplyStyle::Simple;
        let extended = self.replies == ReplyStyle::Extended;
        let own = match kind {
            CommandKind::Unknown => return Err(invalid("unknown command")),
            CommandKind::Read if chunked => CommandFlags::DF,
            CommandKind::Write if extended => CommandFlags::PAYLOAD_LEN,
            CommandKind::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            CommandKind::BlockStatus => CommandFlags::REQ_ONE,
            _ => CommandFlags::NONE,
        };
        if extended && flags.contains(CommandFlags::PAYLOAD_LEN) && kind != CommandKind::Write {
            return Err(invalid("the command takes no payload"));
        }
        // FUA belongs to every command: "existing clients are known to set this bit".
        if !flags.without(own | CommandFlags::FUA).is_empty() {
            return Err(invalid("a flag does not belong to the command"));
        }
        Ok(())
    }

    fn check_range(&self, kind: CommandKind, offset: u64, len: u64) -> Result<(), Refusal> {
        if kind == CommandKind::Flush {
            return if offset == 0 && len == 0 {
                Ok(())
            } else {
                Err(invalid("a flush has neither offset nor length"))
            };
        }
        if kind == CommandKind::Write && len > REQUEST_PAYLOAD_BYTES_MAX {
            return Err(invalid("the write is longer than the maximum payload"));
        }
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            let error = match kind {
                CommandKind::Write | CommandKind::WriteZeroes => NbdError::NoSpc,
                _ => NbdError::Inval,
            };
            return Err(Refusal(error, "the range passes the end of the export"));
        }
        if kind == CommandKind::Read && len > REQUEST_PAYLOAD_BYTES_MAX {
            return Err(Refusal(NbdError::Overflow, "the read is longer than the maximum payload"));
        }
        if kind == CommandKind::BlockStatus && len == 0 {
            return Err(invalid("a block status request needs a length"));
        }
        Ok(())
    }
}

/// What the client is told instead of being served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal(pub(crate) NbdError, pub(crate) &'static str);

const fn invalid(message: &'static str) -> Refusal {
    Refusal(NbdError::Inval, message)
}

const fn writes(kind: CommandKind) -> bool {
    matches!(kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes)
}
