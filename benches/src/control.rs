//! What managing volumes costs: how long calls of the control API take with few and with many
//! volumes, what the catalogue takes of replicas' memory, and what calls take away from I/O.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nbd_testkit::{Cluster, ServerProcess};

use crate::fio::Job;
use crate::server::EXPORT;
use crate::{Place, median};

/// Volumes of the first measurement, in one shard.
const FEW: usize = 1000;

/// Connections over which many volumes are made.
const MAKERS: usize = 16;

/// Pages looked at in a long list.
const PAGES: usize = 50;

/// Calls a second beside I/O.
const CALLS_PER_SECOND: u32 = 200;

/// Connections that they are made over.
const CALLERS: u32 = 4;

/// How much is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Volumes in the cluster of 2 shards.
    #[arg(long, default_value_t = 100_000)]
    volumes: usize,
    /// Rounds of I/O with and without calls.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

/// A connection that is kept.
struct Api {
    stream: BufReader<TcpStream>,
}

impl Api {
    fn connect(control: &ServerProcess) -> Result<Self> {
        let stream = TcpStream::connect(control.http_address()).context("connect to the API")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Makes a call and gives the body of its answer.
    fn call(&mut self, method: &str, path: &str, body: &str) -> Result<String> {
        let mut request = format!("{method} /api/v1{path} HTTP/1.1\r\nhost: localhost\r\n");
        let length = body.len();
        write!(
            request,
            "content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        self.stream.read_line(&mut status)?;
        let (mut length, mut line) = (0, String::new());
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        let body = String::from_utf8(body)?;
        if !status.contains(" 20") {
            bail!("{method} {path}: {status}{body}");
        }
        Ok(body)
    }

    fn create(&mut self, name: &str) -> Result<()> {
        let body = format!(r#"{{"name": "{name}", "size": 1048576, "labels": {{"team": "a"}}}}"#);
        self.call("POST", "/volumes", &body).map(drop)
    }
}

fn millis(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a place in it")]
    let place = ((times.len() - 1) as f64 * part) as usize;
    times[place]
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

fn cluster(shards: usize, place: &Place) -> Cluster {
    // All on the same nodes.
    let replicas = vec![["nbd-1-1", "nbd-1-2", "nbd-1-3"].as_slice(); shards];
    let builder = Cluster::builder().shards(&replicas).program(&place.replica).under(&place.dir);
    let mut cluster = builder.name("bench").default_size("1GiB").start();
    cluster.wait_until_serving();
    cluster
}

fn resident_mib(cluster: &mut Cluster) -> Vec<u64> {
    cluster.nodes().iter().map(|node| node.rss_bytes() >> 20).collect()
}

pub(crate) fn run(args: &Args, place: &Place) -> Result<()> {
    few(place)?;
    many(args, place)?;
    beside_io(args, place)
}

/// One shard, volume by volume.
fn few(place: &Place) -> Result<()> {
    let cluster = cluster(1, place);
    let control = cluster.control();
    let mut api = Api::connect(&control)?;
    let mut times = Vec::new();
    for number in 0..FEW {
        times.push(timed(|| api.create(&format!("volume-{number:06}")))?);
    }
    let (half, most) = (millis(&mut times, 0.5), millis(&mut times, 0.99));
    println!("create, {FEW} volumes in one shard: p50 {half:.1} ms, p99 {most:.1} ms");
    let mut times = Vec::new();
    for _ in 0..PAGES {
        times.push(timed(|| api.call("GET", "/volumes?limit=1000", "").map(drop))?);
    }
    let (half, most) = (millis(&mut times, 0.5), millis(&mut times, 0.99));
    println!("list all {FEW} in a page: p50 {half:.1} ms, p99 {most:.1} ms");
    Ok(())
}

/// Two shards on the same three nodes, with very many volumes.
fn many(args: &Args, place: &Place) -> Result<()> {
    let mut cluster = cluster(2, place);
    let control = cluster.control();
    let before = resident_mib(&mut cluster);
    let began = Instant::now();
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        let makers: Vec<_> = (0..MAKERS)
            .map(|_| {
                scope.spawn(|| -> Result<Vec<f64>> {
                    let mut api = Api::connect(&control)?;
                    let mut times = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= args.volumes as u64 {
                            return Ok(times);
                        }
                        times.push(timed(|| api.create(&format!("volume-{number:06}")))?);
                    }
                })
            })
            .collect();
        for maker in makers {
            maker.join().map_err(|_| anyhow::anyhow!("a maker panicked"))??;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    let took = began.elapsed().as_secs_f64();
    println!("{} volumes in 2 shards were made in {took:.0} s", args.volumes);
    let after = resident_mib(&mut cluster);
    println!("memory of the replicas: {before:?} MiB before, {after:?} MiB with them");
    let mut api = Api::connect(&control)?;
    let mut times = Vec::new();
    for number in 0..100 {
        times.push(timed(|| api.create(&format!("another-{number:06}")))?);
    }
    println!("create one more: p50 {:.1} ms", millis(&mut times, 0.5));
    for sort in ["name", "-created", "size"] {
        let (mut first, mut last) = (Vec::new(), Vec::new());
        let mut cursor = String::new();
        let began = Instant::now();
        let mut pages = 0;
        loop {
            let path = format!("/volumes?limit=1000&sort={sort}{cursor}");
            let mut page = String::new();
            let time = timed(|| {
                page = api.call("GET", &path, "")?;
                Ok(())
            })?;
            if pages < PAGES / 5 {
                first.push(time)
            } else {
                last.push(time)
            }
            pages += 1;
            let page: serde_json::Value = serde_json::from_str(&page)?;
            let Some(next) = page["next"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        let rest = if last.is_empty() { f64::NAN } else { millis(&mut last, 0.5) };
        println!(
            "list by {sort}: {pages} pages of 1000 in {:.1} s; p50 of the first ten {:.1} ms, of \
             the others {rest:.1} ms",
            began.elapsed().as_secs_f64(),
            millis(&mut first, 0.5),
        );
    }
    Ok(())
}

/// Writes with and without calls beside them, in turn.
fn beside_io(args: &Args, place: &Place) -> Result<()> {
    let mut cluster = cluster(1, place);
    let leader = cluster.wait_leader();
    cluster.put_in_front(leader);
    let control = cluster.control();
    let mut api = Api::connect(&control)?;
    for number in 0..FEW {
        api.create(&format!("volume-{number:06}"))?;
    }
    let seconds = args.seconds;
    let job = Job { name: "4k-randwrite-qd16", rw: "randwrite", block_kib: 4, depth: 16, seconds };
    let uri = cluster.node().uri(EXPORT);
    job.prepare(&uri)?;
    let (mut without, mut with, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..args.rounds {
        for busy in [round % 2 == 0, round % 2 == 1] {
            let stop = AtomicBool::new(false);
            let rate = thread::scope(|scope| {
                let caller = busy.then(|| scope.spawn(|| call_steadily(&control, &stop)));
                let rate = job.run(&uri);
                stop.store(true, Ordering::Relaxed);
                if let Some(caller) = caller {
                    calls.push(caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))??);
                }
                rate
            })?;
            if busy { with.push(rate) } else { without.push(rate) }
        }
    }
    let mut ratios: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a / b).collect();
    println!(
        "4 KiB writes at depth 16: {:.0} a second alone, {:.0} beside {:.0} calls a second, ratio \
         {:.2}",
        median(&mut without),
        median(&mut with),
        median(&mut calls),
        median(&mut ratios),
    );
    Ok(())
}

/// Lists, looks at and changes volumes at a steady pace, over several connections: one waits for
/// each answer. Gives the calls a second.
fn call_steadily(control: &ServerProcess, stop: &AtomicBool) -> Result<f64> {
    thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|caller| scope.spawn(move || call_in_turn(control, stop, caller)))
            .collect();
        let mut rate = 0.0;
        for caller in callers {
            rate += caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))??;
        }
        Ok(rate)
    })
}

/// Every so many calls of all are this caller's.
fn call_in_turn(control: &ServerProcess, stop: &AtomicBool, caller: u32) -> Result<f64> {
    let mut api = Api::connect(control)?;
    let (began, mut made) = (Instant::now(), 0_u32);
    while !stop.load(Ordering::Relaxed) {
        let number = made * CALLERS + caller;
        let due = Duration::from_secs(1) * number / CALLS_PER_SECOND;
        thread::sleep(due.saturating_sub(began.elapsed()));
        match number % 10 {
            0 => drop(api.call("GET", "/volumes?limit=100&label=team%3Da", "")?),
            1 => {
                let body = format!(r#"{{"description": "seen {number} times"}}"#);
                drop(api.call("PATCH", "/volumes/volume-000007", &body)?);
            }
            _ => drop(api.call("GET", &format!("/volumes/volume-{:06}", number % 1000), "")?),
        }
        made += 1;
    }
    Ok(f64::from(made) / began.elapsed().as_secs_f64())
}
