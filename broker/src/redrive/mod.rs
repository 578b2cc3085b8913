//! What is done with dead letters: given another chance ([`runner`], on the plan that [`crate::engine::redrive`] keeps), looked through
//! ([`find`]), dropped ([`mod@purge`]).

mod find;
mod purge;
mod runner;

pub use find::{Preview, preview};
pub use purge::{PurgeError, purge};
pub(crate) use runner::run;
