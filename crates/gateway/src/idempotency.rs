//! Requests that carry an idempotency key: sent twice, they are computed and answered once.
//!
//! Two things make it so. The key stands in for the seed where the request names none, so that an
//! answer that is computed again, by whichever gateway and in whichever life of the cluster, has
//! the same bytes. And a gateway remembers whole answers for a while: who asks again gets what was
//! said before, and who asks meanwhile waits for it.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::HeaderMap;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::ApiError;

/// The header's name.
pub(crate) const HEADER: &str = "idempotency-key";
/// Longest key, in bytes.
const KEY_MAX: usize = 255;
/// How long an answer is remembered.
const KEPT: Duration = Duration::from_secs(600);
/// Answers that are remembered, and the bytes that they may take together.
const ANSWERS: usize = 1024;
const BYTES: usize = 64 << 20;

/// A key that a client chose.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key(String);

impl Key {
    /// The key of a request, if it has one.
    ///
    /// # Errors
    /// 400: it is empty, too long, given twice, or not plain text.
    pub(crate) fn read(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let mut given = headers.get_all(HEADER).iter();
        let Some(first) = given.next() else { return Ok(None) };
        let text = first.to_str().ok().filter(|text| (1..=KEY_MAX).contains(&text.len()));
        match text.filter(|_| given.next().is_none()) {
            Some(text) => Ok(Some(Self(text.to_owned()))),
            None => {
                let message = format!("'{HEADER}' must be one text of 1 to {KEY_MAX} characters");
                Err(ApiError::invalid(HEADER, message))
            }
        }
    }

    /// The seed of a request that names none: a function of key and body alone, the same in every
    /// process of every release (FNV-1a, 64 bits; its parameters are published).
    pub(crate) fn seed(&self, body: &[u8]) -> u64 {
        const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
        const PRIME: u64 = 0x0000_0100_0000_01b3;
        let bytes = self.0.bytes().chain(std::iter::once(0xff)).chain(body.iter().copied());
        bytes.fold(BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
    }
}

/// What is said to a key, once it is said.
type Word = watch::Receiver<Option<Bytes>>;

/// What is known of a key.
struct Known {
    /// Of path and body: a key is of one request.
    request: u64,
    /// Empty until it is answered; closed without one where that came to nothing.
    answer: Word,
    /// When it was answered.
    at: Option<Instant>,
}

#[derive(Default)]
struct Book {
    known: HashMap<Key, Known>,
    /// Answered ones, the oldest first.
    answered: VecDeque<Key>,
    bytes: usize,
}

impl Book {
    /// Forgets what is too old, and the oldest where there is too much.
    fn tidy(&mut self, now: Instant) {
        while let Some(oldest) = self.answered.front() {
            let at = self.known.get(oldest).and_then(|known| known.at);
            let old = at.is_none_or(|at| now.duration_since(at) > KEPT);
            if !old && self.answered.len() <= ANSWERS && self.bytes <= BYTES {
                return;
            }
            if let Some(known) = self.answered.pop_front().and_then(|key| self.known.remove(&key)) {
                self.bytes -= known.answer.borrow().as_ref().map_or(0, Bytes::len);
            }
        }
    }
}

/// The answers of one gateway.
#[derive(Default)]
pub(crate) struct Answers {
    book: Arc<Mutex<Book>>,
    hasher: RandomState,
}

/// Whose part a request has.
pub(crate) enum Part {
    /// It is the first: it computes, and says what came of it.
    First(Ticket),
    /// It was answered before, or while this one waited.
    Again(Bytes),
}

/// The right to answer a key. Dropped without an answer, the next one who asks is the first.
pub(crate) struct Ticket {
    key: Key,
    answer: watch::Sender<Option<Bytes>>,
    book: Arc<Mutex<Book>>,
}

impl Answers {
    /// Begins a request, or waits for the one with this key that has begun.
    ///
    /// # Errors
    /// 422: the key is that of another request.
    pub(crate) async fn begin(&self, key: &Key, path: &str, body: &[u8]) -> Result<Part, ApiError> {
        loop {
            let mut answer = match self.look(key, path, body)? {
                Ok(ticket) => return Ok(Part::First(ticket)),
                Err(answer) => answer,
            };
            // Whoever was first may have failed, or its client may have left.
            if let Ok(answered) = answer.wait_for(Option::is_some).await
                && let Some(bytes) = answered.clone()
            {
                return Ok(Part::Again(bytes));
            }
        }
    }
}

impl Answers {
    /// Begins a request that is answered by a stream. Streams are not kept: who asks again, also
    /// meanwhile, gets the same bytes computed again, and has no ticket.
    ///
    /// # Errors
    /// 422: the key is that of another request.
    pub(crate) fn stream(
        &self,
        key: &Key,
        path: &str,
        body: &[u8],
    ) -> Result<Option<Ticket>, ApiError> {
        Ok(self.look(key, path, body)?.ok())
    }

    /// The right to answer a key, or what becomes of who has it.
    fn look(&self, key: &Key, path: &str, body: &[u8]) -> Result<Result<Ticket, Word>, ApiError> {
        let request = self.hasher.hash_one((path, body));
        let mut book = lock(&self.book);
        book.tidy(Instant::now());
        match book.known.get(key) {
            Some(known) if known.request != request => Err(ApiError::other_key()),
            Some(known) => Ok(Err(known.answer.clone())),
            None => {
                let (sender, answer) = watch::channel(None);
                book.known.insert(key.clone(), Known { request, answer, at: None });
                let book = Arc::clone(&self.book);
                Ok(Ok(Ticket { key: key.clone(), answer: sender, book }))
            }
        }
    }
}

impl Ticket {
    /// The stream has begun: from now on the key is this request's, as those of answers are.
    pub(crate) fn streams(self) {
        let mut book = lock(&self.book);
        let now = Instant::now();
        if let Some(known) = book.known.get_mut(&self.key) {
            known.at = Some(now);
            book.answered.push_back(self.key.clone());
        }
        book.tidy(now);
    }

    /// This is the answer.
    pub(crate) fn answered(self, bytes: &Bytes) {
        let mut book = lock(&self.book);
        let now = Instant::now();
        if let Some(known) = book.known.get_mut(&self.key) {
            known.at = Some(now);
            self.answer.send_replace(Some(bytes.clone()));
            book.bytes += bytes.len();
            book.answered.push_back(self.key.clone());
        }
        book.tidy(now);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut book = lock(&self.book);
        if book.known.get(&self.key).is_some_and(|known| known.at.is_none()) {
            book.known.remove(&self.key);
        }
    }
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}
