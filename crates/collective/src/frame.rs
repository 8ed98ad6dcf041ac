//! The unit that links carry: a fixed header that says whose, when and how much, then values.
//!
//! On the wire: 48 bytes of header, little endian (see [`FrameHeader::encode`]), then
//! `elements` f32 values, little endian. The receiver always knows what must come next, so a
//! header is checked against that expectation as a whole and no size is ever taken from the wire.

use std::fmt;

use crate::link::CollectiveError;

/// Bytes of an encoded header.
pub const HEADER_BYTES: usize = 48;

const MAGIC: u32 = u32::from_le_bytes(*b"PHXF");
const VERSION: u16 = 1;

/// Which incarnation of which group a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Membership {
    /// The group.
    pub group: u64,
    /// Its incarnation; grows with every repair.
    pub epoch: u64,
}

impl fmt::Display for Membership {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "group {} epoch {}", self.group, self.epoch)
    }
}

/// What a frame is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Subtree roots, still to be added.
    Partials = 1,
    /// Finished sums of a run of elements.
    Sums = 2,
    /// Columns on their way to rank 0.
    Gather = 3,
    /// No values: the sender has come this far.
    Barrier = 4,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Partials, Self::Sums, Self::Gather, Self::Barrier]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// What stands before the values of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// The sender's group incarnation.
    pub membership: Membership,
    /// Which exchange of the group this is part of.
    pub sequence: u64,
    /// What the values are.
    pub kind: Kind,
    /// The sender's rank.
    pub from: u32,
    /// f32 values that follow.
    pub elements: u64,
}

impl FrameHeader {
    /// Magic (4 bytes), version (2), kind (1), zero (1), group (8), epoch (8), sequence (8),
    /// sender (4), zero (4), elements (8).
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.membership.group.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.membership.epoch.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.from.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.elements.to_le_bytes());
        bytes
    }

    /// Reads a header that must be exactly `expected`.
    ///
    /// Errors, in this order: `Malformed` (no header of this protocol), `WrongEpoch`,
    /// `OutOfOrder`, `Mismatch` (sender, kind or element count). They name `expected.from`: the
    /// connection's peer is known, whatever the frame claims.
    pub fn decode(
        bytes: &[u8; HEADER_BYTES],
        expected: &FrameHeader,
    ) -> Result<(), CollectiveError> {
        let header = parse(bytes).map_err(|what| CollectiveError::Malformed {
            peer: expected.from as usize,
            sequence: expected.sequence,
            what,
        })?;
        header.check(expected)
    }

    /// As [`FrameHeader::decode`], for a header that never was bytes.
    pub(crate) fn check(&self, expected: &FrameHeader) -> Result<(), CollectiveError> {
        let peer = expected.from as usize;
        if self.membership != expected.membership {
            return Err(CollectiveError::WrongEpoch {
                peer,
                expected: expected.membership,
                got: self.membership,
            });
        }
        if self.sequence != expected.sequence {
            return Err(CollectiveError::OutOfOrder {
                peer,
                expected: expected.sequence,
                got: self.sequence,
            });
        }
        let pairs = [
            ("sender", u64::from(expected.from), u64::from(self.from)),
            ("frame kind", expected.kind as u64, self.kind as u64),
            ("element count", expected.elements, self.elements),
        ];
        for (what, expected_value, got) in pairs {
            if expected_value != got {
                return Err(CollectiveError::Mismatch {
                    peer,
                    sequence: expected.sequence,
                    what,
                    expected: expected_value,
                    got,
                });
            }
        }
        Ok(())
    }
}

fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<FrameHeader, &'static str> {
    if u32::from_le_bytes(field(bytes, 0)) != MAGIC {
        return Err("not a frame");
    }
    if u16::from_le_bytes(field(bytes, 4)) != VERSION {
        return Err("another version of the protocol");
    }
    let kind = Kind::from_byte(bytes[6]).ok_or("unknown kind")?;
    // Reserved bytes are checked so that a later version can give them a meaning.
    if bytes[7] != 0 || field::<4>(bytes, 36) != [0; 4] {
        return Err("reserved bytes are set");
    }
    Ok(FrameHeader {
        membership: Membership {
            group: u64::from_le_bytes(field(bytes, 8)),
            epoch: u64::from_le_bytes(field(bytes, 16)),
        },
        sequence: u64::from_le_bytes(field(bytes, 24)),
        kind,
        from: u32::from_le_bytes(field(bytes, 32)),
        elements: u64::from_le_bytes(field(bytes, 40)),
    })
}

/// What stands in place of the next header where none follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Farewell {
    /// The rank that the sender could not go on without; none where it leaves in order.
    pub(crate) accused: Option<usize>,
}

impl Farewell {
    /// Magic (4 bytes), version (2), zero (2), the accused rank plus one or zero (4), zero (36).
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(b"PHXE");
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        let accused = self.accused.map_or(0, |rank| rank as u32 + 1);
        bytes[8..12].copy_from_slice(&accused.to_le_bytes());
        bytes
    }

    /// The farewell that these bytes are, if they are one.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let number = u32::from_le_bytes(field(bytes, 8));
        let farewell = Self { accused: number.checked_sub(1).map(|rank| rank as usize) };
        (farewell.encode() == *bytes).then_some(farewell)
    }
}

/// The `N` bytes at a fixed offset of a fixed-size message.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

/// A frame that stays within the process.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Whose, when, what.
    pub header: FrameHeader,
    /// `[header.elements]`.
    pub values: Vec<f32>,
}

/// Replaces `out` by the wire form of a frame.
pub(crate) fn encode_frame(header: &FrameHeader, values: &[f32], out: &mut Vec<u8>) {
    let length = HEADER_BYTES + size_of_val(values);
    // Growing zeroes only what is new; every byte is then written.
    out.resize(length, 0);
    out[..HEADER_BYTES].copy_from_slice(&header.encode());
    let (words, _) = out[HEADER_BYTES..].as_chunks_mut::<4>();
    for (word, value) in words.iter_mut().zip(values) {
        *word = value.to_le_bytes();
    }
}

/// Reads `into.len()` values from the same number of four-byte words.
pub(crate) fn decode_values(bytes: &[u8], into: &mut [f32]) {
    let (words, _) = bytes.as_chunks::<4>();
    for (value, word) in into.iter_mut().zip(words) {
        *value = f32::from_le_bytes(*word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> impl Strategy<Value = FrameHeader> {
        let kind =
            prop::sample::select(vec![Kind::Partials, Kind::Sums, Kind::Gather, Kind::Barrier]);
        (any::<(u64, u64, u64, u32, u64)>(), kind).prop_map(
            |((group, epoch, sequence, from, elements), kind)| FrameHeader {
                membership: Membership { group, epoch },
                sequence,
                kind,
                from,
                elements,
            },
        )
    }

    const SAMPLE: FrameHeader = FrameHeader {
        membership: Membership { group: 3, epoch: 7 },
        sequence: 11,
        kind: Kind::Partials,
        from: 2,
        elements: 5,
    };

    #[test]
    fn the_layout_is_fixed() {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(b"PHXF\x01\0\x01\0");
        for (at, value) in [(8, 3), (16, 7), (24, 11), (32, 2), (40, 5)] {
            bytes[at] = value;
        }
        assert_eq!(SAMPLE.encode(), bytes);
    }

    #[test]
    fn a_farewell_names_nobody_or_one_rank_and_is_no_header() {
        for accused in [None, Some(0), Some(2), Some(u32::MAX as usize - 1)] {
            let farewell = Farewell { accused };
            let bytes = farewell.encode();
            assert_eq!(Farewell::decode(&bytes), Some(farewell));
            assert!(FrameHeader::decode(&bytes, &SAMPLE).is_err());
            for at in (0..8).chain(12..HEADER_BYTES) {
                let mut other = bytes;
                other[at] ^= 1;
                assert_eq!(Farewell::decode(&other), None, "byte {at}");
            }
        }
        assert_eq!(Farewell::decode(&SAMPLE.encode()), None);
    }

    #[test]
    fn each_field_has_its_own_error() {
        let decode = |header: FrameHeader| FrameHeader::decode(&header.encode(), &SAMPLE);
        assert_eq!(decode(SAMPLE), Ok(()));
        let got = Membership { group: 3, epoch: 6 };
        assert_eq!(
            decode(FrameHeader { membership: got, sequence: 1, ..SAMPLE }),
            Err(CollectiveError::WrongEpoch { peer: 2, expected: SAMPLE.membership, got })
        );
        assert_eq!(
            decode(FrameHeader { sequence: 12, ..SAMPLE }),
            Err(CollectiveError::OutOfOrder { peer: 2, expected: 11, got: 12 })
        );
        let mismatch = |what, expected, got| {
            Err(CollectiveError::Mismatch { peer: 2, sequence: 11, what, expected, got })
        };
        assert_eq!(decode(FrameHeader { from: 1, ..SAMPLE }), mismatch("sender", 2, 1));
        assert_eq!(
            decode(FrameHeader { kind: Kind::Gather, ..SAMPLE }),
            mismatch("frame kind", 1, 3)
        );
        assert_eq!(
            decode(FrameHeader { elements: u64::MAX, ..SAMPLE }),
            mismatch("element count", 5, u64::MAX)
        );
    }

    #[test]
    fn other_protocols_and_versions_are_malformed() {
        for at in [0, 3, 4, 5, 6, 7, 36, 39] {
            let mut bytes = SAMPLE.encode();
            bytes[at] ^= 0x80;
            let result = FrameHeader::decode(&bytes, &SAMPLE);
            assert!(matches!(result, Err(CollectiveError::Malformed { .. })), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn a_header_is_accepted_iff_it_is_the_expected_one(a in header(), b in header()) {
            prop_assert_eq!(parse(&a.encode()), Ok(a));
            prop_assert_eq!(FrameHeader::decode(&a.encode(), &a), Ok(()));
            prop_assert_eq!(FrameHeader::decode(&a.encode(), &b).is_ok(), a == b);
        }

        #[test]
        fn any_changed_bit_is_refused(a in header(), bit in 0..HEADER_BYTES * 8) {
            let mut bytes = a.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(FrameHeader::decode(&bytes, &a).is_err());
        }

        #[test]
        fn noise_never_panics(bytes in prop::array::uniform32(any::<u8>()), a in header()) {
            let mut noise = a.encode();
            noise[8..40].copy_from_slice(&bytes);
            let expected_ok = noise == a.encode();
            prop_assert_eq!(FrameHeader::decode(&noise, &a).is_ok(), expected_ok);
        }

        #[test]
        fn values_come_back_by_bits(bits in prop::collection::vec(any::<u32>(), 0..50)) {
            let values: Vec<f32> = bits.iter().map(|&b| f32::from_bits(b)).collect();
            let mut bytes = vec![9; 77];
            let header = FrameHeader { elements: values.len() as u64, ..SAMPLE };
            encode_frame(&header, &values, &mut bytes);
            prop_assert_eq!(bytes.len(), HEADER_BYTES + 4 * values.len());
            prop_assert_eq!(&bytes[..HEADER_BYTES], &header.encode()[..]);
            let mut back = vec![0.0; values.len()];
            decode_values(&bytes[HEADER_BYTES..], &mut back);
            prop_assert_eq!(back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), bits);
        }
    }
}
