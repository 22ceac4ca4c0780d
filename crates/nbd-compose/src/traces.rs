//! One write, and one request to the control API, as trees of spans across all services.

use anyhow::{Context as _, bail};
use nbd_testkit::{SeenSpan, SpanCollector, http, write_tree};

use crate::cluster::{CONTROL, Cluster};
use crate::waiting::wait_for;

/// The volume that is traced, on this shard. Nobody else uses it.
pub(crate) const SHARD: usize = 0;

/// Where it is written, at places of 4 KiB: more than are needed.
const PLACES_BYTES: u64 = 64 << 20;

/// A trace of another program, which asks the control API.
const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
const ABOVE: u64 = 0x00f0_67aa_0ba9_02b7;

/// Numbers of kinds of spans.
const SERVER: i32 = 2;
const CLIENT: i32 = 3;

/// Asks for the next request of a volume to be traced, writes from `offset` on until one is, and
/// holds its tree of spans to what it is to be: load balancer, leader, two followers. Nobody else
/// writes there: by this it is known among requests that happened to be sampled. Gives the number
/// of spans.
///
/// # Errors
/// It is another; it does not arrive.
pub(crate) fn check_write(
    cluster: &Cluster,
    collector: &SpanCollector,
    volume: &str,
    offset: u64,
) -> anyhow::Result<usize> {
    let (leader, followers) = cluster.roles(SHARD)?;
    let mut client = cluster.attach(volume)?;
    let path = format!("/api/v1/volumes/{volume}/trace");
    let json = [("content-type", "application/json")];
    let address = cluster.http_address(CONTROL);
    let answer = http::request(address, "POST", &path, &json, br#"{"requests": 1}"#)?;
    if answer.status != 200 || answer.json()["sessions"] != 1 {
        bail!("asked for a trace: {answer:?}");
    }
    let places = offset..offset + PLACES_BYTES;
    let is_root = |span: &SeenSpan| {
        let at = span.attributes.get("nbd.offset").and_then(|at| at.parse().ok());
        let here = at.is_some_and(|at: u64| places.contains(&at));
        span.parent.is_none() && span.name == "NBD write" && here
    };
    // The wish is on its way to the load balancer while the answer to it is on its way here.
    let mut place = places.clone().step_by(4096);
    let balancer = wait_for("the root of a write", || {
        let place = place.next().context("no place is left")?;
        client.write(place, &[7; 4096]).context("a write that is to be traced")?;
        let seen = collector.seen();
        let root = seen.iter().find(|span| is_root(span)).context("it has not arrived")?;
        Ok(root.instance().to_owned())
    })?;
    let expected = write_tree(&balancer, leader, followers);
    let tree = wait_for("all spans of the write", || {
        let tree = collector.tree_of(is_root).unwrap_or_default();
        if tree.len() < expected.len() {
            bail!("these have arrived:\n{}", tree.join("\n"));
        }
        Ok(tree)
    })?;
    if tree != expected {
        bail!("the write's spans are\n{}\nand not\n{}", tree.join("\n"), expected.join("\n"));
    }
    Ok(tree.len())
}

/// Asks the control API in the name of a traced request, and finds its span below that, and spans
/// of the replicas that it asked below its own.
///
/// # Errors
/// They do not arrive.
pub(crate) fn check_control(cluster: &Cluster, collector: &SpanCollector) -> anyhow::Result<usize> {
    let parent = format!("00-{TRACE:032x}-{ABOVE:016x}-01");
    let headers = [("traceparent", parent.as_str())];
    let address = cluster.http_address(CONTROL);
    let answer = http::request(address, "GET", "/api/v1/volumes", &headers, b"")?;
    if answer.status != 200 {
        bail!("asked for the volumes: {answer:?}");
    }
    wait_for("the spans of a request to the control API", || {
        let mut seen = collector.seen();
        seen.retain(|span| span.trace == TRACE);
        if is_whole(&seen) { Ok(seen.len()) } else { bail!("these have arrived: {seen:#?}") }
    })
}

/// Whether the control API's span is there, below that of who asked, and below it calls, each with
/// the span of the replica that answered.
fn is_whole(seen: &[SeenSpan]) -> bool {
    let of_control = |span: &&SeenSpan| {
        span.parent == Some(ABOVE) && span.service() == CONTROL && span.kind == SERVER
    };
    let Some(root) = seen.iter().find(of_control) else { return false };
    let called = |span: &&SeenSpan| span.parent == Some(root.id) && span.kind == CLIENT;
    let answered = |call: &SeenSpan| {
        let below =
            |span: &SeenSpan| span.parent == Some(call.id) && span.service() == "nbd-replica";
        seen.iter().any(below)
    };
    let mut calls = seen.iter().filter(called).peekable();
    calls.peek().is_some() && calls.all(answered)
}
