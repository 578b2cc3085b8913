//! Bits that flip on disk, and files that get lost.

use proptest::prelude::*;

use super::*;
use crate::disk::Disk;
use crate::log::ReadError;
use std::path::PathBuf;

fn path(segment: SegmentName, extension: &str) -> PathBuf {
    let name = format!("{:020}-{}.{extension}", segment.base_offset, segment.generation);
    Path::new(ROOT)
        .join(segment.partition.topic.to_string())
        .join(segment.partition.partition.to_string())
        .join(name)
}

fn flip(disk: &MemDisk, path: &Path, byte: u64, bit: u32) {
    let file = disk.open(path).unwrap();
    let mut buffer = [0];
    assert_eq!(file.read_at(&mut buffer, byte).unwrap(), 1);
    file.write_all_at(&[buffer[0] ^ 1 << bit], byte).unwrap();
}

/// A log of several segments on disk, and none of it in memory.
fn written(disk: &MemDisk, segment_bytes: u64, sizes: &[usize]) -> Model {
    let log = start(disk, &forgetful());
    let mut model = Model::new(0, segment_bytes);
    model.create(&log);
    for (at, size) in sizes.iter().enumerate() {
        model.append(&log, &[at as i64, at as i64 + 1], *size);
    }
    log.sync().unwrap();
    log.shutdown().unwrap();
    model
}

#[test]
fn an_index_that_is_missing_or_damaged_is_rebuilt() {
    let disk = MemDisk::new();
    let mut model = written(&disk, 300_000, &[9_000; 100]);
    assert!(model.info.segments.len() > 5);
    let first = model.info.segments[0].0;
    let before = disk.open(&path(first, "index")).unwrap().len().unwrap();
    disk.remove(&path(first, "index")).unwrap();
    flip(&disk, &path(model.info.segments[1].0, "index"), 60, 1);
    disk.open(&path(model.info.segments[2].0, "index")).unwrap().set_len(20).unwrap();
    let other = path(model.info.segments[3].0, "index");
    disk.rename(&path(model.info.segments[4].0, "index"), &other).unwrap();
    let log = start(&disk, &forgetful());
    log.restore(&model.info);
    model.check(&log, 40_000);
    model.check_lookups(&log);
    assert_eq!(disk.open(&path(first, "index")).unwrap().len().unwrap(), before, "and written again");
    model.append(&log, &[1], 100);
    model.publish(&log);
    model.check(&log, 40_000);
}

#[test]
fn a_file_that_is_missing_or_short_is_damage_and_not_the_end() {
    let disk = MemDisk::new();
    let model = written(&disk, 50_000, &[5_000; 40]);
    let (second, bytes) = model.info.segments[1];
    disk.open(&path(second, "log")).unwrap().set_len(bytes - 1).unwrap();
    let last = model.info.segments.last().unwrap().0;
    disk.remove(&path(last, "log")).unwrap();
    let log = start(&disk, &forgetful());
    log.restore(&model.info);
    let view = model.view(&log);
    let at_end = view.read(model.info.segments[2].0.base_offset - 1, 1).unwrap_err();
    let ReadError::Corrupt { file, .. } = &at_end else { panic!("{at_end}") };
    assert_eq!(file, &path(second, "log"));
    let missing = view.read(last.base_offset, 1).unwrap_err();
    let ReadError::Corrupt { file, position, offset, .. } = &missing else { panic!("{missing}") };
    assert_eq!((file, *position, *offset), (&path(last, "log"), 0, last.base_offset));
    assert!(!view.read(0, 1).unwrap().is_empty(), "the rest can be read");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// The epoch is the one field that nothing vouches for: not the CRC, and not the place of the batch.
    #[test]
    fn a_flipped_bit_is_noticed_and_named(
        sizes in prop::collection::vec(0..20_000_usize, 2..30),
        segment_bytes in 10_000..200_000_u64,
        batch in any::<prop::sample::Index>(),
        byte in any::<prop::sample::Index>(),
        header_only in any::<bool>(),
        bit in 0..8_u32,
        lose_indexes in any::<bool>(),
    ) {
        let disk = MemDisk::new();
        let model = written(&disk, segment_bytes, &sizes);
        let (header, bytes) = batch.get(&model.batches);
        let byte = byte.index(if header_only { 61 } else { bytes.len() }) as u64;
        let (segment, _) =
            *model.info.segments.iter().rev().find(|(name, _)| name.base_offset <= header.base_offset).unwrap();
        let before = model.batches.iter().filter(|(other, _)| {
            (segment.base_offset..header.base_offset).contains(&other.base_offset)
        });
        let position: u64 = before.map(|(_, bytes)| bytes.len() as u64).sum();
        flip(&disk, &path(segment, "log"), position + byte, bit);
        if lose_indexes {
            for (segment, _) in &model.info.segments {
                let _ = disk.remove(&path(*segment, "index"));
            }
        }
        let log = start(&disk, &forgetful());
        log.restore(&model.info);
        let view = model.view(&log);
        let mut noticed = false;
        for (other, expected) in &model.batches {
            match view.read(other.base_offset, 1) {
                Ok(read) => {
                    let same = read[0] == expected;
                    let epoch = other.base_offset == header.base_offset && (12..16).contains(&byte);
                    prop_assert!(same || epoch, "wrong bytes at offset {}", other.base_offset);
                    noticed |= epoch;
                }
                Err(ReadError::Corrupt { file, position: at, .. }) => {
                    prop_assert_eq!(file, path(segment, "log"));
                    // A damaged length or offset may show only at the batch behind it.
                    prop_assert!(at >= position && at <= position + u64::from(header.length));
                    noticed = true;
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
        prop_assert!(noticed);
        // In one go: all up to the damage, then the damage.
        let mut offset = 0;
        while let Ok(batches) = view.read(offset, usize::MAX) {
            let Some(last) = batches.last() else { break };
            offset = BatchHeader::parse(last).unwrap().last_offset() + 1;
        }
        prop_assert!(offset == header.base_offset || (12..16).contains(&byte));
    }
}

#[test]
fn a_flipped_bit_below_a_known_place_is_noticed_and_named() {
    let disk = MemDisk::new();
    let log = start(&disk, &forgetful());
    let mut model = Model::new(0, 1 << 20);
    model.create(&log);
    model.append(&log, &[1; 100], 1000);
    model.append(&log, &[2; 100], 1000);
    model.publish(&log);
    log.sync().unwrap();
    let view = model.view(&log);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let read = |offset| runtime.block_on(view.read_exactly(vec![offset, offset + 50]));
    read(10).unwrap();
    // Of the record at 29 or 30, which the next two do not look at.
    flip(&disk, &path(model.info.segments[0].0, "log"), 31_000, 3);
    assert_eq!(batch::records(&read(20).unwrap()[0]).unwrap().count(), 2);
    assert_eq!(batch::records(&read(49).unwrap()[0]).unwrap().count(), 2);
    let damaged: Vec<_> =
        (0..50).filter_map(|offset| read(offset).err().map(|error| (offset, error))).collect();
    assert_eq!(damaged.len(), 1, "{damaged:?}");
    assert!((29..=30).contains(&damaged[0].0) && damaged[0].1.to_string().contains("CRC"), "{damaged:?}");
    read(120).unwrap();
}

#[test]
fn a_flipped_bit_in_the_offset_at_which_a_partition_resumed_is_noticed() {
    for bit in 0..64 {
        let disk = MemDisk::new();
        let log = start(&disk, &forgetful());
        let mut model = Model::new(0, 1 << 20);
        model.create(&log);
        model.append(&log, &[1, 1], 100);
        let position = model.info.segments[0].1;
        model.raise_epoch(1);
        model.append(&log, &[2, 2], 100);
        log.sync().unwrap();
        log.shutdown().unwrap();
        flip(&disk, &path(model.info.segments[0].0, "log"), position + 7 - bit / 8, (bit % 8) as u32);
        let log = start(&disk, &forgetful());
        log.restore(&model.info);
        let view = model.view(&log);
        assert!(matches!(view.read(2, 1), Err(ReadError::Corrupt { .. })), "bit {bit}");
        assert_eq!(view.read(0, 1).unwrap().len(), 1);
    }
}
