//! A volume into an image.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use nbd_proto::{ExportName, NbdError};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::endpoint::Endpoint;
use super::engine::{self, Shared};
use super::file::{Identity, LocalFile};
use super::journal::{self, Journal, Record, Subject, with_suffix};
use super::progress::{Progress, bytes};
use super::qemu::{self, QemuNbd};
use super::remote::Remote;
use super::{Common, RAW, behind_qemu, is_stream, stream, summary, verify};
use crate::failure::{CONFLICT, Failure};

/// Flags of `nbdctl export`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The image grows as FILE.part and gets its name once it is complete. An interrupted export goes on
where it was when the same command is given again. Of what is in the image already, only samples (64
pieces of a MiB at most) are then compared with the volume: if it was written to meanwhile, that may
stay unseen, and the image be partly as the volume was, partly as it is. --verify compares all of
it; --restart starts over. The same goes for writes while an export runs. One to standard output
cannot go on.

Examples:
  nbdctl export vol1 disk.img
  nbdctl export vol1 disk.qcow2 --format qcow2
  nbdctl export vol1 - | zstd > disk.img.zst")]
pub(crate) struct Args {
    /// The volume.
    volume: ExportName,

    /// The image; - is standard output, for raw images.
    pub(super) file: PathBuf,

    /// The image's format: raw, or one that qemu-img can write (qcow2, say).
    #[arg(long, default_value = RAW)]
    format: String,

    /// Replace a file that is there.
    #[arg(long)]
    overwrite: bool,

    #[command(flatten)]
    pub(super) common: Common,
}

pub(super) async fn run(args: &Args, progress: Arc<Progress>) -> Result<(), Failure> {
    if !is_stream(&args.file) {
        return Ok(to_file(args, progress).await?);
    }
    if args.format != RAW {
        let what = "standard output carries raw images only: others are not in order";
        return Err(Failure::usage(what));
    }
    if args.common.verify {
        let what = "what went through standard output cannot be read back to --verify";
        return Err(Failure::usage(what));
    }
    Ok(to_stream(args, progress).await?)
}

async fn to_file(args: &Args, progress: Arc<Progress>) -> Result<()> {
    let began = Instant::now();
    let Args { volume, file, format, overwrite, common } = args;
    match file.symlink_metadata() {
        Ok(data) if !data.is_file() => bail!("{} is there and is no file", file.display()),
        Ok(_) if !overwrite => {
            return Err(is_there(file));
        }
        _ => {}
    }
    let source = source(args, &progress).await?;
    let part = with_suffix(file, ".part");
    let journal = Journal::open(journal::of_export(&part))?;
    let subject = |file| Subject {
        what: "export".to_owned(),
        file,
        format: format.clone(),
        server: common.nbd.to_string(),
        volume: volume.as_str().to_owned(),
        volume_size: source.size(),
    };
    let (record, why) = start(args, &journal, &subject, &source, &part).await?;
    let keep = record.as_ref().map_or(0, |record| record.done);
    if let Some(why) = why {
        progress.say(&format!("starting over: {why}"));
    }
    if keep > 0 {
        let done = bytes(keep);
        progress.say(&format!("going on at {done}, where an earlier run was interrupted"));
    }
    let (target, server) = open(&part, format, source.size(), keep, &progress).await?;
    // The file's own number is known only now.
    let record = match record {
        Some(record) => record,
        None => Record::new(subject(Some(Identity::of(&part)?))),
    };
    journal.store(&record)?;
    let shared = Arc::new(Shared::new(target, Arc::clone(&progress), common.verify));
    let journal = Arc::new(journal);
    let copied = engine::run(&shared, &source, &journal, record).await;
    copied.map_err(|error| disk_full(error, &part))?;
    if common.verify {
        progress.say("verifying");
        if let Endpoint::File(file) = &shared.target {
            file.sync().await?;
            file.forget_cached().await?;
        }
        verify::run(&shared, Some(&source)).await?;
    }
    drop(shared);
    if let Some(server) = server {
        server.stop().await?;
        if keep > 0 {
            qemu::repair_leaks(&part, format)?;
        }
    }
    complete(&part, file, *overwrite)?;
    match Arc::try_unwrap(journal) {
        Ok(journal) => journal.remove()?,
        Err(_) => bail!("the journal is still being written"),
    }
    let done = format!("exported {volume} to {}", file.display());
    progress.say(&summary(&done, source.size(), keep, &progress, began));
    Ok(())
}

async fn to_stream(args: &Args, progress: Arc<Progress>) -> Result<()> {
    let began = Instant::now();
    let source = source(args, &progress).await?;
    // The target is the source: there is none to write to at places.
    let shared = Arc::new(Shared::new(source.clone(), Arc::clone(&progress), false));
    stream::export(&shared, &source, tokio::io::stdout()).await?;
    let done = format!("exported {}", args.volume);
    progress.say(&summary(&done, source.size(), 0, &progress, began));
    Ok(())
}

async fn source(args: &Args, progress: &Arc<Progress>) -> Result<Endpoint> {
    let remote = Remote::open(args.common.place(&args.volume), Arc::clone(progress)).await?;
    Ok(Endpoint::Remote(Arc::new(remote)))
}

/// Where to begin, and why at the beginning, if that is news.
async fn start(
    args: &Args,
    journal: &Journal,
    subject: &impl Fn(Option<Identity>) -> Subject,
    source: &Endpoint,
    part: &Path,
) -> Result<(Option<Record>, Option<&'static str>)> {
    let Some(record) = journal.load()? else { return Ok((None, None)) };
    if args.common.restart {
        return Ok((None, Some("as told by --restart")));
    }
    let Some(found) = part.exists().then(|| Identity::of(part)).transpose()? else {
        return Ok((None, Some("the unfinished image is gone")));
    };
    if record.subject.file.as_ref().map(Identity::inode) != Some(found.inode()) {
        return Ok((None, Some("the unfinished image is another file")));
    }
    if record.subject != subject(record.subject.file.clone()) {
        return Ok((None, Some("the interrupted run was of another volume or format")));
    }
    if record.done > source.size() || !verify::holds(source, &record.samples).await? {
        return Ok((None, Some("the volume has changed since the interrupted run")));
    }
    Ok((Some(record), None))
}

async fn open(
    part: &Path,
    format: &str,
    size: u64,
    keep: u64,
    progress: &Arc<Progress>,
) -> Result<(Endpoint, Option<QemuNbd>)> {
    if format == RAW {
        return Ok((Endpoint::File(Arc::new(LocalFile::create(part, size, keep)?)), None));
    }
    if keep == 0 {
        qemu::create(part, format, size)?;
    }
    let (server, target) = behind_qemu(part, format, false, Arc::clone(progress)).await?;
    if target.size() < size {
        bail!("a {format} image of {size} bytes has only {}", target.size());
    }
    Ok((target, Some(server)))
}

fn is_there(file: &Path) -> anyhow::Error {
    let what = format!("{} is there already; --overwrite replaces it", file.display());
    Failure::new(CONFLICT, what).into()
}

/// Gives the image its name. Without `overwrite`, a file that has come up meanwhile stays.
fn rename(part: &Path, file: &Path, overwrite: bool) -> Result<()> {
    let about = || format!("rename {} to {}", part.display(), file.display());
    if !overwrite {
        match renameat_with(CWD, part, CWD, file, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => return Err(is_there(file)),
            // Not every file system knows it.
            Err(Errno::INVAL | Errno::NOSYS) if file.symlink_metadata().is_ok() => {
                return Err(is_there(file));
            }
            Err(Errno::INVAL | Errno::NOSYS) => {}
            Err(error) => return Err(error).with_context(about),
        }
    }
    fs::rename(part, file).with_context(about)
}

/// Makes the image durable under its name.
fn complete(part: &Path, file: &Path, overwrite: bool) -> Result<()> {
    let about = || format!("sync {}", part.display());
    File::open(part).and_then(|part| part.sync_all()).with_context(about)?;
    rename(part, file, overwrite)?;
    let directory = match file.parent() {
        Some(directory) if directory != Path::new("") => directory,
        _ => Path::new("."),
    };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.with_context(|| format!("sync {}", directory.display()))
}

/// Says what to do when there is no room.
fn disk_full(error: anyhow::Error, part: &Path) -> anyhow::Error {
    use std::io::ErrorKind;
    let full = error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        let nbd = cause.downcast_ref::<nbd_client::Error>().and_then(nbd_client::Error::nbd_error);
        matches!(io, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded))
            || nbd == Some(NbdError::NoSpc)
    });
    if !full {
        return error;
    }
    error.context(format!(
        "the disk is full; {} keeps what is there: make room and give the same command again",
        part.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_came_up_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let (part, file) = (directory.path().join("image.part"), directory.path().join("image"));
        fs::write(&part, "new").unwrap();
        fs::write(&file, "theirs").unwrap();
        let failure = Failure::from(complete(&part, &file, false).unwrap_err());
        assert_eq!(failure.code(), CONFLICT, "{failure}");
        assert_eq!(fs::read(&file).unwrap(), b"theirs");
        assert!(part.exists(), "what was copied is kept");
        complete(&part, &file, true).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        fs::rename(&file, &part).unwrap();
        complete(&part, &file, false).unwrap();
        assert!(!part.exists() && file.exists());
    }
}
