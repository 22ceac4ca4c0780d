//! A collector of traces: takes what processes send by OTLP over gRPC, and shows it to tests.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Time that spans have to arrive. Far above the second that they are gathered for.
const DEADLINE: Duration = Duration::from_secs(60);

/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A span as it arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct SeenSpan {
    /// What is said of the process: `service.name`, `service.instance.id` and so on.
    pub resource: BTreeMap<String, String>,
    /// Its trace.
    pub trace: u128,
    /// Its id in the trace.
    pub id: u64,
    /// The span above; `None` of a root.
    pub parent: Option<u64>,
    /// What it is called.
    pub name: String,
    /// The number of its kind: 1 internal, 2 server, 3 client.
    pub kind: i32,
    /// Nanoseconds since 1970.
    pub start_ns: u64,
    /// The same; not before `start_ns`.
    pub end_ns: u64,
    /// What is said of it.
    pub attributes: BTreeMap<String, String>,
    /// What happened meanwhile, in order, and what is said of that.
    pub events: Vec<(String, BTreeMap<String, String>)>,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

impl SeenSpan {
    /// `service.name`.
    pub fn service(&self) -> &str {
        self.resource.get("service.name").map_or("", String::as_str)
    }

    /// `service.instance.id`.
    pub fn instance(&self) -> &str {
        self.resource.get("service.instance.id").map_or("", String::as_str)
    }
}

/// Receives spans at a port of its own until it is dropped.
#[derive(Debug)]
pub struct SpanCollector {
    address: SocketAddrV4,
    seen: Arc<Mutex<Vec<SeenSpan>>>,
    _stop: DropGuard,
}

struct Receiver(Arc<Mutex<Vec<SeenSpan>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let spans = spans(request.into_inner());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(spans);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

impl SpanCollector {
    /// A collector that has seen nothing yet.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start() -> Self {
        Self::start_at(Ipv4Addr::LOCALHOST)
    }

    /// The same at another address of this machine, for processes that do not reach 127.0.0.1.
    ///
    /// # Panics
    /// If it cannot be started: the address is not this machine's, say.
    pub fn start_at(address: Ipv4Addr) -> Self {
        let seen = Arc::<Mutex<Vec<SeenSpan>>>::default();
        let stop = CancellationToken::new();
        let (service, stopped) = (Receiver(Arc::clone(&seen)), stop.clone().cancelled_owned());
        let (tell, told) = mpsc::sync_channel(1);
        thread::spawn(move || {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().expect("make a runtime");
            runtime.block_on(async move {
                let listener = TcpListener::bind((address, 0)).await.expect("bind");
                tell.send(listener.local_addr().expect("its address").port()).expect("tell it");
                let server = tonic::transport::Server::builder()
                    .add_service(TraceServiceServer::new(service))
                    .serve_with_incoming(TcpListenerStream::new(listener));
                tokio::select! {
                    served = server => served.expect("serve"),
                    () = stopped => {}
                }
            });
        });
        let port = told.recv().expect("the collector starts");
        Self { address: SocketAddrV4::new(address, port), seen, _stop: stop.drop_guard() }
    }

    /// Where it is, for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans that have arrived so far.
    pub fn seen(&self) -> Vec<SeenSpan> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at what has arrived until `found` finds what it looks for there.
    ///
    /// # Panics
    /// If it does not in time; with what has arrived.
    pub fn wait_for<T>(&self, what: &str, found: impl Fn(&[SeenSpan]) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            let seen = self.seen();
            if let Some(found) = found(&seen) {
                return found;
            }
            if started.elapsed() > DEADLINE {
                let lines: Vec<String> = seen.iter().map(|span| format!("{span:?}")).collect();
                panic!("waited {DEADLINE:?} for {what} among\n{}", lines.join("\n"));
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// The whole trace whose root is called `root`, once there is one of so many spans: as
    /// [`Self::tree_of`] draws it.
    ///
    /// # Panics
    /// As [`Self::wait_for`].
    pub fn wait_for_tree(&self, root: &str, spans: usize) -> Vec<String> {
        self.wait_for(&format!("a trace of {spans} spans below {root:?}"), |seen| {
            let tree = tree_in(seen, |span| span.parent.is_none() && span.name == root)?;
            (tree.len() >= spans).then_some(tree)
        })
    }

    /// What has arrived of the trace whose root is the first that `is_root` takes: each span as
    /// `service instance: name`, below its parent's line and indented by its depth, brothers in
    /// order of their names.
    pub fn tree_of(&self, is_root: impl Fn(&SeenSpan) -> bool) -> Option<Vec<String>> {
        tree_in(&self.seen(), is_root)
    }
}

/// The tree of a write through a load balancer, as [`SpanCollector::tree_of`] draws it: of these
/// three nodes, one leads.
pub fn write_tree(balancer: &str, leader: &str, mut followers: [&str; 2]) -> Vec<String> {
    followers.sort_unstable();
    let (balancer, leads) = (format!("nbd-lb {balancer}"), format!("nbd-replica {leader}"));
    let mut tree = vec![
        format!("{balancer}: NBD write"),
        format!("  {balancer}: decode"),
        format!("  {leads}: lead write"),
        format!("    {leads}: append"),
        format!("      {leads}: fsync"),
    ];
    tree.extend(
        ["apply", "commit", "decode", "propose", "queue"]
            .map(|stage| format!("    {leads}: {stage}")),
    );
    for follower in followers {
        let follows = format!("nbd-replica {follower}");
        tree.extend([
            format!("    {leads}: replicate {follower}"),
            format!("      {follows}: append"),
            format!("        {follows}: fsync"),
            format!("      {follows}: apply"),
        ]);
    }
    tree.push(format!("    {leads}: reply"));
    tree
}

fn tree_in(seen: &[SeenSpan], is_root: impl Fn(&SeenSpan) -> bool) -> Option<Vec<String>> {
    let root = seen.iter().find(|span| is_root(span))?;
    let trace: Vec<_> = seen.iter().filter(|span| span.trace == root.trace).collect();
    let mut lines = Vec::new();
    draw(root, &trace, 0, &mut lines);
    // What hangs nowhere is shown, too.
    let known: Vec<u64> = trace.iter().map(|span| span.id).collect();
    let is_lost = |span: &&&SeenSpan| span.parent.is_some_and(|parent| !known.contains(&parent));
    lines.extend(trace.iter().filter(is_lost).map(|span| format!("lost: {}", line(span))));
    Some(lines)
}

fn line(span: &SeenSpan) -> String {
    format!("{} {}: {}", span.service(), span.instance(), span.name)
}

fn draw(span: &SeenSpan, trace: &[&SeenSpan], depth: usize, lines: &mut Vec<String>) {
    lines.push(format!("{}{}", "  ".repeat(depth), line(span)));
    let mut children: Vec<_> = trace.iter().filter(|child| child.parent == Some(span.id)).collect();
    children.sort_by_key(|child| child.name.clone());
    for child in children {
        draw(child, trace, depth + 1, lines);
    }
}

fn spans(request: ExportTraceServiceRequest) -> Vec<SeenSpan> {
    let mut seen = Vec::new();
    for of_resource in request.resource_spans {
        let resource = attributes(of_resource.resource.map(|r| r.attributes).unwrap_or_default());
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            let status = span.status.unwrap_or_default();
            let failed = status.code() == StatusCode::Error;
            let event = |event: opentelemetry_proto::tonic::trace::v1::span::Event| {
                (event.name, attributes(event.attributes))
            };
            seen.push(SeenSpan {
                resource: resource.clone(),
                trace: number(&span.trace_id),
                id: u64::try_from(number(&span.span_id)).expect("8 bytes"),
                parent: match span.parent_span_id.as_slice() {
                    [] => None,
                    id => Some(u64::try_from(number(id)).expect("8 bytes")),
                },
                name: span.name,
                kind: span.kind,
                start_ns: span.start_time_unix_nano,
                end_ns: span.end_time_unix_nano,
                attributes: attributes(span.attributes),
                events: span.events.into_iter().map(event).collect(),
                error: failed.then_some(status.message),
            });
        }
    }
    seen
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |number, byte| (number << 8) | u128::from(*byte))
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value| match value {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(flag) => flag.to_string(),
        other => format!("{other:?}"),
    };
    let pair = |pair: KeyValue| {
        let value = pair.value.and_then(|value| value.value).map(text).unwrap_or_default();
        (pair.key, value)
    };
    pairs.into_iter().map(pair).collect()
}
