//! The protobuf messages of the native protocol, generated from `proto/felucca.proto` at build time.
//!
//! Fields of type `bytes` are [`bytes::Bytes`]: they share the memory of the frame that they came in.

use crate::error::ErrorCode;

include!(concat!(env!("OUT_DIR"), "/felucca.v1.rs"));

impl Error {
    /// An error with the sender's default backoff.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), retry_after_ms: 0 }
    }

    /// The code as an enum; a number that this version does not know is [`ErrorCode::Unknown`].
    pub fn error_code(&self) -> ErrorCode {
        ErrorCode::from_code(self.code)
    }
}
