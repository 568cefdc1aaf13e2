//! Keeping secrets out of a snapshot.
//!
//! A secret is the value of a `<var>` or `<macro>` whose name says so. The declaration is masked where it stands, and the
//! value wherever else it turns up (expanded copies, script output, logs). The text need not be valid XML: a file that the daemon
//! refuses is just what support wants to see.

use std::collections::BTreeMap;
use std::ops::Range;

/// What stands in the place of a secret.
const MASK: &str = "***";
/// Parts of a name that make its value a secret.
const TELLING: [&str; 4] = ["PASS", "SECRET", "TOKEN", "KEY"];
/// A shorter value is masked where it is declared only: it could be part of any word.
const SHORTEST: usize = 4;

/// Values that must not be seen.
#[derive(Clone, Debug, Default)]
pub struct Secrets {
    /// Longest first, so that no part of a longer one is left.
    values: Vec<String>,
}

impl Secrets {
    /// Adds one value, in each way it may be written.
    pub fn add(&mut self, value: &str) {
        let decoded = decode(value);
        let in_json = serde_json::to_string(&decoded).unwrap_or_default();
        let in_json = in_json.trim_matches('"').to_owned();
        for value in [value.to_owned(), decoded, in_json] {
            if value.len() >= SHORTEST && !self.values.contains(&value) {
                self.values.push(value);
            }
        }
        self.values.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    }

    /// Adds what `xml` declares as secret. Of `%NAME%text` the text is the secret.
    pub fn add_declared(&mut self, xml: &str) {
        for range in declarations(xml) {
            for piece in xml[range].split('%').step_by(2) {
                self.add(piece);
            }
        }
    }

    /// Adds the secret ones of `json`, an object of names and values; returns it with their values masked.
    ///
    /// # Errors
    /// If it is no such object.
    pub fn add_environment(&mut self, json: &str) -> Result<String, serde_json::Error> {
        let mut environment: BTreeMap<String, String> = serde_json::from_str(json)?;
        for (_, value) in environment.iter_mut().filter(|(name, _)| is_telling(name)) {
            self.add(value);
            *value = MASK.to_owned();
        }
        serde_json::to_string_pretty(&environment)
    }

    /// `text` with every declaration and every known value masked.
    pub fn mask(&self, text: &[u8]) -> Vec<u8> {
        let Ok(text) = std::str::from_utf8(text) else {
            return self.mask_values(text);
        };
        let mut masked = String::with_capacity(text.len());
        let mut at = 0;
        for range in declarations(text) {
            masked.push_str(&text[at..range.start]);
            masked.push_str(MASK);
            at = range.end;
        }
        masked.push_str(&text[at..]);
        self.mask_values(masked.as_bytes())
    }

    fn mask_values(&self, text: &[u8]) -> Vec<u8> {
        let mut masked = text.to_vec();
        for value in &self.values {
            let value = value.as_bytes();
            let mut rest = std::mem::take(&mut masked);
            while let Some(at) = rest.windows(value.len()).position(|window| window == value) {
                let tail = rest.split_off(at + value.len());
                masked.extend_from_slice(&rest[..at]);
                masked.extend_from_slice(MASK.as_bytes());
                rest = tail;
            }
            masked.extend_from_slice(&rest);
        }
        masked
    }
}

/// Where the values of secret `<var>` and `<macro>` elements stand, in order.
fn declarations(xml: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = xml[at..].find('<').map(|start| at + start + 1) {
        at = start;
        let length = xml[start..]
            .find(|c: char| !c.is_ascii_alphanumeric())
            .unwrap_or(xml.len() - start);
        let tag = &xml[start..start + length];
        if !tag.eq_ignore_ascii_case("var") && !tag.eq_ignore_ascii_case("macro") {
            continue;
        }
        let (attributes, end) = attributes(xml, start + length);
        let secret = attributes
            .iter()
            .any(|(name, value)| name.eq_ignore_ascii_case("name") && is_telling(&decode(&xml[value.clone()])));
        if secret {
            let values = attributes
                .into_iter()
                .filter(|(name, _)| name.eq_ignore_ascii_case("value"));
            found.extend(values.map(|(_, value)| value).filter(|value| !value.is_empty()));
        }
        at = end;
    }
    found
}

/// True if a variable of this name holds a secret.
fn is_telling(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    TELLING.iter().any(|part| name.contains(part))
}

/// The attributes from `at` to the end of the tag, and where that is. An open quote ends at the next line or tag.
fn attributes(xml: &str, mut at: usize) -> (Vec<(&str, Range<usize>)>, usize) {
    let mut found = Vec::new();
    let until = |at: usize, ends: &dyn Fn(char) -> bool| at + xml[at..].find(ends).unwrap_or(xml.len() - at);
    loop {
        at = until(at, &|c| !c.is_whitespace());
        if matches!(xml[at..].chars().next(), None | Some('>' | '<')) {
            return (found, at);
        }
        let name_end = until(at, &|c| c.is_whitespace() || matches!(c, '=' | '>' | '<' | '/'));
        let name = &xml[at..name_end];
        at = until(name_end, &|c| !c.is_whitespace());
        if !xml[at..].starts_with('=') {
            // A lone `/` or quote must not stop the walk.
            at += if name.is_empty() {
                xml[at..].chars().next().map_or(0, char::len_utf8)
            } else {
                0
            };
            continue;
        }
        at = until(at + 1, &|c| !c.is_whitespace());
        let quote = xml[at..].chars().next().filter(|c| matches!(c, '"' | '\''));
        let (start, end) = match quote {
            Some(quote) => {
                let close = until(at + 1, &|c| c == quote);
                let open = close == xml.len();
                (
                    at + 1,
                    if open {
                        until(at + 1, &|c| matches!(c, '\n' | '<'))
                    } else {
                        close
                    },
                )
            }
            None => (at, until(at, &|c| c.is_whitespace() || matches!(c, '>' | '<'))),
        };
        found.push((name, start..end));
        at = end + usize::from(quote.is_some() && xml[end..].starts_with(['"', '\'']));
    }
}

/// `text` with XML's five named entities replaced.
fn decode(text: &str) -> String {
    let named = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&apos;", "'"),
        ("&amp;", "&"),
    ];
    named.iter().fold(text.to_owned(), |text, (entity, character)| {
        text.replace(entity, character)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(xml: &str) -> String {
        String::from_utf8(Secrets::default().mask(xml.as_bytes())).unwrap()
    }

    #[test]
    fn only_secret_declarations_are_masked() {
        assert_eq!(
            masked("<macro name=\"DB_PASSWORD\" value=\"hunter2\"/><macro name=\"VIP\" value=\"198.18.0.1\"/>"),
            "<macro name=\"DB_PASSWORD\" value=\"***\"/><macro name=\"VIP\" value=\"198.18.0.1\"/>"
        );
        assert_eq!(
            masked("<var value='x > y'\n name = 'api_token' />"),
            "<var value='***'\n name = 'api_token' />"
        );
        assert_eq!(
            masked("<!-- <var name=\"KEY\" value=\"old\"/> -->"),
            "<!-- <var name=\"KEY\" value=\"***\"/> -->"
        );
        assert_eq!(
            masked("<tcp name=\"KEY\" value=\"1\"/>"),
            "<tcp name=\"KEY\" value=\"1\"/>"
        );
    }

    #[test]
    fn broken_declarations_are_masked_too() {
        assert_eq!(masked("<var name=SECRET value=hunter2>"), "<var name=SECRET value=***>");
        assert_eq!(
            masked("<var name=\"SECRET\" value=\"hunter2\n<user>"),
            "<var name=\"SECRET\" value=\"***\n<user>"
        );
        for text in [
            "<var",
            "<var name",
            "<var name=",
            "<var name=\"KEY",
            "<var / \" ' = value=\"é",
            "<macro \"\"\"=",
            "<",
            "<<var<",
        ] {
            let _ = masked(text);
        }
    }

    #[test]
    fn an_environment_keeps_its_names_and_loses_its_secrets() {
        let mut secrets = Secrets::default();
        let json = secrets
            .add_environment(r#"{"HOME":"/root","MY_TOKEN":"tok-123","KEY":"a"}"#)
            .unwrap();
        let shown: BTreeMap<String, String> = serde_json::from_str(&json).unwrap();
        let shown: Vec<(&str, &str)> = shown
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        assert_eq!(shown, [("HOME", "/root"), ("KEY", "***"), ("MY_TOKEN", "***")]);
        assert_eq!(secrets.mask(b"used tok-123"), b"used ***");
        assert!(secrets.add_environment("[1]").is_err());
    }

    #[test]
    fn a_value_is_masked_wherever_it_turns_up() {
        let mut secrets = Secrets::default();
        secrets.add_declared("<var name=\"PASS\" value=\"%PREFIX%a&amp;b&quot;c\"/><var name=\"KEY2\" value=\"abc\"/>");
        let mask = |text: &[u8]| secrets.mask(text);
        assert_eq!(mask(b"login with a&b\"c now"), b"login with *** now");
        assert_eq!(mask(b"{\"x\":\"a&b\\\"c\"}"), b"{\"x\":\"***\"}");
        assert_eq!(mask(b"\xff raw a&b\"c \xff"), b"\xff raw *** \xff");
        assert_eq!(
            mask(b"abc PREFIX"),
            b"abc PREFIX",
            "a short value or a macro's name is no secret elsewhere"
        );
    }
}
