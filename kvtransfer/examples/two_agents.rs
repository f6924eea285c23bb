//! Two agents in one process: one computes "layers" and pushes them into the other's window while it computes.
//!
//! ```text
//! cargo run --release -p baton-kvtransfer --example two_agents -- [MiB, default 256] [layers, default 32] [compute ms per layer, default 2]
//! ```
//!
//! Prints what a push reports: bytes, time, throughput and how much of the sending was hidden behind compute. Both
//! agents share this machine's cores, so copying and computing compete; on two machines they do not.

use baton_identity::{Authority, Role};
use baton_kvtransfer::{ALIGN, Agent, AgentConfig, Region, TransferLimits, TransportOptions};
use bytes::Bytes;
use std::error::Error;
use std::time::Duration;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut numbers = std::env::args().skip(1).map(|argument| argument.parse::<usize>());
    let mib = numbers.next().transpose()?.unwrap_or(256).max(1);
    let layers = numbers.next().transpose()?.unwrap_or(32).max(1);
    let compute_ms = numbers.next().transpose()?.unwrap_or(2);
    let layer_bytes = ((mib << 20) / layers).next_multiple_of(ALIGN);
    let total = layer_bytes * layers;

    // A cluster's CA and two workers of it. In a real cluster `baton up` or an operator issues these.
    let dir = tempfile::tempdir()?;
    let authority = Authority::load_or_create(dir.path())?;
    let agent = |name: &str| -> Result<Agent, Box<dyn Error>> {
        Ok(Agent::bind(AgentConfig {
            name: name.into(),
            bind: "127.0.0.1:0".parse()?,
            identity: &authority.issue(Role::Worker, name)?,
            digest: [0; 32],
            limits: TransferLimits::default(),
            transports: TransportOptions::default(),
        })?)
    };
    let (prefill, decode) = (agent("prefill-0")?, agent("decode-0")?);

    let source = Region::new(total)?;
    let pattern: Vec<u8> = (0..total).map(|at| (at / 7) as u8).collect();
    assert!(source.copy_in(0, &pattern));
    let target = Region::new(total)?;

    // The first push pays for the connection and for touching fresh memory.
    for round in ["first push", "second push", "third push"] {
        let window = decode.open_window(&target, std::iter::once(0..total).collect())?;
        let push = prefill.push(decode.local_addr(), window.id(), source.clone());
        let writer = push.writer();
        let compute = std::thread::spawn(move || {
            for start in (0..total).step_by(layer_bytes) {
                std::thread::sleep(Duration::from_millis(compute_ms as u64));
                writer.write(start..start + layer_bytes, start)?;
            }
            Ok::<_, baton_kvtransfer::PushError>(())
        });
        while !compute.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        compute.join().map_err(|_| "the computing thread panicked")??;
        let report = push.finish(Bytes::from_static(b"first token")).await?;
        let payload = window.wait().await?;
        println!(
            "{round}: {} MiB over {} in {} pieces, {:?} from the first write, {:?} after finish, {:.0} MiB/s, {:.0} % hidden, \
             payload {payload:?}",
            report.bytes >> 20,
            report.transport,
            report.frames,
            report.elapsed(),
            report.exposed(),
            (report.bytes >> 20) as f64 / report.elapsed().as_secs_f64(),
            report.overlap * 100.0,
        );
    }
    let mut landed = vec![0; total];
    assert!(target.copy_out(0, &mut landed) && landed == pattern);
    println!("every byte arrived; {:?}", decode.stats());
    prefill.close().await;
    decode.close().await;
    Ok(())
}
