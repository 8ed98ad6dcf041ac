//! Stories told in commands. Each file is a list of blocks: commands, `----`, and what they
//! changed; a `show` paints the whole state.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use cluster::{
    ClusterState, Command, Coordinator, Epoch, GroupId, Observation, Proposal, RequestId, Role,
    reconcile,
};
use planner::NodeId;
use support::{apply, deployment, enrol, model, node, picture, plan_on, restarted};

/// The words of a line after its verb.
struct Words<'a>(Vec<&'a str>);

impl Words<'_> {
    fn number(&self, at: usize) -> u64 {
        self.0[at].parse().unwrap()
    }

    fn or(&self, at: usize, default: u64) -> u64 {
        self.0.get(at).map_or(default, |word| word.parse().unwrap())
    }

    fn node(&self) -> NodeId {
        NodeId(self.number(0))
    }

    fn group(&self) -> (GroupId, Epoch) {
        (GroupId(self.number(0)), Epoch(self.number(1)))
    }

    /// Numbers from the word `at` on.
    fn rest(&self, at: usize) -> Vec<u64> {
        self.0.iter().skip(at).map(|word| word.parse().unwrap()).collect()
    }
}

fn node_command(verb: &str, words: &Words<'_>) -> Option<Command> {
    let process = || (words.node(), words.or(1, 1));
    Some(match verb {
        "found" => Command::Found { name: words.0[0].to_owned() },
        // enrol NAME TOKEN USES [coordinator]
        "enrol" => {
            let role = words.0.get(3).map_or(Role::Worker, |_| Role::Coordinator);
            enrol(words.number(1) as u8, words.number(2) as u32, role, words.0[0])
        }
        // join NODE NUMBER [BOOT]: the worker of that number comes as that node
        "join" => {
            let info = restarted(words.number(1), words.or(2, 1));
            Command::Join { node: words.node(), info }
        }
        "suspect" => {
            let (node, incarnation) = process();
            Command::Suspect { node, incarnation }
        }
        "recover" => {
            let (node, incarnation) = process();
            Command::Recover { node, incarnation }
        }
        "lost" => {
            let (node, incarnation) = process();
            Command::Lost { node, incarnation }
        }
        "drain" => Command::Drain { node: words.node() },
        "undrain" => Command::Undrain { node: words.node() },
        "leave" => Command::Leave { node: words.node() },
        "reached" => {
            let host = words.0[1];
            let cluster_address = format!("{host}:8100");
            let http_address = format!("{host}:8000");
            let model_digests = BTreeSet::new();
            let at = Coordinator { cluster_address, http_address, model_digests };
            Command::SetCoordinator { node: words.node(), at }
        }
        "rotate" => Command::RotateCertificates,
        _ => return None,
    })
}

fn wish_command(verb: &str, words: &Words<'_>) -> Option<Command> {
    Some(match verb {
        "register" => Command::RegisterModel(model()),
        "forget" => Command::ForgetModel { digest: words.0[0].to_owned() },
        // deploy NAME RANKS [REPLICAS [NODE..]]
        "deploy" => {
            let nodes: BTreeSet<NodeId> = words.rest(3).into_iter().map(NodeId).collect();
            let (name, replicas) = (words.0[0].to_owned(), words.or(2, 1) as usize);
            let ranks = words.number(1) as usize;
            Command::Deploy(cluster::Deployment { name, replicas, nodes, ..deployment(ranks) })
        }
        "undeploy" => Command::Undeploy { name: words.0[0].to_owned() },
        "quiet" => Command::DrainDeployment { name: words.0[0].to_owned() },
        "point" => {
            let (alias, deployment) = (words.0[0].to_owned(), words.0[1].to_owned());
            Command::Point { alias, deployment }
        }
        "unpoint" => Command::Unpoint { alias: words.0[0].to_owned() },
        _ => return None,
    })
}

fn group_command(verb: &str, words: &Words<'_>) -> Option<Command> {
    let (reason, pair) = ("asked".to_owned(), || words.group());
    Some(match verb {
        // place GROUP EPOCH NODE..
        "place" => {
            let (group, epoch) = pair();
            let plan = plan_on(&words.rest(2));
            Command::Place { group, deployment: "tiny".to_owned(), epoch, plan }
        }
        "loading" => {
            let (group, epoch) = pair();
            Command::Loading { group, epoch }
        }
        "ready" => {
            let (group, epoch) = pair();
            Command::RankReady { group, epoch, rank: words.number(2) as usize }
        }
        "fence" => {
            let (group, epoch) = pair();
            Command::Fence { group, epoch, reason }
        }
        "retire" => {
            let (group, epoch) = pair();
            Command::Retire { group, epoch, reason }
        }
        _ => return None,
    })
}

/// What a line proposes: `as REQUEST COMMAND..`, `reconcile [paused GROUP..]`, or a command.
fn proposals(state: &ClusterState, line: &str) -> Vec<Proposal> {
    let mut words: Vec<&str> = line.split(' ').collect();
    let mut request = None;
    if words[0] == "as" {
        request = Some(RequestId([words[1].parse().unwrap(); 16]));
        words.drain(..2);
    }
    let verb = words.remove(0);
    let words = Words(words);
    if verb == "reconcile" {
        let paused = words.rest(1).into_iter().map(GroupId).collect();
        let commands = reconcile(state, &Observation { paused, ..Observation::default() });
        return commands.into_iter().map(Proposal::from).collect();
    }
    let command = node_command(verb, &words)
        .or_else(|| wish_command(verb, &words))
        .or_else(|| group_command(verb, &words))
        .unwrap_or_else(|| panic!("no such command: {line}"));
    vec![Proposal { request, command }]
}

/// Runs the commands of a file; the file as it should be.
fn tell(file: &str) -> String {
    let mut state = ClusterState::new();
    let mut text = String::new();
    for block in file.split("\n\n").map(str::trim) {
        let script = block.split("----").next().unwrap_or_default().trim();
        text += &format!("{script}\n----\n");
        for line in script.lines().filter(|line| !line.starts_with('#')) {
            if line == "show" {
                text += &picture(&state);
                continue;
            }
            for proposal in proposals(&state, line) {
                match apply(&mut state, proposal) {
                    Ok(events) => events.iter().for_each(|event| text += &format!("{event:?}\n")),
                    Err(rejected) => text += &format!("REFUSED {rejected}\n"),
                }
            }
        }
        text += "\n";
    }
    text.trim_end().to_owned() + "\n"
}

macro_rules! story {
    ($name:ident) => {
        #[test]
        fn $name() {
            let file = include_str!(concat!(stringify!($name), ".txt"));
            let told = tell(file);
            assert!(told == file, "this is the story now:\n{told}");
        }
    };
}

story!(three_workers);
story!(repair);
story!(narrow);
story!(drain);
story!(deployments);
story!(membership);
story!(requests);
story!(aliases);

#[test]
fn a_node_of_the_script_is_the_worker_of_its_number() {
    assert_eq!(restarted(3, 1), node(3, 1));
}
