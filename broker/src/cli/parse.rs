//! Values of arguments that several commands take.

use std::str::FromStr;

/// `KEY=VALUE`, split at the first `=`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) key: String,
    pub(super) value: String,
}

impl FromStr for Pair {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("expected KEY=VALUE".to_owned()),
        }
    }
}

/// As the client takes them.
pub(super) fn borrowed(pairs: &[Pair]) -> Vec<(&str, &str)> {
    pairs.iter().map(|pair| (pair.key.as_str(), pair.value.as_str())).collect()
}

/// A place in a log: `beginning`, `end`, `offset:N` or `time:RFC3339`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Beginning,
    End,
    Offset(u64),
    /// Unix milliseconds.
    Time(i64),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "beginning" => Ok(Self::Beginning),
            None if text == "end" => Ok(Self::End),
            Some(("offset", number)) => number
                .parse()
                .map(Self::Offset)
                .map_err(|_| format!("{number:?} is not an offset (a number from 0 on)")),
            Some(("time", time)) => time
                .parse::<jiff::Timestamp>()
                .map(|time| Self::Time(time.as_millisecond()))
                .map_err(|_| format!("{time:?} is not a time such as 2026-03-01T12:00:00Z")),
            _ => Err("expected beginning, end, offset:N or time:RFC3339".to_owned()),
        }
    }
}

/// A separator as typed; `\t` is a tab.
pub(super) fn separator(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("must not be empty".to_owned());
    }
    Ok(text.replace("\\t", "\t"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_split_at_the_first_sign() {
        let pair: Pair = "a=b=c".parse().unwrap();
        assert_eq!((pair.key.as_str(), pair.value.as_str()), ("a", "b=c"));
        assert_eq!("a=".parse::<Pair>().unwrap().value, "");
        assert!("a".parse::<Pair>().is_err());
        assert!("=a".parse::<Pair>().is_err());
    }

    #[test]
    fn places_are_read() {
        assert_eq!("beginning".parse(), Ok(Place::Beginning));
        assert_eq!("end".parse(), Ok(Place::End));
        assert_eq!("offset:42".parse(), Ok(Place::Offset(42)));
        assert_eq!("time:1970-01-01T00:00:01Z".parse(), Ok(Place::Time(1000)));
        assert_eq!("time:1970-01-01T01:00:00+01:00".parse(), Ok(Place::Time(0)));
        for (wrong, said) in [
            ("start", "beginning"),
            ("offset:-1", "offset"),
            ("time:now", "2026"),
            ("offset", "offset:N"),
            ("", "end"),
        ] {
            let message = wrong.parse::<Place>().unwrap_err();
            assert!(message.contains(said), "{wrong}: {message}");
        }
    }

    #[test]
    fn separators_may_be_tabs() {
        assert_eq!(separator("\\t").unwrap(), "\t");
        assert!(separator("").is_err());
    }
}
