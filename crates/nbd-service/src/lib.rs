//! What every Cinderblock process does alike, so that it is done once and the same way.
//!
//! This crate knows no volume, no Raft and no NBD: it carries configuration, logs, metrics, probes
//! and signals. Its modules are a closed list; what does not fit one of them belongs to a service.
//!
//! - [`cluster`]: [`ClusterConfig`], who is in the cluster and where, from `cluster.toml` or the
//!   environment, validated before any socket opens.
//! - [`units`]: [`ByteSize`] (`64MiB`) and [`HumanDuration`] (`250ms`), for configuration.
//! - [`telemetry`]: logs to standard error and the Prometheus recorder.
//! - [`trace`]: spans of sampled requests, sent to a collector.
//! - [`health`]: the readiness latch and the `/livez`, `/readyz`, `/metrics` routes.
//! - [`http`]: serving them with a bound on connections and on silent ones.
//! - `process_metrics`: memory and descriptors, at each scrape.
//! - [`open_files`]: as many sockets and files as the system allows.
//! - [`shutdown`]: signals, the stop token, and draining tasks with a deadline.
//! - [`program`]: what a process sets up once, and its runtime.
//! - [`exit`]: exit codes and the one-line error report.
//!
//! The order in which a service's `main` uses them:
//!
//! ```text
//! exit::parse_args ─▶ ClusterConfig::load ─▶ program::run: init_logging, metrics_recorder
//!     ─▶ bind sockets ─▶ Readiness::new, Shutdown::new
//!     ─▶ spawn tasks, serve_http(probes + own routes)
//!     ─▶ latches released: /readyz answers 200
//!     ─▶ wait_for_signal ─▶ Readiness::drain ─▶ Shutdown::drain(deadline) ─▶ exit code
//! ```

pub mod cluster;
pub mod exit;
pub mod health;
pub mod http;
pub mod open_files;
mod process_metrics;
pub mod program;
pub mod shutdown;
pub mod telemetry;
pub mod trace;
pub mod units;

pub use cluster::{ClusterConfig, ConfigError, HostPort, NodeAddresses, NodeConfig, VolumePolicy};
pub use exit::Failure;
pub use health::{Readiness, ReadyLatch};
pub use shutdown::Shutdown;
pub use telemetry::LogFormat;
pub use units::{ByteSize, HumanDuration};
