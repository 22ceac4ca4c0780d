//! `nbdctl import`, `export` and `attach`, against real clusters.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails like the test")]

mod support;

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nbd_testkit::{Ext4Image, require_tools, tools};

use self::support::{Bench, carried, nbdctl, random_file, sparse_file, status};

#[test]
fn a_file_system_goes_in_and_comes_out() {
    require_tools!["mke2fs", "e2fsck", "debugfs", "nbdcopy", "qemu-io"];
    let bench = Bench::new("64MiB", 1);
    let (content, image) = (bench.path("content"), bench.path("image"));
    fs::create_dir(&content).unwrap();
    random_file(&content.join("blob"), 5);
    let image = Ext4Image::create(&image, 48 << 20, &content);
    let file = image.path().to_str().unwrap();
    let said = bench.runs(&["import", file, "vol1", "--verify"]);
    assert!(carried(&said) < 16 << 20, "holes are not sent: {said}");
    let mut expected = fs::read(file).unwrap();
    expected.resize(64 << 20, 0);
    assert!(bench.judged("vol1") == expected);

    // A client changes the last block of the volume, behind the file system.
    let uri = bench.node().uri("vol1");
    let mut change = Command::new(tools::tool("qemu-io").unwrap());
    assert!(status(change.args(["-f", "raw", "-c", "write -P 7 60M 4k"]).arg(uri)));
    expected[60 << 20..(60 << 20) + 4096].fill(7);
    let out = bench.path("out");
    bench.runs(&["export", "vol1", out.to_str().unwrap(), "--verify"]);
    assert!(fs::read(&out).unwrap() == expected);
    assert!(out.metadata().unwrap().blocks() * 512 < 16 << 20, "it stays sparse");
    let leftovers: Vec<_> = fs::read_dir(bench.directory.path()).unwrap().collect();
    assert!(
        leftovers.iter().all(|entry| {
            !entry.as_ref().unwrap().file_name().to_string_lossy().contains(".part")
        })
    );
    Ext4Image::at(&out).check();
    assert_eq!(Ext4Image::at(&out).read_file("/blob"), fs::read(content.join("blob")).unwrap());

    let there = bench.fails(&["export", "vol1", out.to_str().unwrap()]);
    assert!(there.contains("--overwrite"), "{there}");
    let holds = bench.fails(&["import", file, "vol1"]);
    assert!(holds.contains("holds data") && holds.contains("--overwrite"), "{holds}");
    bench.runs(&["import", file, "vol1", "--overwrite"]);
    expected[60 << 20..(60 << 20) + 4096].fill(0);
    assert!(bench.judged("vol1") == expected, "what is behind the image is zeroes");
}

#[test]
fn a_large_sparse_file_takes_seconds() {
    require_tools!["qemu-img"];
    let bench = Bench::new("100GiB", 1);
    let (file, out) = (bench.path("sparse"), bench.path("out"));
    sparse_file(&file, 100 << 30);
    let began = Instant::now();
    let said = bench.runs(&["import", file.to_str().unwrap(), "vol1"]);
    bench.runs(&["export", "vol1", out.to_str().unwrap()]);
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}: {said}", began.elapsed());
    assert!(carried(&said) <= 64 << 20, "{said}");
    let mut client = bench.node().connect("vol1").unwrap();
    let zeroes: u64 = (0..100)
        .flat_map(|gib| client.block_status(gib << 30, 1 << 30).unwrap())
        .map(|extent| if extent.zero { extent.len } else { 0 })
        .sum();
    assert!(zeroes > (100 << 30) - (64 << 20), "the volume has holes");
    assert!(out.metadata().unwrap().blocks() * 512 < 64 << 20, "and so has the file");
    let mut compare = Command::new(tools::tool("qemu-img").unwrap());
    assert!(status(compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(&file).arg(&out)));
}

#[test]
fn qcow2_goes_both_ways() {
    require_tools!["qemu-img", "qemu-nbd"];
    let bench = Bench::new("64MiB", 1);
    let (raw, qcow2, out) = (bench.path("raw"), bench.path("in.qcow2"), bench.path("out.qcow2"));
    sparse_file(&raw, 64 << 20);
    let qemu_img = tools::tool("qemu-img").unwrap();
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    assert!(status(Command::new(&qemu_img).args(convert).arg(&raw).arg(&qcow2)));
    let said = bench.runs(&["import", qcow2.to_str().unwrap(), "vol1", "--verify"]);
    assert!(said.contains("qcow2"), "{said}");
    bench.runs(&["export", "vol1", out.to_str().unwrap(), "--format=qcow2", "--verify"]);
    let compare = ["compare", "-f", "raw", "-F", "qcow2"];
    assert!(status(Command::new(&qemu_img).args(compare).arg(&raw).arg(&out)));
    assert!(out.metadata().unwrap().len() < 16 << 20, "it stays sparse");
    let no_image = bench.fails(&["import", raw.to_str().unwrap(), "vol2", "--format=qcow2"]);
    assert!(no_image.contains("as qcow2"), "{no_image}");
    let mut bare = bench.nbdctl(&["import", qcow2.to_str().unwrap(), "vol2", "--format=vmdk"]);
    let output = bare.env("PATH", "").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("install"), "{said}");
}

#[test]
fn an_import_that_was_killed_goes_on() {
    require_tools!["nbdcopy"];
    let bench = Bench::new("256MiB", 1);
    let file = bench.path("image");
    random_file(&file, 256);
    let arguments = ["import", file.to_str().unwrap(), "vol1"];
    let done = bench.interrupted(&arguments, &bench.path("state/cinderblock"), 0);
    let said = bench.runs(&arguments);
    assert!(said.contains("going on"), "{said}");
    assert_eq!(carried(&said), (256 << 20) - done, "the rest and no more");
    assert!(bench.judged("vol1") == fs::read(&file).unwrap());
    // It is complete: the next is a new one, which may not write over it.
    assert!(bench.fails(&arguments).contains("holds data"));
}

#[test]
fn an_import_of_a_changed_file_starts_over() {
    require_tools!["nbdcopy"];
    let bench = Bench::new("256MiB", 1);
    let file = bench.path("image");
    random_file(&file, 256);
    let arguments = ["import", file.to_str().unwrap(), "vol1"];
    bench.interrupted(&arguments, &bench.path("state/cinderblock"), 0);
    let changed = fs::OpenOptions::new().write(true).open(&file).unwrap();
    changed.write_all_at(b"changed", 100).unwrap();
    let said = bench.runs(&arguments);
    assert!(said.contains("starting over") && said.contains("changed"), "{said}");
    assert_eq!(carried(&said), 256 << 20);
    assert!(bench.judged("vol1") == fs::read(&file).unwrap());
}

#[test]
fn an_import_goes_on_only_in_the_volume_that_it_left() {
    require_tools!["nbdcopy", "qemu-io"];
    let bench = Bench::new("300MiB", 1);
    let (file, state) = (bench.path("image"), bench.path("state/cinderblock"));
    random_file(&file, 256);
    // It begins with a hole.
    let image = fs::read(&file).unwrap();
    let sparse = fs::File::create(&file).unwrap();
    sparse.set_len(260 << 20).unwrap();
    sparse.write_all_at(&image, 4 << 20).unwrap();
    let arguments = ["import", file.to_str().unwrap(), "vol1"];
    // Behind the hole and some data.
    bench.interrupted(&arguments, &state, 8 << 20);
    let entries = fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path());
    let journal = entries.into_iter().find(|path| path.extension().unwrap() == "json").unwrap();
    let kept = fs::read(&journal).unwrap();
    let mut record: serde_json::Value = serde_json::from_slice(&kept).unwrap();
    assert!(!record["samples"].as_array().unwrap().is_empty(), "the first data is a sample");

    // Without samples, what the volume holds could be anyone's.
    record["samples"] = serde_json::json!([]);
    fs::write(&journal, serde_json::to_vec(&record).unwrap()).unwrap();
    let refused = |arguments: &[&str]| {
        let output = bench.nbdctl(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(said.contains("starting over") && said.contains("holds data"), "{said}");
    };
    refused(&arguments);

    // With them, it is not as it was left when there is data where the image has none.
    fs::write(&journal, kept).unwrap();
    let uri = bench.node().uri("vol1");
    let mut change = Command::new(tools::tool("qemu-io").unwrap());
    assert!(status(change.args(["-f", "raw", "-c", "write -P 7 1M 4k"]).arg(uri)));
    refused(&arguments);
    bench.runs(&["import", file.to_str().unwrap(), "vol1", "--overwrite"]);
    let mut expected = fs::read(&file).unwrap();
    expected.resize(300 << 20, 0);
    assert!(bench.judged("vol1") == expected);
}

#[test]
fn copies_fail_with_the_codes_of_the_other_commands() {
    let bench = Bench::new("1MiB", 1);
    let file = bench.path("image");
    random_file(&file, 1);
    let code = |arguments: &[&str]| {
        let output = bench.nbdctl(arguments).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let file = file.to_str().unwrap();
    let api = format!("--server=http://127.0.0.1:{}", nbd_testkit::free_port());
    let (no_api, said) = code(&["import", file, "vol1", "--create", &api]);
    assert!(no_api == 4 && said.contains("connection refused"), "{said}");
    let (there, said) = code(&["export", "vol1", file]);
    assert!(there == 3 && said.contains("--overwrite"), "{said}");
    let (pipe, said) = code(&["import", "-", "vol1", "--format=qcow2"]);
    assert!(pipe == 64 && said.contains("raw images only"), "{said}");
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_nbdctl"));
    nobody.args(["export", "vol1", "-", "--retry-for=1s"]);
    nobody.arg(format!("--nbd=127.0.0.1:{}", nbd_testkit::free_port()));
    assert_eq!(nobody.output().unwrap().status.code(), Some(4));
}

#[test]
fn an_interrupted_pipe_does_not_promise_to_go_on() {
    let bench = Bench::new("8MiB", 1);
    let mut child = bench.nbdctl(&["import", "-", "vol1"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&[1; 2 << 20]).unwrap();
    thread::sleep(Duration::from_millis(300));
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("interrupted") && said.contains("--overwrite"), "{said}");
    assert!(!said.contains("goes on"), "{said}");
}

#[test]
fn an_export_that_was_killed_goes_on() {
    let bench = Bench::new("256MiB", 1);
    let (file, out) = (bench.path("image"), bench.path("out/image"));
    fs::create_dir(out.parent().unwrap()).unwrap();
    random_file(&file, 256);
    bench.runs(&["import", file.to_str().unwrap(), "vol1"]);
    // Slower than the disk, so that there is a middle to be killed in.
    let arguments = ["export", "vol1", out.to_str().unwrap()];
    let mut child = bench.nbdctl(&arguments).stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    let part = bench.path("out/image.part");
    while !part.exists() {
        assert!(began.elapsed() < support::DEADLINE);
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!out.exists(), "nothing bears the name before it is complete");
    bench.runs(&arguments);
    assert!(fs::read(&out).unwrap() == fs::read(&file).unwrap());
    assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "nothing is left");
}

#[test]
fn an_import_through_a_balancer_outlives_the_leader() {
    require_tools!["nbdcopy"];
    let mut bench = Bench::new("256MiB", 3);
    bench.cluster.put_balancer_in_front();
    let file = bench.path("image");
    random_file(&file, 256);
    let leader = bench.cluster.wait_leader();
    let mut child = bench.nbdctl(&["import", file.to_str().unwrap(), "vol1"]).spawn().unwrap();
    thread::sleep(Duration::from_millis(700));
    assert!(child.try_wait().unwrap().is_none(), "the import is under way");
    bench.cluster.at_mut(leader).kill_9();
    assert!(child.wait().unwrap().success());
    assert!(bench.judged("vol1") == fs::read(&file).unwrap());
}

#[test]
fn an_image_that_does_not_fit_is_refused() {
    let bench = Bench::new("1MiB", 1);
    let file = bench.path("image");
    fs::File::create(&file).unwrap().set_len((2 << 20) + 1).unwrap();
    let reason = bench.fails(&["import", file.to_str().unwrap(), "vol1"]);
    for word in ["2097153 bytes", "only 1048576", "--create"] {
        assert!(reason.contains(word), "{word:?} is not in {reason}");
    }
}

#[test]
fn pipes_carry_raw_images() {
    require_tools!["nbdcopy"];
    let bench = Bench::new("8MiB", 1);
    let file = bench.path("image");
    random_file(&file, 3);
    let mut expected = fs::read(&file).unwrap();
    expected.splice(1 << 20..1 << 20, vec![0; 1 << 20]);
    let mut child =
        bench.nbdctl(&["import", "-", "vol1", "--verify"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&expected).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert_eq!(carried(&said), 3 << 20, "zeroes are not sent");
    expected.resize(8 << 20, 0);
    assert!(bench.judged("vol1") == expected);
    let output = bench.nbdctl(&["export", "vol1", "-", "--quiet"]).output().unwrap();
    assert!(output.status.success() && output.stdout == expected && output.stderr.is_empty());
}

#[test]
fn a_terminal_gets_a_bar_and_others_get_lines() {
    require_tools!["script"];
    let bench = Bench::new("64MiB", 1);
    let file = bench.path("image");
    random_file(&file, 64);
    let said = bench.runs(&["import", file.to_str().unwrap(), "vol1"]);
    assert!(!said.contains('\r') && said.lines().count() == 1, "{said}");
    let command = bench.nbdctl(&["import", file.to_str().unwrap(), "vol2"]);
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    let mut script = Command::new(tools::tool("script").unwrap());
    script.args(["-qec", &line.join(" "), "/dev/null"]).env("XDG_STATE_HOME", bench.path("state"));
    script.stdin(Stdio::null()).stdout(Stdio::piped());
    let running = script.spawn().unwrap();
    bench.wait_begun();
    bench.hold();
    let output = running.wait_with_output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{shown}");
    assert!(shown.contains("\r\u{1b}[K[") && shown.contains("of 64.0 MiB"), "{shown:?}");
}

#[test]
fn a_server_that_is_silent_is_given_up() {
    let bench = Bench::new("1MiB", 1);
    let file = bench.path("image");
    random_file(&file, 1);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("--nbd={}", silent.local_addr().unwrap());
    let mut command = nbdctl(bench.directory.path(), bench.node(), &[]);
    let began = Instant::now();
    let arguments = ["import", file.to_str().unwrap(), "vol1", "--retry-for=1s", &address];
    let program = command.get_program().to_owned();
    command = Command::new(program);
    let output = command.args(arguments).env("XDG_STATE_HOME", bench.path("state")).output();
    let output = output.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("does not answer") && began.elapsed().as_secs() < 30, "{said}");
}

#[test]
fn attach_says_what_it_would_run() {
    let bench = Bench::new("1MiB", 1);
    let output =
        bench.nbdctl(&["attach", "a volume", "--device=/dev/nbd7", "--print"]).output().unwrap();
    assert!(output.status.success());
    let line = String::from_utf8(output.stdout).unwrap();
    let port = bench.node().nbd_address().1;
    assert_eq!(
        line,
        format!(
            "nbd-client 127.0.0.1 {port} /dev/nbd7 -name 'a volume' -block-size 512 \
             -connections 4 -timeout 600 -persist\n"
        )
    );
    let mut bare = bench.nbdctl(&["attach", "vol1"]);
    let output = bare.env("PATH", "").output().unwrap();
    if tools::tool("nbd-client").is_none() || !std::path::Path::new("/sys/block/nbd0").exists() {
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8(output.stdout).unwrap().starts_with("nbd-client 127.0.0.1"));
        assert!(String::from_utf8(output.stderr).unwrap().contains("cannot run here"));
    }
}
