//! What a run tells: one line a step, with times.

use std::cell::RefCell;
use std::time::Instant;

/// The lines of a run.
#[derive(Debug)]
pub(crate) struct Steps {
    started: Instant,
    left_out: RefCell<Vec<String>>,
}

impl Steps {
    /// None so far.
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), left_out: RefCell::default() }
    }

    /// A step was done, and what came of it.
    pub(crate) fn done(&self, what: &str) {
        println!("{:7.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// More about the step before.
    pub(crate) fn note(&self, what: &str) {
        println!("{:9}  {what}", "");
    }

    /// A part cannot be done on this machine. Shown again at the end.
    pub(crate) fn left_out(&self, what: &str, reason: &str) {
        let line = format!("LEFT OUT {what}: {reason}");
        self.done(&line);
        self.left_out.borrow_mut().push(line);
    }

    /// The last words of a run that has passed.
    pub(crate) fn passed(&self) {
        for line in self.left_out.borrow().iter() {
            println!("{line}");
        }
        println!("compose test passed in {:.1} s", self.started.elapsed().as_secs_f64());
    }
}
