//! Against a real OTLP receiver.

use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

struct Receiver(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.send(request.into_inner()).await.unwrap();
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Serves at `listener`, and gives what arrives.
fn receiver(listener: TcpListener) -> mpsc::Receiver<ExportTraceServiceRequest> {
    let (sender, received) = mpsc::channel(64);
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(Receiver(sender)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    received
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    (listener, endpoint)
}

fn tracer(endpoint: &str) -> Tracer {
    let service = Service { name: "nbd-test", instance: "one", version: "0" };
    Tracer::start(&Settings::to(endpoint, 1.0), service)
}

#[tokio::test]
async fn a_tree_arrives_as_it_was_made() {
    let (listener, endpoint) = listen().await;
    let mut received = receiver(listener);
    let tracer = tracer(&endpoint);
    let mut root = tracer.root("write", Kind::Server).unwrap().with("nbd.length", 4096_i64);
    root.event("resumed", [("node", "n2".into())]);
    let child = root.child("append").since(ago(Duration::from_secs(1)));
    let child_context = child.context();
    drop(child);
    let mut remote = tracer.child_of(child_context, "apply", Kind::Server).unwrap();
    remote.error("no room");
    drop(remote);
    drop(root.into_last_child("reply"));
    tracer.shutdown_within(DEADLINE).await;

    let request = received.recv().await.unwrap();
    let [resource] = &request.resource_spans[..] else { panic!("{request:?}") };
    let about = &resource.resource.as_ref().unwrap().attributes;
    assert!(about.iter().any(|pair| pair.key == "service.instance.id"), "{about:?}");
    let spans = &resource.scope_spans[0].spans;
    let find = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let (write, append, apply, reply) =
        (find("write"), find("append"), find("apply"), find("reply"));
    assert_eq!(spans.len(), 4);
    assert!(write.parent_span_id.is_empty(), "a root");
    assert_eq!(append.parent_span_id, write.span_id);
    assert_eq!(apply.parent_span_id, append.span_id);
    assert_eq!(reply.parent_span_id, write.span_id);
    assert!(spans.iter().all(|span| span.trace_id == write.trace_id));
    assert_eq!(write.kind(), SpanKind::Server);
    assert_eq!(append.kind(), SpanKind::Internal);
    assert_eq!(write.attributes[0].key, "nbd.length");
    assert_eq!(write.events[0].name, "resumed");
    assert_eq!(apply.status.as_ref().unwrap().code(), StatusCode::Error);
    let lasted = append.end_time_unix_nano - append.start_time_unix_nano;
    assert!(lasted >= 1_000_000_000, "{lasted}");
    assert!(reply.end_time_unix_nano <= write.end_time_unix_nano, "the two end together");
}

#[tokio::test]
async fn an_exporter_that_cannot_be_reached_neither_blocks_nor_grows() {
    let (listener, endpoint) = listen().await;
    drop(listener);
    let tracer = tracer(&endpoint);
    let started = Instant::now();
    for _ in 0..4 * QUEUE_SPANS_MAX {
        drop(tracer.root("write", Kind::Server).unwrap());
    }
    // Far below the time that a single attempt to connect may take.
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let shared = tracer.0.as_ref().unwrap();
    assert!(shared.queue.max_capacity() == QUEUE_SPANS_MAX);
    let stopping = Instant::now();
    tracer.shutdown_within(Duration::from_millis(500)).await;
    assert!(stopping.elapsed() < Duration::from_secs(2), "the deadline holds");
}

#[tokio::test]
async fn spans_arrive_again_once_the_receiver_does() {
    let (listener, endpoint) = listen().await;
    let address = listener.local_addr().unwrap();
    drop(listener);
    let tracer = tracer(&endpoint);
    drop(tracer.root("lost", Kind::Server));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut received = receiver(TcpListener::bind(address).await.unwrap());
    let arrived = async {
        loop {
            drop(tracer.root("write", Kind::Server));
            tokio::select! {
                request = received.recv() => return request.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    };
    let request = tokio::time::timeout(DEADLINE, arrived).await.unwrap();
    assert!(!request.resource_spans.is_empty());
}

#[tokio::test]
async fn a_tracer_that_is_off_makes_nothing() {
    let service = Service { name: "nbd-test", instance: "one", version: "0" };
    let tracer = Tracer::start(&Settings::default(), service);
    assert!(!tracer.is_on());
    assert!(tracer.root("write", Kind::Server).is_none());
    let context = Context::new(1, 1).unwrap();
    assert!(tracer.child_of(context, "write", Kind::Server).is_none());
    assert!(!tracer.sampler().take());
    assert_eq!(size_of::<Option<Span>>(), size_of::<usize>());
    tracer.shutdown_within(DEADLINE).await;
}

#[tokio::test]
async fn requests_over_http_are_traced_when_they_ask_for_it() {
    let (listener, endpoint) = listen().await;
    let mut received = receiver(listener);
    let tracer = tracer(&endpoint);
    let traces = HttpTraces { tracer: tracer.clone(), by_chance: false };
    let layer = axum::middleware::from_fn_with_state(traces, traced);
    let asking = || async {
        let call = carried(async { drop(client_span("Control.get_volume")) });
        tokio::spawn(call).await.unwrap();
        "there"
    };
    let router = axum::Router::new().route("/v/{name}", axum::routing::get(asking)).layer(layer);
    let (http, _) = listen().await;
    let address = http.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(http, router).await });
    for header in ["", "uber-trace-id: abc:d:0:1\r\n", "uber-trace-id: abc:d:0:0\r\n"] {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET /v/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("there"), "{answer}");
    }
    tracer.shutdown_within(DEADLINE).await;
    let request = received.recv().await.unwrap();
    let spans = &request.resource_spans[0].scope_spans[0].spans;
    let [call, span] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!((call.name.as_str(), call.kind()), ("Control.get_volume", SpanKind::Client));
    assert_eq!(call.parent_span_id, span.span_id);
    assert_eq!((span.name.as_str(), span.kind()), ("GET /v/{name}", SpanKind::Server));
    assert_eq!(span.trace_id, 0xabc_u128.to_be_bytes());
    assert_eq!(span.parent_span_id, 0xd_u64.to_be_bytes());
    assert!(span.attributes.iter().any(|pair| pair.key == "http.response.status_code"));
}

#[test]
fn contexts_keep_their_ids() {
    let context = Context::new(u128::MAX - 7, 9).unwrap();
    assert_eq!((context.trace_id(), context.span_id()), (u128::MAX - 7, 9));
    assert_eq!(Context::new(0, 9), None);
    assert_eq!(Context::new(9, 0), None);
    assert_eq!(size_of::<Option<Context>>(), 24);
}

#[tokio::test]
async fn its_metrics_are_counted_where_it_started_and_say_what_they_are() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let tracer = metrics::with_local_recorder(&recorder, || tracer("http://127.0.0.1:1"));
    let page = recorder.handle().render();
    for name in ["trace_spans_exported_total", "trace_spans_dropped_total"] {
        let lines =
            [format!("# HELP {name} "), format!("# TYPE {name} counter"), format!("{name} 0")];
        assert!(lines.iter().all(|line| page.contains(line)), "{page}");
    }
    drop(tracer);
}
