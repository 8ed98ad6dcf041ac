//! Certificates that are replaced while answers stream, and a node that is shut out.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::control_plane::{Fleet, Load};
use crate::harness::{Ground, Http, PATIENCE, Process, demo_model, operate, output, phalanx};
use crate::network::skipped;
use crate::ports::{Answer, connections, has_openssl, hello, shown};

/// How long a connection between nodes is left alone after a rotation before it is looked for.
const PAUSE: Duration = Duration::from_secs(1);

/// The data directories of a fleet of three coordinators and two workers.
const NODES: [&str; 5] =
    ["coordinator-1", "coordinator-2", "coordinator-3", "worker-1", "worker-2"];

/// The certificate of each node, and the generation it says that is of.
fn certificates(fleet: &Fleet) -> Vec<(String, u64)> {
    let read = |node: &str, file: &str| std::fs::read_to_string(fleet.ground.data(node) + file);
    let of = |node: &&str| {
        let generation = read(node, "/generation").ok();
        let generation = generation.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        (read(node, "/node.pem").expect("a certificate"), generation)
    };
    NODES.iter().map(of).collect()
}

/// Every process of the fleet, in the order of [`NODES`].
fn processes(fleet: &Fleet) -> Vec<&Process> {
    fleet.coordinators.iter().map(|(_, one)| one).chain(&fleet.workers).collect()
}

/// Rotates, and waits until every node has and shows a certificate of that generation.
fn rotate(fleet: &Fleet, generation: u64) {
    let before = certificates(fleet);
    let open = |fleet: &Fleet| -> BTreeSet<_> {
        processes(fleet).iter().flat_map(|one| connections(one)).collect()
    };
    let old = open(fleet);
    let began = Instant::now();
    assert!(fleet.change(&["certs", "rotate"]));
    let after = loop {
        let after = certificates(fleet);
        if after.iter().all(|(_, now)| *now == generation) {
            break after;
        }
        assert!(began.elapsed() < PATIENCE, "not every node follows generation {generation}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let took = began.elapsed();
    for (node, (old, new)) in NODES.iter().zip(before.iter().zip(&after)) {
        assert_ne!(old.0, new.0, "{node} kept its certificate");
    }
    for ((node, process), (certificate, _)) in NODES.iter().zip(processes(fleet)).zip(&after) {
        // The file is written a moment before the new certificate is shown.
        let mut tries = (0..50).map(|_| std::thread::sleep(Duration::from_millis(20)));
        let same = tries.any(|()| shown(&process.cluster()).trim() == certificate.trim());
        assert!(same, "{node} does not show its new certificate");
    }
    std::thread::sleep(PAUSE);
    let kept = open(fleet);
    let lost: Vec<_> = old.difference(&kept).collect();
    println!(
        "generation {generation}: on every disk after {took:?}; {} of {} connections between \
         nodes stayed",
        old.len() - lost.len(),
        old.len()
    );
    assert!(lost.is_empty(), "connections that a rotation ended: {lost:?}");
}

#[test]
fn certificates_are_replaced_twice_without_a_failed_request() {
    let test = "certificates_are_replaced_twice_without_a_failed_request";
    if !has_openssl() {
        return skipped(test, "there is no openssl");
    }
    let mut fleet = Fleet::start(3, 2, 2);
    let gateways: Vec<Http> = fleet.coordinators.iter().map(|(_, one)| one.http()).collect();
    let load = Load::start(&gateways, 6);
    std::thread::sleep(Duration::from_millis(500));
    rotate(&fleet, 1);
    rotate(&fleet, 2);
    println!("{} streams ended whole while certificates were replaced", load.end());
    assert_eq!(fleet.status()["certificate_generation"], 2);

    // A node that was removed is shut out, whatever its certificate says of itself.
    let coordinators = fleet.addresses();
    let colleague = fleet.workers[0].cluster();
    let ports: Vec<&str> = coordinators.split(',').chain([colleague.as_str()]).collect();
    let enters = |fleet: &Fleet, address: &str, node: &str| {
        let data = fleet.ground.data(node);
        let identity = [format!("{data}/node.pem"), format!("{data}/node-key.pem")];
        hello(address, Some((&identity[0], &identity[1]))) == Answer::Spoke
    };
    for address in &ports {
        assert!(enters(&fleet, address, "worker-1"), "{address} refuses worker-1");
        assert!(enters(&fleet, address, "worker-2"), "{address} refuses worker-2");
    }
    assert!(fleet.change(&["nodes", "remove", "worker-2"]));
    for address in &ports {
        let until = Instant::now() + PATIENCE;
        while enters(&fleet, address, "worker-2") {
            assert!(Instant::now() < until, "{address} still admits a node that was removed");
            std::thread::sleep(Duration::from_millis(100));
        }
        assert!(enters(&fleet, address, "worker-1"), "{address} refuses worker-1");
    }
    // Its process starts again with the identity it has, is told, and ends.
    fleet.workers.pop().expect("two workers").kill();
    let model = demo_model();
    let mut again = phalanx();
    again.arg("worker").arg(&model).args(["--coordinator", &coordinators, "--name", "worker-2"]);
    let ended = output(again.args(["--data", &fleet.ground.data("worker-2")]));
    let errors = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success());
    assert!(errors.contains("this node was removed from the cluster"), "{errors}");
    let status = fleet.status();
    let mut nodes = status["nodes"].as_array().expect("nodes").iter();
    assert!(
        nodes.all(|node| node["name"] != "worker-2" || node["state"] == "left"),
        "a node that was removed is back: {status}"
    );
}

/// Who was away for too long: an operator gets another credential, a coordinator signs its own.
#[test]
fn credentials_that_expired_are_replaced_without_a_new_cluster() {
    let ground = Ground::new();
    let data = ground.data("coordinator-1");
    let now = std::time::SystemTime::now();
    let ca = identity::ClusterCa::load(data.as_ref()).expect("the authority");
    let short = ca.node(1, identity::Role::Coordinator, Duration::from_secs(1), now);
    short.and_then(|short| short.save(data.as_ref())).expect("a credential that is soon over");
    let brief = ground.data("brief.pem");
    let made = |out: &str, options: &[&str]| {
        let mut command = phalanx();
        let made = output(command.args(["operator", "--data", &data, "--out", out]).args(options));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    made(&brief, &["--ttl", "1s", "--name", "eve"]);
    std::thread::sleep(Duration::from_millis(2_500));
    let founder = ground.founder(&demo_model(), "127.0.0.1:0", &[]);
    let refused = operate(&brief, &founder.cluster(), &["nodes"]);
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && errors.contains("expired"), "{errors}");
    made(&brief, &["--name", "eve"]);
    let shown = operate(&brief, &founder.cluster(), &["nodes"]);
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
}
