//! A run from its beginning to its end.

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use nbd_testkit::{SpanCollector, seed, tools};
use nbd_topology::shard_of;

use crate::TestArgs;
use crate::clients::{self, IMAGE_BYTES, PATTERN_BYTES};
use crate::cluster::{BALANCERS, Cluster, REPLICAS, services};
use crate::engine::{Engine, host_address};
use crate::image;
use crate::metrics::Scrapes;
use crate::steps::Steps;
use crate::sweeper::{Sweeper, image_of};
use crate::traces;
use crate::trial::Trial;

/// What the image that ships may have.
const SHIPPED_BYTES_MAX: u64 = 40_000_000;

/// The least number of faults that a run must have seen.
const FAULTS_MIN: usize = 10;

/// Runs the test, or skips it.
///
/// # Errors
/// Whatever was not as it is to be. The containers' logs are printed before.
pub(crate) fn run(args: &TestArgs) -> anyhow::Result<()> {
    let engine = match Engine::find() {
        Ok(engine) => engine,
        Err(reason) => {
            tools::skip("compose.yaml", &reason);
            return Ok(());
        }
    };
    let host = match host_address() {
        Ok(host) if TcpListener::bind((host, 0)).is_ok() => host,
        _ => {
            tools::skip("compose.yaml", "needs a Docker engine whose bridge is on this machine");
            return Ok(());
        }
    };
    let seed = seed();
    let steps = Steps::new();
    steps.done(&engine.versions);
    let project = project_name();
    // Before anything is made.
    let sweeper = Sweeper::start(&project)?;
    let collector = SpanCollector::start_at(host);
    let image = image_of(&project);
    let root = args.root.canonicalize().context("the repository")?;
    let cluster = Cluster::new(engine, root, &project, &image, &collector.endpoint());
    let tell = || test(args, &cluster, &collector, &steps, &image, seed);
    // The test kit's checks panic; what the containers have written is wanted then, too.
    let tested = catch_unwind(AssertUnwindSafe(tell)).unwrap_or_else(|_| Err(anyhow!("a panic")));
    if tested.is_err() {
        println!("{}", cluster.tails());
    }
    let swept = sweeper.sweep();
    tested?;
    swept?;
    steps.passed();
    Ok(())
}

fn test(
    args: &TestArgs,
    cluster: &Cluster,
    collector: &SpanCollector,
    steps: &Steps,
    image: &str,
    seed: u64,
) -> anyhow::Result<()> {
    build_image(args, steps, image)?;
    let begin = Instant::now();
    cluster.up()?;
    let healthy = begin.elapsed().as_secs_f64();
    steps.done(&format!("from the built image to all healthy: {healthy:.1} s"));
    cluster.wait_well()?;
    answers_everywhere(cluster)?;
    steps.done("/health, /livez and /readyz of all services: 200");

    let traced = volume_on(traces::SHARD, "traced");
    let spans = traces::check_write(cluster, collector, &traced, 700 << 20)?;
    steps.done(&format!("one write: {spans} spans, load balancer, leader and two followers"));
    let spans = traces::check_control(cluster, collector)?;
    steps.done(&format!("one request to the control API: {spans} spans"));

    let copied = clients::use_all(cluster)?;
    match &copied {
        Some(_) => steps.done("nbdinfo, qemu-io, nbdcopy: served at the published port"),
        None => steps.left_out("other people's clients", "needs nbdinfo, nbdcopy and qemu-io"),
    }
    let scrapes = Scrapes::take(cluster)?;
    let checked = scrapes.check()?;
    let written = scrapes.sum(&BALANCERS, "nbd_request_bytes_total", "op=\"write\"");
    #[expect(clippy::cast_precision_loss, reason = "a few mebibytes")]
    let wanted = if copied.is_some() { (IMAGE_BYTES + PATTERN_BYTES) as f64 } else { 4096.0 };
    if written < wanted {
        bail!("the load balancers have counted {written} bytes written, of {wanted} or more");
    }
    steps.done(&format!("/metrics: {checked}"));

    let volumes = [volume_on(0, "load"), volume_on(1, "load")];
    let mut trial = Trial::start(cluster, steps, [&volumes[0], &volumes[1]], seed)?;
    steps.done("two loads attached: at the published address, and at each load balancer");
    trial.run()?;
    let mut verified = trial.finish()?;
    if verified.faults < FAULTS_MIN {
        bail!("{} faults are too few", verified.faults);
    }
    let equal = cluster.wait_equal()?;
    cluster.wait_healthy()?;
    answers_everywhere(cluster)?;
    steps.done(&format!("all replicas equal after {:.1} s; all healthy", equal.as_secs_f64()));
    Scrapes::take(cluster)?.check().context("after the faults")?;
    traces::check_write(cluster, collector, &traced, 800 << 20).context("after the faults")?;
    steps.done("/metrics and the trace of a write: as before the faults");
    nobody_panicked(cluster)?;

    cluster.stop()?;
    steps.done("stopped: every process with exit code 0");
    cluster.down(false)?;
    cluster.up()?;
    verified.verify(cluster)?;
    if let Some(copied) = copied {
        copied.check(cluster)?;
    }
    steps.done("taken down and up again on its volumes: all there");
    cluster.down(true)?;
    if !cluster.containers()?.is_empty() {
        bail!("containers are left: {:?}", cluster.containers()?);
    }
    steps.done("taken down");
    Ok(())
}

fn build_image(args: &TestArgs, steps: &Steps, tag: &str) -> anyhow::Result<()> {
    let begin = Instant::now();
    let image = image::build(&args.root, &args.program, tag)?;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let megabytes = image.bytes as f64 / 1e6;
    let kind = if image.is_static { "static" } else { "with its libraries" };
    steps.done(&format!(
        "image: {megabytes:.1} MB, {kind}; built in {:.1} s",
        begin.elapsed().as_secs_f64()
    ));
    if args.shipped && !image.is_static {
        bail!("{} is to ship, and is not static", args.program.display());
    }
    if args.shipped && image.bytes >= SHIPPED_BYTES_MAX {
        bail!("an image that ships must be below {SHIPPED_BYTES_MAX} bytes");
    }
    Ok(())
}

/// Every service is alive, ready and well.
fn answers_everywhere(cluster: &Cluster) -> anyhow::Result<()> {
    for service in services() {
        for path in ["/health", "/livez", "/readyz"] {
            let answer = cluster.get(service, path).with_context(|| service.to_owned())?;
            if answer.status != 200 {
                bail!("{service}{path}: {answer:?}");
            }
        }
    }
    Ok(())
}

/// No process has written that it panicked, over all its runs.
fn nobody_panicked(cluster: &Cluster) -> anyhow::Result<()> {
    for container in cluster.containers()? {
        let log = container.log(&[])?;
        if let Some(line) = log.lines().find(|line| line.contains("panicked at")) {
            bail!("{}: {line}", container.service);
        }
    }
    Ok(())
}

/// A volume's name, which puts it on this shard.
fn volume_on(shard: usize, name: &str) -> String {
    let count = u32::try_from(REPLICAS.len()).ok().and_then(std::num::NonZeroU32::new);
    let count = count.unwrap_or(std::num::NonZeroU32::MIN);
    let on_it = |name: &String| usize::try_from(shard_of(name.as_bytes(), count).0) == Ok(shard);
    let mut names = (0..).map(|number: u32| format!("{name}-{number}"));
    names.find(on_it).unwrap_or_default()
}

/// A name that no other run on this machine has, nor any cluster of a user's.
fn project_name() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("cinderblock-test-{}-{}", std::process::id(), since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_on_their_shards() {
        let names = [volume_on(0, "a"), volume_on(1, "a")];
        assert!(names.iter().all(|name| name.starts_with("a-")));
        assert_ne!(names[0], names[1]);
    }
}
