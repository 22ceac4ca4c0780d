//! Running `nbdctl`.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::fake::Fake;

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// `nbdctl` with none of the tester's own settings.
pub(crate) fn nbdctl(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NBD")) {
        command.env_remove(name);
    }
    command.env_remove("XDG_CONFIG_HOME").env("HOME", "/nonexistent").args(words);
    command.stdin(Stdio::null());
    command
}

pub(crate) fn run(command: &mut Command) -> Run {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let [out, err] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    Run { code: status.code().unwrap_or_else(|| panic!("{status}: {err}")), out, err }
}

/// Asks the fake one.
pub(crate) fn ask(fake: &Fake, words: &[&str]) -> Run {
    run(nbdctl(words).env("NBDCTL_SERVER", fake.url()))
}

impl Run {
    #[track_caller]
    pub(crate) fn succeeds(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (0, ""), "{self:?}");
        self.out
    }

    /// Fails with this code, without output, and with each of these words.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> String {
        assert_eq!(self.code, code, "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
        assert!(self.err.starts_with("error: "), "{self:?}");
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in {}", self.err);
        }
        self.err
    }
}

/// Compares with a file, or, with `CINDERBLOCK_BLESS=1`, writes it.
#[track_caller]
pub(crate) fn is_golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("CINDERBLOCK_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
        return;
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, golden, "{}: CINDERBLOCK_BLESS=1 takes what is printed now", path.display());
}
