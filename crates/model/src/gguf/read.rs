//! Reads numbers, texts and metadata values from bytes, never beyond their end.

/// Bytes of the longest text that is a metadata value: far above any chat template.
const TEXT_MAX: u64 = 16 << 20;

/// Why nothing could be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Shortage {
    /// The bytes end before it does.
    End,
    /// It stands there and cannot be.
    Malformed(&'static str),
}

/// A position in bytes.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A metadata value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any integer type.
    Whole(i128),
    /// f32 or f64. An f32 is the decimal number that it was written from: its shortest.
    Number(f64),
    /// A truth value.
    Truth(bool),
    /// A text.
    Text(&'a str),
    /// An array.
    Array(Array<'a>),
}

/// An array whose elements were checked and are read when they are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Array<'a> {
    kind: Kind,
    count: u64,
    bytes: &'a [u8],
}

/// Types of values, by their codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::U8,
        Kind::I8,
        Kind::U16,
        Kind::I16,
        Kind::U32,
        Kind::I32,
        Kind::F32,
        Kind::Bool,
        Kind::Text,
        Kind::Array,
        Kind::U64,
        Kind::I64,
        Kind::F64,
    ];

    /// The least bytes of a value.
    fn least(self) -> u64 {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::Text | Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::Array => 12,
        }
    }
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.at as u64
    }

    /// Bytes there still are.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], Shortage> {
        if count > self.left() {
            return Err(Shortage::End);
        }
        // Within a slice, so within a usize.
        let end = self.at + count as usize;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Shortage> {
        self.take(N as u64)?.try_into().map_err(|_| Shortage::End)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Shortage> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Shortage> {
        self.array().map(u64::from_le_bytes)
    }

    /// A text of at most so many bytes.
    pub(super) fn text(&mut self, most: u64) -> Result<&'a str, Shortage> {
        let length = self.u64()?;
        if length > most {
            return Err(Shortage::Malformed("is a text longer than any should be"));
        }
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| Shortage::Malformed("is a text that is not UTF-8"))
    }

    fn kind(&mut self) -> Result<Kind, Shortage> {
        let code = self.u32()?;
        let kind = usize::try_from(code).ok().and_then(|code| Kind::ALL.get(code));
        kind.copied().ok_or(Shortage::Malformed("has a type that the format does not have"))
    }

    /// A value with its type before it.
    pub(super) fn value(&mut self) -> Result<Value<'a>, Shortage> {
        match self.kind()? {
            Kind::Array => self.list().map(Value::Array),
            kind => self.scalar(kind),
        }
    }

    fn scalar(&mut self, kind: Kind) -> Result<Value<'a>, Shortage> {
        let whole = |n: i128| Ok(Value::Whole(n));
        match kind {
            Kind::U8 => whole(self.array::<1>()?[0].into()),
            Kind::I8 => whole(i8::from_le_bytes(self.array()?).into()),
            Kind::U16 => whole(u16::from_le_bytes(self.array()?).into()),
            Kind::I16 => whole(i16::from_le_bytes(self.array()?).into()),
            Kind::U32 => whole(self.u32()?.into()),
            Kind::I32 => whole(i32::from_le_bytes(self.array()?).into()),
            Kind::U64 => whole(self.u64()?.into()),
            Kind::I64 => whole(i64::from_le_bytes(self.array()?).into()),
            Kind::F32 => Ok(Value::Number(decimal(f32::from_le_bytes(self.array()?)))),
            Kind::F64 => Ok(Value::Number(f64::from_le_bytes(self.array()?))),
            Kind::Text => self.text(TEXT_MAX).map(Value::Text),
            Kind::Bool => match self.array::<1>()?[0] {
                0 => Ok(Value::Truth(false)),
                1 => Ok(Value::Truth(true)),
                _ => Err(Shortage::Malformed("is a truth value other than 0 and 1")),
            },
            Kind::Array => Err(Shortage::Malformed("is an array of arrays, which means nothing")),
        }
    }

    /// An array. One within another has no meaning in any model, so depth has an end.
    fn list(&mut self) -> Result<Array<'a>, Shortage> {
        let kind = self.kind()?;
        if kind == Kind::Array {
            return Err(Shortage::Malformed("is an array of arrays, which means nothing"));
        }
        let count = self.u64()?;
        if count > self.left() / kind.least() {
            return Err(Shortage::End);
        }
        let start = self.at;
        if matches!(kind, Kind::Text | Kind::Bool) {
            for _ in 0..count {
                self.scalar(kind)?;
            }
        } else {
            self.take(count * kind.least())?;
        }
        Ok(Array { kind, count, bytes: &self.bytes[start..self.at] })
    }
}

/// The decimal number that was most likely written: the shortest that rounds to this. So `1e-6`
/// from a config is `1e-6` again and not the nearest f32, and both ways give one model.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

impl<'a> Value<'a> {
    /// A whole number that is not negative.
    pub fn whole(&self) -> Option<u64> {
        match self {
            Value::Whole(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A text.
    pub fn text(&self) -> Option<&'a str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A truth value.
    pub fn truth(&self) -> Option<bool> {
        match self {
            Value::Truth(truth) => Some(*truth),
            _ => None,
        }
    }

    /// An array.
    pub fn array(&self) -> Option<Array<'a>> {
        match self {
            Value::Array(array) => Some(*array),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    /// Elements.
    pub fn len(&self) -> usize {
        // Each takes a byte at least.
        self.count as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The elements in order.
    pub fn values(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (mut reader, kind) = (Reader::new(self.bytes), self.kind);
        // They were checked when the file was read.
        (0..self.count).map_while(move |_| reader.scalar(kind).ok())
    }

    /// The elements, where all are texts.
    pub fn texts(&self) -> Option<Vec<&'a str>> {
        self.values().map(|value| value.text()).collect()
    }
}
