//! Record batches as their users see them: built, validated, read, scanned, filtered, split and damaged.
#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

use bytes::Bytes;
use felucca_protocol::batch::{self, BatchBuilder, BatchLimits, Compression, Record};

const LIMITS: BatchLimits =
    BatchLimits { max_batch_bytes: 1 << 20, max_record_bytes: 1 << 20, max_headers: 100 };

fn three(compression: Compression) -> Bytes {
    let mut builder = BatchBuilder::new().producer(7, 1, 40).compression(compression);
    builder.push(1_000, Some(b"a"), Some(&[b'x'; 300]), &[("h", Some(b"1")), ("none", None)]).unwrap();
    builder.push(3_000, None, Some(b""), &[]).unwrap();
    builder.push(2_000, Some(b"c"), None, &[]).unwrap();
    let expected = builder.len_bytes();
    let mut batch = builder.finish();
    assert!(compression != Compression::None || batch.len() == expected);
    batch::assign(&mut batch, 500, 3);
    batch.freeze()
}

fn all(batch: &Bytes) -> Vec<Record> {
    batch::records(batch).unwrap().collect::<Result<_, _>>().unwrap()
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
        assert_eq!(
            records.iter().map(|r| (r.offset, r.timestamp)).collect::<Vec<_>>(),
            [(500, 1_000), (501, 3_000), (502, 2_000)]
        );
        assert_eq!(records[0].headers[0].value.as_deref(), Some(b"1".as_slice()));
        assert_eq!(records[0].headers[1].value, None);
        assert_eq!((records[1].key.as_deref(), records[1].value.as_deref()), (None, Some(b"".as_slice())));
        assert_eq!(records[2].value, None);
    }
}
