//! Data directories that do not belong where they are found.

use std::fs;
use std::path::Path;

use crate::{MIB, cluster, expect, fill};

fn swap(one: &Path, other: &Path) {
    let aside = one.with_extension("aside");
    fs::rename(one, &aside).unwrap();
    fs::rename(other, one).unwrap();
    fs::rename(&aside, other).unwrap();
}

#[test]
fn nodes_refuse_each_others_data_directories() {
    let mut cluster = cluster();
    fill(&mut cluster.at(0).connect("volume").unwrap(), 0, 2 * MIB, 0);
    for at in [0, 1] {
        assert!(cluster.at_mut(at).terminate().success());
    }
    let paths = [0, 1].map(|at| cluster.at(at).data_directory().to_owned());
    swap(&paths[0], &paths[1]);
    for at in [0, 1] {
        cluster.at_mut(at).spawn();
        let status = cluster.at_mut(at).wait_exit();
        assert!(!status.success(), "{status}");
        let said = cluster.at(at).stderr();
        let line = said.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
        assert!(line.contains("nbd-1-1") && line.contains("nbd-1-2"), "{said}");
    }
    swap(&paths[0], &paths[1]);
    for at in [0, 1] {
        cluster.at_mut(at).spawn();
    }
    cluster.wait_until_serving();
    expect(&mut cluster.at(1).connect("volume").unwrap(), 0, 2 * MIB, 0);
    cluster.wait_until_equal();
}
