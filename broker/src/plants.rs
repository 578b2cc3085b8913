//! Bugs to plant, so that the simulator can show that it would find them.
//!
//! Each is one condition in the place where the bug would be, `planted("name")`. Without the feature `plants`, and in every
//! build without debug assertions, that is a constant `false`: a release binary has none of them, whatever its features.

/// A bug that can be planted.
#[derive(Clone, Copy, Debug)]
pub struct Plant {
    pub name: &'static str,
    /// What goes wrong.
    pub what: &'static str,
}

const fn plant_of(name: &'static str, what: &'static str) -> Plant {
    Plant { name, what }
}

/// Every bug that can be planted.
pub const PLANTS: &[Plant] = &[
    plant_of("reply-before-sync", "replies at `synced` leave when their frame is written"),
    plant_of("show-before-sync", "records are visible before they are synced"),
    plant_of("apply-failed-write", "what a failed write should have stored is shown and answered"),
    plant_of("ignore-failed-sync", "a failed sync counts as a sync"),
    plant_of(
        "reply-before-segment-sync",
        "a frame counts as synced before the segments that it refers to are",
    ),
    plant_of("skip-reference-check", "what unsynced frames refer to is not checked at a start"),
    plant_of("skip-frame-crc", "the content of journal frames is not checked"),
    plant_of("cut-the-middle", "damage in the middle of the journal is cut like a torn tail"),
    plant_of("trust-page-cache", "recovery serves unsynced frames without writing them anew"),
    plant_of("skip-batch-crc", "batches read from segments are not checked"),
    plant_of("skip-row-crc", "pages and rows of a checkpoint are not checked"),
    plant_of("checkpoint-before-segment-sync", "a checkpoint is committed before the segments are synced"),
    plant_of("checkpoint-before-journal-sync", "a checkpoint is committed before the journal is synced"),
    plant_of("release-journal-early", "the journal of the previous checkpoint is given up"),
    plant_of("forget-directory-sync", "names of new segments are not synced"),
    plant_of("forget-boot-epoch", "a new run goes on with the boot epoch of the last"),
    plant_of("reuse-lease-id", "every grant begins with the same lease number"),
    plant_of("grant-before-write", "leased records leave before their grant is journaled"),
    plant_of("free-key-early", "the next record of a key is handed out before the settlement is synced"),
    plant_of("split-dead-letter", "a dead letter is appended without settling its source in the same frame"),
    plant_of("accept-duplicates", "a repeated batch is appended again"),
    plant_of("mint-offsets-twice", "offsets shown before a power loss are used again"),
    plant_of("forget-commits", "committed offsets are not journaled"),
    plant_of("forget-deletions", "a log start that was raised is not journaled"),
    plant_of("forget-topic-deletion", "the deletion of a topic is not journaled"),
    plant_of("swap-before-sync", "the cleaner's segments take their place before they are synced"),
    plant_of("clean-in-hand", "the cleaner drops what share groups have in hand"),
    plant_of(
        "drop-tombstones-early",
        "a tombstone goes at once, also when something older of its key is left",
    ),
];

#[cfg(all(feature = "plants", debug_assertions))]
mod planted {
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// Plants a bug for this thread, instead of the one before; `None`: none. False if there is no such bug.
    pub fn plant(name: Option<&str>) -> bool {
        let found = super::PLANTS.iter().find(|plant| Some(plant.name) == name);
        PLANTED.set(found.map(|plant| plant.name));
        found.is_some() == name.is_some()
    }

    pub(crate) fn planted(name: &str) -> bool {
        debug_assert!(super::PLANTS.iter().any(|plant| plant.name == name), "{name} is not in the list");
        PLANTED.get() == Some(name)
    }
}

#[cfg(not(all(feature = "plants", debug_assertions)))]
mod planted {
    /// False for every bug: this build has none.
    pub fn plant(name: Option<&str>) -> bool {
        name.is_none()
    }

    #[inline(always)]
    pub(crate) const fn planted(_: &str) -> bool {
        false
    }
}

pub use planted::plant;
pub(crate) use planted::planted;
