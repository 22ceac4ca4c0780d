//! One `nbd-replica` process.

use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};

use crate::health::{Health, ShardDigest};
use crate::http;
use crate::ports::Ports;
use crate::server::{ServerProcess, ServerSetup};

/// One node of a [`Cluster`](crate::Cluster): a [`ServerProcess`], which it can be used as, with
/// data and a place among the others.
#[derive(Debug)]
pub struct NodeProcess {
    server: ServerProcess,
    grpc: u16,
    data_directory: PathBuf,
}

/// What a node is started with.
#[derive(Debug)]
pub(crate) struct NodeSetup {
    pub(crate) name: String,
    pub(crate) ports: Ports,
    pub(crate) program: PathBuf,
    pub(crate) cluster_file: PathBuf,
    /// Holds the data directory and the captured output of this node.
    pub(crate) directory: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
}

impl NodeProcess {
    /// A node that does not run yet.
    pub(crate) fn new(setup: NodeSetup) -> Self {
        let NodeSetup { name, ports, program, cluster_file, directory, arguments, environment } =
            setup;
        let data_directory = directory.join("data");
        let mut own = vec![
            format!("--cluster={}", cluster_file.display()),
            format!("--node={name}"),
            format!("--data-dir={}", data_directory.display()),
        ];
        own.extend(arguments);
        let Ports { nbd, grpc, http } = ports;
        let server = ServerProcess::new(ServerSetup {
            name,
            nbd,
            http,
            program,
            arguments: own,
            environment,
            directory,
        });
        Self { server, grpc, data_directory }
    }

    /// Removes all data of a node that does not run, as if it got an empty disk.
    ///
    /// # Panics
    /// If it runs, or the data cannot be removed.
    pub fn wipe(&mut self) {
        assert!(!self.is_running(), "{} runs", self.name());
        fs::remove_dir_all(&self.data_directory).expect("remove a data directory");
    }

    /// Where other nodes reach it.
    pub fn grpc_address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.grpc)
    }

    /// What the node says of itself. `None` if it does not answer. Moves the replicated counter.
    pub fn health(&self) -> Option<Health> {
        let answer = self.look("/health")?;
        Health::parse(answer.status, &serde_json::from_str(&answer.body).ok()?)
    }

    /// What the node's own store holds. `None` if it cannot say now.
    pub fn digests(&self) -> Option<Vec<ShardDigest>> {
        let answer = http::get(self.http_address(), "/debug/digest").ok()?;
        let body = serde_json::from_str(&answer.body).ok()?;
        ShardDigest::parse_all(&body).filter(|_| answer.status == 200)
    }

    /// Where the node keeps its data.
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }
}

impl Deref for NodeProcess {
    type Target = ServerProcess;

    fn deref(&self) -> &ServerProcess {
        &self.server
    }
}

impl DerefMut for NodeProcess {
    fn deref_mut(&mut self) -> &mut ServerProcess {
        &mut self.server
    }
}
