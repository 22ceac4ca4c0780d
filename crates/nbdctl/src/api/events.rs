//! Watching an operation: server-sent events, asked for anew when they break off.

use std::io::{self, BufRead, BufReader, Read};
use std::thread;
use std::time::{Duration, Instant};

use nbd_api::{Operation, OperationState};
use serde::de::DeserializeOwned;

use super::client::Client;
use super::explain;
use super::url::Url;
use crate::failure::{Failure, UNAVAILABLE};

/// Bytes a line of a stream may have: far more than an operation takes.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// What comes of watching.
#[derive(Debug)]
pub(crate) enum News<'a> {
    /// The operation has changed; as JSON, too.
    Changed(&'a Operation, &'a str),
    /// How it is cannot be told at the moment.
    Unknown(&'a Failure),
}

/// Wait before a stream that broke off is asked for anew, ...
const RETRY_WAIT: Duration = Duration::from_secs(1);

/// ... and for how long that may fail.
const RETRIES_DEADLINE: Duration = Duration::from_secs(60);

impl Client {
    /// Shows an operation to `each` whenever it changes, until it is over. Gives how it ended.
    ///
    /// # Errors
    /// There is no such operation, or none any more; nobody tells how it is for a minute.
    pub(crate) fn watch(
        &self,
        id: &str,
        each: &mut dyn FnMut(News<'_>) -> Result<(), Failure>,
    ) -> Result<Operation, Failure> {
        let url = Url::new("/operations").then(id).then("events");
        let mut heard = Instant::now();
        let mut seen = None;
        loop {
            let failure = match self.events(&url) {
                Ok(stream) => {
                    let mut events = Events::new(stream);
                    while let Ok(Some(Event { kind, data })) = events.next() {
                        heard = Instant::now();
                        match kind.as_str() {
                            "operation" | "message" => {}
                            // The stream goes on: the server keeps looking.
                            "problem" => {
                                let failure = explain::problem(self.settings(), &read(&data)?);
                                if failure.code() != UNAVAILABLE {
                                    return Err(failure);
                                }
                                each(News::Unknown(&failure))?;
                                continue;
                            }
                            // Of a newer server.
                            _ => continue,
                        }
                        let operation: Operation = read(&data)?;
                        if seen.as_ref() != Some(&operation) {
                            each(News::Changed(&operation, &data))?;
                        }
                        if operation.state != OperationState::Running {
                            return Ok(operation);
                        }
                        seen = Some(operation);
                    }
                    let words = format!("nobody tells how {id} is; it goes on by itself");
                    Failure::new(UNAVAILABLE, words)
                }
                Err(failure) if failure.code() != UNAVAILABLE => return Err(failure),
                Err(failure) => failure,
            };
            if seen.is_none() || heard.elapsed() > RETRIES_DEADLINE {
                return Err(failure);
            }
            thread::sleep(RETRY_WAIT);
        }
    }
}

fn read<T: DeserializeOwned>(data: &str) -> Result<T, Failure> {
    serde_json::from_str(data).map_err(|error| explain::unreadable(&error))
}

/// A server-sent event.
#[derive(Debug, PartialEq, Eq)]
struct Event {
    /// `message` if it has no name.
    kind: String,
    data: String,
}

/// Server-sent events, one after the other.
struct Events<R> {
    lines: BufReader<R>,
}

impl<R: Read> Events<R> {
    fn new(stream: R) -> Self {
        Self { lines: BufReader::new(stream) }
    }

    /// The next one with data; none at the end of the stream.
    fn next(&mut self) -> io::Result<Option<Event>> {
        let (mut kind, mut data) = ("message".to_owned(), None::<String>);
        loop {
            let mut line = Vec::new();
            let count = (&mut self.lines).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
            if count == 0 {
                // What is not complete does not count.
                return Ok(None);
            }
            if line.last() != Some(&b'\n') {
                return Err(io::Error::other("a line without end"));
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if line.is_empty() {
                if let Some(data) = data {
                    return Ok(Some(Event { kind, data }));
                }
                "message".clone_into(&mut kind);
                continue;
            }
            // Comments keep the stream alive; ids of events are of no use here.
            if let Some(value) = line.strip_prefix("event:") {
                value.strip_prefix(' ').unwrap_or(value).clone_into(&mut kind);
            } else if let Some(value) = line.strip_prefix("data:") {
                let value = value.strip_prefix(' ').unwrap_or(value);
                let data = data.get_or_insert_default();
                if !data.is_empty() {
                    data.push('\n');
                }
                if (data.len() + value.len()) as u64 > LINE_BYTES_MAX {
                    return Err(io::Error::other("an event without end"));
                }
                data.push_str(value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(stream: &str) -> Vec<(String, String)> {
        let mut events = Events::new(stream.as_bytes());
        let event = |Event { kind, data }| (kind, data);
        std::iter::from_fn(|| events.next().unwrap().map(event)).collect()
    }

    fn owned<const N: usize>(events: [(&str, &str); N]) -> [(String, String); N] {
        events.map(|(kind, data)| (kind.to_owned(), data.to_owned()))
    }

    #[test]
    fn events_come_one_by_one() {
        let stream = ": hello\n\nevent: operation\ndata: {\"a\":1}\n\ndata:x\r\ndata: y\r\n\r\n";
        let events = [("operation", "{\"a\":1}"), ("message", "x\ny")];
        assert_eq!(all(stream), owned(events));
    }

    #[test]
    fn what_breaks_off_does_not_count() {
        assert_eq!(all("data: 1\n\ndata: 2\n"), owned([("message", "1")]));
        assert!(Events::new(&b"data: 2"[..]).next().is_err());
        assert_eq!(all(":\n\nevent: empty\n\n"), []);
    }

    #[test]
    fn a_line_has_an_end() {
        let endless = BufReader::new(io::repeat(b'x'));
        assert!(Events::new(endless).next().is_err());
    }
}
