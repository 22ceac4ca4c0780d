//! Where the control API is, and the token: that it goes where it should, and nowhere else.

use std::fs;

use tempfile::TempDir;

use crate::fake::{Fake, problem};
use crate::support::{ask, nbdctl, run};

#[test]
fn flags_environment_and_file_are_heard_in_this_order() {
    let (by_flag, by_env, by_file) = (Fake::start(), Fake::start(), Fake::start());
    let home = TempDir::new().unwrap();
    let directory = home.path().join(".config/cinderblock");
    fs::create_dir_all(&directory).unwrap();
    let file = format!("server = '{}'\ntoken = 'of-file'\noutput = 'json'\n", by_file.url());
    fs::write(directory.join("nbdctl.toml"), file).unwrap();
    let list = || {
        let mut command = nbdctl(&["shard", "list"]);
        command.env("HOME", home.path());
        command
    };
    assert!(run(&mut list()).succeeds().starts_with('['));
    assert_eq!(by_file.seen()[0].token.as_deref(), Some("Bearer of-file"));
    let with_env = || {
        let mut command = list();
        command.env("NBDCTL_SERVER", by_env.url());
        command
    };
    run(&mut with_env()).succeeds();
    // The token of the file is not for this server.
    assert_eq!(by_env.seen()[0].token, None);
    run(with_env().env("NBDCTL_TOKEN", "of-env")).succeeds();
    assert_eq!(by_env.seen()[0].token.as_deref(), Some("Bearer of-env"));
    let token = home.path().join("token");
    fs::write(&token, "of-flag\n").unwrap();
    let text = run(with_env()
        .env("NBDCTL_TOKEN", "of-env")
        .args(["--server", &by_flag.url(), "--output=table", "--token-file"])
        .arg(&token))
    .succeeds();
    assert!(text.starts_with("SHARD"), "{text}");
    assert_eq!(by_flag.seen()[0].token.as_deref(), Some("Bearer of-flag"));
    // In front of the command they mean the same.
    let text = run(&mut nbdctl(&["--server", &by_flag.url(), "-o", "json", "shard", "list"]));
    assert!(text.succeeds().starts_with('['));
    assert!(by_file.seen().is_empty());
}

#[test]
fn a_redirect_is_not_followed_and_no_token_leaks() {
    let (fake, other) = (Fake::start(), Fake::start());
    let elsewhere = format!("{}/api/v1/shards", other.url());
    for status in [301, 302, 307, 308] {
        fake.script("GET /shards", status, &[("location", &elsewhere)], "");
        let err =
            run(nbdctl(&["shard", "list", "--server", &fake.url()]).env("NBDCTL_TOKEN", "s3cret"))
                .fails(1, &["somewhere else", &elsewhere, "not followed"]);
        assert!(!err.contains("s3cret"), "{err}");
    }
    assert!(other.seen().is_empty());
    // Nor does it go to a proxy.
    let proxied = run(nbdctl(&["shard", "list", "--server", &fake.url()])
        .env("http_proxy", other.url())
        .env("ALL_PROXY", other.url())
        .env("NBDCTL_TOKEN", "s3cret"));
    assert_eq!(proxied.code, 1);
    assert!(other.seen().is_empty());
}

#[test]
fn who_is_not_allowed_is_told_what_to_do() {
    let fake = Fake::start();
    let unknown = problem("unauthorized", 401, "no token was given");
    fake.script("GET /shards", 401, &[], &unknown);
    ask(&fake, &["shard", "list"]).fails(5, &["--token-file FILE", "NBDCTL_TOKEN"]);
    let err =
        run(nbdctl(&["shard", "list", "--server", &fake.url()]).env("NBDCTL_TOKEN", "s3cret"))
            .fails(5, &["does not know this token"]);
    assert!(!err.contains("s3cret"), "{err}");
    fake.script("DELETE /volumes/x", 403, &[], &problem("forbidden", 403, "reader"));
    ask(&fake, &["volume", "rm", "x"]).fails(5, &["error: reader", "role is admin"]);
}

#[test]
fn a_file_with_unknown_keys_is_refused_by_name() {
    let home = TempDir::new().unwrap();
    let path = home.path().join("mine.toml");
    fs::write(&path, "server = 'http://x'\ncolor = 'red'\n").unwrap();
    let path = path.display().to_string();
    run(&mut nbdctl(&["shard", "list", "--config", &path]))
        .fails(64, &[&format!("{path}, line 2"), "`color`"]);
    run(&mut nbdctl(&["shard", "list", "--config=/no/such.toml"])).fails(64, &["/no/such.toml"]);
}
