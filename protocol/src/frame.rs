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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::api::Api;
    use crate::message;

    fn frame(api: u8, correlation: u64, name: &str, payload: &[u8]) -> BytesMut {
        let mut buffer = BytesMut::new();
        let message = message::DeleteTopic { name: name.to_owned() };
        encode(&mut buffer, Kind::Request, api, correlation, &message, payload.len());
        buffer.extend_from_slice(payload);
        buffer
    }

    #[test]
    fn the_bytes_are_where_the_format_says() {
        let frame = frame(Api::DeleteTopic.into(), 0x0102_0304_0506_0708, "t", b"payload");
        let expected = [
            &[0, 0, 0, 16 + 3 + 7, 0, 12, 0, 0][..],
            &[1, 2, 3, 4, 5, 6, 7, 8],
            &[0, 0, 0, 3],
            &[0x0a, 1, b't'],
            b"payload",
        ];
        assert_eq!(frame[..], expected.concat());
    }

    #[test]
    fn an_unknown_request_survives_for_its_receiver_to_refuse() {
        let mut bytes = frame(250, 7, "x", b"");
        let frame = decode(&mut bytes, 1024).unwrap().unwrap();
        assert_eq!((frame.kind, frame.api, frame.correlation), (Kind::Request, 250, 7));
        assert!(frame.payload.is_empty());
        assert_eq!(frame.decode_message::<message::DeleteTopic>().unwrap().name, "x");
    }

    #[test]
    fn message_and_payload_are_not_copied() {
        let mut bytes = frame(21, 1, "name", b"payload");
        let range = bytes.as_ptr_range();
        let frame = decode(&mut bytes, 1024).unwrap().unwrap();
        assert!(range.contains(&frame.message.as_ptr()));
        assert!(range.contains(&frame.payload.as_ptr()));
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_from_its_length_alone_before_room_is_made() {
        let mut bytes = BytesMut::from(&u32::MAX.to_be_bytes()[..]);
        let capacity = bytes.capacity();
        let error = decode(&mut bytes, 1 << 20).unwrap_err();
        assert_eq!(error, FrameError::TooLarge { length: u32::MAX, limit: 1 << 20 });
        assert_eq!(bytes.capacity(), capacity);
    }

    #[test]
    fn the_limit_itself_is_allowed() {
        let whole = frame(2, 1, "abc", b"xyz");
        let limit = whole.len() as u32 - 4;
        assert!(decode(&mut whole.clone(), limit).unwrap().is_some());
        let error = decode(&mut whole.clone(), limit - 1).unwrap_err();
        assert_eq!(error, FrameError::TooLarge { length: limit, limit: limit - 1 });
    }

    #[test]
    fn the_room_made_follows_the_bytes_that_came_not_the_length_claimed() {
        let claimed: u32 = 512 << 20;
        let mut bytes = BytesMut::from(&claimed.to_be_bytes()[..]);
        assert!(decode(&mut bytes, u32::MAX).unwrap().is_none());
        assert!(bytes.capacity() <= 4 + 2 * RESERVE_STEP);
    }

    #[test]
    fn malformed_headers_are_refused_by_what_is_wrong() {
        let whole = frame(2, 1, "abc", b"");
        let patched = |at: usize, patch: &[u8]| {
            let mut bytes = whole.clone();
            bytes[at..at + patch.len()].copy_from_slice(patch);
            decode(&mut bytes, 1024).unwrap_err()
        };
        assert_eq!(patched(0, &[0, 0, 0, 15]), FrameError::TooShort(15));
        assert_eq!(patched(4, &[4]), FrameError::UnknownKind(4));
        assert_eq!(patched(7, &[1]), FrameError::Reserved);
        assert_eq!(patched(16, &[0, 0, 0, 6]), FrameError::MessageLength { message: 6, length: 21 });
    }

    proptest! {
        #[test]
        fn frames_come_out_the_same_in_whatever_pieces_they_arrive(
            frames in vec((any::<u8>(), any::<u64>(), "[a-z]{0,40}", vec(any::<u8>(), 0..200)), 1..6),
            cuts in vec(1..90_usize, 1..20),
        ) {
            let mut stream = BytesMut::new();
            for (api, correlation, name, payload) in &frames {
                stream.extend_from_slice(&frame(*api, *correlation, name, payload));
            }
            let mut buffer = BytesMut::new();
            let mut decoded = Vec::new();
            for cut in cuts.iter().cycle() {
                if stream.is_empty() {
                    break;
                }
                buffer.extend_from_slice(&stream.split_to((*cut).min(stream.len())));
                while let Some(frame) = decode(&mut buffer, 4096).unwrap() {
                    let message: message::DeleteTopic = frame.decode_message().unwrap();
                    decoded.push((frame.api, frame.correlation, message.name, frame.payload.to_vec()));
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(decoded, frames);
        }

        #[test]
        fn foreign_bytes_never_cause_a_panic(bytes in vec(any::<u8>(), 0..100), small in any::<bool>()) {
            let mut buffer = BytesMut::from(&bytes[..]);
            if small && buffer.len() > 4 {
                // A length that the bytes can satisfy, so that decoding gets beyond it.
                let length = buffer.len() as u32 - 4;
                buffer[..4].copy_from_slice(&length.to_be_bytes());
            }
            while let Ok(Some(_)) = decode(&mut buffer, 4096) {}
        }
    }
}
