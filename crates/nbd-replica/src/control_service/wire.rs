//! Between what is known here and what the control API is told.

use std::sync::Arc;

use nbd_rpc::v1;
use nbd_store::{ListPosition, SessionInfo, VolumeInfo, VolumeOrder};

use super::check::Invalid;
use crate::hosted::{Attachment, Moved};

/// Bytes that a volume takes in a message beside its texts, generously.
const VOLUME_BYTES: usize = 64;

/// Bytes that a label takes beside its texts.
const LABEL_BYTES: usize = 8;

pub(super) fn volume(info: &VolumeInfo) -> v1::Volume {
    let labels = info.labels.iter().map(|(name, value)| (name.clone(), value.clone()));
    v1::Volume {
        id: info.id.0,
        name: info.name.to_string(),
        size: info.size,
        description: info.description.to_string(),
        labels: labels.collect(),
        created_ms: info.created_ms,
        modified_ms: info.modified_ms,
    }
}

/// Bytes that a volume takes in a message, at most.
pub(super) fn volume_bytes(info: &VolumeInfo) -> usize {
    let labels = info.labels.iter().map(|(name, value)| name.len() + value.len() + LABEL_BYTES);
    info.name.len() + info.description.len() + VOLUME_BYTES + labels.sum::<usize>()
}

pub(super) fn order(order: i32) -> Result<VolumeOrder, Invalid> {
    let wire = v1::VolumeOrder::try_from(order).map_err(|_| Invalid::Order(order))?;
    Ok(match wire {
        v1::VolumeOrder::Unspecified | v1::VolumeOrder::Name => VolumeOrder::Name,
        v1::VolumeOrder::Size => VolumeOrder::Size,
        v1::VolumeOrder::Created => VolumeOrder::Created,
        v1::VolumeOrder::Modified => VolumeOrder::Modified,
    })
}

pub(super) fn position(position: v1::VolumePosition) -> ListPosition {
    ListPosition { name: position.name, value: position.value }
}

/// Counts as they are told: times in microseconds.
pub(super) const fn counts(moved: &Moved) -> v1::IoCounts {
    v1::IoCounts {
        reads: moved.reads,
        read_bytes: moved.read_bytes,
        writes: moved.writes,
        write_bytes: moved.write_bytes,
        read_us: moved.read_ns / 1000,
        write_us: moved.write_ns / 1000,
    }
}

pub(super) fn session(
    info: &SessionInfo,
    name: String,
    attachment: Option<Arc<Attachment>>,
) -> v1::SessionView {
    let attachment = attachment.map(|attachment| v1::SessionAttachment {
        client: attachment.caller.client.clone(),
        via: attachment.caller.via.clone(),
        since_ms: attachment.caller.since_ms,
        attached_ms: attachment.attached_ms,
        counts: Some(counts(&attachment.moved())),
        pending: attachment.pending(),
    });
    v1::SessionView {
        id: info.id.0.to_be_bytes().to_vec().into(),
        epoch: info.epoch.0,
        volume: info.volume.0,
        name,
        attachment,
    }
}
