//! The screen of `nbdctl top` as lines, and what keys do to it.

use std::time::Duration;

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use super::sample::{Flow, Rate, Rates, Sample, VolumeSort};
use crate::output::{Cell, Column, Style, Table, human};
use crate::shard::{health, optional};

/// Times between looks that `+` and `-` go through.
const INTERVALS: [Duration; 8] = [
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(60),
];

/// Most lines that shards may take of a screen, as a part of its height.
const SHARDS_PART: usize = 3;

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    CtrlC,
    CtrlZ,
}

/// What comes of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// The screen is to be drawn.
    Shown,
    /// It is to be drawn, and the time between looks is another.
    Rhythm,
    Nothing,
    End,
    Suspend,
}

/// All that the screen shows.
#[derive(Debug)]
pub(super) struct View {
    server: String,
    pub(super) interval: Duration,
    pub(super) paused: bool,
    sort: VolumeSort,
    reverse: bool,
    /// The first volume that is shown.
    top: usize,
    /// Volumes that the screen has room for, as it was drawn last.
    room: usize,
    rates: Rates,
    trouble: Option<String>,
}

impl View {
    pub(super) fn new(server: String, sort: VolumeSort) -> Self {
        Self {
            server,
            interval: INTERVALS[3],
            paused: false,
            sort,
            reverse: false,
            top: 0,
            room: 1,
            rates: Rates::default(),
            trouble: None,
        }
    }

    /// Shows what is known before there is anything to compare with.
    pub(super) fn shards_only(&mut self, sample: &Sample) {
        self.update(Rates::between(sample, sample), &[]);
    }

    pub(super) fn update(&mut self, rates: Rates, missing: &[u32]) {
        self.rates = rates;
        self.rates.sort(self.sort, self.reverse);
        let shards: Vec<String> = missing.iter().map(u32::to_string).collect();
        self.trouble =
            (!missing.is_empty()).then(|| format!("no answer from shard {}", shards.join(", ")));
    }

    /// Shows that nothing new is known, and why.
    pub(super) fn fail(&mut self, trouble: String) {
        self.trouble = Some(trouble);
    }

    pub(super) fn press(&mut self, key: Key) -> Change {
        let last = self.rates.volumes.len().saturating_sub(1);
        match key {
            Key::CtrlC | Key::Char('q' | 'Q') => return Change::End,
            Key::CtrlZ => return Change::Suspend,
            Key::Char('i') => self.order(VolumeSort::Iops),
            Key::Char('b') => self.order(VolumeSort::Bandwidth),
            Key::Char('l') => self.order(VolumeSort::Latency),
            Key::Char('s') => self.order(VolumeSort::Sessions),
            Key::Char('n') => self.order(VolumeSort::Name),
            Key::Char('r') => {
                self.reverse = !self.reverse;
                self.rates.sort(self.sort, self.reverse);
            }
            Key::Char('p') => self.paused = !self.paused,
            Key::Char('+') => {
                let longer = INTERVALS.into_iter().find(|interval| *interval > self.interval);
                self.interval = longer.unwrap_or(self.interval);
                return Change::Rhythm;
            }
            Key::Char('-') => {
                let shorter = INTERVALS.into_iter().rfind(|interval| *interval < self.interval);
                self.interval = shorter.unwrap_or(self.interval);
                return Change::Rhythm;
            }
            Key::Up => self.top = self.top.saturating_sub(1),
            Key::Down => self.top = (self.top + 1).min(last),
            Key::PageUp => self.top = self.top.saturating_sub(self.room),
            Key::PageDown => self.top = (self.top + self.room).min(last),
            Key::Home => self.top = 0,
            Key::End => self.top = (last + 1).saturating_sub(self.room),
            Key::Char(_) => return Change::Nothing,
        }
        Change::Shown
    }

    fn order(&mut self, by: VolumeSort) {
        self.sort = by;
        self.top = 0;
        self.rates.sort(by, self.reverse);
    }

    /// The lines of a screen of this size, none longer than it is wide.
    pub(super) fn lines(&mut self, width: usize, height: usize, colours: bool) -> Vec<String> {
        let mut lines = vec![self.title(colours), String::new()];
        let ((shard_columns, shard_rows), (columns, rows)) = tables(&self.rates);
        let room = (height / SHARDS_PART).max(2);
        lines.extend(cut(shard_columns, shard_rows, 0, room, colours));
        lines.push(String::new());
        // The titles and the last line take one each.
        self.room = height.saturating_sub(lines.len() + 2).max(1);
        self.top = self.top.min(rows.len().saturating_sub(self.room));
        lines.extend(cut(columns, rows, self.top, self.room + 1, colours));
        lines.truncate(height.saturating_sub(1));
        lines.resize(height.saturating_sub(1), String::new());
        lines.push(self.last_line(colours));
        lines.iter().map(|line| fit(line, width)).collect()
    }

    fn title(&self, colours: bool) -> String {
        let paused = if self.paused { ", paused" } else { "" };
        let interval = nbd_service::HumanDuration::new(self.interval);
        let title = Cell::new(format!("nbdctl top  {}", self.server), Style::Strong);
        let turned = if self.reverse { ", turned round" } else { "" };
        let (title, sort) = (title.styled(colours), self.sort.word());
        format!("{title}  every {interval}{paused}, by {sort}{turned}")
    }

    fn last_line(&self, colours: bool) -> String {
        match &self.trouble {
            Some(trouble) => Cell::new(human::visible(trouble), Style::Bad).styled(colours),
            None => {
                let keys =
                    "q end  i/b/l/s/n sort  r turn round  arrows scroll  +/- rhythm  p pause";
                Cell::new(keys, Style::Dim).styled(colours)
            }
        }
    }
}

/// Columns and rows.
type Content = (Vec<Column>, Vec<Vec<Cell>>);

/// Both tables: the shards', the volumes'.
pub(super) fn tables(rates: &Rates) -> (Content, Content) {
    let flows = [
        Column::right("READ/s"),
        Column::right("WRITE/s"),
        Column::right("READ"),
        Column::right("WRITE"),
        Column::right("R-LAT"),
        Column::right("W-LAT"),
    ];
    let shards = [
        Column::right("SHARD"),
        Column::left("HEALTH"),
        Column::left("LEADER"),
        Column::right("LAG"),
        Column::right("SESSIONS"),
    ];
    let shard_rows = rates.shards.iter().map(|shard| {
        let mut row = vec![
            Cell::number(shard.shard.into()),
            health(shard.health),
            optional(shard.leader.as_deref()),
            shard.lag.map_or_else(Cell::none, Cell::number),
            Cell::number(shard.sessions.into()),
        ];
        row.extend(cells(shard.rate));
        row
    });
    let volumes = [Column::left("VOLUME"), Column::right("SHARD"), Column::right("SESSIONS")];
    let volume_rows = rates.volumes.iter().map(|volume| {
        let mut row = vec![
            human::name(&volume.name).into(),
            Cell::number(volume.shard.into()),
            Cell::number(volume.sessions.into()),
        ];
        row.extend(cells(volume.rate));
        row
    });
    (
        (shards.into_iter().chain(flows.clone()).collect(), shard_rows.collect()),
        (volumes.into_iter().chain(flows).collect(), volume_rows.collect()),
    )
}

fn cells(rate: Option<Rate>) -> [Cell; 6] {
    let Some(Rate { read, write }) = rate else { return [(); 6].map(|()| Cell::none()) };
    let latency =
        |flow: Flow| flow.latency_us.map_or_else(Cell::none, |us| human::latency(us).into());
    [
        human::frequency(read.iops).into(),
        human::frequency(write.iops).into(),
        human::bandwidth(read.bandwidth).into(),
        human::bandwidth(write.bandwidth).into(),
        latency(read),
        latency(write),
    ]
}

/// The lines of a table, its titles first, `room` of them, rows from `top` on. Columns are as wide
/// as all rows need, so that scrolling does not move them.
fn cut(
    columns: Vec<Column>,
    rows: Vec<Vec<Cell>>,
    top: usize,
    room: usize,
    colours: bool,
) -> Vec<String> {
    let text = Table::new(columns, colours).block(rows);
    let mut lines = text.lines().map(str::to_owned);
    let titles = lines.next();
    titles.into_iter().chain(lines.skip(top)).take(room).collect()
}

/// As much of a line as has room; escape sequences have no width.
fn fit(line: &str, width: usize) -> String {
    let (mut fitting, mut used, mut escaped) = (String::new(), 0, false);
    if !line.contains('\x1b') && line.width() <= width {
        return line.to_owned();
    }
    for c in line.chars() {
        if escaped || c == '\x1b' {
            escaped = c != 'm';
            fitting.push(c);
            continue;
        }
        used += c.width().unwrap_or(0);
        if used <= width {
            fitting.push(c);
        }
    }
    fitting
}

#[cfg(test)]
mod tests;
