//! Why a call failed, and whether to try again.

use felucca_protocol::ErrorCode;
use felucca_protocol::batch::BatchError;
use felucca_protocol::message;

/// The result of every call.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The broker refused.
    #[error("{}: {message}", code.name())]
    Broker { code: ErrorCode, message: String },
    /// No answer in time; what was asked may still have been done.
    #[error("timed out while {0}")]
    Timeout(&'static str),
    /// The connection ended before the answer came; what was asked may have been done.
    #[error("the connection to the broker ended")]
    Disconnected,
    /// The client, producer or consumer was closed.
    #[error("closed")]
    Closed,
    /// The record cannot be sent as it is.
    #[error("record: {0}")]
    Record(String),
    /// The broker sent something that cannot be understood.
    #[error("protocol: {0}")]
    Protocol(String),
    /// The address cannot be used.
    #[error("connect: {0}")]
    Connect(String),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Broker { code, .. } => code.retryable(),
            Self::Timeout(_) | Self::Disconnected | Self::Connect(_) => true,
            Self::Closed | Self::Record(_) | Self::Protocol(_) => false,
        }
    }

    /// The broker's error code, if the broker refused.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Broker { code, .. } => Some(*code),
            _ => None,
        }
    }
}

impl From<message::Error> for Error {
    fn from(error: message::Error) -> Self {
        Self::Broker { code: error.error_code(), message: error.message }
    }
}

impl From<BatchError> for Error {
    fn from(error: BatchError) -> Self {
        Self::Protocol(error.to_string())
    }
}
