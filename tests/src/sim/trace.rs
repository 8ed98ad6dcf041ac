//! What happened, in lines: printed as it happens, or only counted.

use std::fmt::Display;
use std::io::{self, Write as _};

use super::rng::Rng;

/// Where lines go. Their digest shows that a replay replays.
#[derive(Debug, Default)]
pub struct Trace {
    print: bool,
    digest: u64,
    lines: u64,
}

impl Trace {
    /// A trace; printed to standard output if asked.
    pub fn new(print: bool) -> Self {
        Self { print, digest: 0, lines: 0 }
    }

    /// A line of time `now`, made only when somebody looks.
    pub fn line<T: Display>(&mut self, now: u64, text: impl FnOnce() -> T) {
        self.lines += 1;
        if self.print {
            // Whoever reads may have seen enough.
            let _ = writeln!(io::stdout(), "{:>10.3} ms  {}", now as f64 / 1e3, text());
        }
    }

    /// Folds something that happened into the digest.
    pub fn fold(&mut self, what: u64) {
        self.digest = Rng::new(self.digest, what).bits();
    }

    /// The digest of everything folded in.
    pub fn digest(&self) -> u64 {
        self.digest
    }
}
