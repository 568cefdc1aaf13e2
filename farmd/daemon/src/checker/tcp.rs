//! The TCP probe: connects and closes at once.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

/// Why a probe failed.
#[derive(Debug)]
pub(super) enum ProbeError {
    /// No answer within the time-out.
    TimedOut(SocketAddr, Duration),
    /// The system refused it or the peer did.
    Io(SocketAddr, io::Error),
    /// The connection met itself: with nobody listening on a port of the ephemeral range, the kernel may choose that very
    /// port as the source, and TCP's simultaneous open then succeeds.
    Itself(SocketAddr),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut(to, limit) => write!(f, "{to} does not answer within {} ms", limit.as_millis()),
            Self::Io(to, e) if e.kind() == io::ErrorKind::ConnectionRefused => write!(f, "{to} refuses the connection"),
            Self::Io(to, e) => write!(f, "{to}: {e}"),
            Self::Itself(to) => write!(f, "{to} refuses the connection: nobody listens"),
        }
    }
}

impl std::error::Error for ProbeError {}

/// Connects to `to` within `limit`. Answers with what to show for a success.
pub(super) async fn probe(to: SocketAddr, limit: Duration) -> Result<String, ProbeError> {
    let stream = match timeout(limit, TcpStream::connect(to)).await {
        Err(_) => return Err(ProbeError::TimedOut(to, limit)),
        Ok(Err(e)) => return Err(ProbeError::Io(to, e)),
        Ok(Ok(stream)) => stream,
    };
    judge(to, &stream)
}

/// Whether somebody else is at the other end.
pub(super) fn judge(to: SocketAddr, stream: &TcpStream) -> Result<String, ProbeError> {
    match stream.local_addr() {
        Ok(local) if local == to => Err(ProbeError::Itself(to)),
        Ok(_) => Ok(format!("{to} accepts connections")),
        Err(e) => Err(ProbeError::Io(to, e)),
    }
}
