//! `/sessions`: the list, in pages.
//!
//! `GET /sessions?after=NUMBER&limit=COUNT` answers the sessions whose connections are numbered
//! above `after` (default 0), at most `limit` of them (default and most [`PAGE_MAX`]):
//!
//! ```json
//! {"total": 2000,
//!  "sessions": [{"connection": 7, "client": "10.0.0.9:50312", "export": "vol1", "shard": 0,
//!                "volume": 3, "session": "00000000000000000000000000000abc", "mode": "replay",
//!                "age_seconds": 81.2,
//!                "backend": {"node": "nbd-1-2", "address": "10.0.0.2:7400"},
//!                "backend_seconds": 79.9,
//!                "received_bytes": 4096, "sent_bytes": 160, "requests_pending": 0}],
//!  "next": 7}
//! ```
//!
//! `next` is what to give as `after` for the next page, and null at the end. `backend` is null
//! while the session waits for a leader; `backend_seconds` says for how long it has been as it is.
//! Bytes are those of the connection behind its handshake. `session` and `requests_pending` are
//! null where bytes are moved within the kernel: the session is the replica's own.

use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::{Carried, Record, Sessions};

/// Sessions in one page, at most: about 400 KiB, and a millisecond to make.
const PAGE_MAX: usize = 1000;

impl Sessions {
    /// Answers `/sessions`.
    pub fn router(&self) -> Router {
        Router::new().route("/sessions", get(list)).with_state(self.clone())
    }
}

#[derive(Debug, Serialize)]
struct Report {
    total: usize,
    sessions: Vec<Entry>,
    next: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Entry {
    connection: u64,
    client: String,
    export: String,
    shard: u32,
    volume: u64,
    /// 32 hexadecimal digits.
    session: Option<String>,
    mode: &'static str,
    age_seconds: f64,
    backend: Option<BackendEntry>,
    backend_seconds: f64,
    received_bytes: u64,
    sent_bytes: u64,
    requests_pending: Option<usize>,
}

#[derive(Debug, Serialize)]
struct BackendEntry {
    node: String,
    address: String,
}

/// Which page is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Page {
    after: u64,
    limit: usize,
}

async fn list(
    State(sessions): State<Sessions>,
    RawQuery(query): RawQuery,
) -> Result<Json<Report>, (StatusCode, &'static str)> {
    let bad = "use /sessions?after=NUMBER&limit=COUNT\n";
    let page = Page::parse(query.as_deref().unwrap_or_default());
    let page = page.ok_or((StatusCode::BAD_REQUEST, bad))?;
    Ok(Json(report(&sessions, &page, Instant::now())))
}

fn report(sessions: &Sessions, page: &Page, now: Instant) -> Report {
    // One more tells whether there is a next page.
    let (mut records, total) = sessions.page(page.after, page.limit + 1);
    let more = records.len() > page.limit;
    records.truncate(page.limit);
    let next = records.last().filter(|_| more).map(|record| record.about.connection);
    let sessions = records.iter().map(|record| Entry::of(record, now)).collect();
    Report { total, sessions, next }
}

impl Page {
    /// `None`: an unknown name, or a value that is no number.
    fn parse(query: &str) -> Option<Self> {
        let mut page = Self { after: 0, limit: PAGE_MAX };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=')? {
                ("after", value) => page.after = value.parse().ok()?,
                ("limit", value) => page.limit = value.parse().ok()?,
                _ => return None,
            }
        }
        page.limit = page.limit.clamp(1, PAGE_MAX);
        Some(page)
    }
}

impl Entry {
    fn of(record: &Record, now: Instant) -> Self {
        let about = &record.about;
        let (mode, replayed) = match about.carried {
            Carried::Replay => ("replay", true),
            Carried::Splice => ("splice", false),
        };
        let pending = record.requests_pending.load(Ordering::Relaxed);
        let (backend, backend_since) = {
            let backend = record.backend.lock();
            let entry = backend
                .at
                .as_ref()
                .map(|at| BackendEntry { node: at.node.to_string(), address: at.address.clone() });
            (entry, backend.since)
        };
        let seconds = |since| now.saturating_duration_since(since).as_secs_f64();
        Self {
            connection: about.connection,
            client: about.client.to_string(),
            export: about.export.clone(),
            shard: about.shard.0,
            volume: about.volume.0,
            session: about.session.map(|session| format!("{:032x}", session.0)),
            mode,
            age_seconds: seconds(record.since),
            backend,
            backend_seconds: seconds(backend_since),
            received_bytes: record.received_bytes.load(Ordering::Relaxed),
            sent_bytes: record.sent_bytes.load(Ordering::Relaxed),
            requests_pending: replayed.then_some(pending),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::super::BackendAt;
    use super::super::tests::add;
    use super::*;

    fn page(sessions: &Sessions, query: &str) -> Value {
        let page = Page::parse(query).unwrap();
        serde_json::to_value(report(sessions, &page, Instant::now())).unwrap()
    }

    #[test]
    fn a_session_has_the_documented_form() {
        let sessions = Sessions::default();
        let mut meter = add(&sessions, 7);
        meter.tell(4096, 160, 5);
        let mut told = page(&sessions, "");
        let entry = told["sessions"][0].as_object_mut().unwrap();
        for seconds in ["age_seconds", "backend_seconds"] {
            let seconds = entry.remove(seconds).unwrap().as_f64().unwrap();
            assert!((0.0..10.0).contains(&seconds), "{seconds}");
        }
        let expected = json!({"total": 1, "next": null, "sessions": [{
            "connection": 7, "client": "10.0.0.9:4711", "export": "vol1", "shard": 2, "volume": 3,
            "session": "00000000000000000000000000000abc", "mode": "replay", "backend": null,
            "received_bytes": 4096, "sent_bytes": 160, "requests_pending": 5}]});
        assert_eq!(told, expected);
        meter.attached(Some(BackendAt { node: "n1".parse().unwrap(), address: "h:1".to_owned() }));
        let told = page(&sessions, "");
        assert_eq!(told["sessions"][0]["backend"], json!({"node": "n1", "address": "h:1"}));
    }

    #[test]
    fn a_backend_is_timed_from_its_last_change() {
        let sessions = Sessions::default();
        let meter = add(&sessions, 1);
        let at = || Some(BackendAt { node: "n1".parse().unwrap(), address: "h:1".to_owned() });
        meter.attached(at());
        let since = sessions.page(0, 1).0[0].backend.lock().since;
        std::thread::sleep(Duration::from_millis(5));
        meter.attached(at());
        assert_eq!(sessions.page(0, 1).0[0].backend.lock().since, since, "nothing has changed");
        meter.attached(None);
        assert!(sessions.page(0, 1).0[0].backend.lock().since > since);
    }

    #[test]
    fn all_pages_together_have_each_session_once() {
        let sessions = Sessions::default();
        let _meters: Vec<_> = (1..=2500).map(|number| add(&sessions, number)).collect();
        let (mut query, mut seen) = (String::new(), Vec::new());
        let mut sizes = Vec::new();
        loop {
            let page = page(&sessions, &query);
            assert_eq!(page["total"], 2500);
            let entries = page["sessions"].as_array().unwrap();
            sizes.push(entries.len());
            seen.extend(entries.iter().map(|entry| entry["connection"].as_u64().unwrap()));
            let Some(next) = page["next"].as_u64() else { break };
            query = format!("after={next}");
        }
        assert_eq!(sizes, [1000, 1000, 500]);
        assert!(seen.into_iter().eq(1..=2500));
    }

    #[test]
    fn queries_that_mean_nothing_are_refused() {
        assert_eq!(Page::parse(""), Some(Page { after: 0, limit: PAGE_MAX }));
        assert_eq!(Page::parse("limit=5&after=3"), Some(Page { after: 3, limit: 5 }));
        assert_eq!(Page::parse("limit=99999"), Some(Page { after: 0, limit: PAGE_MAX }));
        for query in ["after=x", "limit=-1", "before=2", "after"] {
            assert_eq!(Page::parse(query), None, "{query}");
        }
    }
}
