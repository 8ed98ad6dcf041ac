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
    /// Make a new cluster: its certificate authority, its first coordinator's identity and an
    /// operator's.
    Init(Init),
    /// Make a token with which another node can join.
    Token(Token),
    /// Make a credential for an operator from the authority's key: another one, or the next one
    /// before the last expires.
    Operator(OperatorCredential),
    /// Run a coordinator of a cluster: its decisions and its HTTP gateway.
    Coordinator(Coordinator),
    /// Run a worker that joins a cluster and computes its share of the model.
    Worker(Worker),
    /// Talk to a running server.
    Chat(Chat),
    /// Show a running cluster: consensus, nodes, deployments, groups and their plans.
    Status(Status),
    /// Look at a model without serving it.
    Model(Model),
    /// List nodes, or remove one.
    Nodes(Nodes),
    /// List groups with their ranks.
    Groups(Groups),
    /// List models that can be deployed.
    Models(Models),
    /// List the members of consensus, remove one, or move leadership.
    Members(Members),
    /// Serve a model that the cluster knows, or change how many replicas it has and where.
    Deploy(DeployCommand),
    /// Serve a deployment no longer.
    Undeploy(Undeploy),
    /// List names that clients use beside those of deployments, or say what one means.
    Alias(Alias),
    /// Replace what an alias means, without a failed request: load, switch, drain, free.
    Swap(Swap),
    /// Move a node's ranks elsewhere and give it no new ones.
    Drain(Drain),
    /// Replace certificates.
    Certs(Certs),
    /// Measure how fast a model runs on this machine, beside what the machine can do.
    Bench(Bench),
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

impl From<Experts> for planner::ExpertCut {
    fn from(experts: Experts) -> Self {
        match experts {
            Experts::Stripe => Self::Stripe,
            Experts::Whole => Self::Whole,
        }
    }
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
    /// How long open answers may go on once this process is told to end.
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) grace: std::time::Duration,
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

/// A new cluster.
#[derive(Debug, Group)]
pub(crate) struct Init {
    /// Data directory of the first coordinator; created, and readable by its owner only.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// Name of the operator whose credential is made.
    #[arg(long, default_value = "admin", value_name = "NAME")]
    pub(crate) operator: String,
}

/// An operator's credential, made from the authority's key; no coordinator need run.
#[derive(Debug, Group)]
pub(crate) struct OperatorCredential {
    /// Data directory of a coordinator.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// Name of the operator, for the record of what was done.
    #[arg(long, default_value = "admin", value_name = "NAME")]
    pub(crate) name: String,
    /// File to write, readable by its owner only; one that is there is replaced.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// How long it is good for.
    #[arg(long, default_value = "90d", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) ttl: std::time::Duration,
}

/// A join token, made from the authority's key; no coordinator need run.
#[derive(Debug, Group)]
pub(crate) struct Token {
    /// Data directory of a coordinator.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// What the node will be.
    #[arg(long, value_enum)]
    pub(crate) role: NodeRole,
    /// How many nodes may join with it.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) uses: u32,
    /// How long it is valid: 30m, 24h, 7d.
    #[arg(long, default_value = "24h", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) ttl: std::time::Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NodeRole {
    /// Computes.
    Worker,
    /// Decides and serves the API.
    Coordinator,
}

/// How a node gets its identity the first time.
#[derive(Debug, Clone, Group)]
pub(crate) struct Join {
    /// Data directory: this node's identity, and a coordinator's log.
    #[arg(long, value_name = "DIR", env = "PHALANX_DATA")]
    pub(crate) data: PathBuf,
    /// Join token; needed once, until the data directory holds an identity.
    #[arg(long, value_name = "TOKEN", env = "PHALANX_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// File that holds the join token.
    #[arg(long, value_name = "FILE", conflicts_with = "token", env = "PHALANX_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Host name or address at which other nodes reach this one. Default: that of --listen.
    #[arg(long, value_name = "HOST", env = "PHALANX_ADVERTISE")]
    pub(crate) advertise: Option<String>,
}

/// How patient the control plane is.
#[derive(Debug, Clone, Group)]
pub(crate) struct Patience {
    /// Between two heartbeats of a worker.
    #[arg(long, default_value = "100ms", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) heartbeat: std::time::Duration,
    /// Silence after which a worker is suspect.
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) suspicion: std::time::Duration,
    /// Silence after which a worker is lost and lets go of its ranks by itself.
    #[arg(long, default_value = "3s", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) lease: std::time::Duration,
    /// Tick of consensus: 15 to 30 of them without a leader start an election.
    #[arg(long, default_value = "20ms", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) tick: std::time::Duration,
}

#[derive(Debug, Group)]
pub(crate) struct Coordinator {
    /// Model directories or GGUF files whose deployments this coordinator's gateway serves; workers
    /// hold them, too. The first is meant by the options below and where a request names none.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) directories: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) http: Http,
    /// Address that other nodes and operators reach this coordinator at.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8100")]
    pub(crate) listen: std::net::SocketAddr,
    #[command(flatten)]
    pub(crate) identity: Join,
    /// Coordinators of the cluster to join; the first one of a cluster has none.
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    #[arg(value_parser = crate::config::address)]
    pub(crate) join: Vec<String>,
    /// Name in tables. Default: coordinator-PORT.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Deploy the first model on so many ranks, unless it is deployed already; also when it was
    /// undeployed before this start. Without it nothing is deployed; see `phalanx deploy`.
    #[arg(long, visible_alias = "tensor-parallel-size")]
    pub(crate) ranks: Option<usize>,
    #[command(flatten)]
    pub(crate) deploy: Deploy,
    #[command(flatten)]
    pub(crate) patience: Patience,
    #[command(flatten)]
    pub(crate) parent: Parent,
}

#[derive(Debug, Group)]
pub(crate) struct Worker {
    /// Model directories or GGUF files, with the same content as the coordinators'. A rank is of
    /// one of them at a time.
    #[arg(required = true, value_name = "DIR")]
    pub(crate) directories: Vec<PathBuf>,
    /// Coordinators; one that answers is enough, the others are found through it.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8100", value_delimiter = ',')]
    #[arg(value_parser = crate::config::address, env = "PHALANX_COORDINATORS")]
    pub(crate) coordinator: Vec<String>,
    /// Address that the other nodes reach this worker at; port 0 takes a free one.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub(crate) listen: std::net::SocketAddr,
    #[command(flatten)]
    pub(crate) identity: Join,
    /// This worker's name in tables. Default: worker-PORT.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Ranks this worker can hold.
    #[arg(long, default_value_t = 1)]
    pub(crate) ranks: usize,
    /// First port of the tensor plane, one per rank. Default: free ones.
    #[arg(long, value_name = "PORT")]
    pub(crate) tensor_port: Option<u16>,
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

/// How an operator reaches a cluster.
#[derive(Debug, Clone, Group)]
pub(crate) struct Reach {
    /// Coordinators; one that answers is enough.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8100", value_delimiter = ',')]
    #[arg(value_parser = crate::config::address, env = "PHALANX_COORDINATORS", global = true)]
    pub(crate) coordinator: Vec<String>,
    /// The operator's credential, as `phalanx init` made it.
    #[arg(long, value_name = "FILE", env = "PHALANX_IDENTITY", default_value = "operator.pem")]
    #[arg(global = true)]
    pub(crate) identity: PathBuf,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Table, global = true)]
    pub(crate) output: Output,
}

#[derive(Debug, Group)]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) reach: Reach,
    /// What the coordinator that answers knows, without asking a majority.
    #[arg(long)]
    pub(crate) local: bool,
    /// Print again after every change, until interrupted.
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Group)]
pub(crate) struct Nodes {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(subcommand)]
    pub(crate) action: Option<NodesAction>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NodesAction {
    /// Take a node out for ever; its certificate is refused from then on.
    Remove {
        /// Number or name.
        node: String,
    },
}

#[derive(Debug, Group)]
pub(crate) struct Groups {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Models {
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Members {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(subcommand)]
    pub(crate) action: Option<MembersAction>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MembersAction {
    /// Take a coordinator out for ever; its certificate is refused from then on.
    Remove {
        /// Number or name.
        node: String,
    },
    /// Move leadership to another coordinator.
    Transfer {
        /// Number or name. Default: whichever is fit.
        node: Option<String>,
    },
}

#[derive(Debug, Group)]
pub(crate) struct DeployCommand {
    /// Name that requests ask for.
    pub(crate) name: String,
    /// The model: its name or the first digits of its digest, as `phalanx models` lists them.
    /// Default: the one of that name.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Ranks of each replica. Default: 1, or as it is deployed.
    #[arg(long, visible_alias = "tensor-parallel-size")]
    pub(crate) ranks: Option<usize>,
    /// Groups that serve it, each with a copy of the weights. Default: 1, or as it is deployed.
    #[arg(long, value_name = "N")]
    pub(crate) replicas: Option<usize>,
    /// Nodes that may hold its ranks, by number or name. Default: every node.
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub(crate) nodes: Vec<String>,
    #[command(flatten)]
    pub(crate) options: Deploy,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Undeploy {
    /// The deployment.
    pub(crate) name: String,
    /// Let what runs come to its end first: at once no new request goes there.
    #[arg(long)]
    pub(crate) drain: bool,
    /// How long that may take; what still runs then ends with an error.
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = crate::config::time)]
    #[arg(requires = "drain")]
    pub(crate) timeout: std::time::Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Alias {
    /// The name that clients use.
    pub(crate) name: Option<String>,
    /// The deployment that it means from now on. What runs stays where it is.
    #[arg(long, value_name = "DEPLOYMENT", requires = "name")]
    pub(crate) to: Option<String>,
    /// It means nothing any more.
    #[arg(long, requires = "name", conflicts_with = "to")]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

/// The steps: is there room for the new deployment beside the old one, else nothing is changed;
/// deploy it; wait until it serves; switch the alias; drain the old one; undeploy it. Run again
/// after an interruption it goes on where it was.
#[derive(Debug, Group)]
pub(crate) struct Swap {
    /// The name that clients use, as `phalanx alias` made it.
    pub(crate) alias: String,
    /// The deployment that it shall mean. Where there is none of that name it is made: with the
    /// options of the one that the alias means now.
    #[arg(long, value_name = "DEPLOYMENT")]
    pub(crate) to: String,
    /// The new deployment's model: its name or the first digits of its digest, as `phalanx models`
    /// lists them. Default: the one of the deployment's name.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Ranks of each replica, if others than now. For other options use `phalanx deploy` first.
    #[arg(long, visible_alias = "tensor-parallel-size")]
    pub(crate) ranks: Option<usize>,
    /// Groups that serve it, if others than now.
    #[arg(long, value_name = "N")]
    pub(crate) replicas: Option<usize>,
    /// Nodes that may hold its ranks, by number or name, if others than now.
    #[arg(long, value_name = "NODE", value_delimiter = ',')]
    pub(crate) nodes: Vec<String>,
    /// How long the new one may take to load, and then the old one to come to rest.
    #[arg(long, default_value = "10m", value_name = "TIME", value_parser = crate::config::time)]
    pub(crate) timeout: std::time::Duration,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Drain {
    /// Number or name of the node.
    pub(crate) node: String,
    /// Let it hold ranks again.
    #[arg(long)]
    pub(crate) undo: bool,
    #[command(flatten)]
    pub(crate) reach: Reach,
}

#[derive(Debug, Group)]
pub(crate) struct Certs {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(subcommand)]
    pub(crate) action: CertsAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertsAction {
    /// Every node gets a new key and certificate; connections stay.
    Rotate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Group)]
pub(crate) struct Model {
    #[command(subcommand)]
    pub(crate) command: ModelCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Show what a model is, what it weighs, and what it takes to serve it.
    Inspect(Inspect),
}

#[derive(Debug, Group)]
pub(crate) struct Inspect {
    /// Model directory, its config.json alone, or a GGUF file. No weights are read.
    pub(crate) model: PathBuf,
    /// Nodes to serve it on, such as 2x8xH200 (nodes, devices each, which), 4x64GiB or
    /// 2x80GiB,1x8xL40S.
    #[arg(long, value_name = "NODES", value_parser = crate::inspect::nodes)]
    pub(crate) nodes: Option<crate::inspect::Nodes>,
    /// Ranks to spread it over. Default: every device, as far as the model can be cut.
    #[arg(long, visible_alias = "tensor-parallel-size", value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// Stripes the model is cut into. Default: 8, or as many as there are ranks.
    #[arg(long, value_name = "S")]
    pub(crate) stripes: Option<usize>,
    /// How the experts of a layer are divided among stripes.
    #[arg(long, value_enum, default_value_t = Experts::Stripe)]
    pub(crate) experts: Experts,
    /// Tokens of KV cache each rank keeps. Default: as `serve` would.
    #[arg(long, value_name = "TOKENS")]
    pub(crate) kv_tokens: Option<usize>,
    /// Predict what steps on those nodes take. Nothing is measured.
    #[arg(long, requires = "nodes")]
    pub(crate) predict: bool,
    /// Rates of devices to predict with (JSON, see docs/prediction.md). Default: those built in.
    #[arg(long, value_name = "FILE", requires = "predict")]
    pub(crate) calibration: Option<PathBuf>,
    /// Sequences that are decoded at once. Default: 1,8,32,64.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "predict")]
    pub(crate) batch: Vec<usize>,
    /// Tokens of each sequence, and of the prompt. Default: 1,024.
    #[arg(long, value_name = "TOKENS", requires = "predict")]
    pub(crate) at: Option<usize>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

#[derive(Debug, Group)]
pub(crate) struct Bench {
    /// Model directory or GGUF file.
    pub(crate) model: PathBuf,
    /// What the weights are kept in.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kept::ALL)]
    pub(crate) compute: Vec<Kept>,
    /// Ranks, as threads of this process.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1])]
    pub(crate) ranks: Vec<usize>,
    /// Threads of each rank. Default: the cores divided by the ranks.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Tokens of the prompts that are run in one step; 0 leaves them out.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_values_t = [512])]
    pub(crate) prefill: Vec<usize>,
    /// Sequences that decode together; 0 leaves them out.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8, 32])]
    pub(crate) decode: Vec<usize>,
    /// Tokens that each of them has before.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) context: usize,
    /// Also one sequence after so many tokens.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',')]
    pub(crate) depth: Vec<usize>,
    /// Steps of a run of decoding.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) steps: usize,
    /// Runs of each case; the median counts.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) repeat: usize,
    /// Instruction set of the kernels: portable, avx2 or avx512. Default: the best there is.
    #[arg(long, value_name = "CLASS")]
    pub(crate) kernels: Option<String>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// What weights can be kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kept {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// 8 bits.
    #[value(alias = "int8")]
    Q8,
    /// 4 bits.
    #[value(alias = "int4")]
    Q4,
}

impl Kept {
    /// Every one.
    const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Q8, Self::Q4];
}

#[derive(Debug, Group)]
pub(crate) struct Demo {
    /// Worker processes.
    #[arg(long, default_value_t = 3)]
    pub(crate) workers: usize,
    /// What to say to the model. With --chaos something longer by default, for all of it has to be
    /// computed again.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
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
    /// Ask twice, kill the group's leader with `kill -9` in the middle of the second answer, and
    /// compare; exit with status 1 if a byte differs or the client sees an error.
    #[arg(long)]
    pub(crate) chaos: bool,
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
