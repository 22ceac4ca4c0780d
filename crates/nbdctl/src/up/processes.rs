//! Each service as a process of its own, so that one can be killed to watch what happens.
//!
//! They end with `nbdctl` whatever becomes of it (see [`child`](crate::child)). Each is in a
//! process group of its own: Ctrl-C at a terminal reaches `nbdctl` alone, which stops them in
//! order. What they log comes out of `nbdctl`'s standard error, with the name of the service.

use std::env;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nbd_service::{Failure, LogFormat};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::{Instant, sleep, timeout};

use super::crew::{self, Crew, Event, Phase, Post, READY_POLL};
use super::plan::Plan;

/// This program, also when the file it was started from has been replaced.
const ONESELF: &str = "/proc/self/exe";

/// Time that a process has for `/readyz`.
const READY_DEADLINE: Duration = Duration::from_secs(2);

/// Time that a process has to end once it has nothing to wait for; then it is killed.
const END_DEADLINE: Duration = Duration::from_secs(10);

/// The first wait before a process is started again, doubled each time it ends soon after.
const RESTART_MIN: Duration = Duration::from_secs(1);

/// The longest wait before a process is started again.
const RESTART_MAX: Duration = Duration::from_secs(30);

/// What a process wrote last is waited for no longer than this once it has ended.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// How one service is run.
#[derive(Debug)]
struct Setup {
    name: String,
    program: PathBuf,
    flags: Vec<String>,
    /// Where `/readyz` is, as host:port.
    http: String,
    log_format: LogFormat,
    /// Time that it may take to finish what is under way.
    shutdown_deadline: Duration,
    restart: bool,
}

/// Starts all. With `restart`, each is started again when it ends.
///
/// Must be called, and polled, on the main thread: the processes end with the thread that started
/// them.
///
/// # Errors
/// A program is not there.
pub(super) fn start(plan: &Plan, restart: bool) -> Result<Crew, Failure> {
    let directory = programs()?;
    let nodes = plan.cluster.nodes().iter().map(|node| &node.listen.http);
    let http = [&plan.http, &plan.api].into_iter().chain(nodes);
    let setups =
        plan.commands().into_iter().zip(http).map(|((name, program, flags), http)| Setup {
            name,
            program: directory.join(program),
            flags,
            http: http.to_string(),
            log_format: plan.log_format,
            shutdown_deadline: plan.tuning.shutdown_deadline.get(),
            restart,
        });
    let setups: Vec<Setup> = setups.collect();
    let (crew, posts) = crew::muster(setups.len());
    for (setup, post) in setups.into_iter().zip(posts) {
        tokio::spawn(keep(setup, post));
    }
    Ok(crew)
}

/// The directory of the services' programs: where this one is.
pub(super) fn programs() -> anyhow::Result<PathBuf> {
    let oneself = env::current_exe().context("find out where nbdctl is")?;
    let directory = oneself.parent().context("nbdctl is in a directory")?;
    for program in ["nbd-lb", "nbd-control", "nbd-replica"] {
        if !directory.join(program).is_file() {
            let (there, release) = (directory.display(), directory.ends_with("release"));
            let release = if release { " --release" } else { "" };
            bail!(
                "--processes needs {program} beside nbdctl, in {there}: build it with `cargo build\
                 {release} --bin nbd-lb --bin nbd-control --bin nbd-replica`"
            );
        }
    }
    Ok(directory.to_owned())
}

/// Runs a service until the crew is stopped, or, without restarts, once.
async fn keep(setup: Setup, mut post: Post) {
    let mut wait = RESTART_MIN;
    loop {
        let began = Instant::now();
        let ended = live(&setup, &mut post).await;
        let over = post.is_over();
        if began.elapsed() >= RESTART_MAX {
            wait = RESTART_MIN;
        }
        let ended = ended.map_err(|reason| setup.explain(&reason, wait, over));
        post.tell(Event::Ended(ended)).await;
        if over || !setup.restart {
            return;
        }
        tokio::select! {
            biased;
            () = post.until(Phase::Drain) => return,
            () = sleep(wait) => wait = (wait * 2).min(RESTART_MAX),
        }
    }
}

/// One life of a process, from its start to its end.
async fn live(setup: &Setup, post: &mut Post) -> Result<(), String> {
    let mut child = setup.command().spawn().map_err(|error| format!("cannot start it: {error}"))?;
    let pid = child.id();
    post.tell(Event::Started(pid)).await;
    let stderr = child.stderr.take().expect("it is piped");
    let words = tokio::spawn(pass_on(stderr, setup.name.clone(), setup.log_format));
    let ready = async {
        while !is_ready(&setup.http).await {
            sleep(READY_POLL).await;
        }
        post.tell(Event::Ready).await;
        std::future::pending().await
    };
    let mut over = post.clone();
    let status = tokio::select! {
        status = child.wait() => status,
        () = over.until(Phase::Drain) => terminate(&mut child, setup.shutdown_deadline).await,
        status = ready => status,
    };
    let status = status.map_err(|error| format!("cannot wait for it: {error}"))?;
    // They must come out before what is said about the end.
    let last = timeout(LAST_WORDS_MAX, words).await.ok().and_then(Result::ok).unwrap_or_default();
    if over.is_over() && status.success() {
        return Ok(());
    }
    let pid = pid.unwrap_or_default();
    // A process that fails says why in its last line.
    let last = if status.code().is_some_and(|code| code != 0) { last } else { String::new() };
    let colon = if last.is_empty() { "" } else { ": " };
    Err(format!("process {pid} has ended ({status}){colon}{last}"))
}

/// Asks a process to end, and makes it if it does not.
async fn terminate(child: &mut Child, finish: Duration) -> std::io::Result<ExitStatus> {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        // It has not been waited for, so the id is its own. It may have been stopped.
        for signal in [Signal::TERM, Signal::CONT] {
            let _ = kill_process(pid, signal);
        }
    }
    match timeout(finish + END_DEADLINE, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            child.kill().await?;
            child.wait().await
        }
    }
}

impl Setup {
    fn command(&self) -> Command {
        let mut command = Command::new(ONESELF);
        command.arg("run-child").arg(format!("--parent={}", std::process::id()));
        command.arg("--").arg(&self.program).args(&self.flags);
        // What they say has been taken into the flags.
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"NBD_") {
                command.env_remove(name);
            }
        }
        if env::var_os("RUST_LOG").is_none_or(|filter| filter.is_empty()) {
            command.env("RUST_LOG", super::LOG_FILTER);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        command
    }

    /// What the user is told of an end that nobody asked for.
    fn explain(&self, reason: &str, wait: Duration, over: bool) -> String {
        if over {
            reason.to_owned()
        } else if self.restart {
            format!("{reason}. It is started again in {} s", wait.as_secs())
        } else {
            let words = [self.program.display().to_string()];
            let words = words.iter().chain(&self.flags).map(|word| quoted(word));
            let command = words.collect::<Vec<_>>().join(" ");
            format!("{reason}. To start it again, in another terminal:\n  {command}")
        }
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:[],@+%".contains(c);
    if word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Prints what a process writes, line by line, with its name. Gives the last line.
async fn pass_on(stderr: ChildStderr, name: String, format: LogFormat) -> String {
    let (mut lines, mut line, mut last) = (BufReader::new(stderr), Vec::new(), String::new());
    while lines.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
        last = String::from_utf8_lossy(&line).trim_end().to_owned();
        super::complain(&named(&last, &name, format));
        line.clear();
    }
    last.strip_prefix("error: ").unwrap_or(&last).to_owned()
}

/// A log line with the name of the service: in JSON as threads are named, else in front.
fn named(line: &str, name: &str, format: LogFormat) -> String {
    match line.strip_prefix('{') {
        Some(rest) if format == LogFormat::Json => format!("{{\"threadName\":\"{name}\",{rest}"),
        _ => format!("{name}: {line}"),
    }
}

/// Whether a service says that it can serve.
async fn is_ready(http: &str) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(http).await.ok()?;
        stream.write_all(b"GET /readyz HTTP/1.0\r\nhost: nbdctl\r\n\r\n").await.ok()?;
        let mut status = [0; b"HTTP/1.0 200".len()];
        stream.read_exact(&mut status).await.ok()?;
        Some(status.ends_with(b" 200"))
    };
    timeout(READY_DEADLINE, ask).await.ok().flatten().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_get_the_name_of_their_service() {
        assert_eq!(named("hello", "nbd-1-2", LogFormat::Text), "nbd-1-2: hello");
        let json = named(r#"{"level":"WARN"}"#, "nbd-1-2", LogFormat::Json);
        assert_eq!(json, r#"{"threadName":"nbd-1-2","level":"WARN"}"#);
        assert_eq!(named("error: no", "nbd-lb", LogFormat::Json), "nbd-lb: error: no");
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        assert_eq!(quoted("--data-dir=/a/b-1.x"), "--data-dir=/a/b-1.x");
        assert_eq!(quoted("my dir"), "'my dir'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
