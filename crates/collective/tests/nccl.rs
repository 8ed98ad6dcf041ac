//! NCCL's loader and communicators without a GPU: against a library that imitates NCCL, compiled
//! here from `fake_nccl.c`. A machine without a C compiler fails these tests.

#![cfg(feature = "cuda")]

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use collective::Membership;
use collective::nccl::{
    Code, Communicator, Element, Extra, Nccl, NcclError, Place, RENDEZVOUS_BYTES, Rendezvous,
    Version,
};
use libloading::Library;

/// Longer than anything here takes, unless it hangs.
const LONG: Duration = Duration::from_secs(20);
/// For what is to run into its deadline.
const SHORT: Duration = Duration::from_millis(30);
const FIRST: Membership = Membership { group: 7, epoch: 1 };
const SECOND: Membership = Membership { group: 7, epoch: 2 };

/// What can be set and read in the imitation, in its order.
#[derive(Clone, Copy)]
#[repr(i32)]
#[allow(dead_code, reason = "some are only counted past")]
enum Knob {
    InitResult,
    InitPolls,
    AsyncError,
    AbortHangs,
    FinalizePolls,
    CallResult,
    CallPolls,
    Inits,
    Aborts,
    Destroys,
    Finalizes,
    Calls,
    Polls,
    Rank,
    Size,
    FirstOfId,
    Blocking,
    ConfigSize,
    Magic,
    Inside,
    TwoInside,
    AfterDeath,
    CallHangs,
    Ids,
}

/// A library of its own for one test.
struct Fake {
    path: PathBuf,
    library: Library,
    _directory: tempfile::TempDir,
}

impl Fake {
    fn new(defines: &[&str]) -> Fake {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("libnccl.so.2");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_nccl.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=c11", "-D_DEFAULT_SOURCE", "-Wall", "-Wextra", "-Werror"]);
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&path).arg(source).args(defines);
        let output = compiler.output().expect("these tests need a C compiler, `cc`");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: compiled above from a file of this tree.
        let library = unsafe { Library::new(&path) }.expect("the imitation loads");
        Fake { path, library, _directory: directory }
    }

    fn set(&self, knob: Knob, value: i32) {
        // SAFETY: the signature is that of the file.
        let set = unsafe { self.library.get::<unsafe extern "C" fn(c_int, c_int)>(c"fake_set") };
        // SAFETY: as above.
        unsafe { set.expect("a symbol")(knob as c_int, value) }
    }

    fn get(&self, knob: Knob) -> i32 {
        // SAFETY: the signature is that of the file.
        let get = unsafe { self.library.get::<unsafe extern "C" fn(c_int) -> c_int>(c"fake_get") };
        // SAFETY: as above.
        unsafe { get.expect("a symbol")(knob as c_int) }
    }

    fn load(&self) -> Result<Nccl, NcclError> {
        Nccl::load(Some(&self.path))
    }

    /// Waits until a count is reached.
    #[track_caller]
    fn reaches(&self, knob: Knob, count: i32) {
        let late = Instant::now() + LONG;
        while self.get(knob) < count {
            assert!(Instant::now() < late, "stays at {}", self.get(knob));
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Nobody used a communicator that was gone, or one that another thread was in.
    #[track_caller]
    fn was_used_well(&self) {
        assert_eq!((self.get(Knob::TwoInside), self.get(Knob::AfterDeath)), (0, 0));
    }
}

fn place(membership: Membership, rank: usize, size: usize) -> Place {
    Place { membership, rank, size }
}

fn join(
    nccl: &Nccl,
    membership: Membership,
    patience: Duration,
) -> Result<Communicator, NcclError> {
    let rendezvous = Rendezvous::open(nccl, membership, 2).expect("an id");
    Communicator::join(nccl, &rendezvous, place(membership, 1, 2), patience)
}

/// A sum of three numbers, as a decoder would ask for it.
fn sum(communicator: &Communicator) -> Result<[f32; 3], NcclError> {
    let (send, mut receive) = ([1.5_f32, -2.0, 8.0], [0.0_f32; 3]);
    let (from, to) = (send.as_ptr().cast(), receive.as_mut_ptr().cast::<c_void>());
    let stream = std::ptr::null_mut();
    // SAFETY: the imitation copies three f32 before it returns.
    unsafe { communicator.all_reduce(from, to, 3, Element::F32, stream)? };
    Ok(receive)
}

#[test]
fn without_the_library_there_is_an_error_and_no_panic() {
    let missing = Path::new("no/such/libnccl.so.2");
    let error = Nccl::load(Some(missing)).expect_err("it is not there");
    let NcclError::Unavailable { tried, reason } = &error else { panic!("{error}") };
    assert_eq!(tried, &["no/such/libnccl.so.2"]);
    assert!(!reason.is_empty());
    // By name: a machine may have it.
    match Nccl::load(None) {
        Ok(nccl) => assert!(nccl.version() >= Version(22_700)),
        Err(NcclError::Unavailable { tried, .. }) => {
            assert_eq!(tried, ["libnccl.so.2", "libnccl.so"]);
        }
        Err(NcclError::Version { .. } | NcclError::Symbol { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    // A file that is no library.
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("libnccl.so.2");
    std::fs::write(&path, "not a library").expect("written");
    let error = Nccl::load(Some(&path)).expect_err("no library");
    assert!(matches!(error, NcclError::Unavailable { .. }), "{error}");
}

#[test]
fn versions_and_symbols_are_gated() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("2.27.3");
    assert_eq!(nccl.version().to_string(), "2.27.3");
    // The symbol is there, the version is not to be trusted with it.
    assert!(!nccl.has(Extra::AllToAll) && !nccl.has(Extra::Revoke));
    let newer = Fake::new(&["-DVERSION=22901"]).load().expect("2.29.1");
    assert!(newer.has(Extra::AllToAll) && newer.has(Extra::Revoke));
    // New enough, and the symbol is not there.
    assert!(!newer.has(Extra::Windows));
    for (defines, version) in [("-DVERSION=22609", "2.26.9"), ("-DVERSION=30000", "3.0.0")] {
        let error = Fake::new(&[defines]).load().expect_err("another version");
        let NcclError::Version { got, .. } = error else { panic!("{error}") };
        assert_eq!(got.to_string(), version);
    }
    let error = Fake::new(&["-DWITHOUT_ASYNC_ERROR"]).load().expect_err("a symbol less");
    assert_eq!(error, NcclError::Symbol { name: "ncclCommGetAsyncError" });
}

#[test]
fn a_rendezvous_is_bytes_of_one_epoch() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    let first = Rendezvous::open(&nccl, FIRST, 2).expect("an id");
    let bytes = first.encode();
    assert_eq!(bytes.len(), RENDEZVOUS_BYTES);
    assert_eq!(Rendezvous::decode(&bytes), Ok(first.clone()));
    assert_ne!(Rendezvous::open(&nccl, FIRST, 2).expect("another id"), first);
    let shown = format!("{first:?}");
    assert_eq!(shown, "Rendezvous(group 7 epoch 1, 2 ranks, NCCL 2.27.3)", "no secret is shown");
    for change in [0, 4, 6] {
        let mut wrong = bytes;
        wrong[change] ^= 1;
        assert!(matches!(Rendezvous::decode(&wrong), Err(NcclError::Malformed { .. })));
    }
    let mut wrong = bytes;
    wrong[24..28].copy_from_slice(&[0; 4]);
    assert!(matches!(Rendezvous::decode(&wrong), Err(NcclError::Malformed { .. })));
    assert!(matches!(Rendezvous::decode(&bytes[1..]), Err(NcclError::Malformed { .. })));

    let refused = |place| Communicator::join(&nccl, &first, place, LONG).err().expect("refused");
    let stale = NcclError::WrongEpoch { expected: SECOND, got: FIRST };
    assert_eq!(refused(place(SECOND, 0, 2)), stale);
    let size = NcclError::Invalid { what: "size of the group", got: 3, limit: 2 };
    assert_eq!(refused(place(FIRST, 0, 3)), size);
    assert_eq!(refused(place(FIRST, 2, 2)), NcclError::Invalid { what: "rank", got: 2, limit: 2 });
    let mut other = bytes;
    other[28..32].copy_from_slice(&22_705_u32.to_le_bytes());
    let other = Rendezvous::decode(&other).expect("well formed");
    let error = Communicator::join(&nccl, &other, place(FIRST, 0, 2), LONG).err();
    let versions = NcclError::OtherVersion { ours: Version(22_703), theirs: Version(22_705) };
    assert_eq!(error, Some(versions));
    assert_eq!(fake.get(Knob::Inits), 0, "nothing of this reached NCCL");
    assert!(matches!(Rendezvous::open(&nccl, FIRST, 0), Err(NcclError::Invalid { .. })));
}

#[test]
fn a_communicator_is_joined_without_blocking_used_and_left() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    fake.set(Knob::InitPolls, 5);
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    assert_eq!(communicator.place(), place(FIRST, 1, 2));
    let seen = [Knob::Rank, Knob::Size, Knob::FirstOfId, Knob::Blocking].map(|k| fake.get(k));
    assert_eq!(seen, [1, 2, 1, 0]);
    assert_eq!(fake.get(Knob::ConfigSize), 72);
    assert_eq!(fake.get(Knob::Magic) as u32, 0xcafe_beef);
    assert_eq!(fake.get(Knob::Polls), 6);

    fake.set(Knob::CallPolls, 3);
    assert_eq!(sum(&communicator), Ok([1.5, -2.0, 8.0]));
    assert_eq!((fake.get(Knob::Calls), fake.get(Knob::Polls)), (1, 10));
    let (send, mut receive) = ([1_u16, 2], [0_u16; 4]);
    let (from, to) = (send.as_ptr().cast(), receive.as_mut_ptr().cast());
    // SAFETY: the imitation copies two times two numbers before it returns.
    let gathered =
        unsafe { communicator.all_gather(from, to, 2, Element::Bf16, std::ptr::null_mut()) };
    assert_eq!((gathered, receive), (Ok(()), [1, 2, 1, 2]));
    let mut looks = 0;
    let done = || {
        looks += 1;
        looks == 4
    };
    assert_eq!(communicator.wait(LONG, done), Ok(()));

    fake.set(Knob::FinalizePolls, 2);
    assert_eq!(communicator.finish(LONG), Ok(()));
    let ends = [Knob::Finalizes, Knob::Destroys, Knob::Aborts].map(|k| fake.get(k));
    assert_eq!(ends, [1, 1, 0]);
    fake.was_used_well();
}

#[test]
fn an_init_that_fails_or_never_ends_is_an_error_and_is_aborted() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    fake.set(Knob::InitResult, 2);
    let error = join(&nccl, FIRST, LONG).err().expect("refused");
    let call = "ncclCommInitRankConfig";
    let text = "an error".to_owned();
    assert_eq!(error, NcclError::Call { call, code: Code::System, text });
    assert_eq!(fake.get(Knob::Aborts), 0, "there was nothing to abort");

    fake.set(Knob::InitResult, 0);
    fake.set(Knob::InitPolls, -1);
    let error = join(&nccl, FIRST, SHORT).err().expect("nobody else comes");
    assert_eq!(error, NcclError::Deadline { call, limit: SHORT });
    fake.reaches(Knob::Aborts, 1);

    fake.set(Knob::InitPolls, 2);
    fake.set(Knob::AsyncError, 6);
    let error = join(&nccl, FIRST, LONG).err().expect("a peer is gone");
    let text = "it was the wire".to_owned();
    let noticed = NcclError::Noticed { membership: FIRST, rank: 1, code: Code::Remote, text };
    assert_eq!(error, noticed);
    assert_eq!(error.to_string(), "rank 1 of group 7 epoch 1: remote error: it was the wire");
    fake.reaches(Knob::Aborts, 2);
    fake.was_used_well();
}

#[test]
fn what_nccl_notices_ends_a_step_and_the_next_epoch_begins_anew() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    sum(&communicator).expect("a sum");
    // The step's kernel never ends, since a peer has died; NCCL says so after a while.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| communicator.wait(LONG, || false));
        fake.reaches(Knob::Polls, 20);
        fake.set(Knob::AsyncError, 6);
        let error = waiting.join().expect("no panic").expect_err("a peer has died");
        assert!(matches!(error, NcclError::Noticed { code: Code::Remote, .. }), "{error}");
        assert_eq!(sum(&communicator), Err(error.clone()), "the first error is final");
        assert_eq!(communicator.check(), Err(error));
    });
    let calls = fake.get(Knob::Calls);
    assert_eq!(communicator.abort(LONG), Ok(()));
    assert_eq!((fake.get(Knob::Aborts), fake.get(Knob::Destroys)), (1, 0), "aborted once");

    fake.set(Knob::AsyncError, 0);
    let again = join(&nccl, SECOND, LONG).expect("the next epoch");
    assert_eq!(again.place().membership, SECOND);
    sum(&again).expect("a sum");
    assert_eq!((fake.get(Knob::Calls), fake.get(Knob::FirstOfId)), (calls + 1, 2));
    again.finish(LONG).expect("in order");
    fake.was_used_well();
}

#[test]
fn calls_that_fail_or_never_end_are_final() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    fake.set(Knob::CallResult, 5);
    let error = sum(&communicator).expect_err("refused");
    assert!(matches!(&error, NcclError::Call { call: "ncclAllReduce", code: Code::Usage, .. }));
    fake.set(Knob::CallResult, 0);
    assert_eq!(sum(&communicator), Err(error));
    drop(communicator);
    fake.reaches(Knob::Aborts, 1);

    let communicator = join(&nccl, FIRST, SHORT).expect("joined");
    fake.set(Knob::CallPolls, -1);
    let late = NcclError::Deadline { call: "ncclAllReduce", limit: SHORT };
    assert_eq!(sum(&communicator), Err(late));
    fake.set(Knob::CallPolls, 0);
    drop(communicator);
    fake.reaches(Knob::Aborts, 2);

    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    let late = NcclError::Deadline { call: "a step", limit: SHORT };
    assert_eq!(communicator.wait(SHORT, || false), Err(late));
    fake.reaches(Knob::Aborts, 3);

    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    fake.set(Knob::FinalizePolls, -1);
    let late = NcclError::Deadline { call: "ncclCommFinalize", limit: SHORT };
    assert_eq!(communicator.finish(SHORT), Err(late));
    fake.reaches(Knob::Aborts, 4);
    assert_eq!(fake.get(Knob::Destroys), 0);
    fake.was_used_well();
}

#[test]
fn an_abort_from_another_thread_ends_waits_and_one_that_hangs_has_a_deadline() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    let handle = communicator.abort_handle();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| communicator.wait(LONG, || false));
        fake.reaches(Knob::Polls, 20);
        handle.abort();
        assert_eq!(waiting.join().expect("no panic"), Err(NcclError::Aborted));
    });
    fake.reaches(Knob::Aborts, 1);
    assert_eq!(sum(&communicator), Err(NcclError::Aborted));
    handle.abort();
    drop(communicator);
    handle.abort();

    // Nobody waits in it, and still it is aborted.
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    communicator.abort_handle().abort();
    fake.reaches(Knob::Aborts, 2);
    assert_eq!(communicator.check(), Err(NcclError::Aborted));

    let communicator = join(&nccl, SECOND, LONG).expect("joined");
    fake.set(Knob::AbortHangs, 1);
    let late = NcclError::Deadline { call: "ncclCommAbort", limit: SHORT };
    assert_eq!(communicator.abort(SHORT), Err(late));
    // It does not stand in the way of the next.
    join(&nccl, SECOND, LONG).expect("joined").finish(LONG).expect("in order");
    fake.set(Knob::AbortHangs, 0);
    fake.reaches(Knob::Aborts, 3);
    fake.was_used_well();
}

#[test]
fn an_abort_waits_for_a_call_that_is_under_way() {
    let fake = Fake::new(&[]);
    let nccl = fake.load().expect("the imitation");
    let communicator = join(&nccl, FIRST, LONG).expect("joined");
    fake.set(Knob::CallHangs, 1);
    thread::scope(|scope| {
        let calling = scope.spawn(|| sum(&communicator));
        fake.reaches(Knob::Inside, 1);
        communicator.abort_handle().abort();
        // The one who aborts is not held up, and NCCL is not entered twice.
        thread::sleep(SHORT);
        assert_eq!(fake.get(Knob::Aborts), 0);
        fake.set(Knob::CallHangs, 0);
        let _ = calling.join().expect("no panic");
    });
    fake.reaches(Knob::Aborts, 1);
    fake.was_used_well();
}

/// With NCCL itself, no GPU and no driver: PHALANX_NCCL names its file, for example that of the
/// PyPI package `nvidia-nccl-cu13`.
#[test]
#[ignore = "needs NCCL: PHALANX_NCCL=.../libnccl.so.2"]
fn the_real_library_loads_gives_ids_and_refuses_cleanly() {
    let path = std::env::var_os("PHALANX_NCCL").expect("PHALANX_NCCL names libnccl.so.2");
    let nccl = Nccl::load(Some(Path::new(&path))).expect("NCCL");
    println!("NCCL {}", nccl.version());
    assert!(nccl.has(Extra::Windows));
    let first = Rendezvous::open(&nccl, FIRST, 1).expect("an id");
    assert_ne!(first, Rendezvous::open(&nccl, FIRST, 1).expect("another id"));
    assert_eq!(Rendezvous::decode(&first.encode()), Ok(first.clone()));
    match Communicator::join(&nccl, &first, place(FIRST, 0, 1), LONG) {
        // A machine with a GPU.
        Ok(communicator) => communicator.finish(LONG).expect("in order"),
        Err(error) => {
            println!("without a GPU: {error}");
            assert!(matches!(error, NcclError::Call { .. } | NcclError::Noticed { .. }), "{error}");
        }
    }
}
