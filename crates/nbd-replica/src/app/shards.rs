//! From a recovered shard to a running group.

use std::collections::HashMap;

use nbd_consensus::{GroupConfig, limits};
use nbd_log::log::LogReader;
use nbd_service::Shutdown;
use nbd_service::trace::Tracer;
use nbd_shard::ShardReplica;
use nbd_store::{Formation, RecoveredShard};
use nbd_topology::{LogIndex, ShardId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, warn};

use super::StartError;
use super::services::Services;
use crate::config::{Config, RAFT_TICK};
use crate::failure::Failure;
use crate::fetch::LogFetcher;
use crate::formation::FormationError;
use crate::group_task::{GroupHandle, GroupMailbox, GroupParts, GroupTask};
use crate::log_thread::LogHandle;
use crate::resync::{self, ResyncDriver, ResyncHandle, ResyncProgress};

/// Progress of each shard's resync, if one is under way.
pub(super) type ResyncProgresses = HashMap<ShardId, watch::Receiver<Option<ResyncProgress>>>;

/// Starts the node's shards.
#[derive(Clone)]
pub(super) struct ShardStarter {
    pub(super) config: Config,
    pub(super) log: LogHandle,
    pub(super) log_reader: LogReader,
    pub(super) services: Services,
    pub(super) failure: Failure,
    pub(super) abandon: CancellationToken,
    pub(super) shutdown: Shutdown,
    pub(super) tracer: Tracer,
}

impl ShardStarter {
    /// Starts all shards: those that are formed at once, the others once they are.
    pub(super) fn start_all(
        self,
        shards: Vec<(RecoveredShard, GroupHandle, GroupMailbox)>,
        groups: &TaskTracker,
    ) -> ResyncProgresses {
        let mut progresses = HashMap::new();
        for (shard, handle, mailbox) in shards {
            let (resync, inbox) = resync::inbox();
            let driver = ResyncDriver::new(self.services.resync_parts(handle.clone()), inbox);
            progresses.insert(shard.shard, driver.progress());
            self.services.spawn(driver.run());
            self.services.watch_membership(&handle, &progresses[&shard.shard]);
            groups.spawn(self.clone().run(shard, handle, mailbox, resync));
        }
        progresses
    }

    /// Forms the shard if need be, then runs its group to its end.
    async fn run(
        self,
        recovered: RecoveredShard,
        handle: GroupHandle,
        mailbox: GroupMailbox,
        resync: ResyncHandle,
    ) {
        let shard = recovered.shard;
        let was_formed = recovered.formation.is_some();
        let formed = tokio::select! {
            formed = self.services.form(&recovered.reader) => formed,
            // Nothing was promised yet.
            () = self.shutdown.started() => return,
        };
        let formation = match formed {
            Ok(formation) => formation,
            Err(FormationError::Stopped) => return,
            Err(error) => {
                self.failure.set(format!("cannot form shard {shard}: {error}"));
                return;
            }
        };
        match self.parts(recovered, &formation, was_formed, resync) {
            Ok(parts) => {
                // The log thread ends with the last handle on it: those of the groups.
                drop(self);
                GroupTask::new(parts, handle, mailbox).run().await;
            }
            Err(error) => {
                let failure = self.failure.clone();
                error!(%shard, %error, "cannot start the group");
                failure.set(format!("{error}"));
            }
        }
    }

    fn parts(
        &self,
        recovered: RecoveredShard,
        formation: &Formation,
        was_formed: bool,
        resync: ResyncHandle,
    ) -> Result<GroupParts, StartError> {
        let RecoveredShard { shard, writer, reader, mut raft, .. } = recovered;
        let replica_id = formation.replica;
        if !was_formed {
            raft.membership = formation.membership.clone();
        }
        // Of the last checkpoint's members; later changes are in the log and may say otherwise, but
        // then the group does not stand for election as a sole voter either.
        let voters = raft.membership.voters();
        let sole_voter = voters.len() == 1 && voters.contains(&replica_id);
        let mut settings = GroupConfig::new(shard, replica_id);
        settings.read_mode = self.config.tuning.read_mode.into();
        settings.is_sound = nbd_store::command::is_sound;
        settings.tick = RAFT_TICK;
        settings.restarted = was_formed;
        let log_bytes_max = self.config.tuning.log_bytes_max.bytes();
        settings.uncommitted_bytes_max =
            uncommitted_bytes_max(log_bytes_max, self.config.shards.len());
        let retention = if sole_voter {
            // Nobody will ever ask for entries that are applied.
            settings.cache_bytes_max = 0;
            0
        } else {
            let tuning = &self.config.tuning;
            tuning.log_retention_bytes.bytes().min(tuning.log_bytes_max.bytes() / 4)
        };
        if raft.applied == LogIndex::ZERO && was_formed && raft.kept.is_empty() {
            warn!(%shard, "formed before, and nothing in the log");
        }
        let replica = ShardReplica::new(settings, writer, raft, retention)
            .map_err(|source| StartError::Group { shard, source })?;
        Ok(GroupParts {
            replica_id,
            replica,
            reader,
            log: self.log.clone(),
            fetcher: LogFetcher::new(self.log_reader.clone()),
            addresses: self.services.addresses(),
            transport: self.services.transport(),
            resync,
            failure: self.failure.clone(),
            tick: RAFT_TICK,
            sole_voter,
            abandon: self.abandon.clone(),
            tracer: self.tracer.clone(),
        })
    }
}

/// How far a shard may be logged ahead of what is committed: all shards of the node together fill a
/// quarter of the log at most. Entries that are not committed cannot be applied, so no checkpoint
/// frees them, and a log full of them would have no room for what commits them.
fn uncommitted_bytes_max(log_bytes_max: u64, shards: usize) -> usize {
    let share = log_bytes_max / 4 / shards.max(1) as u64;
    let share = usize::try_from(share).unwrap_or(usize::MAX);
    share.clamp(limits::ENTRY_BYTES_MAX, limits::UNCOMMITTED_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn a_log_cannot_fill_with_what_is_not_committed() {
        for (log, shards, expected) in [
            (1024, 1, 64),
            (1024, 64, 4),
            (128, 4, 8),
            // One entry must fit, whatever the log.
            (16, 64, 2),
        ] {
            let bytes = uncommitted_bytes_max(log << 20, shards);
            assert_eq!(bytes, expected * MIB, "{log} MiB, {shards} shards");
        }
    }
}
