//! The manifests in `deploy/`: what they say of themselves, and that what they run comes up.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Http, PATIENCE, demo_model, output, phalanx, source};
use crate::pods::{Manifests, Namespace, Pod, Running, base, expand, list, manifest};
use crate::pods::{replace_path, text};

const COORDINATOR: &str = "phalanx-coordinator";
const WORKER: &str = "phalanx-worker";

/// Coordinators, then workers.
fn all(namespace: &Namespace) -> Vec<Pod<'_>> {
    let mut pods = namespace.pods(COORDINATOR);
    pods.extend(namespace.pods(WORKER));
    pods
}

/// Makes a new cluster's identity, and the Secrets for its first start.
fn found(namespace: &mut Namespace) {
    let data = namespace.path("safe");
    let made = output(phalanx().arg("init").arg("--data").arg(&data));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    secrets(namespace, "secrets");
    let mounted = |namespace: &Namespace| -> BTreeSet<String> {
        let sets = namespace.manifests.of_kind("StatefulSet");
        let volumes = sets.flat_map(|set| list(set, "/spec/template/spec/volumes"));
        let secrets = volumes.filter_map(|one| one["secret"]["secretName"].as_str());
        secrets.map(str::to_owned).collect()
    };
    let made: BTreeSet<String> = namespace.secrets.keys().cloned().collect();
    assert_eq!(made, mounted(namespace), "the Secrets that are made are those that are mounted");
}

/// Lets the script write Secrets into a new directory, and applies them.
fn secrets(namespace: &mut Namespace, directory: &str) {
    let (data, out) = (namespace.path("safe"), namespace.path(directory));
    let mut script = Command::new(source("deploy/kubernetes/make-secrets.sh"));
    script.arg(&data).arg(&out).env("PHALANX", env!("CARGO_BIN_EXE_phalanx"));
    let written = output(&mut script);
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    for file in ["founder", "coordinator-token", "worker-token"] {
        let path = out.join(format!("{file}.yaml"));
        let mode = fs::metadata(&path).expect("a manifest").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} can be read by others");
        namespace.apply_secret(&path);
    }
}

/// The command with the credential that `phalanx init` made, pointed at a pod.
fn operator(namespace: &Namespace, pod: &Pod<'_>) -> Command {
    let mut command = phalanx();
    command.env("PHALANX_IDENTITY", namespace.path("safe").join("operator.pem"));
    command.env("PHALANX_COORDINATORS", format!("{}:8100", pod.address));
    command
}

/// The cluster as `phalanx status` shows it to the operator that `phalanx init` made.
fn status(namespace: &Namespace, pod: &Pod<'_>) -> Value {
    let shown = output(operator(namespace, pod).args(["status", "--output", "json"]));
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    serde_json::from_slice(&shown.stdout).expect("JSON")
}

/// Names and numbers of every node, in the order of their names.
fn nodes(status: &Value) -> Vec<(String, u64)> {
    let nodes = list(status, "/nodes").iter().filter(|node| node["state"] != "left");
    let named = nodes
        .map(|node| (text(node, "/name").to_owned(), node["node"].as_u64().expect("a number")));
    let mut named: Vec<_> = named.collect();
    named.sort();
    named
}

fn answer(http: &Http) -> Value {
    let body = json!({
        "model": "model", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0,
    });
    http.complete(&body)["choices"].clone()
}

/// What a kubelet does to a volume whose pods have `fsGroupChangePolicy: Always`.
fn open_to_group(path: &Path) {
    let opened = Command::new("chmod").args(["-R", "g+rwX"]).arg(path).status();
    assert!(opened.expect("the chmod command").success());
}

/// Pods and what runs in them, all started at once, as `podManagementPolicy: Parallel` has it.
fn start(pods: &[Pod<'_>]) -> Vec<Running> {
    pods.iter().map(Pod::start).collect()
}

/// Waits until every probe of every pod succeeds.
fn probed(pods: &[Pod<'_>], running: &mut [Running]) {
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        for (pod, running) in pods.iter().zip(running.iter_mut()) {
            pod.wait(probe, running);
        }
    }
}

/// Ends a pod as Kubernetes does.
fn terminate(pod: &Pod<'_>, running: Running) {
    let ended = running.terminate(pod.grace());
    assert!(ended.success(), "{}: {ended}", pod.name);
}

#[test]
fn three_coordinators_and_two_workers_come_up_as_the_manifests_say() {
    let mut namespace = Namespace::new(&demo_model());
    found(&mut namespace);
    let pods = all(&namespace);
    assert_eq!(pods.len(), 5);
    let mut running = start(&pods);
    probed(&pods, &mut running);
    let first = answer(&pods[0].http());
    for other in &pods[1..3] {
        assert_eq!(answer(&other.http()), first, "{}", other.name);
    }
    let known = nodes(&status(&namespace, &pods[0]));
    let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
    let expected: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
    assert_eq!(names, expected);
    assert_eq!(known[0].1, 1, "the founder is pod 0");

    // The Secrets are deleted, as the README asks: what has an identity needs them no more.
    namespace.secrets.clear();
    let pods = all(&namespace);
    for restarted in [4, 0] {
        terminate(&pods[restarted], running.remove(restarted));
        open_to_group(&pods[restarted].volume("data"));
        running.insert(restarted, pods[restarted].start());
    }
    probed(&pods, &mut running);
    for pod in &pods[..3] {
        assert_eq!(answer(&pod.http()), first, "{} after restarts", pod.name);
    }
    assert_eq!(nodes(&status(&namespace, &pods[0])), known, "the same nodes as before");
    pods.iter().zip(running).for_each(|(pod, running)| terminate(pod, running));
}

#[test]
fn a_coordinator_that_has_lost_its_volume_is_replaced_as_the_readme_says() {
    let mut namespace = Namespace::new(&demo_model());
    found(&mut namespace);
    let pods = all(&namespace);
    let mut running = start(&pods);
    probed(&pods, &mut running);
    let known = nodes(&status(&namespace, &pods[0]));
    terminate(&pods[1], running.remove(1));
    fs::remove_dir_all(pods[1].volume("data")).expect("a volume to lose");
    let removed = output(operator(&namespace, &pods[0]).args(["members", "remove", &pods[1].name]));
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    // The first token has let in as many as it may: only a new one helps.
    secrets(&mut namespace, "again");
    let pods = all(&namespace);
    running.insert(1, pods[1].start());
    probed(&pods, &mut running);
    let voters = |shown: &Value| {
        let members = list(shown, "/control/members").iter();
        let voters = members.filter(|member| member["part"] == "voter");
        voters.map(|member| member["node"].as_u64().expect("a number")).collect::<Vec<_>>()
    };
    let deadline = Instant::now() + PATIENCE;
    let shown = loop {
        let shown = status(&namespace, &pods[0]);
        if voters(&shown).len() == 3 {
            break shown;
        }
        assert!(Instant::now() < deadline, "no third voter: {shown}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let now = nodes(&shown);
    assert_eq!(now[1].0, known[1].0, "under the old name");
    assert!(!known.contains(&now[1]), "but as another node: {now:?}");
    pods.iter().zip(running).for_each(|(pod, running)| terminate(pod, running));
}

#[test]
fn a_founder_that_has_lost_its_volume_does_not_found_the_cluster_again() {
    let namespace = Namespace::new(&demo_model());
    // The Secrets are gone, as they are once the cluster stands.
    let pod = namespace.pod(COORDINATOR, 0);
    let ended = pod.start().end();
    assert!(!ended.success(), "it began a cluster of its own");
    assert!(!pod.volume("data").join("node/raft.redb").exists());
}

/// Which of Kubernetes' rules for restricted pods a pod breaks, and of ours, which are stricter.
fn unrestricted(spec: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut must = |holds: bool, what: String| {
        if !holds {
            found.push(what);
        }
    };
    for field in ["hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"] {
        must(spec[field].is_null(), format!("{field} is set"));
    }
    must(spec["automountServiceAccountToken"] == false, "a token is mounted".to_owned());
    must(spec["enableServiceLinks"] == false, "Services set variables".to_owned());
    let pod = &spec["securityContext"];
    must(pod["runAsNonRoot"] == true, "it may run as root".to_owned());
    must(pod["runAsUser"].as_u64().is_some_and(|user| user > 0), "no user".to_owned());
    must(pod["seccompProfile"]["type"] == "RuntimeDefault", "any system call".to_owned());
    must(pod["fsGroup"] == pod["runAsGroup"], "volumes of another group".to_owned());
    must(pod["fsGroupChangePolicy"] == "OnRootMismatch", "keys are opened to a group".to_owned());
    for volume in list(spec, "/volumes") {
        let kinds = ["secret", "persistentVolumeClaim", "emptyDir"];
        let allowed = kinds.iter().any(|kind| !volume[*kind].is_null());
        must(allowed, format!("volume {volume}"));
    }
    for container in [list(spec, "/initContainers"), list(spec, "/containers")].concat() {
        let (name, context) = (&container["name"], &container["securityContext"]);
        must(context["allowPrivilegeEscalation"] == false, format!("{name} may gain privileges"));
        must(context["readOnlyRootFilesystem"] == true, format!("{name} may write anywhere"));
        must(context["privileged"].is_null(), format!("{name} is privileged"));
        let capabilities = &context["capabilities"];
        must(*capabilities == json!({"drop": ["ALL"]}), format!("{name} has capabilities"));
        must(!container["resources"]["limits"]["memory"].is_null(), format!("{name}: no limit"));
        must(!container["resources"]["requests"]["cpu"].is_null(), format!("{name}: no request"));
        let own = list(&container, "/volumeMounts").iter();
        let written: Vec<&Value> =
            own.filter(|mount| mount["readOnly"] != true).map(|mount| &mount["name"]).collect();
        must(written == [&json!("data")], format!("{name} writes to {written:?}"));
    }
    found
}

#[test]
fn pods_are_restricted() {
    let manifests = Manifests::load();
    for set in manifests.of_kind("StatefulSet") {
        let spec = &set["spec"]["template"]["spec"];
        assert_eq!(unrestricted(spec), Vec::<String>::new(), "{}", set["metadata"]["name"]);
        let account = manifests.get("ServiceAccount", text(spec, "/serviceAccountName"));
        assert_eq!(account["automountServiceAccountToken"], false);
    }
    // The rules, seen to bite.
    let whole = &manifests.get("StatefulSet", COORDINATOR)["spec"]["template"]["spec"];
    let strict = "/containers/0/securityContext/";
    let weaker = [
        ("/hostNetwork".to_owned(), json!(true)),
        ("/securityContext/runAsNonRoot".to_owned(), json!(false)),
        ("/securityContext/fsGroupChangePolicy".to_owned(), json!("Always")),
        (format!("{strict}readOnlyRootFilesystem"), json!(false)),
        (format!("{strict}capabilities"), json!({"drop": ["ALL"], "add": ["NET_RAW"]})),
        ("/volumes/2".to_owned(), json!({"name": "model", "hostPath": {"path": "/srv"}})),
    ];
    for (pointer, value) in weaker {
        let mut spec = whole.clone();
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        let parent = spec.pointer_mut(parent).expect("a parent");
        match field.parse::<usize>() {
            Ok(index) => parent[index] = value,
            Err(_) => parent[field] = value,
        }
        assert_eq!(unrestricted(&spec).len(), 1, "{pointer}");
    }
}

#[test]
fn the_base_lists_exactly_its_files() {
    for folder in [base(), source("deploy/kubernetes/example")] {
        let kustomization = manifest(&folder.join("kustomization.yaml"));
        let listed = list(&kustomization, "/resources").iter().filter_map(Value::as_str);
        let patches = list(&kustomization, "/patches").iter().map(|patch| text(patch, "/path"));
        let listed: BTreeSet<String> = listed.chain(patches).map(str::to_owned).collect();
        let files = fs::read_dir(&folder).expect("the folder").map(|entry| {
            entry.expect("an entry").file_name().into_string().expect("a name in UTF-8")
        });
        let mut files: BTreeSet<String> = files.collect();
        files.remove("kustomization.yaml");
        if folder != base() {
            files.insert("../base".to_owned());
        }
        assert_eq!(listed, files, "{}", folder.display());
    }
    // What the base needs of kustomize is nothing: each file is applied as it is.
    let kustomization = manifest(&base().join("kustomization.yaml"));
    let keys: Vec<&String> = kustomization.as_object().expect("a map").keys().collect();
    assert_eq!(keys, ["apiVersion", "kind", "resources"]);
    for name in ["namespace", "namePrefix"] {
        let set = |one: &Value| one["metadata"].get(name).is_some();
        assert!(!Manifests::load().of_kind("StatefulSet").any(set), "{name} is set");
    }
}

/// Ports that a policy opens: from or to whom (a component, `client` or `names`), and which.
fn opened(policy: &Value, direction: &str, whom: &str) -> BTreeSet<(String, u64)> {
    let mut found = BTreeSet::new();
    for rule in list(policy, &format!("/spec/{direction}")) {
        let ports = list(rule, "/ports").iter().map(|port| port["port"].as_u64().expect("a port"));
        let ports: Vec<u64> = ports.collect();
        assert!(!ports.is_empty(), "every port is open: {rule}");
        let peers = list(rule, &format!("/{whom}"));
        assert!(!peers.is_empty(), "everybody is let through: {rule}");
        for peer in peers {
            let labels = &peer["podSelector"]["matchLabels"];
            let name = labels["app.kubernetes.io/component"]
                .as_str()
                .unwrap_or(if labels["k8s-app"] == "kube-dns" { "names" } else { "client" });
            assert!(labels.is_object(), "everybody is let through: {peer}");
            found.extend(ports.iter().map(|port| (name.to_owned(), *port)));
        }
    }
    found
}

fn pairs(pairs: &[(&str, u64)]) -> BTreeSet<(String, u64)> {
    pairs.iter().map(|(name, port)| ((*name).to_owned(), *port)).collect()
}

#[test]
fn only_the_ports_that_the_roles_need_are_open() {
    let manifests = Manifests::load();
    let policy = |name| manifests.get("NetworkPolicy", name);
    let both = json!(["Ingress", "Egress"]);
    assert!(manifests.of_kind("NetworkPolicy").all(|one| one["spec"]["policyTypes"] == both));
    let into = |name| opened(policy(name), "ingress", "from");
    let out = |name| opened(policy(name), "egress", "to");
    let coordinator = [("client", 8000), ("coordinator", 8100), ("worker", 8100)];
    assert_eq!(into(COORDINATOR), pairs(&coordinator));
    let worker = [("coordinator", 8200), ("worker", 8200), ("worker", 8300)];
    assert_eq!(into(WORKER), pairs(&worker));
    let coordinator = [("names", 53), ("coordinator", 8100), ("worker", 8200)];
    assert_eq!(out(COORDINATOR), pairs(&coordinator));
    let worker = [("names", 53), ("coordinator", 8100), ("worker", 8200), ("worker", 8300)];
    assert_eq!(out(WORKER), pairs(&worker));
    for set in manifests.of_kind("StatefulSet") {
        let name = text(set, "/metadata/name");
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        let selector = &set["spec"]["selector"]["matchLabels"];
        assert_eq!(policy(name)["spec"]["podSelector"]["matchLabels"], *selector);
        let budget = manifests.get("PodDisruptionBudget", name);
        assert_eq!(budget["spec"]["selector"]["matchLabels"], *selector);
        let chosen = selector.as_object().expect("labels");
        assert!(chosen.iter().all(|(key, value)| labels[key] == *value));
        // What listens, what is named, and what is let in are the same ports.
        let container = &set["spec"]["template"]["spec"]["containers"][0];
        let ports = list(container, "/ports").iter();
        let ports: BTreeSet<u64> =
            ports.map(|port| port["containerPort"].as_u64().expect("a port")).collect();
        let inward: BTreeSet<u64> = into(name).into_iter().map(|(_, port)| port).collect();
        assert_eq!(ports, inward, "{name}");
        let args = list(container, "/args").iter().filter_map(Value::as_str);
        let args: Vec<&str> = args.filter_map(|arg| arg.split_once('=')).map(|(_, v)| v).collect();
        for port in ports {
            let named = |arg: &&str| arg.rsplit(':').next() == Some(&port.to_string());
            assert!(args.iter().any(named), "{name} is not told of port {port}");
        }
    }
}

#[test]
fn services_lead_to_ports_that_there_are() {
    let manifests = Manifests::load();
    for service in manifests.of_kind("Service") {
        let component = text(service, "/spec/selector/app.kubernetes.io~1component");
        let set = manifests.get("StatefulSet", &format!("phalanx-{component}"));
        let container = &set["spec"]["template"]["spec"]["containers"][0];
        for port in list(service, "/spec/ports") {
            let mut ports = list(container, "/ports").iter();
            let target = ports.find(|one| one["name"] == port["targetPort"]).expect("a target");
            assert_eq!(target["containerPort"], port["port"]);
        }
    }
}

#[test]
fn variables_are_expanded_as_kubernetes_does() {
    let known = [("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())];
    assert_eq!(expand("--x=$(A)-$(B)", &known), "--x=1-2");
    assert_eq!(expand("$(C) $A $$(A) $", &known), "$(C) $A $(A) $");
    assert_eq!(
        replace_path("/model --a=/model/x /models /x/model", "/model", "/t"),
        "/t --a=/t/x /models /x/model"
    );
}

/// `KEY=VALUE` lines of a text, the last of a key counts.
fn settings(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// What systemd makes of a command line: `${NAME}` is one word, `$NAME` as many as it has.
fn words(line: &str, environment: &[(String, String)]) -> Vec<String> {
    let value = |name: &str| {
        let mut found = environment.iter().rev().filter(|(key, _)| key == name);
        found.next().map_or("", |(_, value)| value).to_owned()
    };
    let word = |word: &str| match word.strip_prefix('$') {
        None => vec![word.to_owned()],
        Some(name) => match name.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
            Some(name) => vec![value(name)],
            None => value(name).split_whitespace().map(str::to_owned).collect(),
        },
    };
    line.split_whitespace().flat_map(word).collect()
}

#[test]
fn units_start_what_the_command_understands() {
    for role in ["coordinator", "worker"] {
        let read = |file: String| {
            let path = source("deploy/systemd").join(file);
            fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let unit = settings(&read(format!("phalanx-{role}.service")));
        let of = |key: &str| {
            let mut found = unit.iter().filter(|(name, _)| name == key);
            found.next().unwrap_or_else(|| panic!("{role}: no {key}")).1.clone()
        };
        assert_eq!(of("EnvironmentFile"), format!("/etc/phalanx/{role}.env"));
        for (key, value) in [
            ("User", "phalanx"),
            ("StateDirectoryMode", "0700"),
            ("NoNewPrivileges", "yes"),
            ("ProtectSystem", "strict"),
            ("Restart", "always"),
            ("KillMode", "mixed"),
        ] {
            assert_eq!(of(key), value, "{role}: {key}");
        }
        for key in ["LimitNOFILE", "TimeoutStopSec", "RestartMaxDelaySec", "SystemCallFilter"] {
            assert!(!of(key).is_empty(), "{role}: {key}");
        }
        let mut environment = settings(&read(format!("{role}.env")));
        let state = of("Environment");
        assert_eq!(state, format!("PHALANX_DATA=%S/phalanx/{role}"));
        environment.extend(settings(&state.replace("%S", "/nowhere")));
        let line = words(&of("ExecStart"), &environment);
        assert_eq!(line[..2], ["/usr/local/bin/phalanx".to_owned(), role.to_owned()]);
        // There is no such model here, and that is the first thing it says: the options are its
        // own.
        let mut command = phalanx();
        command.args(&line[1..]).env_clear().envs(environment);
        let refused = output(&mut command);
        let errors = String::from_utf8_lossy(&refused.stderr);
        let model = "/srv/models/model is neither a directory nor a .gguf file";
        assert!(errors.contains(model), "{role} is not started with {line:?}: {errors}");
    }
}
