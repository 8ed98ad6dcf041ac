//! Checks of shapes and of sizes, before anything is touched.

use crate::DeviceError;

/// The checks of one operation; failures name it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Check(pub(crate) &'static str);

impl Check {
    fn misfit(self, what: &'static str, got: usize, expected: usize) -> DeviceError {
        DeviceError::Shape { op: self.0, what, got, expected }
    }

    /// `got` must be `expected`.
    pub(crate) fn equal(
        self,
        what: &'static str,
        got: usize,
        expected: usize,
    ) -> Result<(), DeviceError> {
        if got == expected { Ok(()) } else { Err(self.misfit(what, got, expected)) }
    }

    /// `got` may be at most `limit` (which the error gives as the expectation).
    pub(crate) fn at_most(
        self,
        what: &'static str,
        got: usize,
        limit: usize,
    ) -> Result<(), DeviceError> {
        if got <= limit { Ok(()) } else { Err(self.misfit(what, got, limit)) }
    }

    /// `got` must be at least `limit`.
    pub(crate) fn at_least(
        self,
        what: &'static str,
        got: usize,
        limit: usize,
    ) -> Result<(), DeviceError> {
        if got >= limit { Ok(()) } else { Err(self.misfit(what, got, limit)) }
    }

    /// `got` must be below `limit`, which the error gives as the largest value allowed.
    pub(crate) fn below(
        self,
        what: &'static str,
        got: usize,
        limit: usize,
    ) -> Result<(), DeviceError> {
        if got < limit { Ok(()) } else { Err(self.misfit(what, got, limit.saturating_sub(1))) }
    }

    /// `start + len` may be at most `limit`; returns the sum.
    pub(crate) fn fits(
        self,
        what: &'static str,
        start: usize,
        len: usize,
        limit: usize,
    ) -> Result<usize, DeviceError> {
        let end = start.checked_add(len).ok_or(self.misfit(what, usize::MAX, limit))?;
        self.at_most(what, end, limit).map(|()| end)
    }

    /// The product of `factors`, or a misfit where it overflows.
    pub(crate) fn product(
        self,
        what: &'static str,
        factors: &[usize],
    ) -> Result<usize, DeviceError> {
        factors
            .iter()
            .try_fold(1_usize, |product, &factor| product.checked_mul(factor))
            .ok_or(self.misfit(what, usize::MAX, isize::MAX as usize))
    }
}

/// Makes `values` hold `len` elements (new ones from `fill`), or says that memory is short.
pub(crate) fn resize<T: Clone>(
    values: &mut Vec<T>,
    len: usize,
    fill: T,
) -> Result<(), DeviceError> {
    let more = len.saturating_sub(values.len());
    values.try_reserve_exact(more).map_err(|_| out_of_memory::<T>(len))?;
    values.resize(len, fill);
    Ok(())
}

/// `product` elements of `fill`; the product is checked.
pub(crate) fn filled<T: Clone>(factors: &[usize], fill: T) -> Result<Vec<T>, DeviceError> {
    let product = factors.iter().try_fold(1_usize, |p, &factor| p.checked_mul(factor));
    let mut values = Vec::new();
    resize(&mut values, product.ok_or(out_of_memory::<T>(usize::MAX))?, fill)?;
    Ok(values)
}

/// `len` elements cannot be had.
pub(crate) fn out_of_memory<T>(len: usize) -> DeviceError {
    DeviceError::OutOfMemory { bytes: (len as u64).saturating_mul(size_of::<T>() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_had_are_errors() {
        for factors in [&[usize::MAX, 2][..], &[1 << 60, 1][..], &[usize::MAX][..]] {
            let error = filled(factors, 0.0_f32).unwrap_err();
            assert!(matches!(error, DeviceError::OutOfMemory { bytes } if bytes >= 1 << 62));
        }
        assert_eq!(filled(&[2, 3], 1_u8), Ok(vec![1; 6]));
    }

    #[test]
    fn sums_and_products_do_not_wrap() {
        let check = Check("op");
        assert!(check.fits("end", usize::MAX, 1, 5).is_err());
        assert!(check.product("size", &[usize::MAX, 2]).is_err());
        assert_eq!(check.fits("end", 2, 3, 5), Ok(5));
        let text = check.equal("rows", 3, 4).unwrap_err().to_string();
        assert_eq!(text, "op: rows is 3, expected 4");
    }
}
