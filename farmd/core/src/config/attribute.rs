//! Attributes of one start tag, with their places and their references resolved.
//!
//! Only the five references every XML reader knows and numeric ones are resolved; nothing is expanded twice.
//! Called by [`super::xml`].

use std::collections::BTreeMap;

use quick_xml::escape::{EscapeError, unescape};
use quick_xml::events::BytesStart;
use quick_xml::events::attributes::AttrError;

use super::report::{Report, Span, Wrong, quote};
use super::xml::{Attr, MAX_NAME, is_xml_char};

/// Most attributes of one element.
const MAX_ATTRS: usize = 64;
/// What a reference may be.
const REFERENCES: &str = "`&amp;` (which is `&` itself), `&lt;`, `&gt;`, `&quot;`, `&apos;` or `&#n;` is expected";

/// The attributes of `tag`, whose name starts at byte `base`. What is wrong is reported and left out, the rest kept;
/// the second value is true if what was left out cannot be told by its name.
pub(super) fn parse(report: &mut Report<'_>, tag: &BytesStart<'_>, base: usize, path: &str) -> (Vec<Attr>, bool) {
    let source: &str = tag;
    let within = |part: &str| {
        // Keys and values are slices of the tag, so their distance from its start is their place.
        let start = base + (part.as_ptr() as usize).saturating_sub(source.as_ptr() as usize);
        let end = start + part.len();
        Span { start, end }
    };
    let (mut attrs, mut damaged) = (Vec::<Attr>::new(), false);
    let mut lines: BTreeMap<String, u32> = BTreeMap::new();
    for (count, item) in tag.attributes().with_checks(false).enumerate() {
        if count == MAX_ATTRS {
            let span = Span { start: base, end: base };
            report.error(
                span,
                path,
                Wrong::new(format!("the element has more than {MAX_ATTRS} attributes")),
            );
            break;
        }
        let attr = match item {
            Ok(attr) => attr,
            Err(error) => {
                let (at, wrong) = syntax(&error);
                let start = base + at.min(source.len());
                report.error(Span { start, end: start }, path, wrong);
                damaged = true;
                continue;
            }
        };
        let name: &str = attr.key.0;
        let raw: &str = &attr.value;
        let (name_span, value_span) = (within(name), within(raw));
        if name.len() > MAX_NAME {
            let wrong = Wrong::new(format!("the name of an attribute is longer than {MAX_NAME} bytes"));
            report.error(name_span, path, wrong);
            continue;
        }
        let attr_path = format!("{path}/@{name}");
        let before = name_span
            .start
            .checked_sub(base + 1)
            .and_then(|at| source.as_bytes().get(at));
        if before.is_some_and(|byte| !byte.is_ascii_whitespace()) {
            report.error(
                name_span,
                &attr_path,
                Wrong::new(format!("white space is expected before {}", quote(name))),
            );
        }
        if let Some(first) = lines.get(name) {
            let wrong = Wrong::new(format!("the attribute {} is given twice", quote(name)));
            report.error(
                name_span,
                &attr_path,
                wrong.hint(format!("the first one is at line {first}")),
            );
            continue;
        }
        lines.insert(name.to_owned(), report.line(name_span));
        let (value, reported) = match value(raw) {
            Ok(value) => (value, false),
            Err((at, wrong)) => {
                let start = value_span.start + at;
                report.error(
                    Span {
                        start,
                        end: value_span.end,
                    },
                    &attr_path,
                    wrong,
                );
                (String::new(), true)
            }
        };
        attrs.push(Attr {
            name: name.to_owned(),
            name_span,
            value,
            value_span,
            origins: Vec::new(),
            reported,
        });
    }
    (attrs, damaged)
}

/// The value behind `raw`: white space made blanks (XML 1.0, section 3.3.3), references resolved.
fn value(raw: &str) -> Result<String, (usize, Wrong)> {
    if let Some(at) = raw.find('<') {
        let wrong = Wrong::new("`<` in an attribute value");
        return Err((
            at,
            wrong.hint("is a closing quote missing before it? The character itself is written `&lt;`"),
        ));
    }
    // One byte for one byte, so that places in the error stay true.
    let blanks = raw.replace(['\t', '\n', '\r'], " ");
    let value = unescape(&blanks).map_err(|error| {
        let at = match &error {
            EscapeError::UnrecognizedEntity(range, _) => range.start.saturating_sub(1),
            EscapeError::UnterminatedEntity(range) => range.start,
            _ => raw.find('&').unwrap_or(0),
        };
        let rest = raw.get(at..).unwrap_or("");
        let shown = rest.split_inclusive(';').next().unwrap_or("");
        (at, unknown_reference(shown))
    })?;
    match value.chars().find(|&c| !is_xml_char(c)) {
        Some(c) => Err((
            0,
            Wrong::new(format!("the character U+{:04X} is not allowed in XML", u32::from(c))),
        )),
        None => Ok(value.into_owned()),
    }
}

/// Whether `&name;` in running text is one of the references that are resolved.
pub(super) fn reference(name: &str) -> Result<(), Wrong> {
    let written = format!("&{name};");
    match unescape(&written) {
        Ok(_) => Ok(()),
        Err(_) => Err(unknown_reference(&written)),
    }
}

fn unknown_reference(written: &str) -> Wrong {
    Wrong::new(format!("unknown entity {}", quote(written))).hint(REFERENCES)
}

/// Place within the tag and meaning of a syntax error.
fn syntax(error: &AttrError) -> (usize, Wrong) {
    match *error {
        AttrError::ExpectedEq(at) => (
            at,
            Wrong::new("`=` and a value in quotes are expected after an attribute's name"),
        ),
        AttrError::ExpectedValue(at) => (at, Wrong::new("a value in quotes is expected after `=`")),
        AttrError::UnquotedValue(at) => (at, Wrong::new("an attribute's value must stand in quotes")),
        AttrError::ExpectedQuote(at, quote) => (
            at,
            Wrong::new(format!(
                "the closing quote {} of an attribute's value is missing",
                char::from(quote)
            )),
        ),
        AttrError::Duplicated(at, _) => (at, Wrong::new("an attribute is given twice")),
    }
}
