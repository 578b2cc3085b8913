//! The directory of a run: one folder for each process, which is all that the process may touch.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use super::scenario::Expected;
use crate::reconcile::LocalFiles;

/// The purchases, as they were read.
const INPUT: &str = "purchases.txt";
const EXPECTED: &str = "expected.json";

/// Paths below the run's directory; a temporary one is removed in the end.
#[derive(Debug)]
pub(crate) struct WorkDir {
    root: PathBuf,
    temporary: Option<TempDir>,
}

impl WorkDir {
    /// An empty directory: the named one, which is kept, or a temporary one.
    pub(crate) fn create(kept: Option<&Path>) -> anyhow::Result<Self> {
        let (root, temporary) = match kept {
            Some(root) => {
                std::fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
                let empty = std::fs::read_dir(root).is_ok_and(|mut entries| entries.next().is_none());
                ensure!(empty, "{} is not empty: a run starts from nothing", root.display());
                (root.canonicalize()?, None)
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("order-flow-").tempdir()?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        let work_dir = Self { root, temporary };
        for folder in ["broker", "order", "payment", "gateway", "email", "logs"] {
            std::fs::create_dir(work_dir.root.join(folder))
                .context("cannot lay out the working directory")?;
        }
        Ok(work_dir)
    }

    /// The directory of an earlier run.
    pub(crate) fn open(root: &Path) -> anyhow::Result<Self> {
        ensure!(root.join("broker").is_dir(), "{} holds no run", root.display());
        Ok(Self { root: root.canonicalize()?, temporary: None })
    }

    /// Keeps what the run is to be held against, for a later look.
    pub(crate) fn keep_input(&self, text: &str, expected: &Expected) -> anyhow::Result<()> {
        std::fs::write(self.root.join(INPUT), text)
            .and_then(|()| std::fs::write(self.root.join(EXPECTED), serde_json::to_vec(expected)?))
            .context("cannot keep the input of the run")
    }

    /// What [`WorkDir::keep_input`] kept.
    pub(crate) fn input(&self) -> anyhow::Result<(String, Expected)> {
        let read = |name| {
            std::fs::read_to_string(self.root.join(name))
                .with_context(|| format!("{} holds no whole run: cannot read {name}", self.root.display()))
        };
        Ok((read(INPUT)?, serde_json::from_str(&read(EXPECTED)?).context(EXPECTED)?))
    }

    /// Removes a temporary directory, which takes a while when it holds many files. Blocks on the disk.
    pub(crate) fn remove(self) -> anyhow::Result<()> {
        self.temporary.map_or(Ok(()), TempDir::close).context("cannot remove the run's data")
    }

    pub(crate) fn broker(&self) -> PathBuf {
        self.root.join("broker")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub(crate) fn files(&self) -> LocalFiles {
        LocalFiles {
            orders: self.root.join("order/orders.db"),
            payments: self.root.join("payment/payments.db"),
            gateway: self.root.join("gateway/ledger.db"),
            sent: self.root.join("email/sent.db"),
            mailbox: self.root.join("email/mailbox"),
            smtp: std::env::var_os("SMTP_URL").is_some(),
        }
    }

    /// Keeps a temporary directory after all, for somebody to look into; returns where it is.
    pub(crate) fn keep(&mut self) -> &Path {
        if let Some(temporary) = self.temporary.take() {
            self.root = temporary.keep();
        }
        &self.root
    }
}
