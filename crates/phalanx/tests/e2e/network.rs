//! A network of a test's own: hosts in network namespaces on one bridge, and links that are cut.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::harness::{output, phalanx};

/// Set in the process that is inside the network.
const INSIDE: &str = "PHALANX_TEST_INSIDE";

/// A bridge that hosts are plugged into. Names live under a mount that nobody else sees, so
/// everything goes with the last process that is inside, however that ends.
const SETUP: &str = "mount -t tmpfs none /run && mkdir /run/netns && ip link set lo up && \
     ip link add br0 type bridge && ip address add 10.77.0.254/24 dev br0 && ip link set br0 up";

/// What the tests do with the tools, tried out.
const PROBE: &str = "ip netns add probe && ip link add one type veth peer name two netns probe && \
     ip link set one master br0 && nsenter --net=/run/netns/probe nft flush ruleset";

/// Says, past the capture of what a test prints, that a test was not run.
pub(crate) fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {}", why.trim());
}

/// Runs `test`, which has the full name `name`, in a network of its own: in this process if that
/// is inside already, otherwise in another run of this binary that is.
///
/// `tools` are further commands that the test cannot do without.
pub(crate) fn inside(name: &str, tools: &[&str], test: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let found = tools.iter().map(|tool| format!(" && command -v {tool}")).collect::<String>();
    let probe = format!("{PROBE}{found}");
    let probed = output(&mut entered(&probe, &[]));
    if !probed.status.success() {
        let why = String::from_utf8_lossy(&probed.stderr).into_owned();
        return skipped(name, &format!("no network namespace with {tools:?} and nft: {why}"));
    }
    let this = std::env::current_exe().expect("this binary");
    let args = ["--exact", name, "--nocapture", "--include-ignored"].map(OsStr::new);
    let mut command = entered("exec \"$@\"", &[&[this.as_os_str()], &args[..]].concat());
    let ran = output(command.env(INSIDE, "1"));
    let (said, errors) =
        (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    print!("{said}");
    eprint!("{errors}");
    assert!(ran.status.success(), "{name} failed inside its network");
    assert!(said.contains("1 passed"), "there is no test of the name {name}");
}

/// A shell that has made the network and runs `script` in it.
fn entered(script: &str, args: &[&OsStr]) -> Command {
    let mut command = Command::new("unshare");
    // Root is needed inside only.
    let user = output(Command::new("id").arg("-u")).stdout;
    if user.trim_ascii() != b"0" {
        command.arg("--map-root-user");
    }
    command.args(["--net", "--mount", "sh", "-c", &format!("{SETUP} && {script}"), "sh"]);
    command.args(args);
    command
}

fn must(command: &mut Command) {
    let done = output(command);
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn ip(args: &str) {
    must(Command::new("ip").args(args.split(' ')));
}

/// A machine of its own, as far as its network goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) name: String,
    /// Its only address but that of its loopback.
    pub(crate) address: String,
}

impl Host {
    /// Plugs in a host that has the number `number`.
    pub(crate) fn new(name: &str, number: usize) -> Self {
        let address = format!("10.77.0.{number}");
        ip(&format!("netns add {name}"));
        ip(&format!("link add at-{name} type veth peer name eth0 netns {name}"));
        ip(&format!("link set at-{name} master br0 up"));
        ip(&format!("-n {name} address add {address}/24 dev eth0"));
        ip(&format!("-n {name} link set eth0 up"));
        ip(&format!("-n {name} link set lo up"));
        let host = Self { name: name.to_owned(), address };
        host.heal();
        host
    }

    /// A command that runs on this host.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(program);
        command
    }

    /// `phalanx` on this host.
    pub(crate) fn phalanx(&self) -> Command {
        let mut command = self.command(phalanx().get_program());
        command.env_remove("PHALANX_LOG");
        command
    }

    fn filter(&self, rules: &str) {
        let mut command = self.command("nft");
        let mut nft =
            command.args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft to start");
        let mut stdin = nft.stdin.take().expect("its standard input");
        stdin.write_all(rules.as_bytes()).expect("rules that nft reads");
        drop(stdin);
        assert!(nft.wait().expect("nft to end").success(), "{rules}");
    }

    /// From now on nothing that `other` sends arrives here.
    ///
    /// It is dropped where it arrives: a sender that its own kernel refuses would notice.
    pub(crate) fn deaf_to(&self, other: &Self) {
        self.deaf(&format!("ip saddr {}", other.address));
    }

    /// From now on nothing that matches `what` arrives here.
    pub(crate) fn deaf(&self, what: &str) {
        self.filter(&format!("add rule inet cut input {what} drop\n"));
    }

    /// Everything arrives here again.
    pub(crate) fn heal(&self) {
        self.filter(
            "flush ruleset\nadd table inet cut\n\
             add chain inet cut input { type filter hook input priority 0 ; policy accept ; }\n",
        );
    }
}
