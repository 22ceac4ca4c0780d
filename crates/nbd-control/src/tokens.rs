//! Who may use the API: bearer tokens, from a file that is read again when it changes.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::RwLock;
use subtle::ConstantTimeEq as _;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::limits::{TOKENS_INTERVAL, TOKENS_MAX};

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// To look at everything.
    Reader,
    /// To change it, too.
    Admin,
}

/// Whose token it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) name: String,
    pub(crate) role: Role,
}

/// The tokens of a file. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Locked to look one up or to put others in place, never across I/O.
    current: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    entries: Arc<[Entry]>,
    /// What the file looked like when it was read.
    stamp: Option<Stamp>,
}

struct Entry {
    identity: Identity,
    token: String,
}

/// Tells one content of a file from another: when it was written, how long it is, which file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: SystemTime,
    length: u64,
    inode: u64,
}

/// A token file that cannot be used. What it says never holds a token.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("cannot read the token file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A line that is none.
    #[error("{path}:{line}: {problem}; a line is reader:NAME:TOKEN or admin:NAME:TOKEN")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More than are looked through for each request.
    #[error("the token file {path} has more than {TOKENS_MAX} tokens")]
    TooMany {
        /// The file.
        path: PathBuf,
    },
}

impl fmt::Debug for Entry {
    /// Without the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Tokens {
    /// Reads the file.
    ///
    /// # Errors
    /// See [`TokenFileError`].
    pub(crate) fn load(path: &Path) -> Result<Self, TokenFileError> {
        let before = stamp(path);
        let entries = read(path)?.into();
        // Of a file that is being written it may be half: it is looked at again soon.
        let stamp = before.filter(|before| stamp(path) == Some(*before));
        let current = RwLock::new(Current { entries, stamp });
        let tokens = Self { inner: Arc::new(Inner { path: path.to_owned(), current }) };
        tokens.warn_of_others(path);
        Ok(tokens)
    }

    /// Whose token it is. Takes as long for a wrong token as for a right one of the same length,
    /// and whichever it is.
    pub(crate) fn find(&self, token: &str) -> Option<Identity> {
        let entries = Arc::clone(&self.inner.current.read().entries);
        let mut found = None;
        for entry in &*entries {
            if bool::from(entry.token.as_bytes().ct_eq(token.as_bytes())) {
                found = Some(&entry.identity);
            }
        }
        found.cloned()
    }

    /// Looks at the file now and then, and takes over what has changed. A file that cannot be used
    /// changes nothing.
    pub(crate) async fn follow(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TOKENS_INTERVAL) => {}
            }
            let tokens = self.clone();
            // A file may be on a disk that hangs; requests go on with what is known.
            if tokio::task::spawn_blocking(move || tokens.refresh()).await.is_err() {
                error!("following the token file failed");
            }
        }
    }

    fn refresh(&self) {
        let path = &self.inner.path;
        let stamp = stamp(path);
        if stamp == self.inner.current.read().stamp {
            return;
        }
        let entries = read(path);
        self.take_over(stamp, entries);
    }

    /// Takes over what was read of the file, which looked like `stamp` before. If it has changed
    /// since, what was read may be half of one content and half of another: that is left alone, and
    /// the file looked at again soon.
    fn take_over(&self, stamp: Option<Stamp>, entries: Result<Vec<Entry>, TokenFileError>) {
        let path = &self.inner.path;
        if self::stamp(path) != stamp {
            return;
        }
        let mut current = self.inner.current.write();
        // Also after a failure: each content is complained about once.
        current.stamp = stamp;
        match entries {
            Ok(entries) => {
                info!(path = %path.display(), tokens = entries.len(), "token file read again");
                current.entries = entries.into();
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                error!("the tokens from before stay in force: {error:#}");
            }
        }
    }

    fn warn_of_others(&self, path: &Path) {
        use std::os::unix::fs::PermissionsExt as _;
        let others = fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0);
        if others {
            warn!(path = %path.display(), "the token file can be read by others than its owner");
        }
        if self.inner.current.read().entries.is_empty() {
            warn!(path = %path.display(), "the token file has no token: nobody may use the API");
        }
    }
}

/// `None` if the file is not there (any more).
fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let data = fs::metadata(path).ok()?;
    Some(Stamp { modified: data.modified().ok()?, length: data.len(), inode: data.ino() })
}

fn read(path: &Path) -> Result<Vec<Entry>, TokenFileError> {
    let text = fs::read_to_string(path)
        .map_err(|source| TokenFileError::Read { path: path.to_owned(), source })?;
    let entries = parse(&text).map_err(|(line, problem)| TokenFileError::Line {
        path: path.to_owned(),
        line,
        problem,
    })?;
    if entries.len() > TOKENS_MAX {
        return Err(TokenFileError::TooMany { path: path.to_owned() });
    }
    Ok(entries)
}

/// The entries of a token file; blank lines and those that begin with `#` are none.
fn parse(text: &str) -> Result<Vec<Entry>, (usize, &'static str)> {
    let lines = (1..).zip(text.lines().map(str::trim));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in lines {
        let entry = entry(line).map_err(|problem| (number, problem))?;
        if entries.iter().any(|other| other.token == entry.token) {
            return Err((number, "the same token stands in an earlier line"));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(line: &str) -> Result<Entry, &'static str> {
    let mut parts = line.splitn(3, ':');
    let role = match parts.next() {
        Some("reader") => Role::Reader,
        Some("admin") => Role::Admin,
        _ => return Err("it begins with no role"),
    };
    let name = parts.next().filter(|name| !name.is_empty()).ok_or("it has no name")?;
    let token = parts.next().filter(|token| !token.is_empty()).ok_or("it has no token")?;
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("its token has other characters than visible ASCII");
    }
    let identity = Identity { name: name.to_owned(), role };
    Ok(Entry { identity, token: token.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# ours\nreader:monitor:abc\n\nadmin:ops:s3:cret\n";

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokens");
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn tokens_have_a_name_and_a_role() {
        let (_directory, path) = file(FILE);
        let tokens = Tokens::load(&path).unwrap();
        let ops = Identity { name: "ops".to_owned(), role: Role::Admin };
        assert_eq!(tokens.find("s3:cret"), Some(ops));
        assert_eq!(tokens.find("abc").unwrap().role, Role::Reader);
        for wrong in ["", "ab", "abcd", "s3:cre7", "monitor"] {
            assert_eq!(tokens.find(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn bad_lines_are_named_without_their_token() {
        for (text, line, problem) in [
            ("root:a:hidden", 1, "no role"),
            ("\nadmin::hidden", 2, "no name"),
            ("admin:a", 1, "no token"),
            ("admin:a:hid den", 1, "visible ASCII"),
            ("admin:a:hidden\nreader:b:hidden", 2, "earlier line"),
        ] {
            let (_directory, path) = file(text);
            let error = Tokens::load(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("tokens:{line}: ")), "{error}");
            assert!(error.contains(problem) && !error.contains("hid"), "{error}");
        }
    }

    #[test]
    fn a_changed_file_counts_and_a_broken_one_does_not() {
        let (_directory, path) = file(FILE);
        let tokens = Tokens::load(&path).unwrap();
        fs::write(&path, "admin:ops:another\n").unwrap();
        tokens.refresh();
        assert!(tokens.find("another").is_some() && tokens.find("abc").is_none());
        fs::write(&path, "nonsense\n").unwrap();
        tokens.refresh();
        assert!(tokens.find("another").is_some());
        fs::remove_file(&path).unwrap();
        tokens.refresh();
        assert!(tokens.find("another").is_some());
        fs::write(&path, "").unwrap();
        tokens.refresh();
        assert!(tokens.find("another").is_none(), "an empty file shuts everybody out");
    }

    #[test]
    fn what_was_read_while_the_file_changed_is_left_alone() {
        let (_directory, path) = file(FILE);
        let tokens = Tokens::load(&path).unwrap();
        fs::write(&path, "admin:ops:half").unwrap();
        let before = stamp(&path);
        let half = read(&path);
        fs::write(&path, "admin:ops:half-and-half\n").unwrap();
        tokens.take_over(before, half);
        assert!(tokens.find("half").is_none() && tokens.find("abc").is_some());
        tokens.refresh();
        assert!(tokens.find("half-and-half").is_some());
    }

    #[test]
    fn a_token_is_never_shown() {
        let (_directory, path) = file(FILE);
        let shown = format!("{:?}", Tokens::load(&path).unwrap());
        assert!(shown.contains("monitor") && !shown.contains("s3:cret"), "{shown}");
    }
}
