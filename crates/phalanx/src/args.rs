//! The command line exactly as typed; nothing is read or resolved here.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};

/// Phalanx serves open-weight language models from a cluster of ordinary machines.
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, about, propagate_version = true)]
pub(crate) struct Args {
    /// What to log to standard error: error, warn, info, debug, or a filter such as `worker=debug`.
    #[arg(long, global = true, default_value = "info", env = "PHALANX_LOG", value_name = "FILTER")]
    pub(crate) log: String,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Args {
    /// Parses the process's arguments, in vLLM's spellings, too.
    pub(crate) fn from_process() -> Self {
        Self::parse_from(std::env::args_os().map(|argument| match argument.to_str() {
            Some(text) => as_typed_here(text).into(),
            None => argument,
        }))
    }
}

/// `-tp` is no option of one letter, and names of options may be joined by underscores.
fn as_typed_here(argument: &str) -> String {
    let (name, value) = match argument.split_once('=') {
        Some((name, value)) => (name, format!("={value}")),
        None => (argument, String::new()),
    };
    match name {
        "-tp" => format!("--tensor-parallel-size{value}"),
        _ if name.starts_with("--") => name.replace('_', "-") + &value,
        _ => argument.to_owned(),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model from this process alone: coordinator, gateway and worker in one.
    Serve(Serve),
    /// Run the coordinator of a cluster: its decisions and its HTTP gateway.
    Coordinator(Coordinator),
    /// Run a worker that joins a coordinator and computes its share of the model.
    Worker(Worker),
    /// Talk to a running server.
    Chat(Chat),
    /// Show nodes, groups, ranks and the plan of a running cluster.
    Status(Status),
    /// Start a small cluster on this machine, let it answer once, and leave it running.
    Demo(Demo),
}

/// How a model is served; the same for `serve` and `coordinator`.
#[derive(Debug, Clone, Group)]
pub(crate) struct Deploy {
    /// What enters products; accumulation is always f32.
    #[arg(long, value_enum, default_value_t = Compute::F32, alias = "dtype")]
    pub(crate) compute: Compute,
    /// Quantise the layers' matrices when they are loaded, to blocks of 32 with a scale each, and
    /// activations to 8 bits: q8 is `--compute int8`, q4 keeps 4 bits per weight. A weight is off
    /// by at most 0.4 % (q8) or 12.5 % (q4) of its block's largest; RMS about 0.5 % and 9 %.
    #[arg(long, value_enum, conflicts_with = "compute")]
    pub(crate) quantize: Option<Quantize>,
    /// How the experts of a layer are divided among stripes.
    #[arg(long, value_enum, default_value_t = Experts::Stripe)]
    pub(crate) experts: Experts,
    /// Name clients use for the model; may be given several times. Default: the directory's name.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub(crate) served_model_name: Vec<String>,
    /// Stripes the model is cut into. Default: 8 where the heads allow.
    #[arg(long, value_name = "S")]
    pub(crate) stripes: Option<usize>,
    /// Most tokens of prompt and answer together. Default: the model's context.
    #[arg(long, value_name = "TOKENS", alias = "context")]
    pub(crate) max_model_len: Option<usize>,
    /// Most sequences that run at the same time; more wait.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) max_num_seqs: usize,
    /// Most tokens in one forward pass.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) max_num_batched_tokens: usize,
    /// Tokens per KV block.
    #[arg(long, value_name = "TOKENS", default_value_t = 16)]
    pub(crate) block_size: usize,
    /// Tokens of KV cache each rank keeps. Default: one context, or 16,384 if that is more and
    /// sixteen contexts can use it.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) kv_tokens: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compute {
    /// f32 products: the reference.
    #[value(alias = "float32", alias = "auto")]
    F32,
    /// bf16 weights and activations.
    #[value(alias = "bfloat16")]
    Bf16,
    /// 8-bit weights and activations in blocks of 32.
    Int8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quantize {
    /// 8-bit weights.
    Q8,
    /// 4-bit weights.
    Q4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Experts {
    /// Every stripe has its columns of every expert.
    Stripe,
    /// Every stripe has a run of whole experts.
    Whole,
}

/// Where HTTP is served.
#[derive(Debug, Clone, Group)]
pub(crate) struct Http {
    /// Address to serve HTTP on.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to serve HTTP on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
}

#[derive(Debug, Group)]
pub(crate) struct Serve {
    /// Model directory (config.json, tokenizer.json, safetensors) or GGUF file.
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) http: Http,
    /// Ranks in this process.
    #[arg(long, visible_alias = "tensor-parallel-size", default_value_t = 1)]
    pub(crate) ranks: usize,
    /// Threads of each rank. Default: the cores divided by the ranks.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Bytes the model may take, such as 8GiB. Default: the memory that is free at the start.
    #[arg(long, value_name = "BYTES", value_parser = crate::config::bytes)]
    pub(crate) memory: Option<u64>,
    #[command(flatten)]
    pub(crate) deploy: Deploy,
    #[command(flatten)]
    pub(crate) parent: Parent,
}

#[derive(Debug, Group)]
pub(crate) struct Coordinator {
    /// Model directory or GGUF file; the workers hold the same.
    pub(crate) directory: PathBuf,
    #[command(flatten)]
    pub(crate) http: Http,
    /// Address that workers join at.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8100")]
    pub(crate) listen: std::net::SocketAddr,
    /// Ranks the model is spread over.
    #[arg(long, visible_alias = "tensor-parallel-size", default_value_t = 1)]
    pub(crate) ranks: usize,
    #[command(flatten)]
    pub(crate) deploy: Deploy,
    #[command(flatten)]
    pub(crate) parent: Parent,
}

#[derive(Debug, Group)]
pub(crate) struct Worker {
    /// Model directory or GGUF file, with the same content as the coordinator's.
    pub(crate) directory: PathBuf,
    /// Where the coordinator listens.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8100")]
    #[arg(value_parser = crate::config::address)]
    pub(crate) coordinator: String,
    /// Address that the other nodes reach this worker at; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub(crate) listen: std::net::SocketAddr,
    /// This worker's name in tables. Default: worker-PORT.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Ranks this worker can hold.
    #[arg(long, default_value_t = 1)]
    pub(crate) ranks: usize,
    /// Threads of each rank. Default: the cores divided by the ranks.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Bytes the model may take, such as 8GiB. Default: the memory that is free at the start.
    #[arg(long, value_name = "BYTES", value_parser = crate::config::bytes)]
    pub(crate) memory: Option<u64>,
    /// Speed relative to the other workers; stripes are given in proportion.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) weight: f64,
    /// Instruction set of the kernels: portable, avx2 or avx512. Default: the best there is.
    #[arg(long, value_name = "CLASS")]
    pub(crate) kernels: Option<String>,
    #[command(flatten)]
    pub(crate) parent: Parent,
}

/// For processes started by another `phalanx`.
#[derive(Debug, Clone, Group)]
pub(crate) struct Parent {
    /// Write one line of JSON with the addresses to standard output once they are bound, and end
    /// when standard input closes.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Chat {
    /// The server.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// The model. Default: the first one the server lists.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Say this, print the answer and exit, instead of asking line by line.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// A system message.
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Most tokens of one answer.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_tokens: u32,
    /// 0 is greedy. Default: the model's.
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Makes a sampled answer repeatable.
    #[arg(long)]
    pub(crate) seed: Option<i64>,
}

#[derive(Debug, Group)]
pub(crate) struct Status {
    /// Where the coordinator listens.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8100")]
    #[arg(value_parser = crate::config::address)]
    pub(crate) coordinator: String,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Group)]
pub(crate) struct Demo {
    /// Worker processes.
    #[arg(long, default_value_t = 3)]
    pub(crate) workers: usize,
    /// What to say to the model.
    #[arg(long, default_value = "What news of the war, my lord?", value_name = "TEXT")]
    pub(crate) prompt: String,
    /// Exit after one answer instead of serving until Ctrl-C.
    #[arg(long)]
    pub(crate) once: bool,
    /// Print one line of JSON instead of the show; implies --once.
    #[arg(long)]
    pub(crate) json: bool,
    /// Model directory. Default: models/demo of the source tree.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Port to serve HTTP on; 0 takes a free one. Default: 8000, or a free one if it is taken.
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Most tokens of the answer.
    #[arg(long, default_value_t = 160)]
    pub(crate) max_tokens: u32,
}

#[cfg(test)]
mod tests {
    use super::as_typed_here;

    #[test]
    fn other_spellings_are_understood() {
        assert_eq!(as_typed_here("-tp"), "--tensor-parallel-size");
        assert_eq!(as_typed_here("-tp=2"), "--tensor-parallel-size=2");
        assert_eq!(as_typed_here("--max_model_len=8"), "--max-model-len=8");
        assert_eq!(as_typed_here("--served_model_name"), "--served-model-name");
        assert_eq!(as_typed_here("--prompt=a_b=c_d"), "--prompt=a_b=c_d");
        assert_eq!(as_typed_here("my_model"), "my_model");
        assert_eq!(as_typed_here("--"), "--");
    }
}
