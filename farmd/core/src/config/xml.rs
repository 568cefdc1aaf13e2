//! XML text to a tree whose every part knows its place in the text.
//!
//! A thin layer over the reader of quick-xml, the only place that uses it. It refuses what a configuration file
//! never needs and an attacker likes: entities of one's own, document type subsets, processing instructions,
//! huge, deep or wide documents. It knows no element by name. [`super::cluster`] and [`super::module`] call it.

use quick_xml::events::{BytesDecl, BytesStart, Event};
use quick_xml::{Error, Reader};

use super::attribute;
use super::diag::nearest;
use super::report::{Report, Span, Wrong, quote};

/// Largest file in bytes.
pub(super) const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting of elements; a module needs seven.
const MAX_DEPTH: usize = 32;
/// Most elements in one file.
const MAX_ELEMENTS: usize = 10_000;
/// Longest name of an element or attribute, in bytes.
pub(super) const MAX_NAME: usize = 64;

/// One element with all below it.
#[derive(Clone, Debug)]
pub(super) struct Element {
    pub name: String,
    /// From `<` to the end of the name.
    pub span: Span,
    pub attrs: Vec<Attr>,
    /// Something among the attributes was unreadable and reported, so none may be called missing.
    pub damaged: bool,
    pub children: Vec<Element>,
    /// First text that is not blank, directly in this element.
    pub text: Option<Span>,
    /// First `<![CDATA[`, directly in this element.
    pub cdata: Option<Span>,
}

/// One attribute.
#[derive(Clone, Debug)]
pub(super) struct Attr {
    pub name: String,
    pub name_span: Span,
    /// After references and macros.
    pub value: String,
    /// Between the quotes, as written.
    pub value_span: Span,
    /// Macros and environment variables the value was made of.
    pub origins: Vec<Origin>,
    /// The value is known to be wrong and was reported; nothing more can be said about it.
    pub reported: bool,
}

/// Where a part of a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// A macro and the line of its definition.
    Macro(String, u32),
    /// An environment variable.
    Environment(String),
}

/// The tree of the report's source; its root must be called `root`. `None` if the text is so broken
/// that nothing can be said about its content; the reasons are in the report.
pub(super) fn parse(report: &mut Report<'_>, root: &'static str) -> Option<Element> {
    let text = report.source.text;
    let start = Span { start: 0, end: 0 };
    if text.len() > MAX_BYTES {
        let size = Wrong::new(format!("the file has {} bytes", text.len()));
        report.error(start, "", size.hint(format!("at most {MAX_BYTES} bytes are read")));
        return None;
    }
    if let Some((at, c)) = text.char_indices().find(|&(_, c)| !is_xml_char(c)) {
        let place = Span { start: at, end: at + 1 };
        let wrong = Wrong::new(format!("the character U+{:04X} is not allowed in XML", u32::from(c)));
        report.error(place, "", wrong.hint("is this a text file in UTF-8?"));
        return None;
    }
    let mut builder = Builder {
        report,
        root_name: root,
        open: Vec::new(),
        root: None,
        elements: 0,
        doctype: false,
        broken: false,
    };
    builder.read(text);
    let (broken, tree) = (builder.broken, builder.root);
    if tree.is_none() && !broken {
        let wrong = Wrong::new(format!("there is no `<{root}>` element"));
        report.error(start, "", wrong.hint("the file has no content"));
    }
    tree.filter(|_| !broken)
}

/// True for the characters of XML 1.0, section 2.2.
pub(super) fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

/// The paths of `children` below `parent`; see [`super::diag::Diagnostic::path`].
pub(super) fn child_paths(parent: &str, children: &[Element]) -> Vec<String> {
    let mut total = std::collections::BTreeMap::<&str, usize>::new();
    for child in children {
        *total.entry(&child.name).or_default() += 1;
    }
    let mut seen = std::collections::BTreeMap::<&str, usize>::new();
    let mut paths = Vec::with_capacity(children.len());
    for Element { name, .. } in children {
        let number = seen.entry(name).or_default();
        *number += 1;
        let alone = total.get(name.as_str()).is_none_or(|&count| count == 1);
        paths.push(if alone {
            format!("{parent}/{name}")
        } else {
            format!("{parent}/{name}[{number}]")
        });
    }
    paths
}

struct Builder<'r, 's> {
    report: &'r mut Report<'s>,
    root_name: &'static str,
    open: Vec<Element>,
    root: Option<Element>,
    elements: usize,
    doctype: bool,
    broken: bool,
}

impl Builder<'_, '_> {
    fn read(&mut self, text: &str) {
        let mut reader = Reader::from_str(text);
        // End tags are matched here, where the place of the start tag is known.
        reader.config_mut().check_end_names = false;
        reader.config_mut().allow_unmatched_ends = true;
        loop {
            let start = offset(reader.buffer_position());
            let event = reader.read_event();
            let span = Span {
                start,
                end: offset(reader.buffer_position()),
            };
            match event {
                Ok(Event::Start(tag)) => {
                    if !self.start(&tag, span) {
                        return;
                    }
                }
                Ok(Event::Empty(tag)) => {
                    if !self.start(&tag, span) {
                        return;
                    }
                    self.close();
                }
                Ok(Event::End(tag)) => self.end(tag.name().as_ref(), span),
                Ok(Event::Text(content)) => {
                    let content: &str = &content;
                    if let Some(at) = content.find(|c: char| !c.is_ascii_whitespace()) {
                        let start = span.start + at;
                        self.text(Span { start, end: span.end });
                    }
                }
                Ok(Event::GeneralRef(name)) => match attribute::reference(&name) {
                    Ok(()) => self.text(span),
                    Err(wrong) => self.error(span, wrong),
                },
                Ok(Event::CData(_)) => match self.open.last_mut() {
                    Some(element) => {
                        element.cdata.get_or_insert(span);
                    }
                    None => self.damage(
                        span,
                        Wrong::new("a CDATA section is not allowed outside the root element"),
                    ),
                },
                Ok(Event::Comment(_)) => {}
                Ok(Event::Decl(decl)) => self.declaration(&decl, span),
                Ok(Event::PI(_)) => {
                    let wrong = Wrong::new("a processing instruction is not allowed");
                    self.error(
                        span,
                        wrong.hint("remove `<?…?>`; only `<?xml …?>` may stand, at the very start"),
                    );
                }
                Ok(Event::DocType(content)) => {
                    let content: &str = &content;
                    self.doctype(content, span);
                }
                Ok(Event::Eof) => break,
                Err(error) => {
                    let start = offset(reader.error_position()).min(text.len());
                    let reason = match error {
                        Error::Syntax(reason) => reason.to_string(),
                        Error::IllFormed(reason) => reason.to_string(),
                        other => other.to_string(),
                    };
                    let wrong = Wrong::new(format!("this is not well-formed XML: {reason}"));
                    self.damage(Span { start, end: span.end }, wrong);
                    return;
                }
            }
        }
        while let Some(element) = self.open.last() {
            let wrong = Wrong::new(format!("`<{}>` is never closed", element.name));
            let hint = format!("`</{}>` is expected", element.name);
            let span = element.span;
            self.damage(span, wrong.hint(hint));
            self.close();
        }
    }

    /// Opens an element; false if reading must end.
    fn start(&mut self, tag: &BytesStart<'_>, span: Span) -> bool {
        let raw_name = tag.name();
        let name: &str = raw_name.as_ref();
        let name_span = Span {
            start: span.start,
            end: span.start + 1 + name.len(),
        };
        if name.is_empty() {
            let wrong = Wrong::new("`<` is not followed by the name of an element");
            self.damage(name_span, wrong.hint("write `&lt;` for the character itself"));
        }
        if name.len() > MAX_NAME {
            self.damage(
                name_span,
                Wrong::new(format!("the name of an element is longer than {MAX_NAME} bytes")),
            );
            return false;
        }
        if self.open.is_empty() && self.root.is_some() {
            let wrong = Wrong::new(format!("a second root element, {}", quote(name)));
            self.damage(
                name_span,
                wrong.hint(format!("everything belongs into one `<{}>`", self.root_name)),
            );
        } else if self.open.is_empty() && name != self.root_name {
            let wrong = Wrong::new(format!("the root element is {}", quote(name)));
            self.damage(name_span, wrong.hint(format!("`<{}>` is expected", self.root_name)));
        }
        if self.open.len() == MAX_DEPTH {
            let wrong = Wrong::new(format!("elements are nested more than {MAX_DEPTH} deep"));
            self.damage(name_span, wrong);
            return false;
        }
        self.elements += 1;
        if self.elements > MAX_ELEMENTS {
            self.damage(
                name_span,
                Wrong::new(format!("the file has more than {MAX_ELEMENTS} elements")),
            );
            return false;
        }
        let path = self.path_to(name);
        let (attrs, damaged) = match name {
            // The attributes of `< name …>` are no attributes.
            "" => (Vec::new(), true),
            _ => attribute::parse(self.report, tag, span.start + 1, &path),
        };
        self.open.push(Element {
            name: name.to_owned(),
            span: name_span,
            attrs,
            damaged,
            children: Vec::new(),
            text: None,
            cdata: None,
        });
        true
    }

    fn end(&mut self, name: &str, span: Span) {
        match self.open.iter().rposition(|element| element.name == name) {
            Some(at) => {
                while self.open.len() > at + 1 {
                    self.unclosed(name, span);
                }
                self.close();
            }
            None => {
                let wrong = Wrong::new(format!("{} closes nothing", quote(&format!("</{name}>"))));
                match self.open.last() {
                    Some(element) => {
                        let hint = format!("`</{}>` is expected", element.name);
                        let misspelt = nearest(name, [element.name.as_str()]).is_some();
                        self.damage(span, wrong.hint(hint));
                        if misspelt {
                            self.close();
                        }
                    }
                    None => self.damage(span, wrong),
                }
            }
        }
    }

    /// Reports and closes the innermost element, which the end tag `name` of an outer one found open.
    fn unclosed(&mut self, name: &str, end: Span) {
        if let Some(element) = self.open.last() {
            let line = self.report.line(element.span);
            let wrong = Wrong::new(format!(
                "`</{name}>` comes before `<{}>` of line {line} is closed",
                element.name
            ));
            let hint = format!("`</{}>` is expected", element.name);
            self.damage(end, wrong.hint(hint));
        }
        self.close();
    }

    fn close(&mut self) {
        if let Some(element) = self.open.pop() {
            match self.open.last_mut() {
                Some(parent) => parent.children.push(element),
                None => {
                    self.root.get_or_insert(element);
                }
            }
        }
    }

    fn text(&mut self, span: Span) {
        match self.open.last_mut() {
            Some(element) => {
                element.text.get_or_insert(span);
            }
            None => self.damage(span, Wrong::new("text is not allowed outside the root element")),
        }
    }

    fn declaration(&mut self, decl: &BytesDecl<'_>, span: Span) {
        if span.start != 0 {
            self.error(
                span,
                Wrong::new("`<?xml …?>` may only stand at the very start of the file"),
            );
        }
        if !matches!(decl.version().as_deref(), Ok("1.0")) {
            self.error(
                span,
                Wrong::new("the XML version must be 1.0")
                    .hint("`<?xml version=\"1.0\" encoding=\"UTF-8\"?>` is expected"),
            );
        }
        if let Some(encoding) = decl.encoding() {
            let utf8 = encoding.is_ok_and(|name| name.eq_ignore_ascii_case("utf-8"));
            if !utf8 {
                let wrong = Wrong::new("the declared encoding is ignored, the file is read as UTF-8");
                self.report.warning(span, "", wrong.hint("write encoding=\"UTF-8\""));
            }
        }
    }

    fn doctype(&mut self, content: &str, span: Span) {
        let expected = format!("`<!DOCTYPE {}>` or none is expected", self.root_name);
        if self.doctype || self.root.is_some() || !self.open.is_empty() {
            let wrong = Wrong::new("`<!DOCTYPE>` may only stand once, before the root element");
            self.error(span, wrong.hint(expected.clone()));
        }
        self.doctype = true;
        let complaint = if content.contains('[') {
            "a document type with definitions of its own, `[…]`, is refused"
        } else if content.split_ascii_whitespace().count() > 1 {
            "a document type that refers to another file is refused"
        } else if content.trim() != self.root_name {
            "the document type does not name the root element"
        } else {
            return;
        };
        self.error(span, Wrong::new(complaint).hint(expected));
    }

    fn path_to(&self, name: &str) -> String {
        let mut path = String::new();
        for element in &self.open {
            path.push_str(&element.name);
            path.push('/');
        }
        path + name
    }

    fn error(&mut self, span: Span, wrong: Wrong) {
        let path = self.path_to("");
        self.report.error(span, path.trim_end_matches('/'), wrong);
    }

    /// An error after which the tree is not what the author meant.
    fn damage(&mut self, span: Span, wrong: Wrong) {
        self.broken = true;
        self.error(span, wrong);
    }
}

/// Positions of quick-xml are 64 bits wide; the text is at most [`MAX_BYTES`] long.
fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}
