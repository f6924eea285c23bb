//! Bandwidth and CPU cost of the network transports between two processes on loopback.
//!
//! ```text
//! cargo run --release -p baton-kvtransfer --example network_bandwidth -- [--transport quic|tcp|both] [--iperf]
//!     [--pieces KIB,KIB,...] [--flight N,N,...] [--rounds N] [--region MIB] [--push MIB]
//! ```
//!
//! The process starts itself again as the receiver. A round fills the receiver's whole region (by default 512 MiB, far
//! beyond any last-level cache) with pushes of 16 MiB each, cut into pieces of the given size that land in reverse
//! order, so that neighbours cannot be merged; a given number of pushes is in flight. Reported are the median over the
//! rounds of bytes per wall-clock second, and the CPU seconds (user and system) per gigabyte that each process spent.
//! Every transport is measured in each round in turn, so that drift of the machine hits them alike. The last round's
//! bytes are compared with what was sent. With `--iperf`, `iperf3` (TCP, in clear, one stream) runs before each piece
//! size in the same run, and every figure is also given relative to the median of its runs.
//!
//! It does not measure shared memory, nor latency; a gigabyte is 10^9 bytes.

use baton_identity::{Authority, Identity, Role};
use baton_kvtransfer::{Agent, AgentConfig, Network, Region, TransferLimits, Window};
use bytes::Bytes;
use rustix::time::{ClockId, clock_gettime};
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// What to measure.
struct Plan {
    networks: Vec<Network>,
    iperf: bool,
    pieces: Vec<usize>,
    flights: Vec<usize>,
    rounds: usize,
    region: usize,
    push: usize,
}

impl Plan {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self> {
        let mut plan = Self {
            networks: vec![Network::Quic, Network::Tcp],
            iperf: false,
            pieces: [16, 64, 256, 1024, 4096].map(|kib| kib << 10).to_vec(),
            flights: vec![1, 4, 16],
            rounds: 3,
            region: 512 << 20,
            push: 16 << 20,
        };
        while let Some(flag) = args.next() {
            if flag == "--iperf" {
                plan.iperf = true;
                continue;
            }
            let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
            let numbers = || {
                let parsed: std::result::Result<Vec<usize>, _> = value.split(',').map(str::parse).collect();
                parsed.map_err(|_| format!("{flag} takes numbers, not {value:?}"))
            };
            let number = || numbers().map(|all| all.into_iter().next().unwrap_or(0).max(1));
            match flag.as_str() {
                "--transport" if value == "both" => {}
                "--transport" => plan.networks = vec![network(&value)?],
                "--pieces" => plan.pieces = numbers()?.into_iter().map(|kib| kib.max(1) << 10).collect(),
                "--flight" => plan.flights = numbers()?,
                "--rounds" => plan.rounds = number()?,
                "--region" => plan.region = number()? << 20,
                "--push" => plan.push = number()? << 20,
                _ => return Err(format!("unknown option {flag}").into()),
            }
        }
        if !plan.region.is_multiple_of(plan.push) || plan.pieces.iter().any(|&piece| !plan.push.is_multiple_of(piece)) {
            return Err("pieces must divide the push, and pushes the region".into());
        }
        Ok(plan)
    }
}

fn network(name: &str) -> Result<Network> {
    match name {
        "quic" => Ok(Network::Quic),
        "tcp" => Ok(Network::Tcp),
        _ => Err(format!("no transport is called {name:?}").into()),
    }
}

fn name(network: Network) -> &'static str {
    match network {
        Network::Quic => "quic",
        Network::Tcp => "tcp",
    }
}

/// CPU time of this process so far, user and system.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn agent(dir: &Path, who: &str, network: Network) -> Result<Agent> {
    Ok(Agent::bind(AgentConfig {
        name: who.into(),
        bind: "127.0.0.1:0".parse()?,
        identity: &Identity::load(dir, who)?,
        digest: [0; 32],
        limits: TransferLimits {
            network,
            ..TransferLimits::default()
        },
    })?)
}

/// Word `at` of the source.
fn word(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5a5a
}

/// The receiver: obeys lines on stdin until it ends.
async fn receiver(dir: &Path, network: Network, region: usize, push: usize) -> Result<()> {
    let agent = agent(dir, "receiver", network)?;
    let region = Region::new(region)?;
    println!("{}", agent.local_addr());
    let mut windows: Vec<Window> = Vec::new();
    let (tell, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        std::io::stdin()
            .lock()
            .lines()
            .map_while(std::io::Result::ok)
            .all(|line| tell.send(line).is_ok())
    });
    while let Some(line) = lines.recv().await {
        match line.split_once(' ').unwrap_or((&line, "")) {
            ("open", _) => {
                windows.clear();
                for start in (0..region.len()).step_by(push) {
                    windows.push(agent.open_window(&region, std::iter::once(start..start + push).collect())?);
                }
                let ids: Vec<_> = windows.iter().map(|window| window.id().to_string()).collect();
                println!("{}", ids.join(","));
            }
            ("cpu", _) => println!("{}", cpu().as_nanos()),
            ("check", piece) => {
                for window in &windows {
                    window.wait().await?;
                }
                let (piece, mut landed) = (piece.parse::<usize>()?, vec![0; push]);
                let mut wrong = 0;
                for start in (0..region.len()).step_by(push) {
                    assert!(region.copy_out(start, &mut landed));
                    for (at, got) in landed.chunks_exact(8).enumerate() {
                        // The pieces of a push are in reverse order.
                        let (which, within) = (at * 8 / piece, at * 8 % piece);
                        let sent = start + (push / piece - 1 - which) * piece + within;
                        wrong += usize::from(got != word(sent / 8).to_le_bytes());
                    }
                }
                println!("{wrong}");
            }
            _ => return Err(format!("unknown command {line:?}").into()),
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The other process, and the agent that pushes to it.
struct Pair {
    network: Network,
    agent: Agent,
    peer: SocketAddr,
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Pair {
    fn start(dir: &Path, network: Network, plan: &Plan) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--receiver")
            .arg(dir)
            .args([name(network), &plan.region.to_string(), &plan.push.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let ask = child.stdin.take().ok_or("the receiver has no stdin")?;
        let mut answers = BufReader::new(child.stdout.take().ok_or("the receiver has no stdout")?);
        let mut line = String::new();
        answers.read_line(&mut line)?;
        Ok(Self {
            network,
            agent: agent(dir, "sender", network)?,
            peer: line.trim().parse()?,
            child,
            ask,
            answers,
        })
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.ask, "{command}")?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err("the receiver died".into());
        }
        Ok(line.trim().to_owned())
    }

    fn receiver_cpu(&mut self) -> Result<Duration> {
        Ok(Duration::from_nanos(self.ask("cpu")?.parse()?))
    }

    /// Fills the receiver's region once.
    async fn round(&mut self, source: &Arc<Region>, push: usize, piece: usize, flight: usize) -> Result<Sample> {
        let ids: Vec<u64> = self.ask("open")?.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let before = (cpu(), self.receiver_cpu()?, Instant::now());
        let mut running = JoinSet::new();
        for (at, id) in ids.into_iter().enumerate() {
            if running.len() == flight {
                running.join_next().await.ok_or("no push is running")???;
            }
            let (agent, peer, source) = (self.agent.clone(), self.peer, source.clone());
            running.spawn(async move {
                let start = at * push;
                let sending = agent.push(peer, id, source);
                let writer = sending.writer();
                for local in (start..start + push).step_by(piece) {
                    // The last piece first at the receiver.
                    writer.write(local..local + piece, start + (start + push - local) - piece)?;
                }
                sending.finish(Bytes::new()).await
            });
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        let wall = before.2.elapsed();
        let gigabytes = source.len() as f64 / 1e9;
        Ok(Sample {
            rate: gigabytes / wall.as_secs_f64(),
            sender_cpu: (cpu() - before.0).as_secs_f64() / gigabytes,
            receiver_cpu: (self.receiver_cpu()? - before.1).as_secs_f64() / gigabytes,
        })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Fails only if it is dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Clone, Copy)]
struct Sample {
    /// GB/s.
    rate: f64,
    /// CPU seconds per GB.
    sender_cpu: f64,
    receiver_cpu: f64,
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One run of iperf3 over loopback, in GB/s.
fn iperf() -> Result<f64> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port()
        .to_string();
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-p", &port])
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("cannot run iperf3 ({error}); install it or leave --iperf out"))?;
    let outcome = (0..50).find_map(|_| {
        // The server needs a moment; until then connecting is refused.
        std::thread::sleep(Duration::from_millis(50));
        let client = ["-c", "127.0.0.1", "-p", &port, "-t", "2", "-J"];
        let output = Command::new("iperf3").args(client).output().ok()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        report["end"]["sum_received"]["bits_per_second"].as_f64()
    });
    let _ = server.kill();
    let _ = server.wait();
    Ok(outcome.ok_or("iperf3 gave no result")? / 8e9)
}

async fn measure(plan: &Plan) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let authority = Authority::load_or_create(dir.path())?;
    for who in ["sender", "receiver"] {
        authority.issue(Role::Worker, who)?.save(dir.path(), who)?;
    }
    let source = Region::new(plan.region)?;
    for (at, chunk) in (0..plan.region).step_by(4096).enumerate() {
        let page: Vec<u8> = (0..512)
            .flat_map(|index| word(at * 512 + index).to_le_bytes())
            .collect();
        assert!(source.copy_in(chunk, &page));
    }
    let mut pairs = Vec::new();
    for &network in &plan.networks {
        pairs.push(Pair::start(dir.path(), network, plan)?);
    }
    for pair in &mut pairs {
        // Connections are made and memory is touched before anything counts.
        let flight = plan.flights.iter().copied().max().unwrap_or(1);
        pair.round(&source, plan.push, plan.push, flight).await?;
    }
    let (mut clear, mut rows) = (Vec::new(), Vec::new());
    for &piece in &plan.pieces {
        if plan.iperf {
            clear.push(iperf()?);
        }
        for &flight in &plan.flights {
            let mut samples = vec![Vec::new(); pairs.len()];
            for _ in 0..plan.rounds {
                for (pair, samples) in pairs.iter_mut().zip(&mut samples) {
                    samples.push(pair.round(&source, plan.push, piece, flight).await?);
                }
            }
            for (pair, samples) in pairs.iter_mut().zip(&samples) {
                let wrong = pair.ask(&format!("check {piece}"))?;
                if wrong != "0" {
                    return Err(format!("{} delivered {wrong} wrong words", name(pair.network)).into());
                }
                rows.push((pair.network, piece, flight, samples.clone()));
            }
        }
    }
    let clear = median(clear.into_iter());
    if plan.iperf {
        println!("iperf3, TCP in clear, one stream: {clear:.2} GB/s (median)");
    }
    println!("transport  piece KiB  in flight   GB/s  sender CPU s/GB  receiver CPU s/GB  of iperf3");
    for (network, piece, flight, samples) in rows {
        let rate = median(samples.iter().map(|sample| sample.rate));
        println!(
            "{:<9} {:>10} {flight:>10} {rate:>6.2} {:>16.3} {:>18.3} {:>10}",
            name(network),
            piece >> 10,
            median(samples.iter().map(|sample| sample.sender_cpu)),
            median(samples.iter().map(|sample| sample.receiver_cpu)),
            if plan.iperf {
                format!("{:.0} %", rate / clear * 100.0)
            } else {
                "-".into()
            },
        );
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, dir, transport, region, push] = &args[..]
        && flag == "--receiver"
    {
        return receiver(Path::new(dir), network(transport)?, region.parse()?, push.parse()?).await;
    }
    measure(&Plan::parse(args.into_iter())?).await
}
