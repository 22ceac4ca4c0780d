//! A snapshot as it travels: a head, then the body in pieces, as a body may be larger than any one
//! message. The receiver knows from the head how much will come, believes no more than a shard can
//! hold, and sets memory aside only for what has arrived.

use std::collections::BTreeSet;

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_rpc::error::Refusal;
use nbd_rpc::identity::replica_id;
use nbd_rpc::v1;
use nbd_rpc::v1::snapshot_reply::Part;
use nbd_store::ShardSnapshot;
use nbd_store::limits::{
    ADDRESS_BYTES_MAX, CORDONED_MAX, DESCRIPTION_BYTES_MAX, LABEL_NAME_BYTES_MAX,
    LABEL_VALUE_BYTES_MAX, LABELS_MAX, REPLICAS_KNOWN_MAX, SESSION_WINDOW, SESSIONS_MAX,
    VOLUME_NAME_BYTES_MAX, VOLUMES_MAX,
};
use nbd_topology::ids::NAME_BYTES_MAX;
use nbd_topology::{LogIndex, Membership, ReplicaId, Term};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

/// Bytes of the body in one message at most.
pub(crate) const PIECE_BYTES_MAX: usize = 1 << 20;

/// What a body holds besides members, volumes and sessions: versions, counts and a checksum.
const FRAME_BYTES: usize = 52;

/// A volume in a body at most: id and length, size and lengths, texts, times and key, labels.
pub(crate) const VOLUME_RECORD_BYTES_MAX: usize =
    12 + 12 + VOLUME_NAME_BYTES_MAX + DESCRIPTION_BYTES_MAX + 40 + LABELS_BYTES_MAX;

/// A count, and each label with two lengths.
const LABELS_BYTES_MAX: usize = 2 + LABELS_MAX * (2 + LABEL_NAME_BYTES_MAX + LABEL_VALUE_BYTES_MAX);

/// A session in a body at most: id and length, the record, and a window of nothing but rejections.
pub(crate) const SESSION_RECORD_BYTES_MAX: usize = 20 + 72 + 16 * WINDOW;

/// Members, replicas known, cordoned nodes and replacements, all as many as there can be.
const MEMBERS_BYTES_MAX: usize =
    28 + REPLICAS_KNOWN_MAX * (8 + REPLICA_BYTES_MAX + 16) + CORDONED_MAX * (2 + NAME_BYTES_MAX);

/// A replica that is known: ids, lengths, its node's name, three addresses.
const REPLICA_BYTES_MAX: usize = 8 + 16 + 8 + NAME_BYTES_MAX + 3 * ADDRESS_BYTES_MAX;

/// Longest body that a receiver takes: that of a shard at all of its bounds, about 2 GiB. One of
/// 50,000 volumes with a few labels each has some 15 MiB.
pub(crate) const BODY_BYTES_MAX: usize = FRAME_BYTES
    + MEMBERS_BYTES_MAX
    + VOLUMES_MAX * VOLUME_RECORD_BYTES_MAX
    + SESSIONS_MAX * SESSION_RECORD_BYTES_MAX;

#[expect(clippy::cast_possible_truncation, reason = "a window has 256 places")]
const WINDOW: usize = SESSION_WINDOW as usize;

const _: () = assert!(PIECE_BYTES_MAX * 2 <= nbd_rpc::MESSAGE_BYTES_MAX);
const _: () = assert!(BODY_BYTES_MAX < 1 << 32);

/// The messages of one snapshot, made as they are sent.
#[derive(Debug)]
pub(crate) struct SnapshotMessages {
    head: Option<v1::SnapshotHead>,
    /// What was not sent yet.
    body: Bytes,
    /// Held for as long as the body is in memory.
    _permit: Option<OwnedSemaphorePermit>,
}

impl SnapshotMessages {
    /// The messages for `snapshot`, after which so many chunks and bytes in them have changed.
    pub(crate) fn new(
        snapshot: ShardSnapshot,
        (delta_chunks, delta_bytes): (u64, u64),
        permit: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let ShardSnapshot { applied, applied_term, membership, body } = snapshot;
        let ids = |ids: &BTreeSet<ReplicaId>| ids.iter().map(|id| id.get()).collect();
        let head = v1::SnapshotHead {
            applied: applied.0,
            applied_term: applied_term.0,
            voters: ids(membership.voters()),
            learners: ids(membership.learners()),
            body_bytes: body.len() as u64,
            body_crc: crc32c(&body),
            delta_chunks,
            delta_bytes,
        };
        Self { head: Some(head), body, _permit: permit }
    }
}

impl Iterator for SnapshotMessages {
    type Item = Result<v1::SnapshotReply, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        let part = match self.head.take() {
            Some(head) => Part::Head(head),
            None if self.body.is_empty() => return None,
            None => Part::Piece(self.body.split_to(self.body.len().min(PIECE_BYTES_MAX))),
        };
        Some(Ok(v1::SnapshotReply { part: Some(part) }))
    }
}

/// A snapshot that is arriving.
#[derive(Debug)]
pub(crate) struct ArrivingSnapshot {
    head: v1::SnapshotHead,
    /// What was announced.
    body_bytes: usize,
    body: Vec<u8>,
}

impl ArrivingSnapshot {
    /// Begins with the first message.
    pub(crate) fn begin(first: v1::SnapshotReply) -> Result<Self, Refusal> {
        let Some(Part::Head(head)) = first.part else {
            return Err(Refusal::Malformed("a snapshot does not begin with its head"));
        };
        let body_bytes = usize::try_from(head.body_bytes).unwrap_or(usize::MAX);
        if body_bytes > BODY_BYTES_MAX {
            return Err(Refusal::Malformed("a snapshot is larger than any shard's"));
        }
        Ok(Self { head, body_bytes, body: Vec::new() })
    }

    /// Takes the next message.
    pub(crate) fn take(&mut self, message: v1::SnapshotReply) -> Result<(), Refusal> {
        let Some(Part::Piece(piece)) = message.part else {
            return Err(Refusal::Malformed("a snapshot has no piece where one is due"));
        };
        // One of nothing would never bring the end nearer.
        if piece.is_empty() || piece.len() > PIECE_BYTES_MAX {
            return Err(Refusal::Malformed("a piece of a snapshot has 1 byte to 1 MiB"));
        }
        if piece.len() > self.body_bytes - self.body.len() {
            return Err(Refusal::Malformed("a snapshot is longer than announced"));
        }
        self.body.extend_from_slice(&piece);
        Ok(())
    }

    /// The snapshot, and the bytes in chunks that changed, once the last message was taken.
    pub(crate) fn finish(self) -> Result<(ShardSnapshot, u64), Refusal> {
        let Self { head, body_bytes, body } = self;
        if body.len() != body_bytes {
            return Err(Refusal::Malformed("a snapshot is shorter than announced"));
        }
        let (found, expected) = (crc32c(&body), head.body_crc);
        if found != expected {
            return Err(Refusal::Checksum { what: "a snapshot", found, expected });
        }
        let ids = |ids: Vec<u64>| ids.into_iter().map(replica_id).collect::<Result<Vec<_>, _>>();
        let membership = Membership::new(ids(head.voters)?, ids(head.learners)?)
            .ok_or(Refusal::Malformed("a replica is voter and learner"))?;
        let snapshot = ShardSnapshot {
            applied: LogIndex(head.applied),
            applied_term: Term(head.applied_term),
            membership,
            body: Bytes::from(body),
        };
        Ok((snapshot, head.delta_bytes))
    }
}
