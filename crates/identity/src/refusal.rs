//! Why a handshake failed, in words for whoever runs a cluster.

use std::error::Error;
use std::io;

use rustls::{AlertDescription, CertificateError};

/// What a TLS error means.
pub fn explain(error: &rustls::Error) -> String {
    use AlertDescription as Alert;
    match error {
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::CertificateRequired => "the peer refused us: it asks for a certificate",
            Alert::UnknownCA | Alert::DecryptError | Alert::BadCertificate => {
                "the peer refused our certificate: it is not of the peer's cluster"
            }
            Alert::CertificateRevoked => {
                "the peer refused our certificate: this node was removed from the cluster"
            }
            Alert::CertificateExpired => "the peer refused our certificate: it has expired",
            Alert::AccessDenied | Alert::CertificateUnknown | Alert::UnsupportedCertificate => {
                "the peer refused our certificate: it is not admitted there"
            }
            Alert::NoApplicationProtocol => "the peer speaks another protocol on this port",
            other => return format!("the peer broke off the handshake: {other:?}"),
        }
        .to_owned(),
        rustls::Error::NoCertificatesPresented => "it showed no certificate".to_owned(),
        rustls::Error::InvalidCertificate(why) => explain_certificate(why),
        rustls::Error::InvalidMessage(_) => "it does not speak TLS".to_owned(),
        other => other.to_string(),
    }
}

fn explain_certificate(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not of this cluster".to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet; are the clocks right?".to_owned()
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "its certificate is another node's".to_owned()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not one that may serve".to_owned()
        }
        CertificateError::Revoked => "it was removed from the cluster".to_owned(),
        CertificateError::Other(why) => why.0.to_string(),
        other => format!("its certificate cannot be used: {other}"),
    }
}

/// What an error of a TLS connection means, if TLS is what it is about.
pub fn explain_io(error: &io::Error) -> Option<String> {
    cause(error).map(explain)
}

/// Whether the peer says that this node was removed from the cluster: it need not try again.
pub fn says_removed(error: &io::Error) -> bool {
    let revoked = rustls::Error::AlertReceived(AlertDescription::CertificateRevoked);
    cause(error).is_some_and(|cause| *cause == revoked)
}

fn cause(error: &io::Error) -> Option<&rustls::Error> {
    let mut inner: &(dyn Error + 'static) = error.get_ref()?;
    loop {
        if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return cause(io);
        }
        inner = inner.source()?;
    }
}
