//! The checks that every text and number from outside goes through, and how a refusal names it.

use core::net::Ipv6Addr;

/// Most bytes of a name, a version or a kernel class.
pub(crate) const NAME_MAX: usize = 128;
/// Most bytes of an address: a full DNS name, a colon, five digits.
const ADDRESS_MAX: usize = 259;

/// A field that holds what it may not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct BadField {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it, as the end of a sentence that starts with the field.
    pub problem: &'static str,
}

pub(crate) fn bad(field: &'static str, problem: &'static str) -> BadField {
    BadField { field, problem }
}

/// Names are shown in logs and tables, so control characters have no business in them.
pub(crate) fn text(field: &'static str, value: &str) -> Result<(), BadField> {
    if value.is_empty() {
        return Err(bad(field, "is empty"));
    }
    if value.len() > NAME_MAX {
        return Err(bad(field, "is longer than 128 bytes"));
    }
    if value.chars().any(char::is_control) {
        return Err(bad(field, "holds control characters"));
    }
    Ok(())
}

/// Lower case only: digests are compared as they are written.
pub(crate) fn hexadecimal(field: &'static str, value: &str) -> Result<(), BadField> {
    text(field, value)?;
    if !value.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return Err(bad(field, "is not lower-case hexadecimal"));
    }
    Ok(())
}

/// Accepts `name:port`, `1.2.3.4:port` and `[::1]:port`; names are not looked up here.
///
/// # Errors
/// [`BadField`] with the name `field`.
pub fn check_address(field: &'static str, value: &str) -> Result<(), BadField> {
    let wrong = bad(field, "is not host:port");
    if value.len() > ADDRESS_MAX {
        return Err(wrong);
    }
    let (host, port) = value.rsplit_once(':').ok_or(wrong.clone())?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong);
    }
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let known = match bracketed {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => {
            let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            !host.is_empty() && host.bytes().all(letter)
        }
    };
    if known { Ok(()) } else { Err(wrong) }
}

#[cfg(test)]
mod tests {
    use super::check_address;

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["127.0.0.1:8000", "worker-1.svc:1", "[::1]:65535", "a_b:80"] {
            assert!(check_address("x", good).is_ok(), "{good}");
        }
        let long = format!("{}:80", "a".repeat(300));
        for bad in
            ["", ":80", "host", "host:", "host:0", "host:65536", "host:+80", "::1:80", "[zz]:80"]
        {
            assert!(check_address("x", bad).is_err(), "{bad}");
        }
        assert!(check_address("x", &long).is_err());
        assert!(check_address("x", "a b:80").is_err());
        assert!(check_address("x", "http://host:80").is_err());
    }
}
