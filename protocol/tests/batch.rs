//! Record batches as their users see them: built, validated, read, scanned, filtered, split and damaged.
#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

use bytes::{Bytes, BytesMut};
use felucca_protocol::batch::{
    self, BatchBuilder, BatchError, BatchHeader, BatchLimits, Compression, HEADER_LEN, Header,
    MAX_BATCH_BYTES, Record, RecordFault, RecordPlaces,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

const LIMITS: BatchLimits =
    BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 100 };

fn three(compression: Compression) -> Bytes {
    let mut builder = BatchBuilder::new().producer(7, 1, 40).compression(compression);
    builder.push(1_000, Some(b"a"), Some(&[b'x'; 300]), &[("h", Some(b"1")), ("none", None)]).unwrap();
    builder.push(3_000, None, Some(b""), &[]).unwrap();
    builder.push(2_000, Some(b"c"), None, &[]).unwrap();
    let uncompressed = builder.len_bytes();
    let mut batch = builder.finish();
    assert!(compression != Compression::None || batch.len() == uncompressed);
    batch::assign(&mut batch, 500, 3);
    batch.freeze()
}

#[test]
fn a_batch_under_another_producer_is_the_same_batch_and_whole() {
    for compression in [Compression::None, Compression::Lz4] {
        let before = three(compression);
        let mut after = BytesMut::from(&before[..]);
        batch::set_producer(&mut after, 9, 2, 0);
        let after = after.freeze();
        let header = batch::check(&after).unwrap();
        assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (9, 2, 0));
        assert_eq!(all(&after), all(&before));
    }
}

fn build(records: &[Record], compression: Compression) -> BytesMut {
    let mut builder = BatchBuilder::new().compression(compression);
    for record in records {
        let headers: Vec<_> =
            record.headers.iter().map(|header| (header.name.as_str(), header.value.as_deref())).collect();
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        let before = builder.len_bytes();
        builder.push(record.timestamp, key, value, &headers).unwrap();
        assert!(builder.len_bytes() - before <= batch::record_size(key, value, &headers));
    }
    builder.finish()
}

fn all(batch: &Bytes) -> Vec<Record> {
    batch::records(batch).unwrap().collect::<Result<_, _>>().unwrap()
}

/// Makes the CRC right again, as someone who means harm would.
fn reseal(batch: &mut [u8]) {
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
}

/// A batch that claims one record and holds these bytes.
fn with_body(body: &[u8]) -> Bytes {
    let mut builder = BatchBuilder::new();
    builder.push(0, None, None, &[]).unwrap();
    let mut batch = builder.finish();
    batch.truncate(HEADER_LEN);
    batch.extend_from_slice(body);
    let length = batch.len() as u32 - 12;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    reseal(&mut batch);
    batch.freeze()
}

fn patched(batch: &Bytes, at: usize, bytes: &[u8]) -> Bytes {
    let mut copy = BytesMut::from(&batch[..]);
    copy[at..at + bytes.len()].copy_from_slice(bytes);
    reseal(&mut copy);
    copy.freeze()
}

#[test]
fn what_was_pushed_comes_out_at_the_assigned_offsets() {
    for compression in [Compression::None, Compression::Lz4] {
        let bytes = three(compression);
        let header = batch::validate(&bytes, &LIMITS).unwrap();
        assert_eq!(header.compression().unwrap(), compression);
        assert_eq!((header.base_offset, header.last_offset(), header.partition_epoch), (500, 502, 3));
        assert_eq!((header.base_timestamp, header.max_timestamp, header.record_count), (1_000, 3_000, 3));
        assert_eq!((header.producer_id, header.producer_epoch, header.base_sequence), (7, 1, 40));
        let records = all(&bytes);
        let places: Vec<_> = records.iter().map(|record| (record.offset, record.timestamp)).collect();
        assert_eq!(places, [(500, 1_000), (501, 3_000), (502, 2_000)]);
        assert_eq!(records[0].headers[0].value.as_deref(), Some(b"1".as_slice()));
        assert_eq!(records[0].headers[1].value, None);
        assert_eq!((records[1].key.as_deref(), records[1].value.as_deref()), (None, Some(b"".as_slice())));
        assert_eq!(records[2].value, None);
    }
}

#[test]
fn records_share_the_memory_of_their_batch() {
    let bytes = three(Compression::None);
    let value = all(&bytes)[0].value.clone().unwrap();
    assert!(bytes.as_ptr_range().contains(&value.as_ptr()));
}

#[test]
fn records_that_do_not_shrink_are_left_uncompressed() {
    let mut builder = BatchBuilder::new().compression(Compression::Lz4);
    builder.push(0, None, Some(b"x"), &[]).unwrap();
    let header = batch::validate(&builder.finish(), &LIMITS).unwrap();
    assert_eq!(header.compression().unwrap(), Compression::None);
}

#[test]
fn every_flipped_bit_under_the_crc_is_refused() {
    for compression in [Compression::None, Compression::Lz4] {
        let whole = three(compression);
        // Magic and CRC too: only offset and epoch are free.
        for bit in (16 * 8)..(whole.len() * 8) {
            let mut damaged = BytesMut::from(&whole[..]);
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(batch::validate(&damaged, &LIMITS).is_err(), "bit {bit}");
            assert!(batch::check(&damaged).is_err(), "bit {bit}");
        }
    }
}

#[test]
fn every_flipped_bit_of_the_length_is_refused() {
    let whole = three(Compression::None);
    for bit in (8 * 8)..(12 * 8) {
        let mut damaged = BytesMut::from(&whole[..]);
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(batch::validate(&damaged, &LIMITS).is_err(), "bit {bit}");
    }
}

#[test]
fn every_truncation_is_refused_and_so_is_a_byte_too_many() {
    let whole = three(Compression::None);
    for end in 0..whole.len() {
        let part = whole.slice(..end);
        assert!(matches!(batch::validate(&part, &LIMITS), Err(BatchError::Truncated { .. })), "{end}");
        assert!(batch::records(&part).is_err());
        assert!(batch::scan(&part).is_err());
        assert!(batch::filter(&part, &[501]).is_err());
    }
    let longer = [&whole[..], b"x"].concat();
    assert_eq!(batch::validate(&longer, &LIMITS), Err(BatchError::TrailingBytes(1)));
}

#[test]
fn limits_are_named_by_what_they_refuse() {
    let bytes = three(Compression::None);
    let size = bytes.len() as u32;
    let limits = BatchLimits { max_batch_bytes: size, max_record_bytes: 306 + 1, max_headers: 2 };
    // Content of the first record: key 1, value 300, header names 1 and 4, header value 1.
    assert!(batch::validate(&bytes, &limits).is_ok());
    assert_eq!(
        batch::validate(&bytes, &BatchLimits { max_batch_bytes: size - 1, ..limits }),
        Err(BatchError::TooLarge { bytes: u64::from(size), limit: size - 1 })
    );
    assert_eq!(
        batch::validate(&bytes, &BatchLimits { max_record_bytes: 306, ..limits }),
        Err(BatchError::RecordTooLarge { index: 0, bytes: 307, limit: 306 })
    );
    assert_eq!(
        batch::validate(&bytes, &BatchLimits { max_headers: 1, ..limits }),
        Err(BatchError::TooManyHeaders { index: 0, count: 2, limit: 1 })
    );
}

#[test]
fn a_compressed_batch_must_fit_the_limit_uncompressed() {
    let mut builder = BatchBuilder::new().compression(Compression::Lz4);
    builder.push(0, None, Some(&vec![0; 5 << 20]), &[]).unwrap();
    let uncompressed = builder.len_bytes() as u32;
    let bomb = builder.finish();
    assert!(bomb.len() < 64 << 10);
    let limits = BatchLimits { max_batch_bytes: uncompressed, max_record_bytes: u32::MAX, max_headers: 0 };
    assert!(batch::validate(&bomb, &limits).is_ok());
    let limits = BatchLimits { max_batch_bytes: uncompressed - 1, ..limits };
    assert!(matches!(batch::validate(&bomb, &limits), Err(BatchError::TooLarge { .. })));
}

#[test]
fn the_builder_stops_at_the_largest_batch() {
    let mut builder = BatchBuilder::new();
    let value = vec![0; MAX_BATCH_BYTES as usize - HEADER_LEN];
    assert!(matches!(builder.push(0, None, Some(&value), &[]), Err(BatchError::TooLarge { .. })));
    assert_eq!((builder.count(), builder.len_bytes()), (0, HEADER_LEN));
    builder.push(5, None, Some(b"fits"), &[]).unwrap();
    assert_eq!(batch::validate(&builder.finish(), &LIMITS).unwrap().max_timestamp, 5);
}

#[test]
fn impossible_headers_are_refused_by_field() {
    let bytes = three(Compression::None);
    let cases: [(usize, &[u8], BatchError); 12] = [
        (0, &[0x80], BatchError::Header("base_offset")),
        (8, &[0xff], BatchError::Header("length")),
        (8, &[0, 0, 0, 48], BatchError::Header("length")),
        (16, &[1], BatchError::Magic(1)),
        (23, &[0x80], BatchError::Header("last_offset_delta")),
        (57, &[0x80], BatchError::Header("record_count")),
        (57, &[0, 0, 0, 0], BatchError::Empty),
        (57, &[0, 0, 0, 2], BatchError::Sparse { count: 2, range: 3 }),
        (23, &[0, 0, 0, 9], BatchError::Sparse { count: 3, range: 10 }),
        (35, &[0; 8], BatchError::MaxTimestamp { stated: 0, actual: 3_000 }),
        (51, &[0xff, 0xff], BatchError::Header("producer")),
        (43, &[0xff; 8], BatchError::Header("producer")),
    ];
    for (at, patch, error) in cases {
        assert_eq!(batch::validate(&patched(&bytes, at, patch), &LIMITS), Err(error), "at {at}");
    }
}

#[test]
fn flags_that_only_a_broker_sets_are_refused() {
    let bytes = three(Compression::None);
    for bit in 3..16_u16 {
        let attributes: u16 = 1 << bit;
        let flagged = patched(&bytes, 21, &attributes.to_be_bytes());
        assert_eq!(batch::validate(&flagged, &LIMITS), Err(BatchError::Attributes(attributes)));
    }
}

#[test]
fn codecs_without_support_are_refused_by_name() {
    let bytes = three(Compression::None);
    for (bits, name) in [(1, "gzip"), (2, "snappy"), (4, "zstd")] {
        let flagged = patched(&bytes, 22, &[bits]);
        let error = BatchError::Compression(name);
        assert_eq!(batch::validate(&flagged, &LIMITS), Err(error.clone()));
        assert_eq!(batch::records(&flagged).unwrap_err(), error);
        assert_eq!(batch::scan(&flagged).unwrap_err(), error);
        assert_eq!(batch::filter(&flagged, &[501]).unwrap_err(), error);
    }
    assert!(matches!(batch::validate(&patched(&bytes, 22, &[7]), &LIMITS), Err(BatchError::Compression(_))));
}

#[test]
fn damaged_lz4_is_an_error_even_when_the_crc_is_right() {
    let bytes = three(Compression::Lz4);
    let mut linked = BytesMut::from(&bytes[HEADER_LEN..]);
    linked[4] &= !(1 << 5);
    for (name, body) in [
        ("linked blocks", linked.freeze()),
        ("no frame", bytes.slice(HEADER_LEN + 1..)),
        ("nothing", Bytes::new()),
        ("half", bytes.slice(HEADER_LEN..HEADER_LEN + (bytes.len() - HEADER_LEN) / 2)),
        ("more", Bytes::from([&bytes[HEADER_LEN..], b"more"].concat())),
    ] {
        let mut batch = BytesMut::from(&bytes[..HEADER_LEN]);
        batch.extend_from_slice(&body);
        let length = batch.len() as u32 - 12;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        reseal(&mut batch);
        assert!(batch::validate(&batch, &LIMITS).is_err(), "{name}");
    }
}

#[test]
fn malformed_records_are_refused_by_what_is_wrong() {
    let good: &[u8] = &[12, 0, 0, 0, 1, 1, 0];
    assert!(batch::validate(&with_body(good), &LIMITS).is_ok());
    let cases: [(&[u8], RecordFault); 16] = [
        (&[], RecordFault::Truncated),
        (&[0x80], RecordFault::Truncated),
        (&[0xff, 0xff, 0xff, 0xff, 0x1f], RecordFault::Varint),
        (&[0xff, 0xff, 0xff, 0xff, 0xff, 0x01], RecordFault::Varint),
        (&[1], RecordFault::Length),
        (&[14, 0, 0, 0, 1, 1, 0], RecordFault::Truncated),
        (&[0], RecordFault::Truncated),
        // Eleven bytes of a 64-bit number, and a tenth byte that is too large.
        (&[24, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], RecordFault::Varint),
        (&[22, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], RecordFault::Varint),
        (&[12, 0, 0, 1, 1, 1, 0], RecordFault::Offset),
        (&[12, 0, 0, 2, 1, 1, 0], RecordFault::Offset),
        (&[12, 0, 0, 0, 3, 1, 0], RecordFault::Length),
        (&[12, 0, 0, 0, 1, 2, 0], RecordFault::Truncated),
        (&[12, 0, 0, 0, 1, 1, 2], RecordFault::HeaderCount),
        (&[16, 0, 0, 0, 1, 1, 2, 1, 1], RecordFault::Length),
        (&[18, 0, 0, 0, 1, 1, 2, 2, 0xff, 1], RecordFault::HeaderName),
    ];
    for (body, fault) in cases {
        let error = BatchError::Record { index: 0, fault };
        assert_eq!(batch::validate(&with_body(body), &LIMITS), Err(error.clone()), "{body:?}");
        let read = batch::records(&with_body(body)).unwrap().collect::<Result<Vec<_>, _>>();
        assert_eq!(read, Err(error), "{body:?}");
    }
    let after = [good, &[0]].concat();
    assert_eq!(batch::validate(&with_body(&after), &LIMITS), Err(BatchError::TrailingBytes(1)));
    let inside = &[14, 0, 0, 0, 1, 1, 0, 9];
    let error = BatchError::Record { index: 0, fault: RecordFault::TrailingBytes };
    assert_eq!(batch::validate(&with_body(inside), &LIMITS), Err(error));
}

#[test]
fn a_filter_keeps_what_it_is_told_and_nothing_else_changes() {
    for compression in [Compression::None, Compression::Lz4] {
        let bytes = three(compression);
        let original = BatchHeader::parse(&bytes).unwrap();
        let filtered = batch::filter(&bytes, &[500, 502]).unwrap();
        let header = batch::check(&filtered).unwrap();
        let expected = BatchHeader {
            attributes: 0,
            record_count: 2,
            max_timestamp: 2_000,
            crc: header.crc,
            length: filtered.len() as u32,
            ..original
        };
        assert_eq!(header, expected);
        let mut records = all(&bytes);
        records.remove(1);
        assert_eq!(all(&filtered), records);
        // Once more, of a batch that has a gap already.
        assert_eq!(all(&batch::filter(&filtered, &[502]).unwrap()), records[1..]);
        assert_eq!(batch::filter(&filtered, &[501]), Err(BatchError::NoSuchOffset(501)));
        assert_eq!(batch::filter(&filtered, &[500, 502]).unwrap().as_ptr(), filtered.as_ptr());
    }
}

#[test]
fn a_filter_of_everything_is_the_batch_itself() {
    for compression in [Compression::None, Compression::Lz4] {
        let bytes = three(compression);
        assert_eq!(batch::filter(&bytes, &[500, 501, 502]).unwrap().as_ptr(), bytes.as_ptr());
    }
}

#[test]
fn a_filter_refuses_offsets_that_are_not_there_or_not_ascending() {
    let bytes = three(Compression::None);
    assert_eq!(batch::filter(&bytes, &[]), Err(BatchError::Empty));
    assert_eq!(batch::filter(&bytes, &[499]), Err(BatchError::NoSuchOffset(499)));
    assert_eq!(batch::filter(&bytes, &[502, 503]), Err(BatchError::NoSuchOffset(503)));
    assert_eq!(batch::filter(&bytes, &[501, 500]), Err(BatchError::NoSuchOffset(500)));
    assert_eq!(batch::filter(&bytes, &[501, 501]), Err(BatchError::NoSuchOffset(501)));
}

/// Filters by reading the records that are wanted from the batch, as from a file.
fn filter_at_places(places: &RecordPlaces, file: &[u8], offsets: &[u64]) -> Result<Bytes, BatchError> {
    places.filter(offsets, |at, buffer| {
        buffer.copy_from_slice(&file[at as usize..at as usize + buffer.len()]);
        Ok(())
    })
}

#[test]
fn records_are_read_one_by_one_at_their_places() {
    let bytes = three(Compression::None);
    let places = RecordPlaces::of(&bytes).unwrap().unwrap();
    let mut reads = Vec::new();
    let filtered = places.filter::<BatchError>(&[500, 502], |at, buffer| {
        reads.push((at as usize, buffer.len()));
        buffer.copy_from_slice(&bytes[at as usize..at as usize + buffer.len()]);
        Ok(())
    });
    assert_eq!(filtered, batch::filter(&bytes, &[500, 502]));
    assert_eq!(reads.len(), 2);
    assert_eq!((reads[0].0, reads[1].0 + reads[1].1), (HEADER_LEN, bytes.len()));
    assert!(reads[0].1 + reads[1].1 < bytes.len() - HEADER_LEN);
    for offsets in [&[499][..], &[502, 503], &[501, 500], &[501, 501]] {
        let wrong = offsets.iter().find(|offset| !(500..=502).contains(*offset)).or(offsets.last());
        assert_eq!(
            filter_at_places(&places, &bytes, offsets),
            Err(BatchError::NoSuchOffset(*wrong.unwrap()))
        );
    }
    assert_eq!(filter_at_places(&places, &bytes, &[]), Err(BatchError::Empty));
}

#[test]
fn records_that_are_compressed_or_have_gaps_have_no_places() {
    let gap = batch::filter(&three(Compression::None), &[500, 502]).unwrap();
    assert_eq!(RecordPlaces::of(&gap), Ok(None));
    assert_eq!(RecordPlaces::of(&three(Compression::Lz4)), Ok(None));
}

#[test]
fn a_record_that_changed_under_its_place_is_noticed() {
    let bytes = three(Compression::None);
    let places = RecordPlaces::of(&bytes).unwrap().unwrap();
    for at in HEADER_LEN..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 1;
        let filtered = filter_at_places(&places, &damaged, &[500, 501, 502]);
        assert!(matches!(filtered, Err(BatchError::Crc { .. })), "{at}: {filtered:?}");
    }
}

#[test]
fn a_compacted_batch_stands_for_what_is_gone_and_says_when_tombstones_may_go() {
    for compression in [Compression::None, Compression::Lz4] {
        let batch = three(compression);
        let records = all(&batch);
        assert_eq!(batch::compact(&batch, &[500, 501, 502], 502, None).unwrap(), batch);
        let fewer = batch::compact(&batch, &[500, 502], 900, None).unwrap();
        let header = batch::check(&fewer).unwrap();
        assert_eq!((header.base_offset, header.last_offset(), header.record_count), (500, 900, 2));
        assert_eq!((header.max_timestamp, header.delete_horizon()), (2_000, None));
        assert_eq!((header.producer_id, header.partition_epoch), (7, 3));
        assert_eq!(all(&fewer), [records[0].clone(), records[2].clone()]);
        for horizon in [0, 9_999, 1_800_000_000_000, i64::MAX] {
            let marked = batch::compact(&fewer, &[500, 502], 900, Some(horizon)).unwrap();
            let header = batch::check(&marked).unwrap();
            assert_eq!((header.delete_horizon(), header.max_timestamp), (Some(horizon), 2_000));
            assert_eq!(all(&marked), all(&fewer), "times stay");
            // The first horizon holds.
            let again = batch::compact(&marked, &[502], 700, Some(5)).unwrap();
            assert_eq!(batch::check(&again).unwrap().delete_horizon(), Some(horizon));
            assert_eq!(all(&again), records[2..]);
        }
    }
    let batch = three(Compression::None);
    let refused = |offsets: &[u64], last| batch::compact(&batch, offsets, last, None).unwrap_err();
    assert_eq!(refused(&[], 502), BatchError::Empty);
    assert_eq!(refused(&[503], 503), BatchError::NoSuchOffset(503));
    assert_eq!(refused(&[502], 501), BatchError::NoSuchOffset(502));
    for last in [499, 500 + (1 << 31)] {
        assert_eq!(refused(&[500], last), BatchError::Range { base_offset: 500, last_offset: last });
    }
}

#[test]
fn a_concatenation_comes_apart_until_it_is_damaged() {
    let one = three(Compression::None);
    let two = three(Compression::Lz4);
    let both = Bytes::from([&one[..], &two[..]].concat());
    let parts: Vec<Bytes> = batch::split(&both).collect::<Result<_, _>>().unwrap();
    assert_eq!(parts, [one.clone(), two]);
    assert_eq!(batch::split(&Bytes::new()).count(), 0);
    let cut: Vec<_> = batch::split(&both.slice(..both.len() - 1)).collect();
    assert_eq!(cut.len(), 2);
    assert_eq!(cut[0].as_ref(), Ok(&one));
    assert!(matches!(cut[1], Err(BatchError::Truncated { .. })));
}

fn a_record() -> impl Strategy<Value = Record> {
    let bytes = |max| option::of(vec(any::<u8>(), 0..max).prop_map(Bytes::from));
    let header = (".{0,8}", bytes(20)).prop_map(|(name, value)| Header { name, value });
    // Timestamps of all sizes: near each other, and anywhere.
    let timestamp = prop_oneof![1_700_000_000_000..1_700_000_100_000_i64, any::<i64>()];
    (timestamp, bytes(40), bytes(300), vec(header, 0..4))
        .prop_map(|(timestamp, key, value, headers)| Record { offset: 0, timestamp, key, value, headers })
}

fn a_codec() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::None), Just(Compression::Lz4)]
}

/// Everything that can be done with bytes, for the sake of not panicking. What validates must be readable.
fn try_everything(bytes: &Bytes) {
    let valid = batch::validate(bytes, &LIMITS).is_ok();
    let _ = batch::check(bytes);
    let _ = batch::filter(bytes, &[0, 2]);
    if let Ok(Some(places)) = RecordPlaces::of(bytes) {
        filter_at_places(&places, bytes, &[places.header().base_offset]).unwrap();
    }
    let _ = batch::compact(bytes, &[0, 2], 5, Some(1));
    for part in batch::split(bytes).flatten() {
        let _ = BatchHeader::parse(&part);
    }
    let read = batch::records(bytes).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let scanned = batch::scan(bytes).and_then(|scan| scan.iter().map(|meta| meta.map(|_| ())).collect());
    let scanned: Result<Vec<()>, BatchError> = scanned;
    if valid {
        assert_eq!(read.unwrap().len(), scanned.unwrap().len());
    } else if let Ok(records) = read {
        assert_eq!(scanned.unwrap().len(), records.len());
    }
}

proptest! {
    #[test]
    fn records_survive_the_way_there_and_back(
        mut records in vec(a_record(), 1..80),
        compression in a_codec(),
        base_offset in 0..1_u64 << 62,
    ) {
        let mut batch = build(&records, compression);
        batch::assign(&mut batch, base_offset, 9);
        let bytes = batch.freeze();
        batch::validate(&bytes, &LIMITS).unwrap();
        for (offset, record) in (base_offset..).zip(&mut records) {
            record.offset = offset;
        }
        prop_assert_eq!(&all(&bytes), &records);
        let scan = batch::scan(&bytes).unwrap();
        let mut size = HEADER_LEN;
        for (meta, record) in scan.iter().map(Result::unwrap).zip(&records) {
            prop_assert_eq!(meta.offset, record.offset);
            prop_assert_eq!(meta.timestamp, record.timestamp);
            prop_assert_eq!(meta.key, record.key.as_deref());
            size += meta.size as usize;
        }
        if scan.header().compression().unwrap() == Compression::None {
            prop_assert_eq!(size, bytes.len());
        }
    }

    #[test]
    fn any_choice_of_records_can_be_filtered(
        records in vec(a_record(), 1..30),
        choice in any::<u32>(),
        compression in a_codec(),
    ) {
        let bytes = build(&records, compression).freeze();
        let mut kept = all(&bytes);
        kept.retain(|record| choice >> record.offset & 1 == 1);
        let offsets: Vec<u64> = kept.iter().map(|record| record.offset).collect();
        let filtered = batch::filter(&bytes, &offsets);
        if let Some(places) = RecordPlaces::of(&bytes).unwrap() {
            prop_assert_eq!(&filter_at_places(&places, &bytes, &offsets), &filtered);
        }
        match filtered {
            Ok(filtered) => {
                batch::check(&filtered).unwrap();
                prop_assert_eq!(all(&filtered), kept);
            }
            Err(error) => {
                prop_assert!(kept.is_empty());
                prop_assert_eq!(error, BatchError::Empty);
            }
        }
    }

    #[test]
    fn foreign_bytes_never_cause_a_panic(bytes in vec(any::<u8>(), 0..400)) {
        try_everything(&Bytes::from(bytes));
    }

    #[test]
    fn foreign_records_under_a_right_crc_never_cause_a_panic(
        body in vec(prop_oneof![0..16_u8, any::<u8>()], 0..60),
        count in 0..4_u32,
        attributes in prop_oneof![Just(0_u8), Just(3), any::<u8>()],
    ) {
        let bytes = patched(&with_body(&body), 57, &count.to_be_bytes());
        let bytes = patched(&bytes, 23, &count.saturating_sub(1).to_be_bytes());
        try_everything(&patched(&bytes, 22, &[attributes]));
    }

    #[test]
    fn damage_under_a_right_crc_never_causes_a_panic(
        records in vec(a_record(), 1..10),
        compression in a_codec(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut batch = build(&records, compression);
        for (at, byte) in damage {
            // All but length and CRC.
            let at = 21 + at.index(batch.len() - 21);
            batch[at] = byte;
        }
        reseal(&mut batch);
        try_everything(&batch.freeze());
    }
}
