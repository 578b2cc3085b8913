//! Sizes as people write them, the same in the server's settings and in those of topics.

use std::fmt;
use std::str::FromStr;

/// A number of bytes. Reads and shows as `512KiB`, `16MiB`, `1GiB`; a bare number is bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

impl ByteSize {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// For buffers; more than the address space holds becomes its largest value.
    pub fn as_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// For wire fields; more than 32 bits becomes the largest value.
    pub fn as_u32(self) -> u32 {
        u32::try_from(self.0).unwrap_or(u32::MAX)
    }
}

/// Exact: the largest unit that divides the number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, unit) = match self.0 {
            n if n == 0 || n % (1 << 10) != 0 => (0, "B"),
            n if n % (1 << 20) != 0 => (10, "KiB"),
            n if n % (1 << 30) != 0 => (20, "MiB"),
            _ => (30, "GiB"),
        };
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a size such as 1048576, 512KiB, 16MiB or 1GiB")]
pub struct ParseByteSizeError;

impl FromStr for ByteSize {
    type Err = ParseByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        let factor: u64 = match unit.trim_start() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(ParseByteSizeError),
        };
        let number: u64 = number.parse().map_err(|_| ParseByteSizeError)?;
        number.checked_mul(factor).map(Self).ok_or(ParseByteSizeError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_show_alike() {
        for (text, bytes) in
            [("0B", 0), ("1000B", 1000), ("1KiB", 1 << 10), ("16MiB", 16 << 20), ("3GiB", 3 << 30)]
        {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        assert_eq!("16 MiB".parse(), Ok(ByteSize::mib(16)));
        assert_eq!("4096".parse(), Ok(ByteSize::kib(4)));
        for wrong in ["", "MiB", "1.5MiB", "-1", "1MB", "99999999999999TiB", "1 MiB 2"] {
            assert_eq!(wrong.parse::<ByteSize>(), Err(ParseByteSizeError), "{wrong}");
        }
    }
}
