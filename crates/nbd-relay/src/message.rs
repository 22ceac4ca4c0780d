//! What the frames of a relay mean.

use std::ops::Range;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use nbd_log::checksum::crc32c;
use nbd_session::{Query, QueryId};
use nbd_store::limits::READ_BYTES_MAX;
use nbd_store::{
    BlockStatus, CommandHeader, CommandKind, Epoch, Extent, Owner, Rejection, SessionId, VolumeId,
    decode_all, is_sound,
};

use crate::frame::{BODY_BYTES_MAX, Frame, Kind, put, put_header};

/// Bytes in one piece of a read, at most. The pieces of a read come in order, and each ends with
/// the read or with a sector of 512 bytes: a sector is read at one moment.
pub const PIECE_BYTES_MAX: usize = 1 << 20;

/// Longest reason that an [`FromLeader::End`] gives, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;

/// How often a leader shows that it is alive while requests are unanswered.
pub const ALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Longest text in a [`Hello`], in bytes; what is allowed as a cluster's name is for the node to
/// say.
pub const HELLO_TEXT_BYTES_MAX: usize = 255;

/// Bytes of a [`Hello`] before its texts.
const HELLO_FIXED_BYTES: usize = 62;

/// Bodies up to this length are copied behind other frames rather than sent as buffers of their
/// own: copying 16 KiB costs less than another slice in a vectored write.
const COPIED_BYTES_MAX: usize = 16 << 10;

/// Of a run in a piece: it is zeroes, which are not sent.
const RUN_IS_ZERO: u32 = 1 << 31;

/// Bytes of an extent.
const EXTENT_BYTES: usize = 12;

const HOLES: u8 = 1;
const IN_RUNS: u8 = 1;
const EXTENT_HOLE: u32 = 1;
const EXTENT_ZERO: u32 = 2;

/// Verdicts by code; rejections lie above the last.
const ATTACHED: u8 = 0;
const NOT_LEADER: u8 = 1;
const LOST: u8 = 2;
const REJECTED: u8 = 16;

/// Opens a session with epoch 1, or resumes it with a higher one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Name of the cluster that is meant.
    pub cluster: String,
    /// The shard that is meant.
    pub shard: u32,
    /// The session.
    pub session: SessionId,
    /// Its epoch from now on: at least 1.
    pub epoch: Epoch,
    /// The volume that the session is for.
    pub volume: VolumeId,
    /// The process that holds the session.
    pub owner: Owner,
    /// Whom the session is for.
    pub caller: Caller,
}

/// The client of a session and the process that serves it, as operators are told. Nothing is
/// decided by it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Caller {
    /// Where the client is, as the process that it is connected to sees it: host:port. At most
    /// [`HELLO_TEXT_BYTES_MAX`] bytes, without control characters.
    pub client: String,
    /// Name of that process, a node or a load balancer; bounded in the same way.
    pub via: String,
    /// When the client was connected: milliseconds since 1970, by the clock of that process.
    pub since_ms: u64,
}

/// Whether a session is attached. Nothing but an end follows if it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The log has opened or resumed it with the epoch asked for.
    Attached,
    /// This replica does not lead.
    NotLeader,
    /// Leadership was lost meanwhile: the session may or may not have the epoch asked for.
    Lost,
    /// The log says no.
    Rejected(Rejection),
}

/// Why a request was not carried out, when it is not the log that says no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Failed {
    /// No room on the disk. A mutation was not put into the log.
    NoSpace = 1,
    /// The disk failed, or what it holds is damaged and no good copy is at hand. A mutation was not
    /// put into the log.
    Io = 2,
    /// The range does not end within the volume: that was made smaller since its client attached.
    /// A mutation was not put into the log.
    PastEnd = 3,
    /// The volume was deleted. A mutation was not put into the log.
    Gone = 4,
}

/// A message of a front end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromCaller {
    /// The first one.
    Hello(Hello),
    /// A write, trim or write-zeroes. At most [`SESSION_WINDOW`](nbd_store::limits::SESSION_WINDOW)
    /// may be unanswered.
    Mutation {
        /// What the command says of itself.
        header: CommandHeader,
        /// The command: its session, epoch and volume are those of the hello.
        command: Bytes,
    },
    /// A read or a block status.
    Query {
        /// Not in use by another one that is not answered.
        id: QueryId,
        /// What is asked.
        query: Query,
    },
    /// The request that comes next is traced.
    Trace {
        /// Its number: a mutation's in its session, or a query's.
        id: u64,
        /// The trace; never 0.
        trace_id: u128,
        /// The span below which the leader's belong; never 0.
        span_id: u64,
    },
}

/// A message of a leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromLeader {
    /// The first one.
    Verdict(Verdict),
    /// The log's verdict on a mutation: it took effect, now or when it was first sent, or was
    /// rejected.
    Applied {
        /// Its number in the session.
        seq: u64,
        /// The verdict.
        verdict: Result<(), Rejection>,
    },
    /// A mutation never got as far as the log.
    Refused {
        /// Its number in the session.
        seq: u64,
        /// Why.
        failed: Failed,
    },
    /// A piece of the bytes of a read: 1 to [`PIECE_BYTES_MAX`] of them, behind those that came
    /// before.
    Bytes {
        /// The read.
        id: QueryId,
        /// The bytes, zeroes among them.
        bytes: Bytes,
        /// Runs of them in order, without gaps; `true` for one that is known to be zero.
        runs: Vec<(Range<usize>, bool)>,
    },
    /// What came of a block status: at least one extent.
    Extents {
        /// The query.
        id: QueryId,
        /// From the offset asked for on, without gaps; they may cover less than was asked for.
        extents: Vec<Extent>,
    },
    /// A query has failed, and this is its last message.
    Failed {
        /// The query.
        id: QueryId,
        /// Why.
        failed: Failed,
    },
    /// See [`ALIVE_INTERVAL`].
    Alive,
    /// The session was ended in the log, by an operator or with its volume: nothing more will come,
    /// and it cannot be resumed. What is not answered may have happened, and will not any more.
    Ended,
    /// An operator wants to see the next requests of this session traced.
    Sample {
        /// How many.
        requests: u32,
    },
    /// Nothing more will come. What is not answered may or may not happen, or may have.
    End {
        /// For the log.
        reason: String,
    },
}

/// A frame that makes no sense, or whose content was damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedMessage {
    /// The body does not match its checksum.
    #[error("damaged on the way: the body of a frame does not match its checksum")]
    Damaged,
    /// A payload does not match the checksums that came with it.
    #[error("damaged: the payload of a write does not match its checksums")]
    Payload,
    /// A rule is broken.
    #[error("malformed message: {0}")]
    Broken(&'static str),
}

type Decoded<T> = Result<T, MalformedMessage>;

const fn broken<T>(what: &'static str) -> Decoded<T> {
    Err(MalformedMessage::Broken(what))
}

impl Failed {
    /// It in words.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::NoSpace => "no room on the leader's disk",
            Self::Io => "the disk failed",
            Self::PastEnd => "past the end of the volume",
            Self::Gone => "the volume was deleted",
        }
    }

    fn from_code(code: u8) -> Decoded<Self> {
        match code {
            1 => Ok(Self::NoSpace),
            2 => Ok(Self::Io),
            3 => Ok(Self::PastEnd),
            4 => Ok(Self::Gone),
            _ => broken("an unknown failure"),
        }
    }
}

impl Verdict {
    const fn code(self) -> u8 {
        match self {
            Self::Attached => ATTACHED,
            Self::NotLeader => NOT_LEADER,
            Self::Lost => LOST,
            Self::Rejected(rejection) => REJECTED + rejection as u8,
        }
    }

    fn from_code(code: u8) -> Decoded<Self> {
        match code {
            ATTACHED => Ok(Self::Attached),
            NOT_LEADER => Ok(Self::NotLeader),
            LOST => Ok(Self::Lost),
            _ => rejection(code.wrapping_sub(REJECTED)).map(Self::Rejected),
        }
    }
}

fn rejection(code: u8) -> Decoded<Rejection> {
    Rejection::from_u8(code).map_or_else(|| broken("an unknown rejection"), Ok)
}

impl FromCaller {
    /// What a frame of a front end says, whole and undamaged.
    ///
    /// # Errors
    /// It says nothing that a front end may say, or was damaged.
    pub fn decode(frame: Frame) -> Decoded<Self> {
        if frame.kind == Kind::Mutation {
            return mutation(frame);
        }
        if !frame.is_whole(frame.body.len()) {
            return Err(MalformedMessage::Damaged);
        }
        let id = QueryId(frame.id);
        let mut body = frame.body;
        let query = match (frame.kind, body.len()) {
            (Kind::Hello, HELLO_FIXED_BYTES..) => return hello(body),
            (Kind::Read, 16) => {
                let (offset, len) = (body.get_u64_le(), body.get_u64_le());
                if len == 0 || len > READ_BYTES_MAX || offset.checked_add(len).is_none() {
                    return broken("a read of an impossible range");
                }
                Query::Read { offset, len, holes: frame.code & HOLES != 0 }
            }
            (Kind::Status, 20) => {
                let (offset, len) = (body.get_u64_le(), body.get_u64_le());
                let extents_max = body.get_u32_le();
                if len == 0 || offset.checked_add(len).is_none() || extents_max == 0 {
                    return broken("a block status of nothing");
                }
                Query::BlockStatus { offset, len, extents_max }
            }
            (Kind::Trace, 24) => {
                let (trace_id, span_id) = (body.get_u128_le(), body.get_u64_le());
                if trace_id == 0 || span_id == 0 {
                    return broken("a trace without an id");
                }
                return Ok(Self::Trace { id: frame.id, trace_id, span_id });
            }
            _ => return broken("not a message of a front end, or of another length"),
        };
        Ok(Self::Query { id, query })
    }

    /// Puts it into `out`. What is returned is to be sent right behind, as it is.
    #[must_use]
    pub fn put(self, out: &mut BytesMut) -> Option<Bytes> {
        match self {
            Self::Hello(hello) => {
                put(out, Kind::Hello, 0, 0, &hello.body());
                None
            }
            Self::Mutation { command, .. } => put_mutation(out, command),
            Self::Query { id: QueryId(id), query: Query::Read { offset, len, holes } } => {
                let mut body = [0; 16];
                let mut rest = &mut body[..];
                rest.put_u64_le(offset);
                rest.put_u64_le(len);
                put(out, Kind::Read, if holes { HOLES } else { 0 }, id, &body);
                None
            }
            Self::Query { id, query: Query::BlockStatus { offset, len, extents_max } } => {
                let mut body = [0; 20];
                let mut rest = &mut body[..];
                rest.put_u64_le(offset);
                rest.put_u64_le(len);
                rest.put_u32_le(extents_max);
                put(out, Kind::Status, 0, id.0, &body);
                None
            }
            Self::Trace { id, trace_id, span_id } => {
                let mut body = [0; 24];
                let mut rest = &mut body[..];
                rest.put_u128_le(trace_id);
                rest.put_u64_le(span_id);
                put(out, Kind::Trace, 0, id, &body);
                None
            }
        }
    }
}

/// Copies a short body; a long one is left to be sent behind.
fn behind(out: &mut BytesMut, body: Bytes) -> Option<Bytes> {
    if body.len() <= COPIED_BYTES_MAX {
        out.put_slice(&body);
        return None;
    }
    Some(body)
}

/// Puts a command of this process's own into `out`, as [`FromCaller::put`] does.
///
/// # Panics
/// It is no command.
#[must_use]
pub fn put_mutation(out: &mut BytesMut, command: Bytes) -> Option<Bytes> {
    let Some(Ok(decoded)) = decode_all(&command).next() else {
        panic!("a command made by this process is none")
    };
    let crc = crc32c(&command[..decoded.payload.start]);
    put_header(out, Kind::Mutation, 0, decoded.header.seq, command.len(), crc);
    behind(out, command)
}

fn mutation(frame: Frame) -> Decoded<FromCaller> {
    let Frame { id, ref body, .. } = frame;
    let mut commands = decode_all(body);
    let Some(Ok(decoded)) = commands.next() else {
        return broken("a mutation that is no command");
    };
    if !frame.is_whole(decoded.payload.start) {
        return Err(MalformedMessage::Damaged);
    }
    let header = decoded.header;
    let mutates =
        matches!(header.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    if !mutates || commands.next().is_some() || header.seq != id {
        return broken("a mutation is one write, trim or write-zeroes");
    }
    if !is_sound(body) {
        return Err(MalformedMessage::Payload);
    }
    Ok(FromCaller::Mutation { header, command: frame.body })
}

impl Caller {
    /// The caller with texts that can be sent: cut to their bound, without control characters.
    #[must_use]
    pub fn bounded(self) -> Self {
        let bounded = |mut text: String| {
            text.retain(|letter| !letter.is_control());
            text.truncate(text.floor_char_boundary(HELLO_TEXT_BYTES_MAX));
            text
        };
        Self { client: bounded(self.client), via: bounded(self.via), ..self }
    }
}

impl Hello {
    fn body(&self) -> Vec<u8> {
        let Caller { client, via, since_ms } = &self.caller;
        let texts = [&self.cluster, via, client];
        let mut body = Vec::with_capacity(HELLO_FIXED_BYTES + 64);
        body.put_u32_le(self.shard);
        body.put_u32_le(self.epoch.0);
        body.put_u128_le(self.session.0);
        body.put_u64_le(self.volume.0);
        body.put_u64_le(self.owner.node);
        body.put_u64_le(self.owner.incarnation);
        body.put_u64_le(*since_ms);
        for text in texts {
            body.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
        }
        for text in texts {
            body.put_slice(text.as_bytes());
        }
        body
    }
}

/// The hello in a body of at least [`HELLO_FIXED_BYTES`].
fn hello(mut body: Bytes) -> Decoded<FromCaller> {
    let (shard, epoch) = (body.get_u32_le(), Epoch(body.get_u32_le()));
    let session = SessionId(body.get_u128_le());
    let volume = VolumeId(body.get_u64_le());
    let owner = Owner { node: body.get_u64_le(), incarnation: body.get_u64_le() };
    let since_ms = body.get_u64_le();
    let lengths = [0; 3].map(|_: u8| usize::from(body.get_u16_le()));
    if lengths.iter().any(|len| *len > HELLO_TEXT_BYTES_MAX) {
        return broken("a text of a hello is at most 255 bytes");
    }
    if lengths.iter().sum::<usize>() != body.len() {
        return broken("a hello is as long as its texts");
    }
    let mut text = |len| match String::from_utf8(body.split_to(len).to_vec()) {
        Ok(text) if !text.contains(char::is_control) => Ok(text),
        _ => broken("a text of a hello is UTF-8 without control characters"),
    };
    let [cluster, via, client] = [text(lengths[0])?, text(lengths[1])?, text(lengths[2])?];
    if epoch == Epoch(0) {
        return broken("a session's epoch is at least 1");
    }
    let caller = Caller { client, via, since_ms };
    Ok(FromCaller::Hello(Hello { cluster, shard, session, epoch, volume, owner, caller }))
}

impl FromLeader {
    /// What a frame of a leader says, whole and undamaged.
    ///
    /// # Errors
    /// It says nothing that a leader may say, or was damaged.
    pub fn decode(frame: Frame) -> Decoded<Self> {
        if !frame.is_whole(frame.body.len()) {
            return Err(MalformedMessage::Damaged);
        }
        let id = QueryId(frame.id);
        let Frame { kind, code, id: seq, body, .. } = frame;
        Ok(match (kind, body.len()) {
            (Kind::Alive, 0) => Self::Alive,
            (Kind::Ended, 0) => Self::Ended,
            (Kind::Sample, 0) => match u32::try_from(seq) {
                Ok(requests) => Self::Sample { requests },
                Err(_) => return broken("more requests to be traced than there can be"),
            },
            (Kind::Verdict, 0) => Self::Verdict(Verdict::from_code(code)?),
            (Kind::Applied, 0) => {
                let verdict = if code == 0 { Ok(()) } else { Err(rejection(code)?) };
                Self::Applied { seq, verdict }
            }
            (Kind::Refused, 0) => Self::Refused { seq, failed: Failed::from_code(code)? },
            (Kind::Failed, 0) => Self::Failed { id, failed: Failed::from_code(code)? },
            (Kind::Bytes, 1..=PIECE_BYTES_MAX) if code == 0 => {
                let whole = 0..body.len();
                Self::Bytes { id, bytes: body, runs: vec![(whole, false)] }
            }
            (Kind::Bytes, _) if code == IN_RUNS => in_runs(id, body)?,
            (Kind::Extents, len) if len > 0 && len.is_multiple_of(EXTENT_BYTES) => {
                Self::Extents { id, extents: extents(body) }
            }
            (Kind::End, 0..=REASON_BYTES_MAX) => {
                Self::End { reason: String::from_utf8_lossy(&body).into_owned() }
            }
            _ => return broken("not a message of a leader, or of another length"),
        })
    }

    /// Puts it into `out`. What is returned is to be sent right behind, as it is.
    #[must_use]
    pub fn put(self, out: &mut BytesMut) -> Option<Bytes> {
        match self {
            Self::Alive => put(out, Kind::Alive, 0, 0, &[]),
            Self::Ended => put(out, Kind::Ended, 0, 0, &[]),
            Self::Sample { requests } => put(out, Kind::Sample, 0, u64::from(requests), &[]),
            Self::Verdict(verdict) => put(out, Kind::Verdict, verdict.code(), 0, &[]),
            Self::Applied { seq, verdict } => {
                let code = verdict.map_or_else(|rejection| rejection as u8, |()| 0);
                put(out, Kind::Applied, code, seq, &[]);
            }
            Self::Refused { seq, failed } => put(out, Kind::Refused, failed as u8, seq, &[]),
            Self::Failed { id, failed } => put(out, Kind::Failed, failed as u8, id.0, &[]),
            Self::Bytes { id, bytes, runs } => {
                if !is_one_run(&runs) {
                    put_bytes(out, id, &bytes, &runs);
                    return None;
                }
                put_header(out, Kind::Bytes, 0, id.0, bytes.len(), crc32c(&bytes));
                return behind(out, bytes);
            }
            Self::Extents { id, extents } => {
                let fit = BODY_BYTES_MAX / EXTENT_BYTES;
                let mut body = Vec::with_capacity(extents.len().min(fit) * EXTENT_BYTES);
                for Extent { len, status } in extents.into_iter().take(fit) {
                    body.put_u64_le(len);
                    let hole = if status.hole { EXTENT_HOLE } else { 0 };
                    body.put_u32_le(hole | if status.zero { EXTENT_ZERO } else { 0 });
                }
                put(out, Kind::Extents, 0, id.0, &body);
            }
            Self::End { reason } => {
                let end = reason.floor_char_boundary(REASON_BYTES_MAX);
                put(out, Kind::End, 0, 0, &reason.as_bytes()[..end]);
            }
        }
        None
    }
}

/// Puts a piece of a read into `out`, zeroes left out: as [`FromLeader::Bytes`] for bytes that are
/// somebody else's.
pub fn put_bytes(out: &mut BytesMut, id: QueryId, bytes: &[u8], runs: &[(Range<usize>, bool)]) {
    if is_one_run(runs) {
        return put(out, Kind::Bytes, 0, id.0, bytes);
    }
    let sent = runs.iter().filter(|(_, zero)| !zero);
    let sent_bytes: usize = sent.clone().map(|(run, _)| run.len()).sum();
    let mut body = Vec::with_capacity(4 + 4 * runs.len() + sent_bytes);
    body.put_u32_le(u32::try_from(runs.len()).unwrap_or(u32::MAX));
    for (run, zero) in runs {
        let len = u32::try_from(run.len()).unwrap_or(u32::MAX);
        body.put_u32_le(len | if *zero { RUN_IS_ZERO } else { 0 });
    }
    for (run, _) in sent {
        body.put_slice(&bytes[run.clone()]);
    }
    put(out, Kind::Bytes, IN_RUNS, id.0, &body);
}

fn is_one_run(runs: &[(Range<usize>, bool)]) -> bool {
    matches!(runs, [(_, false)])
}

/// Puts the zeroes back that were left out of a piece.
fn in_runs(id: QueryId, mut body: Bytes) -> Decoded<FromLeader> {
    const LIES: &str = "a piece of a read is not as long as it says";
    let count = body.try_get_u32_le().ok().and_then(|count| usize::try_from(count).ok());
    let Some(table_len) = count.and_then(|count| count.checked_mul(4)) else { return broken(LIES) };
    if table_len > body.len() {
        return broken(LIES);
    }
    let table = body.split_to(table_len);
    let runs = || {
        let runs =
            table.chunks_exact(4).map(|run| u32::from_le_bytes([run[0], run[1], run[2], run[3]]));
        runs.map(|run| ((run & !RUN_IS_ZERO) as usize, run & RUN_IS_ZERO != 0))
    };
    let total: u64 = runs().map(|(len, _)| len as u64).sum();
    if total == 0 || total > PIECE_BYTES_MAX as u64 || runs().any(|(len, _)| len == 0) {
        return broken("a piece of a read, and each run in it, has 1 byte to 1 MiB");
    }
    let mut bytes = Vec::with_capacity(usize::try_from(total).unwrap_or(PIECE_BYTES_MAX));
    let mut found = Vec::with_capacity(table_len / 4);
    for (len, zero) in runs() {
        let start = bytes.len();
        if zero {
            bytes.resize(start + len, 0);
        } else if len <= body.len() {
            bytes.extend_from_slice(&body.split_to(len));
        } else {
            return broken(LIES);
        }
        found.push((start..start + len, zero));
    }
    if !body.is_empty() {
        return broken(LIES);
    }
    Ok(FromLeader::Bytes { id, bytes: bytes.into(), runs: found })
}

fn extents(mut body: Bytes) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(body.len() / EXTENT_BYTES);
    while body.len() >= EXTENT_BYTES {
        let (len, status) = (body.get_u64_le(), body.get_u32_le());
        let status =
            BlockStatus { hole: status & EXTENT_HOLE != 0, zero: status & EXTENT_ZERO != 0 };
        extents.push(Extent { len, status });
    }
    extents
}

#[cfg(test)]
mod tests {
    use nbd_store::{encode_add_counter, encode_trim, encode_write};
    use proptest::prelude::*;

    use super::*;
    use crate::frame::Decoder;

    fn frame(wire: &[u8]) -> Frame {
        Decoder::default().decode(&mut BytesMut::from(wire)).unwrap().unwrap()
    }

    /// What is sent for a message, as one.
    fn wire(put: impl FnOnce(&mut BytesMut) -> Option<Bytes>) -> Vec<u8> {
        let mut out = BytesMut::new();
        let behind = put(&mut out);
        [&out[..], behind.as_deref().unwrap_or_default()].concat()
    }

    fn owner() -> Owner {
        Owner { node: 5, incarnation: 6 }
    }

    #[test]
    fn what_a_front_end_says_is_understood() {
        let hello = Hello {
            cluster: "demo".to_owned(),
            shard: 3,
            session: SessionId(u128::MAX - 7),
            epoch: Epoch(2),
            volume: VolumeId(9),
            owner: owner(),
            caller: Caller {
                client: "10.0.0.9:4711".to_owned(),
                via: "lb-1".to_owned(),
                since_ms: 1_700_000_000_123,
            },
        };
        let read = Query::Read { offset: 7, len: 64 << 20, holes: true };
        let status = Query::BlockStatus { offset: 1, len: 1 << 40, extents_max: 4 };
        for said in [
            FromCaller::Hello(hello),
            FromCaller::Query { id: QueryId(8), query: read },
            FromCaller::Query { id: QueryId(u64::MAX), query: status },
            FromCaller::Trace { id: 7, trace_id: u128::MAX - 1, span_id: 1 << 63 },
        ] {
            let wire = wire(|out| said.clone().put(out));
            assert_eq!(FromCaller::decode(frame(&wire)), Ok(said));
        }
        let (id, epoch, volume) = (SessionId(9), Epoch(1), VolumeId(1));
        for len in [1, 5000, 1 << 20] {
            let command = encode_write(id, epoch, 4, volume, 4095, &vec![3; len]);
            let wire = wire(|out| put_mutation(out, command.clone()));
            let Ok(FromCaller::Mutation { header, command: found }) =
                FromCaller::decode(frame(&wire))
            else {
                panic!("{len} bytes")
            };
            assert_eq!((header.seq, header.length), (4, len as u64));
            assert!(found == command);
        }
    }

    // The texts of a hello reach operators' screens: nothing but bounded text may come through.
    #[test]
    fn a_hello_with_texts_out_of_bounds_is_refused() {
        let hello = |cluster: &str, via: &str, client: &str| {
            let caller = Caller { client: client.to_owned(), via: via.to_owned(), since_ms: 1 };
            let (session, epoch, volume) = (SessionId(1), Epoch(1), VolumeId(1));
            let cluster = cluster.to_owned();
            Hello { cluster, shard: 0, session, epoch, volume, owner: owner(), caller }
        };
        let decoded = |hello: Hello| {
            let wire = wire(|out| FromCaller::Hello(hello).put(out));
            FromCaller::decode(frame(&wire))
        };
        let (fits, long) = ("x".repeat(255), "x".repeat(256));
        assert!(decoded(hello(&fits, &fits, &fits)).is_ok());
        assert!(decoded(hello("", "", "")).is_ok());
        let texts = [(&long[..], "", ""), ("", &long, ""), ("", "", &long), ("", "a\nb", "")];
        for (cluster, via, client) in texts {
            let hello = hello(cluster, via, client);
            assert!(decoded(hello.clone()).is_err(), "{hello:?}");
            let bounded = Hello { caller: hello.caller.bounded(), ..hello };
            assert_eq!(decoded(bounded).is_ok(), cluster.is_empty());
        }
        // Cut short, or longer than its texts.
        let whole = hello("demo", "n1", "c").body();
        for body in [&whole[..whole.len() - 1], &[&whole[..], b"x"].concat(), &whole[..60]] {
            let wire = wire(|out| {
                put(out, Kind::Hello, 0, 0, body);
                None
            });
            assert!(FromCaller::decode(frame(&wire)).is_err(), "{} bytes", body.len());
        }
    }

    #[test]
    fn only_whole_and_undamaged_mutations_pass() {
        let (id, epoch, volume) = (SessionId(9), Epoch(1), VolumeId(1));
        let write = encode_write(id, epoch, 1, volume, 5000, &[3; 10_000]);
        let good = wire(|out| put_mutation(out, write.clone()));
        for at in 24..good.len() {
            if at > 200 && at % 997 != 0 {
                continue;
            }
            let mut damaged = good.clone();
            damaged[at] ^= 1;
            assert!(FromCaller::decode(frame(&damaged)).is_err(), "byte {at}");
        }
        let trim = encode_trim(id, epoch, 2, volume, 0, 4096);
        let as_mutation = |seq, body: &[u8]| {
            wire(|out| {
                put(out, Kind::Mutation, 0, seq, body);
                None
            })
        };
        assert!(FromCaller::decode(frame(&as_mutation(2, &trim))).is_ok());
        let two = [&trim[..], &trim[..]].concat();
        for (seq, bad) in
            [(2, &two[..]), (3, &trim), (0, &encode_add_counter(1)), (1, &write[..100]), (0, b"")]
        {
            assert!(FromCaller::decode(frame(&as_mutation(seq, bad))).is_err());
        }
    }

    #[test]
    fn impossible_questions_are_refused() {
        let read = |offset: u64, len: u64| [offset.to_le_bytes(), len.to_le_bytes()].concat();
        for bad in [read(0, 0), read(0, READ_BYTES_MAX + 1), read(u64::MAX, 1), vec![1; 15]] {
            let wire = wire(|out| {
                put(out, Kind::Read, 0, 1, &bad);
                None
            });
            assert!(FromCaller::decode(frame(&wire)).is_err(), "{bad:?}");
        }
        for (trace_id, span_id) in [(0, 1), (1, 0)] {
            let wire = wire(|out| FromCaller::Trace { id: 1, trace_id, span_id }.put(out));
            assert!(FromCaller::decode(frame(&wire)).is_err(), "{trace_id} {span_id}");
        }
        let answer = wire(|out| FromLeader::Verdict(Verdict::Attached).put(out));
        assert!(FromCaller::decode(frame(&answer)).is_err(), "a leader's word");
    }

    #[test]
    fn what_a_leader_says_is_understood() {
        let status = BlockStatus { hole: true, zero: true };
        let bytes = |len: usize| Bytes::from(vec![7; len]);
        for said in [
            FromLeader::Verdict(Verdict::Attached),
            FromLeader::Verdict(Verdict::NotLeader),
            FromLeader::Verdict(Verdict::Lost),
            FromLeader::Verdict(Verdict::Rejected(Rejection::StaleEpoch)),
            FromLeader::Applied { seq: 1, verdict: Ok(()) },
            FromLeader::Applied { seq: 2, verdict: Err(Rejection::PastEnd) },
            FromLeader::Refused { seq: 3, failed: Failed::NoSpace },
            FromLeader::Failed { id: QueryId(4), failed: Failed::Io },
            FromLeader::Bytes { id: QueryId(5), bytes: bytes(1), runs: vec![(0..1, false)] },
            FromLeader::Bytes {
                id: QueryId(6),
                bytes: bytes(1 << 20),
                runs: vec![(0..1 << 20, false)],
            },
            FromLeader::Extents { id: QueryId(7), extents: vec![Extent { len: 9, status }] },
            FromLeader::End { reason: "why not".to_owned() },
            FromLeader::Alive,
            FromLeader::Ended,
            FromLeader::Sample { requests: u32::MAX },
        ] {
            let wire = wire(|out| said.clone().put(out));
            assert!(FromLeader::decode(frame(&wire)) == Ok(said));
        }
        let long = FromLeader::End { reason: "\u{e4}".repeat(REASON_BYTES_MAX) };
        let wire = wire(|out| long.put(out));
        assert!(matches!(FromLeader::decode(frame(&wire)), Ok(FromLeader::End { .. })));
    }

    #[test]
    fn a_piece_leaves_its_zeroes_at_home_and_gets_them_back() {
        let mut bytes = vec![7; 3000];
        bytes[1000..2000].fill(0);
        let runs = vec![(0..1000, false), (1000..2000, true), (2000..3000, false)];
        let said = FromLeader::Bytes { id: QueryId(5), bytes: bytes.into(), runs };
        let sent = wire(|out| said.clone().put(out));
        assert!(sent.len() < 2100, "{} bytes", sent.len());
        assert!(FromLeader::decode(frame(&sent)) == Ok(said));
        let zeroes = vec![(0..1 << 20, true)];
        let hole =
            FromLeader::Bytes { id: QueryId(1), bytes: vec![0; 1 << 20].into(), runs: zeroes };
        let sent = wire(|out| hole.clone().put(out));
        assert!(sent.len() < 100);
        assert!(FromLeader::decode(frame(&sent)) == Ok(hole));
    }

    proptest! {
        #[test]
        fn pieces_of_any_form_are_taken_without_panic(
            code in 0..3_u8,
            body in proptest::collection::vec(any::<u8>(), 0..64),
            count in 0..5_u32,
        ) {
            let body = [&count.to_le_bytes()[..], &body[..]].concat();
            let wire = wire(|out| {
                put(out, Kind::Bytes, code, 1, &body);
                None
            });
            if let Ok(FromLeader::Bytes { bytes, runs, .. }) = FromLeader::decode(frame(&wire)) {
                prop_assert!(!bytes.is_empty() && bytes.len() <= PIECE_BYTES_MAX);
                prop_assert_eq!(runs.iter().map(|(run, _)| run.len()).sum::<usize>(), bytes.len());
            }
        }
    }
}
