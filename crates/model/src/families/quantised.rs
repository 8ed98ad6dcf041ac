//! What a checkpoint is stored in, by `quantization_config`.

use serde_json::{Map, Value, json};

use super::limits;
use crate::config::{ConfigError, Fields, Given};
use crate::spec::{Format, Int4Format, Int4Packing};

/// How AWQ and GPTQ checkpoints were made, and how libraries run them. Which matrices were left as
/// they are, the checkpoint shows.
const WITHOUT_EFFECT: &[&str] = &[
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "do_fuse",
    "exllama_config",
    "fuse_max_seq_len",
    "hyb_act",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "modules_to_fuse",
    "modules_to_not_convert",
    "mse",
    "pad_token_id",
    "quantizer",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
];

/// The format; `understood` is what the family is published in besides 4-bit integers.
pub(super) fn format(
    fields: &mut Fields<'_>,
    understood: Option<Format>,
) -> Result<Format, ConfigError> {
    let Given::Value(map) = fields.object("quantization_config")? else {
        return Ok(Format::Plain);
    };
    let mut inner = Fields::new(fields.family(), "quantization_config.", map);
    let method = match (inner.text("quant_method")?.value(), understood) {
        // Its experts are one tensor; nobody publishes it so.
        (Some("awq" | "gptq"), Some(Format::Mxfp4)) => "mxfp4",
        (Some("awq"), _) => return awq(inner).map(Format::Int4),
        (Some("gptq"), _) => return gptq(inner).map(Format::Int4),
        (_, Some(Format::Fp8Blocks)) => {
            inner.only("fmt", &json!("e4m3"))?;
            inner.required("weight_block_size", &json!([128, 128]))?;
            // How activations would be quantised before products; here they never are.
            inner.only("activation_scheme", &json!("dynamic"))?;
            inner.only("scale_fmt", &json!("ue8m0"))?;
            "fp8"
        }
        (_, Some(Format::Mxfp4)) => "mxfp4",
        (method, _) => {
            let what = method.map_or(Value::Object(Map::new()), Value::from);
            let understood = "awq or gptq".to_owned();
            return Err(fields.unsupported("quantization_config", &what, understood));
        }
    };
    inner.required("quant_method", &json!(method))?;
    // Asks the library to do at load what is always done here.
    inner.only("dequantize", &json!(false))?;
    // Whatever stands in another type is taken as it is.
    inner.finish(&[&["modules_to_not_convert"]])?;
    Ok(understood.unwrap_or(Format::Plain))
}

/// Inputs that share a scale; all of them where it is -1.
fn group(inner: &mut Fields<'_>) -> Result<Option<usize>, ConfigError> {
    inner.required("bits", &json!(4))?;
    const FIELD: &str = "group_size";
    let size = inner.number(FIELD, "-1 or a multiple of 8", |size| {
        let whole = size.fract() == 0.0 && size % 8.0 == 0.0;
        size == -1.0 || (whole && size >= 8.0 && size <= limits::WIDTH as f64)
    })?;
    Ok((size > 0.0).then_some(size as usize))
}

fn awq(mut inner: Fields<'_>) -> Result<Int4Format, ConfigError> {
    let group = group(&mut inner)?;
    inner.only("zero_point", &json!(true))?;
    // The other versions pack words in other orders.
    let version = inner.text("version")?.value().unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        let understood = "gemm".to_owned();
        return Err(inner.unsupported("version", &Value::from(version), understood));
    }
    inner.finish(&[WITHOUT_EFFECT])?;
    Ok(Int4Format { packing: Int4Packing::Awq, group })
}

fn gptq(mut inner: Fields<'_>) -> Result<Int4Format, ConfigError> {
    let group = group(&mut inner)?;
    let listed = inner.flag("desc_act")?;
    let zeros_less_one = match inner.text("checkpoint_format")?.value().unwrap_or("gptq") {
        "gptq" => true,
        "gptq_v2" => false,
        other => {
            let understood = "gptq or gptq_v2".to_owned();
            return Err(inner.unsupported("checkpoint_format", &Value::from(other), understood));
        }
    };
    inner.only("is_marlin_format", &json!(false))?;
    inner.only("lm_head", &json!(false))?;
    inner.only("pack_dtype", &json!("int32"))?;
    inner.only("dynamic", &json!({}))?;
    inner.finish(&[WITHOUT_EFFECT])?;
    Ok(Int4Format { packing: Int4Packing::Gptq { zeros_less_one, listed }, group })
}
