//! Element types of tensors.

use std::fmt;

/// The element types that can be loaded, by their published names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names are the format's own")]
pub enum TensorType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    MXFP4,
}

/// Codes with a name and without support: the message should say which it is.
const OTHERS: [(u32, &str); 24] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (40, "NVFP4"),
];

impl TensorType {
    /// All types with their codes.
    const CODES: [(u32, TensorType); 14] = [
        (0, TensorType::F32),
        (1, TensorType::F16),
        (30, TensorType::BF16),
        (2, TensorType::Q4_0),
        (3, TensorType::Q4_1),
        (6, TensorType::Q5_0),
        (7, TensorType::Q5_1),
        (8, TensorType::Q8_0),
        (10, TensorType::Q2_K),
        (11, TensorType::Q3_K),
        (12, TensorType::Q4_K),
        (13, TensorType::Q5_K),
        (14, TensorType::Q6_K),
        (39, TensorType::MXFP4),
    ];

    /// The type of a code, or the end of a sentence that says what the code is.
    pub(super) fn from_code(code: u32) -> Result<TensorType, String> {
        if let Some((_, kind)) = Self::CODES.iter().find(|(known, _)| *known == code) {
            return Ok(*kind);
        }
        match OTHERS.iter().find(|(known, _)| *known == code) {
            Some((_, name)) => Err(format!("type {name}, which cannot be loaded")),
            None => Err(format!("type {code}, which the format does not have")),
        }
    }

    /// Elements of a block; rows are whole blocks.
    pub fn block(self) -> usize {
        match self {
            TensorType::F32 | TensorType::F16 | TensorType::BF16 => 1,
            TensorType::Q2_K
            | TensorType::Q3_K
            | TensorType::Q4_K
            | TensorType::Q5_K
            | TensorType::Q6_K => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            TensorType::F32 => 4,
            TensorType::F16 | TensorType::BF16 => 2,
            TensorType::Q4_0 => 18,
            TensorType::Q4_1 => 20,
            TensorType::Q5_0 => 22,
            TensorType::Q5_1 => 24,
            TensorType::Q8_0 => 34,
            TensorType::Q2_K => 84,
            TensorType::Q3_K => 110,
            TensorType::Q4_K => 144,
            TensorType::Q5_K => 176,
            TensorType::Q6_K => 210,
            TensorType::MXFP4 => 17,
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
