//! Zigzag base-128 numbers, as Kafka's `ByteUtils` and protobuf's `sint32`/`sint64` write them.
//!
//! Reading is forced inline: it is most of a walk over small records, which was twice as slow without.

use bytes::{BufMut, BytesMut};

use super::error::RecordFault;

/// Takes a 32-bit number off the front.
#[inline(always)]
pub(super) fn take_i32(input: &mut &[u8]) -> Result<i32, RecordFault> {
    let raw = take(input, 5)?;
    let raw = u32::try_from(raw).map_err(|_| RecordFault::Varint)?;
    Ok((raw >> 1) as i32 ^ -((raw & 1) as i32))
}

/// Takes a 64-bit number off the front.
#[inline(always)]
pub(super) fn take_i64(input: &mut &[u8]) -> Result<i64, RecordFault> {
    let raw = take(input, 10)?;
    Ok((raw >> 1) as i64 ^ -((raw & 1) as i64))
}

#[inline(always)]
fn take(input: &mut &[u8], max_bytes: usize) -> Result<u64, RecordFault> {
    // Nearly every number in a batch fits into one or two bytes.
    match **input {
        [a, ref rest @ ..] if a < 0x80 => {
            *input = rest;
            Ok(u64::from(a))
        }
        [a, b, ref rest @ ..] if b < 0x80 => {
            *input = rest;
            Ok(u64::from(a & 0x7f) | u64::from(b) << 7)
        }
        _ => take_long(input, max_bytes),
    }
}

fn take_long(input: &mut &[u8], max_bytes: usize) -> Result<u64, RecordFault> {
    let mut value = 0;
    for (position, byte) in input.iter().take(max_bytes).enumerate() {
        // The tenth byte has room for one bit only.
        if position == 9 && *byte > 1 {
            return Err(RecordFault::Varint);
        }
        value |= u64::from(byte & 0x7f) << (7 * position);
        if *byte < 0x80 {
            *input = &input[position + 1..];
            return Ok(value);
        }
    }
    Err(if input.len() < max_bytes { RecordFault::Truncated } else { RecordFault::Varint })
}

/// Appends a number; 32-bit ones are written alike.
#[inline]
pub(super) fn put(buffer: &mut BytesMut, value: i64) {
    let mut raw = zigzag(value);
    while raw >= 0x80 {
        buffer.put_u8(raw as u8 | 0x80);
        raw >>= 7;
    }
    buffer.put_u8(raw as u8);
}

/// Bytes that [`put`] writes.
#[inline]
pub(super) fn len(value: i64) -> usize {
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

#[inline]
fn zigzag(value: i64) -> u64 {
    (value << 1) as u64 ^ (value >> 63) as u64
}
