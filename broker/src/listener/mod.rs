//! Doors to the broker. Each decodes its own protocol and calls [`Broker`](crate::broker::Broker); none knows another.

pub mod native;
