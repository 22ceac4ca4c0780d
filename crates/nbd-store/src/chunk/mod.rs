//! The base: chunks at home in slots of the data file, as of the last checkpoint.
//!
//! - [`meta`]: what is known of one chunk; [`record`]: the other records of the database.
//! - [`slots`]: which slots are in use.
//! - [`database`]: the metadata database, redb on our own disk trait.
//!
//! [`Base`] joins them for readers. Its cache may only ever hold what the newest durable
//! transaction says: see [`Base::forget`].

pub(crate) mod database;
pub(crate) mod meta;
pub(crate) mod record;
pub(crate) mod slots;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use nbd_log::io::DiskFile;
use nbd_topology::ShardId;
use parking_lot::RwLock;
use quick_cache::sync::Cache;

use self::database::{CountChanges, Database, MetadataError};
use self::meta::{ChunkKey, ChunkMeta};
use crate::ids::{ChunkIndex, VolumeId};

/// Memory of one cached chunk, overhead of the cache included, in bytes.
const CACHED_CHUNK_BYTES: usize = 192;

/// Chunks of a node at home. Shared by all readers and the checkpointer.
pub(crate) struct Base {
    database: Database,
    data: Arc<dyn DiskFile>,
    /// `None` as a value: the chunk has no home.
    cache: Cache<ChunkKey, Option<ChunkMeta>>,
    /// Counts durable transactions. Held for reading while something is put in the cache, so that
    /// what was read before a transaction is never put there after it.
    generation: RwLock<u64>,
    /// Chunks of each volume that have a home, as of the newest durable transaction.
    counts: RwLock<BTreeMap<VolumeId, u64>>,
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Base").field("data", &self.data).finish_non_exhaustive()
    }
}

impl Base {
    /// The base in these files, with a cache of `cache_bytes`.
    ///
    /// # Errors
    /// The database cannot be read.
    pub(crate) fn new(
        database: Database,
        data: Arc<dyn DiskFile>,
        cache_bytes: usize,
    ) -> Result<Self, MetadataError> {
        let cache = Cache::new((cache_bytes / CACHED_CHUNK_BYTES).max(64));
        let counts = RwLock::new(database.counts()?);
        Ok(Self { database, data, cache, generation: RwLock::new(0), counts })
    }

    /// Chunks of `volume` that have a home.
    pub(crate) fn chunk_count(&self, volume: VolumeId) -> u64 {
        self.counts.read().get(&volume).copied().unwrap_or(0)
    }

    /// Chunks of all volumes of `shard` that have a home.
    pub(crate) fn chunks_of(&self, shard: ShardId) -> u64 {
        let volumes = VolumeId::new(shard, 0)..=VolumeId::new(shard, u32::MAX);
        self.counts.read().range(volumes).map(|(_, count)| count).sum()
    }

    /// What the counts are once `changes` have come about.
    pub(crate) fn counts_after<'a>(
        &'a self,
        changes: &'a CountChanges,
    ) -> impl Iterator<Item = (VolumeId, u64)> + 'a {
        changes.iter().map(|(volume, change)| {
            let after = self.chunk_count(*volume).checked_add_signed(*change);
            (*volume, after.expect("every chunk that goes was counted"))
        })
    }

    /// A transaction has become durable that changed the counts like this.
    pub(crate) fn count(&self, changes: &CountChanges) {
        let after: Vec<_> = self.counts_after(changes).collect();
        let mut counts = self.counts.write();
        for (volume, count) in after {
            if count == 0 {
                counts.remove(&volume);
            } else {
                counts.insert(volume, count);
            }
        }
    }

    /// The metadata database.
    pub(crate) const fn database(&self) -> &Database {
        &self.database
    }

    /// The data file.
    pub(crate) fn data(&self) -> &dyn DiskFile {
        &*self.data
    }

    /// A chunk's home, if it is known without I/O.
    pub(crate) fn cached(&self, volume: VolumeId, chunk: ChunkIndex) -> Option<Option<ChunkMeta>> {
        self.cache.get(&(volume, chunk))
    }

    /// The homes of `chunks`; may block. They are newer than, or as old as, whatever the caller's
    /// pin was taken under.
    pub(crate) fn load(
        &self,
        volume: VolumeId,
        chunks: impl IntoIterator<Item = ChunkIndex>,
    ) -> Result<Vec<(ChunkIndex, Option<ChunkMeta>)>, MetadataError> {
        // Read before the transaction is opened: if a checkpoint becomes durable in between, what
        // is read is new and merely not cached.
        let generation = *self.generation.read();
        let reader = self.database.read()?;
        let mut found = Vec::new();
        for chunk in chunks {
            if let Some(meta) = self.cache.get(&(volume, chunk)) {
                found.push((chunk, meta));
                continue;
            }
            let meta = reader.chunk((volume, chunk))?;
            let current = self.generation.read();
            if *current == generation {
                self.cache.insert((volume, chunk), meta);
            }
            drop(current);
            found.push((chunk, meta));
        }
        Ok(found)
    }

    /// A transaction has become durable that gave `changed` these homes and dropped those for which
    /// `dropped` holds (asked only if there is such a test). From the return on, the cache holds
    /// nothing older.
    ///
    /// Until then it may: harmless, for the overlay that the transaction wrote down still hides the
    /// difference, and the old places stay as they are until all pins from before are gone.
    pub(crate) fn forget(
        &self,
        changed: impl IntoIterator<Item = (ChunkKey, Option<ChunkMeta>)>,
        dropped: Option<&dyn Fn(&ChunkKey) -> bool>,
    ) {
        *self.generation.write() += 1;
        if let Some(dropped) = dropped {
            self.cache.retain(|key, _| !dropped(key));
        }
        for (key, meta) in changed {
            self.cache.insert(key, meta);
        }
    }

    /// Reads the block-aligned range at `place` of the data file; may block.
    pub(crate) fn read_data(&self, buf: &mut [u8], place: u64) -> io::Result<()> {
        self.data.read_exact_at(buf, place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::meta::Slot;
    use nbd_log::io::{Disk, MemoryDisk, OpenMode};

    const KEY: ChunkKey = (VolumeId(1), ChunkIndex(5));

    fn commit(base: &Base, meta: Option<&ChunkMeta>) {
        let txn = base.database.write().unwrap();
        database::put_chunk(&mut database::chunk_table(&txn).unwrap(), KEY, meta).unwrap();
        txn.commit().unwrap();
    }

    #[test]
    fn what_was_read_before_a_transaction_is_not_cached_after_it() {
        let disk = MemoryDisk::new(1);
        let database = Database::open(&disk, std::iter::once(ShardId(0))).unwrap();
        let data = disk.open("data", OpenMode::CreateNew).unwrap();
        let base = Base::new(database, data, 1 << 16).unwrap();
        let (mut old, mut new) = (ChunkMeta::new(Slot(3)), ChunkMeta::new(Slot(4)));
        old.set_zero(0);
        new.set_zero(1);
        commit(&base, Some(&old));
        // The transaction becomes durable after the reader has begun, before it looks.
        let overtaken = std::iter::once_with(|| {
            commit(&base, Some(&new));
            base.forget([], Some(&|_: &ChunkKey| true));
            KEY.1
        });
        let found = base.load(KEY.0, overtaken).unwrap();
        assert_eq!(found, [(KEY.1, Some(old))], "still good for whoever holds a pin");
        assert_eq!(base.cached(KEY.0, KEY.1), None);
        assert_eq!(base.load(KEY.0, [KEY.1]).unwrap(), [(KEY.1, Some(new))]);
        assert_eq!(base.cached(KEY.0, KEY.1), Some(Some(new)));
        base.forget([(KEY, None)], None);
        assert_eq!(base.cached(KEY.0, KEY.1), Some(None), "no home is worth knowing, too");
    }
}
