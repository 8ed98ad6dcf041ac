//! Files that lie about themselves are refused by name and never crash the reader.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use model::safetensors::{Dtype, HEADER_LIMIT, Header, Index, SafetensorsError, parse_header};
use proptest::prelude::*;
use serde_json::{Value, json};

const FILE: &str = "model.safetensors";

/// A file of this header text and so many data bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn parse(header: &Value, data: usize) -> Result<Header, SafetensorsError> {
    parse_header(FILE, &file(&header.to_string(), data))
}

fn entry(dtype: &str, shape: &[u64], begin: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})
}

/// Three tensors over 24 bytes, not in the order of their names.
fn good() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "b": entry("F32", &[2, 2], 8, 24),
        "a": entry("BF16", &[3], 0, 6),
        "c": entry("F16", &[1], 6, 8),
    })
}

/// The good header with one entry replaced.
fn with(name: &str, entry: Value) -> Value {
    let mut header = good();
    header[name] = entry;
    header
}

#[test]
fn a_good_file() {
    let header = parse(&good(), 24).unwrap();
    let start = 8 + good().to_string().len();
    let listed: Vec<_> = header
        .tensors()
        .map(|(name, info)| {
            let range = info.range.start - start..info.range.end - start;
            (name, info.dtype, info.shape.clone(), range)
        })
        .collect();
    assert_eq!(
        listed,
        [
            ("a", Dtype::BF16, vec![3], 0..6),
            ("b", Dtype::F32, vec![2, 2], 8..24),
            ("c", Dtype::F16, vec![1], 6..8),
        ]
    );
    assert_eq!((header.file(), header.get("d")), (FILE, None));
    assert_eq!(header.expect("b", &[2, 2]).unwrap().dtype, Dtype::F32);
}

#[test]
fn corners_that_are_allowed() {
    assert_eq!(parse(&json!({}), 0).unwrap().tensors().count(), 0);
    // Trailing blanks align the data; empty tensors and scalars exist.
    let padded = format!("{}     ", good());
    assert!(parse_header(FILE, &file(&padded, 24)).is_ok());
    let empty = json!({"e": entry("F32", &[0, 9], 0, 0), "s": entry("F32", &[], 0, 4)});
    assert!(parse(&empty, 4).is_ok());
    let empty = json!({"e": entry("F32", &[0], 4, 4), "s": entry("F32", &[], 0, 4)});
    assert!(parse(&empty, 4).is_ok());
}

#[test]
fn wrong_lengths() {
    for bytes in 0..8 {
        let short = SafetensorsError::TooShort { file: FILE.to_owned(), bytes };
        assert_eq!(parse_header(FILE, &vec![0; bytes]), Err(short));
    }
    let claims = |length: u64| parse_header(FILE, &[&length.to_le_bytes()[..], b"{}"].concat());
    let file = || FILE.to_owned();
    let truncated =
        |length| SafetensorsError::HeaderTruncated { file: file(), length, available: 2 };
    assert_eq!(claims(3), Err(truncated(3)));
    assert_eq!(claims(HEADER_LIMIT), Err(truncated(HEADER_LIMIT)));
    for length in [HEADER_LIMIT + 1, u64::MAX] {
        assert_eq!(claims(length), Err(SafetensorsError::HeaderTooLong { file: file(), length }));
    }
    // A file cut at any byte.
    let whole = self::file(&good().to_string(), 24);
    for end in 0..whole.len() {
        assert!(parse_header(FILE, &whole[..end]).is_err(), "{end}");
    }
}

#[test]
fn lies_are_refused_by_name() {
    let a = |dtype, shape: &[u64], begin, end| with("a", entry(dtype, shape, begin, end));
    let cases = [
        a("F31", &[3], 0, 6),
        a("BF16", &[4], 0, 6),
        a("BF16", &[1 << 40, 1 << 40], 0, 6),
        a("F4", &[1], 0, 6),
        a("BF16", &[3], 6, 0),
        a("BF16", &[3], 0, 600),
        a("BF16", &[3], 24, 30),
        a("BF16", &[3], u64::MAX - 5, u64::MAX),
        a("BF16", &[3], 2, 8),
        a("BF16", &[3], 18, 24),
        a("BF16", &[2], 0, 4),
        a("BF16", &[2], 2, 6),
        with("d", entry("U8", &[2], 22, 24)),
        with("a", json!({"dtype": "BF16", "shape": [3]})),
        with("a", json!({"dtype": "BF16", "shape": [3], "data_offsets": [0, 6], "x": 1})),
        with("a", json!({"dtype": "BF16", "shape": [-3], "data_offsets": [0, 6]})),
        with("a", json!({"dtype": "BF16", "shape": [3.0], "data_offsets": [0, 6]})),
        with("a", json!({"dtype": "BF16", "shape": [3], "data_offsets": [0, 6, 9]})),
        with("a", json!(null)),
        with("__metadata__", json!({"format": 1})),
    ];
    let message = |header: &Value| {
        let message = parse(header, 24).unwrap_err().to_string();
        let message = message.strip_prefix("model.safetensors: ").unwrap();
        // The place in the text is of no interest here, nor are long lines.
        let message = message.split(" at line").next().unwrap_or_default();
        message.replace("the header is malformed", "malformed")
    };
    let messages: Vec<String> = cases.iter().map(message).collect();
    insta::assert_snapshot!(messages.join("\n"), @"
    tensor a has the unknown type F31
    tensor a has 6 bytes, its type and shape need 8
    tensor a has 6 bytes, its type and shape need more than 2^64
    tensor a has 6 bytes, its type and shape need 4 bits
    tensor a lies at 6..0 of 24 data bytes
    tensor a lies at 0..600 of 24 data bytes
    tensor a lies at 24..30 of 24 data bytes
    tensor a lies at 18446744073709551610..18446744073709551615 of 24 data bytes
    2 bytes before tensor a belong to no tensor
    6 bytes before tensor c belong to no tensor
    2 bytes before tensor c belong to no tensor
    2 bytes before tensor a belong to no tensor
    tensor d overlaps tensor b
    malformed: a: missing field `data_offsets`
    malformed: a: unknown field `x`, expected one of `dtype`, `shape`, `data_offsets`
    malformed: a: invalid value: integer `-3`, expected u64
    malformed: a: invalid type: floating point `3.0`, expected u64
    malformed: a: trailing characters
    malformed: a: invalid type: null, expected a tensor's entry
    malformed: __metadata__: invalid type: integer `1`, expected a string
    ");
}

#[test]
fn bytes_without_a_tensor() {
    let trailing = SafetensorsError::Trailing { file: FILE.to_owned(), bytes: 1 };
    assert_eq!(parse(&good(), 25), Err(trailing));
    let trailing = SafetensorsError::Trailing { file: FILE.to_owned(), bytes: 5 };
    assert_eq!(parse(&json!({}), 5), Err(trailing));
}

#[test]
fn text_that_is_no_header() {
    let refused = |text: &str| parse_header(FILE, &file(text, 0)).unwrap_err();
    for text in ["", " {}", "[]", "null", "{", "{} {}", "{\"a\": }", "\u{feff}{}"] {
        assert!(matches!(refused(text), SafetensorsError::Malformed { .. }), "{text:?}");
    }
    let invalid = [&2u64.to_le_bytes()[..], &[b'{', 0xff]].concat();
    assert!(matches!(parse_header(FILE, &invalid), Err(SafetensorsError::Malformed { .. })));
}

#[test]
fn names_stand_once() {
    let one = entry("U8", &[1], 0, 1);
    let two = entry("U8", &[1], 1, 2);
    let header = format!(r#"{{"a": {one}, "a": {two}}}"#);
    let duplicate =
        || SafetensorsError::Duplicate { file: FILE.to_owned(), tensor: "a".to_owned() };
    assert_eq!(parse_header(FILE, &file(&header, 2)), Err(duplicate()));
    let twice = r#"{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}"#;
    assert_eq!(Index::parse(FILE, twice), Err(duplicate()));
}

#[test]
fn what_the_model_needs() {
    let header = with("c", entry("I16", &[1], 6, 8));
    let header = parse(&header, 24).unwrap();
    let messages = [
        header.expect("d", &[3]).unwrap_err().to_string(),
        header.expect("a", &[4]).unwrap_err().to_string(),
        header.expect("b", &[4]).unwrap_err().to_string(),
        header.expect("c", &[1]).unwrap_err().to_string(),
    ];
    insta::assert_snapshot!(messages.join("\n"), @"
    model.safetensors: tensor d is missing
    model.safetensors: tensor a has shape [3], the model needs [4]
    model.safetensors: tensor b has shape [2, 2], the model needs [4]
    model.safetensors: tensor c has type I16; usable are F32, F16 and BF16
    ");
}

#[test]
fn every_type_of_the_format() {
    let sizes = [
        ("BOOL", 8),
        ("F4", 4),
        ("F6_E2M3", 6),
        ("F6_E3M2", 6),
        ("U8", 8),
        ("I8", 8),
        ("F8_E5M2", 8),
        ("F8_E4M3", 8),
        ("F8_E8M0", 8),
        ("I16", 16),
        ("U16", 16),
        ("F16", 16),
        ("BF16", 16),
        ("I32", 32),
        ("U32", 32),
        ("F32", 32),
        ("C64", 64),
        ("F64", 64),
        ("I64", 64),
        ("U64", 64),
    ];
    for (name, bits) in sizes {
        let header = json!({"t": entry(name, &[8], 0, bits)});
        let header = parse(&header, bits as usize).unwrap();
        let info = header.get("t").unwrap();
        assert_eq!((info.dtype.to_string().as_str(), info.dtype.bits()), (name, bits));
        assert_eq!(header.expect("t", &[8]).is_ok(), matches!(name, "F32" | "F16" | "BF16"));
    }
}

#[test]
fn indexes() {
    let good = r#"{"metadata": {"total_size": 9}, "weight_map": {
        "a": "model-00002.safetensors", "b": "model-00001.safetensors",
        "c": "model-00002.safetensors"}}"#;
    let index = Index::parse("index.json", good).unwrap();
    assert_eq!(index.file_of("a"), Ok("model-00002.safetensors"));
    let files: Vec<&str> = index.files().into_iter().collect();
    assert_eq!(files, ["model-00001.safetensors", "model-00002.safetensors"]);
    assert_eq!(index.tensors().count(), 3);
    let missing = index.file_of("d").unwrap_err().to_string();
    assert_eq!(missing, "index.json: tensor d is missing");

    let refused = [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "model\0.safetensors",
        "model\n.safetensors",
        "..safetensors",
        "",
        ".",
        "pytorch_model.bin",
        "model.pt",
        &format!("{}.safetensors", "x".repeat(300)),
    ];
    for name in refused {
        let json = json!({"weight_map": {"a": name}}).to_string();
        match Index::parse("index.json", &json) {
            Err(SafetensorsError::FileName { tensor, .. }) => assert_eq!(tensor, "a"),
            other => panic!("{name:?}: {other:?}"),
        }
    }
    for json in ["", "{}", "[]", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 1}}"#] {
        let malformed = Index::parse("index.json", json);
        assert!(matches!(malformed, Err(SafetensorsError::Malformed { .. })), "{json}");
    }
}

/// What every accepted header promises, whatever the bytes were.
fn sound(header: &Header, file_len: usize) {
    let mut ranges: Vec<_> = header.tensors().map(|(_, info)| info.range.clone()).collect();
    ranges.sort_by_key(|range| (range.start, range.end));
    for (_, info) in header.tensors() {
        assert!(info.range.start <= info.range.end && info.range.end <= file_len);
        let elements: u64 = info.shape.iter().map(|&n| n as u64).product();
        assert_eq!(elements * info.dtype.bits(), 8 * info.range.len() as u64);
    }
    assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
}

proptest! {
    #[test]
    fn random_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..64), tame in any::<bool>()) {
        if tame && bytes.len() >= 9 {
            let length = (bytes.len() - 8) as u64;
            bytes[..8].copy_from_slice(&length.to_le_bytes());
            bytes[8] = b'{';
        }
        if let Ok(header) = parse_header(FILE, &bytes) {
            sound(&header, bytes.len());
        }
        let _ = Index::parse(FILE, &String::from_utf8_lossy(&bytes));
    }

    /// A good file with some bytes changed, most of them in the header's digits.
    #[test]
    fn mutated_files(changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..5)) {
        let mut bytes = file(&good().to_string(), 24);
        let digits: Vec<usize> =
            (8..bytes.len()).filter(|&at| bytes[at].is_ascii_digit()).collect();
        for (at, value) in changes {
            if value < 128 {
                let at = digits[at % digits.len()];
                bytes[at] = b'0' + value % 10;
            } else {
                let at = at % bytes.len();
                bytes[at] = value.wrapping_mul(2);
            }
        }
        if let Ok(header) = parse_header(FILE, &bytes) {
            sound(&header, bytes.len());
        }
    }

    #[test]
    fn random_extents(
        entries in prop::collection::vec((0u64..4, 0u64..30, 0u64..30), 0..4),
        data in 0usize..30,
    ) {
        let mut header = json!({});
        for (number, (size, begin, end)) in entries.into_iter().enumerate() {
            header[number.to_string()] = entry("U8", &[size], begin, end);
        }
        let bytes = file(&header.to_string(), data);
        if let Ok(header) = parse_header(FILE, &bytes) {
            sound(&header, bytes.len());
        }
    }
}
