use std::collections::HashMap;
use std::ffi::OsString;

use super::*;

const DEMO: &str = r#"name = "demo"
[[nodes]]
name = "nbd-1-1"
nbd = "127.0.0.1:11001"
grpc = "127.0.0.1:11002"
http = "[::1]:11003"
[[nodes]]
name = "nbd-1-2"
nbd = "nbd-1-2:11001"
grpc = "nbd-1-2:11002"
http = "nbd-1-2:11003"
[[shards]]
replicas = ["nbd-1-1", "nbd-1-2"]
[[shards]]
replicas = ["nbd-1-2"]
[volumes]
auto_create = false
default_size = "64MiB"
"#;

fn parse(text: &str) -> Result<ClusterConfig, ConfigError> {
    ClusterConfig::from_toml(text, Path::new("cluster.toml"))
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn environment(pairs: &[(&str, &str)]) -> Result<Option<ClusterConfig>, ConfigError> {
    let pairs: HashMap<_, _> = pairs.iter().copied().collect();
    raw::from_env(|name| pairs.get(name).map(OsString::from))
}

#[test]
fn a_file_gives_a_typed_cluster() {
    let cluster = parse(DEMO).unwrap();
    assert_eq!(cluster.name().as_str(), "demo");
    assert_eq!(cluster.nodes().len(), 2);
    let first = cluster.node(&node("nbd-1-1")).unwrap();
    assert_eq!(first.addresses.nbd.to_string(), "127.0.0.1:11001");
    assert_eq!(first.addresses, first.listen);
    assert_eq!(cluster.shard_count().get(), 2);
    assert_eq!(cluster.replicas(ShardId(0)), [node("nbd-1-1"), node("nbd-1-2")]);
    assert_eq!(cluster.replicas(ShardId(2)), []);
    let shards = |name: &str| cluster.shards_of(&node(name)).collect::<Vec<_>>();
    assert_eq!(shards("nbd-1-1"), [ShardId(0)]);
    assert_eq!(shards("nbd-1-2"), [ShardId(0), ShardId(1)]);
    assert_eq!(cluster.replica_id(ShardId(0), &node("nbd-1-2")), ReplicaId::new(2));
    assert_eq!(cluster.replica_id(ShardId(1), &node("nbd-1-2")), ReplicaId::new(1));
    assert_eq!(cluster.replica_id(ShardId(1), &node("nbd-1-1")), None);
    let volumes = VolumePolicy { auto_create: false, default_size: ByteSize::new(64 << 20) };
    assert_eq!(cluster.volumes(), volumes);
}

#[test]
fn volumes_may_be_left_out() {
    let text = DEMO.split("[volumes]").next().unwrap();
    assert_eq!(parse(text).unwrap().volumes(), VolumePolicy::default());
    let partly = format!("{text}[volumes]\ndefault_size = 8192\n");
    let volumes = VolumePolicy { auto_create: true, default_size: ByteSize::new(8192) };
    assert_eq!(parse(&partly).unwrap().volumes(), volumes);
}

#[test]
fn what_is_written_reads_the_same() {
    let cluster = parse(DEMO).unwrap();
    assert_eq!(parse(&cluster.to_toml()).unwrap(), cluster);
}

// Goal: an operator can act on the message alone.
// Method: break the demo in one place at a time; the message names file, field, value and the rule.
#[test]
fn errors_name_file_field_value_and_rule() {
    for (from, to, expected) in [
        ("\"demo\"", "\"de mo\"", &["name = \"de mo\"", "A-Z a-z 0-9"][..]),
        ("name = \"nbd-1-2\"", "name = \"\"", &["nodes[1].name = \"\"", "1 to 64"]),
        ("name = \"nbd-1-2\"", "name = \"nbd-1-1\"", &["nodes[1].name = nbd-1-1", "nodes[0].name"]),
        ("\"127.0.0.1:11001\"", "\"127.0.0.1\"", &["nodes[0].nbd = 127.0.0.1", "host:port"]),
        ("127.0.0.1:11002", "127.0.0.1:70000", &["nodes[0].grpc = 127.0.0.1:70000", "65535"]),
        ("127.0.0.1:11002", "127.0.0.1:0", &["nodes[0].grpc = 127.0.0.1:0", "1 to 65535"]),
        ("[::1]:11003", "::1:11003", &["nodes[0].http = ::1:11003", "brackets"]),
        ("[::1]:11003", "127.0.0.1:11001", &["nodes[0].http", "nodes[0].nbd"]),
        ("[\"nbd-1-2\"]", "[]", &["shards[1].replicas = 0 entries", "1 to 7"]),
        ("[\"nbd-1-2\"]", "[\"nbd-9\"]", &["shards[1].replicas = nbd-9", "nbd-1-1, nbd-1-2"]),
        (
            "\"nbd-1-1\", \"nbd-1-2\"",
            "\"nbd-1-2\", \"nbd-1-2\"",
            &["shards[0].replicas = nbd-1-2", "twice"],
        ),
        ("\"64MiB\"", "\"1.5GiB\"", &["line 18: default_size = \"1.5GiB\"", "64MiB"]),
        ("\"64MiB\"", "\"1000\"", &["volumes.default_size = 1000B", "multiple of 512"]),
        ("\"64MiB\"", "\"0\"", &["volumes.default_size = 0", "4096"]),
        ("auto_create = false", "auto_create = 7", &["line 17: auto_create = 7", "boolean"]),
        ("auto_create", "autocreate", &["line 17: autocreate = false", "auto_create"]),
        ("grpc = \"127", "gprc = \"127", &["line 5: gprc", "unknown field"]),
        ("grpc = \"127.0.0.1:11002\"\n", "", &["missing field `grpc`"]),
    ] {
        assert!(DEMO.contains(from), "{from}");
        let message = parse(&DEMO.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(message.starts_with("cluster.toml: "), "{message}");
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}

#[test]
fn a_cluster_has_a_shard() {
    let message = parse("name = \"x\"\nnodes = []\nshards = []").unwrap_err().to_string();
    assert_eq!(message, "cluster.toml: shards = 0 entries: a cluster has 1 to 65536 shards, not 0");
}

#[test]
fn an_unreadable_file_is_named() {
    let error = ClusterConfig::load(Path::new("/nonexistent/cluster.toml")).unwrap_err();
    assert_eq!(error.to_string(), "read cluster file /nonexistent/cluster.toml");
}

#[test]
fn the_environment_gives_the_same() {
    assert_eq!(environment(&[]).unwrap(), None);
    assert_eq!(environment(&[("NBD_SHARDS", "")]).unwrap(), None);
    let cluster = environment(&[("NBD_SHARDS", r#"[["nbd-1-1"]]"#)]).unwrap().unwrap();
    assert_eq!(cluster.name().as_str(), "cinderblock");
    assert_eq!(cluster.volumes(), VolumePolicy::default());
    let only = &cluster.nodes()[0];
    assert_eq!(only.addresses.nbd.to_string(), "nbd-1-1:10809");
    assert_eq!(only.addresses.grpc.to_string(), "nbd-1-1:7400");
    assert_eq!(only.addresses.http.to_string(), "nbd-1-1:8080");
    assert_eq!(only.listen.nbd.to_string(), "0.0.0.0:10809");

    let cluster = environment(&[
        ("NBD_SHARDS", r#"[["nbd-1-1","nbd-1-2","nbd-1-3"],["nbd-2-1","nbd-1-2","nbd-2-3"]]"#),
        ("NBD_CLUSTER", "prod"),
        ("NBD_AUTO_CREATE", "false"),
        ("NBD_DEFAULT_SIZE", "2GiB"),
    ]);
    let cluster = cluster.unwrap().unwrap();
    assert_eq!(cluster.name().as_str(), "prod");
    assert_eq!(cluster.nodes().len(), 5);
    assert_eq!(cluster.replica_id(ShardId(1), &node("nbd-1-2")), ReplicaId::new(2));
    let volumes = VolumePolicy { auto_create: false, default_size: ByteSize::new(2 << 30) };
    assert_eq!(cluster.volumes(), volumes);
}

#[test]
fn errors_name_the_variable() {
    let one = r#"[["a"]]"#;
    for (pairs, expected) in [
        (&[("NBD_SHARDS", "nbd-1-1")][..], &["NBD_SHARDS = nbd-1-1", "[[\"nbd-1-1\"]]"][..]),
        (&[("NBD_SHARDS", "[]")], &["NBD_SHARDS = 0 entries", "1 to 65536 shards"]),
        (&[("NBD_SHARDS", "[[]]")], &["NBD_SHARDS[0] = 0 entries", "1 to 7"]),
        (&[("NBD_SHARDS", r#"[["a b"]]"#)], &["NBD_SHARDS[0] = \"a b\"", "A-Z"]),
        (&[("NBD_SHARDS", r#"[["a"],["b","b"]]"#)], &["NBD_SHARDS[1] = b", "twice"]),
        (&[("NBD_SHARDS", one), ("NBD_CLUSTER", "é")], &["NBD_CLUSTER = \"é\"", "A-Z"]),
        (&[("NBD_SHARDS", one), ("NBD_AUTO_CREATE", "yes")], &["NBD_AUTO_CREATE = yes", "true"]),
        (&[("NBD_SHARDS", one), ("NBD_DEFAULT_SIZE", "1G")], &["NBD_DEFAULT_SIZE = 1G", "1GiB"]),
        (&[("NBD_SHARDS", one), ("NBD_DEFAULT_SIZE", "5")], &["NBD_DEFAULT_SIZE = 5B", "4096"]),
    ] {
        let message = environment(pairs).unwrap_err().to_string();
        assert!(message.starts_with("environment: "), "{message}");
        for part in expected {
            assert!(message.contains(part), "{message:?} lacks {part:?}");
        }
    }
}

#[test]
fn addresses_take_names_and_both_ip_families() {
    for text in ["10.0.0.5:10809", "nbd-1-1:7400", "a.b_c.example:1", "[fe80::1]:8080", "x:0"] {
        assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
    }
    for (text, problem) in [
        ("", InvalidAddress::NoPort),
        ("host", InvalidAddress::NoPort),
        (":80", InvalidAddress::BadHost),
        ("ho st:80", InvalidAddress::BadHost),
        ("[::1:80", InvalidAddress::BadHost),
        ("fe80::1:80", InvalidAddress::BadHost),
        ("host:", InvalidAddress::BadPort),
        ("host:+1", InvalidAddress::BadPort),
        ("host:65536", InvalidAddress::BadPort),
    ] {
        assert_eq!(text.parse::<HostPort>(), Err(problem), "{text:?}");
    }
}
