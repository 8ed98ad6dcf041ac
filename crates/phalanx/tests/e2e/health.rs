//! What health says of a cluster in which something stands still, over HTTP and over gRPC.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use identity::{ClusterCa, Credential, Expect, NODE_LIFE, Role, Tls};
use serde_json::Value;
use wire::transport::{self, HealthCheckRequest, health_client};

use crate::harness::{Cluster, Ground, Http, PATIENCE, demo_model};
use crate::survive::{Ward, signal};

/// By rank of the group that serves: its node.
fn nodes(status: &Value) -> Vec<u64> {
    let groups = status["groups"].as_array().into_iter().flatten();
    let serving = groups.filter(|group| group["phase"] == "serving");
    let ranks = serving.flat_map(|group| group["ranks"].as_array().into_iter().flatten());
    ranks.filter_map(|rank| rank["node"].as_u64()).collect()
}

/// The worker, by its place, that a node is.
fn worker(status: &Value, node: u64) -> usize {
    let mut nodes = status["nodes"].as_array().into_iter().flatten();
    let name = nodes.find(|one| one["node"] == node).and_then(|one| one["name"].as_str());
    let number = name.and_then(|name| name.strip_prefix("worker-")).expect("a worker's name");
    number.parse::<usize>().expect("a number") - 1
}

#[test]
fn whichever_rank_stands_still_is_named_by_rank_and_node() {
    let ward = Ward::start(3, 0);
    let http = ward.http();
    for rank in 0..3 {
        ward.whole();
        http.ready();
        let status = ward.status();
        let node = nodes(&status)[rank];
        let victim = ward.workers[worker(&status, node)].as_ref().expect("a worker");
        let named = format!("rank {rank} on node {node}");
        let began = Instant::now();
        signal(victim, "-STOP");
        let mut said = String::new();
        http.wait("to name what stands still", || {
            let (status, text) = http.get("/readyz");
            said = text;
            status == 503 && said.contains(&named)
        });
        println!("{named} stopped: named after {:?}: {said}", began.elapsed());
        assert_eq!(http.get("/livez").0, 200, "starting the gateway again would not help");
        // The others go on without it.
        http.ready();
        println!("served again after {:?}", began.elapsed());
        signal(victim, "-CONT");
    }
}

#[test]
fn startup_says_how_far_each_rank_has_loaded() {
    let (ground, model) = (Ground::new(), demo_model());
    let coordinator = ground.founder(&model, "127.0.0.1:0", &["--ranks", "2"]);
    let (http, at) = (coordinator.http(), coordinator.cluster());
    let (status, text) = http.get("/startupz");
    assert_eq!(status, 503, "{text}");
    let _one = ground.worker(&model, "worker-1", &at, &[]);
    http.wait("to have one", || http.get("/startupz").1.contains("1 of 2 ranks have joined"));
    let _two = ground.worker(&model, "worker-2", &at, &[]);
    let told = starting(&http);
    let of = |rank: usize| {
        let loaded = |text: &&String| {
            let after = text.split(&format!("rank {rank} on node ")).nth(1);
            after.is_some_and(|rest| rest.split(';').next().is_some_and(|one| one.contains(" %")))
        };
        told.iter().find(loaded).cloned()
    };
    println!("{:?}", [of(0), of(1)]);
    assert!(of(0).is_some() && of(1).is_some(), "no per cent of a rank: {told:?}");
    assert_eq!(http.get("/livez").0, 200);
}

/// What start-up says until it is over.
fn starting(http: &Http) -> Vec<String> {
    let (until, mut told) = (Instant::now() + PATIENCE, Vec::new());
    loop {
        let (status, text) = http.get("/startupz");
        if status == 200 {
            return told;
        }
        assert!(Instant::now() < until, "it does not start: {text}");
        if told.last() != Some(&text) {
            told.push(text);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The health of the node at `address`: of all, and of one service.
async fn grpc(address: &str, expect: Expect, tls: &Tls, service: &str) -> Result<i32, String> {
    let channel = transport::connect(address, expect, tls).await.map_err(|e| e.to_string())?;
    let request = HealthCheckRequest { service: service.to_owned() };
    let mut client = health_client(channel);
    let answer = tokio::time::timeout(Duration::from_secs(5), client.check(request));
    let answer = answer.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    Ok(answer.into_inner().status)
}

#[test]
fn nodes_tell_their_health_over_grpc_to_those_of_the_cluster() {
    const SERVING: Result<i32, String> = Ok(1);
    const NOT_SERVING: Result<i32, String> = Ok(2);
    let cluster = Cluster::start(&demo_model(), 1, &[]);
    let http = cluster.http();
    let data = cluster.ground.data("coordinator-1");
    let own = Tls::new(Credential::load(Path::new(&data)).expect("a credential")).expect("good");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (coordinator, worker) = (cluster.coordinator.cluster(), cluster.workers[0].cluster());
    let node = nodes(&cluster.ground.status(&coordinator))[0];
    let ask = |tls: &Tls, of_worker: bool, service: &str| match of_worker {
        true => runtime.block_on(grpc(&worker, Expect::Node(node), tls, service)),
        false => runtime.block_on(grpc(&coordinator, Expect::AnyCoordinator, tls, service)),
    };
    for service in ["", "phalanx.v1.Coordinator"] {
        assert_eq!(ask(&own, false, service), SERVING, "{service:?}");
    }
    for service in ["", "phalanx.v1.Worker"] {
        assert_eq!(ask(&own, true, service), SERVING, "{service:?}");
    }
    let unknown = ask(&own, true, "phalanx.v1.Nothing");
    assert!(unknown.is_err(), "{unknown:?}");
    // Who has no certificate of this cluster is told nothing.
    let now = SystemTime::now();
    let stranger = ClusterCa::create(now).expect("an authority");
    let stranger = stranger.node(1, Role::Coordinator, NODE_LIFE, now).expect("a credential");
    let stranger = Tls::new(stranger).expect("good");
    for of_worker in [false, true] {
        let told = ask(&stranger, of_worker, "");
        assert!(told.is_err(), "a stranger was told {told:?}");
    }
    // A worker without a lease does nothing, and says so.
    signal(&cluster.coordinator, "-STOP");
    http.wait("to be without a lease", || ask(&own, true, "") == NOT_SERVING);
    signal(&cluster.coordinator, "-CONT");
    http.wait("to have one again", || ask(&own, true, "") == SERVING);
}
