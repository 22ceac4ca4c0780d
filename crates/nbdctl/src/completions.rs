//! `nbdctl completions`: what makes a shell complete the words of `nbdctl`.

use std::io::Write as _;

use clap_complete::Shell;

use crate::failure::Failure;

/// Flags of `nbdctl completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell.
    shell: Shell,
}

/// For `--help`.
pub(crate) const HELP: &str = "\
Examples:
  source <(nbdctl completions bash)                          # in this shell
  nbdctl completions bash > ~/.local/share/bash-completion/completions/nbdctl
  nbdctl completions zsh > ~/.zfunc/_nbdctl                  # a directory of fpath
  nbdctl completions fish > ~/.config/fish/completions/nbdctl.fish";

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "nbdctl", &mut script);
    Ok(std::io::stdout().write_all(&script)?)
}
