//! The arrows between crates: what `docs/ARCHITECTURE.md` draws is what Cargo builds, no more and
//! no less, and the arrows that the design forbids are absent.
//!
//! The rules are functions over a [`Graph`] that give back sentences, one per violation, so that
//! the tests at the end can hand them a graph with a forbidden arrow and see it reported.

mod house;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

type Names = BTreeSet<String>;

/// Sync, no I/O, no clock, no randomness.
const PURE: [&str; 4] = ["model", "planner", "cluster", "engine"];
/// Sync; the numbers.
const COMPUTE: [&str; 3] = ["compute", "collective", "decoder"];
/// Roles: they meet over `wire` and never depend on each other.
const SHELL: [&str; 3] = ["control", "worker", "gateway"];
/// The only crates with `unsafe` code.
const UNSAFE: [&str; 2] = ["compute", "collective"];
/// What a pure crate must not reach, not even through others.
const IMPURE: [&str; 16] = [
    "async-std",
    "axum",
    "getrandom",
    "hyper",
    "memmap2",
    "mio",
    "rand",
    "rayon",
    "reqwest",
    "socket2",
    "tokio",
    "tokio-util",
    "tonic",
    "tower",
    "ureq",
    "uuid",
];
/// What the compute crates must not reach.
const ASYNC: [&str; 9] =
    ["async-std", "axum", "hyper", "mio", "reqwest", "tokio", "tokio-util", "tonic", "tower"];
/// Crates of others that only some of ours may declare; `tests` may declare any of them.
const RESERVED: [(&str, &[&str]); 17] = [
    ("anyhow", &["phalanx"]),
    ("axum", &["gateway"]),
    ("clap", &["phalanx"]),
    ("cudarc", &["compute", "collective"]),
    ("libloading", &["collective"]),
    ("memmap2", &["compute"]),
    ("minijinja", &["gateway"]),
    ("prost", &["wire"]),
    ("protox", &["wire"]),
    ("raft", &["control"]),
    ("rayon", &["compute"]),
    ("rcgen", &["identity"]),
    ("rustls", &["collective", "identity", "worker"]),
    ("tokenizers", &["gateway"]),
    ("tokio-rustls", &["wire"]),
    ("tonic-prost-build", &["wire"]),
    ("x509-parser", &["identity"]),
];
/// Names that say nothing; a type lives in the lowest crate that gives it meaning.
const EMPTY_NAMES: [&str; 7] = ["common", "core", "helpers", "shared", "types", "util", "utils"];

/// What Cargo knows of the workspace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Graph {
    /// Our crates, each with every crate that its manifest names to be built.
    declared: BTreeMap<String, Names>,
    /// The same for what only its tests need; not drawn, but under the same layers.
    tested: BTreeMap<String, Names>,
    /// Normal dependencies as resolved, by package (a name may stand for several versions).
    resolved: BTreeMap<String, Names>,
}

impl Graph {
    /// Reads the output of `cargo metadata`; an error names what is missing.
    fn parse(metadata: &Value) -> Result<Graph, String> {
        let mut names = BTreeMap::new();
        let mut graph = Graph::default();
        for package in list(metadata, "packages")? {
            let name = text(package, "name")?;
            names.insert(text(package, "id")?, name.clone());
            if package["source"].is_null() {
                let (mut built, mut tested) = (Names::new(), Names::new());
                for needed in list(package, "dependencies")? {
                    let side = if needed["kind"] == "dev" { &mut tested } else { &mut built };
                    side.insert(text(needed, "name")?);
                }
                graph.declared.insert(name.clone(), built);
                graph.tested.insert(name, tested);
            }
        }
        for node in list(&metadata["resolve"], "nodes")? {
            let id = text(node, "id")?;
            let name = names.get(&id).ok_or_else(|| format!("no package {id}"))?;
            let reached = graph.resolved.entry(name.clone()).or_default();
            for arrow in list(node, "deps")? {
                let normal = list(arrow, "dep_kinds")?.iter().any(|kind| kind["kind"].is_null());
                let target = text(arrow, "pkg")?;
                if normal {
                    let target = names.get(&target).ok_or_else(|| format!("no {target}"))?;
                    reached.insert(target.clone());
                }
            }
        }
        Ok(graph)
    }

    /// The arrows between our own crates, of those that a manifest names.
    fn arrows(&self, named: &BTreeMap<String, Names>) -> BTreeMap<String, Names> {
        let ours = |name: &String| self.declared.contains_key(name);
        let keep = |needed: &Names| needed.iter().filter(|&name| ours(name)).cloned().collect();
        named.iter().map(|(name, needed)| (name.clone(), keep(needed))).collect()
    }

    /// Everything that `from` reaches through normal dependencies, each with the way there.
    fn reach(&self, from: &str) -> BTreeMap<String, String> {
        let mut found = BTreeMap::from([(from.to_owned(), from.to_owned())]);
        let mut open = vec![from.to_owned()];
        while let Some(name) = open.pop() {
            for next in self.resolved.get(&name).into_iter().flatten() {
                if !found.contains_key(next) {
                    found.insert(next.clone(), format!("{} -> {next}", found[&name]));
                    open.push(next.clone());
                }
            }
        }
        found.remove(from);
        found
    }
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>, String> {
    value[key].as_array().ok_or_else(|| format!("cargo metadata: no list {key:?}"))
}

fn text(value: &Value, key: &str) -> Result<String, String> {
    value[key].as_str().map(str::to_owned).ok_or_else(|| format!("cargo metadata: no {key:?}"))
}

/// Runs `cargo metadata` for this machine's platform.
fn workspace_graph() -> Graph {
    let cargo = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO"))
            .args(arguments)
            .current_dir(house::root())
            .output()
            .expect("cargo runs, it built this test");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("cargo writes UTF-8")
    };
    let about = cargo(&["-vV"]);
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).expect("cargo -vV");
    // Without the filter Cargo would fetch the crates of every platform.
    let metadata =
        cargo(&["metadata", "--format-version=1", "--locked", "--filter-platform", host]);
    Graph::parse(&serde_json::from_str(&metadata).expect("cargo writes JSON")).expect("known form")
}

/// The rows between the two markers: `` | `crate` | `needed`, `needed` | ``.
/// `tests` is not drawn: it may depend on everything.
fn drawn_arrows(document: &str) -> Result<BTreeMap<String, Names>, String> {
    let (_, rest) = document.split_once("<!-- arrows -->").ok_or("no <!-- arrows --> marker")?;
    let (table, _) = rest.split_once("<!-- /arrows -->").ok_or("no <!-- /arrows --> marker")?;
    let mut drawn = BTreeMap::new();
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.trim_matches('|').split('|');
        let name = cells.next().unwrap_or_default().trim().trim_matches('`').to_owned();
        let cell = cells.next().ok_or_else(|| format!("row {name:?} has one cell"))?;
        let needed = cell.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        if drawn.insert(name.clone(), needed).is_some() {
            return Err(format!("crate {name:?} is drawn twice"));
        }
    }
    Ok(drawn)
}

/// One sentence per arrow that stands on one side only.
fn differences(graph: &Graph, drawn: &BTreeMap<String, Names>) -> Vec<String> {
    let mut found = Vec::new();
    let mut real = graph.arrows(&graph.declared);
    real.remove("tests");
    for name in real.keys().filter(|&name| !drawn.contains_key(name)) {
        found.push(format!("crate {name} is not in the table"));
    }
    for (name, needed) in drawn {
        let Some(built) = real.get(name) else {
            found.push(format!("the table has {name}, the workspace has not"));
            continue;
        };
        let missing = built.difference(needed).map(|to| format!("{name} -> {to} is not drawn"));
        found.extend(missing);
        let idle = needed.difference(built).map(|to| format!("{name} -> {to} is drawn, not built"));
        found.extend(idle);
    }
    found
}

/// One sentence per arrow that the design forbids, drawn or not.
fn forbidden(graph: &Graph) -> Vec<String> {
    let mut found = Vec::new();
    for (name, needed) in graph.arrows(&graph.declared) {
        if EMPTY_NAMES.contains(&name.as_str()) {
            found.push(format!("{name}: a crate is named after what it holds"));
        }
        for to in needed.iter().filter(|to| !may_see(&name, to)) {
            found.push(format!("{name} -> {to}: forbidden"));
        }
    }
    for (name, needed) in graph.arrows(&graph.tested) {
        let outside = needed.into_iter().filter(|to| !may_see(&name, to));
        found.extend(outside.map(|to| format!("{name} -> {to} in tests: forbidden")));
    }
    let pure = PURE.iter().map(|&name| (name, &IMPURE[..]));
    let compute = COMPUTE.iter().map(|&name| (name, &ASYNC[..]));
    for (name, limits) in pure.chain(compute) {
        let reached = graph.reach(name);
        let bad = limits.iter().filter_map(|&limit| reached.get(limit));
        found.extend(bad.map(|way| format!("{way}: not for this layer")));
    }
    for (reserved, owners) in RESERVED {
        for (name, needed) in &graph.declared {
            let allowed = name == "tests" || owners.contains(&name.as_str());
            if needed.contains(reserved) && !allowed {
                found.push(format!("{name} -> {reserved}: only for {}", owners.join(", ")));
            }
        }
    }
    found
}

/// Whether the layers allow an arrow from `name` to `to`, both ours.
fn may_see(name: &str, to: &str) -> bool {
    let pure = PURE.contains(&to);
    let compute = COMPUTE.contains(&to);
    match name {
        "tests" => true,
        _ if to == "tests" || to == "phalanx" => false,
        "engine" => false,
        "decoder" => compute || (pure && to != "cluster"),
        _ if PURE.contains(&name) => pure && to != "engine",
        // Its tests speak over TLS; what is built from it knows no certificate.
        "collective" => compute || to == "identity",
        _ if COMPUTE.contains(&name) => compute,
        "identity" => false,
        "wire" => pure || to == "identity",
        "control" | "gateway" => pure || to == "wire" || to == "identity",
        "worker" => pure || compute || to == "wire" || to == "identity",
        "phalanx" => true,
        // A crate that no layer knows is for whoever adds it to place here.
        _ => false,
    }
}

/// Crate roots without `#![forbid(unsafe_code)]`, of those that must have it.
fn without_forbid(roots: &[(String, String)]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, source) in roots {
        let name = path.split('/').nth(1).unwrap_or_default();
        let has = source.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]");
        if !has && !UNSAFE.contains(&name) {
            found.push(format!("{path}: no #![forbid(unsafe_code)]"));
        }
    }
    found
}

/// `lib.rs` and `main.rs` of every package below `crates/`, and the library of `tests`.
fn crate_roots(root: &Path) -> Vec<(String, String)> {
    let is_root = |path: &String| {
        let parts: Vec<_> = path.split('/').collect();
        matches!(parts[..], ["crates", _, "src", "lib.rs" | "main.rs"] | ["tests", "src", "lib.rs"])
    };
    let paths = house::files(root).expect("the workspace can be read").into_iter().filter(is_root);
    paths
        .map(|path| {
            let source = fs::read_to_string(root.join(&path)).expect("a source file is UTF-8");
            (path, source)
        })
        .collect()
}

/// Arrows to our crates that no source file of the crate uses.
fn unused(graph: &Graph, sources: &BTreeMap<String, String>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, needed) in graph.arrows(&graph.declared) {
        let source = sources.get(&name).map(String::as_str).unwrap_or_default();
        for to in needed {
            let path = format!("{to}::");
            let boundary = |at: usize| {
                let before = source[..at].chars().next_back();
                before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
            };
            if name != "tests" && !source.match_indices(&path).any(|(at, _)| boundary(at)) {
                found.push(format!("{name} -> {to}: declared, used by no source file"));
            }
        }
    }
    found
}

fn graph_of(arrows: &[(&str, &[&str])]) -> Graph {
    let set = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Names>();
    let ours = |name: &str| !matches!(name, "tokio" | "mio" | "axum" | "raft" | "anyhow" | "serde");
    let all = arrows.iter().map(|&(name, needed)| (name.to_owned(), set(needed)));
    let declared = all.clone().filter(|(name, _)| ours(name)).collect();
    Graph { declared, tested: BTreeMap::new(), resolved: all.collect() }
}

#[test]
fn the_arrows_are_the_drawn_ones() {
    let path = house::root().join("docs/ARCHITECTURE.md");
    let document = fs::read_to_string(path).expect("docs/ARCHITECTURE.md");
    let drawn = drawn_arrows(&document).expect("the table of arrows");
    house::assert_none(&differences(&workspace_graph(), &drawn));
}

#[test]
fn no_forbidden_arrow_is_built() {
    let graph = workspace_graph();
    assert!(PURE.iter().chain(&SHELL).all(|&name| graph.declared.contains_key(name)));
    assert!(graph.reach("gateway").contains_key("tokio"), "the walk sees what crates reach");
    house::assert_none(&forbidden(&graph));
}

/// The sources of every crate below `crates/`, joined.
fn crate_sources() -> BTreeMap<String, String> {
    let root = house::root();
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    for path in house::files(&root).expect("the workspace can be read") {
        let Some(inner) = path.strip_prefix("crates/").filter(|path| path.ends_with(".rs")) else {
            continue;
        };
        let name = inner.split('/').next().unwrap_or_default();
        let source = fs::read_to_string(root.join(&path)).expect("a source file is UTF-8");
        sources.entry(name.to_owned()).or_default().push_str(&source);
    }
    sources
}

#[test]
fn no_declared_arrow_is_idle() {
    house::assert_none(&unused(&workspace_graph(), &crate_sources()));
}

/// Decision 0002: the arrow from `worker` to `cluster` is for the data in orders.
#[test]
fn a_worker_decides_nothing() {
    let sources = crate_sources();
    for machine in ["ClusterState", "reconcile", "waiting_for"] {
        assert!(sources["cluster"].contains(machine), "{machine} is what cluster calls it");
        assert!(!sources["worker"].contains(machine), "worker uses {machine}");
    }
}

#[test]
fn unsafe_code_is_forbidden_outside_compute_and_collective() {
    let roots = crate_roots(&house::root());
    assert!(roots.len() > 12, "every crate has a root");
    house::assert_none(&without_forbid(&roots));
}

#[test]
fn a_shell_crate_that_sees_another_is_reported() {
    let graph = graph_of(&[("gateway", &["worker", "wire"]), ("worker", &[]), ("wire", &[])]);
    assert_eq!(forbidden(&graph), ["gateway -> worker: forbidden"]);
    for from in SHELL {
        for to in SHELL {
            assert!(!may_see(from, to), "{from} -> {to}");
        }
    }
}

#[test]
fn a_forbidden_arrow_added_to_the_real_graph_is_reported() {
    let mut graph = workspace_graph();
    graph.declared.get_mut("decoder").expect("decoder").insert("cluster".to_owned());
    graph.declared.get_mut("worker").expect("worker").insert("raft".to_owned());
    graph.tested.get_mut("worker").expect("worker").insert("gateway".to_owned());
    graph.resolved.get_mut("planner").expect("planner").insert("tokio".to_owned());
    let found = forbidden(&graph);
    let expected = [
        "decoder -> cluster: forbidden",
        "worker -> raft: only for control",
        "worker -> gateway in tests: forbidden",
        "planner -> tokio: not for this layer",
        "cluster -> planner -> tokio: not for this layer",
    ];
    for sentence in expected {
        assert!(found.iter().any(|line| line == sentence), "{sentence} in {found:#?}");
    }
}

#[test]
fn a_pure_crate_that_reaches_tokio_through_another_is_reported() {
    let graph = graph_of(&[("model", &["serde"]), ("serde", &["mio"]), ("mio", &[])]);
    assert_eq!(forbidden(&graph), ["model -> serde -> mio: not for this layer"]);
}

#[test]
fn a_crate_without_meaning_or_layer_is_reported() {
    let graph = graph_of(&[("utils", &["model"]), ("model", &["anyhow"])]);
    let expected = [
        "utils: a crate is named after what it holds",
        "utils -> model: forbidden",
        "model -> anyhow: only for phalanx",
    ];
    assert_eq!(forbidden(&graph), expected);
}

#[test]
fn arrows_on_one_side_only_are_reported_both_ways() {
    let graph = graph_of(&[("wire", &["model", "tokio"]), ("model", &[]), ("engine", &[])]);
    let document = "<!-- arrows -->\n| crate | needs |\n|---|---|\n| `wire` | `engine` |\n\
                    | `model` | nothing |\n| `router` | `wire` |\n<!-- /arrows -->\n";
    let drawn = drawn_arrows(document).expect("a table");
    let expected = [
        "crate engine is not in the table",
        "the table has router, the workspace has not",
        "wire -> model is not drawn",
        "wire -> engine is drawn, not built",
    ];
    assert_eq!(differences(&graph, &drawn), expected);
    assert_eq!(drawn_arrows("| `wire` | `engine` |"), Err("no <!-- arrows --> marker".to_owned()));
}

#[test]
fn an_idle_arrow_is_reported() {
    let graph = graph_of(&[("wire", &["model", "engine"]), ("model", &[]), ("engine", &[])]);
    let source = "use model::ModelSpec; fn f(x: my_engine::X, y: crate::engine::Y) {}";
    let sources = BTreeMap::from([("wire".to_owned(), source.to_owned())]);
    assert_eq!(unused(&graph, &sources), ["wire -> engine: declared, used by no source file"]);
}

#[test]
fn a_root_that_allows_unsafe_code_is_reported() {
    let root = |name: &str, source: &str| (format!("crates/{name}/src/lib.rs"), source.to_owned());
    let roots = [
        root("engine", "//! x\n// #![forbid(unsafe_code)]\n"),
        root("compute", "//! x\n"),
        root("wire", "//! x\n#![forbid(unsafe_code)]\n"),
    ];
    assert_eq!(without_forbid(&roots), ["crates/engine/src/lib.rs: no #![forbid(unsafe_code)]"]);
}
