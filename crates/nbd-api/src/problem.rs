//! Errors, as RFC 9457 has them: media type `application/problem+json`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of a [`Problem`].
pub const MEDIA_TYPE: &str = "application/problem+json";

/// What kind of problem it is: to be told apart by programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum ProblemType {
    /// 400: not what the API takes: bad JSON, an unknown field or parameter, a bad cursor.
    #[serde(rename = "/problems/malformed")]
    Malformed,
    /// 401: no token, or none that is known.
    #[serde(rename = "/problems/unauthorized")]
    Unauthorized,
    /// 403: the token does not allow it.
    #[serde(rename = "/problems/forbidden")]
    Forbidden,
    /// 404: there is no such thing.
    #[serde(rename = "/problems/not-found")]
    NotFound,
    /// 405: it cannot be used in this way.
    #[serde(rename = "/problems/method-not-allowed")]
    MethodNotAllowed,
    /// 409: there is a volume of that name already.
    #[serde(rename = "/problems/volume-exists")]
    VolumeExists,
    /// 409: clients are attached.
    #[serde(rename = "/problems/volume-attached")]
    VolumeAttached,
    /// 409: the volume would become smaller.
    #[serde(rename = "/problems/volume-shrinks")]
    VolumeShrinks,
    /// 409: as many volumes as the shard may have.
    #[serde(rename = "/problems/limit-reached")]
    LimitReached,
    /// 409: as things stand, it cannot be done.
    #[serde(rename = "/problems/conflict")]
    Conflict,
    /// 413: more bytes than a request may have.
    #[serde(rename = "/problems/too-large")]
    TooLarge,
    /// 415: not JSON.
    #[serde(rename = "/problems/unsupported-media-type")]
    UnsupportedMediaType,
    /// 422: values out of bounds; `errors` names each.
    #[serde(rename = "/problems/invalid")]
    Invalid,
    /// 422: the key was used for another creation.
    #[serde(rename = "/problems/key-reused")]
    KeyReused,
    /// 503: the shard has no majority, or none that answers. `Retry-After` says when to ask again.
    #[serde(rename = "/problems/unavailable")]
    Unavailable,
    /// 500: a defect of the service.
    #[serde(rename = "/problems/internal")]
    Internal,
    /// One that this version does not know.
    #[serde(other, rename = "about:blank")]
    Other,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// What kind of problem it is.
    #[serde(rename = "type")]
    pub kind: ProblemType,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong this time, and what to do about it.
    pub detail: String,
    /// What was wrong with the request, value by value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldProblem>,
}

/// A value that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// Where it is: a JSON pointer into the body (`/labels/tier`), or the name of a parameter.
    #[schema(example = "/size")]
    pub field: String,
    /// What is wrong with it, and what is allowed.
    pub detail: String,
}
