//! The command: roles by subcommand, configuration resolved in one place, then run.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod config;
mod coordinator;
mod demo;
mod enrol;
mod http;
mod init;
mod inspect;
mod model_dir;
mod operator;
mod process;
mod serve;
mod status;
mod swap;
mod worker;

fn main() -> std::process::ExitCode {
    let args = args::Args::from_process();
    process::log_to_stderr(&args.log);
    match run(args) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("phalanx: {}", chain(&error));
            std::process::ExitCode::FAILURE
        }
    }
}

/// An error and its causes, each said once: many repeat their cause in their own text.
fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(args: args::Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        match args.command {
            args::Command::Serve(serve) => serve::run(serve).await,
            args::Command::Init(init) => init::run(&init),
            args::Command::Token(token) => init::token(&token),
            args::Command::Operator(operator) => init::operator(&operator),
            args::Command::Coordinator(coordinator) => coordinator::run(coordinator).await,
            args::Command::Worker(worker) => worker::run(worker).await,
            args::Command::Chat(chat) => chat::run(chat).await,
            args::Command::Model(model) => match model.command {
                args::ModelCommand::Inspect(inspect) => inspect::run(&inspect),
            },
            args::Command::Status(status) => operator::status(status).await,
            args::Command::Nodes(nodes) => operator::nodes(nodes).await,
            args::Command::Groups(groups) => operator::groups(groups).await,
            args::Command::Models(models) => operator::models(models).await,
            args::Command::Members(members) => operator::members(members).await,
            args::Command::Deploy(deploy) => operator::deploy(deploy).await,
            args::Command::Undeploy(undeploy) => swap::undeploy(undeploy).await,
            args::Command::Alias(alias) => swap::alias(alias).await,
            args::Command::Swap(swap) => swap::swap(swap).await,
            args::Command::Drain(drain) => operator::drain(drain).await,
            args::Command::Certs(certs) => operator::certs(certs).await,
            args::Command::Bench(bench) => bench::run(&bench),
            args::Command::Demo(demo) => demo::run(demo).await,
        }
    });
    // A thread that waits on a terminal or on a peer must not hold up the exit.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    #[test]
    fn each_cause_is_said_once() {
        let cause = || anyhow!("the disk failed");
        let repeats = cause().context("the log: the disk failed").context("cannot start");
        assert_eq!(super::chain(&repeats), "cannot start: the log: the disk failed");
        assert_eq!(super::chain(&cause().context("the log")), "the log: the disk failed");
    }
}
