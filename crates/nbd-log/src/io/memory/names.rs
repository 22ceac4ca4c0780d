//! The directory tree, twice: as seen and as promised.

use std::collections::BTreeMap;
use std::io;

use rand::Rng;
use rand::rngs::StdRng;

use super::style::CrashStyle;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    File(u64),
    Dir,
}

/// Both images of the tree, by full name.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    live: BTreeMap<String, Entry>,
    durable: BTreeMap<String, Entry>,
    /// Changes since their directory was last synced, in order.
    unsynced: Vec<Change>,
}

/// One atomic change: `removed` goes, `added` comes. Both are in the same directory.
#[derive(Debug, Clone)]
struct Change {
    removed: Option<String>,
    added: Option<(String, Entry)>,
}

impl Change {
    fn parent(&self) -> &str {
        let added = self.added.as_ref().map(|(name, _)| name);
        parent(self.removed.as_ref().or(added).expect("a change names something"))
    }

    fn apply(&self, names: &mut BTreeMap<String, Entry>) {
        if let Some(name) = &self.removed {
            names.remove(name);
        }
        if let Some((name, entry)) = &self.added {
            names.insert(name.clone(), *entry);
        }
    }
}

fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(dir, _)| dir)
}

impl Names {
    pub(super) fn get(&self, name: &str) -> Option<Entry> {
        self.live.get(name).copied()
    }

    pub(super) fn file(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Entry::File(id) => Some(id),
            Entry::Dir => None,
        }
    }

    pub(super) fn files(&self) -> impl Iterator<Item = u64> {
        self.live.values().filter_map(|entry| match entry {
            Entry::File(id) => Some(*id),
            Entry::Dir => None,
        })
    }

    pub(super) fn refers_to(&self, id: u64) -> bool {
        self.files().any(|file| file == id)
    }

    pub(super) fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.check_dir(dir)?;
        let inside = self.live.keys().filter(|name| parent(name) == dir);
        let skip = if dir.is_empty() { 0 } else { dir.len() + 1 };
        Ok(inside.map(|name| name[skip..].to_owned()).collect())
    }

    pub(super) fn insert(&mut self, name: &str, entry: Entry) -> io::Result<()> {
        self.check_dir(parent(name))?;
        self.change(Change { removed: None, added: Some((name.to_owned(), entry)) });
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        assert_eq!(parent(from), parent(to), "a rename stays in its directory");
        let entry = self.get(from).ok_or(io::ErrorKind::NotFound)?;
        self.change(Change { removed: Some(from.to_owned()), added: Some((to.to_owned(), entry)) });
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        self.file(name).ok_or(io::ErrorKind::NotFound)?;
        self.change(Change { removed: Some(name.to_owned()), added: None });
        Ok(())
    }

    pub(super) fn sync(&mut self, dir: &str) {
        let (durable, unsynced) = (&mut self.durable, &mut self.unsynced);
        unsynced.retain(|change| {
            let inside = change.parent() == dir;
            if inside {
                change.apply(durable);
            }
            !inside
        });
    }

    pub(super) fn after_crash(&self, style: CrashStyle, rng: &mut StdRng) -> Self {
        let mut found = self.durable.clone();
        for change in &self.unsynced {
            let kept = match style {
                CrashStyle::Clean => false,
                CrashStyle::Kept => true,
                CrashStyle::Blocks | CrashStyle::Sectors => rng.random(),
            };
            if kept {
                change.apply(&mut found);
            }
        }
        let dirs = found.clone();
        found.retain(|name, _| {
            let dir = parent(name);
            dir.is_empty() || dirs.get(dir) == Some(&Entry::Dir)
        });
        Self { live: found.clone(), durable: found, unsynced: Vec::new() }
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.live);
        self.unsynced.push(change);
    }

    fn check_dir(&self, dir: &str) -> io::Result<()> {
        match self.get(dir) {
            _ if dir.is_empty() => Ok(()),
            Some(Entry::Dir) => Ok(()),
            Some(Entry::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
