//! The store on a disk in memory: reopening, power cuts and damage.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::{CheckpointError, CheckpointStore, Loaded, Row};
use crate::disk::{Disk, MemDisk};
use crate::engine::types::Lsn;

const DIRECTORY: &str = "/data/checkpoint";

type State = BTreeMap<Vec<u8>, Vec<u8>>;

fn load(disk: &MemDisk) -> Result<(CheckpointStore, Option<Loaded>, State), CheckpointError> {
    let mut store = CheckpointStore::new(Arc::new(disk.clone()), Path::new(DIRECTORY));
    let mut state = State::new();
    let loaded = store.load(|key, value| {
        assert!(state.last_key_value().is_none_or(|(last, _)| last.as_slice() < key), "keys ascend");
        state.insert(key.to_vec(), value.to_vec());
        Ok::<_, Infallible>(())
    })?;
    Ok((store, loaded, state))
}

fn row(key: u8, value: &str) -> Row {
    (vec![key], Some(value.into()))
}

fn apply(state: &mut State, rows: &[Row]) {
    for (key, value) in rows {
        match value {
            Some(value) => state.insert(key.clone(), value.clone()),
            None => state.remove(key),
        };
    }
}

fn flip(disk: &MemDisk, name: &str, byte: u64, bit: u8) {
    let file = disk.open(&Path::new(DIRECTORY).join(name)).unwrap();
    let mut buffer = [0];
    assert_eq!(file.read_at(&mut buffer, byte).unwrap(), 1);
    file.write_all_at(&[buffer[0] ^ 1 << bit], byte).unwrap();
}

fn find(disk: &MemDisk, name: &str, wanted: &[u8]) -> u64 {
    let file = disk.open(&Path::new(DIRECTORY).join(name)).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_full_at(&mut bytes, 0).unwrap();
    bytes.windows(wanted.len()).position(|window| window == wanted).unwrap() as u64
}

#[test]
fn a_new_store_is_empty_and_touches_nothing() {
    let disk = MemDisk::new();
    let (_, loaded, state) = load(&disk).unwrap();
    assert_eq!((loaded, state), (None, State::new()));
    assert_eq!(disk.operations(), 0);
}

#[test]
fn the_journal_is_released_up_to_the_older_checkpoint() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    assert_eq!(store.commit(10, 1000, &[row(1, "one"), row(2, "two")]).unwrap(), 0);
    assert_eq!(store.commit(20, 2000, &[row(2, "zwei")]).unwrap(), 10);
    assert_eq!(store.commit(30, 3000, &[(vec![1], None)]).unwrap(), 20);
    drop(store);
    let (mut store, loaded, state) = load(&disk).unwrap();
    assert_eq!(loaded, Some(Loaded { lsn: 30, monotonic_ms: 3000, fallback: None }));
    assert_eq!(state, State::from([(vec![2], b"zwei".to_vec())]));
    assert_eq!(store.commit(30, 3000, &[]).unwrap(), 30, "nothing has to have happened in between");
    assert!(matches!(store.commit(29, 3000, &[]), Err(CheckpointError::Commit { .. })));
}

#[test]
fn a_damaged_row_makes_the_other_checkpoint_count_and_is_healed_by_the_next_commit() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    store.commit(10, 1, &[row(1, "the first value"), row(2, "stays")]).unwrap();
    store.commit(20, 2, &[row(1, "the second value")]).unwrap();
    drop(store);
    flip(&disk, "checkpoint-b.redb", find(&disk, "checkpoint-b.redb", b"the second value") + 4, 3);

    let (mut store, loaded, state) = load(&disk).unwrap();
    let loaded = loaded.unwrap();
    assert_eq!(loaded.lsn, 10);
    assert!(loaded.fallback.unwrap().contains("checkpoint-b.redb: "));
    assert_eq!(state[&vec![1]], b"the first value");
    assert_eq!(store.commit(25, 3, &[row(1, "the third value")]).unwrap(), 10);
    drop(store);

    let (_, loaded, state) = load(&disk).unwrap();
    assert_eq!(loaded, Some(Loaded { lsn: 25, monotonic_ms: 3, fallback: None }));
    assert_eq!(state, State::from([(vec![1], b"the third value".to_vec()), (vec![2], b"stays".to_vec())]));
}

/// Not only rows: a store that trusts what it reads of free pages ends the process when it commits or closes.
#[test]
fn wherever_a_file_is_damaged_the_store_goes_on() {
    let sound = MemDisk::new();
    let (mut store, ..) = load(&sound).unwrap();
    let mut expected = State::new();
    for lsn in 1..=12 {
        let rows: Vec<Row> = (0..40).map(|key| row(key, &format!("{lsn} {}", "x".repeat(100)))).collect();
        apply(&mut expected, &rows);
        store.commit(lsn, lsn, &rows).unwrap();
    }
    drop(store);
    let name = "checkpoint-b.redb";
    let file = sound.open(&Path::new(DIRECTORY).join(name)).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_full_at(&mut bytes, 0).unwrap();
    let written: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0 && bytes[*at] != b'x').collect();
    let mut refused = 0;
    for at in written.into_iter().step_by(211) {
        let disk = sound.fork();
        flip(&disk, name, at as u64, 2);
        let (mut store, loaded, _) = load(&disk).unwrap();
        refused += u64::from(loaded.unwrap().lsn < 12);
        let rows: Vec<Row> = expected.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        store.commit(20, 20, &rows).unwrap();
        store.commit(21, 21, &rows).unwrap();
        drop(store);
        let (_, loaded, state) = load(&disk).unwrap();
        assert_eq!((loaded.unwrap().lsn, &state), (21, &expected), "byte {at}");
    }
    assert!(refused > 0);
}

#[test]
fn a_checkpoint_that_could_not_be_read_once_does_not_come_back() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    store.commit(10, 1, &[row(1, "one")]).unwrap();
    store.commit(20, 2, &[row(1, "two")]).unwrap();
    drop(store);
    let falls_back = |reads: &u64| {
        let disk = disk.fork();
        disk.fail_read(*reads);
        let Ok((store, Some(Loaded { lsn: 10, .. }), _)) = load(&disk) else { return false };
        drop(store);
        // What follows rests on the older one, and is not safe before the next commit: so after lost power, too.
        disk.power_cut_losing_all();
        assert_eq!(load(&disk).unwrap().1.map(|loaded| loaded.lsn), Some(10), "after read {reads} failed");
        true
    };
    assert!((0..100).filter(falls_back).count() > 0);
}

#[test]
fn a_missing_file_is_made_again() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    store.commit(10, 1, &[row(1, "one")]).unwrap();
    store.commit(20, 2, &[row(2, "two")]).unwrap();
    drop(store);
    disk.remove(&Path::new(DIRECTORY).join("checkpoint-a.redb")).unwrap();
    let (mut store, loaded, _) = load(&disk).unwrap();
    assert_eq!(loaded.unwrap().lsn, 20);
    assert_eq!(store.commit(30, 3, &[row(3, "three")]).unwrap(), 20);
    drop(store);
    disk.remove(&Path::new(DIRECTORY).join("checkpoint-b.redb")).unwrap();
    let (_, loaded, state) = load(&disk).unwrap();
    assert_eq!(loaded.unwrap().lsn, 30);
    assert_eq!(state.len(), 3);
}

#[test]
fn without_a_whole_checkpoint_nothing_is_loaded() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    store.commit(10, 1, &[row(1, "the only value")]).unwrap();
    store.commit(20, 2, &[]).unwrap();
    drop(store);
    for name in ["checkpoint-a.redb", "checkpoint-b.redb"] {
        flip(&disk, name, find(&disk, name, b"the only value"), 0);
    }
    let error = load(&disk).unwrap_err();
    let CheckpointError::Unusable { other, .. } = &error else { panic!("{error}") };
    assert!(other.is_some());
    assert!(
        error.to_string().contains("checkpoint-a.redb") && error.to_string().contains("checkpoint-b.redb")
    );

    disk.create(&Path::new(DIRECTORY).join("checkpoint-a.redb")).unwrap();
    assert!(matches!(load(&disk), Err(CheckpointError::Unusable { .. })), "an empty file is no new store");
}

#[test]
fn a_row_that_makes_no_sense_is_told_with_its_file() {
    let disk = MemDisk::new();
    let (mut store, ..) = load(&disk).unwrap();
    store.commit(10, 1, &[row(1, "one")]).unwrap();
    drop(store);
    let mut store = CheckpointStore::new(Arc::new(disk), Path::new(DIRECTORY));
    let error = store.load(|_, _| Err("row of the future")).unwrap_err();
    assert_eq!(error.to_string(), "/data/checkpoint/checkpoint-a.redb: row of the future");
}

#[derive(Clone, Debug)]
enum Operation {
    Commit(Vec<(u8, Option<u8>)>),
    Reopen,
    /// The power fails after so many operations of the disk.
    PowerCut {
        after: u64,
        seed: u64,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    let rows = prop::collection::vec((0..20_u8, prop::option::of(any::<u8>())), 0..8);
    prop_oneof![
        4 => rows.prop_map(Operation::Commit),
        1 => Just(Operation::Reopen),
        2 => (0..60_u64, any::<u64>()).prop_map(|(after, seed)| Operation::PowerCut { after, seed }),
    ]
}

/// The state after each commit that was begun, by LSN.
type History = BTreeMap<Lsn, State>;

fn value(byte: u8) -> Vec<u8> {
    vec![byte; 1 + usize::from(byte) * 20]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_was_committed_survives_power_cuts(operations in prop::collection::vec(operation(), 1..14)) {
        let disk = MemDisk::new();
        let (mut store, ..) = load(&disk).unwrap();
        let mut history = History::from([(0, State::new())]);
        let mut lsn = 0;
        // The last commit that returned, and what it released.
        let (mut committed, mut released) = (0, 0);
        for operation in operations {
            let reopen = match operation {
                Operation::Commit(rows) => {
                    let rows: Vec<Row> =
                        rows.into_iter().map(|(key, byte)| (vec![key], byte.map(value))).collect();
                    let mut state = history[&lsn].clone();
                    apply(&mut state, &rows);
                    lsn += 10;
                    history.insert(lsn, state);
                    match store.commit(lsn, lsn * 100, &rows) {
                        Ok(below) => {
                            prop_assert!(below <= committed && below >= released);
                            (committed, released) = (lsn, below);
                            false
                        }
                        Err(_) => true,
                    }
                }
                Operation::Reopen => true,
                Operation::PowerCut { after, seed } => {
                    disk.power_fails_after(after);
                    let rows = [(vec![1], Some(value(1)))];
                    let mut state = history[&lsn].clone();
                    apply(&mut state, &rows);
                    lsn += 10;
                    history.insert(lsn, state);
                    if let Ok(below) = store.commit(lsn, lsn * 100, &rows) {
                        (committed, released) = (lsn, below);
                    }
                    disk.power_cut(seed);
                    true
                }
            };
            if reopen {
                drop(store);
                let (opened, loaded, state) = load(&disk).unwrap();
                store = opened;
                let found = loaded.as_ref().map_or(0, |loaded| loaded.lsn);
                prop_assert!(found >= committed, "{found} was loaded, {committed} was committed");
                prop_assert!(loaded.as_ref().is_none_or(|loaded| loaded.fallback.is_none()));
                prop_assert_eq!(&state, &history[&found]);
                prop_assert_eq!(loaded.map_or(0, |loaded| loaded.monotonic_ms), found * 100);
                lsn = found;
                committed = found;
                history.retain(|lsn, _| *lsn <= found);
            }
        }
    }

    #[test]
    fn a_flipped_bit_never_changes_what_is_loaded(
        rows in prop::collection::vec((0..40_u8, any::<u8>()), 1..40),
        more in prop::collection::vec((0..40_u8, prop::option::of(any::<u8>())), 0..10),
        place in any::<prop::sample::Index>(),
        bit in 0..8_u8,
    ) {
        let disk = MemDisk::new();
        let (mut store, ..) = load(&disk).unwrap();
        let first: Vec<Row> = rows.into_iter().map(|(key, byte)| (vec![key], Some(value(byte)))).collect();
        let second: Vec<Row> = more.into_iter().map(|(key, byte)| (vec![key], byte.map(value))).collect();
        let mut old = State::new();
        apply(&mut old, &first);
        let mut new = old.clone();
        apply(&mut new, &second);
        store.commit(10, 1, &first).unwrap();
        store.commit(20, 2, &second).unwrap();
        drop(store);
        let length = disk.open(&Path::new(DIRECTORY).join("checkpoint-b.redb")).unwrap().len().unwrap();
        flip(&disk, "checkpoint-b.redb", place.index(length as usize) as u64, bit);
        let (mut store, loaded, state) = load(&disk).unwrap();
        let lsn = loaded.unwrap().lsn;
        prop_assert_eq!(state, if lsn == 20 { new.clone() } else { old });
        // Whichever it was, the store goes on from there.
        let rest = if lsn == 20 { Vec::new() } else { second };
        store.commit(30, 3, &rest).unwrap();
        drop(store);
        let (_, loaded, state) = load(&disk).unwrap();
        prop_assert_eq!((loaded.unwrap().lsn, state), (30, new));
    }
}
