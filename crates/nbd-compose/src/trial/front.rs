//! Faults of the control API, of load balancers, and of what stands in front of those.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::{ANSWERS, FAULT_LENGTH, Trial};
use crate::attaching::Attaching;
use crate::cluster::{CONTROL, FRONT};
use crate::fault::Fault;

impl Trial<'_> {
    /// The control API stops in good order and comes back; clients do not need it.
    ///
    /// # Errors
    /// Whatever was wrong.
    pub(super) fn control_restart(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        Fault::Restart.begin(self.cluster, None, CONTROL, &[])?;
        let lasted = begin.elapsed();
        let going_on = self.wait_for_answers()?;
        let well = self.settle(&[CONTROL])?;
        let volumes = self.cluster.get(CONTROL, "/api/v1/volumes")?;
        if volumes.status != 200 || !volumes.body.contains(&self.volume) {
            bail!("the control API does not know the volumes any more: {volumes:?}");
        }
        self.tell(&format!("SIGTERM and start: {CONTROL}"), lasted, going_on, well);
        Ok(())
    }

    /// A fault of a load balancer while clients come and go at the one published address.
    ///
    /// # Errors
    /// Whatever was wrong.
    pub(super) fn balancer_fault(
        &mut self,
        fault: Fault,
        victim: &'static str,
    ) -> anyhow::Result<()> {
        let front = self.cluster.target(FRONT);
        if fault.ends_process() {
            front.count_ending();
            self.cluster.target(victim).count_ending();
        }
        let attaching = Attaching::start(front, &self.volume);
        // Some are there before.
        thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        fault.begin(self.cluster, None, victim, &[])?;
        let began = (begin, Instant::now());
        // Of a load balancer that is frozen, so are its clients.
        let going_on = if fault == Fault::Pause { None } else { Some(self.wait_for_answers()?) };
        thread::sleep((began.1 + FAULT_LENGTH).saturating_duration_since(Instant::now()));
        let until = Instant::now();
        fault.end(self.cluster, None, victim, &[])?;
        let lasted = begin.elapsed();
        let attached =
            attaching.finish(began, until).with_context(|| format!("{fault}: {victim}"))?;
        let changed = if fault.ends_process() { &[victim][..] } else { &[] };
        let well = self.settle(changed)?;
        self.tell(&format!("{fault}: {victim}"), lasted, going_on.unwrap_or(lasted), well);
        self.steps.note(&attached);
        Ok(())
    }

    /// What stands in front of the load balancers dies: its clients have to attach again, and those
    /// of the load balancers themselves notice nothing.
    ///
    /// # Errors
    /// Whatever was wrong.
    pub(super) fn front_kill(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        self.cluster.target(FRONT).count_ending();
        self.cluster.act("kill", FRONT)?;
        self.loads[1].wait_for_answers(ANSWERS).map_err(|failure| anyhow!(failure))?;
        let going_on = begin.elapsed();
        self.cluster.act("start", FRONT)?;
        let lasted = begin.elapsed();
        let well = self.settle(&[FRONT])?;
        self.tell(&format!("kill: {FRONT}"), lasted, going_on, well);
        Ok(())
    }
}
