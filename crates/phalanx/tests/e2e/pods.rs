//! A little of Kubernetes: manifests in, processes on loopback out.
//!
//! Every pod has an address of its own in 127.0.0.0/8 and keeps the ports that its manifest says.
//! Volumes are directories of a temporary one. What a kubelet puts into arguments and environment
//! is put there; then mount paths become those directories, and names and `0.0.0.0` addresses.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use serde_json::Value;

use crate::harness::{Http, PATIENCE, phalanx, source};

/// The manifests' folder.
pub(crate) fn base() -> PathBuf {
    source("deploy/kubernetes/base")
}

/// A manifest.
pub(crate) fn manifest(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The text at a JSON pointer, which must be there.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no text at {pointer} of {value}"))
}

/// The list at a JSON pointer, empty where there is none.
pub(crate) fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What `kubectl apply -k` would send: the files that the kustomization lists.
pub(crate) struct Manifests(Vec<Value>);

impl Manifests {
    pub(crate) fn load() -> Self {
        let listed = manifest(&base().join("kustomization.yaml"));
        let files = list(&listed, "/resources").iter().filter_map(Value::as_str);
        Self(files.map(|file| manifest(&base().join(file))).collect())
    }

    pub(crate) fn of_kind<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        let kind = kind.to_owned();
        self.0.iter().filter(move |one| one["kind"] == kind.as_str())
    }

    pub(crate) fn get(&self, kind: &str, name: &str) -> &Value {
        let mut found = self.of_kind(kind).filter(|one| one["metadata"]["name"] == name);
        found.next().unwrap_or_else(|| panic!("no {kind} is called {name}"))
    }

    /// Whether a headless Service of that name stands before the pods of a set, so that each has
    /// a name of its own before it is ready.
    fn names_pods(&self, set: &Value, service: &str) -> bool {
        let service = self.get("Service", service);
        let spec = &service["spec"];
        let labels = &set["spec"]["template"]["metadata"]["labels"];
        let selector = spec["selector"].as_object().expect("a selector");
        set["spec"]["serviceName"] == service["metadata"]["name"]
            && spec["clusterIP"] == "None"
            && spec["publishNotReadyAddresses"] == true
            && selector.iter().all(|(key, value)| labels[key] == *value)
    }
}

/// Pods of every StatefulSet, and what stands around them.
pub(crate) struct Namespace {
    pub(crate) manifests: Manifests,
    /// Secrets by name, entries by key.
    pub(crate) secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    root: tempfile::TempDir,
    /// The first three numbers of every pod's address.
    network: String,
}

/// Namespaces of this process so far.
static NAMESPACES: AtomicU8 = AtomicU8::new(0);

impl Namespace {
    /// The base, with `model` in the volume that is claimed for it.
    pub(crate) fn new(model: &Path) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        // In a directory of the name that the pods see: a copy, for a link would show its target's.
        copy(model, &root.path().join("model"));
        // Other runs of these tests at the same time are other processes.
        let process = std::process::id();
        let count = NAMESPACES.fetch_add(1, Ordering::Relaxed);
        let network =
            format!("127.{}.{}", 64 + (process >> 8 & 127), (process & 255) as u8 ^ count << 4);
        Self { manifests: Manifests::load(), secrets: BTreeMap::new(), root, network }
    }

    /// Where something of the test's own may lie.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Takes the Secret that a file holds.
    pub(crate) fn apply_secret(&mut self, path: &Path) {
        let secret = manifest(path);
        let entries = secret["data"].as_object().expect("data").iter().map(|(key, value)| {
            let value = value.as_str().expect("a text");
            let engine = base64::engine::general_purpose::STANDARD;
            (key.clone(), engine.decode(value).expect("base64"))
        });
        self.secrets.insert(text(&secret, "/metadata/name").to_owned(), entries.collect());
    }

    /// A pod's place.
    pub(crate) fn pod(&self, set: &str, ordinal: u64) -> Pod<'_> {
        let set = self.manifests.get("StatefulSet", set);
        let name = format!("{}-{ordinal}", text(set, "/metadata/name"));
        let pod = Pod { address: self.address(set, ordinal), name, set, namespace: self };
        pod.mount_volumes();
        pod
    }

    /// Pods of a set, as many as it says.
    pub(crate) fn pods(&self, set: &str) -> Vec<Pod<'_>> {
        let replicas = &self.manifests.get("StatefulSet", set)["spec"]["replicas"];
        let replicas = replicas.as_u64().expect("a number of replicas");
        (0..replicas).map(|ordinal| self.pod(set, ordinal)).collect()
    }

    fn address(&self, set: &Value, ordinal: u64) -> String {
        let sets = self.manifests.of_kind("StatefulSet");
        let at = sets.into_iter().position(|one| one == set).expect("a set of the manifests");
        format!("{}.{}", self.network, 1 + 16 * at as u64 + ordinal)
    }

    /// `POD.SERVICE` and the address it stands for, of every pod that has such a name.
    fn names(&self) -> Vec<(String, String)> {
        let mut names = Vec::new();
        for set in self.manifests.of_kind("StatefulSet") {
            let service = text(set, "/spec/serviceName");
            if !self.manifests.names_pods(set, service) {
                continue;
            }
            for ordinal in 0..set["spec"]["replicas"].as_u64().expect("a number") {
                let pod = format!("{}-{ordinal}.{service}", text(set, "/metadata/name"));
                names.push((pod, self.address(set, ordinal)));
            }
        }
        names
    }
}

/// A pod that may be run.
pub(crate) struct Pod<'a> {
    pub(crate) name: String,
    pub(crate) address: String,
    set: &'a Value,
    namespace: &'a Namespace,
}

impl Pod<'_> {
    fn spec(&self) -> &Value {
        &self.set["spec"]["template"]["spec"]
    }

    /// The one container that runs.
    fn container(&self) -> &Value {
        let [container] = list(self.spec(), "/containers") else {
            panic!("{} has not one container", self.name)
        };
        container
    }

    /// The directory behind a volume of this pod.
    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        let mut volumes = list(self.spec(), "/volumes").iter();
        match volumes.find(|one| one["name"] == name) {
            Some(volume) if !volume["persistentVolumeClaim"].is_null() => {
                assert_eq!(text(volume, "/persistentVolumeClaim/claimName"), "phalanx-model");
                self.namespace.path("model")
            }
            _ => self.namespace.path(&self.name).join(name),
        }
    }

    /// Makes what a kubelet would: claimed volumes belong to the group, Secrets are readable by it.
    fn mount_volumes(&self) {
        for claim in list(self.set, "/spec/volumeClaimTemplates") {
            let path = self.volume(text(claim, "/metadata/name"));
            fs::create_dir_all(&path).expect("a volume");
            fs::set_permissions(&path, Permissions::from_mode(0o2770)).expect("its mode");
        }
        for volume in list(self.spec(), "/volumes") {
            let Some(name) = volume.pointer("/secret/secretName").and_then(Value::as_str) else {
                continue;
            };
            let path = self.volume(text(volume, "/name"));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(&path).expect("a volume");
            let secret = self.namespace.secrets.get(name);
            assert!(secret.is_some() || volume["secret"]["optional"] == true, "no Secret {name}");
            let mode = volume["secret"]["defaultMode"].as_u64().expect("a mode") as u32;
            for (key, content) in secret.into_iter().flatten() {
                let file = path.join(key);
                fs::write(&file, content).expect("a Secret's file");
                fs::set_permissions(&file, Permissions::from_mode(mode)).expect("its mode");
            }
        }
    }

    /// The environment of a container, in order: a variable may name those before it.
    fn environment(&self, container: &Value) -> Vec<(String, String)> {
        let mut known: Vec<(String, String)> = Vec::new();
        for variable in list(container, "/env") {
            let source = &variable["valueFrom"];
            let value = if let Some(value) = variable["value"].as_str() {
                expand(value, &known)
            } else if let Some(field) = source["fieldRef"]["fieldPath"].as_str() {
                assert_eq!(field, "metadata.name", "a field that these tests do not know");
                self.name.clone()
            } else {
                let map = text(source, "/configMapKeyRef/name");
                let map = self.namespace.manifests.get("ConfigMap", map);
                text(&map["data"], &format!("/{}", text(source, "/configMapKeyRef/key"))).to_owned()
            };
            known.push((text(variable, "/name").to_owned(), value));
        }
        known
    }

    /// What stands on this machine for what a container is told.
    fn here(&self, container: &Value, told: &str) -> String {
        let mut told = told.to_owned();
        for mount in list(container, "/volumeMounts") {
            let volume = self.volume(text(mount, "/name"));
            let volume = volume.to_str().expect("a path in UTF-8");
            told = replace_path(&told, text(mount, "/mountPath"), volume);
        }
        for (name, address) in self.namespace.names() {
            told = told.replace(&name, &address);
        }
        told.replace("0.0.0.0", &self.address)
    }

    /// A container's command with exactly its arguments and environment.
    fn command(&self, container: &Value) -> Command {
        let environment = self.environment(container);
        let words = |key: &str| -> Vec<String> {
            let words = list(container, key).iter().map(|word| word.as_str().expect("a word"));
            words.map(|word| self.here(container, &expand(word, &environment))).collect()
        };
        let mut command = match &words("/command")[..] {
            // The image's entry point.
            [] => phalanx(),
            [program, rest @ ..] => {
                let mut command = Command::new(program);
                command.args(rest);
                command
            }
        };
        command.args(words("/args")).env_clear().current_dir("/").stdin(Stdio::null());
        let here = environment.iter().map(|(name, value)| (name, self.here(container, value)));
        command.envs(here);
        command
    }

    /// Runs the init containers, then starts the container.
    pub(crate) fn start(&self) -> Running {
        for container in list(self.spec(), "/initContainers") {
            let status = self.command(container).status().expect("an init container");
            assert!(status.success(), "an init container of {} failed", self.name);
        }
        let child = self.command(self.container()).spawn().expect("a container");
        Running { child: Some(child), name: self.name.clone() }
    }

    fn port(&self, port: &Value) -> u16 {
        let ports = list(self.container(), "/ports");
        let named = ports.iter().find(|one| one["name"] == *port);
        let number = named.unwrap_or_else(|| panic!("no port {port}"))["containerPort"].as_u64();
        number.and_then(|number| u16::try_from(number).ok()).expect("a port")
    }

    /// Whether a probe of this pod succeeds now.
    pub(crate) fn probe(&self, probe: &str) -> bool {
        let probe = &self.container()[probe];
        let limit = Duration::from_secs(probe["timeoutSeconds"].as_u64().expect("a limit"));
        match probe["httpGet"].as_object() {
            Some(get) => {
                let base = format!("http://{}:{}", self.address, self.port(&get["port"]));
                Http { base }.status_within(get["path"].as_str().expect("a path"), limit)
                    == Some(200)
            }
            None => {
                let port = self.port(&probe["tcpSocket"]["port"]);
                let address = SocketAddr::new(self.address.parse().expect("an address"), port);
                TcpStream::connect_timeout(&address, limit).is_ok()
            }
        }
    }

    /// Waits until a probe succeeds.
    pub(crate) fn wait(&self, probe: &str, running: &mut Running) {
        let deadline = Instant::now() + PATIENCE;
        while !self.probe(probe) {
            running.must_run();
            assert!(Instant::now() < deadline, "{}: the {probe} fails", self.name);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The API of this pod.
    pub(crate) fn http(&self) -> Http {
        Http { base: format!("http://{}:{}", self.address, self.port(&"http".into())) }
    }

    /// How long an end may take before it is forced, less what goes by before it is asked for.
    pub(crate) fn grace(&self) -> Duration {
        let grace = self.spec()["terminationGracePeriodSeconds"].as_u64().expect("a grace");
        let before = self.container().pointer("/lifecycle/preStop/sleep/seconds");
        Duration::from_secs(grace - before.map_or(0, |s| s.as_u64().expect("seconds")))
    }
}

/// A container that runs; it is killed when this value is dropped.
pub(crate) struct Running {
    child: Option<Child>,
    name: String,
}

impl Running {
    fn must_run(&mut self) {
        let ended = self.child.as_mut().map(|child| child.try_wait().expect("a child's state"));
        assert!(matches!(ended, Some(None)), "{} ended: {ended:?}", self.name);
    }

    /// Waits until it has ended by itself.
    pub(crate) fn end(mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let child = self.child.as_mut().expect("a running container");
        loop {
            if let Some(status) = child.try_wait().expect("a child's state") {
                return status;
            }
            assert!(Instant::now() < deadline, "{} goes on", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks it to end, as a kubelet does; it must, within its grace.
    pub(crate) fn terminate(mut self, grace: Duration) -> ExitStatus {
        let mut child = self.child.take().expect("a running container");
        let sent = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert!(sent.expect("the kill command").success());
        let deadline = Instant::now() + grace;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("a child's state") {
                return status;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.child = Some(child);
        panic!("{} does not end within {grace:?}", self.name)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `$(NAME)` becomes its value where it is known, and stays where it is not; `$$` is one `$`.
pub(crate) fn expand(text: &str, known: &[(String, String)]) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let name = after.strip_prefix('(').and_then(|inner| inner.split_once(')'));
        let value = name.and_then(|(name, _)| known.iter().rev().find(|(n, _)| n == name));
        rest = match (after.strip_prefix('$'), name, value) {
            (Some(rest), _, _) => {
                out.push('$');
                rest
            }
            (None, Some((_, rest)), Some((_, value))) => {
                out.push_str(value);
                rest
            }
            _ => {
                out.push('$');
                after
            }
        };
    }
    out + rest
}

/// Replaces a path, and what lies below it, wherever it stands as one.
pub(crate) fn replace_path(text: &str, from: &str, to: &str) -> String {
    let part = |c: char| c.is_alphanumeric() || "._-".contains(c);
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(from) {
        out.push_str(before);
        let begins = !out.ends_with(|c| part(c) || c == '/');
        let ends = !after.starts_with(part);
        out.push_str(if begins && ends { to } else { from });
        rest = after;
    }
    out + rest
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}
