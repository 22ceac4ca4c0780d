//! What is done for every request alike: who asks and may they, the audit line, the counts.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use nbd_api::ProblemType;
use nbd_service::http::ClientAddress;
use nbd_service::trace::carried;
use serde_json::Value;
use tokio::task::JoinError;

use super::Api;
use super::problem::{Failure, Outcome};
use crate::config::HostName;
use crate::metrics;
use crate::tokens::{Identity, Role};

/// Who asks when no tokens are asked for.
const ANYBODY: &str = "anybody";

/// Longest part of a request's body that goes into its audit line, in characters.
const NOTE_CHARS_MAX: usize = 1024;

/// What a change asks for, for its audit line: put here by whoever reads the body.
#[derive(Debug, Clone, Default)]
pub(crate) struct Note(Arc<OnceLock<String>>);

impl Note {
    pub(crate) fn set(&self, body: &Value) {
        let text = body.to_string();
        let note = match text.char_indices().nth(NOTE_CHARS_MAX) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        };
        // A body is read once.
        let _ = self.0.set(note);
    }
}

/// What needs neither a token nor a `Host` that is ours: probes and scrapers come by any name, and
/// learn nothing that is of use to the page of another site.
const PROBES: [&str; 4] = ["/livez", "/readyz", "/health", "/metrics"];

/// What the path is for. What is in no list is guarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Area {
    Probe,
    /// The reference. It needs no token.
    Reference,
    Guarded,
}

impl Area {
    fn of(path: &str) -> Self {
        if PROBES.contains(&path) {
            Self::Probe
        } else if matches!(path, "/openapi.json" | "/docs") || path.starts_with("/docs/") {
            Self::Reference
        } else {
            Self::Guarded
        }
    }
}

/// What is logged and counted of a request.
#[derive(Debug)]
struct Record {
    started: Instant,
    method: Method,
    /// Path and query.
    target: String,
    route: String,
    client: String,
    who: String,
    area: Area,
    note: Note,
}

impl Record {
    fn write(&self, response: &Response) {
        let Self { method, target, client, who, .. } = self;
        let status = response.status();
        let took = self.started.elapsed();
        metrics::answered(method, &self.route, status, took);
        let code = status.as_u16();
        tracing::debug!(%client, who, %method, path = target, status = code, ?took, "answered");
        if self.area == Area::Guarded && changes(method) {
            let outcome = response.extensions().get::<Outcome>();
            let outcome = outcome.map_or("done", |outcome| outcome.0.as_str());
            let request = self.note.0.get().map_or("", String::as_str);
            tracing::info!(
                target: "audit", who, %client, %method, path = target, request, status = code,
                outcome,
            );
        }
    }
}

/// Lets a request through, or not; logs and counts it. A change goes on, and is logged, also if its
/// client does not wait for the answer.
pub(crate) async fn guard(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let uri = request.uri();
    let area = Area::of(uri.path());
    let target = uri.path_and_query().map_or_else(|| uri.path(), PathAndQuery::as_str).to_owned();
    let route = request.extensions().get::<MatchedPath>().map(|route| route.as_str().to_owned());
    let route = route.unwrap_or_else(|| "none".to_owned());
    let client = request.extensions().get::<ConnectInfo<ClientAddress>>();
    let client = client.map_or_else(|| "unknown".to_owned(), |client| client.0.to_string());
    let note = Note::default();
    request.extensions_mut().insert(note.clone());

    let who = if area == Area::Guarded { api.who(request.headers()) } else { Ok(None) };
    let admitted = match &who {
        Ok(who) => api
            .is_for_us(area, &request)
            .and_then(|()| may(&method, request.headers(), who.as_ref())),
        Err(failure) => Err(failure.clone()),
    };
    let who = match who {
        Ok(Some(identity)) => identity.name,
        Ok(None) => ANYBODY.to_owned(),
        Err(_) => "unknown".to_owned(),
    };
    let is_change = changes(&method);
    let record = Record { started, method, target, route, client, who, area, note };
    let response = match admitted {
        Ok(()) if is_change => return carry_out(&api, record, request, next).await,
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    };
    record.write(&response);
    response
}

/// Carries out a change in a task of its own, which a client that leaves does not end.
async fn carry_out(api: &Api, record: Record, request: Request, next: Next) -> Response {
    let defect = |error: JoinError| {
        // The panic has been reported where it happened.
        Failure::new(ProblemType::Internal, format!("it failed: {error}")).into_response()
    };
    let change = carried(next.run(request));
    let task = api.shutdown.spawn(async move {
        // Another one, so that a panic is logged and counted as well.
        let response = tokio::spawn(change).await.unwrap_or_else(defect);
        record.write(&response);
        response
    });
    task.await.unwrap_or_else(defect)
}

fn changes(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// Whether the request may be answered.
fn may(method: &Method, headers: &HeaderMap, who: Option<&Identity>) -> Result<(), Failure> {
    if !changes(method) {
        return Ok(());
    }
    if is_foreign(headers) {
        let detail = "a page of another site cannot change anything here";
        return Err(Failure::new(ProblemType::Forbidden, detail));
    }
    match who {
        Some(Identity { name, role: Role::Reader }) => {
            let detail = format!("the token of {name} is for reading only: use an admin's");
            Err(Failure::new(ProblemType::Forbidden, detail))
        }
        _ => Ok(()),
    }
}

/// Whether a browser sends the request for a page that is not from here. Without tokens, such a
/// page could otherwise change what its visitor reaches, and requests without a body need nobody's
/// leave.
fn is_foreign(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(origin) = headers.get(header::ORIGIN) else { return false };
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    let host = text(header::HOST);
    origin.is_none_or(|(_, authority)| host.is_none_or(|host| host != authority))
}

/// The hosts that the request names: there may be none, and there may be several.
fn hosts(request: &Request) -> impl Iterator<Item = Option<&str>> {
    let named = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().ok());
    named.chain(request.uri().authority().map(|authority| Some(authority.as_str())))
}

/// Whether no page of another site can have this host: an address names this machine whatever a
/// name server says, and so does `localhost`.
fn is_own(host: &str, allowed: &[HostName]) -> bool {
    // The port is no part of it. An IPv6 address without one ends with a bracket.
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    if bare.map_or_else(
        || name.parse::<Ipv4Addr>().is_ok(),
        |address| address.parse::<Ipv6Addr>().is_ok(),
    ) {
        return true;
    }
    name.eq_ignore_ascii_case("localhost") || allowed.iter().any(|allowed| allowed.is(name))
}

impl Api {
    /// Refuses what a browser may have been led to send here by a page of another site whose name
    /// was made to point here. Such a page has no token: with tokens, names do not matter.
    fn is_for_us(&self, area: Area, request: &Request) -> Result<(), Failure> {
        if self.tokens.is_some() || area == Area::Probe {
            return Ok(());
        }
        let foreign =
            |host: &Option<&str>| host.is_none_or(|host| !is_own(host, &self.allowed_hosts));
        let Some(host) = hosts(request).find(foreign) else { return Ok(()) };
        let host = host.unwrap_or("that is no text");
        let detail = format!(
            "without tokens, nothing is answered to the host name {host}: ask by address or as \
             localhost, or let the name through with --allowed-host"
        );
        Err(Failure::new(ProblemType::Forbidden, detail))
    }

    /// Who asks; `None` if nobody needs to say so.
    fn who(&self, headers: &HeaderMap) -> Result<Option<Identity>, Failure> {
        let Some(tokens) = &self.tokens else { return Ok(None) };
        let refuse = |detail: &str| Failure::new(ProblemType::Unauthorized, detail);
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Err(refuse("send a token: Authorization: Bearer TOKEN"));
        };
        let value = value.to_str().unwrap_or_default();
        let token =
            value.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let identity = token.and_then(|(_, token)| tokens.find(token.trim()));
        identity.map(Some).ok_or_else(|| refuse("the token is not known"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn pages_of_other_sites_change_nothing() {
        let host = (header::HOST, "127.0.0.1:8090");
        let own = headers(&[host.clone(), (header::ORIGIN, "http://127.0.0.1:8090")]);
        let foreign = headers(&[host.clone(), (header::ORIGIN, "http://evil.example")]);
        let opaque = headers(&[host.clone(), (header::ORIGIN, "null")]);
        assert!(may(&Method::POST, &own, None).is_ok());
        assert!(may(&Method::POST, &headers(&[host]), None).is_ok(), "not a browser");
        assert!(may(&Method::POST, &foreign, None).is_err());
        assert!(may(&Method::DELETE, &opaque, None).is_err());
        assert!(may(&Method::GET, &foreign, None).is_ok());
    }

    #[test]
    fn names_that_others_can_have_are_told_from_our_own() {
        let allowed = ["control.lan".parse().unwrap()];
        for own in [
            "127.0.0.1",
            "10.0.0.9:8090",
            "[::1]",
            "[fe80::1]:8090",
            "localhost",
            "LOCALHOST:8090",
            "control.lan:1",
            "Control.LAN",
        ] {
            assert!(is_own(own, &allowed), "{own}");
        }
        for foreign in
            ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "control"]
        {
            assert!(!is_own(foreign, &allowed), "{foreign}");
        }
    }

    #[test]
    fn what_is_in_no_list_is_guarded() {
        assert_eq!(Area::of("/health"), Area::Probe);
        assert_eq!(Area::of("/docs/swagger-ui.css"), Area::Reference);
        for path in ["/", "/api/v1/volumes", "/healthy", "/docsx", "/metrics/", "/new"] {
            assert_eq!(Area::of(path), Area::Guarded, "{path}");
        }
    }

    #[test]
    fn readers_read() {
        let reader = Identity { name: "r".to_owned(), role: Role::Reader };
        let admin = Identity { role: Role::Admin, ..reader.clone() };
        assert!(may(&Method::GET, &HeaderMap::new(), Some(&reader)).is_ok());
        for change in [Method::POST, Method::PATCH, Method::DELETE, Method::PUT] {
            assert!(may(&change, &HeaderMap::new(), Some(&reader)).is_err(), "{change}");
            assert!(may(&change, &HeaderMap::new(), Some(&admin)).is_ok(), "{change}");
        }
    }

    #[test]
    fn a_note_is_bounded() {
        let note = Note::default();
        note.set(&Value::String("é".repeat(5000)));
        assert_eq!(note.0.get().unwrap().chars().count(), NOTE_CHARS_MAX + 3);
    }
}
