//! The volumes of a shard, by id, by name and by the key of the call that created them.
//!
//! There is one copy of it, changed in place: a checkpoint takes only what changed since the one
//! before.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use crate::ids::VolumeId;
use crate::outcome::VolumeInfo;

/// Volumes that changed: as they are, or `None` for one that is gone.
pub(crate) type VolumeChanges = BTreeMap<VolumeId, Option<VolumeInfo>>;

/// The volumes. All indexes hold the same ones.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    by_id: BTreeMap<VolumeId, VolumeInfo>,
    by_name: BTreeMap<Arc<str>, VolumeId>,
    /// Of those that were created with a key.
    by_key: HashMap<u128, VolumeId>,
    /// Bytes of all of them.
    provisioned_bytes: u64,
    /// What no checkpoint was given yet.
    changed: BTreeSet<VolumeId>,
}

impl Volumes {
    /// The volume with this id.
    pub(crate) fn get(&self, id: VolumeId) -> Option<&VolumeInfo> {
        self.by_id.get(&id)
    }

    /// The volume with this name.
    pub(crate) fn by_name(&self, name: &str) -> Option<&VolumeInfo> {
        self.get(*self.by_name.get(name)?)
    }

    /// Whether a volume was created with this key.
    pub(crate) fn has_key(&self, key: u128) -> bool {
        self.by_key.contains_key(&key)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Bytes of all of them together.
    pub(crate) const fn provisioned_bytes(&self) -> u64 {
        self.provisioned_bytes
    }

    /// All volumes, oldest first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &VolumeInfo> {
        self.by_id.values()
    }

    /// Those created after `after`, oldest first.
    pub(crate) fn created_after(&self, after: VolumeId) -> impl Iterator<Item = &VolumeInfo> {
        self.by_id.range(after.next()..).map(|(_, info)| info)
    }

    /// Those whose names lie in a range, in the order of their names.
    pub(crate) fn named(
        &self,
        names: (Bound<&str>, Bound<&str>),
    ) -> impl DoubleEndedIterator<Item = &VolumeInfo> {
        self.by_name.range::<str, _>(names).filter_map(|(_, id)| self.get(*id))
    }

    /// Adds a volume that the last checkpoint has. `false` if one like it is there already.
    #[must_use]
    pub(crate) fn load(&mut self, info: VolumeInfo) -> bool {
        let is_known = self.by_id.contains_key(&info.id)
            || self.by_name.contains_key(&info.name)
            || self.has_key(info.key);
        if is_known {
            return false;
        }
        self.provisioned_bytes += info.size;
        self.by_name.insert(Arc::clone(&info.name), info.id);
        if info.key != 0 {
            self.by_key.insert(info.key, info.id);
        }
        self.by_id.insert(info.id, info);
        true
    }

    /// Adds a new volume.
    pub(crate) fn insert(&mut self, info: VolumeInfo) {
        self.changed.insert(info.id);
        assert!(self.load(info), "names, keys and ids of volumes are unique");
    }

    /// Changes a volume, but not its id, name or key, and returns it as it is then.
    pub(crate) fn change(
        &mut self,
        id: VolumeId,
        change: impl FnOnce(&mut VolumeInfo),
    ) -> Option<VolumeInfo> {
        let info = self.by_id.get_mut(&id)?;
        self.provisioned_bytes -= info.size;
        change(info);
        self.provisioned_bytes += info.size;
        self.changed.insert(id);
        Some(info.clone())
    }

    /// Takes a volume out.
    pub(crate) fn remove(&mut self, id: VolumeId) -> Option<VolumeInfo> {
        let info = self.by_id.remove(&id)?;
        self.by_name.remove(&info.name);
        self.by_key.remove(&info.key);
        self.provisioned_bytes -= info.size;
        self.changed.insert(id);
        Some(info)
    }

    /// What changed since this was asked last.
    pub(crate) fn take_changes(&mut self) -> VolumeChanges {
        let changed = std::mem::take(&mut self.changed);
        changed.into_iter().map(|id| (id, self.get(id).cloned())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(id: u64, name: &str, key: u128) -> VolumeInfo {
        VolumeInfo { key, ..VolumeInfo::new(VolumeId(id), name, 4096 * id, "") }
    }

    #[test]
    fn indexes_and_sums_follow() {
        let mut volumes = Volumes::default();
        volumes.insert(volume(1, "a", 7));
        volumes.insert(volume(2, "b", 0));
        assert!(!volumes.load(volume(3, "a", 0)), "a name twice");
        assert!(!volumes.load(volume(3, "c", 7)), "a key twice");
        assert_eq!((volumes.len(), volumes.provisioned_bytes()), (2, 3 * 4096));
        volumes.change(VolumeId(2), |info| info.size = 4096).unwrap();
        assert_eq!(volumes.provisioned_bytes(), 2 * 4096);
        assert_eq!(volumes.remove(VolumeId(1)), Some(volume(1, "a", 7)));
        assert!(volumes.by_name("a").is_none() && !volumes.has_key(7));
        assert_eq!((volumes.len(), volumes.provisioned_bytes()), (1, 4096));
        volumes.insert(volume(4, "a", 7));
        assert_eq!(volumes.by_name("a").unwrap().id, VolumeId(4));
    }

    #[test]
    fn a_change_is_told_once() {
        let mut volumes = Volumes::default();
        assert!(volumes.load(volume(1, "a", 0)));
        assert!(volumes.take_changes().is_empty());
        volumes.insert(volume(2, "b", 0));
        volumes.remove(VolumeId(1));
        let told = volumes.take_changes();
        assert_eq!(told[&VolumeId(1)], None);
        assert_eq!(told[&VolumeId(2)], Some(volume(2, "b", 0)));
        assert!(volumes.take_changes().is_empty());
    }
}
