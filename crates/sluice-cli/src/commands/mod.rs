//! One file per subcommand.

pub(crate) mod eval;
pub(crate) mod train;

pub(crate) mod chat;
pub(crate) mod generate;

pub(crate) mod devices;
pub(crate) mod inspect;
