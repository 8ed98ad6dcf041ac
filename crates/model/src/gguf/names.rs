//! What tensors are called in GGUF files, and where a part of the model stands in them.

use crate::spec::{Attention, Family, ModelSpec};
use crate::stored::{Encoding, Stored};
use crate::tensors::Part;

impl ModelSpec {
    /// The name of the stored tensor that holds a part, and where in it the part stands.
    pub(crate) fn gguf_stored(
        &self,
        layer: Option<usize>,
        part: Part,
        shape: &[usize],
    ) -> (String, Stored) {
        let mut stored = match self.family {
            Family::Phi3 => self.fused_rows(layer, part, shape),
            _ => Stored::whole(shape),
        };
        stored.encoding = Encoding::AsTyped;
        let spec = layer.and_then(|layer| self.layers.get(layer));
        match part {
            Part::ExpertGate(id)
            | Part::ExpertUp(id)
            | Part::ExpertDown(id)
            | Part::ExpertGateBias(id)
            | Part::ExpertUpBias(id)
            | Part::ExpertDownBias(id) => {
                let count = self.shape(layer, Part::Router).0.first().copied().unwrap_or(0);
                stored.slab = Some(id);
                stored.shape.insert(0, count);
            }
            // A vector where others have a matrix of one row.
            Part::SharedRouter => {
                stored.shape.remove(0);
            }
            Part::LatentKeyUp | Part::LatentValueUp => {
                if let Some(Attention::Latent(latent)) = spec.map(|spec| &spec.attention) {
                    let rows = shape[0] / latent.heads.max(1);
                    stored.shape = vec![latent.heads, rows, shape[1]];
                }
            }
            Part::Query | Part::QueryBias | Part::Key | Part::KeyBias if self.pairs_rows() => {
                if let Some(Attention::Grouped(grouped)) = spec.map(|spec| &spec.attention) {
                    stored.paired = Some(grouped.head_dim);
                }
            }
            _ => {}
        }
        (self.gguf_name(layer.unwrap_or(0), part), stored)
    }

    /// The architecture that the format calls llama has rotary halves stored as pairs.
    fn pairs_rows(&self) -> bool {
        matches!(self.family, Family::Llama | Family::Mistral | Family::Mixtral)
    }

    fn gguf_name(&self, layer: usize, part: Part) -> String {
        let within = match part {
            Part::Embedding => return "token_embd.weight".to_owned(),
            Part::FinalNorm => return "output_norm.weight".to_owned(),
            Part::Head => return "output.weight".to_owned(),
            Part::FeedForwardNorm if self.family == Family::GptOss => "post_attention_norm.weight",
            Part::Query | Part::Key | Part::Value if self.family == Family::Phi3 => {
                "attn_qkv.weight"
            }
            Part::Gate if self.family == Family::Phi3 => "ffn_up.weight",
            _ => within(part),
        };
        format!("blk.{layer}.{within}")
    }
}

fn within(part: Part) -> &'static str {
    match part {
        Part::Embedding | Part::FinalNorm | Part::Head => "",
        Part::AttentionNorm => "attn_norm.weight",
        Part::AttentionPostNorm => "post_attention_norm.weight",
        Part::FeedForwardNorm => "ffn_norm.weight",
        Part::FeedForwardPostNorm => "post_ffw_norm.weight",
        Part::Query => "attn_q.weight",
        Part::QueryBias => "attn_q.bias",
        Part::Key => "attn_k.weight",
        Part::KeyBias => "attn_k.bias",
        Part::Value => "attn_v.weight",
        Part::ValueBias => "attn_v.bias",
        Part::Output => "attn_output.weight",
        Part::OutputBias => "attn_output.bias",
        Part::QueryNorm => "attn_q_norm.weight",
        Part::KeyNorm => "attn_k_norm.weight",
        Part::Sinks => "attn_sinks.weight",
        Part::QueryDown => "attn_q_a.weight",
        Part::QueryDownNorm => "attn_q_a_norm.weight",
        Part::QueryUp => "attn_q_b.weight",
        Part::LatentDown => "attn_kv_a_mqa.weight",
        Part::LatentNorm => "attn_kv_a_norm.weight",
        Part::LatentUp => "attn_kv_b.weight",
        Part::LatentKeyUp => "attn_k_b.weight",
        Part::LatentValueUp => "attn_v_b.weight",
        Part::Gate => "ffn_gate.weight",
        Part::GateBias => "ffn_gate.bias",
        Part::Up => "ffn_up.weight",
        Part::UpBias => "ffn_up.bias",
        Part::Down => "ffn_down.weight",
        Part::DownBias => "ffn_down.bias",
        Part::Router => "ffn_gate_inp.weight",
        Part::RouterBias => "ffn_gate_inp.bias",
        Part::RouterCorrection => "exp_probs_b.bias",
        Part::ExpertGate(_) => "ffn_gate_exps.weight",
        Part::ExpertGateBias(_) => "ffn_gate_exps.bias",
        Part::ExpertUp(_) => "ffn_up_exps.weight",
        Part::ExpertUpBias(_) => "ffn_up_exps.bias",
        Part::ExpertDown(_) => "ffn_down_exps.weight",
        Part::ExpertDownBias(_) => "ffn_down_exps.bias",
        Part::SharedGate => "ffn_gate_shexp.weight",
        Part::SharedUp => "ffn_up_shexp.weight",
        Part::SharedDown => "ffn_down_shexp.weight",
        Part::SharedRouter => "ffn_gate_inp_shexp.weight",
    }
}
