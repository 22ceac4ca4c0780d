//! Takes down what a run has made, however the run ends.
//!
//! A process of its own, which outlives the run: it waits for its standard input to end, as it does
//! when the run is over, fails, is interrupted or killed, and then removes what bears the project's
//! name. So there is one way in which everything goes, and every run takes it.

use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::engine::{docker, ids};

/// Time until it is looked for what came meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How often at most.
const ROUNDS_MAX: u32 = 10;

/// The process that waits for the end of this one.
#[derive(Debug)]
pub(crate) struct Sweeper {
    child: Child,
}

impl Sweeper {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub(crate) fn start(project: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("the path of this program")?;
        let mut command = Command::new(program);
        // A group of its own: Ctrl-C at a terminal goes to the whole group of the run.
        command.args(["sweep", project]).stdin(Stdio::piped()).process_group(0);
        Ok(Self { child: command.spawn().context("start the sweeper")? })
    }

    /// Lets it sweep now, and waits until it has.
    ///
    /// # Errors
    /// Something is left.
    pub(crate) fn sweep(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the sweeper")?;
        if !status.success() {
            bail!("the sweeper: {status}");
        }
        Ok(())
    }
}

/// What the process does.
///
/// # Errors
/// Something is left.
pub(crate) fn main(project: &str) -> anyhow::Result<()> {
    // What comes is of no interest; an error is an end as well.
    let _ = io::stdin().read_to_end(&mut Vec::new());
    // A call of compose that the run was in the middle of may still be making things, or removing
    // them: what then fails is tried again.
    for _ in 0..ROUNDS_MAX {
        match sweep(project) {
            Ok(false) => return remove(&["rmi", "--force"], &images(project)?),
            Ok(true) => {}
            Err(error) => eprintln!("removing what is left of {project} again: {error:#}"),
        }
        thread::sleep(LOOK_AGAIN);
    }
    bail!("containers, networks or volumes of {project} are left")
}

/// Removes containers, networks and volumes, as far as it can. Whether there were any.
fn sweep(project: &str) -> anyhow::Result<bool> {
    let kinds = [
        (&["ps", "--all"][..], &["rm", "--force", "--volumes"][..]),
        (&["network", "ls"], &["network", "rm"]),
        (&["volume", "ls"], &["volume", "rm"]),
    ];
    let (mut found, mut failed) = (false, None);
    for (listing, removal) in kinds {
        let removed = ids(listing, project).and_then(|ids| {
            found |= !ids.is_empty();
            remove(removal, &ids)
        });
        failed = failed.or_else(|| removed.err());
    }
    failed.map_or(Ok(found), Err)
}

/// The tags of the run's images.
fn images(project: &str) -> anyhow::Result<Vec<String>> {
    let listed = docker(&["image", "ls", "--format", "{{.Repository}}:{{.Tag}}"])?;
    Ok(listed.lines().filter(|tag| is_image_of(tag, project)).map(str::to_owned).collect())
}

/// The image of a project's containers.
pub(crate) fn image_of(project: &str) -> String {
    format!("{project}:test")
}

fn is_image_of(tag: &str, project: &str) -> bool {
    tag.strip_prefix(project).is_some_and(|rest| rest.starts_with(':'))
}

fn remove(words: &[&str], names: &[String]) -> anyhow::Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    docker(&[words, &names].concat()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_projects_own_images_go() {
        let project = "cinderblock-test-1";
        assert!(is_image_of(&image_of(project), project));
        assert!(is_image_of(&(image_of(project) + "-prebuilt"), project));
        for other in ["cinderblock:dev", "cinderblock-test-12:test", "x/cinderblock-test-1:test"] {
            assert!(!is_image_of(other, project), "{other}");
        }
    }
}
