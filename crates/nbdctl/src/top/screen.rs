//! The terminal while it is ours: the alternate screen, keys one by one, no echo; and its old ways
//! again at the end, at a panic, at a signal, and while the program is suspended.

use std::io::{self, Read as _, Write as _};
use std::panic;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

use super::sample::Sample;
use super::view::{Key, View};
use crate::failure::{FAILED, Failure};
use crate::output::terminal;

/// Events that wait: more than a person types between two looks at the queue.
const EVENTS_MAX: usize = 64;

/// To the alternate screen, no cursor, no wrapping of lines; and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

/// What happens while the screen is shown.
#[derive(Debug)]
pub(super) enum Event {
    Key(Key),
    Resized,
    /// The signal of this number asks for the end.
    Signal(u8),
    /// The control API was asked.
    Looked(Box<Result<(Sample, Vec<u32>), Failure>>),
}

/// The terminal. Dropping it gives it back.
#[derive(Debug)]
pub(super) struct Screen {
    old: Restore,
    events: Receiver<Event>,
    sender: SyncSender<Event>,
    colours: bool,
}

/// How the terminal was. What is taken out has been given back.
#[derive(Debug, Clone)]
struct Restore(Arc<Mutex<Option<Termios>>>);

impl Restore {
    /// Gives the terminal back, once.
    fn restore(&self) -> io::Result<()> {
        let old = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(old) = old else { return Ok(()) };
        let mut stdout = io::stdout();
        let left = stdout.write_all(LEAVE.as_bytes()).and_then(|()| stdout.flush());
        tcsetattr(io::stdin(), OptionalActions::Drain, &old)?;
        left
    }
}

impl Screen {
    /// # Errors
    /// It is no terminal after all.
    pub(super) fn take() -> Result<Self, Failure> {
        let (sender, events) = mpsc::sync_channel(EVENTS_MAX);
        let old = Restore(Arc::new(Mutex::new(None)));
        let screen = Self { old, events, sender, colours: terminal::shows_colours() };
        // Signals first, so that none comes in between.
        watch_signals(screen.sender.clone())?;
        let (old, hook) = (screen.old.clone(), panic::take_hook());
        panic::set_hook(Box::new(move |info| {
            // So that its message stays on the screen.
            let _ = old.restore();
            hook(info);
        }));
        screen.enter()?;
        let keys = screen.sender.clone();
        thread::Builder::new().name("keys".to_owned()).spawn(move || read_keys(&keys))?;
        Ok(screen)
    }

    fn enter(&self) -> Result<(), Failure> {
        let old = tcgetattr(io::stdin()).map_err(|error| no_terminal(error.into()))?;
        let mut raw = old.clone();
        raw.make_raw();
        *self.old.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(old);
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)
            .map_err(|error| no_terminal(error.into()))?;
        let mut stdout = io::stdout();
        stdout.write_all(ENTER.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Where whoever has something to tell puts it.
    pub(super) fn events(&self) -> SyncSender<Event> {
        self.sender.clone()
    }

    pub(super) fn next(&self, wait: Duration) -> Result<Event, RecvTimeoutError> {
        self.events.recv_timeout(wait)
    }

    /// Draws it all at once: what is only overwritten does not flicker.
    ///
    /// # Errors
    /// The terminal takes nothing any more, or a thread has panicked and given it back.
    pub(super) fn draw(&self, view: &mut View) -> Result<(), Failure> {
        if self.old.0.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return Err(Failure::silent(FAILED));
        }
        let mut stdout = io::stdout();
        let (width, height) = terminal::size(&stdout);
        let lines = view.lines(width, height, self.colours);
        let mut text = "\x1b[H".to_owned();
        for (number, line) in lines.iter().enumerate() {
            let before = if number == 0 { "" } else { "\r\n" };
            text += &format!("{before}{line}\x1b[K");
        }
        text += "\x1b[J";
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Stops the program, as Ctrl-Z does elsewhere, until the shell has it go on.
    pub(super) fn suspend(&self) -> Result<(), Failure> {
        self.old.restore()?;
        kill_process(getpid(), Signal::TSTP).map_err(|error| no_terminal(error.into()))?;
        self.enter()
    }

    pub(super) fn give_back(self) -> Result<(), Failure> {
        Ok(self.old.restore()?)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nobody could be told that it failed.
        let _ = self.old.restore();
    }
}

fn no_terminal(error: io::Error) -> Failure {
    Failure::new(FAILED, format!("cannot use the terminal: {error}"))
}

/// Tells of signals, on a thread of their own.
fn watch_signals(events: SyncSender<Event>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    let mut resized = signal(SignalKind::window_change())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(entered);
    let watch = async move {
        loop {
            let event = tokio::select! {
                _ = resized.recv() => Event::Resized,
                _ = interrupt.recv() => Event::Signal(2),
                _ = terminate.recv() => Event::Signal(15),
                _ = hangup.recv() => Event::Signal(1),
            };
            if events.send(event).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(move || runtime.block_on(watch))?;
    Ok(())
}

/// Tells of keys, until the terminal is gone.
fn read_keys(events: &SyncSender<Event>) {
    let (mut stdin, mut bytes) = (io::stdin().lock(), [0; 64]);
    loop {
        match stdin.read(&mut bytes) {
            // Nobody is there any more.
            Ok(0) => {
                let _ = events.send(Event::Signal(1));
                return;
            }
            Ok(count) => {
                for key in keys(&bytes[..count]) {
                    if events.send(Event::Key(key)).is_err() {
                        return;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => {
                let _ = events.send(Event::Signal(1));
                return;
            }
        }
    }
}

/// The keys that bytes stand for; those of no use are left out.
fn keys(mut bytes: &[u8]) -> Vec<Key> {
    const SEQUENCES: [(&[u8], Key); 12] = [
        (b"\x1b[A", Key::Up),
        (b"\x1bOA", Key::Up),
        (b"\x1b[B", Key::Down),
        (b"\x1bOB", Key::Down),
        (b"\x1b[5~", Key::PageUp),
        (b"\x1b[6~", Key::PageDown),
        (b"\x1b[H", Key::Home),
        (b"\x1bOH", Key::Home),
        (b"\x1b[1~", Key::Home),
        (b"\x1b[F", Key::End),
        (b"\x1bOF", Key::End),
        (b"\x1b[4~", Key::End),
    ];
    let mut keys = Vec::new();
    while let [first, rest @ ..] = bytes {
        if let Some((sequence, key)) = SEQUENCES.iter().find(|(s, _)| bytes.starts_with(s)) {
            keys.push(*key);
            bytes = &bytes[sequence.len()..];
            continue;
        }
        bytes = match first {
            3 => {
                keys.push(Key::CtrlC);
                rest
            }
            26 => {
                keys.push(Key::CtrlZ);
                rest
            }
            // A sequence of another key: its letters are not meant as such.
            0x1b => {
                let body = rest.strip_prefix(b"[").or_else(|| rest.strip_prefix(b"O"));
                body.map_or(rest, |body| {
                    let end = body.iter().position(|byte| (0x40..=0x7e).contains(byte));
                    end.map_or(&[][..], |end| &body[end + 1..])
                })
            }
            byte if byte.is_ascii_graphic() => {
                keys.push(Key::Char(char::from(*byte)));
                rest
            }
            _ => rest,
        };
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_keys() {
        let typed = keys(b"q\x1b[A\x1b[6~\x1bOB\x03\x1a+");
        let expected = [
            Key::Char('q'),
            Key::Up,
            Key::PageDown,
            Key::Down,
            Key::CtrlC,
            Key::CtrlZ,
            Key::Char('+'),
        ];
        assert_eq!(typed, expected);
    }

    #[test]
    fn keys_of_no_use_do_nothing() {
        assert_eq!(keys(b"\x1b[15~\x1b[1;5q\x1bOPn\xc3\xa4\x1b"), [Key::Char('n')]);
        assert_eq!(keys(b"\x1b[12"), []);
    }
}
