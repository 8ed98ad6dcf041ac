//! Recordings: what is kept, what is refused, and what a replay notices.

use collective::local::links;
use collective::record::{
    Call, Operation, Recorder, Recording, RecordingError, ReplayError, Replayer, Tolerance,
};
use collective::{Collective, CollectiveError, Membership, TreeCollective};
use compute::{CpuDevice, Device};

const LIMIT: u64 = 1 << 20;

type Tensor = <CpuDevice as Device>::Tensor;

fn device() -> CpuDevice {
    CpuDevice::new(1, None).expect("a device")
}

fn tensor(rows: usize, columns: usize, values: &[f32]) -> Tensor {
    let device = device();
    let mut tensor = device.tensor(rows, columns).expect("memory");
    device.host_mut(&mut tensor).copy_from_slice(values);
    tensor
}

/// A sum, a gather and a barrier, as one rank of a decoder would make them.
fn run(
    collective: &mut dyn Collective<CpuDevice>,
    nudge: f32,
) -> Result<Vec<f32>, CollectiveError> {
    let device = device();
    let partials = tensor(1, 3, &[1.5 + nudge, -2.0, 0.25]);
    let mut sum = tensor(1, 3, &[0.0; 3]);
    collective.sum_stripes(&device, &partials, 1, &mut sum)?;
    let mut all = tensor(1, 4, &[9.0; 4]);
    collective.gather_columns(&device, &tensor(1, 2, &[7.0, 8.0]), &[2, 2], &mut all)?;
    collective.barrier()?;
    Ok([device.host(&sum), device.host(&all)].concat())
}

/// Both ranks' results and recordings.
fn recorded(limit: u64) -> Vec<(Vec<f32>, Result<Recording, RecordingError>)> {
    let links = links(2, Membership { group: 3, epoch: 4 });
    std::thread::scope(|scope| {
        let rank = |link| {
            move || {
                let owners = vec![vec![0], vec![1]];
                let tree = TreeCollective::new(Box::new(link), 2, owners).expect("a partition");
                let mut recorder = Recorder::<CpuDevice>::new(Box::new(tree), limit);
                let values = run(&mut recorder, 0.0).expect("calls that go well");
                (values, recorder.finish())
            }
        };
        let threads: Vec<_> = links.into_iter().map(|link| scope.spawn(rank(link))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn recording(rank: usize) -> Recording {
    recorded(LIMIT).swap_remove(rank).1.expect("a recording")
}

#[test]
fn a_rank_alone_gets_the_answers_that_it_got() {
    for (rank, (values, recording)) in recorded(LIMIT).into_iter().enumerate() {
        let recording = recording.expect("a recording");
        assert_eq!((recording.rank as usize, recording.size, recording.calls.len()), (rank, 2, 3));
        let bytes = recording.encode();
        assert_eq!(Recording::decode(&bytes, LIMIT), Ok(recording.clone()));
        let mut replayer = Replayer::new(recording, Tolerance::Bits);
        let again = run(&mut replayer, 0.0).expect("every call was recorded");
        assert_eq!(again, values);
        let checked = replayer.finish().expect("the same contributions");
        assert!(checked.iter().all(|checked| checked.within && checked.first.is_none()));
    }
}

#[test]
fn what_a_rank_puts_in_is_compared() {
    let replay = |nudge: f32, tolerance| {
        let mut replayer = Replayer::new(recording(1), tolerance);
        run(&mut replayer, nudge).expect("answers all the same");
        replayer.finish()
    };
    let small = 0.001;
    let error = replay(small, Tolerance::Bits).expect_err("other bits");
    let ReplayError::Diverged { rank, call, operation, first, relative_l2, more } = &error else {
        panic!("{error}");
    };
    assert_eq!((*rank, *call, *operation, *first, *more), (1, 0, Operation::Sum, 0, 0));
    assert!((*relative_l2 - 0.001 / 2.51).abs() < 1e-5, "{relative_l2}");
    assert!(error.to_string().starts_with("rank 1, call 0 (sum): "), "{error}");
    let checked = replay(small, Tolerance::RelativeL2(1e-2)).expect("close enough");
    assert!(checked[0].first == Some(0) && checked[0].relative_l2 > 0.0);
    for far in [0.5, f32::NAN, f32::INFINITY] {
        replay(far, Tolerance::RelativeL2(1e-2)).expect_err("too far");
    }
}

#[test]
fn calls_that_were_not_recorded_fail_and_are_named() {
    let device = device();
    let partials = tensor(1, 2, &[0.0; 2]);
    let mut out = tensor(1, 2, &[0.0; 2]);
    let mut replayer = Replayer::new(recording(0), Tolerance::Bits);
    let error = replayer.sum_stripes(&device, &partials, 1, &mut out).expect_err("three were put");
    let expected = CollectiveError::Mismatch {
        peer: 0,
        sequence: 0,
        what: "elements put in",
        expected: 3,
        got: 2,
    };
    assert_eq!(error, expected);
    let again = Collective::<CpuDevice>::barrier(&mut replayer);
    assert_eq!(again, Err(expected), "the first error is final");
    let error = replayer.finish().expect_err("another call");
    assert_eq!(error.to_string(), "rank 0, call 0 (sum): elements put in is 2, recorded was 3");

    let mut replayer = Replayer::new(recording(0), Tolerance::Bits);
    Collective::<CpuDevice>::barrier(&mut replayer).expect_err("a sum was first");
    let error = replayer.finish().expect_err("another call").to_string();
    assert!(error.contains("call 0 (barrier): operation"), "{error}");

    let mut replayer = Replayer::new(recording(0), Tolerance::Bits);
    run(&mut replayer, 0.0).expect("as recorded");
    Collective::<CpuDevice>::barrier(&mut replayer).expect_err("one more");
    let ended = ReplayError::Ended { rank: 0, call: 3, operation: Operation::Barrier };
    assert_eq!(replayer.finish(), Err(ended));

    let replayer = Replayer::new(recording(0), Tolerance::Bits);
    let unfinished = ReplayError::Unfinished { rank: 0, made: 0, recorded: 3 };
    assert_eq!(replayer.finish(), Err(unfinished));

    let mut replayer = Replayer::new(recording(0), Tolerance::Bits);
    Collective::<CpuDevice>::abort_handle(&replayer).abort();
    assert_eq!(run(&mut replayer, 0.0), Err(CollectiveError::Aborted));
}

#[test]
fn a_part_of_a_run_is_no_recording() {
    for (values, recording) in recorded(200) {
        assert_eq!(values.len(), 7, "the calls go on");
        let Err(RecordingError::TooLarge { bytes, limit: 200 }) = recording else {
            panic!("{recording:?}");
        };
        assert!(bytes > 200);
    }
    let whole = recording(0).encode().len() as u64;
    assert!(recorded(whole)[0].1.is_ok(), "the limit is that of the file, to the byte");
    assert!(recorded(whole - 1)[0].1.is_err());
    // A collective that fails.
    let links = links(1, Membership { group: 3, epoch: 4 });
    let link = links.into_iter().next().expect("one");
    let tree = TreeCollective::new(Box::new(link), 1, vec![vec![0]]).expect("a partition");
    let mut recorder = Recorder::<CpuDevice>::new(Box::new(tree), LIMIT);
    recorder.abort_handle().abort();
    let mut out = tensor(1, 2, &[0.0; 2]);
    let wrong = tensor(1, 3, &[0.0; 3]);
    recorder.sum_stripes(&device(), &wrong, 1, &mut out).expect_err("sizes differ");
    let failed = recorder.finish().expect_err("no recording");
    assert!(matches!(failed, RecordingError::Failed { call: 0, .. }), "{failed}");
}

/// The bytes with a digest that fits them.
fn sealed(mut content: Vec<u8>) -> Vec<u8> {
    let digest = blake3::hash(&content);
    content.extend(digest.as_bytes());
    content
}

#[test]
fn bad_files_are_refused_by_what_is_wrong() {
    let good = recording(0).encode();
    let decode = |bytes: &[u8]| Recording::decode(bytes, LIMIT);
    assert_eq!(decode(b""), Err(RecordingError::NotARecording));
    assert_eq!(decode(&[0; 100]), Err(RecordingError::NotARecording));
    let length = good.len() as u64;
    let large = RecordingError::TooLarge { bytes: length, limit: length - 1 };
    assert_eq!(Recording::decode(&good, length - 1), Err(large));
    let mut other = good.clone();
    other[4] = 2;
    assert_eq!(decode(&other), Err(RecordingError::Version { got: 2 }));
    // Any byte that is changed or missing is noticed.
    for at in 6..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 0x10;
        assert_eq!(decode(&damaged), Err(RecordingError::Damaged), "byte {at}");
        assert!(decode(&good[..at]).is_err(), "{at} bytes");
    }
    // What a digest does not catch: content that was written wrong.
    let content = good[..good.len() - 32].to_vec();
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut content = content.clone();
        change(&mut content);
        decode(&sealed(content))
    };
    let what = |what| Err(RecordingError::Call { call: 0, what });
    assert_eq!(changed(&|_| {}), Ok(recording(0)));
    assert_eq!(changed(&|c| c[24] = 9), what("an unknown operation"));
    assert_eq!(changed(&|c| c[25] = 1), what("reserved bytes are set"));
    assert_eq!(changed(&|c| c[47] = 0xff), what("the bytes end within it"));
    assert_eq!(changed(&|c| c.truncate(30)), what("the bytes end within it"));
    assert_eq!(changed(&|c| c[8] = 2), Err(RecordingError::Rank { rank: 2, size: 2 }));
    let more = Err(RecordingError::Call { call: 3, what: "bytes follow the last call" });
    assert_eq!(changed(&|c| c.push(0)), more);
    let many = changed(&|c| c[16..24].copy_from_slice(&u64::MAX.to_le_bytes()));
    assert!(matches!(many, Err(RecordingError::Call { call: 3, .. })), "{many:?}");
    let barrier = Call {
        operation: Operation::Barrier,
        rows: 0,
        widths: Vec::new(),
        input: Vec::new(),
        output: Vec::new(),
    };
    let tiny = Recording { rank: 0, size: 1, calls: vec![barrier] };
    assert_eq!(decode(&tiny.encode()), Ok(tiny));
}
