//! The dependency graph, out of the JSON of `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use anyhow::{Context as _, bail};
use serde_json::Value;

/// Packages by id, and what each depends on.
#[derive(Debug)]
pub(super) struct Graph {
    /// Names of the workspace's members, in the order of the root manifest.
    pub(super) members: Vec<String>,
    names: BTreeMap<String, String>,
    edges: BTreeMap<String, Vec<Edge>>,
    member_ids: Vec<String>,
}

#[derive(Debug)]
struct Edge {
    to: String,
    kind: Kind,
}

/// What a dependency is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Build,
    Development,
}

impl Graph {
    pub(super) fn parse(metadata: &Value) -> anyhow::Result<Self> {
        let mut names = BTreeMap::new();
        for package in array(&metadata["packages"], "packages")? {
            names.insert(string(&package["id"])?, string(&package["name"])?);
        }
        let mut edges = BTreeMap::new();
        for node in array(&metadata["resolve"]["nodes"], "resolve.nodes")? {
            edges.insert(string(&node["id"])?, parse_edges(node)?);
        }
        let mut member_ids = Vec::new();
        let mut members = Vec::new();
        for id in array(&metadata["workspace_members"], "workspace_members")? {
            let id = string(id)?;
            members.push(names.get(&id).context("a member is not a package")?.clone());
            member_ids.push(id);
        }
        Ok(Self { members, names, edges, member_ids })
    }

    /// What the member of this name depends on directly, of every kind.
    pub(super) fn direct(&self, member: &str) -> impl Iterator<Item = (&str, Kind)> {
        let edges = self.member_id(member).and_then(|id| self.edges.get(id));
        edges.into_iter().flatten().map(|edge| (self.name(&edge.to), edge.kind))
    }

    /// Which of `targets` the member reaches through normal dependencies, each with a shortest way.
    pub(super) fn reach<'a>(
        &'a self,
        member: &str,
        targets: &[&str],
    ) -> Vec<(&'a str, Vec<&'a str>)> {
        let Some(start) = self.member_id(member) else { return Vec::new() };
        let mut seen = BTreeSet::from([start]);
        let mut open = VecDeque::from([(start, vec![self.name(start)])]);
        let mut found = Vec::new();
        while let Some((id, path)) = open.pop_front() {
            if targets.contains(&self.name(id)) {
                found.push((self.name(id), path.clone()));
            }
            for edge in self.edges.get(id).into_iter().flatten() {
                if edge.kind == Kind::Normal && seen.insert(&edge.to) {
                    let mut path = path.clone();
                    path.push(self.name(&edge.to));
                    open.push_back((&edge.to, path));
                }
            }
        }
        found
    }

    /// Whether a package of this name is anywhere in the graph.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.edges.keys().any(|id| self.name(id) == name)
    }

    pub(super) fn package_count(&self) -> usize {
        self.edges.len()
    }

    fn name<'a>(&'a self, id: &'a str) -> &'a str {
        self.names.get(id).map_or(id, String::as_str)
    }

    fn member_id(&self, name: &str) -> Option<&str> {
        let place = self.members.iter().position(|member| member == name)?;
        self.member_ids.get(place).map(String::as_str)
    }
}

/// One edge for each kind in which a package depends on another.
fn parse_edges(node: &Value) -> anyhow::Result<Vec<Edge>> {
    let mut edges = Vec::new();
    for dependency in array(&node["deps"], "deps")? {
        let to = string(&dependency["pkg"])?;
        for kind in array(&dependency["dep_kinds"], "dep_kinds")? {
            let kind = match kind["kind"].as_str() {
                None => Kind::Normal,
                Some("build") => Kind::Build,
                Some("dev") => Kind::Development,
                Some(other) => bail!("unknown kind of dependency {other:?}"),
            };
            edges.push(Edge { to: to.clone(), kind });
        }
    }
    Ok(edges)
}

fn array<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a Vec<Value>> {
    value.as_array().with_context(|| format!("{field} is not a list"))
}

fn string(value: &Value) -> anyhow::Result<String> {
    Ok(value.as_str().with_context(|| format!("{value} is not a text"))?.to_owned())
}
