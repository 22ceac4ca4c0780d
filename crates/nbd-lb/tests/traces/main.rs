//! Traces of real processes, as a collector sees them.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use nbd_rpc::v1;
use nbd_rpc::v1::control_client::ControlClient;
use nbd_testkit::{
    Cluster, NbdClient, SeenSpan, ServerProcess, SpanCollector, free_port, write_tree,
};
use tokio::runtime::Runtime;

/// Most reads until one is answered from memory.
const READS_MAX: usize = 5;

/// Three replicas that send the traces of so many requests, and a load balancer in front.
fn cluster(endpoint: &str, sampler: &str) -> Cluster {
    let mut cluster = Cluster::builder()
        .replicas(3)
        .environment("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        .environment("OTEL_TRACES_SAMPLER", sampler)
        .start();
    cluster.put_balancer_in_front();
    cluster
}

fn attach(process: &ServerProcess) -> NbdClient {
    process.connect("traced").unwrap()
}

fn name(cluster: &Cluster, place: usize) -> String {
    cluster.at(place).name().to_owned()
}

#[test]
fn a_write_and_a_read_are_each_one_tree_across_all_processes() {
    let collector = SpanCollector::start();
    let cluster = cluster(&collector.endpoint(), "always_on");
    let (leader, followers) = (cluster.wait_leader(), cluster.followers());
    let balancer = cluster.front().name().to_owned();
    let (leader, [one, two]) =
        (name(&cluster, leader), [followers[0], followers[1]].map(|place| name(&cluster, place)));
    let mut client = attach(cluster.front());
    client.write(4096, &[7; 4096]).unwrap();

    let instance = lb_instance(&collector);
    let expected = write_tree(&instance, &leader, [&one, &two]);
    assert_eq!(collector.wait_for_tree("NBD write", expected.len()), expected, "{balancer}");

    let (lb, lead) = (format!("nbd-lb {instance}"), format!("nbd-replica {leader}"));
    let read = || assert_eq!(client.read(4096, 4096).unwrap(), [7; 4096]);
    let expected = [
        format!("{lb}: NBD read"),
        format!("  {lb}: decode"),
        format!("  {lead}: lead read"),
        format!("    {lead}: cache"),
        format!("    {lead}: decode"),
    ];
    assert_read_tree(&collector, read, &expected);

    let seen = collector.seen();
    let write = seen.iter().find(|span| span.name == "NBD write").unwrap();
    assert_eq!((write.attributes["nbd.offset"].as_str(), write.kind), ("4096", 2));
    assert_eq!(write.attributes["nbd.length"], "4096");
    for key in ["service.version", "host.name"] {
        assert!(write.resource.contains_key(key), "{:?}", write.resource);
    }
    let trace: Vec<_> = seen.iter().filter(|span| span.trace == write.trace).collect();
    assert!(trace.iter().all(|span| span.error.is_none()), "{trace:?}");
    // One machine, one clock: what the client waited for lies within its request.
    for span in trace
        .iter()
        .filter(|span| ["lead write", "queue", "propose", "commit"].contains(&span.name.as_str()))
    {
        let within = write.start_ns <= span.start_ns && span.end_ns <= write.end_ns;
        assert!(within, "{span:?} in {write:?}");
    }
    let one = |name: &str| trace.iter().find(|span| span.name == name && span.instance() == leader);
    let (queue, propose, commit) = (one("queue"), one("propose"), one("commit"));
    let order = [queue, propose, commit].map(|span| span.unwrap().end_ns);
    assert!(order.is_sorted(), "{order:?}");
}

/// Reads until the trace of a read is `expected`, as when the leader answers from memory under its
/// lease. Without a lease, as after it stood still on an overrun machine, it asks the others first:
/// that makes more spans.
fn assert_read_tree(collector: &SpanCollector, mut read: impl FnMut(), expected: &[String]) {
    for _ in 0..READS_MAX {
        let earlier: Vec<u128> = collector.seen().iter().map(|span| span.trace).collect();
        read();
        let is_root = |span: &SeenSpan| {
            span.parent.is_none() && span.name == "NBD read" && !earlier.contains(&span.trace)
        };
        let tree = collector.wait_for(&format!("the trace {expected:#?}"), |_| {
            let tree = collector.tree_of(is_root)?;
            (tree == expected || tree.len() > expected.len()).then_some(tree)
        });
        if tree == expected {
            return;
        }
        eprintln!("a read was answered another way: {tree:#?}");
    }
    panic!("none of {READS_MAX} reads has the trace {expected:#?}");
}

fn lb_instance(collector: &SpanCollector) -> String {
    let of_balancer = |seen: &[SeenSpan]| {
        Some(seen.iter().find(|span| span.service() == "nbd-lb")?.instance().to_owned())
    };
    collector.wait_for("a span of the load balancer", of_balancer)
}

#[test]
fn a_client_of_a_replica_is_traced_from_there() {
    let collector = SpanCollector::start();
    let mut cluster = cluster(&collector.endpoint(), "always_on");
    let leader = cluster.wait_leader();
    cluster.put_in_front(leader);
    let node = format!("nbd-replica {}", name(&cluster, leader));
    let mut client = attach(cluster.front());
    client.write(0, &[1; 4096]).unwrap();
    let tree = collector.wait_for_tree("NBD write", 18);
    assert_eq!(tree[0], format!("{node}: NBD write"));
    assert_eq!(tree[2], format!("  {node}: lead write"));
    let read = || assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    let expected = [format!("{node}: NBD read"), format!("  {node}: cache")];
    assert_read_tree(&collector, read, &expected);
}

#[test]
fn a_failover_is_told_by_the_requests_that_it_held_up() {
    let collector = SpanCollector::start();
    let mut cluster = cluster(&collector.endpoint(), "always_on");
    let mut client = attach(cluster.front());
    client.write(0, &[1; 4096]).unwrap();
    let leader = cluster.wait_leader();
    cluster.at_mut(leader).kill_9();
    client.write(0, &[2; 4096]).unwrap();
    let next = name(&cluster, cluster.wait_leader());
    let held_up = |seen: &[SeenSpan]| {
        let resumed = |span: &SeenSpan| {
            let event = span.events.iter().find(|(name, _)| name == "resumed")?;
            Some((span.name.clone(), event.1["cinderblock.node"].clone(), span.error.clone()))
        };
        seen.iter().find_map(resumed)
    };
    let (span, node, error) = collector.wait_for("an event of the failover", held_up);
    assert_eq!((span.as_str(), node, error), ("NBD write", next, None));
    assert_eq!(client.read(0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn requests_of_a_volume_are_traced_when_asked_for() {
    let collector = SpanCollector::start();
    let cluster = cluster(&collector.endpoint(), "always_off");
    let mut client = attach(cluster.front());
    client.write(0, &[1; 4096]).unwrap();
    let (leader, follower) = (cluster.wait_leader(), cluster.followers()[0]);
    let (host, port) = cluster.at(follower).grpc_address();
    let ask = async {
        let target = Some(v1::ShardTarget { cluster: "test".to_owned(), shard: 0 });
        let (name, requests) = ("traced".to_owned(), 3);
        let message = v1::TraceVolumeRequest { target, name, requests };
        let mut request = tonic::Request::new(message);
        let above = "00-00000000000000000000000000000abc-000000000000000d-01";
        request.metadata_mut().insert("traceparent", above.parse().unwrap());
        let channel = nbd_rpc::channel(&format!("{host}:{port}")).unwrap().connect_lazy();
        ControlClient::new(channel).trace_volume(request).await.unwrap().into_inner()
    };
    let asked = Runtime::new().unwrap().block_on(ask);
    assert_eq!(asked.sessions, 1);
    for _ in 0..10 {
        client.write(0, &[1; 4096]).unwrap();
    }
    let roots = |seen: &[SeenSpan]| seen.iter().filter(|span| span.name == "NBD write").count();
    collector.wait_for("three writes", |seen| (roots(seen) >= 3).then_some(()));
    // The call, at the follower that was asked and at the leader that it was passed on to.
    let (follower, leader) = (name(&cluster, follower), name(&cluster, leader));
    let call = |node: &str| {
        collector.wait_for("a span of the call", |seen| {
            let of_call = |span: &&SeenSpan| span.instance() == node && span.trace == 0xabc;
            seen.iter().find(of_call).cloned()
        })
    };
    let (passed_on, answered) = (call(&follower), call(&leader));
    assert_eq!((passed_on.parent, passed_on.name.as_str()), (Some(0xd), "Control/trace_volume"));
    assert_eq!((answered.parent, answered.name), (Some(passed_on.id), passed_on.name));
    // What else there is to send goes out after a second.
    thread::sleep(Duration::from_secs(2));
    assert_eq!(roots(&collector.seen()), 3);
}

#[test]
fn without_sampling_nothing_is_sent() {
    let collector = SpanCollector::start();
    let cluster = cluster(&collector.endpoint(), "always_off");
    let mut client = attach(cluster.front());
    for at in 0..100 {
        client.write(at * 4096, &[1; 4096]).unwrap();
    }
    // What there is to send goes out after a second.
    thread::sleep(Duration::from_secs(3));
    assert_eq!(collector.seen(), []);
}

#[test]
fn a_collector_that_is_away_stops_nothing() {
    let nowhere = format!("http://127.0.0.1:{}", free_port());
    let mut cluster = cluster(&nowhere, "always_on");
    let mut client = attach(cluster.front());
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        client.write(0, &[1; 4096]).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
    }
    drop(client);
    let stopping = Instant::now();
    assert!(cluster.front_mut().terminate().success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "{:?}", stopping.elapsed());
    let log = cluster.front().stderr();
    assert_eq!(log.matches("traces cannot be sent").count(), 1, "{log}");
}

#[test]
fn http_endpoints_take_up_traces() {
    let collector = SpanCollector::start();
    let cluster = cluster(&collector.endpoint(), "always_off");
    let (trace, above) = (0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128, 0xf067_u64);
    let w3c = format!("traceparent: 00-{trace:032x}-{above:016x}-01");
    let jaeger = format!("uber-trace-id: {:x}:{above:x}:0:1", trace + 1);
    let unsampled = format!("traceparent: 00-{:032x}-{above:016x}-00", trace + 2);
    for header in [&w3c, &jaeger, &unsampled] {
        for process in [cluster.front(), cluster.at(0)] {
            get(process, "/health", header);
        }
    }
    for (trace, service) in
        [trace, trace + 1].into_iter().flat_map(|t| [(t, "nbd-lb"), (t, "nbd-replica")])
    {
        let found = |seen: &[SeenSpan]| {
            let is_wanted = |span: &&SeenSpan| span.trace == trace && span.service() == service;
            seen.iter().find(is_wanted).cloned()
        };
        let span = collector.wait_for(&format!("a span of {service}"), found);
        assert_eq!((span.parent, span.kind), (Some(above), 2));
        assert_eq!(span.name, "GET /health");
        assert_eq!(span.attributes["http.route"], "/health");
        assert_eq!(span.attributes["http.request.method"], "GET");
        assert_eq!(span.attributes["http.response.status_code"], "200");
    }
    assert_eq!(collector.seen().len(), 4, "nothing of the request that is not sampled");
}

/// Asks with a header.
fn get(process: &ServerProcess, path: &str, header: &str) {
    let mut stream = TcpStream::connect(process.http_address()).unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n{header}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
