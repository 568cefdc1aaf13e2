//! One line of the module log: `2026-11-21 05:31:00.123456 | origin | L | text`.
//!
//! Writing escapes whatever could forge a second line or drive a terminal; reading leaves the escapes as
//! they are, so a line can be shown as it was read.

use std::fmt::{self, Write as _};

/// Levels that exist, most severe first: critical, event, user action, script, information, debug.
pub const LEVELS: [char; 6] = ['C', 'E', 'U', 'S', 'I', 'D'];

/// One line of the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogLine {
    /// Local time, `2026-11-21 05:31:00.123456`.
    pub time: String,
    /// Who wrote it: `farmd`, `tcpcheck`, `user`…
    pub origin: String,
    /// One of [`LEVELS`].
    pub level: char,
    /// The message; escaped if it was read.
    pub text: String,
}

/// Why a text is no line of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogLineError {
    /// Fewer than four fields.
    Fields,
    /// The first field is no date and time.
    Time,
    /// The third field is none of [`LEVELS`].
    Level,
}

impl fmt::Display for LogLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fields => "four fields, `date | origin | level | text`, are expected",
            Self::Time => "a date and time such as `2026-11-21 05:31:00.123456` is expected in front",
            Self::Level => "a level, one of C E U S I D, is expected as third field",
        })
    }
}

impl std::error::Error for LogLineError {}

/// The line as it stands in the file, without its end.
impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = escape(&self.origin).replace('|', "/");
        write!(
            f,
            "{} | {} | {} | {}",
            self.time,
            origin,
            self.level,
            escape(&self.text)
        )
    }
}

/// Reads one line, with or without its end.
pub fn parse_line(line: &str) -> Result<LogLine, LogLineError> {
    let mut fields = line.trim_end_matches(['\n', '\r']).splitn(4, '|');
    let mut field = || fields.next().ok_or(LogLineError::Fields);
    let (time, origin, level, text) = (field()?.trim(), field()?.trim(), field()?.trim(), field()?);
    if !is_time(time) {
        return Err(LogLineError::Time);
    }
    let mut letters = level.chars();
    let level = letters
        .next()
        .filter(|l| LEVELS.contains(l) && letters.next().is_none());
    Ok(LogLine {
        time: time.to_owned(),
        origin: origin.to_owned(),
        level: level.ok_or(LogLineError::Level)?,
        text: text.strip_prefix(' ').unwrap_or(text).to_owned(),
    })
}

/// Replaces what could end a line or act on a terminal: control characters, and the invisible ones that
/// reorder text. Everything else stays.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                push_code(&mut out, c);
            }
            c if c.is_control() => push_code(&mut out, c),
            c => out.push(c),
        }
    }
    out
}

fn push_code(out: &mut String, c: char) {
    // Writing into a String cannot fail.
    let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
}

/// The shape of `2026-11-21 05:31:00.123456`; the calendar is not judged.
fn is_time(text: &str) -> bool {
    const SHAPE: &[u8] = b"0000-00-00 00:00:00.000000";
    text.len() == SHAPE.len()
        && text.bytes().zip(SHAPE).all(|(byte, shape)| match shape {
            b'0' => byte.is_ascii_digit(),
            mark => byte == *mark,
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(origin: &str, level: char, text: &str) -> LogLine {
        LogLine {
            time: "2026-11-21 05:31:00.123456".into(),
            origin: origin.into(),
            level,
            text: text.into(),
        }
    }

    #[test]
    fn a_line_has_the_documented_form() {
        assert_eq!(
            line("farmd", 'E', "Local state UP Ready").to_string(),
            "2026-11-21 05:31:00.123456 | farmd | E | Local state UP Ready"
        );
    }

    #[test]
    fn a_text_may_contain_the_separator() {
        let written = line("user", 'I', "a | b | c");
        assert_eq!(parse_line(&written.to_string()), Ok(written));
    }

    #[test]
    fn a_message_cannot_forge_a_line_or_drive_a_terminal() {
        let shown = line("u|x", 'I', "one\n2026 | x\r\x1b[31m\u{202e}").to_string();
        assert!(
            shown.ends_with("| u/x | I | one\\n2026 | x\\r\\u{1b}[31m\\u{202e}"),
            "{shown}"
        );
    }

    #[test]
    fn what_is_no_line_says_why() {
        assert_eq!(parse_line("hello"), Err(LogLineError::Fields));
        assert_eq!(parse_line("yesterday | a | I | b"), Err(LogLineError::Time));
        assert_eq!(
            parse_line("2026-11-21 05:31:00.123456 | a | X | b"),
            Err(LogLineError::Level)
        );
        assert_eq!(
            parse_line("2026-11-21 05:31:00.123456 | a | II | b"),
            Err(LogLineError::Level)
        );
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in "\\PC*") {
            let _ = parse_line(&text);
        }

        #[test]
        fn any_text_stays_one_line_and_is_read_back_escaped(text in any::<String>(), origin in "[a-z.]{1,12}") {
            let written = line(&origin, 'I', &text);
            let shown = written.to_string();
            prop_assert_eq!(shown.lines().count(), 1);
            let read = parse_line(&shown).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(read.text, escape(&text));
            prop_assert_eq!(read.origin, origin);
        }
    }
}
