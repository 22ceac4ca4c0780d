//! Work on files, done alike in several directories.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::KIB;
use crate::content::noise;

/// Bytes of the file that is overwritten here and there.
const LARGE_BYTES: usize = 4 << 20;

/// Files that a round makes.
const FILES: u64 = 8;

/// Rounds whose files are kept, so that the work goes on for as long as one likes.
const KEPT: u64 = 8;

/// Rounds of work, each like the others and with content of its own.
pub(crate) struct Work {
    roots: Vec<PathBuf>,
    round: u64,
}

impl Work {
    /// Work to be done under each of `roots`, which are there.
    pub(crate) fn new(roots: [&Path; 2]) -> Self {
        for root in roots {
            let large = File::create_new(root.join("large file")).unwrap();
            large.write_all_at(&noise(0, LARGE_BYTES), 0).unwrap();
            fs::create_dir(root.join("work")).unwrap();
        }
        Self { roots: roots.map(Path::to_owned).to_vec(), round: 0 }
    }

    /// Makes files, some of them synced, appends to one and overwrites parts of another, moves
    /// one, cuts one off, and removes what has become old.
    ///
    /// # Panics
    /// If any of that fails.
    pub(crate) fn round(&mut self) {
        for root in &self.roots {
            round(root, self.round);
        }
        self.round += 1;
    }
}

fn round(root: &Path, round: u64) {
    let directory = |round: u64| root.join(format!("work/{round:06}"));
    let own = directory(round);
    fs::create_dir(&own).unwrap();
    for number in 0..FILES {
        let seed = round * FILES + number;
        let bytes = noise(seed, usize::try_from(seed * 7919 % (64 * KIB)).unwrap());
        let mut file = File::create_new(own.join(format!("file {number}"))).unwrap();
        file.write_all(&bytes).unwrap();
        if number % 2 == 0 {
            file.sync_all().unwrap();
        }
    }
    let mut journal = File::options().create(true).append(true).open(root.join("journal")).unwrap();
    journal.write_all(&noise(round, 3000)).unwrap();
    journal.sync_data().unwrap();
    let large = File::options().write(true).open(root.join("large file")).unwrap();
    for place in 0..20 {
        let offset = (round * 20 + place) * 39_119 % (LARGE_BYTES as u64 - 4 * KIB);
        large.write_all_at(&noise(round + place, 1500), offset).unwrap();
    }
    large.sync_data().unwrap();
    fs::rename(own.join("file 1"), root.join("work").join("moved")).unwrap();
    File::options().write(true).open(own.join("file 3")).unwrap().set_len(1000).unwrap();
    if let Some(old) = round.checked_sub(KEPT) {
        fs::remove_dir_all(directory(old)).unwrap();
    }
}
