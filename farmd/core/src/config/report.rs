//! The source text with its places, and the findings collected over it.
//!
//! Owns byte offset to line and column, and the rule that a file with one error gives no configuration.
//! It knows nothing of XML. Every parser of this folder writes into one [`Report`].

use super::diag::{Diagnostic, Severity};

/// Errors kept, and warnings kept, of one file; the rest is counted.
const MAX_FOUND: usize = 200;

/// Bytes `start..end` of the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub start: usize,
    pub end: usize,
}

/// The text of one file, without a byte order mark.
pub(super) struct Source<'s> {
    pub file: &'s str,
    pub text: &'s str,
    line_starts: Vec<usize>,
}

impl<'s> Source<'s> {
    pub fn new(file: &'s str, text: &'s str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        Self {
            file,
            text,
            line_starts,
        }
    }

    /// Line of `offset`, from 1.
    pub fn line(&self, offset: usize) -> u32 {
        let line = self.line_starts.partition_point(|&start| start <= offset);
        u32::try_from(line).unwrap_or(u32::MAX)
    }

    /// Line and column of `offset`, both from 1.
    fn place(&self, offset: usize) -> (u32, u32) {
        let line = self.line(offset);
        let start = self.line_starts.get(line as usize - 1).copied().unwrap_or(0);
        let before = self.text.get(start..offset).unwrap_or("");
        let column = before.chars().count() + 1;
        (line, u32::try_from(column).unwrap_or(u32::MAX))
    }
}

/// What is wrong with a value, before its place is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Wrong {
    pub message: String,
    pub hint: Option<String>,
}

impl Wrong {
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
        }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// The findings so far.
pub(super) struct Report<'s> {
    pub source: &'s Source<'s>,
    found: Vec<Diagnostic>,
    errors: usize,
    warnings: usize,
}

impl<'s> Report<'s> {
    pub fn new(source: &'s Source<'s>) -> Self {
        Self {
            source,
            found: Vec::new(),
            errors: 0,
            warnings: 0,
        }
    }

    pub fn error(&mut self, span: Span, path: &str, wrong: Wrong) {
        self.errors += 1;
        if self.errors <= MAX_FOUND {
            self.push(Severity::Error, span, path, wrong);
        }
    }

    pub fn warning(&mut self, span: Span, path: &str, wrong: Wrong) {
        self.warnings += 1;
        if self.warnings <= MAX_FOUND {
            self.push(Severity::Warning, span, path, wrong);
        }
    }

    pub fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// Line of `offset`, for messages that name another place.
    pub fn line(&self, span: Span) -> u32 {
        self.source.line(span.start)
    }

    fn push(&mut self, severity: Severity, span: Span, path: &str, wrong: Wrong) {
        let (line, col) = self.source.place(span.start);
        self.found.push(Diagnostic {
            severity,
            file: self.source.file.to_owned(),
            line,
            col,
            path: path.to_owned(),
            message: wrong.message,
            hint: wrong.hint,
        });
    }

    /// All findings by place, and a last one that counts what was left out.
    pub fn finish(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|d| (d.line, d.col));
        let end = Span {
            start: self.source.text.len(),
            end: self.source.text.len(),
        };
        for (severity, count) in [(Severity::Error, self.errors), (Severity::Warning, self.warnings)] {
            if let Some(more) = count.checked_sub(MAX_FOUND).filter(|&more| more > 0) {
                let message = format!("{more} more {severity}s of this file are not shown");
                self.push(severity, end, "", Wrong::new(message));
            }
        }
        self.found
    }

    /// The configuration with its warnings, or everything found if there is an error.
    pub fn result<T>(mut self, made: Option<T>) -> Result<(T, Vec<Diagnostic>), Vec<Diagnostic>> {
        match made {
            Some(made) if !self.has_errors() => Ok((made, self.finish())),
            Some(_) => Err(self.finish()),
            None => {
                if !self.has_errors() {
                    let start = Span { start: 0, end: 0 };
                    self.error(start, "", Wrong::new("the file is incomplete"));
                }
                Err(self.finish())
            }
        }
    }
}

/// `text` as it may stand in a message: in backquotes, control characters escaped, cut when long.
pub(super) fn quote(text: &str) -> String {
    const LONGEST: usize = 60;
    if text.is_empty() {
        return "the empty text".to_owned();
    }
    let mut shown: String = text.chars().take(LONGEST).flat_map(printable).collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

fn printable(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    let plain = escaped.is_none().then_some(c);
    escaped.into_iter().flatten().chain(plain)
}

/// `a`, `b` or `c`, for hints.
pub(super) fn one_of<'w>(words: impl IntoIterator<Item = &'w str>) -> String {
    let words: Vec<String> = words.into_iter().map(quote).collect();
    match words.split_last() {
        None => "nothing".to_owned(),
        Some((only, [])) => only.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
    }
}
