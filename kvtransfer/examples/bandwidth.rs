//! How fast bytes move between two processes of this machine: every transport of the crate against `memcpy`.
//!
//! ```text
//! cargo run --release -p baton-kvtransfer --example bandwidth -- [--quick] [--iperf] [--only TRANSPORT]
//!     [--runs N] [--mib M] [--transfer-kib K]
//! ```
//!
//! The program starts itself a second time as the receiver. One *run* moves the whole sending region, `--mib` MiB,
//! into the receiving one, in transfers (pushes, each into a window of its own) of `--transfer-kib` KiB, a given number
//! of them in flight, each made of pieces of a given size that are not adjacent, as the blocks of a KV cache are. Both
//! regions are several times as large as the last-level cache, so every byte comes from and goes to memory, as with
//! KV that was computed a while ago. `memcpy` copies the same pieces in the same order on one thread of one process, and is
//! measured in turn with the transports, because a shared machine's memory bandwidth drifts. Each number is the median
//! of `--runs` runs. GB are 10^9 bytes; CPU seconds are those of both processes, all threads, per GB.
//!
//! `--only` measures one transport, by its name in the table, beside `memcpy`; the others are not even started.
//!
//! With `--iperf`, `iperf3` (TCP in clear, one stream, for a second) runs in turn with them before each size of pieces.
//!
//! Prints a table, and a JSON object a line for each cell.

use baton_identity::{Authority, Identity, Role};
use baton_kvtransfer::{Agent, AgentConfig, Region, TransferLimits, TransportKind, TransportOptions};
use bytes::Bytes;
use futures_util::StreamExt;
use rustix::time::{ClockId, clock_gettime};
use std::error::Error;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;
use tokio::runtime::Runtime;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The transports, with what makes an agent use each.
const TRANSPORTS: [(TransportKind, TransportOptions); 4] = [
    (TransportKind::SharedMemory, only(true, false, false)),
    (TransportKind::Tcp, only(false, true, false)),
    (TransportKind::Quic, only(false, false, false)),
    (TransportKind::Nixl, only(false, false, true)),
];

const fn only(shared_memory: bool, tcp: bool, nixl: bool) -> TransportOptions {
    TransportOptions {
        shared_memory,
        tcp,
        nixl,
    }
}

/// Those to measure: the one called `only`, or all, of which NIXL only where `BATON_NIXL_LIBRARY` names its library.
fn transports(only: Option<&str>) -> Result<&'static [(TransportKind, TransportOptions)]> {
    if let Some(only) = only {
        let named = TRANSPORTS.iter().position(|(kind, _)| kind.to_string() == only);
        let at = named.ok_or_else(|| format!("there is no transport {only}"))?;
        return Ok(&TRANSPORTS[at..=at]);
    }
    let nixl = std::env::var_os("BATON_NIXL_LIBRARY").is_some();
    Ok(&TRANSPORTS[..TRANSPORTS.len() - usize::from(!nixl)])
}

struct Options {
    quick: bool,
    iperf: bool,
    runs: usize,
    bytes: usize,
    transfer: usize,
    only: Option<String>,
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        quick: false,
        iperf: false,
        runs: 0,
        bytes: 0,
        transfer: 16 << 20,
        only: None,
    };
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<usize> {
            let value = arguments.next().ok_or("an option wants a number")?;
            value
                .parse()
                .ok()
                .filter(|&n| n > 0)
                .ok_or_else(|| format!("{value} is not a number").into())
        };
        match argument.as_str() {
            "--quick" => options.quick = true,
            "--iperf" => options.iperf = true,
            "--runs" => options.runs = number()?,
            "--mib" => options.bytes = number()? << 20,
            "--transfer-kib" => options.transfer = number()? << 10,
            "--only" => options.only = Some(arguments.next().ok_or("--only wants a transport")?),
            // The second process.
            "--receive" => {
                let bytes = number()?;
                let dir = arguments.next().ok_or("no directory")?;
                return receive(Path::new(&dir), bytes, transports(options.only.as_deref())?);
            }
            other => return Err(format!("unknown option {other}; see the head of examples/bandwidth.rs").into()),
        }
    }
    if options.runs == 0 {
        options.runs = if options.quick { 3 } else { 7 };
    }
    if options.bytes == 0 {
        options.bytes = if options.quick { 256 << 20 } else { 512 << 20 };
    }
    if !options.bytes.is_multiple_of(options.transfer) || !options.transfer.is_multiple_of(16 << 10) {
        return Err("--mib must be whole transfers, and a transfer whole pieces of 16 KiB".into());
    }
    send(&options)
}

/// One agent for each transport.
fn agents(dir: &Path, name: &str, transports: &[(TransportKind, TransportOptions)]) -> Result<Vec<Agent>> {
    let identity = Identity::load(dir, name)?;
    let bind = |(_, transports): &(TransportKind, TransportOptions)| {
        Ok(Agent::bind(AgentConfig {
            name: name.into(),
            bind: "127.0.0.1:0".parse()?,
            identity: &identity,
            digest: [0; 32],
            limits: TransferLimits::default(),
            transports: transports.clone(),
        })?)
    };
    transports.iter().map(bind).collect()
}

/// CPU time of this process so far, in nanoseconds.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The receiver: obeys lines on its input until that ends.
fn receive(dir: &Path, bytes: usize, transports: &[(TransportKind, TransportOptions)]) -> Result<()> {
    let runtime = Runtime::new()?;
    let _inside = runtime.enter();
    let agents = agents(dir, "receiver", transports)?;
    let region = Region::new(bytes)?;
    assert!(region.copy_in(0, &vec![0; bytes]));
    let addresses: Vec<_> = agents.iter().map(|agent| agent.local_addr().to_string()).collect();
    println!("{}", addresses.join(" "));
    let mut windows = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["open", agent, transfer] => {
                let (agent, transfer) = (&agents[agent.parse::<usize>()?], transfer.parse::<usize>()?);
                windows = (0..bytes)
                    .step_by(transfer)
                    .map(|start| agent.open_window(&region, std::iter::once(start..start + transfer).collect()))
                    .collect::<std::result::Result<_, _>>()?;
                let ids: Vec<_> = windows.iter().map(|window| window.id().to_string()).collect();
                println!("{}", ids.join(" "));
            }
            ["cpu"] => println!("{}", cpu_ns()),
            ["close"] => {
                windows.clear();
                println!("closed");
            }
            ["clear"] => {
                assert!(region.copy_in(0, &vec![0; bytes]));
                println!("cleared");
            }
            ["digest"] => println!("{}", digest(&region)),
            _ => return Err(format!("unknown order {line}").into()),
        }
    }
    Ok(())
}

/// Tells regions with different bytes, or the same in another order, apart.
fn digest(region: &Region) -> u64 {
    let mut part = vec![0; 1 << 20];
    let mut sum = 0u64;
    for start in (0..region.len()).step_by(part.len()) {
        assert!(region.copy_out(start, &mut part));
        for word in part.as_chunks::<8>().0 {
            sum = sum.rotate_left(5).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from_le_bytes(*word);
        }
    }
    sum
}

/// The other process, ended with this value.
struct Receiver {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Receiver {
    fn start(dir: &Path, bytes: usize, only: Option<&str>) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(only.into_iter().flat_map(|only| ["--only", only]))
            .args(["--receive", &bytes.to_string()])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (input, output) = (
            child.stdin.take().ok_or("no input")?,
            child.stdout.take().ok_or("no output")?,
        );
        Ok(Self {
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    fn order(&mut self, order: &str) -> Result<String> {
        writeln!(self.input, "{order}")?;
        self.line()
    }

    fn line(&mut self) -> Result<String> {
        Ok(self.output.next().ok_or("the receiver ended")??)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Fails only if it is dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pieces of one transfer in an order in which no two are adjacent: from the end to the start.
fn pieces(start: usize, transfer: usize, piece: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (start..start + transfer)
        .step_by(piece)
        .rev()
        .map(move |at| at..(at + piece).min(start + transfer))
}

/// What one run took.
#[derive(Clone, Copy)]
struct Sample {
    seconds: f64,
    cpu_seconds: f64,
}

/// The sending side.
struct Bench {
    runtime: Runtime,
    kinds: &'static [(TransportKind, TransportOptions)],
    agents: Vec<Agent>,
    peers: Vec<SocketAddr>,
    receiver: Receiver,
    source: Arc<Region>,
    /// Source and target of memcpy.
    local: (Vec<u8>, Vec<u8>),
    transfer: usize,
}

impl Bench {
    fn memcpy(&mut self, piece: usize) -> Sample {
        let (source, target) = &mut self.local;
        let (start, cpu) = (Instant::now(), cpu_ns());
        for transfer in (0..source.len()).step_by(self.transfer) {
            for range in pieces(transfer, self.transfer, piece) {
                target[range.clone()].copy_from_slice(&source[range]);
            }
        }
        std::hint::black_box(&target);
        Sample {
            seconds: start.elapsed().as_secs_f64(),
            cpu_seconds: (cpu_ns() - cpu) as f64 / 1e9,
        }
    }

    fn transport(&mut self, index: usize, piece: usize, in_flight: usize) -> Result<Sample> {
        let ids = self.receiver.order(&format!("open {index} {}", self.transfer))?;
        let windows: Vec<u64> = ids.split(' ').map(str::parse).collect::<std::result::Result<_, _>>()?;
        let (agent, peer, source, transfer) = (&self.agents[index], self.peers[index], &self.source, self.transfer);
        let theirs: u64 = self.receiver.order("cpu")?.parse()?;
        let (start, cpu) = (Instant::now(), cpu_ns());
        let pushes = futures_util::stream::iter(windows.into_iter().enumerate()).map(|(slot, window)| async move {
            let push = agent.push(peer, window, source.clone());
            let writer = push.writer();
            for range in pieces(slot * transfer, transfer, piece) {
                let remote = range.start;
                writer.write(range, remote)?;
            }
            push.finish(Bytes::new()).await
        });
        let reports: Vec<_> = self.runtime.block_on(pushes.buffer_unordered(in_flight).collect());
        let (seconds, ours) = (start.elapsed().as_secs_f64(), cpu_ns() - cpu);
        let theirs = self.receiver.order("cpu")?.parse::<u64>()? - theirs;
        for report in reports {
            let used = report?.transport;
            if used != self.kinds[index].0 {
                return Err(format!("{used} carried a push instead of {}", self.kinds[index].0).into());
            }
        }
        self.receiver.order("close")?;
        Ok(Sample {
            seconds,
            cpu_seconds: (ours + theirs) as f64 / 1e9,
        })
    }
}

/// GB/s and CPU seconds per GB: the medians.
fn medians(samples: &[Sample], bytes: usize) -> (f64, f64) {
    let median = |value: &dyn Fn(&Sample) -> f64| {
        let mut values: Vec<_> = samples.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let gb = bytes as f64 / 1e9;
    (
        gb / median(&|sample| sample.seconds),
        median(&|sample| sample.cpu_seconds) / gb,
    )
}

/// GB/s of one run of iperf3 on loopback.
fn iperf() -> Result<f64> {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port()
        .to_string();
    let mut server = Command::new("iperf3")
        .args(["--server", "--one-off", "--forceflush", "--port", &port])
        .stdout(Stdio::piped())
        .spawn()?;
    // It says that it listens before anything else.
    let mut lines = BufReader::new(server.stdout.take().ok_or("no output")?).lines();
    while !lines.next().ok_or("iperf3 does not listen")??.contains("listening") {}
    let client = Command::new("iperf3")
        .args(["--client", "127.0.0.1", "--json", "--time", "1", "--port", &port])
        .output();
    // It ends with its client, unless that could not be run.
    let _ = server.kill();
    let _ = server.wait();
    let report: serde_json::Value = serde_json::from_slice(&client?.stdout)?;
    let bits = report.pointer("/end/sum_received/bits_per_second");
    Ok(bits
        .and_then(serde_json::Value::as_f64)
        .ok_or("iperf3 reports no rate")?
        / 8e9)
}

fn send(options: &Options) -> Result<()> {
    let transports = transports(options.only.as_deref())?;
    let dir = tempfile::tempdir()?;
    let authority = Authority::load_or_create(dir.path())?;
    for name in ["sender", "receiver"] {
        authority.issue(Role::Worker, name)?.save(dir.path(), name)?;
    }
    let runtime = Runtime::new()?;
    let mut receiver = Receiver::start(dir.path(), options.bytes, options.only.as_deref())?;
    let peers = receiver
        .line()?
        .split(' ')
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    let agents = {
        let _inside = runtime.enter();
        agents(dir.path(), "sender", transports)?
    };
    let source = Region::new(options.bytes)?;
    let pattern: Vec<u8> = (0..options.bytes)
        .map(|at| (at.wrapping_mul(0x9e37_79b1) >> 13) as u8)
        .collect();
    assert!(source.copy_in(0, &pattern));
    let mut bench = Bench {
        runtime,
        kinds: transports,
        agents,
        peers,
        receiver,
        source,
        local: (pattern, vec![1; options.bytes]),
        transfer: options.transfer,
    };

    let cache = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size");
    println!(
        "{} MiB from one region into another, last-level cache {}; transfers of {} KiB; {} cores; median of {} runs",
        options.bytes >> 20,
        cache.as_deref().unwrap_or("unknown").trim(),
        options.transfer >> 10,
        std::thread::available_parallelism()?,
        options.runs,
    );
    // Connections, first touches, and whether every byte arrives.
    let digest = digest(&bench.source).to_string();
    for (index, (kind, _)) in transports.iter().enumerate() {
        bench.receiver.order("clear")?;
        bench.transport(index, 64 << 10, 4)?;
        if bench.receiver.order("digest")? != digest {
            return Err(format!("{kind} delivered other bytes than were sent").into());
        }
    }
    bench.memcpy(64 << 10);

    let (sizes, flights): (&[usize], &[usize]) = match options.quick {
        true => (&[16, 256, 4096], &[1, 16]),
        false => (&[16, 64, 256, 1024, 4096], &[1, 4, 16]),
    };
    let mut lines = Vec::new();
    println!(
        "\n piece KiB  in flight   memcpy GB/s (CPU s/GB)  {}",
        transports
            .iter()
            .map(|(kind, _)| format!("{kind} GB/s (CPU s/GB) of memcpy"))
            .collect::<Vec<_>>()
            .join("   ")
    );
    for &kib in sizes {
        if options.iperf {
            let mut rates = (0..options.runs).map(|_| iperf()).collect::<Result<Vec<_>>>()?;
            rates.sort_by(f64::total_cmp);
            let rate = rates[rates.len() / 2];
            println!("{kib:>10}     iperf3 {rate:>13.2}");
            lines.push(format!(
                "{{\"transport\":\"iperf3\",\"piece_bytes\":{},\"gigabytes_per_second\":{rate:.3}}}",
                kib << 10
            ));
        }
        for &in_flight in flights {
            let piece = (kib << 10).min(options.transfer);
            let mut samples = vec![Vec::new(); 1 + transports.len()];
            for _ in 0..options.runs {
                samples[0].push(bench.memcpy(piece));
                for index in 0..transports.len() {
                    samples[index + 1].push(bench.transport(index, piece, in_flight)?);
                }
            }
            let (memcpy, memcpy_cpu) = medians(&samples[0], options.bytes);
            let mut row = format!("{kib:>10} {in_flight:>10} {memcpy:>13.2} ({memcpy_cpu:.3})      ");
            let names = std::iter::once("memcpy".to_owned()).chain(transports.iter().map(|(kind, _)| kind.to_string()));
            for (name, samples) in names.zip(&samples) {
                let (rate, cpu) = medians(samples, options.bytes);
                if name != "memcpy" {
                    row += &format!("  {rate:>10.2} ({cpu:.3})  {:>4.0} %         ", rate / memcpy * 100.0);
                }
                lines.push(format!(
                    "{{\"transport\":\"{name}\",\"piece_bytes\":{piece},\"in_flight\":{in_flight},\
                     \"gigabytes_per_second\":{rate:.3},\"cpu_seconds_per_gigabyte\":{cpu:.4},\"of_memcpy\":{:.3}}}",
                    rate / memcpy
                ));
            }
            println!("{}", row.trim_end());
        }
    }
    println!();
    lines.iter().for_each(|line| println!("{line}"));
    Ok(())
}
