//! What a process is told of a session that it takes over.
//!
//! ```text
//! 0          16         20            28          36        44           45           46
//! +----------+----------+-------------+-----------+---------+------------+------------+--
//! | id u128  | epoch u32| next_seq u64| volume u64| size u64| read_only  | replies    |
//! +----------+----------+-------------+-----------+---------+------------+------------+--
//! 46                 47                   51             53            53 + n
//! +------------------+--------------------+--------------+-------------+---------------
//! | has a context u8 | context's id u32   | n u16        | export name | unread input
//! +------------------+--------------------+--------------+-------------+---------------
//! ```
//! Little-endian. `replies` is 0 for simple ones, 1 for structured, 2 for extended.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut, TryGetError};
use nbd_proto::limits::{EXPORT_BYTES_MAX, EXPORT_NAME_BYTES_MAX};
use nbd_proto::{ExportInfo, ExportName, Negotiated, ReplyStyle};
use nbd_store::{Epoch, SessionId, VolumeId};

/// Bytes of input that may be unread: all that is asked of a socket at once, twice over. A session
/// with more waits until it has decoded some.
pub(crate) const UNREAD_BYTES_MAX: usize = 256 << 10;

/// A session between two requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Parcel {
    pub(crate) id: SessionId,
    /// The newest one ever asked for.
    pub(crate) epoch: Epoch,
    /// The lowest number that no mutation was ever given.
    pub(crate) next_seq: u64,
    pub(crate) volume: VolumeId,
    /// What the client was promised. The description has served its purpose, and is not told.
    pub(crate) negotiated: Negotiated,
    /// Received and not looked at.
    pub(crate) input: Bytes,
}

/// Bytes that are no parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a session's state is malformed: {0}")]
pub struct MalformedParcel(&'static str);

impl From<TryGetError> for MalformedParcel {
    fn from(_: TryGetError) -> Self {
        Self("it is cut short")
    }
}

impl Parcel {
    pub(crate) fn encode(&self) -> Bytes {
        let Negotiated { export, replies, allocation_context } = &self.negotiated;
        let name = export.name.as_bytes();
        let mut out = BytesMut::with_capacity(64 + name.len() + self.input.len());
        out.put_u128_le(self.id.0);
        out.put_u32_le(self.epoch.0);
        out.put_u64_le(self.next_seq);
        out.put_u64_le(self.volume.0);
        out.put_u64_le(export.size);
        out.put_u8(export.read_only.into());
        out.put_u8(match replies {
            ReplyStyle::Simple => 0,
            ReplyStyle::Structured => 1,
            ReplyStyle::Extended => 2,
        });
        out.put_u8(allocation_context.is_some().into());
        out.put_u32_le(allocation_context.unwrap_or_default());
        out.put_u16_le(u16::try_from(name.len()).expect("at most 4096 bytes"));
        out.put_slice(name);
        out.put_slice(&self.input);
        out.freeze()
    }

    pub(crate) fn decode(mut from: &[u8]) -> Result<Self, MalformedParcel> {
        let id = SessionId(from.try_get_u128_le()?);
        let epoch = Epoch(from.try_get_u32_le()?);
        let next_seq = from.try_get_u64_le()?;
        let volume = VolumeId(from.try_get_u64_le()?);
        let size = from.try_get_u64_le()?;
        let read_only = flag(from.try_get_u8()?)?;
        let replies = match from.try_get_u8()? {
            0 => ReplyStyle::Simple,
            1 => ReplyStyle::Structured,
            2 => ReplyStyle::Extended,
            _ => return Err(MalformedParcel("an unknown style of replies")),
        };
        let has_context = flag(from.try_get_u8()?)?;
        let context = from.try_get_u32_le()?;
        let allocation_context = has_context.then_some(context);
        let name_len = usize::from(from.try_get_u16_le()?);
        let (name, input) = from.split_at_checked(name_len).ok_or(MalformedParcel("no name"))?;
        let name = ExportName::from_bytes(name).map_err(|_| MalformedParcel("a bad name"))?;
        let is_possible = id != SessionId::NONE
            && epoch >= Epoch::FIRST
            && next_seq >= 1
            && size <= EXPORT_BYTES_MAX
            && (replies != ReplyStyle::Simple || !has_context)
            && input.len() <= UNREAD_BYTES_MAX;
        if !is_possible {
            return Err(MalformedParcel("its numbers are impossible"));
        }
        let export = ExportInfo { name, description: String::new(), size, read_only };
        let negotiated = Negotiated { export, replies, allocation_context };
        let input = Bytes::copy_from_slice(input);
        Ok(Self { id, epoch, next_seq, volume, negotiated, input })
    }
}

const fn flag(byte: u8) -> Result<bool, MalformedParcel> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(MalformedParcel("a flag that is neither set nor clear")),
    }
}

/// Bytes of the largest parcel there is.
pub const PARCEL_BYTES_MAX: usize = 53 + EXPORT_NAME_BYTES_MAX + UNREAD_BYTES_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel() -> Parcel {
        let export = ExportInfo {
            name: "v".parse().unwrap(),
            description: String::new(),
            size: 1 << 30,
            read_only: false,
        };
        Parcel {
            id: SessionId(0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100),
            epoch: Epoch(3),
            next_seq: 9,
            volume: VolumeId(1 << 32 | 2),
            negotiated: Negotiated {
                export,
                replies: ReplyStyle::Extended,
                allocation_context: Some(1),
            },
            input: Bytes::from_static(b"half a header"),
        }
    }

    // Two versions may run side by side during a takeover: the bytes stay.
    #[test]
    fn the_layout_is_the_documented_one() {
        let bytes = parcel().encode();
        let id: Vec<u8> = (0..16).collect();
        assert_eq!(bytes[..16], id[..]);
        let numbers = [3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0];
        assert_eq!(bytes[16..36], numbers);
        assert_eq!(bytes[36..44], (1_u64 << 30).to_le_bytes());
        assert_eq!(bytes[44..53], [0, 2, 1, 1, 0, 0, 0, 1, 0]);
        assert_eq!(bytes[53..], *b"vhalf a header");
    }

    #[test]
    fn what_is_told_arrives() {
        let mut sent = parcel();
        assert_eq!(Parcel::decode(&sent.encode()), Ok(sent.clone()));
        sent.negotiated.replies = ReplyStyle::Simple;
        sent.negotiated.allocation_context = None;
        sent.negotiated.export.read_only = true;
        sent.negotiated.export.name = "n".repeat(EXPORT_NAME_BYTES_MAX).parse().unwrap();
        sent.input = vec![1; UNREAD_BYTES_MAX].into();
        let bytes = sent.encode();
        assert_eq!(bytes.len(), PARCEL_BYTES_MAX);
        assert_eq!(Parcel::decode(&bytes), Ok(sent));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let bytes = parcel().encode();
        for len in 0..bytes.len() - parcel().input.len() {
            Parcel::decode(&bytes[..len]).unwrap_err();
        }
        let with = |place: usize, byte: u8| {
            let mut bytes = bytes.to_vec();
            bytes[place] = byte;
            Parcel::decode(&bytes)
        };
        with(44, 2).unwrap_err();
        with(45, 3).unwrap_err();
        with(45, 0).unwrap_err();
        with(43, 0xff).unwrap_err();
        with(16, 0).unwrap_err();
        with(53, 0).unwrap_err();
        let mut long = parcel();
        long.input = vec![0; UNREAD_BYTES_MAX + 1].into();
        Parcel::decode(&long.encode()).unwrap_err();
    }
}
