//! Reading what `/metrics` says.

use nbd_testkit::NodeProcess;

/// The value of one series, written as Prometheus writes it: `name` or `name{label="value"}`.
pub(crate) fn metric(node: &NodeProcess, series: &str) -> Option<f64> {
    let page = node.get("/metrics");
    assert_eq!(page.status, 200, "{page:?}");
    let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok();
    page.body.lines().find_map(value)
}
