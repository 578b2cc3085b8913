//! A small file system in a mount namespace of its own, for brokers that run out of room.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A tmpfs that only processes under [`SmallDisk::enter`] see at its path. Gone with its content when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    /// Keeps the namespace while no broker runs in it.
    keeper: Child,
    path: PathBuf,
    enter: Vec<String>,
}

impl SmallDisk {
    /// Mounts so many MiB over an existing directory.
    ///
    /// # Panics
    /// The system gives no mount namespace: needs `unshare` and `nsenter`, and root or unprivileged user namespaces.
    pub fn mount(path: &Path, mebibytes: u32) -> Self {
        let root = rustix::process::geteuid().is_root();
        let kind = if root { "-m" } else { "-rm" };
        let mut keeper = Command::new("unshare")
            .args([kind, "setpriv", "--pdeathsig", "KILL", "sh", "-c"])
            .arg("mount -t tmpfs -o \"size=$1m\" felucca-test \"$2\" && echo mounted && exec sleep infinity")
            .args(["sh", &mebibytes.to_string()])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let stdout = keeper.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("the mount's answer");
        assert_eq!(
            line, "mounted\n",
            "no file system in a namespace of its own: needs root or user namespaces"
        );
        let target = keeper.id().to_string();
        let mut enter: Vec<String> = ["nsenter", "--target", &target, "--mount"].map(str::to_owned).into();
        if !root {
            enter.extend(["--user", "--preserve-credentials"].map(str::to_owned));
        }
        enter.push("--".to_owned());
        Self { keeper, path: path.to_owned(), enter }
    }

    /// Where it is mounted, for processes within.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What runs a program within: goes before it on its command line.
    pub fn enter(&self) -> Vec<&str> {
        self.enter.iter().map(String::as_str).collect()
    }

    /// The same place, for this process.
    pub fn outside(&self) -> PathBuf {
        let inside = self.path.strip_prefix("/").expect("an absolute path");
        Path::new("/proc").join(self.keeper.id().to_string()).join("root").join(inside)
    }

    /// Bytes that can still be written.
    pub fn available(&self) -> u64 {
        let found = rustix::fs::statvfs(self.outside()).expect("the mounted file system");
        found.f_bavail * found.f_frsize
    }

    /// Writes a file until so many bytes are left.
    pub fn fill_until(&self, left: u64) {
        let mut file =
            OpenOptions::new().create(true).append(true).open(self.outside().join("fill")).expect("a file");
        let zeros = [0; 4096];
        while self.available() > left {
            match file.write_all(&zeros) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => return,
                Err(error) => panic!("filling the disk: {error}"),
            }
        }
    }

    /// Removes what [`Self::fill_until`] wrote.
    pub fn empty(&self) {
        fs::remove_file(self.outside().join("fill")).expect("the file that fills the disk");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ended = self.keeper.kill();
        let _reaped = self.keeper.wait();
    }
}
