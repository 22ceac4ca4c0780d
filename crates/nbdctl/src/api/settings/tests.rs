use std::collections::HashMap;

use tempfile::TempDir;

use super::*;

struct World {
    directory: TempDir,
    env: HashMap<&'static str, String>,
    flags: Connection,
}

impl World {
    fn new(config: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let own = directory.path().join("cinderblock");
        fs::create_dir(&own).unwrap();
        fs::write(own.join("nbdctl.toml"), config).unwrap();
        let home = directory.path().display().to_string();
        Self { directory, env: [("XDG_CONFIG_HOME", home)].into(), flags: Connection::default() }
    }

    fn settings(&self) -> Settings {
        self.try_settings().unwrap()
    }

    fn try_settings(&self) -> Result<Settings, Failure> {
        Settings::resolve(&self.flags, &|name| self.env.get(name).cloned())
    }

    #[track_caller]
    fn is_refused(&self, words: &[&str]) -> String {
        let failure = self.try_settings().unwrap_err();
        let lines: Vec<String> = failure.lines().collect();
        let text = lines.join("\n");
        assert_eq!(failure.code(), 64, "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text}");
        }
        text
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

fn header(settings: &Settings) -> Option<String> {
    settings.token.as_ref().map(Token::header)
}

#[test]
fn without_anything_the_local_cluster_is_asked() {
    let settings = Settings::resolve(&Connection::default(), &|_| None).unwrap();
    assert_eq!(settings.server.to_string(), "http://127.0.0.1:8090");
    assert_eq!((settings.token, settings.format), (None, Format::Table));
}

#[test]
fn flags_come_before_the_environment_and_that_before_the_file() {
    let mut world = World::new("server = 'http://file:1'\ntoken = 'of-file'\noutput = 'json'\n");
    let settings = world.settings();
    assert_eq!(settings.server.to_string(), "http://file:1");
    assert_eq!(header(&settings).as_deref(), Some("Bearer of-file"));
    assert_eq!(settings.format, Format::Json);
    world.env.insert("NBDCTL_SERVER", "http://env:2".to_owned());
    world.env.insert("NBDCTL_TOKEN", "of-env".to_owned());
    let settings = world.settings();
    assert_eq!(settings.server.to_string(), "http://env:2");
    assert_eq!(header(&settings).as_deref(), Some("Bearer of-env"));
    world.flags.server = Some("http://flag:3".parse().unwrap());
    world.flags.token_file = Some(world.file("t", "of-flag\nand more\n"));
    world.flags.output = Some(Format::Table);
    let settings = world.settings();
    assert_eq!(settings.server.to_string(), "http://flag:3");
    assert_eq!(header(&settings).as_deref(), Some("Bearer of-flag"));
    assert_eq!(settings.format, Format::Table);
}

#[test]
fn the_token_of_the_file_goes_to_the_server_of_the_file_only() {
    let mut world = World::new("server = 'http://mine:1'\ntoken = 'secret'\n");
    world.flags.server = Some("http://other:1".parse().unwrap());
    let settings = world.settings();
    assert_eq!(settings.token, None);
    assert!(settings.token_kept_back);
    world.flags.server = Some("http://mine:1/".parse().unwrap());
    assert!(world.settings().token.is_some());
    // One that names no server does not say whom it is for.
    let mut world = World::new("token = 'secret'\n");
    world.flags.server = Some("http://other:1".parse().unwrap());
    assert!(world.settings().token.is_some());
}

#[test]
fn a_token_file_is_found_beside_the_file_that_names_it() {
    let world = World::new("token_file = '../t'\n");
    world.file("t", "abc\n");
    assert_eq!(header(&world.settings()).as_deref(), Some("Bearer abc"));
}

#[test]
fn mistakes_in_the_file_are_named_and_no_token_is_shown() {
    World::new("sever = 'http://x'").is_refused(&["nbdctl.toml, line 1", "`sever`", "`server`"]);
    World::new("\noutput = 'yaml'").is_refused(&["nbdctl.toml, line 2", "`yaml`"]);
    World::new("server = 'https://x'").is_refused(&["nbdctl.toml", "https is not built in"]);
    World::new("token = 'a'\ntoken_file = 'b'").is_refused(&["both token and token_file"]);
    World::new("token_file = 'gone'").is_refused(&["gone", "No such file"]);
    for broken in
        ["token = 's3cret", "token = 's3 cret'", "token = ['s3cret']", "token = 's3\u{e4}'"]
    {
        let text = World::new(broken).is_refused(&["nbdctl.toml"]);
        assert!(!text.contains("s3"), "{text}");
    }
    assert!(!format!("{:?}", World::new("token = 's3cret'").settings()).contains("s3cret"));
    let mut world = World::new("");
    world.flags.config = Some(world.directory.path().join("gone.toml"));
    world.is_refused(&["gone.toml", "No such file"]);
    let mut world = World::new("");
    world.flags.token_file = Some(world.file("t", "\n"));
    world.is_refused(&["has no token"]);
    world.env.insert("NBDCTL_SERVER", "ftp://x".to_owned());
    world.is_refused(&["NBDCTL_SERVER", "http://HOST:PORT"]);
}
