//! What commands print: tables for people, JSON for programs.
//!
//! - `human`: sizes, ages, rates and names for people. `table`: columns. `terminal`: how wide it
//!   is, whether it shows colours, and asking.
//! - `progress`: a line that tells how far an operation is.

pub(crate) mod human;
mod progress;
mod table;
pub(crate) mod terminal;

use std::io::{self, BufWriter, Stdout, Write};

use nbd_api::Timestamp;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

pub(crate) use self::progress::{ProgressLine, counts as progress_counts};
pub(crate) use self::table::{Cell, Column, Style, Table};
use crate::api::{Answer, Client, Connection, Extent, Format, Settings, Url};
use crate::failure::{Failure, UNAVAILABLE};

/// What a command that asks the control API has: whom to ask, and where to print.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) out: Output,
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Output {
    format: Format,
    colours: bool,
    /// What ages are counted to.
    pub(crate) now: Timestamp,
    stdout: BufWriter<Stdout>,
}

impl Session {
    /// # Errors
    /// Mistakes in the settings.
    pub(crate) fn new(flags: &Connection) -> Result<Self, Failure> {
        let settings = Settings::load(flags)?;
        let format = settings.format;
        Ok(Self { client: Client::new(settings), out: Output::new(format) })
    }

    /// Gets one thing and prints it.
    pub(crate) fn show<T: DeserializeOwned>(
        &mut self,
        url: &Url,
        text: impl FnOnce(&Output, &T) -> String,
    ) -> Result<(), Failure> {
        let answer = self.client.get(url)?;
        self.out.answer(&answer, text)
    }

    /// Gets a list and prints it, page by page. The last word is about shards that do not answer.
    pub(crate) fn list<T: DeserializeOwned>(
        &mut self,
        url: &Url,
        extent: Extent,
        columns: Vec<Column>,
        row: impl Fn(&Output, &T) -> Vec<Cell>,
    ) -> Result<(), Failure> {
        let Self { client, out } = self;
        let missing = match out.format {
            Format::Table => {
                let mut table = Table::new(columns, out.colours);
                client.pages::<T>(url, extent, |items| {
                    let rows = items.iter().map(|item| row(out, item)).collect();
                    Ok(out.stdout.write_all(table.block(rows).as_bytes())?)
                })?
            }
            Format::Json => {
                let mut first = true;
                let missing = client.pages::<Box<RawValue>>(url, extent, |items| {
                    for item in items {
                        let before = if first { "[\n" } else { ",\n" };
                        first = false;
                        write!(out.stdout, "{before}{item}")?;
                    }
                    Ok(())
                });
                // Not when it failed in between: half of a list must not look like a list.
                let missing = missing.inspect_err(|_| drop(out.stdout.flush()))?;
                out.stdout.write_all(if first { b"[]\n" } else { b"\n]\n" })?;
                missing
            }
        };
        out.flush()?;
        is_whole(&missing)
    }
}

/// Whether nothing is missing from a list.
pub(crate) fn is_whole(missing: &[u32]) -> Result<(), Failure> {
    if missing.is_empty() {
        return Ok(());
    }
    let shards: Vec<String> = missing.iter().map(u32::to_string).collect();
    let (shards, s) = (shards.join(", "), if missing.len() == 1 { "" } else { "s" });
    let verb = if missing.len() == 1 { "does" } else { "do" };
    let message = format!("the list is not whole: shard{s} {shards} {verb} not answer");
    Err(Failure::new(UNAVAILABLE, message).hint("`nbdctl health` says why"))
}

impl Output {
    fn new(format: Format) -> Self {
        let colours = format == Format::Table && terminal::shows_colours();
        let stdout = BufWriter::new(io::stdout());
        Self { format, colours, now: Timestamp::now(), stdout }
    }

    pub(crate) const fn is_json(&self) -> bool {
        matches!(self.format, Format::Json)
    }

    /// Prints an answer: as it is, or as `text` has it.
    pub(crate) fn answer<T: DeserializeOwned>(
        &mut self,
        answer: &Answer,
        text: impl FnOnce(&Self, &T) -> String,
    ) -> Result<(), Failure> {
        let text = match self.format {
            Format::Json => answer.text.trim_end().to_owned() + "\n",
            Format::Table => text(self, &answer.read()?),
        };
        self.print(&text)
    }

    /// Prints what is for people only.
    pub(crate) fn tell(&mut self, line: &str) -> Result<(), Failure> {
        match self.format {
            Format::Json => Ok(()),
            Format::Table => self.print(&format!("{line}\n")),
        }
    }

    pub(crate) fn print(&mut self, text: &str) -> Result<(), Failure> {
        self.stdout.write_all(text.as_bytes())?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Failure> {
        Ok(self.stdout.flush()?)
    }

    /// A table, whole.
    pub(crate) fn table(&self, columns: Vec<Column>, rows: Vec<Vec<Cell>>) -> String {
        Table::new(columns, self.colours).block(rows)
    }

    /// A text in a colour, if there are any.
    pub(crate) fn styled(&self, cell: &Cell) -> String {
        cell.styled(self.colours)
    }

    /// Names and what belongs to them, a line each; more than one thing takes more lines.
    pub(crate) fn details(&self, details: &[(&str, Vec<Cell>)]) -> String {
        let width = details.iter().map(|(name, _)| name.len() + 2).max().unwrap_or(0);
        let mut text = String::new();
        for (name, cells) in details {
            for (number, cell) in cells.iter().enumerate() {
                let name = if number == 0 { format!("{name}:") } else { String::new() };
                text += &format!("{name:<width$}{}\n", self.styled(cell));
            }
        }
        text
    }
}
