//! HTTP GET, as much of it as probes and metrics need.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// How long a whole answer may take; above every deadline of the servers under test.
const TIMEOUT: Duration = Duration::from_secs(30);

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status code, as in 200.
    pub status: u16,
    /// The body.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is not.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{self:?} is not JSON: {e}"))
    }
}

/// Gets `path` from the server at `address`, over a connection of its own.
///
/// # Errors
/// No connection, no answer within 30 s, or one that is not HTTP.
pub fn get(address: impl ToSocketAddrs, path: &str) -> io::Result<Response> {
    get_within(TIMEOUT, address, path)
}

/// As [`get`], for a server that may stand still: it has `timeout` for each piece of its answer.
///
/// # Errors
/// As [`get`].
pub fn get_within(
    timeout: Duration,
    address: impl ToSocketAddrs,
    path: &str,
) -> io::Result<Response> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    // Version 1.0 knows no chunks: the body ends where the connection does.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: test\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, answer))
}

fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some(Response { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_parse() {
        let answer = "HTTP/1.0 503 Service Unavailable\r\ncontent-length: 9\r\n\r\n{\"a\": 1}\n";
        let response = parse(answer).unwrap();
        assert_eq!(response.status, 503);
        assert_eq!(response.json()["a"], 1);
        assert_eq!(parse("NBDMAGIC"), None);
    }
}
