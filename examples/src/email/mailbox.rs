//! A directory of mails, one `.eml` file each, named by event id.
//!
//! Invariants: a file that has its name is whole and on the disk, and is never replaced. So a mail is delivered exactly
//! once, however often it is asked for: it is written under another name first, synced, and then given its name only if
//! nobody has it.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use tempfile::Builder;
use uuid::Uuid;

/// Where unfinished files are; on the same file system, and emptied at every start.
const UNFINISHED: &str = ".unfinished";
const EXTENSION: &str = "eml";

/// What delivering did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivered {
    New,
    /// The mail was there already.
    Before,
}

#[derive(Clone, Debug)]
pub(crate) struct Mailbox {
    directory: PathBuf,
}

impl Mailbox {
    /// Opens or creates the directory. Only one process may have it open.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let unfinished = directory.join(UNFINISHED);
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished)?;
        }
        std::fs::create_dir_all(&unfinished)?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// Delivers the mail about an event, once. Blocks on the disk.
    pub(crate) fn deliver(&self, event_id: Uuid, mail: &[u8]) -> io::Result<Delivered> {
        let path = self.directory.join(format!("{event_id}.{EXTENSION}"));
        if path.exists() {
            return self.sync(Delivered::Before);
        }
        let mut file = Builder::new().tempfile_in(self.directory.join(UNFINISHED))?;
        file.write_all(mail)?;
        file.as_file().sync_all()?;
        match file.persist_noclobber(&path) {
            Ok(_) => self.sync(Delivered::New),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => self.sync(Delivered::Before),
            Err(error) => Err(error.error),
        }
    }

    /// The name is in the directory; it has to be there after a power loss too before anybody may rely on it.
    fn sync(&self, delivered: Delivered) -> io::Result<Delivered> {
        File::open(&self.directory)?.sync_all()?;
        Ok(delivered)
    }
}

/// The Message-ID of every mail in the directory; for a look from outside. A mail without one is told by its file name.
pub(crate) fn message_ids(directory: &Path) -> io::Result<Vec<String>> {
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != EXTENSION) {
            continue;
        }
        let mail = std::fs::read(&path)?;
        let id = String::from_utf8_lossy(&mail)
            .lines()
            .take_while(|line| !line.is_empty())
            .find_map(|line| line.strip_prefix("Message-ID: ").map(str::to_owned));
        ids.push(id.unwrap_or_else(|| path.display().to_string()));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mail_is_delivered_once_and_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::open(dir.path()).unwrap();
        let id = Uuid::new_v4();
        assert_eq!(mailbox.deliver(id, b"Message-ID: <1>\r\n\r\nfirst").unwrap(), Delivered::New);
        assert_eq!(mailbox.deliver(id, b"second").unwrap(), Delivered::Before);
        assert_eq!(message_ids(dir.path()).unwrap(), ["<1>"]);
    }

    #[test]
    fn what_a_crash_left_unfinished_is_no_mail() {
        let dir = tempfile::tempdir().unwrap();
        Mailbox::open(dir.path()).unwrap();
        std::fs::write(dir.path().join(UNFINISHED).join("x.eml"), "half").unwrap();
        Mailbox::open(dir.path()).unwrap();
        assert_eq!(message_ids(dir.path()).unwrap(), Vec::<String>::new());
        assert!(!dir.path().join(UNFINISHED).join("x.eml").exists());
    }
}
