//! NIXL's verbs between two agents in one process: introduce, write, read, notify, and what happens when a lease ends.
//!
//! ```text
//! cargo run --release -p baton-kvtransfer --example read_write_notify -- [MiB, default 64]
//! ```

use baton_identity::{Authority, Role};
use baton_kvtransfer::{
    Agent, AgentConfig, AgentMetadata, DescriptorList, LeaseOptions, Region, TransferLimits, TransferOptions,
    TransportOptions,
};
use bytes::Bytes;
use futures_util::StreamExt;
use std::error::Error;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mib = std::env::args()
        .nth(1)
        .map(|argument| argument.parse::<usize>())
        .transpose()?;
    let len = mib.unwrap_or(64).max(1) << 20;

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

    // Memory is registered, and metadata travels as bytes, by whatever the two sides share.
    let blocks = prefill.register(Region::new(len)?);
    let pattern: Vec<u8> = (0..len).map(|at| (at / 7) as u8).collect();
    assert!(blocks.memory().copy_in(0, &pattern));
    let target = decode.register(Region::new(len)?);
    let to_decode = prefill.add_peer(AgentMetadata::decode(&decode.metadata().encode())?)?;
    let to_prefill = decode.add_peer(AgentMetadata::decode(&prefill.metadata().encode())?)?;
    let all = DescriptorList::of(0..len, 0);

    // Write: into a window of the other side, which hears of it when the last byte is there.
    let window = decode.open_window(&target, std::iter::once(0..len).collect())?;
    let options = TransferOptions {
        notification: Some(Bytes::from_static(b"your blocks are there")),
        ..TransferOptions::default()
    };
    let report = prefill
        .write(&to_decode, window.id(), &blocks, &all, options)
        .wait()
        .await?;
    let mut notifications = Box::pin(decode.notifications());
    let told = notifications.next().await.ok_or("the agent is closed")?;
    println!(
        "wrote {} MiB in {:?}; {} said {:?}",
        report.bytes >> 20,
        report.elapsed,
        told.peer,
        told.payload
    );
    drop(window);

    // Read: the owner lends its blocks, for one read, and has them back when it is done.
    let once = LeaseOptions {
        reads_max: Some(1),
        ..LeaseOptions::default()
    };
    let export = prefill.export(&blocks, std::iter::once(0..len).collect(), once)?;
    let read = decode.read(&to_prefill, export.grant(), &target, &all, TransferOptions::default());
    let report = read.wait().await?;
    println!(
        "read {} MiB in {:?}; then {}",
        report.bytes >> 20,
        report.elapsed,
        export.ended().await
    );

    // Late: the lease is over, and the answer comes at once.
    let late = decode.read(&to_prefill, export.grant(), &target, &all, TransferOptions::default());
    println!(
        "a second read: {}",
        late.wait()
            .await
            .err()
            .map_or_else(String::new, |error| error.to_string())
    );

    // A word without bytes.
    decode.notify(&to_prefill, Bytes::from_static(b"thank you")).await?;
    let thanks = Box::pin(prefill.notifications())
        .next()
        .await
        .ok_or("the agent is closed")?;
    println!("{} said {:?}", thanks.peer, thanks.payload);

    let mut landed = vec![0; len];
    assert!(target.memory().copy_out(0, &mut landed) && landed == pattern);
    prefill.close().await;
    decode.close().await;
    Ok(())
}
