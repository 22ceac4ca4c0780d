//! What requests say: parameters, parts of paths and bodies, checked at the edge, all mistakes of
//! a body at once.

mod fields;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use nbd_api::ProblemType;
use nbd_topology::ShardId;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub(crate) use self::fields::Fields;
use super::guard::Note;
use super::problem::Failure;

/// Parts of the path, decoded. What cannot be decoded names nothing.
#[derive(Debug)]
pub(crate) struct Segments<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Segments<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(segments)) => Ok(Self(segments)),
            Err(rejection) => Err(Failure::not_found(rejection.body_text())),
        }
    }
}

/// The shard that a part of the path names.
pub(crate) fn shard(text: &str, count: u32) -> Result<ShardId, Failure> {
    // `+1` and `01` would be other names of the same resource.
    let number = text.parse().ok().filter(|number: &u32| number.to_string() == text);
    let shard = number.filter(|number| *number < count).map(ShardId);
    let message =
        || format!("there is no shard {text:?}: they have the numbers 0 to {}", count - 1);
    shard.ok_or_else(|| Failure::not_found(message()))
}

/// The replica that a part of the path names.
pub(crate) fn replica(text: &str) -> Result<u64, Failure> {
    let number = text.parse().ok().filter(|number: &u64| number.to_string() == text);
    let number = number.filter(|number| *number != 0);
    number.ok_or_else(|| Failure::not_found(format!("there is no replica {text:?}")))
}

/// The parameters of a query. A handler says which there may be, with [`only`](Self::only).
#[derive(Debug)]
pub(crate) struct Params(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(pairs)) => Ok(Self(pairs)),
            Err(rejection) => Err(Failure::new(ProblemType::Malformed, rejection.body_text())),
        }
    }
}

impl Params {
    /// Refuses all other parameters, and each of these given twice, but for `repeatable`.
    pub(crate) fn only(&self, names: &[&str], repeatable: &[&str]) -> Result<(), Failure> {
        for (place, (name, _)) in self.0.iter().enumerate() {
            let name = name.as_str();
            if repeatable.contains(&name) {
                continue;
            }
            if !names.contains(&name) {
                let known = [names, repeatable].concat();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let detail = format!("there is no such parameter; known here: {known}");
                return Err(Failure::malformed(name, detail));
            }
            if self.0[..place].iter().any(|(other, _)| other == name) {
                return Err(Failure::malformed(name, "it is given twice"));
            }
        }
        Ok(())
    }

    /// Refuses all parameters.
    pub(crate) fn none(&self) -> Result<(), Failure> {
        self.only(&[], &[])
    }

    pub(crate) fn one(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// `true` or `false`; false if it is not given.
    pub(crate) fn flag(&self, name: &str) -> Result<bool, Failure> {
        match self.one(name) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(_) => Err(Failure::malformed(name, "it is true or false")),
        }
    }

    /// How many items a page may have.
    pub(crate) fn limit(&self) -> Result<u32, Failure> {
        use crate::limits::{PAGE_DEFAULT, PAGE_MAX};
        let Some(text) = self.one("limit") else { return Ok(PAGE_DEFAULT) };
        let limit = text.parse().ok().filter(|limit| (1..=PAGE_MAX).contains(limit));
        let detail = || format!("it is a number from 1 to {PAGE_MAX}");
        limit.ok_or_else(|| Failure::malformed("limit", detail()))
    }

    /// Where the page begins.
    pub(crate) fn cursor<P: DeserializeOwned>(&self) -> Result<Option<P>, Failure> {
        let Some(text) = self.one("cursor") else { return Ok(None) };
        let detail = "it is none that this list has given";
        let place = crate::paging::place(text);
        place.map(Some).ok_or_else(|| Failure::malformed("cursor", detail))
    }

    /// The shard that is asked for.
    pub(crate) fn shard(&self, count: u32) -> Result<Option<ShardId>, Failure> {
        let Some(text) = self.one("shard") else { return Ok(None) };
        let shard = text.parse().ok().filter(|number| *number < count).map(ShardId);
        let detail = || format!("it is a number from 0 to {}", count - 1);
        shard.map(Some).ok_or_else(|| Failure::malformed("shard", detail()))
    }
}

/// A body that is a JSON object.
#[derive(Debug)]
pub(crate) struct Body(pub(crate) Fields);

/// The same, of a request for which no body at all stands for an empty object.
#[derive(Debug)]
pub(crate) struct OptionalBody(pub(crate) Fields);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let is_json = is_json(request.headers());
        let (bytes, note) = bytes(request, state).await?;
        object(is_json, &bytes, note.as_ref()).map(Self)
    }
}

impl<S: Send + Sync> FromRequest<S> for OptionalBody {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let is_json = is_json(request.headers());
        let (bytes, note) = bytes(request, state).await?;
        if bytes.is_empty() || bytes.trim_ascii() == b"null" {
            return Ok(Self(Fields::new(Map::new())));
        }
        object(is_json, &bytes, note.as_ref()).map(Self)
    }
}

async fn bytes<S: Send + Sync>(
    request: Request,
    state: &S,
) -> Result<(Bytes, Option<Note>), Failure> {
    let note = request.extensions().get::<Note>().cloned();
    match Bytes::from_request(request, state).await {
        Ok(bytes) => Ok((bytes, note)),
        Err(rejection) => Err(unread(&rejection)),
    }
}

/// Why a body could not be read.
fn unread(rejection: &BytesRejection) -> Failure {
    if rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
        let detail = format!("a body has at most {} bytes", crate::limits::BODY_BYTES_MAX);
        Failure::new(ProblemType::TooLarge, detail)
    } else {
        Failure::new(ProblemType::Malformed, rejection.body_text())
    }
}

/// Whether the body is said to be JSON: `application/json`, or something that is JSON besides.
fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.and_then(|value| value.split(';').next()).unwrap_or_default();
    let kind = kind.trim().to_ascii_lowercase();
    kind == "application/json" || kind == "application/merge-patch+json"
}

fn object(is_json: bool, bytes: &[u8], note: Option<&Note>) -> Result<Fields, Failure> {
    if !is_json {
        let detail = "send JSON, and say so: Content-Type: application/json";
        return Err(Failure::new(ProblemType::UnsupportedMediaType, detail));
    }
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        Failure::new(ProblemType::Malformed, format!("the body is not JSON: {error}"))
    })?;
    if let Some(note) = note {
        note.set(&value);
    }
    match value {
        Value::Object(map) => Ok(Fields::new(map)),
        _ => Err(Failure::malformed("", "the body is a JSON object")),
    }
}
