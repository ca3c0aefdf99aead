//! API keys. Only their digests are kept, and they are compared without telling by time how much of a key was right.

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// Keys of which a client must have one; none at all lets everybody in.
#[derive(Clone, Default)]
pub struct ApiKeys {
    digests: Vec<[u8; 32]>,
}

impl ApiKeys {
    /// One key a line; empty lines and lines that begin with `#` are skipped. An error for a text without a key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let keys = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let digests: Vec<[u8; 32]> = keys.map(|key| Sha256::digest(key).into()).collect();
        if digests.is_empty() {
            return Err("found no key; expected one a line".into());
        }
        Ok(Self { digests })
    }

    /// Whether nobody needs a key.
    pub(crate) fn is_open(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whether the value of an `Authorization` header lets its sender in.
    pub(crate) fn admit(&self, header: Option<&[u8]>) -> bool {
        if self.is_open() {
            return true;
        }
        let Some(key) = header.and_then(|header| header.strip_prefix(b"Bearer ")) else { return false };
        let digest: [u8; 32] = Sha256::digest(key).into();
        // All of them, always: the position of the right one is nobody's business either.
        let found = self.digests.iter().fold(Choice::from(0), |found, own| found | own.ct_eq(&digest));
        found.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_keys_of_the_file_are_let_in() {
        let keys = ApiKeys::parse("# two keys\nalpha\n\n  beta  \n").unwrap();
        for (header, expected) in [
            (Some("Bearer alpha"), true),
            (Some("Bearer beta"), true),
            (Some("Bearer alph"), false),
            (Some("Bearer # two keys"), false),
            (Some("Bearer "), false),
            (Some("alpha"), false),
            (None, false),
        ] {
            assert_eq!(keys.admit(header.map(str::as_bytes)), expected, "{header:?}");
        }
        assert!(ApiKeys::default().admit(None));
        assert!(ApiKeys::parse("# nothing\n").is_err());
    }
}
