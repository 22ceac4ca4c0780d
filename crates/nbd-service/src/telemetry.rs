//! Logs to standard error, and the process's metrics recorder.
//!
//! Both are process-wide by nature of the `tracing` and `metrics` crates: each is set up once, by
//! `main`, and a second attempt is an error. Libraries only emit.
//!
//! A process of several services gives each of them threads of its own: [`init_logging_by_thread`]
//! then says which service speaks, and a [`ThreadRecorder`] counts for one service only.

use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusRecorder};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};

pub use metrics_exporter_prometheus::PrometheusHandle;

/// Upper bounds of the buckets of every histogram, in seconds: 20 us to 10 s, three to a decade and
/// finer where a write to a fast disk falls (one durable 4 KiB write takes 120 to 300 us). A
/// histogram that does not count seconds should not use this recorder's defaults.
pub const HISTOGRAM_BUCKETS_SECONDS: [f64; 20] = [
    20e-6, 50e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 750e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3,
    50e-3, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0,
];

/// The same for histograms named `..._stall_seconds` (how long a client stood still), which are
/// about failovers and lost majorities: 1 ms to 60 s, finest where failovers are promised to end
/// (500 ms after the leader's death, 1.5 s after it falls silent).
pub const STALL_BUCKETS_SECONDS: [f64; 16] =
    [1e-3, 3e-3, 10e-3, 30e-3, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 3.0, 10.0, 30.0, 60.0];

/// How often recorded samples are folded into their buckets. Until then each one is kept, 16 bytes
/// apiece: at 100,000 requests a second and eight samples a request, 1 s holds 13 MB.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What log lines look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// One readable line for each event, coloured when standard error is a terminal.
    #[default]
    Text,
    /// One JSON object for each event, for collectors.
    Json,
}

/// Why logs or metrics could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not a list of `target=level`. Allowed: `info`, `nbd_replica=debug,info`.
    #[error("log filter {filter:?} is not valid (write \"info\" or \"nbd_replica=debug,info\")")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Somebody set the process's logger before.
    #[error("logging is already set up in this process")]
    LoggerSet(#[source] TryInitError),
    /// Somebody set the process's metrics recorder before, or it could not be built.
    #[error("install metrics recorder")]
    Recorder(#[source] BuildError),
    /// The thread that folds samples into histograms could not be started.
    #[error("start metrics upkeep thread")]
    Upkeep(#[source] std::io::Error),
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// A log format that is neither `text` nor `json`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a log format: use \"text\" or \"json\"")]
pub struct UnknownLogFormat(String);

impl FromStr for LogFormat {
    type Err = UnknownLogFormat;

    fn from_str(text: &str) -> Result<Self, UnknownLogFormat> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(UnknownLogFormat(other.to_owned())),
        }
    }
}

/// Sends the process's log events to standard error.
///
/// `filter` says which (`info`, `nbd_replica=debug,info`); `None` takes it from `RUST_LOG`, and
/// `info` if that is unset or empty.
///
/// # Errors
/// A filter that does not parse; a logger set before.
pub fn init_logging(format: LogFormat, filter: Option<&str>) -> Result<(), TelemetryError> {
    init(format, filter, false)
}

/// As [`init_logging`], with the name of the thread in each line (`threadName` in JSON).
///
/// # Errors
/// As [`init_logging`].
pub fn init_logging_by_thread(
    format: LogFormat,
    filter: Option<&str>,
) -> Result<(), TelemetryError> {
    init(format, filter, true)
}

fn init(format: LogFormat, filter: Option<&str>, thread_names: bool) -> Result<(), TelemetryError> {
    let from_environment = std::env::var("RUST_LOG").ok();
    let filter = effective_filter(filter, from_environment.as_deref())?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let builder = builder.with_thread_names(thread_names);
    match format {
        LogFormat::Text => {
            let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
            builder.with_ansi(colour).finish().try_init()
        }
        LogFormat::Json => builder.json().finish().try_init(),
    }
    .map_err(TelemetryError::LoggerSet)
}

fn effective_filter(
    given: Option<&str>,
    environment: Option<&str>,
) -> Result<EnvFilter, TelemetryError> {
    let set = environment.filter(|text| !text.trim().is_empty());
    let text = given.or(set).unwrap_or("info");
    EnvFilter::builder()
        .parse(text)
        .map_err(|source| TelemetryError::Filter { filter: text.to_owned(), source })
}

/// Installs the process's metrics recorder and returns the handle that renders it for Prometheus.
///
/// A thread named `metrics-upkeep` is started with it, for the life of the process: it bounds the
/// samples kept in memory also when nobody scrapes.
///
/// # Errors
/// A recorder installed before.
pub fn metrics_recorder() -> Result<PrometheusHandle, TelemetryError> {
    let handle = builder()
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(TelemetryError::Recorder)?;
    keep_up(handle.clone())?;
    Ok(handle)
}

/// A recorder that counts what certain threads register, for one of several services in a process.
/// Copies are the same one.
///
/// A metric stays with the recorder of the thread that registered it, whoever uses it afterwards.
/// So a service counts here if it registers its metrics on threads of its own, each of which called
/// [`enter`](Self::enter) when it began.
#[derive(Clone, Copy)]
pub struct ThreadRecorder {
    recorder: &'static PrometheusRecorder,
}

impl ThreadRecorder {
    /// A recorder for the rest of the process's life, with a thread as [`metrics_recorder`] starts.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new() -> Result<Self, TelemetryError> {
        let recorder = builder().map_err(TelemetryError::Recorder)?.build_recorder();
        keep_up(recorder.handle())?;
        Ok(Self { recorder: Box::leak(Box::new(recorder)) })
    }

    /// Renders what was counted for Prometheus.
    #[must_use]
    pub fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }

    /// Takes what the calling thread registers from now on, to its end.
    pub fn enter(&self) {
        // The guard would give the thread back to whichever recorder it had before.
        std::mem::forget(metrics::set_default_local_recorder(self.recorder));
    }
}

impl fmt::Debug for ThreadRecorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadRecorder").finish_non_exhaustive()
    }
}

/// Starts the thread that folds samples into their buckets.
fn keep_up(upkeep: PrometheusHandle) -> Result<(), TelemetryError> {
    thread::Builder::new()
        .name("metrics-upkeep".to_owned())
        .spawn(move || {
            loop {
                thread::sleep(UPKEEP_INTERVAL);
                upkeep.run_upkeep();
            }
        })
        .map_err(TelemetryError::Upkeep)?;
    Ok(())
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let stalls = Matcher::Suffix("_stall_seconds".to_owned());
    PrometheusBuilder::new()
        .set_buckets(&HISTOGRAM_BUCKETS_SECONDS)?
        .set_buckets_for_metric(stalls, &STALL_BUCKETS_SECONDS)
}

/// A recorder's handle that belongs to no process, for tests of routes.
#[cfg(test)]
pub(crate) fn detached_handle() -> PrometheusHandle {
    builder().unwrap().build_recorder().handle()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_wins_over_the_environment_and_info_is_the_default() {
        let filter = |given, environment| effective_filter(given, environment).unwrap().to_string();
        assert_eq!(filter(None, None), "info");
        assert_eq!(filter(None, Some(" ")), "info");
        assert_eq!(filter(None, Some("warn")), "warn");
        assert_eq!(filter(Some("debug"), Some("warn")), "debug");
        let error = effective_filter(Some("a=b=c"), None).unwrap_err();
        assert!(error.to_string().contains("\"a=b=c\""), "{error}");
    }

    #[test]
    fn each_is_set_up_once() {
        init_logging(LogFormat::Text, Some("off")).unwrap();
        let again = init_logging(LogFormat::Json, Some("off"));
        assert!(matches!(again, Err(TelemetryError::LoggerSet(_))), "{again:?}");

        let handle = metrics_recorder().unwrap();
        metrics::histogram!("stage_seconds").record(0.00015);
        assert!(handle.render().contains("stage_seconds_bucket{le=\"0.00015\"} 1"));
        metrics::histogram!("some_stall_seconds").record(40.0);
        assert!(handle.render().contains("some_stall_seconds_bucket{le=\"60\"} 1"));
        assert!(matches!(metrics_recorder(), Err(TelemetryError::Recorder(_))));
    }

    #[test]
    fn a_thread_counts_where_it_entered() {
        let [one, other] = [(); 2].map(|()| ThreadRecorder::new().unwrap());
        let count = |recorder: ThreadRecorder, times| {
            let register = move || {
                recorder.enter();
                metrics::counter!("rounds_total")
            };
            thread::spawn(register).join().unwrap().increment(times);
        };
        count(one, 1);
        count(other, 2);
        count(one, 4);
        assert!(one.handle().render().contains("rounds_total 5"), "{}", one.handle().render());
        assert!(other.handle().render().contains("rounds_total 2"));
    }

    #[test]
    fn buckets_rise() {
        assert!(HISTOGRAM_BUCKETS_SECONDS.is_sorted_by(|a, b| a < b));
        assert!(STALL_BUCKETS_SECONDS.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn formats_parse_as_they_print() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("xml".parse::<LogFormat>().is_err());
    }
}
