//! The real state machine over tables in memory, as a group of one without Raft.

use std::sync::{Arc, Mutex};

use baton_gateway::{AccountStore, Proposed, StoreError, TablesBox};
use baton_proto::state::{Checkpoint, Command};
use baton_state::{Applied, MemoryTables, Pair, Tables, TablesError, Visit};
use prost::Message;

#[derive(Default)]
pub struct MemoryStore {
    state: Arc<Mutex<(MemoryTables, u64)>>,
    /// Added to 1.
    member: u64,
    /// Nothing can be proposed.
    pub cut_off: std::sync::atomic::AtomicBool,
    /// Commands proposed by kind's name.
    pub proposed: Mutex<Vec<String>>,
}

impl MemoryStore {
    /// The same state, as the next member has it.
    pub fn next_member(&self) -> Self {
        Self {
            state: self.state.clone(),
            member: self.member + 1,
            ..Self::default()
        }
    }

    pub fn apply(&self, command: &Command) -> Result<Applied, StoreError> {
        let kind = format!("{:?}", command.kind.as_ref().expect("a kind"));
        let kind = kind.split('(').next().unwrap_or_default().to_owned();
        self.proposed.lock().unwrap().push(kind);
        let mut state = self.state.lock().unwrap();
        let (tables, index) = &mut *state;
        *index += 1;
        let outcome = baton_state::apply(tables, *index, &command.encode_to_vec())?;
        outcome.map_err(StoreError::Refused)
    }

    pub fn view(&self) -> MemoryTables {
        self.state.lock().unwrap().0.clone()
    }

    pub fn count(&self, kind: &str) -> usize {
        self.proposed
            .lock()
            .unwrap()
            .iter()
            .filter(|known| *known == kind)
            .count()
    }
}

struct View(MemoryTables);

impl Tables for View {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        self.0.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        self.0.scan(from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.0.last(from, to)
    }
}

impl AccountStore for MemoryStore {
    fn tables(&self) -> Result<TablesBox, StoreError> {
        Ok(Box::new(View(self.view())))
    }

    fn applied_index(&self) -> u64 {
        self.state.lock().unwrap().1
    }

    fn member_id(&self) -> u64 {
        1 + self.member
    }

    fn propose(&self, command: Command) -> Proposed<'_, Applied> {
        Box::pin(async move {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            if self.cut_off.load(std::sync::atomic::Ordering::SeqCst) {
                return Err(StoreError::Unavailable("no leader".into()));
            }
            self.apply(&command)
        })
    }

    fn seal(&self, _: &str) -> Proposed<'_, Option<Checkpoint>> {
        Box::pin(async { Ok(None) })
    }
}
