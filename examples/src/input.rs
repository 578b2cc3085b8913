//! The purchases to place, read from a text file.
//!
//! Two layouts are understood, columns separated by blanks or commas, lines ending in LF or CR LF:
//!
//! - five columns without a header, as in `data/cdnow_sample.txt`: customer, customer in the sample, date, CDs, dollars;
//! - four columns, as in the full data set, after a header line: customer, date, CDs, dollars.
//!
//! A purchase is a *line*: two equal lines are two purchases, told apart by their line number. Money is whole cents
//! from the first character on; no floating point touches it. A line that does not parse is an error that names the
//! line, never a purchase left out.

use std::collections::HashSet;

use jiff::civil::Date;
use thiserror::Error;

/// One line of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Purchase {
    /// Number of the line in its file, the first being 1.
    pub(crate) line: usize,
    /// Who bought, as the file writes it.
    pub(crate) customer: String,
    pub(crate) date: Date,
    pub(crate) cds: u32,
    pub(crate) cents: u64,
}

impl Purchase {
    /// The key under which the purchase is placed, however often the request has to be sent again.
    pub(crate) fn idempotency_key(&self) -> String {
        format!("purchase-{:06}", self.line)
    }
}

/// Why an input was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InputError {
    #[error("line {line}: {reason}")]
    Line { line: usize, reason: String },
    #[error("the input holds no purchase")]
    Empty,
}

/// What the purchases add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) orders: u64,
    pub(crate) customers: u64,
    pub(crate) cds: u64,
    pub(crate) cents: u64,
}

impl Totals {
    pub(crate) fn of(purchases: &[Purchase]) -> Self {
        Self {
            orders: purchases.len() as u64,
            customers: purchases.iter().map(|p| &p.customer).collect::<HashSet<_>>().len() as u64,
            cds: purchases.iter().map(|p| u64::from(p.cds)).sum(),
            cents: purchases.iter().map(|p| p.cents).sum(),
        }
    }
}

/// Parses a whole file.
pub(crate) fn parse(text: &str) -> Result<Vec<Purchase>, InputError> {
    let mut layout = None;
    let mut purchases = Vec::new();
    for (index, text) in text.lines().enumerate() {
        let line = index + 1;
        let columns = columns(text);
        if columns.is_empty() {
            continue;
        }
        let refuse = |reason: String| InputError::Line { line, reason };
        let Some(layout) = layout else {
            let (first, is_header) = Layout::detect(&columns).map_err(refuse)?;
            layout = Some(first);
            if !is_header {
                purchases.push(first.purchase(line, &columns).map_err(refuse)?);
            }
            continue;
        };
        purchases.push(Layout::purchase(layout, line, &columns).map_err(refuse)?);
    }
    if purchases.is_empty() { Err(InputError::Empty) } else { Ok(purchases) }
}

/// Where a line has its columns; decided by the first line, obeyed by all others.
#[derive(Clone, Copy, Debug)]
enum Layout {
    WithSampleNumber,
    Plain,
}

impl Layout {
    /// The layout, and whether the line that told it was a header.
    fn detect(columns: &[&str]) -> Result<(Self, bool), String> {
        let is_header = columns.iter().all(|column| !column.starts_with(|c: char| c.is_ascii_digit()));
        match (columns.len(), is_header) {
            (5, false) => Ok((Self::WithSampleNumber, false)),
            (4, true) => Ok((Self::Plain, true)),
            (4, false) => Err("four columns need a header line (customer, date, CDs, dollars)".to_owned()),
            (found, _) => Err(format!("expected five columns, or four after a header line; found {found}")),
        }
    }

    fn purchase(self, line: usize, columns: &[&str]) -> Result<Purchase, String> {
        let (customer, date, cds, dollars) = match (self, columns) {
            (Self::WithSampleNumber, [customer, _, date, cds, dollars])
            | (Self::Plain, [customer, date, cds, dollars]) => (*customer, *date, *cds, *dollars),
            (Self::WithSampleNumber, _) => {
                return Err(format!("expected 5 columns, found {}", columns.len()));
            }
            (Self::Plain, _) => return Err(format!("expected 4 columns, found {}", columns.len())),
        };
        Ok(Purchase {
            line,
            customer: customer.to_owned(),
            date: parse_date(date)?,
            cds: cds.parse().map_err(|_| format!("`{cds}` is not a number of CDs"))?,
            cents: parse_cents(dollars)?,
        })
    }
}

fn columns(line: &str) -> Vec<&str> {
    line.split(|c: char| c == ',' || c.is_ascii_whitespace())
        .map(|column| column.trim_matches('"'))
        .filter(|column| !column.is_empty())
        .collect()
}

/// `yyyymmdd` or `yyyy-mm-dd`.
fn parse_date(text: &str) -> Result<Date, String> {
    let format = if text.contains('-') { "%Y-%m-%d" } else { "%Y%m%d" };
    Date::strptime(format, text).map_err(|_| format!("`{text}` is not a date (yyyymmdd or yyyy-mm-dd)"))
}

/// Dollars with at most two decimals, as cents.
fn parse_cents(text: &str) -> Result<u64, String> {
    let refuse = || format!("`{text}` is not an amount of dollars (digits, at most two decimals)");
    let (dollars, decimals) = text.split_once('.').unwrap_or((text, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if dollars.is_empty() || decimals.len() > 2 || !digits(dollars) || !digits(decimals) {
        return Err(refuse());
    }
    let cents = format!("{decimals:0<2}").parse::<u64>().map_err(|_| refuse())?;
    let dollars = dollars.parse::<u64>().map_err(|_| refuse())?;
    dollars.checked_mul(100).and_then(|whole| whole.checked_add(cents)).ok_or_else(refuse)
}

/// Cents as people write dollars: `244,091.94`.
pub(crate) fn dollars(cents: u64) -> String {
    format!("{}.{:02}", thousands(cents / 100), cents % 100)
}

/// A number with its thousands set apart.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = include_str!("../data/cdnow_sample.txt");

    #[test]
    fn the_sample_adds_up() {
        let purchases = parse(SAMPLE).unwrap();
        let expected = Totals { orders: 6_919, customers: 2_357, cds: 16_479, cents: 24_409_194 };
        assert_eq!(Totals::of(&purchases), expected);
    }

    #[test]
    fn the_sample_still_ends_its_lines_in_cr_lf() {
        assert_eq!(SAMPLE.matches("\r\n").count(), 6_919);
    }

    #[test]
    fn five_columns_take_the_first_as_customer() {
        let purchases =
            parse(" 00004 0001 19970101  2   29.33\r\n 00004 0001 19970118  2   29.73\r\n").unwrap();
        assert_eq!(
            purchases[1],
            Purchase {
                line: 2,
                customer: "00004".to_owned(),
                date: jiff::civil::date(1997, 1, 18),
                cds: 2,
                cents: 2_973,
            }
        );
    }

    #[test]
    fn four_columns_follow_a_header() {
        for text in [
            "customer date cds dollars\n00001 19970101 1 11.77\n",
            "\"customer\",\"date\",\"cds\",\"dollars\"\r\n\"00001\",1997-01-01,1,11.77\r\n",
        ] {
            let purchases = parse(text).unwrap();
            assert_eq!(purchases.len(), 1);
            assert_eq!((purchases[0].line, purchases[0].cents), (2, 1_177));
            assert_eq!(purchases[0].date, jiff::civil::date(1997, 1, 1));
        }
    }

    #[test]
    fn equal_lines_are_two_purchases() {
        let purchases = parse("1 1 19970101 1 5.00\n1 1 19970101 1 5.00\n").unwrap();
        assert_eq!(purchases.len(), 2);
        assert_ne!(purchases[0].idempotency_key(), purchases[1].idempotency_key());
    }

    #[test]
    fn cents_are_exact() {
        for (text, cents) in
            [("0.00", 0), ("0.07", 7), ("12", 1_200), ("12.5", 1_250), ("184467.29", 18_446_729)]
        {
            assert_eq!(parse_cents(text), Ok(cents));
        }
        for text in [
            "",
            ".5",
            "-1.00",
            "1.005",
            "1e3",
            "12,5",
            "1.x",
            "99999999999999999999",
            "184467440737095516.16",
        ] {
            assert!(parse_cents(text).is_err(), "{text} was taken");
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        let refused = |text: &str| parse(text).unwrap_err().to_string();
        assert!(refused("1 1 19970101 1 5.00\n1 1 19970101 1\n").starts_with("line 2: expected 5 columns"));
        assert!(refused("1 1 19970230 1 5.00\n").contains("19970230"));
        assert!(refused("1 1 19970101 x 5.00\n").contains("number of CDs"));
        assert!(refused("1 19970101 1 5.00\n").contains("header"));
        assert_eq!(parse("\r\n\r\n"), Err(InputError::Empty));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(dollars(24_409_194), "244,091.94");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(1_000_000), "1,000,000");
    }
}
