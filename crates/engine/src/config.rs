//! The scheduler's limits, checked once when it is made.

/// A scheduler's limits. All counts; nothing here depends on the model but `context` and `vocab`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Positions per KV block.
    pub block_tokens: usize,
    /// KV blocks that exist.
    pub blocks: usize,
    /// Most tokens of a sequence, prompt and answer together.
    pub context: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// Most sequences that run (hold blocks) at a time.
    pub max_sequences: usize,
    /// Most tokens of a step, over all its entries.
    pub step_tokens: usize,
    /// Most tokens of one entry: a longer prompt is prefilled in chunks of this.
    pub chunk_tokens: usize,
    /// Most requests that wait; a further one is refused.
    pub waiting_max: usize,
}

/// Why a configuration is refused: a sentence per rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit is zero.
    #[error("{field} must be at least 1")]
    Zero {
        /// The field.
        field: &'static str,
    },
    /// A limit does not fit the type of the ids it bounds.
    #[error("{field} must be at most 4294967295, not {value}")]
    TooMany {
        /// The field.
        field: &'static str,
        /// Its value.
        value: usize,
    },
    /// Running sequences could not all decode in one step, so some would starve.
    #[error("step_tokens ({step_tokens}) must be at least max_sequences ({max_sequences})")]
    StepTooSmall {
        /// Tokens per step.
        step_tokens: usize,
        /// Running sequences.
        max_sequences: usize,
    },
}

impl EngineConfig {
    /// Checks every rule; the first broken one is the error.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let limits = [
            ("block_tokens", self.block_tokens),
            ("blocks", self.blocks),
            ("context", self.context),
            ("vocab", self.vocab),
            ("max_sequences", self.max_sequences),
            ("step_tokens", self.step_tokens),
            ("chunk_tokens", self.chunk_tokens),
            ("waiting_max", self.waiting_max),
        ];
        if let Some(&(field, _)) = limits.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero { field });
        }
        for (field, value) in [("blocks", self.blocks), ("vocab", self.vocab)] {
            if u32::try_from(value).is_err() {
                return Err(ConfigError::TooMany { field, value });
            }
        }
        if self.step_tokens < self.max_sequences {
            return Err(ConfigError::StepTooSmall {
                step_tokens: self.step_tokens,
                max_sequences: self.max_sequences,
            });
        }
        Ok(())
    }

    /// Blocks that hold `positions` positions.
    pub(crate) fn blocks_for(&self, positions: usize) -> usize {
        positions.div_ceil(self.block_tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> EngineConfig {
        EngineConfig {
            block_tokens: 4,
            blocks: 8,
            context: 32,
            vocab: 100,
            max_sequences: 4,
            step_tokens: 16,
            chunk_tokens: 8,
            waiting_max: 10,
        }
    }

    #[test]
    fn each_rule_has_its_sentence() {
        assert_eq!(config().validate(), Ok(()));
        let zero = EngineConfig { chunk_tokens: 0, ..config() }.validate().unwrap_err();
        assert_eq!(zero.to_string(), "chunk_tokens must be at least 1");
        let many = EngineConfig { blocks: 1 << 32, ..config() }.validate().unwrap_err();
        assert_eq!(many.to_string(), "blocks must be at most 4294967295, not 4294967296");
        let small = EngineConfig { step_tokens: 3, ..config() }.validate().unwrap_err();
        assert_eq!(small.to_string(), "step_tokens (3) must be at least max_sequences (4)");
    }

    #[test]
    fn blocks_are_rounded_up() {
        let needed: Vec<usize> = [0, 1, 4, 5, 8].map(|n| config().blocks_for(n)).to_vec();
        assert_eq!(needed, [0, 1, 1, 2, 2]);
    }
}
