//! What a person is told while a copy runs: a bar on a terminal, else a line now and then.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;

/// Between two drawings of the bar, ...
const DRAW: Duration = Duration::from_millis(200);

/// ... and between two lines.
const LINE: Duration = Duration::from_secs(5);

/// Time over which the rate is taken. A stall shows within it.
const RATE_OVER: Duration = Duration::from_secs(5);

/// How a copy gets on, and where that is shown.
#[derive(Debug)]
pub(super) struct Progress {
    mode: Mode,
    /// Bytes in all, data and zeroes; 0 if that is not known.
    total: AtomicU64,
    /// Bytes done with, those of earlier runs among them.
    done: AtomicU64,
    /// Bytes of data that this run has carried.
    carried: AtomicU64,
    screen: Mutex<Screen>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Quiet,
    Lines,
    Bar,
}

#[derive(Debug, Default)]
struct Screen {
    /// The bar is the last that was written.
    drawn: bool,
    /// Moments of late, and what was done by then; the oldest first.
    samples: Vec<(Duration, u64)>,
    began: Option<Instant>,
    said: Option<Instant>,
}

/// What a drawing shows.
#[derive(Debug, Clone, Copy)]
struct View {
    total: u64,
    done: u64,
    /// Bytes a second, if known.
    rate: Option<f64>,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        let mode = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Mode::Quiet,
            (false, true) => Mode::Bar,
            (false, false) => Mode::Lines,
        };
        let zero = || AtomicU64::new(0);
        let screen = Mutex::new(Screen::default());
        Self { mode, total: zero(), done: zero(), carried: zero(), screen }
    }

    /// A stretch of work begins: `done` of `total` bytes are done already.
    pub(super) fn begin(&self, total: u64, done: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.done.store(done, Ordering::Relaxed);
        let mut screen = self.screen();
        *screen = Screen { drawn: screen.drawn, ..Screen::default() };
    }

    pub(super) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn carry(&self, bytes: u64) {
        self.carried.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of data that were carried so far.
    pub(super) fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }

    /// Shows it, for ever.
    pub(super) async fn show(&self) {
        if self.mode == Mode::Quiet {
            return std::future::pending().await;
        }
        let mut ticks = tokio::time::interval(DRAW);
        loop {
            ticks.tick().await;
            self.draw(Instant::now());
        }
    }

    fn draw(&self, now: Instant) {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed);
        let mut screen = self.screen();
        let began = *screen.began.get_or_insert(now);
        let at = now.duration_since(began);
        screen.samples.retain(|(sample, _)| at.saturating_sub(*sample) <= RATE_OVER);
        screen.samples.push((at, done));
        let (first, before) = screen.samples[0];
        let passed = at.saturating_sub(first).as_secs_f64();
        let rate = (passed > 0.0).then(|| precise(done.saturating_sub(before)) / passed);
        let view = View { total, done, rate };
        match self.mode {
            Mode::Bar => {
                // A terminal may not know how wide it is.
                let width = tcgetwinsize(std::io::stderr()).map_or(0, |size| size.ws_col);
                let width = if width == 0 { 80 } else { width };
                // A terminal that is gone is no reason to stop.
                let _ = write!(std::io::stderr(), "\r\x1b[K{}", view.bar(usize::from(width)));
                screen.drawn = true;
            }
            Mode::Lines if now.duration_since(*screen.said.get_or_insert(now)) >= LINE => {
                screen.said = Some(now);
                let _ = writeln!(std::io::stderr(), "{}", view.text());
            }
            Mode::Lines | Mode::Quiet => {}
        }
    }

    /// Tells a person something, on a line of its own.
    pub(super) fn say(&self, text: &str) {
        if self.mode == Mode::Quiet {
            return;
        }
        let mut screen = self.screen();
        let clear = if std::mem::take(&mut screen.drawn) { "\r\x1b[K" } else { "" };
        let _ = writeln!(std::io::stderr(), "{clear}{text}");
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        if std::mem::take(&mut self.screen().drawn) {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }

    fn screen(&self) -> std::sync::MutexGuard<'_, Screen> {
        self.screen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl View {
    /// `45 % 460.0 MiB of 1.0 GiB, 210.0 MiB/s, 3 s left`
    fn text(&self) -> String {
        let mut text = match self.total {
            0 => bytes(self.done),
            total => {
                format!("{:>3} % {} of {}", self.percent(), bytes(self.done), bytes(total))
            }
        };
        let Some(rate) = self.rate else { return text };
        text += &format!(", {}/s", bytes(rounded(rate)));
        let left = self.total.saturating_sub(self.done);
        if left > 0 && rate >= 1.0 {
            text += &format!(", {} left", time(rounded(precise(left) / rate)));
        }
        text
    }

    /// The same behind a bar, as far as it fits into `width` columns.
    fn bar(&self, width: usize) -> String {
        let text = self.text();
        // The last column stays free: some terminals go to the next line otherwise.
        let room = width.saturating_sub(text.len() + 4).min(40);
        if self.total == 0 || room < 5 {
            return text.chars().take(width.saturating_sub(1)).collect();
        }
        let full = usize::try_from(self.percent()).unwrap_or(100).min(100) * room / 100;
        format!("[{}{}] {text}", "#".repeat(full), "-".repeat(room - full))
    }

    /// 100 only when all is done.
    fn percent(&self) -> u64 {
        let percent = u128::from(self.done) * 100 / u128::from(self.total.max(1));
        u64::try_from(percent).unwrap_or(100).min(100)
    }
}

/// `1.5 GiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = precise(count);
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1 h 02 m`, `3 m 07 s`, `45 s`.
pub(super) fn time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} m {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// For people: 52 bits are enough.
fn precise(count: u64) -> f64 {
    count as f64
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float that does not fit becomes the nearest that does"
)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: View = View { total: 1 << 30, done: 512 << 20, rate: Some(52_428_800.0) };

    #[test]
    fn a_view_says_how_far_and_how_long() {
        assert_eq!(HALF.text(), " 50 % 512.0 MiB of 1.0 GiB, 50.0 MiB/s, 10 s left");
        assert_eq!(View { rate: None, ..HALF }.text(), " 50 % 512.0 MiB of 1.0 GiB");
        let stalled = View { rate: Some(0.0), ..HALF };
        assert_eq!(stalled.text(), " 50 % 512.0 MiB of 1.0 GiB, 0 B/s");
        assert_eq!(View { total: 0, ..HALF }.text(), "512.0 MiB, 50.0 MiB/s");
        let nearly = View { done: (1 << 30) - 1, rate: None, ..HALF };
        assert_eq!(nearly.percent(), 99);
    }

    #[test]
    fn a_bar_fits_its_terminal() {
        let wide = HALF.bar(120);
        assert!(wide.starts_with(&format!("[{}{}]", "#".repeat(20), "-".repeat(20))), "{wide}");
        for width in [0, 1, 10, 53, 60, 80, 200] {
            let line = HALF.bar(width);
            assert!(line.len() < width.max(1), "{width}: {line}");
        }
    }

    #[test]
    fn amounts_are_short() {
        assert_eq!((bytes(0), bytes(1023)), ("0 B".to_owned(), "1023 B".to_owned()));
        assert_eq!((bytes(1536), bytes(1 << 40)), ("1.5 KiB".to_owned(), "1.0 TiB".to_owned()));
        assert_eq!((time(59), time(187)), ("59 s".to_owned(), "3 m 07 s".to_owned()));
        assert_eq!(time(3720), "1 h 02 m");
    }
}
