//! What a person is told once the cluster is up.

use std::fmt::Write as _;

use super::crew::{BALANCER, Crew, State};
use super::plan::Plan;
use super::shape::counted;

/// The whole text.
pub(super) fn text(plan: &Plan, crew: &Crew) -> String {
    let (nbd, http) = (&plan.nbd, &plan.http);
    let (host, port) = (nbd.host(), nbd.port());
    let (shape, data_dir) = (shape(plan), plan.data_dir.display());
    let services = services(plan, crew);
    let grpc = &plan.cluster.nodes()[0].addresses.grpc;
    // As this program was called, so that a person can call it again.
    let nbdctl = std::env::args().next().unwrap_or_else(|| "nbdctl".to_owned());
    let name = plan.cluster.name();
    let cluster =
        if name.as_str() == "cinderblock" { String::new() } else { format!(" --cluster {name}") };
    let api = &plan.api;
    // Nothing to say where it is the default.
    let server = match api.to_string().as_str() {
        "127.0.0.1:8090" => String::new(),
        api => format!("--server http://{api} "),
    };
    let watch = if crew.pid(BALANCER).is_some() {
        "To watch:      kill -9 a replica (or -STOP and -CONT): clients see a pause, no error\n"
    } else {
        "To watch:      with --processes each is a process, and any replica can be killed\n"
    };
    let added = added(plan);
    format!(
        "\
Cinderblock is up: {shape}. Data in {data_dir}.
{added}
Attach a volume (any name; the first attach creates it):
  nbd-client {host} {port} /dev/nbd0 -name vol1
  qemu-system-x86_64 ... -drive format=raw,file=nbd://{nbd}/vol1
  nbdinfo nbd://{nbd}/vol1
Manage volumes:
  {nbdctl} {server}volume list
  {nbdctl} {server}top
  http://{api}/docs

{services}
Who leads:     curl http://{http}/health, or {nbdctl} replica{cluster} --grpc {grpc} list
Metrics:       curl http://{http}/metrics, and of each replica beside its health
{watch}
Stop with Ctrl-C. Everything acknowledged is on disk.
"
    )
}

/// Tells of nodes that have just been added.
fn added(plan: &Plan) -> String {
    if plan.added.is_empty() {
        return String::new();
    }
    let names: Vec<&str> = plan.added.iter().map(nbd_topology::NodeName::as_str).collect();
    format!("New: {}. Each counts once it holds what the others do.\n", names.join(", "))
}

/// `1 shard of 3 replicas`, or, if they are not all alike, `2 shards, 5 replicas`.
fn shape(plan: &Plan) -> String {
    let map = plan.cluster.shard_map();
    let counts: Vec<usize> = map.shards().map(|(_, nodes)| nodes.len()).collect();
    let shards = counted(counts.len(), "shard");
    match counts.iter().all(|count| *count == counts[0]) {
        true => format!("{shards} of {}", counted(counts[0], "replica")),
        false => format!("{shards}, {}", counted(counts.iter().sum(), "replica")),
    }
}

/// A line for each service: name, process if it has one, and where it is.
fn services(plan: &Plan, crew: &Crew) -> String {
    let nodes = plan.cluster.nodes().iter().map(|node| (node.name.as_str(), &node.addresses));
    let nodes = nodes.map(|(name, addresses)| (name, Some(&addresses.nbd), &addresses.http));
    let fronts = [("load balancer", Some(&plan.nbd), &plan.http), ("control API", None, &plan.api)];
    let mut text = String::new();
    for (place, (name, nbd, http)) in fronts.into_iter().chain(nodes).enumerate() {
        let pid = crew.pid(place).map(|pid| format!("pid {pid:<9}")).unwrap_or_default();
        let nbd = nbd.map(|nbd| format!("nbd://{nbd}")).unwrap_or_default();
        let state = match crew.state(place) {
            State::Starting => "  (not ready yet)",
            State::Ended => "  (has ended)",
            State::Ready | State::Drained => "",
        };
        let line = writeln!(text, "{name:<14} {pid}{nbd:<23} http://{http}/health{state}");
        debug_assert!(line.is_ok(), "a String takes everything");
    }
    text
}
