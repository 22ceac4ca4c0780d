//! Adding up the summaries in the output of `cargo test`.

use super::Totals;

/// What the lines read so far amount to.
///
/// A test binary prints `running N tests`, then a line a test, then `test result: ...`. One that
/// aborts, is killed or exits on its own never prints the last.
#[derive(Debug, Default)]
pub(super) struct Summary {
    totals: Totals,
    /// Outcomes seen since the last `running N tests` that had no `test result:` yet.
    open: Option<Totals>,
}

impl Summary {
    pub(super) fn read_line(&mut self, line: &str) {
        if is_running(line) {
            self.close_without_result();
            self.open = Some(Totals::default());
        } else if let Some(counted) = parse_result(line) {
            self.totals += counted;
            self.open = None;
        } else if let Some(open) = &mut self.open {
            *open += parse_test(line);
        }
    }

    /// The totals, given whether cargo called the whole run a success.
    pub(super) fn finish(mut self, succeeded: bool) -> Totals {
        self.close_without_result();
        if !succeeded && self.totals.failed == 0 {
            // Something failed that is no test: a doc test that does not build, cargo itself.
            self.totals.failed = 1;
        }
        self.totals
    }

    /// The binary died: what it had reported counts, and its death is one failure more.
    fn close_without_result(&mut self) {
        if let Some(open) = self.open.take() {
            self.totals += open;
            self.totals.failed += 1;
        }
    }
}

/// `running 12 tests`, `running 1 test`.
fn is_running(line: &str) -> bool {
    let rest = line.strip_prefix("running ");
    let count = rest.and_then(|r| r.strip_suffix(" tests").or_else(|| r.strip_suffix(" test")));
    count.is_some_and(|count| count.parse::<u64>().is_ok())
}

/// `test result: ok. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.20s`.
/// An ignored test counts as skipped; one filtered out was not asked for.
fn parse_result(line: &str) -> Option<Totals> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut totals = Totals::default();
    for count in counts.split("; ") {
        if let Some((number, what)) = count.split_once(' ') {
            match what {
                "passed" => totals.passed = number.parse().ok()?,
                "failed" => totals.failed = number.parse().ok()?,
                "ignored" => totals.skipped = number.parse().ok()?,
                _ => {}
            }
        }
    }
    Some(totals)
}

/// `test some::path ... ok`.
fn parse_test(line: &str) -> Totals {
    let mut totals = Totals::default();
    let outcome = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "));
    match outcome.map(|(_, outcome)| outcome) {
        Some("ok") => totals.passed = 1,
        Some("FAILED") => totals.failed = 1,
        Some(outcome) if outcome.starts_with("ignored") => totals.skipped = 1,
        _ => {}
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(output: &str, succeeded: bool) -> (u64, u64, u64) {
        let mut summary = Summary::default();
        for line in output.lines() {
            summary.read_line(line);
        }
        let Totals { passed, failed, skipped } = summary.finish(succeeded);
        (passed, failed, skipped)
    }

    const GOOD: &str = "
running 3 tests
test a::b ... ok
test a::c - should panic ... ok
test a::d ... ignored, too slow

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.20s
";

    const BAD: &str = "
running 2 tests
test x ... FAILED
test y ... ok

failures:
---- x stdout ----
running out of ideas
test result of mine

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
";

    const DIED: &str = "
running 3 tests
test p ... ok
test q ...
";

    #[test]
    fn binaries_add_up() {
        assert_eq!(totals(GOOD, true), (2, 0, 1));
        assert_eq!(totals(&format!("{GOOD}{BAD}{GOOD}"), false), (5, 1, 2));
    }

    #[test]
    fn a_binary_that_dies_is_a_failure_wherever_it_stands() {
        assert_eq!(totals(DIED, false), (1, 1, 0));
        assert_eq!(totals(&format!("{DIED}{GOOD}"), false), (3, 1, 1));
        assert_eq!(totals(&format!("{GOOD}{DIED}"), false), (3, 1, 1));
    }

    #[test]
    fn a_failure_without_a_test_still_counts() {
        assert_eq!(totals("", false), (0, 1, 0));
        assert_eq!(totals(GOOD, false), (2, 1, 1));
        assert_eq!(totals("", true), (0, 0, 0));
    }
}
