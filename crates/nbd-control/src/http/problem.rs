//! Everything that goes wrong, as RFC 9457 has it.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use nbd_api::problem::MEDIA_TYPE;
use nbd_api::{FieldProblem, Problem, ProblemType};

use crate::cluster::{CallError, Conflict};
use crate::limits::RETRY_AFTER_S;

/// Every type of problem that is sent.
pub(crate) const ALL: [ProblemType; 16] = [
    ProblemType::Malformed,
    ProblemType::Unauthorized,
    ProblemType::Forbidden,
    ProblemType::NotFound,
    ProblemType::MethodNotAllowed,
    ProblemType::VolumeExists,
    ProblemType::VolumeAttached,
    ProblemType::VolumeShrinks,
    ProblemType::LimitReached,
    ProblemType::Conflict,
    ProblemType::TooLarge,
    ProblemType::UnsupportedMediaType,
    ProblemType::Invalid,
    ProblemType::KeyReused,
    ProblemType::Unavailable,
    ProblemType::Internal,
];

/// Status and title of a type of problem.
pub(crate) const fn words(kind: ProblemType) -> (StatusCode, &'static str) {
    match kind {
        ProblemType::Malformed => (StatusCode::BAD_REQUEST, "The request is malformed"),
        ProblemType::Unauthorized => (StatusCode::UNAUTHORIZED, "A token is needed"),
        ProblemType::Forbidden => (StatusCode::FORBIDDEN, "This is not allowed"),
        ProblemType::NotFound => (StatusCode::NOT_FOUND, "There is no such thing"),
        ProblemType::MethodNotAllowed => {
            (StatusCode::METHOD_NOT_ALLOWED, "It cannot be used in this way")
        }
        ProblemType::VolumeExists => (StatusCode::CONFLICT, "The volume exists already"),
        ProblemType::VolumeAttached => (StatusCode::CONFLICT, "The volume is attached"),
        ProblemType::VolumeShrinks => (StatusCode::CONFLICT, "The volume would become smaller"),
        ProblemType::LimitReached => (StatusCode::CONFLICT, "A limit is reached"),
        ProblemType::Conflict => (StatusCode::CONFLICT, "As things stand, it cannot be done"),
        ProblemType::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "The request is too large"),
        ProblemType::UnsupportedMediaType => {
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, "The request is not JSON")
        }
        ProblemType::Invalid => (StatusCode::UNPROCESSABLE_ENTITY, "Values are out of bounds"),
        ProblemType::KeyReused => {
            (StatusCode::UNPROCESSABLE_ENTITY, "The key was used for another creation")
        }
        ProblemType::Unavailable => {
            (StatusCode::SERVICE_UNAVAILABLE, "A part of the cluster does not answer")
        }
        ProblemType::Internal | ProblemType::Other => {
            (StatusCode::INTERNAL_SERVER_ERROR, "The control API is defective")
        }
    }
}

/// An answer that is a problem.
#[derive(Debug, Clone)]
pub(crate) struct Failure(Box<Problem>);

/// Left in the extensions of a response, for the audit line.
#[derive(Debug, Clone)]
pub(crate) struct Outcome(pub(crate) String);

impl Failure {
    pub(crate) fn new(kind: ProblemType, detail: impl Into<String>) -> Self {
        Self::of_fields(kind, detail, Vec::new())
    }

    pub(crate) fn of_fields(
        kind: ProblemType,
        detail: impl Into<String>,
        errors: Vec<FieldProblem>,
    ) -> Self {
        let (status, title) = words(kind);
        let (title, status, detail) = (title.to_owned(), status.as_u16(), detail.into());
        Self(Box::new(Problem { kind, title, status, detail, errors }))
    }

    /// One value is wrong.
    pub(crate) fn invalid(field: &str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let errors = vec![FieldProblem { field: field.to_owned(), detail: detail.clone() }];
        Self::of_fields(ProblemType::Invalid, format!("{field}: {detail}"), errors)
    }

    /// One parameter is wrong.
    pub(crate) fn malformed(field: &str, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let errors = vec![FieldProblem { field: field.to_owned(), detail: detail.clone() }];
        Self::of_fields(ProblemType::Malformed, format!("{field}: {detail}"), errors)
    }

    pub(crate) fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ProblemType::NotFound, detail)
    }

    pub(crate) fn conflict(detail: impl Into<String>) -> Self {
        Self::new(ProblemType::Conflict, detail)
    }

    pub(crate) fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(ProblemType::Unavailable, detail)
    }

    pub(crate) fn problem(&self) -> &Problem {
        &self.0
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        let detail = error.to_string();
        let kind = match error {
            CallError::Unavailable { .. } => ProblemType::Unavailable,
            CallError::NotFound { .. } => ProblemType::NotFound,
            CallError::Invalid { .. } => ProblemType::Invalid,
            CallError::Conflict { conflict, .. } => match conflict {
                Conflict::VolumeExists => ProblemType::VolumeExists,
                Conflict::KeyReused => ProblemType::KeyReused,
                Conflict::Attached(sessions) => {
                    let detail = format!(
                        "the volume has {sessions} sessions: let its clients detach, or give \
                         force=true to end them"
                    );
                    return Self::new(ProblemType::VolumeAttached, detail);
                }
                Conflict::Shrinks(size) => {
                    let detail = format!(
                        "the volume has {size} bytes already: with \"force\": true it becomes \
                         smaller, and what lies behind its new end is lost"
                    );
                    return Self::new(ProblemType::VolumeShrinks, detail);
                }
                Conflict::LimitReached => ProblemType::LimitReached,
                Conflict::Other => ProblemType::Conflict,
            },
        };
        Self::new(kind, detail)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, _) = words(self.0.kind);
        let outcome = Outcome(self.0.detail.clone());
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], body).into_response();
        let headers = response.headers_mut();
        match self.0.kind {
            ProblemType::Unavailable => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
            }
            ProblemType::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response.extensions_mut().insert(outcome);
        response
    }
}
