//! Frames: the envelope of everything that goes over a native connection.
//!
//! All numbers are big-endian.
//!
//! ```text
//!  0  u32  length          bytes after this field: 16 ..= the receiver's limit
//!  4  u8   kind            0 request, 1 reply, 2 error, 3 push
//!  5  u8   api             number of the request (reply and error: of the request answered) or of the push
//!  6  u16  zero            reserved; anything else is refused
//!  8  u64  correlation     chosen by the client, returned in the answer; push: the subscription id
//! 16  u32  message_length  bytes of the message
//! 20  …    message         protobuf, see `proto/felucca.proto`; of an error: `Error`
//!  …  …    payload         the rest: record batches, back to back, as they are stored
//! ```
//!
//! **Invariants.** A length is judged before anything is reserved for it, and the room reserved grows with the bytes that
//! have really come, not with the length claimed. Message and payload of a decoded frame share the memory that was read.
//! Every [`FrameError`] is fatal to its connection: where the next frame starts is not known any more.
//!
//! To change the format: a new protocol version, negotiated by `Hello`; the first 20 bytes and `Hello` itself stay.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes before the message.
pub const HEADER_LEN: usize = 20;

/// The smallest value of the length field: the header's rest, with neither message nor payload.
const MIN_LENGTH: u32 = 16;

/// Most room made at once for a frame of which less than that has come.
const RESERVE_STEP: usize = 64 * 1024;

/// What a frame is in the exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Client to broker.
    Request = 0,
    /// Broker to client: the request was done.
    Reply = 1,
    /// Broker to client: the request failed; the message is `Error`.
    Error = 2,
    /// Broker to client, unasked.
    Push = 3,
}

impl TryFrom<u8> for Kind {
    type Error = FrameError;

    fn try_from(number: u8) -> Result<Self, FrameError> {
        match number {
            0 => Ok(Self::Request),
            1 => Ok(Self::Reply),
            2 => Ok(Self::Error),
            3 => Ok(Self::Push),
            _ => Err(FrameError::UnknownKind(number)),
        }
    }
}

/// Why bytes are not a frame. The connection must end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {length} bytes is over the limit of {limit}")]
    TooLarge { length: u32, limit: u32 },
    #[error("a frame of {0} bytes is too short for its header")]
    TooShort(u32),
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("the reserved bytes of the frame header are not zero")]
    Reserved,
    #[error("a message of {message} bytes does not fit into a frame of {length}")]
    MessageLength { message: u32, length: u32 },
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    /// As it came; [`crate::Api`] knows the names. A number without a name is for the receiver to refuse.
    pub api: u8,
    pub correlation: u64,
    pub message: Bytes,
    /// Record batches back to back, or empty. Mutable, so that offsets can be assigned in place.
    pub payload: BytesMut,
}

impl Frame {
    /// Decodes the message.
    ///
    /// # Errors
    /// The bytes are not such a message. Concerns this request only; the connection is sound.
    pub fn decode_message<M: prost::Message + Default>(&self) -> Result<M, prost::DecodeError> {
        M::decode(self.message.clone())
    }
}

/// Bytes of the frame that `buffer` starts with, its length field included, once enough has come to tell.
///
/// # Errors
/// The length is out of bounds; `max_frame` limits the length field's value.
pub fn required(buffer: &[u8], max_frame: u32) -> Result<Option<usize>, FrameError> {
    let Some(field) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*field);
    if length < MIN_LENGTH {
        return Err(FrameError::TooShort(length));
    }
    if length > max_frame {
        return Err(FrameError::TooLarge { length, limit: max_frame });
    }
    Ok(Some(4 + length as usize))
}

/// Takes the next frame off the front of `buffer`, or makes room for more of it and returns `None`.
///
/// # Errors
/// The bytes are not a frame, or one over `max_frame` (the limit of the length field). The connection must end.
pub fn decode(buffer: &mut BytesMut, max_frame: u32) -> Result<Option<Frame>, FrameError> {
    let Some(total) = required(buffer, max_frame)? else { return Ok(None) };
    if buffer.len() < total {
        let missing = total - buffer.len();
        buffer.reserve(missing.min(RESERVE_STEP.max(buffer.len())));
        return Ok(None);
    }
    let mut frame = buffer.split_to(total);
    let length = frame.get_u32();
    let kind = Kind::try_from(frame.get_u8())?;
    let api = frame.get_u8();
    if frame.get_u16() != 0 {
        return Err(FrameError::Reserved);
    }
    let correlation = frame.get_u64();
    let message_length = frame.get_u32();
    if message_length as usize > frame.len() {
        return Err(FrameError::MessageLength { message: message_length, length });
    }
    let message = frame.split_to(message_length as usize).freeze();
    Ok(Some(Frame { kind, api, correlation, message, payload: frame }))
}

/// Appends the header of a frame whose message and payload the caller writes after it.
///
/// # Panics
/// When both together do not fit into a `u32`; a sender keeps to its peer's limit, which is far below.
pub fn encode_header(
    buffer: &mut BytesMut,
    kind: Kind,
    api: impl Into<u8>,
    correlation: u64,
    message_len: usize,
    payload_len: usize,
) {
    let length = message_len
        .checked_add(payload_len)
        .and_then(|body| u32::try_from(body).ok())
        .and_then(|body| body.checked_add(MIN_LENGTH))
        .expect("a frame's length fits into a u32");
    buffer.put_u32(length);
    buffer.put_u8(kind as u8);
    buffer.put_u8(api.into());
    buffer.put_u16(0);
    buffer.put_u64(correlation);
    buffer.put_u32(length - MIN_LENGTH - payload_len as u32);
}

/// Appends header and message of a frame; the caller writes `payload_len` bytes of batches after it.
///
/// # Panics
/// As [`encode_header`].
pub fn encode(
    buffer: &mut BytesMut,
    kind: Kind,
    api: impl Into<u8>,
    correlation: u64,
    message: &impl prost::Message,
    payload_len: usize,
) {
    let message_len = message.encoded_len();
    buffer.reserve(HEADER_LEN + message_len);
    encode_header(buffer, kind, api, correlation, message_len, payload_len);
    message.encode_raw(buffer);
}
