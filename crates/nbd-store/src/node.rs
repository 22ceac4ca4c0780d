//! Opening a node's data directory.
//!
//! ```text
//!   lock        held while the node runs
//!   identity    whose directory this is (see `identity`)
//!   log/        the node log (see nbd-log)
//!   meta.redb   homes of chunks, volumes, sessions (see `chunk::database`)
//!   data        chunks at home, in slots of 64 KiB
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nbd_log::io::{Disk, DiskLock, OpenMode};
use nbd_log::log::{
    HardState, Log, LogOpenError, LogOptions, LogPosition, LogReadError, LogReader, LogWriter,
    ScannedRecord, SegmentPool,
};
use nbd_topology::{ClusterName, LogIndex, MembershipChange, NodeName, ShardId};
use parking_lot::RwLock;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::checkpoint::{Checkpointer, CheckpointerParts};
use crate::chunk::Base;
use crate::chunk::database::{self, Database, MetadataError};
use crate::chunk::record::ShardRecord;
use crate::chunk::slots::SlotMap;
use crate::dirty::DirtyLog;
use crate::fault::{Faults, StoreFault};
use crate::identity::{Identity, IdentityError, LOCK_FILE};
use crate::limits::CHUNK_BYTES;
use crate::members::Formation;
use crate::overlay::Overlay;
use crate::recovery::{MissingEntries, RaftRecovered, ReplayError, ShardScan};
use crate::shard::pins::{Pin, PinGate};
use crate::shard::reader::ShardReader;
use crate::shard::state::{Metadata, ShardState};
use crate::shard::{Shard, ShardWriter};
use crate::space::SpaceGauge;

/// Name of the data file.
const DATA_FILE: &str = "data";

/// What a node's store is made with.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// The cluster. Fixed for the life of a data directory.
    pub cluster: ClusterName,
    /// The node. Fixed for the life of a data directory.
    pub node: NodeName,
    /// The shards that the node hosts. Fixed for the life of a data directory.
    pub shards: Vec<ShardId>,
    /// Size of a log segment. Fixed for the life of a data directory.
    pub segment_bytes: u64,
    /// Most bytes that log segments may take.
    pub log_bytes_max: u64,
    /// Memory for recent log entries, in bytes.
    pub log_cache_bytes: usize,
    /// Bytes of log after which it is time for a checkpoint. Well below `log_bytes_max`, so that
    /// the log does not fill while one runs.
    pub checkpoint_log_bytes: u64,
    /// Memory for the homes of chunks, in bytes: about 200 for each chunk of 64 KiB.
    pub meta_cache_bytes: usize,
    /// Bytes of disk that new chunks never take. At least 4 MiB is kept whatever is given.
    pub space_reserve_bytes: u64,
    /// Reads what the data of a membership entry says, for entries that are replayed; `None` if it
    /// changes nothing.
    pub decode_change: fn(&[u8]) -> Option<MembershipChange>,
    /// A rule to be broken on purpose. There are none without the feature `planted-faults`.
    pub fault: Option<StoreFault>,
    /// Seed of everything random: the directory's id and the nonces of log segments. Draw it from
    /// the system.
    pub rng_seed: [u8; 32],
}

/// A shard as found.
#[derive(Debug)]
pub struct RecoveredShard {
    /// Which one.
    pub shard: ShardId,
    /// Its members as of the last entry applied, and which of them this replica is. `None`: the
    /// shard was never formed here, see [`Checkpointer::form`].
    pub formation: Option<Formation>,
    /// Applies its entries.
    pub writer: ShardWriter,
    /// Reads its volumes.
    pub reader: ShardReader,
    /// What Raft goes on with.
    pub raft: RaftRecovered,
}

/// An open data directory, in parts that go to different threads.
#[derive(Debug)]
pub struct NodeStore {
    /// Appends to the log.
    pub log: LogWriter,
    /// Reads the log.
    pub log_reader: LogReader,
    /// The log's segments: someone has to prepare spares.
    pub segments: Arc<SegmentPool>,
    /// Brings what changed home, and frees log.
    pub checkpointer: Checkpointer,
    /// The shards, in the order asked for.
    pub shards: Vec<RecoveredShard>,
    /// Tells whether there is room.
    pub space: Arc<SpaceGauge>,
    /// Whose directory it is.
    pub identity: Identity,
    /// Keeps other processes out. Hold it as long as anything else of this.
    pub lock: Box<dyn DiskLock>,
}

/// Why a data directory could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the data directory {path:?} is in use by another process")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// It is not this node's.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// It holds other shards than this node is to host.
    #[error("the data directory holds shards {found:?}, but this node is to host {expected:?}")]
    Shards {
        /// The shards asked for.
        expected: Vec<ShardId>,
        /// The shards found.
        found: Vec<ShardId>,
    },
    /// The shards asked for are none, or one of them is named twice.
    #[error("the list of shards is empty or names one twice")]
    ShardList,
    /// The metadata database failed or is damaged.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The log failed or is damaged.
    #[error(transparent)]
    Log(#[from] LogOpenError),
    /// The log could not be read again.
    #[error(transparent)]
    LogRead(#[from] LogReadError),
    /// The log has a record of a shard that this node does not host.
    #[error("the log has records of shard {shard}, which this node does not host")]
    ForeignShard {
        /// The shard.
        shard: ShardId,
    },
    /// Entries are missing.
    #[error(transparent)]
    Missing(#[from] MissingEntries),
    /// The disk failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the disk said.
        source: io::Error,
    },
}

impl From<ReplayError> for OpenError {
    fn from(error: ReplayError) -> Self {
        match error {
            ReplayError::Missing(missing) => Self::Missing(missing),
            ReplayError::Log(error) => Self::LogRead(error),
        }
    }
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Io { action, source }
}

impl NodeStore {
    /// Opens a data directory, or makes one in an empty directory; replays what no checkpoint
    /// covers. Takes as long as reading the log.
    ///
    /// # Errors
    /// [`OpenError`]. None of them is worth a retry, except [`OpenError::Locked`].
    pub fn open(disk: Arc<dyn Disk>, options: StoreOptions) -> Result<Self, OpenError> {
        let wanted: BTreeSet<ShardId> = options.shards.iter().copied().collect();
        if wanted.is_empty() || wanted.len() != options.shards.len() {
            return Err(OpenError::ShardList);
        }
        // Before the lock, whose file would be left in a directory that is not ours.
        Identity::refuse_foreign(&*disk)?;
        let lock = take_lock(&*disk)?;
        let mut rng = StdRng::from_seed(options.rng_seed);
        let StoreOptions { cluster, node, segment_bytes, .. } = &options;
        let identity = Identity::open(&*disk, cluster, node, *segment_bytes, &mut rng)?;
        let mut home = Home::open(&disk, &wanted, options.meta_cache_bytes)?;
        let (log, mut scans, end) = open_log(&disk, &options, &identity, rng, &home.records)?;
        home.settle(&scans, &log.segments)?;

        let Log { writer: log, reader: log_reader, segments } = log;
        let space =
            SpaceGauge::new(Arc::clone(&disk), Arc::clone(&segments), options.space_reserve_bytes)
                .map_err(io_error("ask for free space"))?;
        let (space, dirty) = (Arc::new(space), Arc::new(DirtyLog::default()));
        let replayed = scans.values().filter_map(ShardScan::first_position).min();
        dirty.start(replayed.unwrap_or(end));

        let Home { base, records, mut metadata, slots } = home;
        let members = metadata.iter().map(|(id, of)| (*id, Arc::clone(&of.members))).collect();
        let gate = Arc::new(PinGate::default());
        let (mut shards, mut shared) = (Vec::new(), Vec::new());
        for &id in &options.shards {
            let metadata = metadata.remove(&id).expect("checked against the list");
            let state = ShardState {
                shard: id,
                replica: records[&id].replica,
                metadata,
                active: Overlay::default(),
                frozen: None,
                pin: Pin::new(&gate),
                faults: Faults(options.fault),
            };
            let shard = Arc::new(Shard {
                id,
                state: RwLock::new(state),
                base: Arc::clone(&base),
                log: log_reader.clone(),
                space: Arc::clone(&space),
                dirty: Arc::clone(&dirty),
            });
            let scan = scans.remove(&id).expect("one for each shard");
            let mut writer = ShardWriter::new(Arc::clone(&shard));
            let raft = scan.replay(&mut writer, &log_reader, options.decode_change)?;
            let reader = ShardReader::new(Arc::clone(&shard));
            let formation = reader.formation();
            shards.push(RecoveredShard { shard: id, formation, writer, reader, raft });
            shared.push(shard);
        }
        let checkpointer = Checkpointer::new(CheckpointerParts {
            disk,
            base,
            shards: shared,
            records,
            members,
            slots,
            log: log_reader.clone(),
            segments: Arc::clone(&segments),
            gate,
            dirty,
            space: Arc::clone(&space),
            log_bytes: options.checkpoint_log_bytes,
            faults: Faults(options.fault),
        });
        Ok(Self { log, log_reader, segments, checkpointer, shards, space, identity, lock })
    }
}

fn take_lock(disk: &dyn Disk) -> Result<Box<dyn DiskLock>, OpenError> {
    disk.lock(LOCK_FILE).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => OpenError::Locked { path: disk.path(LOCK_FILE) },
        _ => OpenError::Io { action: "lock the data directory", source: error },
    })
}

/// Everything of the last checkpoint.
struct Home {
    base: Arc<Base>,
    records: BTreeMap<ShardId, ShardRecord>,
    metadata: BTreeMap<ShardId, Metadata>,
    slots: SlotMap,
}

impl Home {
    fn open(
        disk: &Arc<dyn Disk>,
        wanted: &BTreeSet<ShardId>,
        cache_bytes: usize,
    ) -> Result<Self, OpenError> {
        let database = Database::open(&**disk, wanted.iter().copied())?;
        let open_data = || {
            let data = disk.open(DATA_FILE, OpenMode::CreateOrOpen)?;
            disk.sync_dir("")?;
            let slots = data.len()? / CHUNK_BYTES;
            Ok((data, slots))
        };
        let (data, slots) = open_data().map_err(io_error("open the data file"))?;
        let slots = database.slot_map(slots)?;
        let contents = database.contents(None)?;
        let found: BTreeSet<ShardId> = contents.shards.iter().map(|(id, _)| *id).collect();
        if found != *wanted {
            let (expected, found) = (wanted.iter(), found.iter());
            let (expected, found) = (expected.copied().collect(), found.copied().collect());
            return Err(OpenError::Shards { expected, found });
        }
        let base = Arc::new(Base::new(database, data, cache_bytes)?);
        let records = contents.shards.iter().copied().collect();
        Ok(Self { base, records, metadata: Metadata::sort(contents)?, slots })
    }
}

impl Home {
    /// Takes over the votes found in the log, and lets the log know what it need not hold any more:
    /// were it full of that, nothing could be appended, and no checkpoint would have a reason to
    /// run. Nothing is freed yet, for followers may want it.
    fn settle(
        &mut self,
        scans: &BTreeMap<ShardId, ShardScan>,
        segments: &SegmentPool,
    ) -> Result<(), OpenError> {
        let txn = self.base.database().write()?;
        let mut any_changed = false;
        for (&shard, record) in &mut self.records {
            // Not the commit: it may only say what this directory is known to have applied.
            let HardState { term, vote, .. } = scans[&shard].hard_state()?;
            let known = record.hard_state;
            record.hard_state = HardState { term, vote, ..known };
            if record.hard_state != known {
                database::put_shard(&txn, shard, record)?;
                any_changed = true;
            }
        }
        if any_changed {
            txn.commit().map_err(MetadataError::from)?;
        } else {
            txn.abort().map_err(MetadataError::from)?;
        }
        let covered = self.records.iter().map(|(id, record)| (*id, record.applied)).collect();
        segments.cover(&covered, &segments.hard_states());
        Ok(())
    }
}

/// Opens and scans the log. Also returns where it ends, roughly.
fn open_log(
    disk: &Arc<dyn Disk>,
    options: &StoreOptions,
    identity: &Identity,
    rng: StdRng,
    records: &BTreeMap<ShardId, ShardRecord>,
) -> Result<(Log, BTreeMap<ShardId, ShardScan>, LogPosition), OpenError> {
    let mut scans: BTreeMap<_, _> =
        records.iter().map(|(id, record)| (*id, ShardScan::new(*id, *record))).collect();
    let mut foreign = None;
    // For each shard the entries that lie behind its log floor, in the floor's own segment.
    let mut behind: BTreeMap<ShardId, (LogIndex, LogIndex)> = BTreeMap::new();
    let segment_of = |position: LogPosition| position.0 / options.segment_bytes;
    // The first segment has the sequence number 1.
    let mut end = LogPosition(options.segment_bytes);
    let mut visit = |record: ScannedRecord<'_>, position: LogPosition| {
        end = end.max(position);
        let (shard, scan) = match &record {
            ScannedRecord::HardState(shard, _) => (*shard, scans.get_mut(shard)),
            ScannedRecord::Entry(entry) => (entry.shard, scans.get_mut(&entry.shard)),
        };
        match (scan, record) {
            (None, _) => foreign = Some(shard),
            (Some(scan), ScannedRecord::HardState(_, hard_state)) => {
                scan.see_hard_state(hard_state);
            }
            (Some(scan), ScannedRecord::Entry(entry)) => {
                let floor = records[&shard].log_floor;
                if position > floor && segment_of(position) == segment_of(floor) {
                    let (lowest, highest) =
                        behind.entry(shard).or_insert((entry.index, entry.index));
                    *lowest = entry.index.min(*lowest);
                    *highest = entry.index.max(*highest);
                }
                scan.see_entry(&entry, position);
            }
        }
    };
    let log_options = LogOptions {
        segment_bytes: options.segment_bytes,
        log_bytes_max: options.log_bytes_max,
        cache_bytes_max: options.log_cache_bytes,
    };
    let (disk, identity) = (Arc::clone(disk), identity.fingerprint());
    let log = Log::open(disk, identity, log_options, Box::new(rng), &mut visit)?;
    match foreign {
        Some(shard) => Err(OpenError::ForeignShard { shard }),
        None => {
            for (shard, record) in records {
                log.segments.void(*shard, record.log_floor, behind.get(shard).copied());
                let first = scans.get(shard).and_then(ShardScan::tail_begins);
                log.segments.tail_begins(*shard, record.applied, first.unwrap_or(end));
            }
            Ok((log, scans, end))
        }
    }
}
