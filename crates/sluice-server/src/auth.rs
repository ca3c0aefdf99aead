//! API keys. Only their digests are kept, and they are compared without telling by time how much of a key was right.

use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};

/// Whose request it is: the holder of a key, by the key's place in the file. What one stores no other sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tenant(pub(crate) u32);

impl Tenant {
    /// Everybody, where no keys are asked for.
    pub(crate) const ANYONE: Self = Self(0);
}

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

    /// Whom the value of an `Authorization` header lets in.
    pub(crate) fn admit(&self, header: Option<&[u8]>) -> Option<Tenant> {
        if self.is_open() {
            return Some(Tenant::ANYONE);
        }
        let key = header.and_then(|header| header.strip_prefix(b"Bearer "))?;
        let digest: [u8; 32] = Sha256::digest(key).into();
        // All of them, always: the position of the right one is nobody's business either.
        let number = (1..).zip(&self.digests).fold(0, |found, (number, own)| u32::conditional_select(&found, &number, own.ct_eq(&digest)));
        (number > 0).then_some(Tenant(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_keys_of_the_file_are_let_in() {
        let keys = ApiKeys::parse("# two keys\nalpha\n\n  beta  \n").unwrap();
        for (header, expected) in [
            (Some("Bearer alpha"), Some(Tenant(1))),
            (Some("Bearer beta"), Some(Tenant(2))),
            (Some("Bearer alph"), None),
            (Some("Bearer # two keys"), None),
            (Some("Bearer "), None),
            (Some("alpha"), None),
            (None, None),
        ] {
            assert_eq!(keys.admit(header.map(str::as_bytes)), expected, "{header:?}");
        }
        assert_eq!(ApiKeys::default().admit(None), Some(Tenant::ANYONE));
        assert!(ApiKeys::parse("# nothing\n").is_err());
    }
}
