//! How text is split before pairs are merged: the published patterns by the format's names.

/// A way of splitting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Splits {
    /// Applied one after the other, each to what the ones before left whole; none for the pattern
    /// of GPT-2, which the library has itself.
    pub(super) patterns: &'static [&'static str],
    /// Words that are in the vocabulary are taken whole.
    pub(super) whole_words: bool,
    /// Texts begin with the token for that, unless the file says otherwise.
    pub(super) begins: bool,
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Letters of alphabets with case, by code.
const CASED: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ",
    "Ḁ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u{1f7d}ᾀ-ᾴᾶ-ᾼ\u{1fbe}ῂ-ῄῆ-ῌῐ-\u{1fd3}",
    "ῖ-\u{1fdb}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u{2126}ℨ",
    "\u{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ",
    "𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
);
const EAST_ASIAN: &str = "[一-龥\u{800}-一가-\u{d7ff}]+";
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// Every name that is understood.
pub(super) const NAMES: [(&str, Splits); 14] = [
    ("gpt-2", plain(&[])),
    ("llama-bpe", LLAMA3_SPLITS),
    ("llama3", LLAMA3_SPLITS),
    ("llama-v3", LLAMA3_SPLITS),
    ("qwen2", plain(&[QWEN2])),
    ("deepseek-r1-qwen", plain(&[QWEN2])),
    (
        "deepseek-llm",
        plain(&[
            r"[\r\n]",
            CASED,
            "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+",
            r"\s+$",
            EAST_ASIAN,
            r"\p{N}+",
        ]),
    ),
    ("deepseek-coder", plain(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, r"\p{N}"])),
    ("deepseek-v3", plain(&[r"\p{N}{1,3}", "[一-龥\u{3040}-ゟ゠-ヿ]+", DEEPSEEK_V3])),
    ("gpt-4o", plain(&[O200K])),
    ("tekken", Splits { patterns: &[TEKKEN], whole_words: true, begins: true }),
    ("smollm", plain(&[r"\p{N}"])),
    ("starcoder", plain(&[r"\p{N}"])),
    ("refact", plain(&[r"\p{N}"])),
];

const LLAMA3_SPLITS: Splits = Splits { patterns: &[LLAMA3], whole_words: true, begins: true };

const fn plain(patterns: &'static [&'static str]) -> Splits {
    Splits { patterns, whole_words: false, begins: false }
}

impl Splits {
    /// GPT-2's own pattern comes last: alone, or after digits were taken one by one.
    pub(super) fn ends_as_gpt2(&self) -> bool {
        matches!(self.patterns, [] | [r"\p{N}"])
    }
}
