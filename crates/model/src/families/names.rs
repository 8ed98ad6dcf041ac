//! What tensors are called in the checkpoints of each family.

use crate::spec::Family;
use crate::tensors::Part;

impl Family {
    /// What the stored tensor that holds a part is called in this family's checkpoints, without
    /// the suffixes of quantised forms. The layer counts for parts of a layer only.
    pub fn tensor_name(self, layer: usize, part: Part) -> String {
        match part {
            Part::Embedding => return "model.embed_tokens.weight".to_owned(),
            Part::FinalNorm => return "model.norm.weight".to_owned(),
            Part::Head => return "lm_head.weight".to_owned(),
            _ => {}
        }
        let within = self
            .fused(part)
            .or_else(|| attention(part))
            .map(str::to_owned)
            .unwrap_or_else(|| self.feed_forward(part));
        format!("model.layers.{layer}.{within}")
    }

    /// Parts that the family fuses or calls differently from all others.
    fn fused(self, part: Part) -> Option<&'static str> {
        let name = match (self, part) {
            (Family::Gemma2 | Family::Gemma3Text, Part::FeedForwardNorm) => {
                "pre_feedforward_layernorm.weight"
            }
            (Family::Phi3, Part::Query | Part::Key | Part::Value) => "self_attn.qkv_proj.weight",
            (Family::Phi3, Part::Gate | Part::Up) => "mlp.gate_up_proj.weight",
            (Family::Mixtral, Part::Router) => "block_sparse_moe.gate.weight",
            (Family::GptOss, Part::Router) => "mlp.router.weight",
            (Family::GptOss, Part::RouterBias) => "mlp.router.bias",
            (Family::GptOss, Part::ExpertGate(_) | Part::ExpertUp(_)) => "mlp.experts.gate_up_proj",
            (Family::GptOss, Part::ExpertGateBias(_) | Part::ExpertUpBias(_)) => {
                "mlp.experts.gate_up_proj_bias"
            }
            (Family::GptOss, Part::ExpertDown(_)) => "mlp.experts.down_proj",
            (Family::GptOss, Part::ExpertDownBias(_)) => "mlp.experts.down_proj_bias",
            _ => return None,
        };
        Some(name)
    }

    fn feed_forward(self, part: Part) -> String {
        let expert = |id: usize, matrix: &str| match self {
            // `w1` is the gate, `w3` up, `w2` down.
            Family::Mixtral => {
                let matrix = matrix.replace("gate_proj", "w1").replace("up_proj", "w3");
                let matrix = matrix.replace("down_proj", "w2");
                format!("block_sparse_moe.experts.{id}.{matrix}")
            }
            _ => format!("mlp.experts.{id}.{matrix}"),
        };
        let shared = |matrix: &str| match self {
            Family::Qwen2Moe => format!("mlp.shared_expert.{matrix}"),
            _ => format!("mlp.shared_experts.{matrix}"),
        };
        match part {
            Part::Gate => "mlp.gate_proj.weight".to_owned(),
            Part::GateBias => "mlp.gate_proj.bias".to_owned(),
            Part::Up => "mlp.up_proj.weight".to_owned(),
            Part::UpBias => "mlp.up_proj.bias".to_owned(),
            Part::Down => "mlp.down_proj.weight".to_owned(),
            Part::DownBias => "mlp.down_proj.bias".to_owned(),
            Part::ExpertGate(id) => expert(id, "gate_proj.weight"),
            Part::ExpertGateBias(id) => expert(id, "gate_proj.bias"),
            Part::ExpertUp(id) => expert(id, "up_proj.weight"),
            Part::ExpertUpBias(id) => expert(id, "up_proj.bias"),
            Part::ExpertDown(id) => expert(id, "down_proj.weight"),
            Part::ExpertDownBias(id) => expert(id, "down_proj.bias"),
            Part::SharedGate => shared("gate_proj.weight"),
            Part::SharedUp => shared("up_proj.weight"),
            Part::SharedDown => shared("down_proj.weight"),
            Part::SharedRouter => "mlp.shared_expert_gate.weight".to_owned(),
            Part::RouterCorrection => "mlp.gate.e_score_correction_bias".to_owned(),
            Part::RouterBias => "mlp.gate.bias".to_owned(),
            _ => "mlp.gate.weight".to_owned(),
        }
    }
}

/// Norms and attention, called the same in all families.
fn attention(part: Part) -> Option<&'static str> {
    let name = match part {
        Part::AttentionNorm => "input_layernorm.weight",
        // Families with post norms call the norm before the feed-forward network differently.
        Part::AttentionPostNorm | Part::FeedForwardNorm => "post_attention_layernorm.weight",
        Part::FeedForwardPostNorm => "post_feedforward_layernorm.weight",
        Part::Query => "self_attn.q_proj.weight",
        Part::QueryBias => "self_attn.q_proj.bias",
        Part::Key => "self_attn.k_proj.weight",
        Part::KeyBias => "self_attn.k_proj.bias",
        Part::Value => "self_attn.v_proj.weight",
        Part::ValueBias => "self_attn.v_proj.bias",
        Part::Output => "self_attn.o_proj.weight",
        Part::OutputBias => "self_attn.o_proj.bias",
        Part::QueryNorm => "self_attn.q_norm.weight",
        Part::KeyNorm => "self_attn.k_norm.weight",
        Part::Sinks => "self_attn.sinks",
        Part::QueryDown => "self_attn.q_a_proj.weight",
        Part::QueryDownNorm => "self_attn.q_a_layernorm.weight",
        Part::QueryUp => "self_attn.q_b_proj.weight",
        Part::LatentDown => "self_attn.kv_a_proj_with_mqa.weight",
        Part::LatentNorm => "self_attn.kv_a_layernorm.weight",
        Part::LatentUp | Part::LatentKeyUp | Part::LatentValueUp => "self_attn.kv_b_proj.weight",
        _ => return None,
    };
    Some(name)
}
