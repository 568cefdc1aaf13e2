//! What is wrong in a configuration file, and where.
//!
//! Owns the shape of a message and its drawing with the source line and a caret. It never decides what is
//! wrong; the parsers of this folder do. The daemon, the command line and the tests print it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Widest piece of a source line that [`Diagnostic::render`] shows, in characters.
const SHOWN_COLUMNS: usize = 140;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The file is refused.
    Error,
    /// The file is accepted; something in it does not do what it says.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One finding in one file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// The file as the caller named it.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1; a tab counts as one.
    pub col: u32,
    /// Elements from the root, `[n]` (from 1) where siblings share a name, and `/@name` for an attribute:
    /// `safe/service/vip/interface_list/interface[2]/@name`. Empty before the root element.
    pub path: String,
    /// What is wrong: lower case, no full stop.
    pub message: String,
    /// What was expected, or the nearest valid word.
    pub hint: Option<String>,
}

impl Diagnostic {
    /// True if the file is refused because of this.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// The finding with its place, the source line, a caret under the place and the hint; several lines,
    /// without a line end after the last. `source` is the text that was parsed; where it has no such line,
    /// the drawing is left out.
    pub fn render(&self, source: &str) -> String {
        let mut out = self.headline();
        if let Some(line) = self.source_line(source) {
            let number = self.line.to_string();
            let column = (self.col as usize).saturating_sub(1);
            let (shown, offset) = window(line, column);
            let pad: String = shown
                .chars()
                .take(offset)
                .map(|c| if c == '\t' { '\t' } else { ' ' })
                .collect();
            let carets = "^".repeat(underlined(&shown, offset));
            let margin = " ".repeat(number.len());
            out.push_str(&format!("\n {number} | {shown}\n {margin} | {pad}{carets}"));
        }
        if !self.path.is_empty() {
            out.push_str(&format!("\n   at: {}", self.path));
        }
        if let Some(hint) = &self.hint {
            out.push_str(&format!("\n   hint: {hint}"));
        }
        out
    }

    fn headline(&self) -> String {
        format!(
            "{}:{}:{}: {}: {}",
            self.file, self.line, self.col, self.severity, self.message
        )
    }

    fn source_line<'s>(&self, source: &'s str) -> Option<&'s str> {
        let source = source.strip_prefix('\u{feff}').unwrap_or(source);
        let line = source.split('\n').nth((self.line as usize).checked_sub(1)?)?;
        Some(line.trim_end_matches('\r'))
    }
}

/// One line: `file:line:col: error: message (hint)`.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.headline())?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// All findings of one file, in the order of their places.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Diagnostics(pub Vec<Diagnostic>);

impl Diagnostics {
    /// Number of errors.
    pub fn errors(&self) -> usize {
        self.0.iter().filter(|d| d.is_error()).count()
    }

    /// Number of warnings.
    pub fn warnings(&self) -> usize {
        self.0.len() - self.errors()
    }

    /// Every finding drawn as [`Diagnostic::render`] does, with an empty line between two; each ends its line.
    pub fn render(&self, source: &str) -> String {
        let drawn: Vec<String> = self.0.iter().map(|d| d.render(source) + "\n").collect();
        drawn.join("\n")
    }
}

impl From<Vec<Diagnostic>> for Diagnostics {
    fn from(found: Vec<Diagnostic>) -> Self {
        Self(found)
    }
}

/// One finding per line.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, diagnostic) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            diagnostic.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// The part of `line` around `column` that fits, and where `column` is in it.
fn window(line: &str, column: usize) -> (String, usize) {
    let length = line.chars().count();
    if length <= SHOWN_COLUMNS {
        return (line.to_owned(), column.min(length));
    }
    let start = column.saturating_sub(SHOWN_COLUMNS / 3).min(length - SHOWN_COLUMNS);
    let shown = line.chars().skip(start).take(SHOWN_COLUMNS).collect();
    (shown, column.saturating_sub(start).min(SHOWN_COLUMNS))
}

/// Number of carets: the whole attribute value, tag name or word that starts at `offset`.
fn underlined(shown: &str, offset: usize) -> usize {
    let before = shown.chars().take(offset).last();
    let rest = || shown.chars().skip(offset);
    let width = match (before, rest().next()) {
        (Some(quote @ ('"' | '\'')), _) => rest().take_while(|&c| c != quote).count(),
        (_, Some('<')) => {
            let mark = 1 + usize::from(rest().nth(1) == Some('/'));
            mark + rest().skip(mark).take_while(|&c| is_word(c)).count()
        }
        _ => rest().take_while(|&c| is_word(c)).count(),
    };
    width.max(1)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':')
}

/// The word of `candidates` that `word` was probably meant to be: equal but for case, or at a small edit distance
/// (one edit for each three letters, at most three). The first one wins a tie.
pub fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    const LONGEST: usize = 64;
    let letters: Vec<char> = word.chars().take(LONGEST + 1).collect();
    if letters.is_empty() || letters.len() > LONGEST {
        return None;
    }
    let allowed = (letters.len() / 3).clamp(1, 3);
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let distance = if candidate.eq_ignore_ascii_case(word) {
            0
        } else {
            let other: Vec<char> = candidate.chars().collect();
            // A word that shares no letter is no guess, however short both are.
            let edits = edit_distance(&letters, &other);
            if edits >= letters.len().max(other.len()) {
                continue;
            }
            edits
        };
        if distance <= allowed && best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Insertions, removals, replacements and swaps of neighbours that turn `a` into `b`.
fn edit_distance(a: &[char], b: &[char]) -> usize {
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, &y) in b.iter().enumerate() {
            let replaced = last[j] + usize::from(x != y);
            let mut least = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && x == b[j - 1] && a[i - 1] == y {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(line: u32, col: u32) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            file: "f.xml".into(),
            line,
            col,
            path: "a/@b".into(),
            message: "bad".into(),
            hint: Some("good is expected".into()),
        }
    }

    #[test]
    fn a_caret_underlines_the_whole_value() {
        let drawn = sample(2, 8).render("<a>\n\t<b c=\"wrong\"/>\n</a>");
        assert_eq!(
            drawn,
            "f.xml:2:8: error: bad\n 2 | \t<b c=\"wrong\"/>\n   | \t      ^^^^^\n   at: a/@b\n   hint: good is expected"
        );
    }

    #[test]
    fn a_place_outside_the_text_is_still_printed() {
        for (line, col) in [(0, 0), (1, 400), (99, 1)] {
            assert!(sample(line, col).render("<a/>").starts_with("f.xml:"));
        }
    }

    #[test]
    fn a_long_line_is_cut_around_the_caret() {
        let line = "x".repeat(1000) + "\"here\"" + &"y".repeat(1000);
        let drawn = sample(1, 1002).render(&line);
        let shown = drawn.lines().nth(1).unwrap();
        assert!(shown.chars().count() < 160, "{shown}");
        let caret = drawn.lines().nth(2).unwrap();
        let at = caret.find('^').unwrap();
        assert_eq!(&shown[at..at + 4], "here");
        assert!(caret.ends_with("^^^^") && !caret.ends_with("^^^^^"), "{caret}");
    }

    #[test]
    fn the_nearest_word_is_found_within_a_third_of_the_letters() {
        let words = ["name", "addr", "port", "interval"];
        assert_eq!(nearest("nmae", words), Some("name"));
        assert_eq!(nearest("Port", words), Some("port"));
        assert_eq!(nearest("intervall", words), Some("interval"));
        assert_eq!(nearest("colour", words), None);
        assert_eq!(nearest("", words), None);
        assert_eq!(nearest(&"n".repeat(10_000), words), None);
    }

    #[test]
    fn edits_are_counted() {
        let distance = |a: &str, b: &str| edit_distance(&a.chars().collect::<Vec<_>>(), &b.chars().collect::<Vec<_>>());
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
