//! An image into a volume.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use nbd_api::{CreateVolume, Labels};
use nbd_proto::ExportName;
use nbd_service::ByteSize;
use xxhash_rust::xxh3::xxh3_128;

use super::endpoint::Endpoint;
use super::engine::{self, Shared};
use super::file::{Identity, LocalFile};
use super::journal::{self, Journal, Record, Subject};
use super::progress::{Progress, bytes};
use super::qemu::{self, QemuNbd};
use super::remote::Remote;
use super::{Common, RAW, behind_qemu, is_stream, stream, summary, verify};
use crate::api::{Connection, Url};
use crate::failure::{CONFLICT, Failure};
use crate::output::Session;

/// Flags of `nbdctl import`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
An interrupted import goes on where it was when the same command is given again, if the volume still
holds what it left there; in a volume that may be another one it starts over, and writes over data
only with --overwrite. One of standard input cannot go on.

Examples:
  nbdctl import disk.img vol1 --create
  nbdctl import disk.qcow2 vol1 --verify
  zstd -dc disk.img.zst | nbdctl import - vol1")]
pub(crate) struct Args {
    /// The image; - is standard input, for raw images.
    pub(super) file: PathBuf,

    /// The volume. Behind the end of the image it will have zeroes.
    volume: ExportName,

    /// The image's format: raw, or one that qemu-img knows. Default: qcow2 if it begins like one,
    /// else raw.
    #[arg(long)]
    format: Option<String>,

    /// Create the volume, by the control API, as large as the image.
    #[arg(long)]
    create: bool,

    /// Create it with this size instead.
    #[arg(long, requires = "create", value_name = "SIZE")]
    size: Option<ByteSize>,

    /// Write over what the volume holds.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    pub(super) common: Common,
}

/// Where an import begins.
enum Start {
    /// Where an earlier run was interrupted.
    At(Record),
    /// At the beginning, for a reason that a person should know. The data that the volume holds
    /// may be that of an earlier run of ours.
    Over { why: Option<&'static str>, ours: bool },
}

pub(super) async fn run(
    args: &Args,
    connection: &Connection,
    progress: Arc<Progress>,
) -> Result<(), Failure> {
    if is_stream(&args.file) {
        if args.format.as_ref().is_some_and(|format| format != RAW) {
            let what = "standard input carries raw images only: others are not in order";
            return Err(Failure::usage(what));
        }
        if args.create && args.size.is_none() {
            let what = "how much standard input holds is not known: give --size, too";
            return Err(Failure::usage(what));
        }
        return Ok(from_stream(args, connection, progress).await?);
    }
    Ok(from_file(args, connection, progress).await?)
}

async fn from_file(args: &Args, connection: &Connection, progress: Arc<Progress>) -> Result<()> {
    let began = Instant::now();
    let Args { file, volume, common, .. } = args;
    let format = format(args, &progress)?;
    // Before it is read: a change while it is read is one.
    let identity = Identity::of(file)?;
    let (source, _server) = open(file, &format, &progress).await?;
    if args.create {
        create(args, source.size(), connection, Some(&format!("{identity:?}"))).await?;
    }
    let target = target(args, source.size(), &progress).await?;

    let (server, name) = (common.nbd.to_string(), volume.as_str());
    let journal = Journal::open(journal::of_import(identity.path(), &server, name)?)?;
    let subject = Subject {
        what: "import".to_owned(),
        file: Some(identity.clone()),
        format,
        server,
        volume: name.to_owned(),
        volume_size: target.size(),
    };
    let record = match start(args, &journal, &subject, &source, &target).await? {
        Start::At(record) => {
            let done = bytes(record.done);
            progress.say(&format!("going on at {done}, where an earlier run was interrupted"));
            record
        }
        Start::Over { why, ours } => {
            if let Some(why) = why {
                progress.say(&format!("starting over: {why}"));
            }
            if !ours {
                refuse_data(args, &target).await?;
            }
            Record::new(subject)
        }
    };
    // Before the first byte: whatever is found in the volume later is ours.
    journal.store(&record)?;
    let from = record.done;
    let shared = Arc::new(Shared::new(target, Arc::clone(&progress), common.verify));
    let journal = Arc::new(journal);
    engine::run(&shared, &source, &journal, record).await?;
    if Identity::of(file)? != identity {
        bail!("{} was changed while it was read; give the command again", file.display());
    }
    if common.verify {
        progress.say("verifying");
        verify::run(&shared, Some(&source)).await?;
    }
    finish(journal)?;
    let done = format!("imported {} into {name}", file.display());
    progress.say(&summary(&done, source.size(), from, &progress, began));
    Ok(())
}

async fn from_stream(args: &Args, connection: &Connection, progress: Arc<Progress>) -> Result<()> {
    let began = Instant::now();
    if args.create {
        // Nothing tells one stream from another: a volume that is there is not its own.
        create(args, 0, connection, None).await?;
    }
    let target = target(args, 0, &progress).await?;
    refuse_data(args, &target).await?;
    let shared = Arc::new(Shared::new(target, Arc::clone(&progress), args.common.verify));
    let name = args.volume.as_str();
    let size = stream::import(&shared, tokio::io::stdin(), name).await?;
    if args.common.verify {
        progress.say("verifying");
        verify::run(&shared, None).await?;
    }
    let done = format!("imported standard input into {name}");
    progress.say(&summary(&done, size, 0, &progress, began));
    Ok(())
}

/// As said, or by the first bytes.
fn format(args: &Args, progress: &Progress) -> Result<String> {
    if let Some(format) = &args.format {
        return Ok(format.clone());
    }
    if qemu::is_qcow2(&args.file)? {
        let file = args.file.display();
        progress.say(&format!("{file} begins like a qcow2 image and is taken as one"));
        return Ok("qcow2".to_owned());
    }
    Ok(RAW.to_owned())
}

async fn open(
    file: &Path,
    format: &str,
    progress: &Arc<Progress>,
) -> Result<(Endpoint, Option<QemuNbd>)> {
    if format == RAW {
        return Ok((Endpoint::File(Arc::new(LocalFile::open(file)?)), None));
    }
    let (server, source) = behind_qemu(file, format, true, Arc::clone(progress)).await?;
    Ok((source, Some(server)))
}

/// Creates the volume. An earlier run may have created it for the same `source`.
async fn create(
    args: &Args,
    size: u64,
    connection: &Connection,
    source: Option<&str>,
) -> Result<()> {
    // What a volume can have: whole sectors, and 4 KiB at least.
    let size = args.size.map_or(size, ByteSize::bytes).next_multiple_of(512).max(4096);
    let key = source.map(|source| format!("nbdctl-import-{:032x}", xxh3_128(source.as_bytes())));
    let volume = CreateVolume {
        name: args.volume.as_str().to_owned(),
        size: Some(size),
        description: String::new(),
        labels: Labels::default(),
    };
    let connection = connection.clone();
    let created = tokio::task::spawn_blocking(move || {
        let client = Session::new(&connection)?.client;
        client.create(&Url::new("/volumes"), &volume, key.as_deref())
    });
    created.await??;
    Ok(())
}

/// The volume, if the image fits in.
async fn target(args: &Args, size: u64, progress: &Arc<Progress>) -> Result<Endpoint> {
    let Args { file, volume, common, .. } = args;
    let remote = Remote::open(common.place(volume), Arc::clone(progress)).await?;
    if remote.is_read_only() {
        bail!("volume {volume} is read-only");
    }
    if size > remote.size() {
        let what = format!(
            "{} has {size} bytes, volume {volume} only {}; a new one is made large enough with \
             --create",
            file.display(),
            remote.size()
        );
        return Err(Failure::new(CONFLICT, what).into());
    }
    Ok(Endpoint::Remote(Arc::new(remote)))
}

/// Where to begin. An import goes on only in a volume that is known to be the one that it wrote
/// to: it holds each sample of data, and zeroes wherever the source had them. Without samples
/// (nothing but zeroes was carried, or nothing yet) it could be anyone's, and the import starts
/// over as in a volume that it has never seen: zeroes are soon told again.
async fn start(
    args: &Args,
    journal: &Journal,
    subject: &Subject,
    source: &Endpoint,
    target: &Endpoint,
) -> Result<Start> {
    let Some(record) = journal.load()? else {
        return Ok(Start::Over { why: None, ours: false });
    };
    let over = |why, ours| Ok(Start::Over { why: Some(why), ours });
    if record.subject.volume_size != subject.volume_size {
        return over("the volume is not the one of the interrupted run", false);
    }
    if record.samples.is_empty() {
        return over("the interrupted run had kept no account of data yet", false);
    }
    let other = "the volume does not hold what the interrupted run left there";
    if record.done > target.size() || !verify::holds(target, &record.samples).await? {
        return over(other, false);
    }
    if args.common.restart {
        return over("as told by --restart", true);
    }
    if record.subject != *subject {
        return over("the image has changed since the interrupted run", true);
    }
    if !verify::keeps_holes(source, target, record.done).await? {
        return over(other, false);
    }
    Ok(Start::At(record))
}

/// Fails if the volume holds data that may not be overwritten.
async fn refuse_data(args: &Args, target: &Endpoint) -> Result<()> {
    if args.overwrite {
        return Ok(());
    }
    let Args { volume, .. } = args;
    if matches!(target, Endpoint::Remote(remote) if !remote.has_status()) {
        bail!("whether volume {volume} holds data is not known; --overwrite writes over it");
    }
    let mut at = 0;
    while at < target.size() {
        for stretch in target.stretches(at, target.size() - at).await? {
            if !stretch.zero {
                let what = format!(
                    "volume {volume} holds data, at {at} first; --overwrite writes over it"
                );
                return Err(Failure::new(CONFLICT, what).into());
            }
            at += stretch.len;
        }
    }
    Ok(())
}

fn finish(journal: Arc<Journal>) -> Result<()> {
    match Arc::try_unwrap(journal) {
        Ok(journal) => journal.remove(),
        Err(_) => bail!("the journal is still being written"),
    }
}
