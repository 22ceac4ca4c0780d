//! Room on the leader's disk for a mutation, looked for before it is proposed.

use std::sync::Arc;

use nbd_relay::Failed;
use nbd_store::{
    Admission, AdmissionKind, CommandHeader, CommandKind, ReadError, ShardReader, SpaceGauge,
    SpaceGrant, VolumeId,
};
use tracing::error;

use crate::checkpoint_thread::CheckpointHandle;
use crate::limits::SPACE_ATTEMPTS_MAX;

/// Admits mutations on this node.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    pub(crate) space: Arc<SpaceGauge>,
    pub(crate) checkpoints: CheckpointHandle,
}

const fn admission_kind(header: &CommandHeader) -> AdmissionKind {
    match header.kind {
        CommandKind::Trim => AdmissionKind::Trim,
        CommandKind::WriteZeroes => AdmissionKind::WriteZeroes { no_hole: header.no_hole },
        _ => AdmissionKind::Write,
    }
}

impl Room {
    /// Room for a mutation, if it is plain that there is enough. Never blocks.
    pub(super) fn admit_fast(&self, header: &CommandHeader) -> Option<SpaceGrant> {
        self.space.admit_fast(header.offset, header.length, admission_kind(header))
    }

    /// Looks for room when it is not plain that there is enough: on the blocking pool, and behind a
    /// checkpoint when it takes one to know.
    ///
    /// The first look may come at a moment when what a trim gave back is on its way between two
    /// counts, so a refusal stands only behind a checkpoint that began after the mutation came.
    pub(super) async fn look(
        &self,
        reader: &ShardReader,
        header: &CommandHeader,
    ) -> Result<SpaceGrant, Failed> {
        let (volume, offset, len) = (header.volume, header.offset, header.length);
        self.look_for(reader, volume, (offset, len), admission_kind(header)).await
    }

    /// The same for a change of `len` bytes at `offset`, however it is brought about.
    pub(crate) async fn look_for(
        &self,
        reader: &ShardReader,
        volume: VolumeId,
        (offset, len): (u64, u64),
        kind: AdmissionKind,
    ) -> Result<SpaceGrant, Failed> {
        for attempt in 0..=SPACE_ATTEMPTS_MAX {
            let reader = reader.clone();
            let look = move || reader.admit(volume, offset, len, kind);
            match tokio::task::spawn_blocking(look).await {
                Ok(Ok(Admission::Granted(grant))) => return Ok(grant),
                Ok(Ok(Admission::NoSpace)) if attempt > 0 => return Err(Failed::NoSpace),
                Ok(Ok(Admission::NoSpace | Admission::NeedCheckpoint)) => {
                    self.checkpoints.attempt().await;
                }
                // The log would say the same.
                Ok(Err(ReadError::PastEnd)) => return Err(Failed::PastEnd),
                Ok(Err(ReadError::UnknownVolume)) => return Err(Failed::Gone),
                Ok(Err(error)) => {
                    error!(%error, "cannot look for room");
                    return Err(Failed::Io);
                }
                Err(error) => {
                    error!(%error, "cannot look for room");
                    return Err(Failed::Io);
                }
            }
        }
        Err(Failed::NoSpace)
    }
}
