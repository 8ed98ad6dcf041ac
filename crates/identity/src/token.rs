//! A join token: a short-lived credential as one line of text.
//!
//! Nothing has to be stored or looked up to make one, only the authority's key is needed; and
//! whoever shows one is authenticated by the same handshake as everybody else, so there is no port
//! that strangers may speak to and no second way to trust a coordinator.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::CertificateDer;

use crate::credential::Credential;
use crate::error::Flaw;

/// What every token begins with; the number is that of the encoding.
const PREFIX: &str = "phx1_";
/// Longest token that is looked at.
const TEXT_MAX: usize = 16 << 10;
/// Bytes of the check at the end: enough for slips of copying, no protection of its own.
const CHECK: usize = 4;

fn check(bytes: &[u8]) -> [u8; CHECK] {
    let mut check = [0; CHECK];
    check.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECK]);
    check
}

impl Credential {
    /// The credential as one line: `phx1_` and base64url of certificate, key and roots, each after
    /// its length (u16, big endian), and a check. It is a secret.
    ///
    /// # Errors
    /// A part is longer than 65,535 bytes.
    pub fn to_token(&self) -> Result<String, Flaw> {
        let mut bytes = Vec::new();
        let roots = self.roots.iter().map(|root| root.as_ref());
        for part in [&self.certificate, self.key.secret_pkcs8_der()].into_iter().chain(roots) {
            let length =
                u16::try_from(part.len()).map_err(|_| Flaw::Token("a part is too long"))?;
            bytes.extend(length.to_be_bytes());
            bytes.extend(part);
        }
        bytes.extend(check(&bytes));
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// Reads what [`Credential::to_token`] wrote; space around it does not matter.
    ///
    /// # Errors
    /// It is cut off, mistyped, or no token.
    pub fn from_token(text: &str) -> Result<Self, Flaw> {
        let text = text.trim();
        if text.len() > TEXT_MAX {
            return Err(Flaw::Token("it is too long"));
        }
        let body = text.strip_prefix(PREFIX).ok_or(Flaw::Token("it does not begin with phx1_"))?;
        let damaged = Flaw::Token("it is cut off or mistyped");
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| damaged.clone())?;
        let (mut rest, sum) = bytes.split_last_chunk::<CHECK>().ok_or_else(|| damaged.clone())?;
        if check(rest) != *sum {
            return Err(damaged);
        }
        let mut parts = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk() {
            let length = usize::from(u16::from_be_bytes(*length));
            let (part, after) = after.split_at_checked(length).ok_or_else(|| damaged.clone())?;
            parts.push(part.to_vec());
            rest = after;
        }
        let mut parts = parts.into_iter();
        let (Some(certificate), Some(key)) = (parts.next(), parts.next()) else {
            return Err(damaged);
        };
        Self::new(certificate.into(), key.into(), parts.map(CertificateDer::from).collect())
    }
}
