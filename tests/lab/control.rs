//! A question to a daemon's control socket without starting the command line: cheap enough to ask sixteen nodes at once.
//!
//! Owns one blocking HTTP request per call. Commands go through `farm`, as a person's do; only questions come here.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

/// A daemon that runs answers at once.
const LIMIT: Duration = Duration::from_secs(2);

/// The JSON that `GET path` answers on the socket in the folder `run`.
///
/// # Errors
/// Nobody listens, no whole answer within two seconds, another status than 200, or other JSON than expected.
pub fn get<T: DeserializeOwned>(run: &Path, path: &str) -> Result<T> {
    let socket = run.join("farmd.sock");
    let shown = || format!("GET {path} on {}", socket.display());
    let mut stream = UnixStream::connect(&socket).with_context(shown)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: farm\r\nconnection: close\r\n\r\n").with_context(shown)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(shown)?;
    body(&answer)
        .and_then(|body| Ok(serde_json::from_slice(body)?))
        .with_context(shown)
}

/// The body of a whole answer with status 200.
fn body(answer: &[u8]) -> Result<&[u8]> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.context("the answer has no end of its head")? + 4);
    let first = String::from_utf8_lossy(head.split(|b| *b == b'\r').next().unwrap_or_default()).into_owned();
    if first.split(' ').nth(1) != Some("200") {
        bail!("{first}: {}", String::from_utf8_lossy(body));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_answer_with_status_200_has_a_body() {
        assert_eq!(body(b"HTTP/1.1 200 OK\r\na: b\r\n\r\n{}").unwrap(), b"{}");
        assert!(body(b"HTTP/1.1 200 OK\r\na: b\r\n").is_err());
        assert!(
            body(b"HTTP/1.1 503 Ending\r\n\r\n{}")
                .unwrap_err()
                .to_string()
                .contains("503")
        );
    }
}
