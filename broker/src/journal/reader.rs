//! Reading the frames of one file through a window, so that neither a scan nor a replay holds more than a frame.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::file::{JournalFile, PAGE};
use super::frame::{Frame, FrameHeader, HEADER_BYTES, Place};
use crate::disk::{DiskFile, SECTOR};

const WINDOW: usize = 512 << 10;

#[derive(Debug)]
pub(super) struct FrameReader {
    disk_file: Arc<dyn DiskFile>,
    salt: u64,
    /// The file's length when the reading began.
    length: u64,
    window: Vec<u8>,
    window_start: u64,
    window_bytes: usize,
}

impl FrameReader {
    pub(super) fn new(file: &JournalFile) -> io::Result<Self> {
        let disk_file = file.disk_file.clone();
        let length = disk_file.len()?;
        Ok(Self {
            disk_file,
            salt: file.header.salt,
            length,
            window: Vec::new(),
            window_start: 0,
            window_bytes: 0,
        })
    }

    pub(super) fn file_length(&self) -> u64 {
        self.length
    }

    /// Reads the frame at a position, which must be a multiple of the sector's size; `None` when nothing was written
    /// there in this life of the file, or not all of it is whole.
    pub(super) fn read(&mut self, position: u64) -> io::Result<Option<Frame>> {
        let Some(header) = self.header(position)? else { return Ok(None) };
        // Checked against the file before anything is allocated for it.
        if position + header.length > self.length {
            return Ok(None);
        }
        let start = position + HEADER_BYTES;
        let body_length = (header.length - HEADER_BYTES) as usize;
        let body = if body_length <= WINDOW / 2 {
            Bytes::copy_from_slice(self.bytes(start, body_length)?)
        } else {
            let mut body = vec![0; body_length];
            let read = self.disk_file.read_full_at(&mut body, start)?;
            body.truncate(read);
            Bytes::from(body)
        };
        Ok(header.open(self.place(position), body))
    }

    /// Where the frame begins that follows the one that ends at a position: right there, or on the next page, if its header
    /// says that the rest of this one was left out. Nothing may be there.
    pub(super) fn next_position(&mut self, end: u64) -> io::Result<u64> {
        let page = end.next_multiple_of(PAGE);
        let is_there = self.header(end)?.is_some();
        let is_next = |header: FrameHeader| page - header.left_out == end;
        Ok(if !is_there && self.header(page)?.is_some_and(is_next) { page } else { end })
    }

    /// Reads only the header at a position.
    pub(super) fn header(&mut self, position: u64) -> io::Result<Option<FrameHeader>> {
        let place = self.place(position);
        Ok(FrameHeader::parse(self.bytes(position, HEADER_BYTES as usize)?, place))
    }

    /// Finds the first valid header at or after a position.
    pub(super) fn find_header(&mut self, from: u64) -> io::Result<Option<(u64, FrameHeader)>> {
        let mut position = from;
        while position + HEADER_BYTES <= self.length {
            let place = self.place(position);
            let bytes = self.bytes(position, HEADER_BYTES as usize)?;
            if let Some(header) = FrameHeader::parse(bytes, place) {
                return Ok(Some((position, header)));
            }
            position += SECTOR;
        }
        Ok(None)
    }

    fn place(&self, position: u64) -> Place {
        Place { salt: self.salt, position }
    }

    /// Bytes from `position`, fewer than `count` only at the end of the file; `count` is at most half a window.
    fn bytes(&mut self, position: u64, count: usize) -> io::Result<&[u8]> {
        let end = (position + count as u64).min(self.length);
        let window_end = self.window_start + self.window_bytes as u64;
        if position < self.window_start || end > window_end {
            let wanted = WINDOW.min(self.length.saturating_sub(position) as usize);
            if self.window.len() < wanted {
                self.window = vec![0; wanted];
            }
            self.window_bytes = self.disk_file.read_full_at(&mut self.window[..wanted], position)?;
            self.window_start = position;
        }
        let from = (position - self.window_start) as usize;
        let to = (from + count).min(self.window_bytes);
        Ok(self.window.get(from..to).unwrap_or_default())
    }
}
