//! A collective with a deliberate mistake, to see that the checks of exactness can fail.

use collective::{AbortHandle, Collective, CollectiveError, TreeCollective};
use compute::{CpuDevice, Device};

/// Adds partials one stripe after the other instead of along the tree. One rank only.
pub(crate) struct LeftToRight(pub(crate) TreeCollective);

impl Collective<CpuDevice> for LeftToRight {
    fn rank(&self) -> usize {
        Collective::<CpuDevice>::rank(&self.0)
    }

    fn size(&self) -> usize {
        Collective::<CpuDevice>::size(&self.0)
    }

    fn sum_stripes(
        &mut self,
        device: &CpuDevice,
        partials: &<CpuDevice as Device>::Tensor,
        _rows: usize,
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        let out = device.host_mut(out);
        out.fill(0.0);
        for partial in device.host(partials).chunks_exact(out.len()) {
            out.iter_mut().zip(partial).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn gather_columns(
        &mut self,
        device: &CpuDevice,
        part: &<CpuDevice as Device>::Tensor,
        widths: &[usize],
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        self.0.gather_columns(device, part, widths, out)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Collective::<CpuDevice>::barrier(&mut self.0)
    }

    fn accuse(&mut self, peer: usize) {
        self.0.end_for(peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        Collective::<CpuDevice>::abort_handle(&self.0)
    }
}
