//! The collectives as the decoder sees them: on tensors of the CPU device.

mod support;

use collective::{Collective, CollectiveError, TreeCollective, tree};
use compute::{CpuDevice, Device};
use support::{KINDS, bits, collectives, each, values};

fn tensor(
    device: &CpuDevice,
    rows: usize,
    columns: usize,
    values: &[f32],
) -> <CpuDevice as Device>::Tensor {
    let mut tensor = device.tensor(rows, columns).expect("memory");
    device.host_mut(&mut tensor).copy_from_slice(values);
    tensor
}

#[test]
fn tensors_are_summed_and_gathered() {
    let (rows, columns) = (3, 5);
    let leaves = values(8 * rows * columns, 3);
    let mut whole = vec![0.0; rows * columns];
    assert!(tree::sum_tree(8, &leaves, &mut whole));
    let owners = [vec![0, 1, 2, 3, 4, 6], vec![5, 7]];
    for (_, make) in KINDS {
        let group = collectives(make(2), 8, &owners).into_iter().zip(&owners);
        each(group.collect(), |(rank, owned): (TreeCollective, &Vec<usize>)| {
            let device = CpuDevice::new(1, None).expect("a device");
            let mut rank: Box<dyn Collective<CpuDevice>> = Box::new(rank);
            let local: Vec<f32> =
                owned.iter().flat_map(|&s| leaves[s * 15..(s + 1) * 15].to_vec()).collect();
            let partials = tensor(&device, owned.len() * rows, columns, &local);
            let mut out = device.tensor(rows, columns).expect("memory");
            rank.sum_stripes(&device, &partials, rows, &mut out).expect("a sum");
            assert_eq!(bits(device.host(&out)), bits(&whole));

            // Every column holds the number of its stripe.
            let part: Vec<f32> = owned.iter().map(|&s| s as f32).collect();
            let part = tensor(&device, 1, owned.len(), &part);
            let mut gathered = device.tensor(1, 8).expect("memory");
            rank.gather_columns(&device, &part, &[1; 8], &mut gathered).expect("gathered");
            if rank.rank() == 0 {
                assert_eq!(device.host(&gathered), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
            }
            rank.barrier().expect("all there");
            rank.abort_handle().abort();
            let error = rank.barrier().expect_err("aborted");
            // Whichever rank is first stops the other.
            assert!(matches!(error, CollectiveError::Aborted | CollectiveError::Closed { .. }));
            assert_eq!(rank.size(), 2);
        });
    }
}
