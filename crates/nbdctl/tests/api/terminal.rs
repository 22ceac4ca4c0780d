//! `nbdctl` in a real terminal, by tmux: the live screen, progress, questions, colours.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::process::{Signal, send_signal};
use nbd_testkit::require_tools;

use crate::fake::Fake;

const DEADLINE: Duration = Duration::from_secs(30);

/// A terminal with a shell in it. Dropping it ends it.
struct Terminal {
    directory: tempfile::TempDir,
}

impl Terminal {
    fn start(fake: &Fake, columns: u32, rows: u32) -> Self {
        let terminal = Self { directory: tempfile::TempDir::new().unwrap() };
        let (server, home) = (fake.url(), terminal.directory.path().display().to_string());
        let shell = format!(
            "env -u NO_COLOR -u NBDCTL_TOKEN -u XDG_CONFIG_HOME NBDCTL_SERVER={server} \
             HOME={home} PS1='ready> ' ENV= bash --norc --noprofile"
        );
        let (columns, rows) = (columns.to_string(), rows.to_string());
        let nothing = ["-f", "/dev/null"];
        let size = ["new-session", "-d", "-s", "t", "-x", &columns, "-y", &rows, &shell];
        terminal.tmux(&nothing.iter().chain(&size).copied().collect::<Vec<_>>());
        terminal.wait_prompt();
        terminal
    }

    fn tmux(&self, words: &[&str]) -> String {
        let socket = self.directory.path().join("tmux");
        let output = Command::new("tmux").arg("-S").arg(socket).args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn nbdctl(&self, words: &str) {
        self.keys(&format!("{} {words}", env!("CARGO_BIN_EXE_nbdctl")));
        self.key("Enter");
    }

    fn keys(&self, text: &str) {
        self.tmux(&["send-keys", "-t", "t", "-l", text]);
    }

    fn key(&self, name: &str) {
        self.tmux(&["send-keys", "-t", "t", name]);
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-t", "t", "-p"])
    }

    fn resize(&self, columns: u32, rows: u32) {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        self.tmux(&["resize-window", "-t", "t", "-x", &columns, "-y", &rows]);
    }

    #[track_caller]
    fn wait_for(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let screen = self.screen();
            if holds(&screen) {
                return screen;
            }
            assert!(began.elapsed() < DEADLINE, "waited for {what}:\n{screen}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[track_caller]
    fn wait(&self, text: &str) -> String {
        self.wait_for(text, |screen| screen.contains(text))
    }

    /// Waits until the shell asks for a command. The line of the last command has the prompt, too,
    /// but can be seen while that command still runs and reads what is typed.
    #[track_caller]
    fn wait_prompt(&self) {
        self.wait_for("the prompt", |screen| {
            let last = screen.lines().rfind(|line| !line.trim().is_empty());
            last.is_some_and(|line| line.trim() == "ready>")
        });
    }

    /// Whether the shell is there again and shows what is typed: the code of the last command.
    #[track_caller]
    fn code(&self) -> String {
        // The quotes keep the words that are typed apart from those that are printed.
        self.keys("echo code'='$?; stty -a | grep -o ' -\\?echo ' | tr ' ' '_'");
        self.key("Enter");
        let screen = self.wait_for("the shell", |screen| screen.contains("_echo_"));
        let code = screen.lines().rfind(|line| line.starts_with("code=")).unwrap();
        code["code=".len()..].to_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let socket = self.directory.path().join("tmux");
        let _ = Command::new("tmux").arg("-S").arg(socket).arg("kill-server").output();
    }
}

#[test]
fn top_is_live_and_gives_the_terminal_back() {
    require_tools!["tmux"];
    let fake = Fake::start();
    let terminal = Terminal::start(&fake, 100, 24);
    terminal.nbdctl("top --interval 100ms");
    terminal.wait("by IOPS");
    let screen = terminal.wait("250us");
    assert!(screen.contains("VOLUME") && screen.contains("nbd-2-1"), "{screen}");
    let position = |screen: &str, name: &str| screen.find(name).unwrap();
    assert!(position(&screen, "vol1") < position(&screen, "quiet"), "{screen}");
    terminal.keys("n");
    let screen = terminal.wait("by name");
    assert!(position(&screen, "quiet") < position(&screen, "vol1"), "{screen}");
    // A smaller window is filled, a larger one too.
    terminal.resize(60, 12);
    let fits = |rows: usize, screen: &str| {
        let lines: Vec<&str> = screen.lines().collect();
        lines.len() == rows && lines[rows - 1].starts_with("q end") && lines[0].contains("top")
    };
    terminal.wait_for("12 rows", |screen| fits(12, screen));
    terminal.resize(120, 40);
    terminal.wait_for("40 rows", |screen| fits(40, screen) && screen.contains("p pause"));
    terminal.keys("q");
    terminal.wait_prompt();
    assert_eq!(terminal.code(), "0");
    assert!(!terminal.screen().contains("by name"), "the screen is as it was before");
}

#[test]
fn top_ends_well_however_it_ends() {
    require_tools!["tmux"];
    let fake = Fake::start();
    let terminal = Terminal::start(&fake, 100, 24);
    terminal.nbdctl("top");
    terminal.wait("by IOPS");
    terminal.key("C-c");
    terminal.wait_prompt();
    assert_eq!(terminal.code(), "0");
    terminal.keys("clear");
    terminal.key("Enter");
    // By a signal. It runs in place of a shell that has written down its id.
    terminal.keys(&format!("(echo $BASHPID > ~/pid; exec {} top)", env!("CARGO_BIN_EXE_nbdctl")));
    terminal.key("Enter");
    terminal.wait("by IOPS");
    let pid = fs::read_to_string(terminal.directory.path().join("pid")).unwrap();
    send_signal(pid.trim().parse().unwrap(), Signal::TERM);
    terminal.wait_prompt();
    assert_eq!(terminal.code(), "143");
    terminal.keys("clear");
    terminal.key("Enter");
    // Suspended and gone on with.
    terminal.nbdctl("top");
    terminal.wait("by IOPS");
    terminal.key("C-z");
    terminal.wait("Stopped");
    terminal.keys("fg");
    terminal.key("Enter");
    terminal.wait("by IOPS");
    terminal.keys("q");
    terminal.wait_prompt();
    assert_eq!(terminal.code(), "0");
}

#[test]
fn top_goes_on_when_nobody_answers() {
    require_tools!["tmux"];
    let fake = Fake::start();
    let terminal = Terminal::start(&fake, 100, 24);
    terminal.nbdctl("top --interval 100ms");
    terminal.wait("250us");
    fake.script(
        "GET /activity",
        503,
        &[],
        &crate::fake::problem("unavailable", 503, "no majority"),
    );
    let screen = terminal.wait("error: no majority");
    assert!(screen.contains("vol1"), "what was known stays: {screen}");
    terminal.keys("q");
    terminal.wait_prompt();
}

#[test]
fn deleting_asks_first() {
    require_tools!["tmux"];
    let fake = Fake::start();
    let terminal = Terminal::start(&fake, 100, 24);
    terminal.nbdctl("volume rm vol1");
    terminal.wait("Delete vol1 and all that is on it? [y/N]");
    terminal.key("Enter");
    terminal.wait("error: nothing was done");
    assert_eq!(terminal.code(), "1");
    assert!(fake.has("vol1"));
    terminal.nbdctl("volume rm vol1");
    terminal.wait_for("the question again", |screen| screen.matches("[y/N]").count() == 2);
    terminal.keys("y");
    terminal.key("Enter");
    terminal.wait("vol1 deleted");
    assert!(!fake.has("vol1"));
    terminal.nbdctl("volume rm db/main --force --yes");
    terminal.wait("db/main deleted");
}

#[test]
fn progress_is_one_line_and_colours_are_for_terminals_that_want_them() {
    require_tools!["tmux"];
    let fake = Fake::start();
    let terminal = Terminal::start(&fake, 120, 24);
    terminal.nbdctl("node drain nbd-1-1 --wait");
    let screen = terminal.wait("drain-nbd-1-1 done: all is there");
    assert_eq!(screen.matches("[####").count(), 1, "{screen}");
    terminal.nbdctl("shard list");
    terminal.wait("nbd-2-3 does not answer");
    let colours = || terminal.tmux(&["capture-pane", "-t", "t", "-p", "-e"]);
    assert!(colours().contains("\x1b[33mdegraded"), "{}", colours());
    terminal.keys("clear; export NO_COLOR=1");
    terminal.key("Enter");
    terminal.wait_for("an empty screen", |screen| !screen.contains("does not answer"));
    terminal.nbdctl("shard list");
    terminal.wait("nbd-2-3 does not answer");
    assert!(!colours().contains("\x1b[33mdegraded"), "{}", colours());
}
