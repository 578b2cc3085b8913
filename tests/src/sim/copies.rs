//! Brokers started on copies of the disk: with a bit flipped somewhere, and without the newest checkpoint. What they find
//! must be what is known, or they must say what is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use felucca_broker::checkpoint::inspect;
use felucca_broker::disk::{Disk, MemDisk};
use felucca_broker::engine::types::Lsn;
use felucca_broker::environment::Environment;
use felucca_broker::journal::{Repair, RepairError};
use felucca_broker::shard::{StartError, Stepped, StorageOptions};

use super::content::identify;
use super::reader::read_around_damage;
use super::recovery::limits;
use super::world::{DATA, World};
use crate::engine_model::crash::assert_same_rows;
use crate::engine_model::store::Rows;

/// Files in which a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rotten {
    Journal,
    Log,
    Checkpoint,
}

impl Rotten {
    fn holds(self, path: &Path) -> bool {
        let ends = |ending: &str| path.extension().is_some_and(|extension| extension == ending);
        match self {
            Self::Journal => path.starts_with(Path::new(DATA).join("journal")),
            Self::Log => ends("log"),
            Self::Checkpoint => ends("redb"),
        }
    }
}

fn rows(shard: &Stepped) -> Rows {
    shard.engine().rows().into_iter().collect()
}

impl World {
    fn start_copy(&self, disk: &MemDisk, environment: Environment) -> Result<Stepped, StartError> {
        disk.kill();
        disk.set_capacity(None);
        let options = StorageOptions { environment, ..self.options.clone() };
        let disk: Arc<dyn Disk> = Arc::new(disk.clone());
        Stepped::start(&disk, Path::new(DATA), options)
    }

    /// What was recovered is what the older checkpoint with all of its journal says, too.
    pub(crate) fn compare_with_older_checkpoint(&mut self, disk: &MemDisk, environment: Environment) {
        let checkpoints: Vec<PathBuf> = disk
            .files()
            .into_iter()
            .map(|(path, _)| path)
            .filter(|path| Rotten::Checkpoint.holds(path))
            .collect();
        let gone = self.rng.pick(&checkpoints).cloned();
        let Some(gone) = gone.filter(|_| checkpoints.len() > 1) else { return };
        disk.remove(&gone).expect("a file that is there");
        let shard = match self.start_copy(disk, environment) {
            Ok(shard) => shard,
            Err(error) => panic!("without {}: {error}", gone.display()),
        };
        let Some(here) = &self.shard else { return };
        assert_same_rows(&rows(here), &rows(&shard), shard.monotonic_ms().max(here.monotonic_ms()));
        self.coverage.meet("recovery", "from the other checkpoint");
    }

    /// A bit flips in a copy of the disk as it is, and a broker is started on it.
    pub(crate) fn open_rotten(&mut self, place: Rotten) {
        let disk = self.disk.fork();
        let files: Vec<(PathBuf, u64)> =
            disk.files().into_iter().filter(|(path, length)| *length > 0 && place.holds(path)).collect();
        let Some((path, length)) = self.rng.pick(&files).cloned() else { return };
        let (at, bit) = (self.place_in(place, length), self.rng.below(8) as u8);
        disk.flip_bit(&path, at, bit);
        self.note(|| format!("bit {bit} of byte {at} of {} flips", path.display()));
        let others = files.len() > 1;
        match self.start_copy(&disk, self.environment.fork()) {
            Ok(shard) => self.look_at_copy(&shard, place, &path),
            Err(StartError::Journal(error)) if place == Rotten::Journal => {
                self.note(|| format!("refused: {error}"));
                self.coverage.meet("recovery", "damaged journal refused");
                self.repair_copy(&disk, &path);
            }
            Err(StartError::Checkpoint(error)) if place == Rotten::Checkpoint && !others => {
                self.note(|| format!("refused: {error}"));
                self.coverage.meet("recovery", "damaged checkpoint refused");
            }
            Err(error) => panic!("with a bit flipped in {}: {error}", path.display()),
        }
    }

    /// A journal that was refused is repaired: what lies in front of the first frame that is missing is all there, and a
    /// crash in between harms nothing.
    fn repair_copy(&mut self, disk: &MemDisk, path: &Path) {
        let checkpoints =
            inspect(disk, &Path::new(DATA).join("checkpoint")).expect("a disk that can be read");
        let from = checkpoints.iter().filter_map(|found| Some(found.state.as_ref().ok()?.lsn)).max();
        let storage: Arc<dyn Disk> = Arc::new(disk.clone());
        let plan = Repair::plan(storage, &Path::new(DATA).join("journal"), from.unwrap_or(0));
        let plan = match plan {
            Ok(plan) => plan.expect("a journal that was refused"),
            Err(RepairError::Hopeless) => return,
            Err(error) => panic!("with a bit flipped in {}: {error}", path.display()),
        };
        let cut = plan.cut();
        if self.rng.chance(30) {
            disk.power_fails_after(self.rng.below(20));
        }
        let repaired = plan.apply(&self.environment.fork());
        let was_cut_short = repaired.is_err();
        disk.power_cut(self.rng.bits());
        let shard = match self.start_copy(disk, self.environment.fork()) {
            Ok(shard) => shard,
            Err(StartError::Journal(_)) if was_cut_short => return,
            Err(error) => panic!("repaired behind a bit flipped in {}: {error}", path.display()),
        };
        if was_cut_short {
            // Repaired or not: the power that failed may have taken the damage along, and what showed it.
            return;
        }
        self.note(|| format!("repaired: frames from {cut} on are given up"));
        self.coverage.meet("recovery", "damaged journal repaired");
        let broker = shard.broker(1 << 20, limits());
        for (key, log) in &self.history.logs {
            // Made, or deleted, in what was given up.
            let Ok(view) = broker.view(*key) else { continue };
            let mut found = BTreeMap::new();
            read_around_damage(
                &view,
                |at| log.known_behind(at),
                |record| {
                    let record =
                        record.unwrap_or_else(|at| panic!("{key} cannot be read at {at} after a repair"));
                    let wrong = log.agrees(record);
                    assert!(wrong.is_ok(), "repaired behind a bit flipped in {}: {wrong:?}", path.display());
                    found.extend(identify(record).ok().map(|identity| (record.offset, identity)));
                },
            );
            let known = log
                .must_have(Some(cut - 1), view.log_start())
                .find(|(offset, _)| !found.contains_key(offset));
            assert!(
                log.is_compacted() || known.is_none(),
                "{key} has lost more than it was said to lose from frame {cut} on: {known:?}"
            );
            assert!(
                view.high_watermark() > log.end(),
                "{key} may use offsets again: it goes on at {}",
                view.high_watermark()
            );
        }
    }

    fn place_in(&mut self, place: Rotten, length: u64) -> u64 {
        match place {
            // Files are longer than what is in them.
            Rotten::Journal | Rotten::Checkpoint if self.rng.chance(80) => {
                self.rng.below(length.min(12 << 10))
            }
            _ => self.rng.below(length),
        }
    }

    fn look_at_copy(&mut self, shard: &Stepped, place: Rotten, path: &Path) {
        // The last frame that was found: the start has added one.
        let last = shard.written() - 1;
        // Without a shard: what was written and not synced may be gone with the power.
        let sure = self.shard.as_ref().map_or(self.safe, Stepped::written);
        let all = if self.shard.is_some() { sure } else { self.told.keys().last().copied().unwrap_or(sure) };
        let cut = (last < all).then_some(last);
        if last < sure {
            self.note(|| format!("cut behind {last} of {sure}"));
            assert!(
                // A frame may refer to the log for its batches.
                place != Rotten::Checkpoint,
                "frames behind {last} are gone with a bit in {}",
                path.display()
            );
            self.check_cut(last, sure);
            self.coverage.meet("recovery", "damaged end cut");
        }
        let broker = shard.broker(1 << 20, limits());
        let mut reported = 0;
        for (key, log) in &self.history.logs {
            let Ok(view) = broker.view(*key) else {
                assert!(cut.is_some(), "{key} is gone with a bit in {}", path.display());
                continue;
            };
            let log_start = view.log_start();
            assert!(
                log.may_start_at(log_start),
                "{key} starts at {log_start} with a bit in {}",
                path.display()
            );
            let mut found = BTreeSet::new();
            let (mut records, mut damage) = (BTreeMap::new(), false);
            read_around_damage(
                &view,
                |at| log.known_behind(at),
                |record| match record {
                    Ok(record) => {
                        let wrong = log.agrees(record);
                        assert!(wrong.is_ok(), "with a bit flipped in {}: {wrong:?}", path.display());
                        found.insert(record.offset);
                        records.extend(identify(record).ok().map(|identity| (record.offset, identity)));
                    }
                    Err(offset) => {
                        reported += 1;
                        damage = true;
                        found.insert(offset);
                    }
                },
            );
            if log.is_compacted() {
                // What is damaged may be what superseded something.
                let left = if damage { Ok(0) } else { log.compacted(cut, log_start, records).check() };
                assert!(left.is_ok(), "{key} with a bit in {}: {left:?}", path.display());
                continue;
            }
            for (offset, entry) in log.must_have(cut, log_start) {
                assert!(
                    found.contains(&offset),
                    "offset {offset} of {key} is missing without a word, with a bit in {}: {entry:?}",
                    path.display()
                );
            }
        }
        if reported > 0 {
            assert!(place == Rotten::Log, "records cannot be read with a bit in {}", path.display());
            self.coverage.meet("recovery", "damaged range reported");
        }
        if cut.is_none()
            && place != Rotten::Log
            && let Ok(sound) = self.start_copy(&self.disk.fork(), self.environment.fork())
            // A frame whose write failed may be there all the same, and nobody was told of it.
            && sound.written() == shard.written()
        {
            let monotonic_ms = sound.monotonic_ms().max(shard.monotonic_ms());
            assert_same_rows(&rows(&sound), &rows(shard), monotonic_ms);
        }
    }

    /// Frames behind `last` were cut: then none up to `sure` that is left may say that the first of them was synced.
    fn check_cut(&self, last: Lsn, sure: Lsn) {
        let witness = self
            .told
            .range(last + 2..)
            .take_while(|(lsn, _)| **lsn <= sure)
            .find(|(_, synced)| **synced > last);
        assert!(
            witness.is_none(),
            "frames behind {last} are cut, though {witness:?} says that they were synced"
        );
    }
}
