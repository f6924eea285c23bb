//! Buffers of one block each, taken from a pool that never holds more than its bound: host memory for KV is these buffers
//! and nothing else. A buffer goes back when its last user drops it, and is used again, so the system is asked for
//! each page once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug)]
struct Inner {
    block_bytes: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Buffers that may still be made.
    unmade: usize,
    idle: Vec<Box<[u8]>>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Consistent at every unlock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pool; clones share it.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

impl Pool {
    /// At most `buffers` buffers of `block_bytes` bytes at once. Memory is taken when it is first used.
    pub fn new(block_bytes: usize, buffers: usize) -> Self {
        Pool(Arc::new(Inner {
            block_bytes,
            state: Mutex::new(State {
                unmade: buffers,
                idle: Vec::new(),
            }),
        }))
    }

    /// Bytes of a buffer.
    pub fn block_bytes(&self) -> usize {
        self.0.block_bytes
    }

    /// Buffers that can be taken now.
    pub fn available(&self) -> usize {
        let state = self.0.lock();
        state.unmade + state.idle.len()
    }

    /// A buffer that `fill` has filled: it sees old bytes and answers whether all of them are new now. `None` if the pool is
    /// exhausted or `fill` failed.
    pub fn fill(&self, fill: impl FnOnce(&mut [u8]) -> bool) -> Option<Block> {
        let bytes = {
            let mut state = self.0.lock();
            match state.idle.pop() {
                Some(bytes) => Some(bytes),
                None if state.unmade > 0 => {
                    state.unmade -= 1;
                    None
                }
                None => return None,
            }
        };
        // Zeroed by the system, outside of the lock.
        let bytes = bytes.unwrap_or_else(|| vec![0; self.0.block_bytes].into_boxed_slice());
        let mut buffer = Buffer {
            bytes,
            pool: self.0.clone(),
        };
        fill(&mut buffer.bytes).then(|| Block(Arc::new(buffer)))
    }
}

#[derive(Debug)]
struct Buffer {
    bytes: Box<[u8]>,
    pool: Arc<Inner>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.lock().idle.push(std::mem::take(&mut self.bytes));
    }
}

/// The bytes of one block, which nobody changes any more. Clones share them.
#[derive(Debug, Clone)]
pub struct Block(Arc<Buffer>);

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_and_used_again() {
        let pool = Pool::new(4, 2);
        let fill = |value: u8| {
            pool.fill(|bytes| {
                bytes.fill(value);
                true
            })
        };
        let (one, two) = (fill(1).expect("room"), fill(2).expect("room"));
        assert!(fill(3).is_none());
        let also_two = two.clone();
        drop(two);
        assert!(fill(3).is_none(), "still in use");
        drop(also_two);
        assert_eq!(fill(3).expect("it came back").as_ref(), [3; 4]);
        assert_eq!(one.as_ref(), [1; 4]);
        assert!(pool.fill(|_| false).is_none());
        assert_eq!(pool.available(), 1, "a failed filling gives its buffer back");
    }
}
