//! `nbdctl import` and `nbdctl export`: images into volumes and out of them.
//!
//! - `endpoint`: what is copied from and to: `file`, a raw image; `remote`, a volume, or an image
//!   in another format behind a `qemu-nbd` of our own (`qemu`).
//! - `engine`: copies pieces, many at a time. `stream`: the same for pipes. `verify`: compares.
//! - `journal`: how far a copy has come, for the next run. `progress`: the same for people.
//! - `import`, `export`: what each checks before and does behind.

mod endpoint;
mod engine;
mod export;
mod file;
mod import;
mod journal;
mod progress;
mod qemu;
mod remote;
mod stream;
mod verify;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nbd_client::Address;
use nbd_proto::ExportName;
use nbd_service::{HostPort, HumanDuration, shutdown};

use self::endpoint::Endpoint;
use self::progress::{Progress, bytes, time};
use self::qemu::QemuNbd;
use self::remote::{Place, Remote};

use crate::api::Connection;
use crate::failure::{FAILED, Failure};

pub(crate) use self::export::Args as ExportArgs;
pub(crate) use self::import::Args as ImportArgs;

/// The format that needs no one's help.
const RAW: &str = "raw";

/// What an interrupted copy of files says.
const GOES_ON: &str = "interrupted; the same command goes on from here";

/// Threads that copy. The work is the kernel's; more than these only wait for it.
const THREADS: usize = 4;

/// Flags of both directions.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// Where NBD is served: the load balancer, or any replica.
    #[arg(long, env = "NBDCTL_NBD", default_value = "127.0.0.1:10809", value_name = "ADDR")]
    nbd: HostPort,

    /// Read everything back and compare.
    #[arg(long)]
    verify: bool,

    /// Start over, wherever an earlier run was interrupted.
    #[arg(long)]
    restart: bool,

    /// How long to try to reach a server again that is lost.
    #[arg(long, default_value = "60s", value_name = "TIME")]
    retry_for: HumanDuration,

    /// Say nothing but what is wrong.
    #[arg(long, short)]
    quiet: bool,
}

/// Copies an image into a volume.
pub(crate) fn import(args: ImportArgs, connection: &Connection) -> Result<(), Failure> {
    let progress = Arc::new(Progress::new(args.common.quiet));
    let interrupted = if is_stream(&args.file) {
        "interrupted; the volume holds a part of it. What comes from standard input cannot go on: \
         give the command again with --overwrite and all of the image"
    } else {
        GOES_ON
    };
    run(&progress, interrupted, import::run(&args, connection, Arc::clone(&progress)))
}

/// Copies a volume into an image.
pub(crate) fn export(args: ExportArgs) -> Result<(), Failure> {
    let progress = Arc::new(Progress::new(args.common.quiet));
    let interrupted = if is_stream(&args.file) {
        "interrupted; what went to standard output is a part of the image only, and cannot go on"
    } else {
        GOES_ON
    };
    run(&progress, interrupted, export::run(&args, Arc::clone(&progress)))
}

/// Runs a copy until it ends or is interrupted, and shows how it gets on.
fn run(
    progress: &Arc<Progress>,
    interrupted: &str,
    copy: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(THREADS).enable_all().build().context("start threads")?;
    let ended = runtime.block_on(async {
        tokio::select! {
            ended = copy => ended,
            () = progress.show() => unreachable!("it is shown as long as it lasts"),
            signal = shutdown::wait_for_signal() => {
                signal.context("watch for signals")?;
                Err(Failure::new(FAILED, interrupted))
            }
        }
    });
    progress.clear();
    // A read of standard input may never return.
    runtime.shutdown_background();
    ended
}

impl Common {
    fn place(&self, volume: &ExportName) -> Place {
        let shown = if volume.is_empty() { "default" } else { volume.as_str() };
        Place {
            address: Address::Tcp(self.nbd.to_string()),
            export: volume.clone(),
            name: shown.to_owned(),
            retry_for: self.retry_for.get(),
        }
    }
}

/// An image behind a `qemu-nbd` of our own.
async fn behind_qemu(
    path: &Path,
    format: &str,
    read_only: bool,
    progress: Arc<Progress>,
) -> Result<(QemuNbd, Endpoint)> {
    let server = QemuNbd::start(path, format, read_only).await?;
    let place = Place {
        address: Address::Unix(server.socket().to_owned()),
        export: ExportName::default(),
        name: path.display().to_string(),
        // It ends when it cannot go on, and then does not come back.
        retry_for: Duration::from_secs(1),
    };
    let remote = Remote::open(place, progress).await?;
    Ok((server, Endpoint::Remote(Arc::new(remote))))
}

/// What a copy came to, in a line.
fn summary(done: &str, size: u64, from: u64, progress: &Progress, began: Instant) -> String {
    let (carried, passed) = (progress.carried(), began.elapsed());
    let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = carried.saturating_mul(1000) / millis;
    let resumed = match from {
        0 => String::new(),
        from => format!(", from {} on", bytes(from)),
    };
    format!(
        "{done}: {}, {carried} bytes of data carried{resumed} in {}, {}/s",
        bytes(size),
        time(passed.as_secs()),
        bytes(rate)
    )
}

/// Whether a path stands for standard input or output.
fn is_stream(path: &Path) -> bool {
    path == "-"
}
