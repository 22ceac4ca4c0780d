//! Where the control API is, what to show it, and how to print: from flags, then the environment,
//! then a file.

use std::env;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::Deserialize;

use super::server::Server;
use crate::failure::Failure;

/// Environment: the server.
const SERVER_ENV: &str = "NBDCTL_SERVER";

/// Environment: the token.
const TOKEN_ENV: &str = "NBDCTL_TOKEN";

/// Bytes that a token, or a configuration file, may have.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// How to print.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs: what the control API says; lists as an array.
    Json,
}

/// Flags of all commands that ask the control API.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "The control API")]
pub(crate) struct Connection {
    /// Where it is, as http://HOST:PORT. Default: NBDCTL_SERVER, else `server` of the configuration
    /// file, else http://127.0.0.1:8090.
    #[arg(long, global = true, value_name = "URL")]
    server: Option<Server>,

    /// A file whose first line is the token. Default: the token in NBDCTL_TOKEN, else `token` or
    /// `token_file` of the configuration file.
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// The configuration file: TOML with server, token, token_file and output. Default:
    /// $XDG_CONFIG_HOME/cinderblock/nbdctl.toml, else ~/.config/cinderblock/nbdctl.toml.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Tables for people, or JSON for programs. Default: `output` of the configuration file, else
    /// table.
    #[arg(
        long,
        short = 'o',
        global = true,
        value_name = "table|json",
        hide_possible_values = true
    )]
    output: Option<Format>,
}

impl Connection {
    /// A flag that was given, for commands that have no use for any.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--server", self.server.is_some()),
            ("--token-file", self.token_file.is_some()),
            ("--config", self.config.is_some()),
            ("--output", self.output.is_some()),
        ];
        flags.into_iter().find_map(|(flag, given)| given.then_some(flag))
    }
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    server: Option<Server>,
    token: Option<Text>,
    token_file: Option<PathBuf>,
    output: Option<Format>,
}

/// A text which no error message shows.
#[derive(Debug)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::String(text) => Ok(Self(text)),
            _ => Err(serde::de::Error::custom("token is not a text in quotes")),
        }
    }
}

/// What holds for this call.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) server: Server,
    pub(crate) token: Option<Token>,
    pub(crate) format: Format,
    /// Where a server may be set that is not the default one, for hints.
    pub(crate) config: PathBuf,
    /// The file has a token that is for its own server, not for this one.
    pub(crate) token_kept_back: bool,
}

/// What the control API knows its user by. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

impl Token {
    /// The value of an `Authorization` header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    fn new(text: &str, from: &str) -> Result<Self, Failure> {
        let token = text.lines().next().unwrap_or_default().trim();
        if token.is_empty() {
            return Err(Failure::usage(format!("{from} has no token")));
        }
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            let what = "a token has visible ASCII characters only";
            return Err(Failure::usage(format!("{from}: {what}")));
        }
        Ok(Self(token.to_owned()))
    }
}

impl Settings {
    /// # Errors
    /// A file that is not there or not right; a bad value in the environment.
    pub(crate) fn load(flags: &Connection) -> Result<Self, Failure> {
        Self::resolve(flags, &|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn resolve(flags: &Connection, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let config = flags.config.clone().or_else(|| default_file(env));
        let file = match &config {
            Some(path) => read_config(path, flags.config.is_some())?,
            None => File::default(),
        };
        let of_env = env(SERVER_ENV).map(|text| text.parse()).transpose();
        let of_env: Option<Server> =
            of_env.map_err(|error| Failure::usage(format!("{SERVER_ENV}: {error}")))?;
        let server = flags.server.clone().or(of_env);
        // A token of the file is for the file's server, whoever else is asked.
        let own = match (&server, &file.server) {
            (Some(asked), Some(of_file)) => asked == of_file,
            _ => true,
        };
        let config = config.unwrap_or_else(|| PathBuf::from("~/.config/cinderblock/nbdctl.toml"));
        let mut token_kept_back = false;
        let token = if let Some(path) = &flags.token_file {
            Some(read_token(path)?)
        } else if let Some(token) = env(TOKEN_ENV) {
            Some(Token::new(&token, TOKEN_ENV)?)
        } else if own {
            file_token(&file, &config)?
        } else {
            token_kept_back = file.token.is_some() || file.token_file.is_some();
            None
        };
        let server = server.or(file.server).unwrap_or_else(Server::default_address);
        let format = flags.output.or(file.output).unwrap_or_default();
        Ok(Self { server, token, format, config, token_kept_back })
    }
}

fn default_file(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    // As the XDG specification has it: what is not absolute is as if it were not set.
    let xdg = env("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let directory = xdg.or_else(|| env("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(directory.join("cinderblock/nbdctl.toml"))
}

/// The file, which need not be there unless it `must`.
fn read_config(path: &Path, must: bool) -> Result<File, Failure> {
    let text = match read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound && !must => return Ok(File::default()),
        Err(error) => return Err(cannot_read(path, &error)),
    };
    toml::from_str(&text).map_err(|error| {
        // Not `error` itself: it draws the line, which may be the one with the token.
        let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
        let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
        let message = error.message().split_whitespace().collect::<Vec<_>>().join(" ");
        Failure::usage(format!("{}{line}: {message}", path.display()))
    })
}

fn file_token(file: &File, path: &Path) -> Result<Option<Token>, Failure> {
    match (&file.token, &file.token_file) {
        (None, None) => Ok(None),
        (Some(Text(token)), None) => Token::new(token, &path.display().to_string()).map(Some),
        (None, Some(token_file)) => {
            let beside = path.parent().unwrap_or_else(|| Path::new("."));
            read_token(&beside.join(token_file)).map(Some)
        }
        (Some(_), Some(_)) => {
            let path = path.display();
            Err(Failure::usage(format!("{path} has both token and token_file: take one away")))
        }
    }
}

fn read_token(path: &Path) -> Result<Token, Failure> {
    let text = read(path).map_err(|error| cannot_read(path, &error))?;
    Token::new(&text, &path.display().to_string())
}

fn cannot_read(path: &Path, error: &std::io::Error) -> Failure {
    Failure::usage(format!("cannot read {}: {error}", path.display()))
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    fs::File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    match text.len() as u64 > FILE_BYTES_MAX {
        true => Err(std::io::Error::other(format!("more than {FILE_BYTES_MAX} bytes"))),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests;
