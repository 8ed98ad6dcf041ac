//! Everything that arrives between nodes but Raft's own messages, and what the log and snapshots
//! hold: whatever the bytes are, the decoders answer, and what they take means the same when it is
//! written down again.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use model::ModelSpec;
use prost::Message;
use wire::{Generate, Order, Report, StepOrder, StepReport, pb};

fn spec() -> &'static Arc<ModelSpec> {
    static SPEC: OnceLock<Arc<ModelSpec>> = OnceLock::new();
    SPEC.get_or_init(|| {
        let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64,
            "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8,
            "num_key_value_heads": 4, "max_position_embeddings": 128, "vocab_size": 256,
            "rms_norm_eps": 1e-5, "bos_token_id": null, "eos_token_id": 0}"#;
        Arc::new(ModelSpec::from_config(config).expect("a config"))
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((&which, bytes)) = data.split_first() else { return };
    match which % 8 {
        0 => {
            if let Ok(proposal) = wire::decode_command(bytes) {
                let again = wire::decode_command(&wire::encode_command(&proposal));
                assert_eq!(again.as_ref(), Ok(&proposal));
                let _ = cluster::ClusterState::new().apply(1, proposal);
            }
        }
        1 => {
            if let Ok(state) = wire::decode_state(bytes) {
                assert_eq!(state.check_integrity(), Ok(()));
                let again = wire::decode_state(&wire::encode_state(&state));
                assert_eq!(again.as_ref(), Ok(&state));
            }
        }
        2 => take(bytes, Report::from_wire, Report::to_wire),
        3 => {
            let known = |_: &str| Some(spec().clone());
            take(bytes, |order| Order::from_wire(order, known), Order::to_wire);
        }
        4 => take(bytes, StepOrder::from_wire, StepOrder::to_wire),
        5 => take(bytes, StepReport::from_wire, StepReport::to_wire),
        6 => take(bytes, Generate::from_wire, Generate::to_wire),
        _ => {
            if let Ok(event) = pb::GenerateEvent::decode(bytes) {
                let _ = wire::event_from_wire(engine::SeqId(1), event);
            }
        }
    }
});

/// Reads a message; what is taken reads the same again. Floats may be no numbers, which equal
/// nothing: messages are compared.
fn take<W: Message + Default + PartialEq, T, E>(
    bytes: &[u8],
    from: impl Fn(W) -> Result<T, E>,
    to: impl Fn(&T) -> W,
) {
    let Ok(message) = W::decode(bytes) else { return };
    let Ok(value) = from(message) else { return };
    let first = to(&value).encode_to_vec();
    let again = W::decode(&first[..]).ok().and_then(|message| from(message).ok());
    let again = again.map(|value| to(&value).encode_to_vec());
    assert!(again.as_ref() == Some(&first), "what was taken is refused when it is sent on");
}
