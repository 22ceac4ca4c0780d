//! Traces: where one request out of many spends its time, across processes, sent to a collector
//! (Jaeger, say) by OTLP over gRPC.
//!
//! Spans are made by hand and only for requests that are sampled: a request that is not costs one
//! branch ([`Sampler::take`]), and whatever would be noted of it hangs on an `Option` that is
//! `None`. There is no global tracer, so that several services in one process each have their own.
//!
//! ```text
//!  Sampler::take ─▶ Tracer::root ─▶ Span ── child ─▶ Span ── dropped ─▶ queue ─▶ exporter ═▶ OTLP
//!                                    │ context                        bounded     task
//!                                    ▼
//!                                 Context ══ relay, Raft stream, header ══▶ Tracer::child_of
//! ```
//!
//! An exporter that cannot be reached neither blocks nor grows: the queue holds [`QUEUE_SPANS_MAX`]
//! spans, what does not fit or cannot be sent is counted (`trace_spans_dropped_total`) and
//! forgotten, and the log has one line when that begins and one when it ends.
//!
//! - `settings`: [`Settings`], from the environment variables of OpenTelemetry.
//! - `exporter`: the task that sends. `sampler`: [`Sampler`].
//! - `headers`: contexts in headers of HTTP and gRPC.

mod exporter;
mod headers;
mod sampler;
mod settings;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use metrics::{Counter, counter, describe_counter};
use opentelemetry::trace::{
    Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::exporter::QUEUE_SPANS_MAX;
pub use self::headers::{HttpTraces, Incoming, TRACEPARENT, carried, client_span, traced};
pub use self::sampler::Sampler;
pub use self::settings::{InvalidTrace, RATIO_DEFAULT, Settings};
pub use opentelemetry::Value;

/// Events that one span may have. A request that sees more of them is waiting for something that
/// the first ones tell of.
const EVENTS_MAX: usize = 32;

/// Time that the last spans of a process have to be sent.
const LAST_SPANS_MAX: Duration = Duration::from_secs(1);

/// A span that others may be children of, here or in other processes. There are contexts of sampled
/// requests only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// High and low half of the trace's id, not both 0.
    trace: [u64; 2],
    span: NonZeroU64,
}

impl Context {
    /// Of the span `span_id` of the trace `trace_id`; `None` if either is 0, which are no ids.
    #[must_use]
    pub fn new(trace_id: u128, span_id: u64) -> Option<Self> {
        let span = NonZeroU64::new(span_id)?;
        (trace_id != 0).then_some(Self { trace: halves(trace_id), span })
    }

    /// A new trace.
    fn fresh() -> Self {
        let trace_id: u128 = rand::random();
        Self { trace: halves(trace_id.max(1)), span: fresh_span() }
    }

    /// A new span of the same trace.
    fn sibling(self) -> Self {
        Self { span: fresh_span(), ..self }
    }

    /// The trace's id, never 0.
    #[must_use]
    pub const fn trace_id(self) -> u128 {
        ((self.trace[0] as u128) << 64) | self.trace[1] as u128
    }

    /// The span's id, never 0.
    #[must_use]
    pub const fn span_id(self) -> u64 {
        self.span.get()
    }
}

/// The upper and the lower half of a trace's id, as they go over the wire.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the two halves of it")]
pub const fn halves(trace_id: u128) -> [u64; 2] {
    [(trace_id >> 64) as u64, trace_id as u64]
}

fn fresh_span() -> NonZeroU64 {
    NonZeroU64::new(rand::random()).unwrap_or(NonZeroU64::MIN)
}

/// What a span is to the request that it is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A part of the work of one process.
    Internal,
    /// A request that came from elsewhere.
    Server,
    /// A request to another process, as who asks sees it.
    Client,
}

/// Who makes the spans: attributes of the resource, by OpenTelemetry's semantic conventions.
#[derive(Debug, Clone, Copy)]
pub struct Service<'a> {
    /// `service.name`: `nbd-lb`, `nbd-replica` or `nbd-control`, unless the environment names it.
    pub name: &'static str,
    /// `service.instance.id`: the name of the node or of the process.
    pub instance: &'a str,
    /// `service.version`.
    pub version: &'static str,
}

/// Makes spans, or does not: see [`Tracer::off`]. Clones are cheap, and the same.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Shared>>);

struct Shared {
    queue: mpsc::Sender<SpanData>,
    dropped: Counter,
    /// Of 2^64 requests, so many are sampled; `u64::MAX`: all of them.
    threshold: u64,
    scope: InstrumentationScope,
    /// Cancelled when nothing more is to be waited for.
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tracer").field(&self.0.is_some()).finish()
    }
}

impl Tracer {
    /// Makes no spans.
    #[must_use]
    pub const fn off() -> Self {
        Self(None)
    }

    /// Makes spans as `settings` say, and starts a task that sends them; off if they say so. The
    /// metrics of it are registered on the calling thread.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn start(settings: &Settings, service: Service<'_>) -> Self {
        let Some(endpoint) = settings.endpoint() else { return Self::off() };
        let exporter = match exporter::connect(endpoint, settings.resource(service)) {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::warn!(endpoint, %error, "no traces: the exporter cannot be made");
                return Self::off();
            }
        };
        let (queue, spans) = mpsc::channel(QUEUE_SPANS_MAX);
        describe_counter!("trace_spans_exported_total", "Spans sent to the collector.");
        describe_counter!("trace_spans_dropped_total", "Spans that the collector did not take.");
        let dropped = counter!("trace_spans_dropped_total");
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let task = exporter::Task {
            endpoint: endpoint.to_owned(),
            exporter,
            spans,
            exported: counter!("trace_spans_exported_total"),
            dropped: dropped.clone(),
            stop: stop.clone(),
        };
        tasks.spawn(task.run());
        tracing::info!(endpoint, ratio = settings.ratio(), "traces");
        let threshold = sampler::threshold(settings.ratio());
        let scope =
            InstrumentationScope::builder("cinderblock").with_version(service.version).build();
        Self(Some(Arc::new(Shared { queue, dropped, threshold, scope, stop, tasks })))
    }

    /// Whether spans are made at all.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Decides which requests of one session are traced.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        Sampler::new(self.0.as_ref().map(|shared| shared.threshold))
    }

    /// The root of a new trace. `None` if no spans are made.
    #[must_use]
    pub fn root(&self, name: impl Into<Cow<'static, str>>, kind: Kind) -> Option<Span> {
        let shared = self.0.as_ref()?;
        Some(Span::begin(Arc::clone(shared), Context::fresh(), None, kind, name.into()))
    }

    /// A span below one of another process, or of another place in this one. `None` if no spans are
    /// made.
    #[must_use]
    pub fn child_of(
        &self,
        parent: Context,
        name: impl Into<Cow<'static, str>>,
        kind: Kind,
    ) -> Option<Span> {
        let shared = self.0.as_ref()?;
        let (context, remote) = (parent.sibling(), kind == Kind::Server);
        let parent = Some((parent, remote));
        Some(Span::begin(Arc::clone(shared), context, parent, kind, name.into()))
    }

    /// A span for a request that came with headers: below the one they name, none if they say that
    /// the request is not sampled, and if they say nothing the root of a new trace, provided that
    /// `sampler` picks the request.
    #[must_use]
    pub fn server_span(
        &self,
        incoming: Incoming,
        sampler: Option<&mut Sampler>,
        name: impl Into<Cow<'static, str>>,
    ) -> Option<Span> {
        match incoming {
            Incoming::Sampled(parent) => self.child_of(parent, name, Kind::Server),
            Incoming::NotSampled => None,
            Incoming::Nothing => {
                let picked = sampler.is_some_and(Sampler::take);
                picked.then(|| self.root(name, Kind::Server)).flatten()
            }
        }
    }

    /// Sends what waits and takes nothing more; waits for that no longer than a second.
    /// The other clones make spans for nobody then.
    pub async fn shutdown(&self) {
        self.shutdown_within(LAST_SPANS_MAX).await;
    }

    async fn shutdown_within(&self, within: Duration) {
        let Some(shared) = &self.0 else { return };
        shared.stop.cancel();
        shared.tasks.close();
        if tokio::time::timeout(within, shared.tasks.wait()).await.is_err() {
            tracing::debug!("the last traces were not sent in time");
        }
    }
}

/// A part of a sampled request's way. It ends when it is dropped.
pub struct Span(Box<Recording>);

struct Recording {
    shared: Arc<Shared>,
    context: Context,
    /// The span above, and whether that is another process's.
    parent: Option<(Context, bool)>,
    kind: Kind,
    name: Cow<'static, str>,
    start: SystemTime,
    end: Option<SystemTime>,
    attributes: Vec<KeyValue>,
    events: Vec<Event>,
    events_dropped: u32,
    status: Status,
    /// Ends right behind this one.
    encloses: Option<Span>,
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Span").field(&self.0.name).finish()
    }
}

impl Span {
    fn begin(
        shared: Arc<Shared>,
        context: Context,
        parent: Option<(Context, bool)>,
        kind: Kind,
        name: Cow<'static, str>,
    ) -> Self {
        Self(Box::new(Recording {
            shared,
            context,
            parent,
            kind,
            name,
            start: SystemTime::now(),
            end: None,
            attributes: Vec::new(),
            events: Vec::new(),
            events_dropped: 0,
            status: Status::Unset,
            encloses: None,
        }))
    }

    /// What others are children of.
    #[must_use]
    pub const fn context(&self) -> Context {
        self.0.context
    }

    /// A part of this one that begins now.
    #[must_use]
    pub fn child(&self, name: impl Into<Cow<'static, str>>) -> Self {
        self.child_of_kind(name, Kind::Internal)
    }

    /// The same of a certain kind.
    #[must_use]
    pub fn child_of_kind(&self, name: impl Into<Cow<'static, str>>, kind: Kind) -> Self {
        let (context, parent) = (self.0.context.sibling(), Some((self.0.context, false)));
        Self::begin(Arc::clone(&self.0.shared), context, parent, kind, name.into())
    }

    /// The last part of this one, which begins now: the two end together.
    #[must_use]
    pub fn into_last_child(self, name: impl Into<Cow<'static, str>>) -> Self {
        let mut child = self.child(name);
        child.0.encloses = Some(self);
        child
    }

    /// The same span, begun at another time.
    #[must_use]
    pub fn since(mut self, start: SystemTime) -> Self {
        self.0.start = start;
        self
    }

    /// The same span, ended already: when it is dropped does not matter then.
    #[must_use]
    pub fn until(mut self, end: SystemTime) -> Self {
        self.0.end = Some(end);
        self
    }

    /// When it began.
    #[must_use]
    pub const fn start(&self) -> SystemTime {
        self.0.start
    }

    /// The same span with something said of it.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    /// Calls it otherwise: what it is was not known when it began.
    pub fn rename(&mut self, name: &'static str) {
        self.0.name = name.into();
    }

    /// Says something of it. To be said once.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.attributes.push(KeyValue::new(key, value));
    }

    /// Notes what happens now. No more than 32 events are kept.
    pub fn event<const N: usize>(&mut self, name: &'static str, about: [(&'static str, Value); N]) {
        if self.0.events.len() >= EVENTS_MAX {
            self.0.events_dropped += 1;
            return;
        }
        let attributes = about.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
        self.0.events.push(Event::new(name, SystemTime::now(), attributes, 0));
    }

    /// It has failed: the status says so.
    pub fn error(&mut self, reason: impl Into<Cow<'static, str>>) {
        self.0.status = Status::error(reason);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let state = |context: Context, remote| {
            let trace = TraceId::from_bytes(context.trace_id().to_be_bytes());
            let span = SpanId::from_bytes(context.span_id().to_be_bytes());
            SpanContext::new(trace, span, TraceFlags::SAMPLED, remote, TraceState::NONE)
        };
        let parent_id = |(parent, _): (Context, bool)| parent.span_id().to_be_bytes();
        let mut events = SpanEvents::default();
        events.events = std::mem::take(&mut self.events);
        events.dropped_count = self.events_dropped;
        let data = SpanData {
            span_context: state(self.context, false),
            parent_span_id: self
                .parent
                .map_or(SpanId::INVALID, |parent| SpanId::from_bytes(parent_id(parent))),
            parent_span_is_remote: self.parent.is_some_and(|(_, remote)| remote),
            span_kind: match self.kind {
                Kind::Internal => SpanKind::Internal,
                Kind::Server => SpanKind::Server,
                Kind::Client => SpanKind::Client,
            },
            name: std::mem::take(&mut self.name),
            start_time: self.start,
            // A clock that was set back must not make it end before it began.
            end_time: self.end.unwrap_or_else(SystemTime::now).max(self.start),
            attributes: std::mem::take(&mut self.attributes),
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status: std::mem::take(&mut self.status),
            instrumentation_scope: self.shared.scope.clone(),
        };
        if self.shared.queue.try_send(data).is_err() {
            self.shared.dropped.increment(1);
        }
    }
}

/// The time of day at an earlier instant.
#[must_use]
pub fn time_of(instant: Instant) -> SystemTime {
    ago(instant.elapsed())
}

/// The time of day so long ago.
#[must_use]
pub fn ago(elapsed: Duration) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(elapsed).unwrap_or(now)
}
