//! What the whole-system tests share.

pub mod engine_model;
pub mod process;
pub mod share_bounds;
pub mod sim;
pub mod small_disk;

/// Compiles the example in README.md.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
