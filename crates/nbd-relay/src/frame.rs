//! Frames: what relays carry.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use nbd_log::checksum::crc32c;

/// The first bytes of a relay, with the version of the protocol in the last of them. The first one
/// differs from that of HTTP/2's connection preface.
pub const PREAMBLE: [u8; 8] = *b"CBrelay\x03";

/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 24;

/// Longest body. A mutation of 1 MiB with its checksums fits, and so does a piece of a read.
pub const BODY_BYTES_MAX: usize = (1 << 20) + (64 << 10);

/// What a frame is. The numbers are on the wire and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Opens or resumes the session.
    Hello = 1,
    /// A write, trim or write-zeroes.
    Mutation = 2,
    /// Asks for bytes.
    Read = 3,
    /// Asks which parts of a range are allocated.
    Status = 4,
    /// The next request is traced.
    Trace = 5,
    /// Whether the session is attached.
    Verdict = 16,
    /// The log's verdict on a mutation.
    Applied = 17,
    /// A mutation never got as far as the log.
    Refused = 18,
    /// A piece of a read.
    Bytes = 19,
    /// What came of a status.
    Extents = 20,
    /// A query has failed.
    Failed = 21,
    /// Nothing more will come.
    End = 22,
    /// The leader is alive, and works on what was asked.
    Alive = 23,
    /// The session was ended in the log.
    Ended = 24,
    /// The next requests are to be traced.
    Sample = 25,
}

impl Kind {
    const fn from_u8(kind: u8) -> Option<Self> {
        Some(match kind {
            1 => Self::Hello,
            2 => Self::Mutation,
            3 => Self::Read,
            4 => Self::Status,
            5 => Self::Trace,
            16 => Self::Verdict,
            17 => Self::Applied,
            18 => Self::Refused,
            19 => Self::Bytes,
            20 => Self::Extents,
            21 => Self::Failed,
            22 => Self::End,
            23 => Self::Alive,
            24 => Self::Ended,
            25 => Self::Sample,
            _ => return None,
        })
    }
}

/// Bytes that are no frame. The relay is of no use any more: where the next frame begins is not
/// known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header does not match its checksum.
    #[error("a frame's header is damaged")]
    Header,
    /// A kind that this version does not know.
    #[error("a frame of the unknown kind {0}")]
    UnknownKind(u8),
    /// Reserved bits that must be 0 are not.
    #[error("a frame with reserved bits set")]
    ReservedBits,
    /// A body longer than [`BODY_BYTES_MAX`].
    #[error("a frame of {0} bytes: allowed are {BODY_BYTES_MAX}")]
    TooLong(u32),
}

/// One frame as it came. What its checksum says of the body is for whoever knows how much of it
/// that covers: see [`Frame::is_whole`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// What that means in particular.
    pub code: u8,
    /// Which request it is about.
    pub id: u64,
    /// The rest.
    pub body: Bytes,
    crc: u32,
}

impl Frame {
    /// Whether the first `covered` bytes of the body are as they were sent. All bytes are covered
    /// but the payload of a mutation.
    #[must_use]
    pub fn is_whole(&self, covered: usize) -> bool {
        self.body.get(..covered).is_some_and(|body| crc32c(body) == self.crc)
    }
}

#[derive(Debug, Clone, Copy)]
struct Header {
    kind: Kind,
    code: u8,
    id: u64,
    body_len: usize,
    crc: u32,
}

/// Cuts what is received into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Of the frame whose body is being waited for.
    header: Option<Header>,
}

impl Decoder {
    /// The next frame in `input`, whose body then is a part of that buffer; `None` if it is not all
    /// there.
    ///
    /// # Errors
    /// [`FrameError`]. After that there are no frames any more.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None => match input.first_chunk::<HEADER_BYTES>() {
                Some(bytes) => {
                    let header = decode_header(bytes)?;
                    input.advance(HEADER_BYTES);
                    header
                }
                None => return Ok(None),
            },
        };
        if input.len() < header.body_len {
            self.header = Some(header);
            return Ok(None);
        }
        self.header = None;
        let Header { kind, code, id, body_len, crc } = header;
        Ok(Some(Frame { kind, code, id, body: input.split_to(body_len).freeze(), crc }))
    }

    /// Bytes that `input` must hold for the present frame to be complete, of which it may have some
    /// already; at most [`BODY_BYTES_MAX`].
    #[must_use]
    pub fn wanted(&self) -> usize {
        self.header.map_or(HEADER_BYTES, |header| header.body_len)
    }

    /// Whether a frame has begun.
    #[must_use]
    pub const fn is_midway(&self) -> bool {
        self.header.is_some()
    }
}

fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
    let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
    if crc32c(&bytes[..20]) != u32_at(20) {
        return Err(FrameError::Header);
    }
    let kind = Kind::from_u8(bytes[0]).ok_or(FrameError::UnknownKind(bytes[0]))?;
    if bytes[2..4] != [0, 0] {
        return Err(FrameError::ReservedBits);
    }
    let body_len = usize::try_from(u32_at(4)).unwrap_or(usize::MAX);
    if body_len > BODY_BYTES_MAX {
        return Err(FrameError::TooLong(u32_at(4)));
    }
    let id = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
    Ok(Header { kind, code: bytes[1], id, body_len, crc: u32_at(16) })
}

/// Puts a header into `out`: the `body_len` bytes behind it have the checksum `crc`.
pub(crate) fn put_header(
    out: &mut BytesMut,
    kind: Kind,
    code: u8,
    id: u64,
    body_len: usize,
    crc: u32,
) {
    debug_assert!(body_len <= BODY_BYTES_MAX, "{kind:?} of {body_len} bytes");
    let mut header = [0; HEADER_BYTES];
    let mut rest = &mut header[..];
    rest.put_u8(kind as u8);
    rest.put_u8(code);
    rest.put_u16_le(0);
    rest.put_u32_le(u32::try_from(body_len).unwrap_or(u32::MAX));
    rest.put_u64_le(id);
    rest.put_u32_le(crc);
    let header_crc = crc32c(&header[..20]);
    header[20..].copy_from_slice(&header_crc.to_le_bytes());
    out.put_slice(&header);
}

/// Puts a frame with this body into `out`.
pub(crate) fn put(out: &mut BytesMut, kind: Kind, code: u8, id: u64, body: &[u8]) {
    put_header(out, kind, code, id, body.len(), crc32c(body));
    out.put_slice(body);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frame_comes_out_as_it_went_in_however_it_is_cut() {
        let mut wire = BytesMut::new();
        put(&mut wire, Kind::Read, 1, 7, b"sixteen bytes ..");
        put(&mut wire, Kind::Applied, 0, u64::MAX, b"");
        for cut in 0..=wire.len() {
            let (mut decoder, mut input) = (Decoder::default(), BytesMut::from(&wire[..cut]));
            let mut frames = Vec::new();
            while let Some(frame) = decoder.decode(&mut input).unwrap() {
                frames.push(frame);
            }
            input.extend_from_slice(&wire[cut..]);
            while let Some(frame) = decoder.decode(&mut input).unwrap() {
                frames.push(frame);
            }
            let [first, second] = &frames[..] else { panic!("{frames:?}") };
            assert_eq!((first.kind, first.code, first.id), (Kind::Read, 1, 7));
            assert_eq!(first.body, &b"sixteen bytes .."[..]);
            assert!(first.is_whole(16) && !first.is_whole(15) && !first.is_whole(17));
            assert_eq!((second.kind, second.id), (Kind::Applied, u64::MAX));
            assert!(input.is_empty() && !decoder.is_midway());
        }
    }

    #[test]
    fn a_length_is_refused_before_its_body_is_waited_for() {
        let mut wire = BytesMut::new();
        put_header(&mut wire, Kind::Mutation, 0, 1, BODY_BYTES_MAX, 0);
        let mut decoder = Decoder::default();
        assert_eq!(decoder.decode(&mut wire), Ok(None));
        assert_eq!(decoder.wanted(), BODY_BYTES_MAX);
        let mut header = [0; HEADER_BYTES];
        header[0] = Kind::Mutation as u8;
        header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32c(&header[..20]);
        header[20..].copy_from_slice(&crc.to_le_bytes());
        let refused = Decoder::default().decode(&mut BytesMut::from(&header[..]));
        assert_eq!(refused, Err(FrameError::TooLong(u32::MAX)));
    }

    proptest! {
        #[test]
        fn damage_anywhere_is_found(
            body in proptest::collection::vec(any::<u8>(), 0..64),
            id: u64,
            code: u8,
            at: prop::sample::Index,
            bit in 0..8_u32,
        ) {
            let mut wire = BytesMut::new();
            put(&mut wire, Kind::Bytes, code, id, &body);
            let at = at.index(wire.len());
            wire[at] ^= 1_u8 << bit;
            let decoded = Decoder::default().decode(&mut wire);
            let found = match &decoded {
                Ok(Some(frame)) => !frame.is_whole(frame.body.len()),
                Ok(None) => false,
                Err(_) => true,
            };
            prop_assert!(found, "{decoded:?}");
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..99)) {
            let mut input = BytesMut::from(&bytes[..]);
            let _ = Decoder::default().decode(&mut input);
        }
    }
}
