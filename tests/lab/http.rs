//! Just enough of HTTP/1.1 to ask a server one thing and to know exactly how it went.
//!
//! Owns a request on one connection and the classification of its failure. Never retries, follows or reuses: callers
//! decide, because what they measure is the single attempt.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// How an attempt failed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Failure {
    /// No connection within the limit.
    ConnectTimeout,
    /// Connected, but no whole answer within the limit.
    AnswerTimeout,
    /// The connection was refused.
    Refused,
    /// The connection was reset.
    Reset,
    /// The server closed before its answer was whole.
    Closed,
    /// The answer is not what a server of the farm says.
    BadAnswer(String),
    /// Any other error of the operating system.
    Io(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ConnectTimeout => f.write_str("no connection in time"),
            Self::AnswerTimeout => f.write_str("no answer in time"),
            Self::Refused => f.write_str("refused"),
            Self::Reset => f.write_str("reset"),
            Self::Closed => f.write_str("closed before the answer"),
            Self::BadAnswer(text) => write!(f, "unexpected answer {text:?}"),
            Self::Io(text) => f.write_str(text),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => {
                Self::Reset
            }
            io::ErrorKind::TimedOut => Self::ConnectTimeout,
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error.to_string()),
        }
    }
}

/// One connection to a server.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    pending: Vec<u8>,
}

impl Connection {
    /// Connects from `source` (any port) to `to` within `limit`.
    pub async fn open(source: impl Into<IpAddr>, to: impl Into<SocketAddr>, limit: Duration) -> Result<Self, Failure> {
        Self::open_from(SocketAddr::new(source.into(), 0), to, limit).await
    }

    /// As [`Self::open`], from this very port.
    pub async fn open_from(
        source: impl Into<SocketAddr>,
        to: impl Into<SocketAddr>,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let (source, to) = (source.into(), to.into());
        let socket = match to {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(source)?;
        let stream = timeout(limit, socket.connect(to))
            .await
            .map_err(|_| Failure::ConnectTimeout)??;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            pending: Vec::new(),
        })
    }

    /// The client's address and port.
    pub fn local(&self) -> Option<SocketAddr> {
        self.stream.local_addr().ok()
    }

    /// Ends the connection with a reset, as a client does that is killed.
    pub fn reset(self) -> Result<(), Failure> {
        self.stream.set_zero_linger()?;
        Ok(())
    }

    /// Asks for `path` and returns the body of the answer; the connection stays open for the next request.
    pub async fn get(&mut self, path: &str, limit: Duration) -> Result<String, Failure> {
        timeout(limit, self.exchange(path, "keep-alive"))
            .await
            .map_err(|_| Failure::AnswerTimeout)?
    }

    /// Asks for `path`, reads the answer and waits for the server to close, so that no reset of ours is ever on the wire.
    pub async fn get_last(mut self, path: &str, limit: Duration) -> Result<String, Failure> {
        let whole = async {
            let body = self.exchange(path, "close").await?;
            let mut rest = [0; 64];
            match self.stream.read(&mut rest).await? {
                0 => Ok(body),
                more => Err(Failure::BadAnswer(format!("{more} bytes after the answer"))),
            }
        };
        timeout(limit, whole).await.map_err(|_| Failure::AnswerTimeout)?
    }

    async fn exchange(&mut self, path: &str, connection: &str) -> Result<String, Failure> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: farm\r\nConnection: {connection}\r\n\r\n");
        self.stream.write_all(request.as_bytes()).await?;
        loop {
            if let Some((body, used)) = parse_answer(&self.pending)? {
                self.pending.drain(..used);
                return Ok(body);
            }
            if self.stream.read_buf(&mut self.pending).await? == 0 {
                return Err(Failure::Closed);
            }
        }
    }
}

/// The body and the length of the whole answer at the start of `bytes`, or `None` if more bytes are needed.
fn parse_answer(bytes: &[u8]) -> Result<Option<(String, usize)>, Failure> {
    let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else {
        return if bytes.len() > 65_536 {
            Err(Failure::BadAnswer("endless header".into()))
        } else {
            Ok(None)
        };
    };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    if first.split(' ').nth(1) != Some("200") {
        return Err(Failure::BadAnswer(first.to_owned()));
    }
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse::<usize>().ok())
        .ok_or_else(|| Failure::BadAnswer("no Content-Length".into()))?;
    let whole = end + 4 + length;
    Ok((bytes.len() >= whole).then(|| (String::from_utf8_lossy(&bytes[end + 4..whole]).into_owned(), whole)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_only_with_its_last_byte() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nnode1\nHTTP/1.1";
        assert_eq!(parse_answer(&answer[..answer.len() - 9]), Ok(None));
        assert_eq!(parse_answer(answer), Ok(Some(("node1\n".to_owned(), answer.len() - 8))));
    }

    #[test]
    fn an_error_page_is_no_answer() {
        let answer = parse_answer(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(answer, Err(Failure::BadAnswer("HTTP/1.1 502 Bad Gateway".into())));
    }
}
