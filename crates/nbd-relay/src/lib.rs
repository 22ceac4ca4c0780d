//! Relays: the data path of one session, from the front end that its client is attached to, to the
//! leader of its volume's shard.
//!
//! A relay is a TCP connection to the port at which a node serves gRPC; its first byte tells the
//! two apart (`P` of HTTP/2's preface, `C` of [`PREAMBLE`]). Reads and writes go over relays, and
//! not over gRPC, because a block of 4 KiB costs more in HTTP/2 frames, messages and hand-offs
//! between tasks than in reading it (docs/ARCHITECTURE.md has the measurement). All else between
//! processes is gRPC.
//!
//! ```text
//!  caller ──▶ preamble, Hello, then mutations and queries, in any order
//!  leader ──▶ Verdict;  if attached, an answer to each, in any order;  End, and closes
//! ```
//!
//! While requests are unanswered the leader says that it is [`Alive`](Kind::Alive) every
//! [`ALIVE_INTERVAL`], whatever they wait for: a caller that hears nothing for several of them
//! takes it that the way to the leader is cut, or its process frozen.
//!
//! Every message is one [`Frame`]. All integers are little-endian.
//!
//! ```text
//!  0      1      2            4             8                16         20           24
//!  +------+------+------------+-------------+----------------+----------+------------+------+
//!  | kind | code | reserved 0 | body length | id             | body CRC | header CRC | body |
//!  +------+------+------------+-------------+----------------+----------+------------+------+
//! ```
//!
//! | kind | code | id | body |
//! | --- | --- | --- | --- |
//! | 1 Hello | | | shard u32, epoch u32, session u128, volume u64, owner: node u64, incarnation u64, client connected since (ms) u64, lengths of three texts u16 each: name of the cluster, name of the calling process, address of the client |
//! | 2 Mutation | | seq | the command, as it is logged |
//! | 3 Read | 1: holes may be told | query | offset u64, length u64 |
//! | 4 Status | | query | offset u64, length u64, extents wanted at most u32 |
//! | 5 Trace | | seq or query | id of the trace u128, id of the span above u64 |
//! | 16 Verdict | see [`Verdict`] | | |
//! | 17 Applied | 0, or the [rejection](nbd_store::Rejection) | seq | |
//! | 18 Refused | [`Failed`] | seq | |
//! | 19 Bytes | 1: in runs | query | bytes; in runs: count u32, that many u32 (top bit: zeroes, not sent), bytes |
//! | 20 Extents | | query | of each: length u64, status u32 (1: hole, 2: zero) |
//! | 21 Failed | [`Failed`] | query | |
//! | 22 End | | | why, as text |
//! | 23 Alive | | | |
//! | 24 Ended | | | |
//! | 25 Sample | | requests | |
//!
//! CRC32C throughout. A mutation's body CRC covers the command up to its payload, whose checksums
//! are in it: they were made when the client's write came in, and go with it to the disk.
//!
//! **Ended** says that the log does not have the session any more: an operator has ended it, or it
//! went with its volume. Unlike an end, after which the caller goes on at the next leader, that is
//! final. It comes unasked, and an end follows it.
//!
//! **Trace** comes right before a mutation or query that is traced, and says below which span the
//! leader's spans belong; no id is 0. **Sample** asks the caller to trace its next requests, which
//! an operator wants to see. Neither is answered, and nothing but traces depends on either.
//!
//! Versions: 1 had neither *Ended* nor anything of the client in *Hello*, 2 neither *Trace* nor
//! *Sample*. A node takes relays of its own version only.
//!
//! Nothing here waits or allocates on a peer's word: a header is checked before its body is waited
//! for, and no body is longer than [`BODY_BYTES_MAX`].
//!
//! - [`frame`]: [`Frame`], [`Decoder`], and how frames are put together.
//! - [`message`]: what frames mean, in both directions.

pub mod frame;
pub mod message;

pub use frame::{BODY_BYTES_MAX, Decoder, Frame, FrameError, HEADER_BYTES, Kind, PREAMBLE};
pub use message::{
    ALIVE_INTERVAL, Caller, Failed, FromCaller, FromLeader, HELLO_TEXT_BYTES_MAX, Hello,
    MalformedMessage, PIECE_BYTES_MAX, REASON_BYTES_MAX, Verdict, put_bytes, put_mutation,
};
