//! The payment service and the gateway that it charges through.

pub(crate) mod gateway;
pub(crate) mod service;
pub(crate) mod store;
