//! Stands in for what the store is about to offer.

use bytes::Bytes;
use nbd_store::{Epoch, ReadError, SessionId, VolumeId};

/// Who holds a session open: one life of one node's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Owner {
    pub(crate) node: u64,
    pub(crate) incarnation: u64,
}

pub(crate) fn encode_open_session(
    session: SessionId,
    epoch: Epoch,
    volume: VolumeId,
    _owner: Owner,
) -> Bytes {
    nbd_store::encode_open_session(session, epoch, volume)
}

pub(crate) fn encode_end_sessions(_owner: Owner) -> Bytes {
    nbd_store::encode_add_counter(0)
}

/// The checksum that a damaged block should have.
pub(crate) fn wanted_crc(_error: &ReadError) -> Option<u32> {
    None
}
