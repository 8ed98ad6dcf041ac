//! One story told in commands: three workers, a loss, a return. The picture is the whole truth.

#![allow(clippy::unwrap_used)]

mod support;

use cluster::{ClusterState, Command, Epoch, GroupId, reconcile};
use planner::NodeId;
use support::{apply, deployment, node, picture};

/// Runs one line of the script and appends what it changed.
fn run(state: &mut ClusterState, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let number = |at: usize| words[at].parse::<u64>().unwrap();
    let commands = match words[0] {
        "deploy" => vec![Command::Deploy(deployment(number(1) as usize))],
        "join" => vec![Command::Join(node(number(1), 1))],
        "lost" => vec![Command::Lost { node: NodeId(number(1)) }],
        "ready" => vec![Command::RankReady {
            group: GroupId(number(1)),
            epoch: Epoch(number(2)),
            rank: number(3) as usize,
        }],
        "retire" => vec![Command::Retire {
            group: GroupId(number(1)),
            epoch: Epoch(number(2)),
            reason: "asked".to_owned(),
        }],
        "reconcile" => reconcile(state),
        other => panic!("no such command: {other}"),
    };
    let mut text = format!("> {line}\n");
    for command in commands {
        match apply(state, command) {
            Ok(events) => events.iter().for_each(|event| text += &format!("{event:?}\n")),
            Err(rejected) => text += &format!("REFUSED {rejected}\n"),
        }
    }
    text
}

fn tell(script: &str) -> String {
    let mut state = ClusterState::new();
    let mut text = String::new();
    for line in script.lines() {
        text += &match line {
            "show" => format!("{}\n", picture(&state)),
            _ => run(&mut state, line),
        };
    }
    text
}

#[test]
fn three_workers_a_loss_and_a_return() {
    let script = "join 1\ndeploy 3\njoin 1\njoin 2\nreconcile\nshow\njoin 3\njoin 3\nreconcile\n\
        reconcile\nready 1 1 0\nready 1 1 0\nready 1 2 1\nready 1 1 3\nready 1 1 1\nshow\n\
        ready 1 1 2\nready 1 1 2\nshow\nlost 2\nlost 2\nlost 9\nready 1 1 1\nreconcile\nshow\n\
        join 4\nreconcile\nready 1 1 0\nready 2 2 0\nready 2 2 1\nready 2 2 2\nretire 2 1\n\
        show\nretire 2 2\nreconcile\nshow";
    assert_eq!(tell(script), include_str!("three_workers.txt"));
}
