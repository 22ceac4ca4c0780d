//! The metadata database: redb in the file `meta.redb`, through our own disk trait.
//!
//! | table | key | value |
//! | --- | --- | --- |
//! | `format` | "version" | u64, 3 |
//! | `shards` | shard u32 | see [`super::record`] |
//! | `members` | shard u32 | see [`crate::members`] |
//! | `volumes` | volume u64 | see [`super::record`] |
//! | `sessions` | (shard u32, session u128) | see [`crate::shard::session`] |
//! | `chunks` | (volume u64, chunk u64) | see [`super::meta`] |
//! | `counts` | volume u64 | chunks it has in `chunks`, u64, sealed; no row for none |
//! | `slots` | region u32 | see [`super::slots`] |
//!
//! Version 2 had no `counts`, and neither labels nor times of volumes; it is brought up to date
//! when it is opened.
//!
//! Commits are in two phases with the allocator's state in them ("quick repair"): a commit costs
//! one more sync, and opening after a crash need not walk the whole file.

use std::collections::BTreeMap;
use std::io;
use std::ops::{Bound, Range, RangeInclusive};
use std::sync::Arc;

use nbd_log::io::{Disk, DiskFile, OpenMode};
use nbd_topology::{LogIndex, ShardId};
use redb::{
    Builder, ReadOnlyTable, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend,
    Table, TableDefinition, WriteTransaction,
};

use super::meta::{CHUNK_META_BYTES, ChunkKey, ChunkMeta};
use super::record::{SEAL_BYTES, ShardRecord, decode_volume, encode_volume, seal, unseal};
use super::slots::{REGION_BYTES, SlotMap};
use crate::ids::{ChunkIndex, SessionId, VolumeId};
use crate::limits::META_DB_CACHE_BYTES;
use crate::members::Members;
use crate::outcome::VolumeInfo;
use crate::shard::catalogue::{VolumeChanges, Volumes};
use crate::shard::session::Session;
use crate::shard::sessions::{SessionChanges, Sessions};

/// Name of the database's file.
const DATABASE_FILE: &str = "meta.redb";
/// Its name while it is being made.
const UNFINISHED_FILE: &str = "meta.new";

const FORMAT_VERSION: u64 = 3;
/// The version before, which is read too.
const FORMAT_WITHOUT_COUNTS: u64 = 2;

const FORMAT: TableDefinition<&str, u64> = TableDefinition::new("format");
const SHARDS: TableDefinition<u32, &[u8]> = TableDefinition::new("shards");
const MEMBERS: TableDefinition<u32, &[u8]> = TableDefinition::new("members");
const VOLUMES: TableDefinition<u64, &[u8]> = TableDefinition::new("volumes");
const SESSIONS: TableDefinition<(u32, u128), &[u8]> = TableDefinition::new("sessions");
const CHUNKS: TableDefinition<(u64, u64), &[u8; CHUNK_META_BYTES]> = TableDefinition::new("chunks");
const COUNTS: TableDefinition<u64, &[u8]> = TableDefinition::new("counts");
const SLOTS: TableDefinition<u32, &[u8]> = TableDefinition::new("slots");

/// How many more chunks of each volume have a home than before, or how many fewer.
pub(crate) type CountChanges = BTreeMap<VolumeId, i64>;

/// The table of chunks, open for writing. It counts what comes and goes.
pub(crate) struct ChunkTable<'txn> {
    rows: Table<'txn, (u64, u64), &'static [u8; CHUNK_META_BYTES]>,
    counts: CountChanges,
}

impl ChunkTable<'_> {
    /// Closes the table; how the numbers of chunks have changed.
    pub(crate) fn close(self) -> CountChanges {
        self.counts
    }

    fn count(&mut self, volume: VolumeId, change: i64) {
        *self.counts.entry(volume).or_default() += change;
    }
}

/// A failure of the metadata database.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// redb failed.
    #[error("the metadata database failed")]
    Database(#[source] Box<redb::Error>),
    /// A value does not pass its checks.
    #[error("a value in table {table} of the metadata database is damaged")]
    Damaged {
        /// The table.
        table: &'static str,
    },
    /// Written by another version of this program.
    #[error(
        "the metadata database has format version {found}, this program reads {FORMAT_VERSION}"
    )]
    Version {
        /// The version in the file.
        found: u64,
    },
}

macro_rules! from_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for MetadataError {
            fn from(error: redb::$error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}
from_redb!(
    DatabaseError,
    TransactionError,
    TableError,
    StorageError,
    CommitError,
    SetDurabilityError
);

impl From<io::Error> for MetadataError {
    fn from(error: io::Error) -> Self {
        redb::StorageError::Io(error).into()
    }
}

/// redb's storage on our disk trait.
#[derive(Debug)]
struct Backend(Arc<dyn DiskFile>);

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
}

/// The open database.
pub(crate) struct Database(redb::Database);

/// A read transaction.
pub(crate) struct Reader {
    chunks: ReadOnlyTable<(u64, u64), &'static [u8; CHUNK_META_BYTES]>,
}

/// All of the database but chunks, as read when a node opens.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Record of each shard.
    pub(crate) shards: Vec<(ShardId, ShardRecord)>,
    /// The replicas of each shard.
    pub(crate) members: Vec<(ShardId, Members)>,
    /// All volumes.
    pub(crate) volumes: Vec<VolumeInfo>,
    /// All sessions.
    pub(crate) sessions: Vec<(ShardId, SessionId, Session)>,
}

/// Ids that volumes of a shard may have.
const fn shard_volumes(shard: ShardId) -> RangeInclusive<VolumeId> {
    VolumeId::new(shard, 0)..=VolumeId::new(shard, u32::MAX)
}

fn decode_shard(shard: ShardId, value: &[u8]) -> Result<ShardRecord, MetadataError> {
    let record = unseal(&shard.0.to_le_bytes(), value).and_then(ShardRecord::decode);
    record.ok_or(MetadataError::Damaged { table: "shards" })
}

fn session_key(shard: ShardId, session: SessionId) -> Vec<u8> {
    let mut key = shard.0.to_le_bytes().to_vec();
    key.extend(session.0.to_le_bytes());
    key
}

impl Database {
    /// Opens the database, or creates one that knows these shards and nothing else.
    pub(crate) fn open(
        disk: &dyn Disk,
        shards: impl Iterator<Item = ShardId>,
    ) -> Result<Self, MetadataError> {
        if !disk.exists(DATABASE_FILE)? {
            // Under its name only once it is complete: a crash while redb lays out its file would
            // otherwise leave something that cannot be opened.
            if disk.exists(UNFINISHED_FILE)? {
                disk.remove(UNFINISHED_FILE)?;
            }
            let new = Self::open_file(disk.open(UNFINISHED_FILE, OpenMode::CreateNew)?)?;
            new.initialise(shards)?;
            drop(new);
            disk.rename(UNFINISHED_FILE, DATABASE_FILE)?;
            disk.sync_dir("")?;
        }
        let this = Self::open_file(disk.open(DATABASE_FILE, OpenMode::Existing)?)?;
        let txn = this.0.begin_read()?;
        let version = txn.open_table(FORMAT)?.get("version")?.map(|value| value.value());
        drop(txn);
        match version {
            Some(FORMAT_VERSION) => {}
            Some(FORMAT_WITHOUT_COUNTS) => this.add_counts()?,
            found => return Err(MetadataError::Version { found: found.unwrap_or(0) }),
        }
        Ok(this)
    }

    /// Brings a database of the version before up to date. Takes as long as walking over all
    /// chunks.
    fn add_counts(&self) -> Result<(), MetadataError> {
        let txn = self.write()?;
        let mut counts: BTreeMap<VolumeId, u64> = BTreeMap::new();
        for row in txn.open_table(CHUNKS)?.iter()? {
            let (key, _) = row?;
            *counts.entry(VolumeId(key.value().0)).or_default() += 1;
        }
        put_counts(&txn, counts)?;
        txn.open_table(FORMAT)?.insert("version", FORMAT_VERSION)?;
        txn.commit()?;
        Ok(())
    }

    fn open_file(file: Arc<dyn DiskFile>) -> Result<Self, MetadataError> {
        let mut builder = Builder::new();
        builder.set_cache_size(META_DB_CACHE_BYTES);
        Ok(Self(builder.create_with_backend(Backend(file))?))
    }

    fn initialise(&self, shards: impl Iterator<Item = ShardId>) -> Result<(), MetadataError> {
        let txn = self.write()?;
        txn.open_table(FORMAT)?.insert("version", FORMAT_VERSION)?;
        txn.open_table(VOLUMES)?;
        txn.open_table(SESSIONS)?;
        txn.open_table(CHUNKS)?;
        txn.open_table(COUNTS)?;
        txn.open_table(SLOTS)?;
        for shard in shards {
            put_shard(&txn, shard, &ShardRecord::empty())?;
            put_members(&txn, shard, &Members::default())?;
        }
        txn.commit()?;
        Ok(())
    }

    /// A view of the newest durable transaction.
    pub(crate) fn read(&self) -> Result<Reader, MetadataError> {
        let txn: ReadTransaction = self.0.begin_read()?;
        Ok(Reader { chunks: txn.open_table(CHUNKS)? })
    }

    /// Begins a transaction. Nothing of it lasts unless it is committed.
    pub(crate) fn write(&self) -> Result<WriteTransaction, MetadataError> {
        let mut txn = self.0.begin_write()?;
        txn.set_quick_repair(true);
        Ok(txn)
    }

    /// Everything but chunks and slots, of one shard or of all, as of one moment.
    pub(crate) fn contents(&self, only: Option<ShardId>) -> Result<Contents, MetadataError> {
        let txn = self.0.begin_read()?;
        let (first, last) = only.map_or((0, u32::MAX), |shard| (shard.0, shard.0));
        let volumes =
            shard_volumes(ShardId(first)).start().0..=shard_volumes(ShardId(last)).end().0;
        let mut contents = Contents::default();
        for row in txn.open_table(SHARDS)?.range(first..=last)? {
            let (key, value) = row?;
            let shard = ShardId(key.value());
            contents.shards.push((shard, decode_shard(shard, value.value())?));
        }
        for row in txn.open_table(MEMBERS)?.range(first..=last)? {
            let (key, value) = row?;
            let shard = ShardId(key.value());
            let members = unseal(&shard.0.to_le_bytes(), value.value())
                .and_then(Members::decode)
                .ok_or(MetadataError::Damaged { table: "members" })?;
            contents.members.push((shard, members));
        }
        for row in txn.open_table(VOLUMES)?.range(volumes)? {
            let (key, value) = row?;
            let id = VolumeId(key.value());
            let info = unseal(&id.0.to_le_bytes(), value.value())
                .and_then(|body| decode_volume(id, body))
                .ok_or(MetadataError::Damaged { table: "volumes" })?;
            contents.volumes.push(info);
        }
        for row in txn.open_table(SESSIONS)?.range((first, 0)..=(last, u128::MAX))? {
            let (key, value) = row?;
            let (shard, session) = key.value();
            let (shard, id) = (ShardId(shard), SessionId(session));
            let session = unseal(&session_key(shard, id), value.value())
                .and_then(Session::decode)
                .ok_or(MetadataError::Damaged { table: "sessions" })?;
            contents.sessions.push((shard, id, session));
        }
        Ok(contents)
    }

    /// How many chunks each volume has at home; those that have none are left out.
    pub(crate) fn counts(&self) -> Result<BTreeMap<VolumeId, u64>, MetadataError> {
        let txn = self.0.begin_read()?;
        let mut counts = BTreeMap::new();
        for row in txn.open_table(COUNTS)?.iter()? {
            let (key, value) = row?;
            let volume = VolumeId(key.value());
            let count = unseal(&volume.0.to_le_bytes(), value.value())
                .and_then(|body| body.try_into().ok())
                .map(u64::from_le_bytes)
                .ok_or(MetadataError::Damaged { table: "counts" })?;
            counts.insert(volume, count);
        }
        Ok(counts)
    }

    /// The last entry that a shard's chunks hold, and a view of them, as of one moment.
    pub(crate) fn read_shard(&self, shard: ShardId) -> Result<(LogIndex, Reader), MetadataError> {
        let txn: ReadTransaction = self.0.begin_read()?;
        let record = match txn.open_table(SHARDS)?.get(shard.0)? {
            Some(value) => decode_shard(shard, value.value())?,
            None => return Err(MetadataError::Damaged { table: "shards" }),
        };
        Ok((record.applied, Reader { chunks: txn.open_table(CHUNKS)? }))
    }

    /// The allocator for a data file of `slots` slots.
    pub(crate) fn slot_map(&self, slots: u64) -> Result<SlotMap, MetadataError> {
        let damaged = || MetadataError::Damaged { table: "slots" };
        let txn = self.0.begin_read()?;
        let mut map = SlotMap::new(slots);
        for row in txn.open_table(SLOTS)?.iter()? {
            let (key, value) = row?;
            let region = key.value();
            let bitmap = unseal(&region.to_le_bytes(), value.value()).ok_or_else(damaged)?;
            let bitmap: &[u8; REGION_BYTES] = bitmap.try_into().map_err(|_| damaged())?;
            if !map.load(region, bitmap) {
                return Err(damaged());
            }
        }
        Ok(map)
    }
}

fn decode_chunk(key: ChunkKey, value: &[u8; CHUNK_META_BYTES]) -> Result<ChunkMeta, MetadataError> {
    ChunkMeta::decode(key, value).ok_or(MetadataError::Damaged { table: "chunks" })
}

const fn chunk_bounds(volume: VolumeId, chunks: &Range<ChunkIndex>) -> Range<(u64, u64)> {
    (volume.0, chunks.start.0)..(volume.0, chunks.end.0)
}

impl Reader {
    /// The home of a chunk, if it has one.
    pub(crate) fn chunk(&self, key: ChunkKey) -> Result<Option<ChunkMeta>, MetadataError> {
        let Some(value) = self.chunks.get((key.0.0, key.1.0))? else { return Ok(None) };
        decode_chunk(key, value.value()).map(Some)
    }

    /// The chunks of `range` that have a home, in order.
    pub(crate) fn range(
        &self,
        volume: VolumeId,
        chunks: &Range<ChunkIndex>,
    ) -> Result<impl Iterator<Item = Result<(ChunkIndex, ChunkMeta), MetadataError>>, MetadataError>
    {
        let rows = self.chunks.range(chunk_bounds(volume, chunks))?;
        Ok(rows.map(move |row| {
            let (key, value) = row?;
            let chunk = ChunkIndex(key.value().1);
            Ok((chunk, decode_chunk((volume, chunk), value.value())?))
        }))
    }

    /// The chunks of a shard behind `after` that have a home, in order.
    pub(crate) fn shard_chunks(
        &self,
        shard: ShardId,
        after: Option<ChunkKey>,
    ) -> Result<impl Iterator<Item = Result<(ChunkKey, ChunkMeta), MetadataError>>, MetadataError>
    {
        let bounds = shard_keys(shard, after, None);
        let rows =
            is_forward(&bounds).then(|| self.chunks.range::<(u64, u64)>(bounds)).transpose()?;
        Ok(rows.into_iter().flatten().map(|row| {
            let (key, value) = row?;
            let (volume, chunk) = key.value();
            let key = (VolumeId(volume), ChunkIndex(chunk));
            Ok((key, decode_chunk(key, value.value())?))
        }))
    }
}

/// A range of rows in the table of chunks.
type RowBounds = (Bound<(u64, u64)>, Bound<(u64, u64)>);

/// The keys of a shard's chunks behind `after`, up to and with `through`; `None`: all.
fn shard_keys(shard: ShardId, after: Option<ChunkKey>, through: Option<ChunkKey>) -> RowBounds {
    let (volumes, key) = (shard_volumes(shard), |(volume, chunk): ChunkKey| (volume.0, chunk.0));
    let first = (volumes.start().0, 0);
    let last = (volumes.end().0, u64::MAX);
    let start = match after.map(key) {
        Some(after) if after >= first => Bound::Excluded(after),
        _ => Bound::Included(first),
    };
    (start, Bound::Included(through.map_or(last, key).min(last)))
}

/// Whether there can be keys between these bounds: a table refuses a range that runs backwards.
fn is_forward(bounds: &RowBounds) -> bool {
    match *bounds {
        (Bound::Excluded(after), Bound::Included(last)) => after < last,
        (Bound::Included(first), Bound::Included(last)) => first <= last,
        _ => true,
    }
}

/// Opens the table of chunks.
pub(crate) fn chunk_table(txn: &WriteTransaction) -> Result<ChunkTable<'_>, MetadataError> {
    Ok(ChunkTable { rows: txn.open_table(CHUNKS)?, counts: CountChanges::new() })
}

/// The home of a chunk as the transaction has it.
pub(crate) fn get_chunk(
    table: &ChunkTable<'_>,
    key: ChunkKey,
) -> Result<Option<ChunkMeta>, MetadataError> {
    let Some(value) = table.rows.get((key.0.0, key.1.0))? else { return Ok(None) };
    decode_chunk(key, value.value()).map(Some)
}

/// Gives a chunk a home, or none.
pub(crate) fn put_chunk(
    table: &mut ChunkTable<'_>,
    key: ChunkKey,
    meta: Option<&ChunkMeta>,
) -> Result<(), MetadataError> {
    let row = (key.0.0, key.1.0);
    let had_one = match meta {
        Some(meta) => table.rows.insert(row, &meta.encode(key))?.is_some(),
        None => table.rows.remove(row)?.is_some(),
    };
    table.count(key.0, i64::from(meta.is_some()) - i64::from(had_one));
    Ok(())
}

/// Removes the homes of chunks of `chunks` that changed last before the entry `index`, at most
/// `max` of them; `removed` is told each. Returns where to go on, if there may be more.
pub(crate) fn remove_chunks(
    table: &mut ChunkTable<'_>,
    volume: VolumeId,
    chunks: &Range<ChunkIndex>,
    index: LogIndex,
    max: usize,
    mut removed: impl FnMut(ChunkMeta),
) -> Result<Option<ChunkIndex>, MetadataError> {
    // A damaged value is taken out, too, to be noticed below.
    let is_older = |(_, chunk): (u64, u64), value: &[u8; CHUNK_META_BYTES]| {
        let meta = ChunkMeta::decode((volume, ChunkIndex(chunk)), value);
        meta.is_none_or(|meta| meta.last_index < index)
    };
    let (mut count, mut last) = (0, None);
    for row in table.rows.extract_from_if(chunk_bounds(volume, chunks), is_older)?.take(max) {
        let (key, value) = row?;
        let chunk = ChunkIndex(key.value().1);
        removed(decode_chunk((volume, chunk), value.value())?);
        (count, last) = (count + 1, Some(chunk));
    }
    table.count(volume, -i64::try_from(count).expect("bounded by `max`"));
    Ok(last.filter(|_| count == max).map(ChunkIndex::next))
}

/// Removes the homes of a shard's chunks with keys in `(after, through]` for which `is_absent`
/// holds; `removed` is told each.
pub(crate) fn remove_absent(
    table: &mut ChunkTable<'_>,
    shard: ShardId,
    (after, through): (Option<ChunkKey>, Option<ChunkKey>),
    mut is_absent: impl FnMut(ChunkKey) -> bool,
    mut removed: impl FnMut(ChunkKey, ChunkMeta),
) -> Result<(), MetadataError> {
    let bounds = shard_keys(shard, after, through);
    if !is_forward(&bounds) {
        return Ok(());
    }
    let key = |(volume, chunk): (u64, u64)| (VolumeId(volume), ChunkIndex(chunk));
    let ChunkTable { rows, counts } = table;
    for row in rows.extract_from_if::<(u64, u64), _>(bounds, |at, _| is_absent(key(at)))? {
        let (at, value) = row?;
        let key = key(at.value());
        removed(key, decode_chunk(key, value.value())?);
        *counts.entry(key.0).or_default() -= 1;
    }
    Ok(())
}

/// Stores a shard's record.
pub(crate) fn put_shard(
    txn: &WriteTransaction,
    shard: ShardId,
    record: &ShardRecord,
) -> Result<(), MetadataError> {
    let value = seal(&shard.0.to_le_bytes(), record.encode());
    txn.open_table(SHARDS)?.insert(shard.0, &*value)?;
    Ok(())
}

/// Stores a shard's replicas.
pub(crate) fn put_members(
    txn: &WriteTransaction,
    shard: ShardId,
    members: &Members,
) -> Result<(), MetadataError> {
    let value = seal(&shard.0.to_le_bytes(), members.encode());
    txn.open_table(MEMBERS)?.insert(shard.0, &*value)?;
    Ok(())
}

type VolumeTable<'txn> = Table<'txn, u64, &'static [u8]>;
type SessionTable<'txn> = Table<'txn, (u32, u128), &'static [u8]>;

fn put_volume(table: &mut VolumeTable<'_>, info: &VolumeInfo) -> Result<(), MetadataError> {
    let value = seal(&info.id.0.to_le_bytes(), encode_volume(info));
    table.insert(info.id.0, &*value)?;
    Ok(())
}

fn put_session(
    table: &mut SessionTable<'_>,
    shard: ShardId,
    id: SessionId,
    session: &Session,
) -> Result<(), MetadataError> {
    let value = seal(&session_key(shard, id), session.encode());
    table.insert((shard.0, id.0), &*value)?;
    Ok(())
}

/// Stores volumes that changed, and forgets those that are gone.
pub(crate) fn put_volumes(
    txn: &WriteTransaction,
    changes: &VolumeChanges,
) -> Result<(), MetadataError> {
    let mut table = txn.open_table(VOLUMES)?;
    for (id, info) in changes {
        match info {
            Some(info) => put_volume(&mut table, info)?,
            None => _ = table.remove(id.0)?,
        }
    }
    Ok(())
}

/// Puts these in the place of all volumes of `shard`.
pub(crate) fn replace_volumes(
    txn: &WriteTransaction,
    shard: ShardId,
    volumes: &Volumes,
) -> Result<(), MetadataError> {
    let ids = shard_volumes(shard);
    let mut table = txn.open_table(VOLUMES)?;
    table.retain_in(ids.start().0..=ids.end().0, |_, _| false)?;
    volumes.iter().try_for_each(|info| put_volume(&mut table, info))
}

/// Stores sessions of `shard` that changed, and forgets those that have ended.
pub(crate) fn put_sessions(
    txn: &WriteTransaction,
    shard: ShardId,
    changes: &SessionChanges,
) -> Result<(), MetadataError> {
    let mut table = txn.open_table(SESSIONS)?;
    for (id, session) in changes {
        match session {
            Some(session) => put_session(&mut table, shard, *id, session)?,
            None => _ = table.remove((shard.0, id.0))?,
        }
    }
    Ok(())
}

/// Puts these in the place of all sessions of `shard`.
pub(crate) fn replace_sessions(
    txn: &WriteTransaction,
    shard: ShardId,
    sessions: &Sessions,
) -> Result<(), MetadataError> {
    let mut table = txn.open_table(SESSIONS)?;
    table.retain_in((shard.0, 0)..=(shard.0, u128::MAX), |_, _| false)?;
    sessions.iter().try_for_each(|(id, session)| put_session(&mut table, shard, id, session))
}

fn encode_count(volume: VolumeId, count: u64) -> Vec<u8> {
    seal(&volume.0.to_le_bytes(), count.to_le_bytes().to_vec())
}

/// Stores how many chunks volumes have at home.
pub(crate) fn put_counts(
    txn: &WriteTransaction,
    counts: impl IntoIterator<Item = (VolumeId, u64)>,
) -> Result<(), MetadataError> {
    let mut table = txn.open_table(COUNTS)?;
    for (volume, count) in counts {
        if count == 0 {
            table.remove(volume.0)?;
        } else {
            table.insert(volume.0, &*encode_count(volume, count))?;
        }
    }
    Ok(())
}

/// Stores bitmaps of slots.
pub(crate) fn put_regions(
    txn: &WriteTransaction,
    regions: Vec<(u32, [u8; REGION_BYTES])>,
) -> Result<(), MetadataError> {
    let mut table = txn.open_table(SLOTS)?;
    for (region, bitmap) in regions {
        let mut body = Vec::with_capacity(REGION_BYTES + SEAL_BYTES);
        body.extend(bitmap);
        table.insert(region, &*seal(&region.to_le_bytes(), body))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nbd_log::io::MemoryDisk;

    use super::super::meta::Slot;
    use super::*;

    const SHARD: ShardId = ShardId(2);

    fn home(slot: u64) -> ChunkMeta {
        let mut meta = ChunkMeta::new(Slot(slot));
        meta.set_zero(0);
        meta
    }

    fn open(disk: &MemoryDisk) -> Result<Database, MetadataError> {
        Database::open(disk, std::iter::once(SHARD))
    }

    #[test]
    fn golden_bytes() {
        let golden = include_str!("../../tests/golden/records.txt");
        let count = encode_count(VolumeId(0x3_0000_0001), 1_234_567);
        assert_eq!(count, crate::golden::bytes(golden, "count"));
    }

    #[test]
    fn what_comes_and_goes_is_counted() {
        let disk = MemoryDisk::new(1);
        let database = open(&disk).unwrap();
        let txn = database.write().unwrap();
        let mut table = chunk_table(&txn).unwrap();
        let (a, b) = (VolumeId::new(SHARD, 1), VolumeId::new(SHARD, 2));
        for chunk in 0..10 {
            put_chunk(&mut table, (a, ChunkIndex(chunk)), Some(&home(chunk))).unwrap();
        }
        put_chunk(&mut table, (a, ChunkIndex(0)), Some(&home(50))).unwrap();
        put_chunk(&mut table, (b, ChunkIndex(7)), Some(&home(51))).unwrap();
        put_chunk(&mut table, (b, ChunkIndex(7)), None).unwrap();
        put_chunk(&mut table, (b, ChunkIndex(7)), None).unwrap();
        let all = ChunkIndex(0)..ChunkIndex(100);
        let mut removed = 0;
        let some = |table: &mut _, chunks: &_, max, removed: &mut i32| {
            remove_chunks(table, a, chunks, LogIndex(1), max, |_| *removed += 1).unwrap()
        };
        assert_eq!(some(&mut table, &all, 4, &mut removed), Some(ChunkIndex(4)));
        let rest = ChunkIndex(4)..ChunkIndex(100);
        assert_eq!(some(&mut table, &rest, 100, &mut removed), None);
        assert_eq!(removed, 10);
        put_chunk(&mut table, (a, ChunkIndex(3)), Some(&home(1))).unwrap();
        put_chunk(&mut table, (b, ChunkIndex(3)), Some(&home(2))).unwrap();
        let only_a = |(volume, _): ChunkKey| volume == a;
        remove_absent(&mut table, SHARD, (None, None), only_a, |_, _| ()).unwrap();
        assert_eq!(table.close(), [(a, 0), (b, 1)].into());
    }

    #[test]
    fn a_database_of_the_version_before_is_brought_up_to_date() {
        let disk = MemoryDisk::new(1);
        let volume = VolumeId::new(SHARD, 1);
        {
            let database = open(&disk).unwrap();
            let txn = database.write().unwrap();
            let mut table = chunk_table(&txn).unwrap();
            for chunk in [3, 5, 9] {
                put_chunk(&mut table, (volume, ChunkIndex(chunk)), Some(&home(chunk))).unwrap();
            }
            table.close();
            txn.delete_table(COUNTS).unwrap();
            txn.open_table(FORMAT).unwrap().insert("version", FORMAT_WITHOUT_COUNTS).unwrap();
            txn.commit().unwrap();
        }
        for _ in 0..2 {
            assert_eq!(open(&disk).unwrap().counts().unwrap(), [(volume, 3)].into());
        }
        for unknown in [1, FORMAT_VERSION + 1] {
            {
                let database = open(&disk).unwrap();
                let txn = database.write().unwrap();
                txn.open_table(FORMAT).unwrap().insert("version", unknown).unwrap();
                txn.commit().unwrap();
            }
            let refused = open(&disk).map(|_| ());
            assert!(matches!(refused, Err(MetadataError::Version { found }) if found == unknown));
            let file = disk.open(DATABASE_FILE, OpenMode::Existing).unwrap();
            let database = Database::open_file(file).unwrap();
            let txn = database.write().unwrap();
            txn.open_table(FORMAT).unwrap().insert("version", FORMAT_VERSION).unwrap();
            txn.commit().unwrap();
        }
    }
}
