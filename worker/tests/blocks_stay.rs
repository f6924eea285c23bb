//! A worker whose engine keeps its KV blocks out of the region (a GPU with its own memory): it neither takes blocks from a
//! peer nor computes prompts for one, and answers all the same.

mod support;

use baton_engine::{Engine, EngineError, MockEngine, StepBatch};
use baton_kvtransfer::Region;
use baton_model::KvGeometry;
use baton_proto::worker::{FinishReason, Generate};
use baton_worker::WorkerRole;
use std::sync::Arc;
use std::time::Duration;
use support::{Cell, request, slow_engine, within};

/// An engine whose blocks no transport reaches.
struct Stays(MockEngine);

impl Engine for Stays {
    fn geometry(&self) -> KvGeometry {
        self.0.geometry()
    }
    fn region(&self) -> Arc<Region> {
        self.0.region()
    }
    fn blocks_move(&self) -> bool {
        false
    }
    fn total_blocks(&self) -> u32 {
        self.0.total_blocks()
    }
    fn context_length(&self) -> usize {
        self.0.context_length()
    }
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }
    fn step(&mut self, batch: &StepBatch, layer_done: &mut dyn FnMut(usize)) -> Result<Vec<Option<u32>>, EngineError> {
        self.0.step(batch, layer_done)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_blocks_stay_hands_nothing_over_in_either_direction() {
    let engine = || slow_engine(Duration::ZERO);
    let cell = Cell::new().await;
    let lone = cell.worker("lone", WorkerRole::Combined, engine()).await;
    let stays = cell.worker("stays", WorkerRole::Combined, Stays(engine())).await;
    let usual = cell.worker("usual", WorkerRole::Combined, engine()).await;
    let expected = cell.gateway(&lone).await;
    for (asked, peer) in [(&stays, &usual), (&usual, &stays)] {
        let gateway = cell.gateway(asked).await;
        for n in 0..20 {
            let wanted = within("an answer", expected.generate(request(n))).await;
            let with_peer = Generate {
                prefill_peer: Some(peer.peer()),
                ..request(n)
            };
            let answer = within("an answer", gateway.generate(with_peer)).await;
            assert_ne!(answer.finish.reason(), FinishReason::Error, "{}", answer.finish.error);
            assert_eq!(answer.tokens, wanted.tokens, "request {n} to {}", asked.id);
            assert_eq!(answer.finish.prefill_worker_id, "", "computed where it was asked for");
        }
    }
    for node in [&stays, &usual] {
        let load = cell.at_rest(&node.id).await;
        assert_eq!(load.free_blocks + load.cached_blocks, 512, "{}", node.id);
    }
    stays.stop().await;
}
