//! Why a call failed, and whether to try again.

use std::time::Duration;

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
    Broker {
        code: ErrorCode,
        message: String,
        /// Not to be asked again before; the client chooses when it is `None`.
        retry_after: Option<Duration>,
    },
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
    /// The service that handles records can take no more.
    #[error("handler: {0}")]
    Handler(String),
}

impl Error {
    /// Whether the same call may succeed later.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Broker { code, .. } => code.retryable(),
            Self::Timeout(_) | Self::Disconnected | Self::Connect(_) => true,
            Self::Closed | Self::Record(_) | Self::Protocol(_) | Self::Handler(_) => false,
        }
    }

    /// How long the broker wants to be left alone, if it said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Broker { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(crate) fn broker(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Broker { code, message: message.into(), retry_after: None }
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
        let retry_after = Some(error.retry_after_ms).filter(|millis| *millis > 0);
        Self::Broker {
            code: error.error_code(),
            message: error.message,
            retry_after: retry_after.map(|millis| Duration::from_millis(millis.into())),
        }
    }
}

impl From<BatchError> for Error {
    fn from(error: BatchError) -> Self {
        Self::Protocol(error.to_string())
    }
}
