//! Colour, bars and columns for people.
//!
//! Owns how text looks, never what it says. Widths are counted in characters; colours are added after padding, so that a
//! table is the same with and without them.

use std::io::{IsTerminal, Write};

/// Cells of a share bar.
const BAR: u32 = 16;
/// Text is laid out for at least so many columns, however narrow the terminal is.
const MIN_WIDTH: usize = 40;
/// A last column that has less room than this goes onto lines of its own.
const MIN_LAST: usize = 24;

/// How the place that text goes to wants it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Style {
    /// ANSI colours may be used.
    pub colour: bool,
    /// Block characters may be used.
    pub unicode: bool,
    /// A picture may be drawn over the last one.
    pub screen: bool,
    /// Columns of a terminal, at which text wraps; `None` where lines may be as long as they like.
    pub width: Option<usize>,
}

/// A colour with its meaning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Paint {
    /// As it is.
    Plain,
    /// Headings.
    Bold,
    /// All is well.
    Good,
    /// On its way.
    Moving,
    /// Not serving.
    Bad,
    /// Less important.
    Dim,
    /// Something a person did, or a script's output.
    Notice,
    /// A node in a picture, by its position in the cluster.
    Node(u8),
}

/// Black on a colour that its neighbours do not have.
const NODE_CODES: [&str; 12] = [
    "30;42", "30;46", "30;43", "30;45", "30;44", "30;47", "30;102", "30;106", "30;103", "30;105", "30;104", "30;101",
];

impl Style {
    /// No colour, ASCII only.
    #[cfg(test)]
    pub const PLAIN: Self = Self {
        colour: false,
        unicode: false,
        screen: false,
        width: None,
    };

    /// All that a terminal can do.
    #[cfg(test)]
    pub const RICH: Self = Self {
        colour: true,
        unicode: true,
        screen: true,
        width: None,
    };

    /// What standard output takes: colours on a terminal unless `NO_COLOR` is set, blocks in a UTF-8 locale.
    pub fn of_stdout() -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .find_map(|name| std::env::var(name).ok().filter(|v| !v.is_empty()));
        let locale = locale.unwrap_or_default().to_ascii_lowercase();
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let screen = std::io::stdout().is_terminal() && !dumb;
        let columns = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Self {
            screen,
            width: columns.filter(|_| screen).map(|columns| columns.max(MIN_WIDTH)),
            colour: screen && !set("NO_COLOR"),
            unicode: locale.contains("utf-8") || locale.contains("utf8"),
        }
    }

    /// `text` in the colour of `paint`.
    pub fn paint(self, paint: Paint, text: &str) -> String {
        let code = match paint {
            Paint::Plain => return text.to_owned(),
            Paint::Bold => "1",
            Paint::Good => "32",
            Paint::Moving => "35",
            Paint::Bad => "31",
            Paint::Dim => "2",
            Paint::Notice => "36",
            Paint::Node(node) => NODE_CODES[usize::from(node) % NODE_CODES.len()],
        };
        if self.colour && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// A bar of 16 cells: `part` of `of` filled, and `other` of `of` half filled after it.
    pub fn bar(self, part: u32, other: u32, of: u32) -> String {
        let cells = |n: u32| {
            (u64::from(n) * u64::from(BAR))
                .div_ceil(u64::from(of.max(1)))
                .min(u64::from(BAR)) as u32
        };
        // A part of everything but one bucket is not shown as everything, nor a part of one as nothing.
        let full = if part < of { cells(part).min(BAR - 1) } else { BAR };
        let half = cells(other).min(BAR - full);
        let [a, b, c] = if self.unicode {
            ["█", "▒", "░"]
        } else {
            ["#", "+", "."]
        };
        let (full, half) = (full as usize, half as usize);
        format!(
            "{}{}{}",
            a.repeat(full),
            b.repeat(half),
            c.repeat(BAR as usize - full - half)
        )
    }
}

/// One cell of a table.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    paint: Paint,
}

impl Cell {
    /// `text` in `paint`.
    pub fn new(text: impl Into<String>, paint: Paint) -> Self {
        Self {
            text: text.into(),
            paint,
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Paint::Plain)
    }
}

/// Rows whose columns line up; the last column may be as long as it likes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table that begins with `titles`.
    pub fn new<const N: usize>(titles: [&str; N]) -> Self {
        Self {
            rows: vec![titles.iter().map(|t| Cell::new(*t, Paint::Dim)).collect()],
        }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.rows.push(cells.into());
    }

    /// The table as lines that each begin with `indent`. A column that is empty in every row but the title is left out.
    pub fn render(&self, style: Style, indent: &str) -> String {
        let width = |text: &str| text.chars().count();
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = || self.rows.iter().filter_map(move |row| row.get(column));
                let used = cells().skip(1).any(|cell| !cell.text.is_empty());
                if used {
                    cells().map(|cell| width(&cell.text)).max().unwrap_or(0)
                } else {
                    0
                }
            })
            .collect();
        // The last column that is shown: what is too long for its line wraps there.
        let last = widths.iter().rposition(|column| *column > 0).unwrap_or(0);
        let before: usize = widths[..last.min(widths.len())]
            .iter()
            .filter(|w| **w > 0)
            .map(|w| w + 2)
            .sum();
        let (start, hang) = (
            width(indent) + before,
            width(indent) + widths.first().map_or(0, |w| w + 2),
        );
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::from(indent);
            let mut gap = 0;
            let mut below = Vec::new();
            for (position, (cell, column)) in row
                .iter()
                .zip(&widths)
                .enumerate()
                .filter(|(_, (_, column))| **column > 0)
            {
                let mut shown = cell.text.clone();
                if let Some(columns) = style
                    .width
                    .filter(|columns| position == last && start + width(&shown) > *columns)
                {
                    let room = columns.saturating_sub(start);
                    if number == 0 && room < MIN_LAST {
                        shown = String::new();
                    } else if room < MIN_LAST || last == 0 {
                        below = wrap(&shown, columns.saturating_sub(hang))
                            .into_iter()
                            .map(|part| (hang, part))
                            .collect();
                        shown = String::new();
                    } else {
                        let mut parts = wrap(&shown, room).into_iter();
                        shown = parts.next().unwrap_or_default();
                        below = parts.map(|part| (start, part)).collect();
                    }
                }
                if !shown.is_empty() {
                    line.extend(std::iter::repeat_n(' ', gap));
                    line.push_str(&style.paint(cell.paint, &shown));
                    gap = 0;
                }
                gap += column.saturating_sub(width(&shown)) + 2;
            }
            text.push_str(&line);
            text.push('\n');
            for (at, part) in below {
                let paint = row.get(last).map_or(Paint::Plain, |cell| cell.paint);
                text.push_str(&" ".repeat(at));
                text.push_str(&style.paint(paint, &part));
                text.push('\n');
            }
        }
        text
    }
}

/// `text` in lines of at most `width` characters, broken between words; a longer word is broken where it has to be.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let width = width.max(1);
    let mut lines = vec![String::new()];
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let mut rest: Vec<char> = word.chars().collect();
        while !rest.is_empty() {
            let line = lines.last_mut().expect("there is always a line");
            let used = line.chars().count();
            let gap = usize::from(used > 0);
            if used + gap + rest.len() <= width {
                line.extend(std::iter::repeat_n(' ', gap));
                line.extend(rest.drain(..));
            } else if used > 0 {
                lines.push(String::new());
            } else {
                line.extend(rest.drain(..width));
            }
        }
    }
    lines
}

/// `ms` as an age a person reads at a glance: `120ms`, `3.4s`, `12m`, `5h`, `3d`.
pub fn age(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0 => format!("{ms}ms"),
        1..=59 => format!("{}.{}s", s, ms % 1000 / 100),
        60..=3599 => format!("{}m{:02}s", s / 60, s % 60),
        3600..=86_399 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// Writes `text` to standard output at once.
///
/// # Errors
/// What the system says; `BrokenPipe` if the reader went away.
pub fn show(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes `value` and a line end to standard output.
///
/// # Errors
/// As [`show`].
pub fn show_json(value: &impl serde::Serialize) -> std::io::Result<()> {
    let text = serde_json::to_string(value).map_err(std::io::Error::other)?;
    show(&format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_never_full_before_all_and_never_empty_before_nothing() {
        let bar = |part, other| Style::PLAIN.bar(part, other, 4096);
        assert_eq!(bar(0, 0), "................");
        assert_eq!(bar(1, 0), "#...............");
        assert_eq!(bar(1366, 0), "######..........");
        assert_eq!(bar(2048, 2048), "########++++++++");
        assert_eq!(bar(4095, 0), "###############.");
        assert_eq!(bar(4096, 100), "################");
        assert_eq!(Style::PLAIN.bar(0, 0, 0).len(), 16);
    }

    #[test]
    fn columns_line_up_with_and_without_colour_and_empty_ones_vanish() {
        let mut table = Table::new(["A", "EMPTY", "B"]);
        table.row(["long".into(), "".into(), Cell::new("x", Paint::Bad)]);
        table.row(["".into(), "".into(), "y".into()]);
        assert_eq!(table.render(Style::PLAIN, " "), " A     B\n long  x\n       y\n");
        let coloured = table.render(Style::RICH, " ");
        assert!(coloured.contains(" long  \x1b[31mx\x1b[0m\n"), "{coloured}");
    }

    #[test]
    fn text_wraps_between_words_and_a_long_word_where_it_must() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdefghij k", 4), ["abcd", "efgh", "ij k"]);
        assert_eq!(wrap("", 4), [""]);
        assert_eq!(wrap("ä ö ü", 3), ["ä ö", "ü"]);
    }

    #[test]
    fn a_last_column_wraps_in_its_place_or_goes_below_where_there_is_none() {
        let mut table = Table::new(["NODE", "WHY"]);
        table.row(["s1".into(), "the words of a long reason that does not fit".into()]);
        table.row(["s2".into(), "short".into()]);
        let at = |columns| Style {
            width: Some(columns),
            ..Style::PLAIN
        };
        let expected = "  NODE  WHY\n  s1    the words of a long reason that\n        does not fit\n  s2    short\n";
        assert_eq!(table.render(at(40), "  "), expected);
        let mut table = Table::new(["NODE", "A WIDE COLUMN WITHOUT ANY REASON", "WHY"]);
        table.row(["s1".into(), "x".into(), "a long reason that does not fit behind".into()]);
        let expected = "  NODE  A WIDE COLUMN WITHOUT ANY REASON\n  s1    x\n        a long reason that does not fit\n        behind\n";
        assert_eq!(table.render(at(42), "  "), expected);
    }

    #[test]
    fn ages_have_two_units_at_most() {
        let shown: Vec<String> = [0, 999, 3_450, 61_000, 3_700_000, 90_000_000]
            .into_iter()
            .map(age)
            .collect();
        assert_eq!(shown, ["0ms", "999ms", "3.4s", "1m01s", "1h01m", "1d01h"]);
    }
}
