//! Requests to the control API, and its answers.

use std::io::Read;
use std::time::Duration;

use nbd_api::Page;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER};
use ureq::http::{Method, Request, Response};
use ureq::{Agent, Body};

use super::explain::{self, Refusal};
use super::settings::Settings;
use super::url::Url;
use crate::failure::{FAILED, Failure};

/// Time to get a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Time for the whole of an answer: some times what the control API gives the shards.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);

/// Time without a word after which a stream of events is asked for anew. The control API says
/// something every few seconds.
const EVENTS_SILENCE_MAX: Duration = Duration::from_secs(30);

/// Bytes of an answer: more than the fullest page has.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// Things on a page: as many as the control API gives.
const PAGE_ITEMS_MAX: u64 = 1000;

/// A control API.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    settings: Settings,
}

/// An answer that says that it was done.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// JSON, or nothing.
    pub(crate) text: String,
}

impl Answer {
    /// What it says.
    ///
    /// # Errors
    /// It is no such thing: whoever answered is not our control API.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.text).map_err(|error| explain::unreadable(&error))
    }
}

/// How much of a list is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All of a list that is too short for pages: of shards, of nodes.
    Whole,
    /// All, in large pages.
    Pages,
    /// So many items, in large pages.
    First(u64),
}

impl From<Option<u64>> for Extent {
    fn from(limit: Option<u64>) -> Self {
        limit.map_or(Self::Pages, Self::First)
    }
}

impl Client {
    pub(crate) fn new(settings: Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // A token is for this server alone, and whoever answers for another may not have it.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // Nor is it for proxies that were meant for the web.
            .proxy(None)
            .user_agent(concat!("nbdctl/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT_DEADLINE))
            .timeout_resolve(Some(CONNECT_DEADLINE))
            .build();
        Self { agent: config.into(), settings }
    }

    pub(crate) const fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn get(&self, url: &Url) -> Result<Answer, Failure> {
        self.call(Method::GET, url, None, None)
    }

    /// As [`get`](Self::get), read.
    pub(crate) fn fetch<T: DeserializeOwned>(&self, url: &Url) -> Result<T, Failure> {
        self.get(url)?.read()
    }

    pub(crate) fn post(&self, url: &Url, body: &impl Serialize) -> Result<Answer, Failure> {
        self.call(Method::POST, url, Some(json(body)?), None)
    }

    /// A creation that may be repeated with the same key.
    pub(crate) fn create(
        &self,
        url: &Url,
        body: &impl Serialize,
        key: Option<&str>,
    ) -> Result<Answer, Failure> {
        self.call(Method::POST, url, Some(json(body)?), key)
    }

    /// A request without a body.
    pub(crate) fn act(&self, url: &Url) -> Result<Answer, Failure> {
        self.call(Method::POST, url, Some(Vec::new()), None)
    }

    pub(crate) fn patch(&self, url: &Url, body: &impl Serialize) -> Result<Answer, Failure> {
        self.call(Method::PATCH, url, Some(json(body)?), None)
    }

    pub(crate) fn delete(&self, url: &Url) -> Result<Answer, Failure> {
        self.call(Method::DELETE, url, None, None)
    }

    /// Asks for a list, page by page, and gives each to `each` as it comes. Gives the shards whose
    /// share of it is missing.
    pub(crate) fn pages<T: DeserializeOwned>(
        &self,
        url: &Url,
        extent: Extent,
        mut each: impl FnMut(Vec<T>) -> Result<(), Failure>,
    ) -> Result<Vec<u32>, Failure> {
        let (mut cursor, mut missing) = (None::<String>, Vec::new());
        let mut left = match extent {
            Extent::Whole | Extent::Pages => None,
            Extent::First(limit) => Some(limit),
        };
        loop {
            let size = left.unwrap_or(PAGE_ITEMS_MAX).min(PAGE_ITEMS_MAX);
            let size = (extent != Extent::Whole).then_some(size);
            let page = url.clone().with_some("limit", size).with_some("cursor", cursor.as_ref());
            let Page { mut items, next, missing_shards } = self.fetch::<Page<T>>(&page)?;
            missing.extend(missing_shards);
            if let Some(left) = &mut left {
                items.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= items.len() as u64;
            }
            each(items)?;
            if next.is_none() || left == Some(0) {
                break;
            }
            if next == cursor {
                let what = "the list does not come to an end: the server repeats a page";
                return Err(Failure::new(FAILED, what));
            }
            cursor = next;
        }
        missing.sort_unstable();
        missing.dedup();
        Ok(missing)
    }

    /// A stream of events.
    pub(super) fn events(&self, url: &Url) -> Result<impl Read + use<>, Failure> {
        let request = self.request(Method::GET, url, "text/event-stream", None);
        let request = request.body(()).map_err(|error| self.failed(&error.into()))?;
        let request = self
            .agent
            .configure_request(request)
            .timeout_recv_response(Some(ANSWER_DEADLINE))
            .timeout_per_read(Some(EVENTS_SILENCE_MAX))
            .build();
        let response = self.agent.run(request).map_err(|error| self.failed(&error))?;
        if response.status().as_u16() != 200 {
            return Err(self.answer(response).err().unwrap_or_else(explain::no_events));
        }
        let kind = response.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        if !kind.is_some_and(|kind| kind.starts_with("text/event-stream")) {
            return Err(explain::no_events());
        }
        Ok(response.into_body().into_with_config().limit(u64::MAX).reader())
    }

    fn call(
        &self,
        method: Method,
        url: &Url,
        body: Option<Vec<u8>>,
        key: Option<&str>,
    ) -> Result<Answer, Failure> {
        let mut request = self.request(method, url, "application/json", key);
        let response = match body {
            Some(body) => {
                if !body.is_empty() {
                    request = request.header(CONTENT_TYPE, "application/json");
                }
                request.body(body).map_err(Into::into).and_then(|request| self.run(request))
            }
            None => request.body(()).map_err(Into::into).and_then(|request| self.run(request)),
        };
        self.answer(response.map_err(|error| self.failed(&error))?)
    }

    fn request(
        &self,
        method: Method,
        url: &Url,
        accept: &str,
        key: Option<&str>,
    ) -> ureq::http::request::Builder {
        let uri = format!("{}{}", self.settings.server, url.text());
        let mut request = Request::builder().method(method).uri(uri).header(ACCEPT, accept);
        if let Some(token) = &self.settings.token {
            request = request.header(AUTHORIZATION, token.header());
        }
        if let Some(key) = key {
            let name = nbd_api::IDEMPOTENCY_KEY.to_ascii_lowercase();
            if let Ok(name) = HeaderName::try_from(name) {
                request = request.header(name, key);
            }
        }
        request
    }

    fn run(&self, request: Request<impl ureq::AsSendBody>) -> Result<Response<Body>, ureq::Error> {
        let request = self.agent.configure_request(request);
        self.agent.run(request.timeout_global(Some(ANSWER_DEADLINE)).build())
    }

    /// An answer that is good, or why it is not.
    fn answer(&self, response: Response<Body>) -> Result<Answer, Failure> {
        let status = response.status();
        let header = |name| {
            let value = response.headers().get(name);
            value.and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let (retry_after, location) = (header(RETRY_AFTER), header(LOCATION));
        let body = response.into_body().into_with_config().limit(ANSWER_BYTES_MAX).lossy_utf8(true);
        let text = body.read_to_string().map_err(|error| self.failed(&error))?;
        if status.is_success() {
            return Ok(Answer { status: status.as_u16(), text });
        }
        let refusal = Refusal { status, text: &text, retry_after, location };
        Err(explain::refused(&self.settings, &refusal))
    }

    fn failed(&self, error: &ureq::Error) -> Failure {
        explain::not_reached(&self.settings, error)
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(body).map_err(|error| Failure::new(FAILED, format!("as JSON: {error}")))
}
