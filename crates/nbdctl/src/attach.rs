//! `nbdctl attach` and `nbdctl detach`: volumes as block devices, by the kernel's NBD client.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, anyhow, bail};
use nbd_proto::ExportName;
use nbd_service::{Failure, HostPort};

/// Where the kernel shows its block devices.
const SYS_BLOCK: &str = "/sys/block";

/// Seconds without an answer after which the kernel gives a connection up. It has to be said: with
/// several connections the kernel's own limit of 30 s counts otherwise, and a cluster without a
/// majority may well pause for longer and then go on.
const TIMEOUT_S: u32 = 600;

/// Flags of `nbdctl attach`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Needs nbd-client, the kernel's nbd module, and root. --print shows the command and runs nothing.

Examples:
  sudo nbdctl attach vol1
  nbdctl attach vol1 --device /dev/nbd3 --print")]
pub(crate) struct AttachArgs {
    /// The volume; it is created where the cluster creates volumes by attaching.
    volume: ExportName,

    /// The device. Default: the first /dev/nbdN that is free.
    #[arg(long, value_name = "/dev/nbdN")]
    device: Option<PathBuf>,

    /// Where NBD is served: the load balancer, or any replica.
    #[arg(long, env = "NBDCTL_NBD", default_value = "127.0.0.1:10809", value_name = "ADDR")]
    nbd: HostPort,

    /// Connections the kernel makes: requests of different CPUs need not wait for each other.
    #[arg(long, default_value_t = 4, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=64))]
    connections: u32,

    /// Only print the command.
    #[arg(long)]
    print: bool,
}

/// Flags of `nbdctl detach`.
#[derive(Debug, clap::Args)]
pub(crate) struct DetachArgs {
    /// The device, as /dev/nbdN.
    device: PathBuf,

    /// Only print the command.
    #[arg(long)]
    print: bool,
}

/// A command line, and what stands in the way of running it.
#[derive(Debug)]
struct Plan {
    arguments: Vec<String>,
    obstacle: Option<String>,
}

/// Attaches a volume.
pub(crate) fn attach(args: &AttachArgs) -> Result<(), Failure> {
    let (device, busy) = match &args.device {
        Some(device) => {
            number(device).map_err(Failure::Usage)?;
            (device.clone(), is_busy(Path::new(SYS_BLOCK), device))
        }
        None => (free_device(Path::new(SYS_BLOCK)), false),
    };
    let obstacle = busy.then(|| format!("{} is in use", device.display())).or_else(obstacle);
    let plan = Plan { arguments: attach_arguments(args, &device), obstacle };
    if plan.run(args.print)? {
        let (device, volume) = (device.display(), &args.volume);
        println!("{volume} is {device}");
        println!("for a new file system: mkfs.ext4 {device} && mount {device} /mnt");
        println!("to detach it: umount /mnt && nbdctl detach {device}");
    }
    Ok(())
}

/// Detaches a device.
pub(crate) fn detach(args: &DetachArgs) -> Result<(), Failure> {
    number(&args.device).map_err(Failure::Usage)?;
    let device = args.device.display();
    let arguments = vec!["nbd-client".to_owned(), "-d".to_owned(), device.to_string()];
    let free = !is_busy(Path::new(SYS_BLOCK), &args.device);
    let not_attached = || format!("{device} is not attached");
    let obstacle = obstacle().or_else(|| free.then(not_attached));
    if (Plan { arguments, obstacle }).run(args.print)? {
        println!("{device} is detached");
    }
    Ok(())
}

impl Plan {
    /// Runs the command, unless it is only to be printed. Whether it ran.
    fn run(&self, print: bool) -> Result<bool> {
        let line = shell_line(&self.arguments);
        if print {
            println!("{line}");
            if let Some(obstacle) = &self.obstacle {
                eprintln!("it cannot run here: {obstacle}");
            }
            return Ok(false);
        }
        if let Some(obstacle) = &self.obstacle {
            println!("{line}");
            bail!("the command above cannot run here: {obstacle}");
        }
        let program = find_program(&self.arguments[0]).context("nbd-client is gone")?;
        let status = Command::new(program).args(&self.arguments[1..]).status();
        let status = status.context("start nbd-client")?;
        if !status.success() {
            println!("{line}");
            bail!("the command above ended with {status}");
        }
        Ok(true)
    }
}

/// - `-block-size 512`: partition tables of images count in sectors of 512 bytes.
/// - `-connections`: a cluster keeps several of them consistent.
/// - `-timeout`: see [`TIMEOUT_S`].
/// - `-persist`: a load balancer that is replaced is connected to again.
fn attach_arguments(args: &AttachArgs, device: &Path) -> Vec<String> {
    let AttachArgs { volume, nbd, connections, .. } = args;
    let (host, port) = (nbd.host(), nbd.port().to_string());
    let (connections, timeout) = (connections.to_string(), TIMEOUT_S.to_string());
    let mut arguments = vec!["nbd-client", host.trim_matches(['[', ']']), &port];
    let device = device.display().to_string();
    arguments.extend([device.as_str(), "-name", volume.as_str(), "-block-size", "512"]);
    arguments.extend(["-connections", &connections, "-timeout", &timeout, "-persist"]);
    arguments.into_iter().map(str::to_owned).collect()
}

/// What keeps `nbd-client` from running here, if anything does.
fn obstacle() -> Option<String> {
    if find_program("nbd-client").is_none() {
        let text = "nbd-client is not installed (`apt install nbd-client` on Debian and Ubuntu, \
                    `dnf install nbd` on Fedora)";
        return Some(text.to_owned());
    }
    if !Path::new(SYS_BLOCK).join("nbd0").exists() {
        let text = "the kernel's nbd module is not loaded (`modprobe nbd` as root)";
        return Some(text.to_owned());
    }
    (!rustix::process::geteuid().is_root()).then(|| "it has to run as root".to_owned())
}

/// The number of a device `/dev/nbdN`.
fn number(device: &Path) -> Result<u32> {
    let number = device.to_str().and_then(|text| text.strip_prefix("/dev/nbd")?.parse().ok());
    number.ok_or_else(|| anyhow!("{} is not of the form /dev/nbdN", device.display()))
}

/// The kernel shows the process that a device belongs to as long as it is attached.
fn is_busy(sys_block: &Path, device: &Path) -> bool {
    let Some(name) = device.file_name() else { return false };
    let shown = sys_block.join(name);
    let size = std::fs::read_to_string(shown.join("size")).unwrap_or_default();
    shown.join("pid").exists() || !matches!(size.trim(), "" | "0")
}

/// The first device that is free; `/dev/nbd0` when the kernel shows none at all.
fn free_device(sys_block: &Path) -> PathBuf {
    let devices = (0..).map(|number| PathBuf::from(format!("/dev/nbd{number}")));
    let shown =
        |device: &PathBuf| device.file_name().is_some_and(|name| sys_block.join(name).exists());
    let free = devices.take_while(shown).find(|device| !is_busy(sys_block, device));
    free.unwrap_or_else(|| PathBuf::from("/dev/nbd0"))
}

/// The arguments as a shell takes them.
fn shell_line(arguments: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+=,".contains(c);
    let quoted = arguments.iter().map(|argument| {
        if !argument.is_empty() && argument.chars().all(plain) {
            argument.clone()
        } else {
            format!("'{}'", argument.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// The path of the program `name`: along `PATH`, then where only root's has what is for root.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let directories = std::env::split_paths(&path).chain(system);
    let is_program = |path: &PathBuf| {
        path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    directories.map(|directory| directory.join(name)).find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_device_is_found() {
        let sys = tempfile::tempdir().unwrap();
        assert_eq!(free_device(sys.path()), Path::new("/dev/nbd0"));
        for (name, size, pid) in [("nbd0", "8", true), ("nbd1", "16", false), ("nbd2", "0", false)]
        {
            let shown = sys.path().join(name);
            std::fs::create_dir(&shown).unwrap();
            std::fs::write(shown.join("size"), format!("{size}\n")).unwrap();
            if pid {
                std::fs::write(shown.join("pid"), "7").unwrap();
            }
        }
        assert_eq!(free_device(sys.path()), Path::new("/dev/nbd2"));
        assert!(is_busy(sys.path(), Path::new("/dev/nbd0")));
        assert!(is_busy(sys.path(), Path::new("/dev/nbd1")));
        assert!(!is_busy(sys.path(), Path::new("/dev/nbd9")));
    }

    #[test]
    fn a_shell_takes_the_line_as_it_is_meant() {
        let words = ["nbd-client", "10.0.0.5", "it's a $volume", ""].map(str::to_owned);
        assert_eq!(shell_line(&words), r"nbd-client 10.0.0.5 'it'\''s a $volume' ''");
    }

    #[test]
    fn only_nbd_devices_are_devices() {
        assert_eq!(number(Path::new("/dev/nbd12")).unwrap(), 12);
        for other in ["/dev/sda", "/dev/nbd", "nbd0", "/dev/nbd0p1"] {
            assert!(number(Path::new(other)).is_err(), "{other}");
        }
    }
}
