//! How far a copy has come, on disk, so that the same command goes on there.
//!
//! What a journal says is done is on stable storage at the target: it is written behind that. It
//! also keeps checksums of some of the data, by which a target is known again that is not what the
//! copy left behind (a volume that was deleted and made anew under its name, say).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::file::Identity;
use crate::failure::{CONFLICT, Failure};

/// Samples a journal keeps. When there are more, every other one goes.
const SAMPLES_MAX: usize = 64;

/// What is copied, as far as it must be the same for a copy to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Subject {
    /// `import` or `export`.
    pub(super) what: String,
    /// An import's source, or an export's unfinished target.
    pub(super) file: Option<Identity>,
    pub(super) format: String,
    pub(super) server: String,
    pub(super) volume: String,
    pub(super) volume_size: u64,
}

/// A checksum of data that was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// XXH3 of the bytes.
    pub(super) sum: u64,
}

/// What is in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) subject: Subject,
    /// All before this is copied.
    pub(super) done: u64,
    /// Of what is before `done`, in order.
    pub(super) samples: Vec<Sample>,
}

/// A journal's file. While it is open no other copy uses it.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    /// Holds the lock. Of a file of its own: the journal is replaced by each write.
    _lock: File,
    lock_path: PathBuf,
}

const VERSION: u32 = 1;

impl Record {
    pub(super) fn new(subject: Subject) -> Self {
        Self { version: VERSION, subject, done: 0, samples: Vec::new() }
    }

    /// Keeps a bounded choice of samples, spread over all that is done.
    pub(super) fn add(&mut self, samples: impl IntoIterator<Item = Sample>) {
        self.samples.extend(samples);
        self.samples.sort_unstable_by_key(|sample| sample.offset);
        while self.samples.len() > SAMPLES_MAX {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }
}

impl Journal {
    /// Opens the journal at `path`, which need not be there yet.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        if let Some(directory) = path.parent().filter(|directory| *directory != Path::new("")) {
            fs::create_dir_all(directory)
                .with_context(|| format!("create {}", directory.display()))?;
        }
        let lock_path = with_suffix(&path, ".lock");
        let about = || format!("lock {}", lock_path.display());
        let mut options = OpenOptions::new();
        let lock = options.create(true).write(true).truncate(false).open(&lock_path);
        let lock = lock.with_context(about)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock, lock_path }),
            Err(TryLockError::WouldBlock) => {
                let what = "another nbdctl is at the same copy";
                let what = format!("{what} (it holds {})", lock_path.display());
                Err(Failure::new(CONFLICT, what).into())
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(about),
        }
    }

    /// What it says. A journal that cannot be understood says nothing.
    pub(super) fn load(&self) -> Result<Option<Record>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", self.path.display()));
            }
        };
        let record = serde_json::from_slice::<Record>(&text).ok();
        Ok(record.filter(|record| record.version == VERSION))
    }

    /// Writes it anew, whole or not at all.
    pub(super) fn store(&self, record: &Record) -> Result<()> {
        let about = || format!("write {}", self.path.display());
        let new = with_suffix(&self.path, ".new");
        let text = serde_json::to_vec(record).with_context(about)?;
        let mut file = File::create(&new).with_context(about)?;
        file.write_all(&text).with_context(about)?;
        file.sync_data().with_context(about)?;
        fs::rename(&new, &self.path).with_context(about)
    }

    /// Removes it: the copy is complete.
    pub(super) fn remove(self) -> Result<()> {
        for path in [&self.path, &self.lock_path] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Where the journal of an import is: in the user's state directory, under a name for this file,
/// server and volume.
pub(super) fn of_import(file: &Path, server: &str, volume: &str) -> Result<PathBuf> {
    let home = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let state = match (home("XDG_STATE_HOME"), home("HOME")) {
        (Some(state), _) => PathBuf::from(state),
        (None, Some(home)) => Path::new(&home).join(".local/state"),
        (None, None) => bail!("neither XDG_STATE_HOME nor HOME says where to keep the journal"),
    };
    let key = format!("{}\0{server}\0{volume}", file.display());
    let name = xxhash_rust::xxh3::xxh3_128(key.as_bytes());
    Ok(state.join("cinderblock").join(format!("import-{name:032x}.json")))
}

/// Where the journal of an export to `part` is: beside it.
pub(super) fn of_export(part: &Path) -> PathBuf {
    with_suffix(part, ".journal")
}

/// `path` with something behind its name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new(Subject {
            what: "import".to_owned(),
            file: None,
            format: "raw".to_owned(),
            server: "127.0.0.1:10809".to_owned(),
            volume: "vol1".to_owned(),
            volume_size: 1 << 30,
        })
    }

    #[test]
    fn a_journal_says_what_was_stored_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/er/journal");
        let journal = Journal::open(path.clone()).unwrap();
        assert_eq!(journal.load().unwrap(), None);
        let mut record = record();
        for done in [0, 4096] {
            record.done = done;
            journal.store(&record).unwrap();
            assert_eq!(journal.load().unwrap().as_ref(), Some(&record));
        }
        fs::write(&path, "{\"version\":1, torn").unwrap();
        assert_eq!(journal.load().unwrap(), None, "one that is torn says nothing");
        journal.remove().unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn two_copies_do_not_share_a_journal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let first = Journal::open(path.clone()).unwrap();
        let error = Journal::open(path.clone()).unwrap_err();
        assert!(error.to_string().starts_with("another nbdctl"), "{error}");
        drop(first);
        Journal::open(path).unwrap();
    }

    #[test]
    fn samples_are_few_and_spread() {
        let mut record = record();
        for offset in 0..1000 {
            record.add([Sample { offset, len: 1, sum: offset }]);
        }
        assert!(record.samples.len() <= SAMPLES_MAX);
        assert!(record.samples[0].offset < 100 && record.samples.last().unwrap().offset == 999);
    }
}
