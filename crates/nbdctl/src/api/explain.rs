//! What failed, in words and as an exit code.

use std::io;

use nbd_api::{Problem, ProblemType};
use ureq::http::StatusCode;

use super::settings::Settings;
use crate::failure::{CONFLICT, FAILED, Failure, NOT_ALLOWED, NOT_FOUND, UNAVAILABLE};

/// Characters of an answer that is not one of ours which are shown.
const STRANGE_SHOWN: usize = 100;

/// An answer that is no success.
#[derive(Debug)]
pub(super) struct Refusal<'a> {
    pub(super) status: StatusCode,
    pub(super) text: &'a str,
    pub(super) retry_after: Option<String>,
    pub(super) location: Option<String>,
}

/// Of an answer that is no success.
pub(super) fn refused(settings: &Settings, refusal: &Refusal<'_>) -> Failure {
    let Refusal { status, text, retry_after, location } = refusal;
    let Ok(problem) = serde_json::from_str::<Problem>(text) else {
        return strange(settings, *status, text, location.as_deref());
    };
    told(settings, &problem, status.as_u16(), retry_after.as_deref())
}

/// Of a problem in the midst of a stream of events.
pub(super) fn problem(settings: &Settings, problem: &Problem) -> Failure {
    told(settings, problem, problem.status, None)
}

fn told(settings: &Settings, problem: &Problem, status: u16, retry_after: Option<&str>) -> Failure {
    let code = match (problem.kind, status) {
        (ProblemType::KeyReused, _) | (_, 409) => CONFLICT,
        (_, 401 | 403) => NOT_ALLOWED,
        (_, 404) => NOT_FOUND,
        (_, 503) => UNAVAILABLE,
        _ => FAILED,
    };
    let told = if problem.detail.is_empty() { &problem.title } else { &problem.detail };
    let mut failure = Failure::new(code, told);
    for error in &problem.errors {
        failure = failure.note(format!("  {}: {}", error.field, error.detail));
    }
    match (problem.kind, retry_after) {
        (ProblemType::Unauthorized, _) => failure.hint(token_hint(settings)),
        (ProblemType::Forbidden, _) => failure.hint("this needs a token whose role is admin"),
        (ProblemType::VolumeAttached, _) => failure.hint(
            "`nbdctl session list --volume NAME` shows its clients; --force disconnects them",
        ),
        (ProblemType::VolumeShrinks, _) => {
            failure.hint("--shrink-and-lose-data makes it smaller all the same")
        }
        (_, Some(after)) if after.bytes().all(|byte| byte.is_ascii_digit()) => {
            failure.hint(format!("try again in {after} s"))
        }
        _ => failure,
    }
}

fn token_hint(settings: &Settings) -> String {
    let config = settings.config.display();
    match (&settings.token, settings.token_kept_back) {
        (Some(_), _) => "the server does not know this token; was it taken away?".to_owned(),
        (None, true) => format!(
            "the token in {config} is for the server that is named there; give one for this \
             server with --token-file FILE or NBDCTL_TOKEN"
        ),
        (None, false) => {
            format!("give a token with --token-file FILE, NBDCTL_TOKEN, or token in {config}")
        }
    }
}

/// Of an answer that a control API would not give.
fn strange(settings: &Settings, status: StatusCode, text: &str, location: Option<&str>) -> Failure {
    let server = &settings.server;
    let code = match status.as_u16() {
        401 | 403 => NOT_ALLOWED,
        502..=504 => UNAVAILABLE,
        _ => FAILED,
    };
    if let (true, Some(location)) = (status.is_redirection(), location) {
        let message = format!("{server} says that it is somewhere else: {location}");
        return Failure::new(code, message)
            .hint("redirects are not followed, so that no token gets elsewhere; see --server");
    }
    let line = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let line: String = line.chars().take(STRANGE_SHOWN).collect();
    let colon = if line.is_empty() { "" } else { ": " };
    Failure::new(code, format!("{server} answers {status}{colon}{line}")).hint(
        "is that the control API? Load balancers and replicas serve HTTP too, on other ports; see \
         --server",
    )
}

/// Of a request without an answer.
pub(super) fn not_reached(settings: &Settings, error: &ureq::Error) -> Failure {
    let server = &settings.server;
    let reason = reason(error);
    let failure = Failure::new(UNAVAILABLE, format!("no control API at {server}: {reason}"));
    match error {
        ureq::Error::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            failure.hint(elsewhere(settings, "is `nbdctl up` not running?"))
        }
        ureq::Error::HostNotFound => failure.hint(elsewhere(settings, "is the name right?")),
        _ => failure,
    }
}

fn elsewhere(settings: &Settings, question: &str) -> String {
    format!(
        "{question} Another server is named with --server URL, NBDCTL_SERVER, or server in {}",
        settings.config.display()
    )
}

fn reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::Io(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
            io::ErrorKind::ConnectionReset => "the connection was lost".to_owned(),
            io::ErrorKind::UnexpectedEof => "the connection ended early".to_owned(),
            _ => error.to_string(),
        },
        ureq::Error::HostNotFound => "there is no such host".to_owned(),
        ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => {
            "no connection in time".to_owned()
        }
        ureq::Error::Timeout(_) => "no answer in time".to_owned(),
        error => error.to_string(),
    }
}

/// Of a success that cannot be read.
pub(super) fn unreadable(error: &serde_json::Error) -> Failure {
    Failure::new(FAILED, format!("the server's answer cannot be understood: {error}"))
        .hint("is that the control API, and of this version? See --server")
}

/// Of an answer that should have been a stream.
pub(super) fn no_events() -> Failure {
    Failure::new(FAILED, "the server gives no events of the operation")
        .hint("is that the control API, and of this version? See --server")
}
