//! Columns without borders, aligned, that can be printed in pieces.

use unicode_width::UnicodeWidthStr as _;

/// Blanks between two columns.
const GAP: usize = 2;

/// How a text looks on a terminal that shows colours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Style {
    #[default]
    Plain,
    Good,
    Warn,
    Bad,
    Strong,
    Dim,
}

impl Style {
    const fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Good => "32",
            Self::Warn => "33",
            Self::Bad => "31",
            Self::Strong => "1",
            Self::Dim => "2",
        }
    }
}

/// A text and how it looks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) text: String,
    pub(crate) style: Style,
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), style: Style::Plain }
    }
}

impl Cell {
    pub(crate) fn new(text: impl Into<String>, style: Style) -> Self {
        Self { text: text.into(), style }
    }

    /// A number.
    pub(crate) fn number(number: u64) -> Self {
        number.to_string().into()
    }

    /// What is not there.
    pub(crate) fn none() -> Self {
        Self::new("-", Style::Dim)
    }

    pub(crate) fn width(&self) -> usize {
        self.text.width()
    }

    /// The text, in its colour if there are `colours`.
    pub(crate) fn styled(&self, colours: bool) -> String {
        match self.style {
            Style::Plain => self.text.clone(),
            _ if !colours => self.text.clone(),
            style => format!("\x1b[{}m{}\x1b[0m", style.code(), self.text),
        }
    }
}

/// A column.
#[derive(Debug, Clone)]
pub(crate) struct Column {
    title: &'static str,
    right: bool,
}

impl Column {
    pub(crate) const fn left(title: &'static str) -> Self {
        Self { title, right: false }
    }

    /// For numbers.
    pub(crate) const fn right(title: &'static str) -> Self {
        Self { title, right: true }
    }
}

/// A table that is printed in blocks: columns only get wider.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Column>,
    widths: Vec<usize>,
    headed: bool,
    colours: bool,
}

impl Table {
    pub(crate) fn new(columns: Vec<Column>, colours: bool) -> Self {
        let widths = columns.iter().map(|column| column.title.width()).collect();
        Self { columns, widths, headed: false, colours }
    }

    /// The next rows as lines, the titles in front of the first.
    pub(crate) fn block(&mut self, rows: Vec<Vec<Cell>>) -> String {
        for row in &rows {
            for (width, cell) in self.widths.iter_mut().zip(row) {
                *width = cell.width().max(*width);
            }
        }
        let mut text = String::new();
        if !self.headed {
            self.headed = true;
            let titles = self.columns.iter().map(|column| Cell::new(column.title, Style::Dim));
            text += &self.line(&titles.collect::<Vec<_>>());
        }
        for row in rows {
            text += &self.line(&row);
        }
        text
    }

    fn line(&self, row: &[Cell]) -> String {
        let (mut line, mut blanks) = (String::new(), 0);
        for ((column, width), cell) in self.columns.iter().zip(&self.widths).zip(row) {
            let pad = width.saturating_sub(cell.width());
            let (before, after) = if column.right { (pad, 0) } else { (0, pad) };
            // Only in front of something, so that no line ends with blanks.
            if !cell.text.is_empty() {
                line += &" ".repeat(blanks + before);
                line += &cell.styled(self.colours);
                blanks = after + GAP;
            } else {
                blanks += width + GAP;
            }
        }
        line + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_where_they_end() {
        let columns = vec![Column::left("NAME"), Column::right("SIZE"), Column::left("LABELS")];
        let mut table = Table::new(columns, false);
        let row =
            |name: &str, size: &str, labels: &str| vec![name.into(), size.into(), labels.into()];
        assert_eq!(
            table.block(vec![row("a", "10GiB", "x=y"), row("磁盘", "1", "")]),
            "NAME   SIZE  LABELS\na     10GiB  x=y\n磁盘      1\n"
        );
        assert_eq!(table.block(vec![row("longer", "", "z")]), "longer         z\n");
    }

    #[test]
    fn colours_take_no_room() {
        let mut table = Table::new(vec![Column::left("A"), Column::left("B")], true);
        let text = table.block(vec![vec![Cell::new("ok", Style::Good), "x".into()]]);
        assert_eq!(text, "\x1b[2mA\x1b[0m   \x1b[2mB\x1b[0m\n\x1b[32mok\x1b[0m  x\n");
    }
}
