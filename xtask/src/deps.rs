//! `cargo xtask deps`: who may depend on whom.
//!
//! The order of members in the root manifest is the layer diagram; this holds it, and the fences
//! around dependencies that must stay in one place or out of the tree.

mod graph;

use std::path::Path;

use anyhow::{Context as _, bail};

use self::graph::{Graph, Kind};
use crate::process;

/// Crates for development: no program that ships may contain them.
const DEVELOPMENT_ONLY: [&str; 5] =
    ["nbd-testkit", "nbd-compose", "nbd-sim", "cinderblock-benches", "xtask"];

/// Crates that take bytes and events and give bytes and effects: no runtime, no transport, no
/// command line, so that every test and simulation can run them unchanged. Nor untyped errors:
/// their callers tell one failure from another.
const PURE: [&str; 8] = [
    "nbd-proto",
    "nbd-topology",
    "nbd-log",
    "nbd-store",
    "nbd-consensus",
    "nbd-shard",
    "nbd-session",
    "nbd-relay",
];

/// What [`PURE`] crates must not reach, by whatever way.
const IMPURE: [&str; 4] = ["tokio", "tonic", "axum", "clap"];

/// What [`PURE`] crates must not name themselves; others may use it below them (slog does).
const UNTYPED: &str = "anyhow";

/// Crates that only one member may name, and why.
const FENCED: [(&str, &str, &str); 3] = [
    ("raft", "nbd-consensus", "raft-rs's traps are handled in one place"),
    ("slog", "nbd-consensus", "only raft logs through it; everything else uses tracing"),
    ("protobuf", "nbd-consensus", "version 2 has RUSTSEC-2024-0437 and stays behind raft"),
];

/// Pairs of members that must not know each other although the order would allow it: the log is
/// (index, term, bytes) between them, and a front end has no replica of its own.
const STRANGERS: [(&str, &str); 4] = [
    ("nbd-consensus", "nbd-store"),
    ("nbd-consensus", "nbd-log"),
    ("nbd-front", "nbd-consensus"),
    ("nbd-front", "nbd-shard"),
];

/// Crates that must be nowhere, not even in a build script, and why.
const BANNED: [(&str, &str); 2] = [
    ("aws-lc-sys", "it needs cmake and a C compiler: give rustls the `ring` feature"),
    ("openssl-sys", "it needs a system library: use rustls"),
];

/// Checks the workspace under `root`.
///
/// # Errors
/// Broken rules, all of them; cargo failing.
pub(crate) fn check(root: &Path) -> anyhow::Result<()> {
    let graph = Graph::parse(&metadata(root)?).context("read cargo metadata")?;
    let broken = broken_rules(&graph);
    for rule in &broken {
        println!("{rule}");
    }
    if !broken.is_empty() {
        bail!("deps: {} broken rules", broken.len());
    }
    println!("deps: {} members, {} packages", graph.members.len(), graph.package_count());
    Ok(())
}

fn metadata(root: &Path) -> anyhow::Result<serde_json::Value> {
    let mut command = process::cargo(root);
    command.args(["metadata", "--format-version", "1", "--locked"]);
    // Without it, cargo downloads what only other platforms need.
    command.arg("--filter-platform").arg(process::host()?);
    Ok(serde_json::from_slice(&process::output(&mut command)?)?)
}

fn broken_rules(graph: &Graph) -> Vec<String> {
    let mut broken = Vec::new();
    for (place, member) in graph.members.iter().enumerate() {
        for (name, kind) in graph.direct(member) {
            if let Some(rule) = member_rule(graph, place, name, kind) {
                broken.push(format!("{member} depends on {name}: {rule}"));
            }
            for (fenced, owner, reason) in FENCED {
                if name == fenced && member != owner {
                    broken.push(format!("{member} depends on {name}: only {owner} may; {reason}"));
                }
            }
        }
    }
    for pure in PURE {
        if graph.direct(pure).any(|(name, kind)| name == UNTYPED && kind == Kind::Normal) {
            broken.push(format!("{pure} depends on {UNTYPED}: give it errors of its own"));
        }
        for (impure, path) in graph.reach(pure, &IMPURE) {
            let reason = "this crate has no runtime, transport or command line";
            broken.push(format!("{pure} reaches {impure} ({}): {reason}", path.join(" -> ")));
        }
    }
    for (banned, reason) in BANNED {
        if graph.contains(banned) {
            broken.push(format!("{banned} is in the tree: {reason}"));
        }
    }
    broken
}

/// The rule that a dependency of the member at `place` on a crate named `name` breaks.
fn member_rule(graph: &Graph, place: usize, name: &str, kind: Kind) -> Option<&'static str> {
    let member = graph.members[place].as_str();
    if STRANGERS.contains(&(member, name)) || STRANGERS.contains(&(name, member)) {
        return Some("these two do not know each other, not even in tests");
    }
    // A crate's tests may use anything, above or below it.
    if kind == Kind::Development {
        return None;
    }
    if DEVELOPMENT_ONLY.contains(&name) && !DEVELOPMENT_ONLY.contains(&member) {
        return Some("it is for development only; make it a dev-dependency");
    }
    let below = graph.members[place..].iter().any(|other| other == name);
    below.then_some("a crate depends only on members listed above it in the root Cargo.toml")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A package's name, and the names and kinds of what it depends on.
    type Package<'a> = (&'a str, &'a [(&'a str, Option<&'a str>)]);

    /// Metadata of packages; the first `members` of them are
    /// workspace members.
    fn metadata(members: usize, packages: &[Package<'_>]) -> Value {
        let id = |name: &str| format!("registry+x#{name}@1.0.0");
        let ids: Vec<String> = packages.iter().map(|(name, _)| id(name)).collect();
        let list: Vec<Value> =
            packages.iter().map(|(name, _)| json!({"id": id(name), "name": name})).collect();
        let node = |(name, dependencies): &Package<'_>| {
            let dependency = |(name, kind): &(&str, Option<&str>)| {
                let kinds = json!([{"kind": kind, "target": null}]);
                json!({"name": name.replace('-', "_"), "pkg": id(name), "dep_kinds": kinds})
            };
            let dependencies: Vec<Value> = dependencies.iter().map(dependency).collect();
            json!({"id": id(name), "deps": dependencies})
        };
        let nodes: Vec<Value> = packages.iter().map(node).collect();
        json!({
            "packages": list,
            "workspace_members": ids[..members],
            "resolve": {"nodes": nodes},
        })
    }

    fn broken(members: usize, packages: &[Package<'_>]) -> Vec<String> {
        broken_rules(&Graph::parse(&metadata(members, packages)).unwrap())
    }

    #[test]
    fn an_orderly_workspace_passes() {
        let found = broken(
            3,
            &[
                ("nbd-topology", &[("xxhash-rust", None), ("nbd-testkit", Some("dev"))]),
                ("nbd-consensus", &[("nbd-topology", None), ("raft", None)]),
                ("nbd-testkit", &[("anyhow", None), ("tokio", Some("dev"))]),
                ("xxhash-rust", &[]),
                ("raft", &[("slog", None), ("protobuf", None), ("anyhow", Some("build"))]),
                ("slog", &[]),
                ("protobuf", &[]),
                ("anyhow", &[]),
                ("tokio", &[]),
            ],
        );
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn dependencies_point_upward_only() {
        let found = broken(2, &[("a", &[("b", None)]), ("b", &[])]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("a depends on b: a crate depends only on members"));
        assert_eq!(broken(2, &[("a", &[("b", Some("dev"))]), ("b", &[])]), [""; 0]);
    }

    #[test]
    fn development_crates_do_not_ship() {
        let found = broken(2, &[("nbd-testkit", &[]), ("nbd-replica", &[("nbd-testkit", None)])]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("make it a dev-dependency"));
        let found = broken(2, &[("nbd-testkit", &[]), ("xtask", &[("nbd-testkit", None)])]);
        assert_eq!(found, [""; 0]);
    }

    #[test]
    fn fences_hold() {
        let found = broken(1, &[("nbd-replica", &[("raft", Some("dev"))]), ("raft", &[])]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("only nbd-consensus may"));
        let strangers = [("nbd-store", &[][..]), ("nbd-consensus", &[("nbd-store", None)])];
        let found = broken(2, &strangers);
        assert!(found[0].contains("do not know each other"), "{found:?}");
    }

    #[test]
    fn pure_crates_are_pure_all_the_way_down() {
        let found = broken(
            1,
            &[("nbd-proto", &[("middle", None)]), ("middle", &[("tokio", None)]), ("tokio", &[])],
        );
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("nbd-proto reaches tokio (nbd-proto -> middle -> tokio)"));
        let found = broken(1, &[("nbd-store", &[("anyhow", None)]), ("anyhow", &[])]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("errors of its own"));
        let below = [("nbd-proto", &[("x", None)][..]), ("x", &[("anyhow", None)])];
        assert_eq!(broken(1, &[&below[..], &[("anyhow", &[])]].concat()), [""; 0]);
    }

    #[test]
    fn banned_crates_are_nowhere() {
        let found =
            broken(1, &[("xtask", &[("openssl-sys", Some("build"))]), ("openssl-sys", &[])]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("use rustls"));
    }
}
