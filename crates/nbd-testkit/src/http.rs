//! HTTP, as much of it as probes, metrics and the control API need.

use std::fmt::Write as _;
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
    /// Names, in small letters, and values of the headers.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: String,
}

impl Response {
    /// The value of a header; its name is given in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

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
    request_within(timeout, address, "GET", path, &[], b"")
}

/// Sends a request of any kind to the server at `address`, over a connection of its own. The length
/// of a body that is not empty is added to the headers.
///
/// # Errors
/// As [`get`].
pub fn request(
    address: impl ToSocketAddrs,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    request_within(TIMEOUT, address, method, path, headers, body)
}

fn request_within(
    timeout: Duration,
    address: impl ToSocketAddrs,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    // Version 1.0 knows no chunks: the body ends where the connection does.
    let mut head = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\n");
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if !body.is_empty() {
        let _ = write!(head, "Content-Length: {}\r\n", body.len());
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    // A server may answer, and close, before it has read a body that it does not want.
    let sent = stream.write_all(body);
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Err(error) if answer.is_empty() => return sent.and(Err(error)),
        _ => {}
    }
    parse(&answer).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, answer))
}

fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let header = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    let headers = head.lines().skip(1).filter_map(header).collect();
    Some(Response { status, headers, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_parse() {
        let answer = "HTTP/1.0 503 Service Unavailable\r\ncontent-length: 9\r\n\r\n{\"a\": 1}\n";
        let response = parse(answer).unwrap();
        assert_eq!(response.status, 503);
        assert_eq!(response.header("content-length"), Some("9"));
        assert_eq!(response.json()["a"], 1);
        assert_eq!(parse("NBDMAGIC"), None);
    }
}
