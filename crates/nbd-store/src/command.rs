//! Commands: what a log entry asks of a shard.
//!
//! An entry's data is empty (a new leader's no-op) or one or more commands back to back. All
//! integers are little-endian.
//!
//! ```text
//!  0        4     5      6               8                              24       28          32
//!  +--------+-----+------+---------------+------------------------------+--------+-----------+
//!  | length | kind| flags| fragment count| session (u128)               | epoch  | reserved 0|
//!  +--------+-----+------+---------------+--------------+---------------+--------+-----------+
//!  32                40                 48              56              64
//!  | seq (u64)       | volume (u64)     | offset (u64)  | length (u64)  | ...
//!  +-----------------+------------------+---------------+---------------+
//!  64: fragment count x u32 CRC32C (Write), then the payload (Write) or the body
//! ```
//!
//! `length` at 0 counts the whole command. A fragment is one piece of `[offset, offset + length)`
//! cut at multiples of 4096: each has a checksum of its own, so that a whole block's checksum goes
//! from the client's write to the chunk map unchanged.
//!
//! | kind | session, epoch, seq | volume | offset, length | rest |
//! | --- | --- | --- | --- | --- |
//! | 1 Write | yes | yes | range | fragment CRCs, payload |
//! | 2 Trim | yes | yes | range | |
//! | 3 WriteZeroes (flag 1: NO_HOLE) | yes | yes | range | |
//! | 4 OpenSession | session, epoch | yes | owner: node, incarnation | |
//! | 5 CloseSession | session, epoch | 0 | 0 | |
//! | 6 CreateVolume (of versions before labels) | 0 | 0 | length = size | see `catalogue` |
//! | 7 AddCounter | 0 | 0 | length = i64 to add | |
//! | 8 EndSessions | 0 | 0 | owner: node, incarnation | |
//! | 9 RegisterReplica | 0 | 0 | length = id | u128 directory, then texts as in [`crate::members`] |
//! | 10 UpdateVolume | 0 | yes | offset = now in ms | see `catalogue` |
//! | 11 ResizeVolume (flag 2: FORCE) | seq = size it must have, or 0 | yes | offset = now in ms, length = size | |
//! | 12 DeleteVolume (flag 2: FORCE) | 0 | yes | 0 | |
//! | 13 CordonNode | 0 | 0 | length = 1, or 0: no more | name of the node |
//! | 14 SetReplacement | 0 | 0 | old replica, new replica or 0 | |
//! | 15 NewVolume | 0 | 0 | length = size | see `catalogue` |

mod catalogue;

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use nbd_log::checksum::crc32c;
use nbd_topology::ReplicaId;

pub use self::catalogue::{
    CreateVolumeBody, NewVolume, UpdateVolumeBody, VolumeUpdate, encode_cordon_node,
    encode_create_volume, encode_delete_volume, encode_new_volume, encode_resize_volume,
    encode_set_replacement, encode_update_volume,
};
use crate::ids::{Epoch, Owner, SessionId, VolumeId};
use crate::limits::{BLOCK_BYTES, FRAGMENTS_MAX, MUTATION_BYTES_MAX, to_usize};
use crate::members::{ReplicaRegistration, encode_registration};

/// Bytes of a command before its checksums, payload or body.
pub const COMMAND_HEADER_BYTES: usize = 64;

/// Flag of [`CommandKind::WriteZeroes`]: the range stays allocated.
const FLAG_NO_HOLE: u8 = 1;
/// Flag of [`CommandKind::ResizeVolume`] and [`CommandKind::DeleteVolume`]: whatever is lost.
const FLAG_FORCE: u8 = 2;

/// What a command does. The numbers are stored in logs and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum CommandKind {
    /// Replaces the bytes of a range.
    Write = 1,
    /// Gives back the whole blocks of a range, which then read as zero; its edges stay as they are.
    Trim = 2,
    /// Makes a range read as zero.
    WriteZeroes = 3,
    /// Opens a session on a volume, or resumes it with a higher epoch.
    OpenSession = 4,
    /// Ends a session.
    CloseSession = 5,
    /// Creates a volume, or finds the one of that name; as versions before labels wrote it.
    CreateVolume = 6,
    /// Adds to the shard's counter.
    AddCounter = 7,
    /// Ends the sessions that earlier lives of a node have left.
    EndSessions = 8,
    /// Makes a replica known, so that it can become a member.
    RegisterReplica = 9,
    /// Changes a volume's description and labels.
    UpdateVolume = 10,
    /// Changes a volume's size.
    ResizeVolume = 11,
    /// Deletes a volume.
    DeleteVolume = 12,
    /// Keeps a node from leading and from taking on replicas, or lets it.
    CordonNode = 13,
    /// Notes that a replica is to take another one's place.
    SetReplacement = 14,
    /// Creates a volume, or finds the one of that name: with labels, a key and a time. Not a longer
    /// body of [`Self::CreateVolume`]: a replica of a version that does not know it must refuse the
    /// entry rather than judge it otherwise than the others.
    NewVolume = 15,
}

impl CommandKind {
    const fn from_u8(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Write,
            2 => Self::Trim,
            3 => Self::WriteZeroes,
            4 => Self::OpenSession,
            5 => Self::CloseSession,
            6 => Self::CreateVolume,
            7 => Self::AddCounter,
            8 => Self::EndSessions,
            9 => Self::RegisterReplica,
            10 => Self::UpdateVolume,
            11 => Self::ResizeVolume,
            12 => Self::DeleteVolume,
            13 => Self::CordonNode,
            14 => Self::SetReplacement,
            15 => Self::NewVolume,
            _ => return None,
        })
    }

    /// Flags that it may have.
    const fn flags(self) -> u8 {
        match self {
            Self::WriteZeroes => FLAG_NO_HOLE,
            Self::ResizeVolume | Self::DeleteVolume => FLAG_FORCE,
            _ => 0,
        }
    }

    /// Whether there is anything behind the header.
    const fn has_body(self) -> bool {
        matches!(
            self,
            Self::CreateVolume
                | Self::NewVolume
                | Self::RegisterReplica
                | Self::UpdateVolume
                | Self::CordonNode
        )
    }
}

/// The fixed part of a command. Which fields mean something depends on `kind`; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandHeader {
    /// What to do.
    pub kind: CommandKind,
    /// `WriteZeroes` must leave the range allocated.
    pub no_hole: bool,
    /// `ResizeVolume` may shrink the volume, `DeleteVolume` may end its sessions.
    pub force: bool,
    /// Who asks.
    pub session: SessionId,
    /// Generation of the session.
    pub epoch: Epoch,
    /// Number of the mutation in its session; the size that the volume must have, or 0, for
    /// `ResizeVolume`.
    pub seq: u64,
    /// The volume meant.
    pub volume: VolumeId,
    /// First byte of the range; the owner's node for `OpenSession` and `EndSessions`; when it was
    /// asked for, for `UpdateVolume` and `ResizeVolume`; the replica that goes, for
    /// `SetReplacement`.
    pub offset: u64,
    /// Bytes in the range; the size for `CreateVolume`, `NewVolume` and `ResizeVolume`; the addend
    /// for `AddCounter`; the id for `RegisterReplica`; the owner's incarnation for `OpenSession`
    /// and `EndSessions`; 1 or 0 for `CordonNode`; the replica that comes, for `SetReplacement`.
    pub length: u64,
}

/// A command found in an entry: its header, and where in the entry the rest lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodedCommand {
    /// The fixed part.
    pub header: CommandHeader,
    /// Where in the entry's data the fragment checksums lie, four bytes each.
    pub checksums: Range<usize>,
    /// Where in the entry's data the payload or body lies.
    pub payload: Range<usize>,
}

/// Why bytes are not a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// Fewer bytes than the command says, or than its header needs.
    #[error("truncated command")]
    Truncated,
    /// A kind that this version does not know.
    #[error("unknown command kind {0}")]
    UnknownKind(u8),
    /// A flag or reserved field that must be 0 is not.
    #[error("reserved bits are set")]
    ReservedBits,
    /// The range is empty, too long, or wraps.
    #[error("bad range")]
    BadRange,
    /// Fragment count, payload length and range disagree.
    #[error("command length does not fit its range")]
    BadLength,
    /// A name or description that is empty, too long or not UTF-8.
    #[error("bad volume name or description")]
    BadName,
    /// Labels that a volume cannot have, see [`crate::labels`].
    #[error("bad labels")]
    BadLabels,
}

/// Number of block-sized pieces of `[offset, offset + len)`.
const fn fragment_count(offset: u64, len: u64) -> u64 {
    (offset % BLOCK_BYTES + len).div_ceil(BLOCK_BYTES)
}

/// Bytes that stand before the payload of a write of `len` bytes at `offset`.
#[must_use]
pub const fn write_command_prefix_len(offset: u64, len: u64) -> usize {
    COMMAND_HEADER_BYTES + 4 * to_usize(fragment_count(offset, len))
}

/// The commands of one entry, in order. After an error there is nothing more.
pub fn decode_all(data: &[u8]) -> CommandIter<'_> {
    CommandIter { data, at: 0 }
}

/// Iterator of [`decode_all`].
#[derive(Debug, Clone)]
pub struct CommandIter<'a> {
    data: &'a [u8],
    at: usize,
}

impl Iterator for CommandIter<'_> {
    type Item = Result<DecodedCommand, CommandError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.data.len() {
            return None;
        }
        let decoded = decode_one(self.data, self.at);
        self.at = match &decoded {
            Ok(command) => command.payload.end,
            Err(_) => self.data.len(),
        };
        Some(decoded)
    }
}

/// Whether an entry's data is well-formed, and every payload in it has the checksums that it came
/// with from its session. Reads all of it, at memory speed.
#[must_use]
pub fn is_sound(data: &[u8]) -> bool {
    decode_all(data).all(|command| command.is_ok_and(|command| has_its_checksums(data, &command)))
}

fn has_its_checksums(data: &[u8], command: &DecodedCommand) -> bool {
    if command.header.kind != CommandKind::Write {
        return true;
    }
    let checksums = data[command.checksums.clone()].as_chunks::<4>().0;
    let mut rest = &data[command.payload.clone()];
    let mut piece = to_usize(BLOCK_BYTES - command.header.offset % BLOCK_BYTES);
    checksums.iter().all(|checksum| {
        let (fragment, after) = rest.split_at(piece.min(rest.len()));
        rest = after;
        piece = to_usize(BLOCK_BYTES);
        crc32c(fragment) == u32::from_le_bytes(*checksum)
    })
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().expect("eight bytes"))
}

fn decode_one(data: &[u8], start: usize) -> Result<DecodedCommand, CommandError> {
    let rest = &data[start..];
    if rest.len() < COMMAND_HEADER_BYTES {
        return Err(CommandError::Truncated);
    }
    let total = u32_at(rest, 0) as usize;
    if total < COMMAND_HEADER_BYTES || total > rest.len() {
        return Err(CommandError::Truncated);
    }
    let kind = CommandKind::from_u8(rest[4]).ok_or(CommandError::UnknownKind(rest[4]))?;
    let flags = rest[5];
    let fragments = u64::from(u16::from_le_bytes([rest[6], rest[7]]));
    if flags & !kind.flags() != 0 || u32_at(rest, 28) != 0 {
        return Err(CommandError::ReservedBits);
    }
    let header = CommandHeader {
        kind,
        no_hole: flags & FLAG_NO_HOLE != 0,
        force: flags & FLAG_FORCE != 0,
        session: SessionId(u128::from_le_bytes(rest[8..24].try_into().expect("16 bytes"))),
        epoch: Epoch(u32_at(rest, 24)),
        seq: u64_at(rest, 32),
        volume: VolumeId(u64_at(rest, 40)),
        offset: u64_at(rest, 48),
        length: u64_at(rest, 56),
    };
    let body = (total - COMMAND_HEADER_BYTES) as u64;
    check_lengths(&header, fragments, body)?;
    let checksums_start = start + COMMAND_HEADER_BYTES;
    let payload_start = checksums_start + 4 * to_usize(fragments);
    Ok(DecodedCommand {
        header,
        checksums: checksums_start..payload_start,
        payload: payload_start..start + total,
    })
}

/// Refuses a header whose range, fragment count and body do not belong together.
fn check_lengths(header: &CommandHeader, fragments: u64, body: u64) -> Result<(), CommandError> {
    let ranged =
        matches!(header.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    if ranged && (header.length == 0 || header.offset.checked_add(header.length).is_none()) {
        return Err(CommandError::BadRange);
    }
    if header.kind == CommandKind::Write {
        if header.length > MUTATION_BYTES_MAX {
            return Err(CommandError::BadRange);
        }
        let expected = fragment_count(header.offset, header.length);
        if fragments != expected || body != 4 * fragments + header.length {
            return Err(CommandError::BadLength);
        }
        return Ok(());
    }
    if fragments != 0 || (body != 0 && !header.kind.has_body()) {
        return Err(CommandError::BadLength);
    }
    Ok(())
}

/// Builds a write command around the buffer that its payload is received into, so that the payload
/// is never copied.
///
/// ```
/// use nbd_store::{Epoch, SessionId, VolumeId, WriteBuilder};
///
/// let mut write = WriteBuilder::new(SessionId(7), Epoch(1), 1, VolumeId(1), 8192, 4096);
/// write.payload_mut().fill(0xab);
/// let command: bytes::Bytes = write.finish();
/// assert_eq!(command.len(), 64 + 4 + 4096);
/// ```
#[derive(Debug)]
pub struct WriteBuilder {
    buffer: BytesMut,
    header: CommandHeader,
    prefix: usize,
}

impl WriteBuilder {
    /// A write of `len` bytes at `offset`, its payload still zero.
    ///
    /// # Panics
    /// If `len` is 0 or more than [`MUTATION_BYTES_MAX`], or the range wraps: callers split longer
    /// requests.
    #[must_use]
    pub fn new(
        session: SessionId,
        epoch: Epoch,
        seq: u64,
        volume: VolumeId,
        offset: u64,
        len: u64,
    ) -> Self {
        assert!(len > 0 && len <= MUTATION_BYTES_MAX, "a write of {len} bytes is not one mutation");
        assert!(offset.checked_add(len).is_some(), "the range wraps");
        let prefix = write_command_prefix_len(offset, len);
        Self {
            buffer: BytesMut::zeroed(prefix + to_usize(len)),
            header: CommandHeader {
                kind: CommandKind::Write,
                no_hole: false,
                force: false,
                session,
                epoch,
                seq,
                volume,
                offset,
                length: len,
            },
            prefix,
        }
    }

    /// Where the payload goes.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.prefix..]
    }

    /// Computes the checksums, fills in the prefix and gives the command away.
    #[must_use]
    pub fn finish(mut self) -> Bytes {
        let fragments = fragment_count(self.header.offset, self.header.length);
        let (prefix, payload) = self.buffer.split_at_mut(self.prefix);
        let total = prefix.len() + payload.len();
        let (fixed, checksums) = prefix.split_at_mut(COMMAND_HEADER_BYTES);
        put_header(fixed, &self.header, fragments, total);
        let mut rest = &*payload;
        let mut piece = to_usize(BLOCK_BYTES - self.header.offset % BLOCK_BYTES);
        for checksum in checksums.chunks_exact_mut(4) {
            let (fragment, after) = rest.split_at(piece.min(rest.len()));
            checksum.copy_from_slice(&crc32c(fragment).to_le_bytes());
            rest = after;
            piece = to_usize(BLOCK_BYTES);
        }
        self.buffer.freeze()
    }
}

fn put_header(mut out: &mut [u8], header: &CommandHeader, fragments: u64, total: usize) {
    debug_assert!(fragments <= FRAGMENTS_MAX);
    out.put_u32_le(u32::try_from(total).expect("a command is far shorter than 4 GiB"));
    out.put_u8(header.kind as u8);
    let no_hole = if header.no_hole { FLAG_NO_HOLE } else { 0 };
    out.put_u8(no_hole | if header.force { FLAG_FORCE } else { 0 });
    out.put_u16_le(u16::try_from(fragments).expect("a mutation has at most 257 fragments"));
    out.put_u128_le(header.session.0);
    out.put_u32_le(header.epoch.0);
    out.put_u32_le(0);
    out.put_u64_le(header.seq);
    out.put_u64_le(header.volume.0);
    out.put_u64_le(header.offset);
    out.put_u64_le(header.length);
}

/// A command that is a header and nothing else.
fn encode_header_only(header: &CommandHeader) -> Bytes {
    let mut out = BytesMut::zeroed(COMMAND_HEADER_BYTES);
    put_header(&mut out, header, 0, COMMAND_HEADER_BYTES);
    out.freeze()
}

/// A command that is a header and a body.
fn encode_with_body(header: &CommandHeader, body: &[u8]) -> Bytes {
    let mut out = BytesMut::zeroed(COMMAND_HEADER_BYTES);
    put_header(&mut out, header, 0, COMMAND_HEADER_BYTES + body.len());
    out.put_slice(body);
    out.freeze()
}

/// A write whose payload already lies in memory (copied; see [`WriteBuilder`] to avoid that).
///
/// # Panics
/// As [`WriteBuilder::new`].
#[must_use]
pub fn encode_write(
    session: SessionId,
    epoch: Epoch,
    seq: u64,
    volume: VolumeId,
    offset: u64,
    payload: &[u8],
) -> Bytes {
    let mut builder = WriteBuilder::new(session, epoch, seq, volume, offset, payload.len() as u64);
    builder.payload_mut().copy_from_slice(payload);
    builder.finish()
}

/// Gives back the whole blocks of `[offset, offset + length)`.
#[must_use]
pub fn encode_trim(
    session: SessionId,
    epoch: Epoch,
    seq: u64,
    volume: VolumeId,
    offset: u64,
    length: u64,
) -> Bytes {
    let kind = CommandKind::Trim;
    let (no_hole, force) = (false, false);
    let header =
        CommandHeader { kind, no_hole, force, session, epoch, seq, volume, offset, length };
    encode_header_only(&header)
}

/// Makes `[offset, offset + length)` read as zero; with `no_hole` it stays allocated.
#[must_use]
pub fn encode_write_zeroes(
    session: SessionId,
    epoch: Epoch,
    seq: u64,
    volume: VolumeId,
    offset: u64,
    length: u64,
    no_hole: bool,
) -> Bytes {
    let kind = CommandKind::WriteZeroes;
    let force = false;
    let header =
        CommandHeader { kind, no_hole, force, session, epoch, seq, volume, offset, length };
    encode_header_only(&header)
}

/// Opens `session` on `volume` when `epoch` is 1, else resumes it.
#[must_use]
pub fn encode_open_session(
    session: SessionId,
    epoch: Epoch,
    volume: VolumeId,
    owner: Owner,
) -> Bytes {
    encode_header_only(&CommandHeader {
        kind: CommandKind::OpenSession,
        no_hole: false,
        force: false,
        session,
        epoch,
        seq: 0,
        volume,
        offset: owner.node,
        length: owner.incarnation,
    })
}

/// Ends `session`.
#[must_use]
pub fn encode_close_session(session: SessionId, epoch: Epoch) -> Bytes {
    encode_header_only(&CommandHeader {
        kind: CommandKind::CloseSession,
        no_hole: false,
        force: false,
        session,
        epoch,
        seq: 0,
        volume: VolumeId(0),
        offset: 0,
        length: 0,
    })
}

/// Adds `addend` to the shard's counter.
#[must_use]
pub fn encode_add_counter(addend: i64) -> Bytes {
    encode_header_only(&metadata_header(CommandKind::AddCounter, addend.cast_unsigned()))
}

/// Ends all sessions of `owner.node` that an earlier incarnation than `owner.incarnation` holds.
#[must_use]
pub fn encode_end_sessions(owner: Owner) -> Bytes {
    let mut header = metadata_header(CommandKind::EndSessions, owner.incarnation);
    header.offset = owner.node;
    encode_header_only(&header)
}

/// Makes a replica known under this id, or under the one that its directory has. The id is to be
/// the next one, as in [`crate::Formation::next_replica`]; it is refused if it was given meanwhile.
///
/// The command carries the id so that applying it gives no other one: a replica that joined late
/// applies old registrations to a state that knows of later ones.
///
/// # Errors
/// [`CommandError::BadName`] when an address is too long.
pub fn encode_register_replica(
    new: &ReplicaRegistration,
    id: ReplicaId,
) -> Result<Bytes, CommandError> {
    if !new.addresses.is_bounded() {
        return Err(CommandError::BadName);
    }
    let header = metadata_header(CommandKind::RegisterReplica, id.get());
    Ok(encode_with_body(&header, &encode_registration(new)))
}

const fn metadata_header(kind: CommandKind, length: u64) -> CommandHeader {
    CommandHeader {
        kind,
        no_hole: false,
        force: false,
        session: SessionId::NONE,
        epoch: Epoch(0),
        seq: 0,
        volume: VolumeId(0),
        offset: 0,
        length,
    }
}

#[cfg(test)]
mod tests;
