//! The behaviour of share groups: one test for every row of their tables, and for every race between two rows.

mod dead_letters;
mod flow;
mod held;
mod isolation;
mod key_order;
mod members;
mod operators;
mod outage;
mod races;
mod replies;
mod transitions;
