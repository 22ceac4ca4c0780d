//! Clients that attach, read and leave, one after the other, while load balancers die.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use nbd_testkit::{ClientError, ConnectOptions, NbdClient, Target};

/// Clients at a time.
const CLIENTS: usize = 2;

/// Time for one of them; far above what it takes, with a load balancer that stands still too.
const CLIENT_MAX: Duration = Duration::from_secs(20);

/// One client that came and went.
#[derive(Debug)]
struct Visit {
    begin: Instant,
    end: Instant,
    error: Option<String>,
}

/// Clients that come and go until they are told to stop.
#[derive(Debug)]
pub(crate) struct Attaching {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Vec<Visit>>>,
}

impl Attaching {
    /// Clients that attach to a volume which is there, at `target`.
    pub(crate) fn start(target: &Target, volume: &str) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let thread = || {
            let (target, stop) = (target.clone(), Arc::clone(&stop));
            let options = ConnectOptions {
                export: volume.to_owned(),
                timeout: CLIENT_MAX,
                ..ConnectOptions::default()
            };
            thread::spawn(move || {
                let mut visits = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    let error = visit(&target, &options).err().map(|error| error.to_string());
                    visits.push(Visit { begin, end: Instant::now(), error });
                }
                visits
            })
        };
        let threads = (0..CLIENTS).map(|_| thread()).collect();
        Self { stop, threads }
    }

    /// Stops, and holds all clients to what they may see of a fault that began in `began`, from the
    /// command's start to its end, and went on until `until`: those that came afterwards were
    /// served. One whose handshake was under way at that moment may have lost its connection, each
    /// at most once. Some must have come and gone while the fault lasted.
    ///
    /// # Errors
    /// What was not so.
    pub(crate) fn finish(
        self,
        began: (Instant, Instant),
        until: Instant,
    ) -> anyhow::Result<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut visits = Vec::new();
        for thread in self.threads {
            visits.extend(thread.join().map_err(|_| anyhow!("a client panicked"))?);
        }
        judge(&visits, began, until)
    }
}

fn judge(visits: &[Visit], began: (Instant, Instant), until: Instant) -> anyhow::Result<String> {
    let hit = |visit: &&Visit| visit.begin < began.1 && visit.end > began.0;
    let failed = || visits.iter().filter(|visit| visit.error.is_some());
    if let Some(Visit { error, .. }) = failed().find(|visit| !hit(visit)) {
        bail!("a client was not served: {}", error.as_deref().unwrap_or_default());
    }
    let broken = failed().count();
    if broken > CLIENTS {
        bail!("{broken} clients lost their connection, and no more than {CLIENTS} were attaching");
    }
    let within = |visit: &&Visit| visit.begin >= began.1 && visit.end <= until;
    let meanwhile = visits.iter().filter(within).count();
    if meanwhile < CLIENTS * 2 {
        bail!("only {meanwhile} clients came and went while the fault lasted");
    }
    let longest = visits.iter().map(|visit| visit.end - visit.begin).max().unwrap_or_default();
    Ok(format!(
        "{} clients attached, {meanwhile} of them meanwhile, {broken} at that moment again; \
         longest {:.2} s",
        visits.len(),
        longest.as_secs_f64()
    ))
}

fn visit(target: &Target, options: &ConnectOptions) -> Result<(), ClientError> {
    let mut client = NbdClient::connect_with(target.address(), options)?;
    client.read(0, 4096)?;
    client.disconnect().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Judges visits given as begin and end in milliseconds and whether they failed; the fault
    /// begins between 100 and 110 and is over at 1000.
    fn judged(visits: &[(u64, u64, bool)]) -> anyhow::Result<String> {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let visit = |&(begin, end, failed): &(u64, u64, bool)| Visit {
            begin: at(begin),
            end: at(end),
            error: failed.then(|| "closed".to_owned()),
        };
        let visits: Vec<_> = visits.iter().map(visit).collect();
        judge(&visits, (at(100), at(110)), at(1000))
    }

    #[test]
    fn only_who_was_attaching_may_lose_the_connection() {
        let fine = [(200, 210, false), (210, 220, false), (300, 310, false), (400, 500, false)];
        assert!(judged(&fine).is_ok());
        assert!(judged(&[&fine[..], &[(95, 105, true), (109, 130, true)]].concat()).is_ok());
        assert!(judged(&[&fine[..], &[(111, 120, true)]].concat()).is_err(), "it came later");
        assert!(judged(&[&fine[..], &[(50, 99, true)]].concat()).is_err(), "it left before");
        let thrice = [(95, 105, true), (95, 104, true), (104, 120, true)];
        assert!(judged(&[&fine[..], &thrice].concat()).is_err());
        assert!(judged(&fine[..3]).is_err(), "too few");
    }
}
