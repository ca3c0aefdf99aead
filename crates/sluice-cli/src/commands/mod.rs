//! One file per subcommand.

pub(crate) mod distill;

pub(crate) mod eval;
pub(crate) mod eval_quality;
pub(crate) mod needle;
pub(crate) mod train;

pub(crate) mod chat;
pub(crate) mod embed;
pub(crate) mod generate;

pub(crate) mod inspect;
pub(crate) mod pull;
pub(crate) mod quantize;
pub(crate) mod serve;

pub(crate) mod bench;
pub(crate) mod devices;
mod host_waits;
pub(crate) mod selftest;
