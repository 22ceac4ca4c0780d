//! The cases.
//!
//! A module for each client: [`nbdinfo`], [`nbdcopy`], [`qemu`], [`fio`], [`ext4`] (through nbdfuse
//! and a loop device). Then what concerns several: [`multi_conn`], [`restart`], [`old_clients`],
//! and [`trouble`], of which there must be none. The helpers are [`command`] (running a program),
//! [`map`] (where data is), [`content`] (what to write), [`mount`] and [`cluster`] (what they
//! meet). A test whose client is not installed skips itself.

mod cluster;
mod command;
mod content;
mod ext4;
mod fio;
mod map;
mod mount;
mod multi_conn;
mod nbdcopy;
mod nbdinfo;
mod old_clients;
mod qemu;
mod restart;
mod trouble;

use self::cluster::{KIB, MIB, cluster};
