//! Stories: a world without chance trouble, told in commands, shown in pictures.
//!
//! ```text
//! add 2
//! run 500
//! ----
//! 1 leader term 2 commit 4 of 4 members 1 learning 2
//! 2 follower term 2 commit 4 of 4 members 1 learning 2
//! ```
//! A story is blocks of commands, each with the picture that they lead to. The same world as in
//! every run tells it: the production machines over a simulated disk, network and clock.

use control::replica::{Input, MemberChange};
use planner::NodeId;

use super::checks::Violation;
use super::client::Wish;
use super::cluster::ClusterWorkload;
use super::node::Waiting;
use super::plan::Plan;
use super::register::RegisterWorkload;
use super::run::picture;
use super::trace::Trace;
use super::workload::Workload;
use super::world::{Event, World};

/// A story with the pictures as they come out. One that begins with `# whole` is of the whole
/// control plane, any other of replicas alone.
///
/// # Errors
/// A violation on the way, or a line that is no command.
pub fn tell(script: &str) -> Result<String, Violation> {
    match script.starts_with("# whole") {
        true => tell_in::<ClusterWorkload>(script),
        false => tell_in::<RegisterWorkload>(script),
    }
}

fn tell_in<W: Workload>(script: &str) -> Result<String, Violation> {
    let mut world = World::<W>::new(Plan::calm(1), None, Trace::new(false))?;
    // Nodes that end stay down until the story starts them.
    world.told = true;
    let mut text = String::new();
    for block in script.trim().split("\n\n") {
        let commands = block.split("\n----").next().unwrap_or_default();
        for line in commands.lines().filter(|line| !line.starts_with('#')) {
            perform(&mut world, line)?;
        }
        text += &format!("{commands}\n----{}{}\n\n", picture(&world), W::picture(&world));
    }
    Ok(text)
}

fn perform<W: Workload>(world: &mut World<W>, line: &str) -> Result<(), Violation> {
    let words: Vec<&str> = line.split(' ').collect();
    if let Some(done) = W::perform(world, &words) {
        return done;
    }
    let number = |at: usize| {
        let word = words.get(at).and_then(|word| word.parse::<u64>().ok());
        word.ok_or_else(|| Violation(format!("{line}: a number is missing")))
    };
    match words[0] {
        "run" => {
            let until = world.now + number(1)? * 1_000;
            world.run_until(until)
        }
        "add" => {
            if !world.nodes.contains_key(&number(1)?) {
                world.add_node(number(1)?)?;
            }
            change(world, MemberChange::AddLearner(NodeId(number(1)?)))
        }
        "promote" => change(world, MemberChange::Promote(NodeId(number(1)?))),
        "remove" => change(world, MemberChange::Remove(NodeId(number(1)?))),
        "write" => write(world, number(1)?, number(2)?),
        "transfer" => {
            let leader = leader(world)?;
            world.feed(leader, Input::Transfer { to: NodeId(number(1)?) })
        }
        "crash" => {
            world.crash(number(1)?);
            Ok(())
        }
        "start" => world.restart(number(1)?),
        "cut" => {
            let (one, rest) = (number(1)?, 2..words.len());
            for at in rest {
                let other = number(at)?;
                world.network.cut(one, other);
                world.network.cut(other, one);
            }
            Ok(())
        }
        "heal" => {
            world.network.heal();
            Ok(())
        }
        "pause" => {
            let (node, rest) = (number(1)?, number(2)? * 1_000);
            world.pause(node, rest);
            Ok(())
        }
        "damage" => {
            world.damage(number(1)?);
            Ok(())
        }
        "full" => {
            world.fill(number(1)?);
            Ok(())
        }
        "room" => {
            world.schedule(world.now, Event::Repaired(number(1)?));
            Ok(())
        }
        _ => Err(Violation(format!("{line}: no such command"))),
    }
}

fn leader<W: Workload>(world: &World<W>) -> Result<u64, Violation> {
    world.leader().ok_or_else(|| Violation("nobody leads".to_owned()))
}

fn change<W: Workload>(world: &mut World<W>, change: MemberChange) -> Result<(), Violation> {
    let leader = leader(world)?;
    world.change(leader, change)
}

fn write<W: Workload>(world: &mut World<W>, key: u64, value: u64) -> Result<(), Violation> {
    let leader = leader(world)?;
    let process = world.nodes.get_mut(&leader).and_then(|node| node.process.as_mut());
    let Some(process) = process else { return Ok(()) };
    let (client, serial) = (0, process.requests + 1);
    let wish = Wish::Write { key, value: Some(value) };
    let request = process.request(Waiting::Write { client, serial, wish });
    let id = super::client::request_id(leader, world.now + serial);
    let command = W::command(id, wish);
    world.feed(leader, Input::Propose { request, command })
}
