//! Contexts in headers: `traceparent` of W3C Trace Context, and Jaeger's `uber-trace-id`.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::future::Future;

use axum::extract::{MatchedPath, Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;

use super::{Context, Kind, Span, Tracer};

/// Name of the header of W3C Trace Context.
pub const TRACEPARENT: &str = "traceparent";

/// Of the flags of both headers: the request is sampled.
const SAMPLED: u8 = 1;

/// What a request says of the trace that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// Nothing, or nothing that makes sense.
    Nothing,
    /// It is not sampled.
    NotSampled,
    /// It is sampled, and this is the span above.
    Sampled(Context),
}

impl Incoming {
    /// What headers say; `traceparent` comes before `uber-trace-id`.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        Self::read(|name| headers.get(name)?.to_str().ok())
    }

    /// The same of headers or metadata of whatever kind, by name.
    #[must_use]
    pub fn read<'a>(text: impl Fn(&'static str) -> Option<&'a str>) -> Self {
        let parsed = text(TRACEPARENT).and_then(traceparent);
        parsed.or_else(|| uber_trace_id(text("uber-trace-id")?)).unwrap_or(Self::Nothing)
    }

    fn new(trace_id: u128, span_id: u64, flags: u8) -> Option<Self> {
        let context = Context::new(trace_id, span_id)?;
        Some(if flags & SAMPLED != 0 { Self::Sampled(context) } else { Self::NotSampled })
    }
}

impl Context {
    /// The value of a `traceparent` header.
    #[must_use]
    pub fn traceparent(self) -> String {
        let mut header = String::with_capacity(55);
        let _ = write!(header, "00-{:032x}-{:016x}-01", self.trace_id(), self.span_id());
        header
    }
}

/// `00-{trace: 32 digits}-{span: 16}-{flags: 2}`; later versions may have more behind.
fn traceparent(header: &str) -> Option<Incoming> {
    let mut parts = header.trim().split('-');
    let (version, trace) = (parts.next()?, parts.next()?);
    let (span, flags) = (parts.next()?, parts.next()?);
    let is_lower = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let lengths = [version, trace, span, flags].map(str::len);
    let is_sound = lengths == [2, 32, 16, 2]
        && [version, trace, span, flags].into_iter().all(is_lower)
        && version != "ff"
        && (version != "00" || parts.next().is_none());
    if !is_sound {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok()?;
    let (span, flags) = (u64::from_str_radix(span, 16).ok()?, u8::from_str_radix(flags, 16).ok()?);
    Incoming::new(trace, span, flags)
}

/// `{trace}:{span}:{parent}:{flags}`, in hexadecimal digits; leading zeroes may be left out, and
/// the colons may be percent-encoded.
fn uber_trace_id(header: &str) -> Option<Incoming> {
    let header = header.trim().replace("%3A", ":").replace("%3a", ":");
    let parts: Vec<&str> = header.split(':').collect();
    let [trace, span, _parent, flags] = parts[..] else { return None };
    let is_hex = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    if ![trace, span, flags].iter().all(is_hex) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok()?;
    let (span, flags) = (u64::from_str_radix(span, 16).ok()?, u8::from_str_radix(flags, 16).ok()?);
    Incoming::new(trace, span, flags)
}

tokio::task_local! {
    /// The request that the task serves.
    static CURRENT: Current;
}

/// A request that is being served, and is traced.
#[derive(Debug, Clone)]
struct Current {
    tracer: Tracer,
    context: Context,
}

/// A request to another process, made for the traced request that the calling task serves; `None`
/// if it serves none.
#[must_use]
pub fn client_span(name: impl Into<Cow<'static, str>>) -> Option<Span> {
    let name: Cow<'static, str> = name.into();
    let span = |current: &Current| current.tracer.child_of(current.context, name, Kind::Client);
    CURRENT.try_with(span).ok().flatten()
}

/// The same future, for another task: the request that this task serves is the one that it serves.
pub fn carried<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let current = CURRENT.try_with(Current::clone).ok();
    async move {
        match current {
            Some(current) => CURRENT.scope(current, future).await,
            None => future.await,
        }
    }
}

/// How requests over HTTP are traced.
#[derive(Debug, Clone)]
pub struct HttpTraces {
    /// Makes the spans.
    pub tracer: Tracer,
    /// Whether some of the requests that come without a context are traced, too. Not for probes and
    /// scrapes: they come by the second, and say nothing that metrics do not.
    pub by_chance: bool,
}

/// Middleware of axum that makes a span for each request that comes with a sampled context.
/// [`client_span`] makes spans below it.
pub async fn traced(State(traces): State<HttpTraces>, request: Request, next: Next) -> Response {
    let HttpTraces { tracer, by_chance } = traces;
    let incoming = if tracer.is_on() { Incoming::of(request.headers()) } else { Incoming::Nothing };
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let method = request.method().to_string();
    let name = match &route {
        Some(route) => format!("{method} {route}"),
        None => method.clone(),
    };
    let mut sampler = by_chance.then(|| tracer.sampler());
    let Some(mut span) = tracer.server_span(incoming, sampler.as_mut(), name) else {
        return next.run(request).await;
    };
    span.set("http.request.method", method);
    span.set("url.path", request.uri().path().to_owned());
    if let Some(route) = route {
        span.set("http.route", route);
    }
    let current = Current { tracer, context: span.context() };
    let response = CURRENT.scope(current, next.run(request)).await;
    span.set("http.response.status_code", i64::from(response.status().as_u16()));
    if response.status().is_server_error() {
        span.error(response.status().to_string());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const SPAN: u64 = 0x00f0_67aa_0ba9_02b7;

    fn of(name: &'static str, value: &str) -> Incoming {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        Incoming::of(&headers)
    }

    #[test]
    fn traceparent_is_read_as_w3c_says() {
        let sampled = Incoming::Sampled(Context::new(TRACE, SPAN).unwrap());
        let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(of("traceparent", header), sampled);
        assert_eq!(Context::new(TRACE, SPAN).unwrap().traceparent(), header);
        let unsampled = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
        assert_eq!(of("traceparent", unsampled), Incoming::NotSampled);
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-will-be";
        assert_eq!(of("traceparent", later), sampled);
        for wrong in [
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "",
        ] {
            assert_eq!(of("traceparent", wrong), Incoming::Nothing, "{wrong}");
        }
    }

    #[test]
    fn uber_trace_id_is_read_as_jaeger_writes_it() {
        let sampled = Incoming::Sampled(Context::new(TRACE, SPAN).unwrap());
        let header = "4bf92f3577b34da6a3ce929d0e0e4736:f067aa0ba902b7:0:1";
        assert_eq!(of("uber-trace-id", header), sampled);
        assert_eq!(of("uber-trace-id", &header.replace(':', "%3A")), sampled);
        let debug = "4bf92f3577b34da6a3ce929d0e0e4736:00f067aa0ba902b7:0:3";
        assert_eq!(of("uber-trace-id", debug), sampled);
        let short = Incoming::Sampled(Context::new(0xabc, 0xd).unwrap());
        assert_eq!(of("uber-trace-id", "abc:d:0:1"), short);
        assert_eq!(of("uber-trace-id", "abc:d:0:0"), Incoming::NotSampled);
        for wrong in ["abc:d:0", "abc:d:0:1:2", "0:d:0:1", "abc:0:0:1", "+abc:d:0:1", "", "::::"] {
            assert_eq!(of("uber-trace-id", wrong), Incoming::Nothing, "{wrong}");
        }
    }

    #[test]
    fn the_standard_header_comes_first() {
        let mut headers = HeaderMap::new();
        headers.insert("uber-trace-id", "abc:d:0:1".parse().unwrap());
        headers.insert(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".parse().unwrap(),
        );
        assert_eq!(Incoming::of(&headers), Incoming::NotSampled);
    }
}
