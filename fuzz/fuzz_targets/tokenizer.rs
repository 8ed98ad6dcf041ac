//! tokenizer.json: up to the first zero byte the file, then a text for it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: {
        // Panics of the library are caught where it is called; the hook that ends the process at
        // once would not let them be. One that is not caught still ends it.
        drop(std::panic::take_hook());
        std::panic::set_hook(Box::new(|_| ()));
    },
    |data: &[u8]| {
        let mut parts = data.splitn(2, |byte| *byte == 0);
        let json = parts.next().unwrap_or_default();
        let text = String::from_utf8_lossy(parts.next().unwrap_or_default());
        let _ = gateway::try_tokenizer(json, &[&text]);
    }
);
