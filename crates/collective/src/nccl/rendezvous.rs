//! Where the ranks of one incarnation of a group meet, as bytes that travel with the epoch.

use std::fmt;

use super::NcclError;
use super::library::{Nccl, RawId, Version};
use crate::frame::{Membership, field};

/// Bytes of an encoded rendezvous.
pub const RENDEZVOUS_BYTES: usize = 160;

const MAGIC: [u8; 4] = *b"PHXN";
const FORM: u16 = 1;

/// What a rank needs to join a communicator of its group. Made by one rank (the process that makes
/// it listens for the others), good for one epoch, and a secret: NCCL asks for nothing else.
#[derive(Clone, PartialEq, Eq)]
pub struct Rendezvous {
    membership: Membership,
    size: u32,
    version: Version,
    id: [u8; 128],
}

impl fmt::Debug for Rendezvous {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { membership, size, version, id: _ } = self;
        write!(formatter, "Rendezvous({membership}, {size} ranks, NCCL {version})")
    }
}

impl Rendezvous {
    /// A new one for `size` ranks.
    ///
    /// # Errors
    /// `Invalid` where there is no rank or too many; `Call` where NCCL has no network to listen on.
    pub fn open(nccl: &Nccl, membership: Membership, size: usize) -> Result<Self, NcclError> {
        let limit = i32::MAX as u64;
        let fits = u32::try_from(size).ok().filter(|size| (1..=limit).contains(&u64::from(*size)));
        let got = size as u64;
        let size = fits.ok_or(NcclError::Invalid { what: "size of the group", got, limit })?;
        Ok(Self { membership, size, version: nccl.version(), id: nccl.unique_id()?.0 })
    }

    /// Whose it is.
    pub fn membership(&self) -> Membership {
        self.membership
    }

    /// Ranks that are to meet.
    pub fn size(&self) -> usize {
        self.size as usize
    }

    /// The NCCL that made it; every rank must have the same.
    pub fn version(&self) -> Version {
        self.version
    }

    pub(super) fn raw_id(&self) -> RawId {
        RawId(self.id)
    }

    /// Magic (4 bytes), form (2), zero (2), group (8), epoch (8), ranks (4), version (4), id (128).
    pub fn encode(&self) -> [u8; RENDEZVOUS_BYTES] {
        let mut bytes = [0; RENDEZVOUS_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&FORM.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.membership.group.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.membership.epoch.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.size.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.version.0.to_le_bytes());
        bytes[32..].copy_from_slice(&self.id);
        bytes
    }

    /// Reads what [`Rendezvous::encode`] wrote.
    ///
    /// # Errors
    /// `Malformed`. [`join`](super::Communicator::join) sees whether it is of the right group.
    pub fn decode(bytes: &[u8]) -> Result<Self, NcclError> {
        let malformed = |what| NcclError::Malformed { what };
        let length = malformed("another length");
        let bytes: &[u8; RENDEZVOUS_BYTES] = bytes.try_into().map_err(|_| length)?;
        if field::<4>(bytes, 0) != MAGIC {
            return Err(malformed("other bytes at its beginning"));
        }
        if u16::from_le_bytes(field(bytes, 4)) != FORM {
            return Err(malformed("another form"));
        }
        if field::<2>(bytes, 6) != [0; 2] {
            return Err(malformed("reserved bytes are set"));
        }
        let membership = Membership {
            group: u64::from_le_bytes(field(bytes, 8)),
            epoch: u64::from_le_bytes(field(bytes, 16)),
        };
        let size = u32::from_le_bytes(field(bytes, 24));
        if size == 0 || i32::try_from(size).is_err() {
            return Err(malformed("an impossible number of ranks"));
        }
        let version = Version(u32::from_le_bytes(field(bytes, 28)));
        Ok(Self { membership, size, version, id: field(bytes, 32) })
    }
}
