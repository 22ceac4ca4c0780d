//! What nbdinfo tells of an export.

use nbd_testkit::require_tools;
use serde_json::json;

use super::cluster;
use super::command::tool;
use super::map::{Kind, assert_same_map, json, map_of, nbdinfo_map};
use super::{KIB, MIB};

#[test]
fn an_export_shows_its_size_abilities_and_block_sizes() {
    require_tools!["nbdinfo"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let export = &json(&tool("nbdinfo").args(["--json", &uri]).run())["exports"][0];
    let expected = json!({
        "export-name": "volume",
        "content": export["content"],
        "uri": uri,
        "contexts": ["base:allocation"],
        "is_rotational": false,
        "is_read_only": false,
        "can_cache": true,
        "can_df": true,
        "can_fast_zero": true,
        "can_flush": true,
        "can_fua": true,
        "can_multi_conn": true,
        "can_trim": true,
        "can_zero": true,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 33_554_432,
        "export-size": 67_108_864,
        "export-size-str": "64M",
    });
    assert_eq!(*export, expected);
}

#[test]
fn the_protocol_is_fixed_newstyle_with_structured_replies() {
    require_tools!["nbdinfo"];
    let cluster = cluster("64MiB");
    let server = json(&tool("nbdinfo").args(["--json", &cluster.front().uri("volume")]).run());
    let seen = [&server["protocol"], &server["TLS"], &server["structured"]];
    assert_eq!(seen, [&json!("newstyle-fixed"), &json!(false), &json!(true)]);
}

#[test]
fn the_page_for_people_shows_the_same() {
    require_tools!["nbdinfo"];
    let cluster = cluster("64MiB");
    let page = tool("nbdinfo").arg(cluster.front().uri("volume")).run();
    for line in [
        "export=\"volume\":",
        "export-size: 67108864 (64M)",
        "can_multi_conn: true",
        "is_read_only: false",
        "block_size_minimum: 1",
    ] {
        assert!(page.lines().any(|shown| shown.trim() == line), "no {line:?} in\n{page}");
    }
}

#[test]
fn the_list_names_all_volumes_in_order() {
    require_tools!["nbdinfo"];
    let cluster = cluster("1MiB");
    assert_eq!(list(&cluster.front().uri("")), [""; 0]);
    for name in ["zebra", "ant", "default", "lion.2", "lion"] {
        cluster.front().connect(name).unwrap();
    }
    assert_eq!(list(&cluster.front().uri("")), ["ant", "default", "lion", "lion.2", "zebra"]);
}

fn list(uri: &str) -> Vec<String> {
    let server = json(&tool("nbdinfo").args(["--list", "--json", uri]).run());
    let exports = server["exports"].as_array().expect("a list of exports").iter();
    exports.map(|export| export["export-name"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn the_empty_name_is_the_default_volume() {
    require_tools!["nbdinfo"];
    let cluster = cluster("1MiB");
    cluster.front().connect("default").unwrap().write(0, b"here").unwrap();
    let expected = map_of(&[(4 * KIB, Kind::Data), (MIB - 4 * KIB, Kind::Hole)]);
    assert_same_map(&nbdinfo_map(&cluster.front().uri("")), &expected);
}

#[test]
fn the_map_is_exact_to_the_block() {
    require_tools!["nbdinfo"];
    let cluster = cluster("64MiB");
    let uri = cluster.front().uri("volume");
    let mut client = cluster.front().connect("volume").unwrap();
    assert_same_map(&nbdinfo_map(&uri), &map_of(&[(64 * MIB, Kind::Hole)]));

    // Single blocks, one of them at the end of a chunk; a byte; across a chunk's end.
    client.write(8 * KIB, &[1; 4096]).unwrap();
    client.write(60 * KIB, &[2; 4096]).unwrap();
    client.write(MIB + 5, &[3]).unwrap();
    client.write(2 * MIB - 2, &[4; 4]).unwrap();
    let expected = map_of(&[
        (8 * KIB, Kind::Hole),
        (4 * KIB, Kind::Data),
        (48 * KIB, Kind::Hole),
        (4 * KIB, Kind::Data),
        (MIB - 64 * KIB, Kind::Hole),
        (4 * KIB, Kind::Data),
        (MIB - 8 * KIB, Kind::Hole),
        (8 * KIB, Kind::Data),
        (62 * MIB - 4 * KIB, Kind::Hole),
    ]);
    assert_same_map(&nbdinfo_map(&uri), &expected);
}

#[test]
fn the_map_tells_trimmed_zeroed_and_kept_ranges_apart() {
    require_tools!["nbdinfo"];
    let cluster = cluster("4MiB");
    let mut client = cluster.front().connect("volume").unwrap();
    client.write(0, &vec![1; 512 << 10]).unwrap();
    // A trim leaves blocks alone that it covers in part; zeroes are exact to the byte.
    client.trim(5 * KIB, 12 * KIB).unwrap();
    client.write_zeroes(64 * KIB, 64 * KIB, false).unwrap();
    client.write_zeroes(200 * KIB, 8 * KIB, true).unwrap();
    client.write_zeroes(300 * KIB + 1, 4 * KIB, false).unwrap();
    client.write_zeroes(2 * MIB, MIB, true).unwrap();
    let expected = map_of(&[
        (8 * KIB, Kind::Data),
        (8 * KIB, Kind::Hole),
        (48 * KIB, Kind::Data),
        (64 * KIB, Kind::Hole),
        (72 * KIB, Kind::Data),
        (8 * KIB, Kind::Zero),
        (304 * KIB, Kind::Data),
        (1536 * KIB, Kind::Hole),
        (MIB, Kind::Zero),
        (MIB, Kind::Hole),
    ]);
    assert_same_map(&nbdinfo_map(&cluster.front().uri("volume")), &expected);
}

#[test]
fn the_map_of_a_terabyte_comes_at_once() {
    require_tools!["nbdinfo"];
    let cluster = cluster("1TiB");
    let tib = 1024 * 1024 * MIB;
    let mut client = cluster.front().connect("volume").unwrap();
    client.write(tib / 2, &[1; 4096]).unwrap();
    client.write(tib - 1, &[1]).unwrap();
    let expected = map_of(&[
        (tib / 2, Kind::Hole),
        (4 * KIB, Kind::Data),
        (tib / 2 - 8 * KIB, Kind::Hole),
        (4 * KIB, Kind::Data),
    ]);
    assert_same_map(&nbdinfo_map(&cluster.front().uri("volume")), &expected);
}
