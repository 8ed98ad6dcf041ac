//! What is lost when weights are quantised at load, by class of tensor, and that it is bounded.

use std::collections::BTreeMap;

use compute::{CpuDevice, Device, Precision};
use model::Part;
use tests::golden;

/// Sums over the weights of a class.
#[derive(Default)]
struct Error {
    squares: f64,
    errors: f64,
    largest: f64,
    worst: f64,
}

impl Error {
    fn see(&mut self, weight: f32, kept: f32) {
        let (weight, error) = (f64::from(weight), f64::from((weight - kept).abs()));
        self.squares += weight * weight;
        self.errors += error * error;
        self.largest = self.largest.max(weight.abs());
        self.worst = self.worst.max(error);
    }

    /// Root mean square error over that of the weights.
    fn rms(&self) -> f64 {
        (self.errors / self.squares).sqrt()
    }

    /// The largest error over the largest weight.
    fn max(&self) -> f64 {
        self.worst / self.largest
    }
}

fn class(part: Part) -> Option<&'static str> {
    match part {
        Part::Query | Part::Key | Part::Value => Some("query, key, value"),
        Part::Output => Some("attention output"),
        Part::Gate | Part::Up => Some("gate, up"),
        Part::Down => Some("down"),
        Part::ExpertGate(_) | Part::ExpertUp(_) => Some("experts' gate, up"),
        Part::ExpertDown(_) => Some("experts' down"),
        _ => None,
    }
}

fn errors(name: &str, precision: Precision) -> BTreeMap<&'static str, Error> {
    let golden = golden::load(name);
    let device = CpuDevice::new(1, None).expect("a CPU device");
    let mut errors: BTreeMap<_, Error> = BTreeMap::new();
    for tensor in golden.spec.tensors() {
        let Some(class) = class(tensor.part) else { continue };
        let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
        let mut stored = golden.checkpoint.tensor(tensor.layer, tensor.part).expect("a tensor");
        let source = stored.source(0..rows, 0..columns).expect("read");
        let read = |precision| {
            let matrix = device.pack(&source, precision).expect("packed");
            let ids: Vec<Option<u32>> = (0..rows as u32).map(Some).collect();
            let mut out = device.tensor(rows, columns).expect("a tensor");
            device.embed(&matrix, &ids, 0, &mut out).expect("read back");
            (device.host(&out).to_vec(), device.rounding(&matrix).relative())
        };
        let ((weights, none), (kept, said)) = (read(Precision::F32), read(precision));
        let mut own = Error::default();
        let error = errors.entry(class).or_default();
        for (weight, kept) in weights.into_iter().zip(kept) {
            own.see(weight, kept);
            error.see(weight, kept);
        }
        // What is logged when a model is loaded.
        assert_eq!(none, 0.0, "{}", tensor.name);
        assert!((said - own.rms()).abs() < 1e-5, "{}: {said}, {}", tensor.name, own.rms());
    }
    errors
}

#[test]
fn the_error_of_every_class_is_bounded() {
    // Half a step of 127, and one of eight: what is opposite a block's largest weight is cut off.
    let bounds = [(Precision::Int8, "q8", 0.5 / 127.0, 0.01), (Precision::Int4, "q4", 0.125, 0.12)];
    for name in ["llama3", "qwen3", "mixtral", "gpt-oss"] {
        for (precision, option, max, rms) in bounds {
            for (class, error) in errors(name, precision) {
                let (got_max, got_rms) = (error.max(), error.rms());
                println!("{option} {name}, {class}: max {got_max:.4}, RMS {got_rms:.4}");
                assert!(got_max <= max * 1.001, "{option} {name}, {class}: max {got_max}");
                assert!(got_rms <= rms, "{option} {name}, {class}: RMS {got_rms}");
                assert!(got_rms > rms / 10.0, "{option} {name}, {class}: nothing is quantised");
            }
        }
    }
}
