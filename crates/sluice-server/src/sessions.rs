//! Sessions: texts whose state the server keeps, so that they go on without being read again. They live in memory; as bytes
//! they survive the server. Names are random and looked up in a map, nowhere else.

use std::collections::HashMap;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sluice_data::Message;
use sluice_engine::Sequence;

use crate::auth::Tenant;
use crate::error::ApiError;

/// What a session has read.
#[derive(Clone)]
pub(crate) struct SessionState {
    /// The engine's state.
    pub(crate) sequence: Box<Sequence>,
    /// The same as text.
    pub(crate) text: String,
    /// The same as a conversation, if it is one.
    pub(crate) messages: Vec<Message>,
    /// Seconds since 1970 when it was made.
    pub(crate) created: u64,
}

/// The sessions of a server, at most so many; the one that was not used for longest leaves. To whom a session does not belong, for him
/// it is not there.
pub(crate) struct Sessions {
    limit: usize,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    clock: u64,
    /// A session that a request is continuing has no state here meanwhile.
    entries: HashMap<String, Entry>,
}

struct Entry {
    owner: Tenant,
    used: u64,
    busy: bool,
    state: SessionState,
}

impl Sessions {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, held: Mutex::default() }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().expect("nothing panics while it holds the lock")
    }

    /// Number of sessions.
    pub(crate) fn len(&self) -> usize {
        self.held().entries.len()
    }

    /// Keep a new session; returns its name.
    pub(crate) fn add(&self, owner: Tenant, state: SessionState) -> Result<String, ApiError> {
        let mut held = self.held();
        if held.entries.len() >= self.limit {
            let idle = held.entries.iter().filter(|(_, entry)| !entry.busy);
            let Some(oldest) = idle.min_by_key(|(_, entry)| entry.used).map(|(id, _)| id.clone()) else { return Err(ApiError::busy()) };
            held.entries.remove(&oldest);
        }
        let id = format!("session-{}", uuid::Uuid::new_v4().simple());
        held.clock += 1;
        let used = held.clock;
        held.entries.insert(id.clone(), Entry { owner, used, busy: false, state });
        Ok(id)
    }

    /// A copy of a session's state.
    pub(crate) fn get(&self, owner: Tenant, id: &str) -> Result<SessionState, ApiError> {
        self.held().entry(owner, id).map(|entry| entry.state.clone())
    }

    /// All of an owner's, by name: when it was made, tokens read, bytes.
    pub(crate) fn list(&self, owner: Tenant) -> Vec<(String, u64, usize, usize)> {
        let describe = |(id, entry): (&String, &Entry)| {
            let state = &entry.state;
            (id.clone(), state.created, state.sequence.position(), state.sequence.cache_bytes())
        };
        let mut all: Vec<_> = self.held().entries.iter().filter(|(_, entry)| entry.owner == owner).map(describe).collect();
        all.sort();
        all
    }

    /// Forget one.
    pub(crate) fn remove(&self, owner: Tenant, id: &str) -> Result<(), ApiError> {
        let mut held = self.held();
        held.entry(owner, id)?;
        held.entries.remove(id);
        Ok(())
    }

    /// Take a session for a request that continues it; nobody else can meanwhile.
    pub(crate) fn lend(self: &std::sync::Arc<Self>, owner: Tenant, id: &str) -> Result<(SessionState, Loan), ApiError> {
        let mut held = self.held();
        held.clock += 1;
        let clock = held.clock;
        let entry = held.entry(owner, id)?;
        if entry.busy {
            return Err(ApiError::conflict(format!("session `{id}` is being continued by another request")));
        }
        (entry.busy, entry.used) = (true, clock);
        Ok((entry.state.clone(), Loan { sessions: std::sync::Arc::clone(self), id: id.to_string() }))
    }
}

impl Held {
    fn entry(&mut self, owner: Tenant, id: &str) -> Result<&mut Entry, ApiError> {
        self.entries.get_mut(id).filter(|entry| entry.owner == owner).ok_or_else(|| unknown(id))
    }
}

fn unknown(id: &str) -> ApiError {
    // What a client sends comes back shortened: a name is 40 characters.
    let shown: String = id.chars().take(60).collect();
    ApiError::not_found(
        "session_id",
        "session_not_found",
        format!("found no session `{shown}`; it was deleted, or had to leave for others"),
    )
}

/// The right to continue a session. Dropped without [`Loan::give_back`] it leaves the session as it was.
pub(crate) struct Loan {
    sessions: std::sync::Arc<Sessions>,
    id: String,
}

impl Loan {
    /// Name of the session.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The session goes on from here. One that was deleted meanwhile stays deleted.
    pub(crate) fn give_back(self, state: SessionState) {
        if let Some(entry) = self.sessions.held().entries.get_mut(&self.id) {
            entry.state = state;
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(entry) = self.sessions.held().entries.get_mut(&self.id) {
            entry.busy = false;
        }
    }
}

/// First bytes of a session's bytes.
const MAGIC: &[u8; 16] = b"sluice-session\x00\x01";
const DIGEST_BYTES: usize = 32;

/// What stands before the engine's state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    text: String,
    messages: Vec<Message>,
    created: u64,
}

impl SessionState {
    /// The session as bytes: a magic word, the length of a JSON header, the header, the engine's snapshot, a digest of all that.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let header = Header { text: self.text.clone(), messages: self.messages.clone(), created: self.created };
        let header = serde_json::to_vec(&header).expect("a header is plain data");
        let mut bytes = MAGIC.to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header);
        bytes.extend(self.sequence.snapshot());
        let digest = Sha256::digest(&bytes);
        bytes.extend(digest);
        bytes
    }

    /// Read what [`Self::to_bytes`] wrote, into `sequence`, an empty one of this server's engine.
    pub(crate) fn from_bytes(bytes: &[u8], mut sequence: Box<Sequence>) -> Result<Self, ApiError> {
        let wrong = |what: &str| ApiError::invalid("", format!("the body is no session of this model: {what}"));
        let (content, digest) = bytes.split_last_chunk::<DIGEST_BYTES>().ok_or_else(|| wrong("it is cut off"))?;
        let rest = content.strip_prefix(MAGIC).ok_or_else(|| wrong("it begins with other bytes"))?;
        if Sha256::digest(content)[..] != digest[..] {
            return Err(wrong("it is damaged"));
        }
        let (len, rest) = rest.split_first_chunk::<8>().ok_or_else(|| wrong("it is cut off"))?;
        let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| wrong("it is cut off"))?;
        let (header, snapshot) = rest.split_at_checked(len).ok_or_else(|| wrong("it is cut off"))?;
        let Header { text, messages, created } = serde_json::from_slice(header).map_err(|e| wrong(&format!("its header: {e}")))?;
        sequence.restore(snapshot).map_err(|e| wrong(&e.to_string()))?;
        Ok(Self { sequence, text, messages, created })
    }
}
