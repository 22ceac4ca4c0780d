//! How far an operation is, on standard error: one line that is drawn again at a terminal, else a
//! line now and then.

use std::io::{self, IsTerminal as _, Write as _};

use nbd_api::operation::ProgressUnit;
use nbd_api::{Operation, Progress};
use unicode_width::UnicodeWidthStr as _;

use super::{human, terminal};

/// Width of the bar.
const BAR: usize = 20;

/// Percent after which there is a new line, where lines stay.
const STEP: u64 = 10;

/// A line about one operation. Dropping it leaves the line as it is.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    at_terminal: bool,
    /// The last line that stays, without a terminal.
    last: Option<(String, u64)>,
    drawn: bool,
}

impl ProgressLine {
    pub(crate) fn new() -> Self {
        Self { at_terminal: io::stderr().is_terminal(), last: None, drawn: false }
    }

    /// Shows how it is now. What cannot be shown does not matter.
    pub(crate) fn show(&mut self, operation: &Operation) {
        let mut stderr = io::stderr();
        if self.at_terminal {
            // As wide as the window is at this moment; a line that is wrapped cannot be drawn over.
            let (width, _) = terminal::size(&stderr);
            let line = fit(&line(operation), width.saturating_sub(1));
            let _ = write!(stderr, "\r\x1b[K{line}").and_then(|()| stderr.flush());
            self.drawn = true;
            return;
        }
        let step = operation.progress.map_or(0, |progress| percent(&progress) / STEP);
        let now = (operation.message.clone(), step);
        if self.last.as_ref() != Some(&now) {
            self.last = Some(now);
            let _ = writeln!(stderr, "{}", line(operation));
        }
    }
}

impl ProgressLine {
    /// A line that stays, in the place of what is drawn.
    pub(crate) fn say(&mut self, text: &str) {
        let clear = if self.drawn { "\r\x1b[K" } else { "" };
        // As with what is shown: if it cannot be, no matter.
        let _ = writeln!(io::stderr(), "{clear}{text}");
        self.drawn = false;
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.drawn {
            let _ = writeln!(io::stderr());
        }
    }
}

fn line(operation: &Operation) -> String {
    let (id, message) = (human::visible(&operation.id), human::visible(&operation.message));
    match &operation.progress {
        None => format!("{id}: {message}"),
        Some(progress) => {
            let percent = percent(progress);
            let filled = BAR * usize::try_from(percent).unwrap_or(0) / 100;
            let bar = format!("{}{}", "#".repeat(filled), ".".repeat(BAR - filled));
            format!("{id}: [{bar}] {percent:>3}%  {}  {message}", counts(progress))
        }
    }
}

/// `1.2GiB of 3GiB, 35s left`.
pub(crate) fn counts(progress: &Progress) -> String {
    let Progress { done, total, unit, seconds_left } = progress;
    let counts = match unit {
        ProgressUnit::Bytes => format!("{} of {}", human::amount(*done), human::amount(*total)),
        ProgressUnit::Shards => format!("{done} of {}", human::counted(*total, "shard")),
    };
    match seconds_left {
        Some(left) => format!("{counts}, {} left", human::seconds(*left)),
        None => counts,
    }
}

/// How much is done: 100 only if all is.
fn percent(progress: &Progress) -> u64 {
    let (done, total) = (u128::from(progress.done), u128::from(progress.total));
    let percent = (done * 100).checked_div(total).unwrap_or(100);
    u64::try_from(percent.min(100)).unwrap_or(100)
}

/// As much of a line as has room.
fn fit(line: &str, width: usize) -> String {
    let mut fitting = String::new();
    for c in line.chars() {
        fitting.push(c);
        if fitting.width() > width {
            fitting.pop();
            break;
        }
    }
    fitting
}

#[cfg(test)]
mod tests {
    use nbd_api::{OperationKind, OperationState};

    use super::*;

    fn operation(progress: Option<Progress>) -> Operation {
        Operation {
            id: "replace-0-2-4".to_owned(),
            kind: OperationKind::Replace,
            state: OperationState::Running,
            message: "fetching".to_owned(),
            shard: Some(0),
            node: None,
            progress,
            cancellable: true,
        }
    }

    #[test]
    fn a_line_says_how_far_it_is() {
        let (unit, seconds_left) = (ProgressUnit::Bytes, Some(35));
        let progress = Progress { done: 1 << 30, total: 4 << 30, unit, seconds_left };
        assert_eq!(
            line(&operation(Some(progress))),
            "replace-0-2-4: [#####...............]  25%  1GiB of 4GiB, 35s left  fetching"
        );
        assert_eq!(line(&operation(None)), "replace-0-2-4: fetching");
        assert_eq!(fit("fetching 磁盘", 10), "fetching ");
    }

    #[test]
    fn nothing_to_do_is_all_done() {
        let progress =
            |done, total| Progress { done, total, unit: ProgressUnit::Shards, seconds_left: None };
        assert_eq!(percent(&progress(0, 0)), 100);
        assert_eq!(percent(&progress(999, 1000)), 99);
        assert_eq!(percent(&progress(u64::MAX, 1)), 100);
    }
}
