//! What attachments answer, whether to a leader here or elsewhere.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use bytes::Bytes;
use nbd_relay::Failed;
use nbd_service::trace::Span;
use nbd_session::QueryId;
use nbd_store::{Extent, Outcome};

use crate::local::Granted;

/// Bytes of a read with the runs in them that are known to be zero.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ReadData {
    /// The bytes, zeroes among them.
    pub bytes: Bytes,
    /// Runs in order, without gaps, relative to the read's start; `true` for a run of zeroes.
    pub runs: Vec<(Range<usize>, bool)>,
}

/// The same where small reads are put together, one after the other.
#[derive(Debug, Default)]
pub struct ReadBuffer {
    /// The bytes, zeroes among them.
    pub bytes: Vec<u8>,
    /// Runs in order, without gaps, relative to the read's start; `true` for a run of zeroes.
    pub runs: Vec<(Range<usize>, bool)>,
}

/// What a query was answered with.
#[derive(Debug)]
pub enum QueryData {
    /// A read's bytes.
    Bytes(ReadData),
    /// A block status.
    Extents(Vec<Extent>),
}

/// What an attachment has to say.
#[derive(Debug)]
pub enum Answered {
    /// The log has its verdict on a mutation.
    Mutation {
        /// Its number in the session.
        seq: u64,
        /// The verdict.
        outcome: Outcome,
        /// If it is traced, by a leader in this process: its way back, which ends with this.
        trace: Option<Span>,
        /// If by a leader in this process: when it was given.
        given: Option<Instant>,
    },
    /// There is room for a mutation: it may be proposed. Only of a replica in this process.
    Granted(Granted),
    /// A mutation was not proposed.
    Refused {
        /// Its number in the session.
        seq: u64,
        /// Why.
        failed: Failed,
    },
    /// What came of a query.
    Query {
        /// Which one.
        id: QueryId,
        /// What it asked for, or why it never gets it.
        result: Result<QueryData, Failed>,
    },
    /// Some bytes of a read, behind those that came before.
    Piece {
        /// Which one.
        id: QueryId,
        /// The bytes.
        piece: ReadData,
    },
    /// The next requests of the session are to be traced: so many, of which whoever hears it takes
    /// all.
    Sample(Arc<AtomicU32>),
    /// Nothing more will come: the session was ended in the log, by an operator or with its volume.
    /// It cannot be resumed. What was not answered may have happened, and will not any more.
    Ended,
    /// Nothing more will come, and what was not answered may or may not happen: whoever was asked
    /// does not lead any more, or cannot be reached.
    Lost,
}

impl Answered {
    /// Whether it shows that whoever is attached to does lead.
    pub(crate) const fn is_from_leader(&self) -> bool {
        match self {
            Self::Mutation { .. }
            | Self::Refused { .. }
            | Self::Query { .. }
            | Self::Piece { .. } => true,
            Self::Granted(_) | Self::Sample(_) | Self::Ended | Self::Lost => false,
        }
    }
}
