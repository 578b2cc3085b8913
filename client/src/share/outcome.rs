//! What became of a record in a handler, and how handlers say it.
//!
//! A handler answers anything that turns into an [`Outcome`]: `()` for done, an [`Outcome`], a [`Nack`], a [`Reject`], or a
//! `Result` of those, so that `?` works. An application's own error says once how it is retried:
//!
//! ```
//! use felucca_client::{Nack, Outcome, Reject};
//!
//! enum PaymentError {
//!     GatewayDown(String),
//!     CardUnknown,
//! }
//!
//! impl From<PaymentError> for Outcome {
//!     fn from(error: PaymentError) -> Self {
//!         match error {
//!             PaymentError::GatewayDown(why) => Nack::new("gateway-down", why).into(),
//!             PaymentError::CardUnknown => Reject::new("card-unknown", "no such card").into(),
//!         }
//!     }
//! }
//!
//! assert_eq!(Outcome::from(Ok::<(), PaymentError>(())), Outcome::Ack);
//! assert!(matches!(Outcome::from(PaymentError::CardUnknown), Outcome::Reject(_)));
//! ```

use super::delivery::{Nack, Reject};
use crate::record::Record;

/// What became of a record in a handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ack,
    /// Failed, to be tried again.
    Nack(Nack),
    /// Failed for good.
    Reject(Reject),
    /// Not started.
    Release,
    /// Done, and these records are appended with the acknowledgement, both or neither. Outputs with a key go to the key's
    /// partition.
    Complete(Vec<Record>),
}

impl Outcome {
    /// Failed, to be tried again after the group's backoff.
    pub fn nack(reason: impl Into<String>) -> Self {
        Nack::new("", reason).into()
    }

    /// Failed for good.
    pub fn reject(class: impl Into<String>, reason: impl Into<String>) -> Self {
        Reject::new(class, reason).into()
    }
}

impl From<()> for Outcome {
    fn from((): ()) -> Self {
        Self::Ack
    }
}

impl From<Nack> for Outcome {
    fn from(nack: Nack) -> Self {
        Self::Nack(nack)
    }
}

impl From<Reject> for Outcome {
    fn from(reject: Reject) -> Self {
        Self::Reject(reject)
    }
}

impl<T: Into<Outcome>, E: Into<Outcome>> From<Result<T, E>> for Outcome {
    fn from(result: Result<T, E>) -> Self {
        result.map_or_else(Into::into, Into::into)
    }
}

impl AsRef<[Outcome]> for Outcome {
    fn as_ref(&self) -> &[Outcome] {
        std::slice::from_ref(self)
    }
}
