//! A PostgreSQL of the test's own: in a temporary directory, on a Unix socket there, as a user that is not root (which
//! PostgreSQL refuses). Gone when dropped.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for it to start or stop.
const WAIT_MAX: Duration = Duration::from_secs(30);

pub struct Server {
    directory: TempDir,
    programs: PathBuf,
    user: Option<(u32, u32)>,
    process: Option<Child>,
}

impl Server {
    /// Starts one; nothing, with a message, where PostgreSQL is not installed.
    pub fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            println!("skipped: PostgreSQL's initdb was not found (Debian: apt-get install postgresql)");
            return None;
        };
        let directory = tempfile::Builder::new()
            .prefix("baton-pg")
            .tempdir()
            .expect("a directory");
        let user = rustix::process::geteuid().is_root().then(unprivileged);
        if let Some((user, group)) = user {
            std::os::unix::fs::chown(directory.path(), Some(user), Some(group)).expect("root may give it away");
        }
        let mut server = Self {
            directory,
            programs,
            user,
            process: None,
        };
        let made = server
            .command("initdb")
            .args([
                "--username",
                "baton",
                "--auth",
                "trust",
                "--encoding",
                "UTF8",
                "--locale",
                "C",
                "--no-sync",
                "--pgdata",
            ])
            .arg(server.path("data"))
            .stdout(Stdio::null())
            .output()
            .expect("initdb runs");
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        server.run();
        Some(server)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command
            .current_dir(self.directory.path())
            .env_clear()
            .stdin(Stdio::null());
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        command
    }

    /// Starts the server on its directory.
    pub fn run(&mut self) {
        let log = std::fs::File::create(self.path("log")).expect("writable");
        let process = self
            .command("postgres")
            .args([
                "-c",
                "listen_addresses=",
                "-c",
                "shared_buffers=16MB",
                "-c",
                "max_connections=20",
                "-k",
            ])
            .arg(self.directory.path())
            .arg("-D")
            .arg(self.path("data"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("postgres runs");
        self.process = Some(process);
        let deadline = Instant::now() + WAIT_MAX;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        // Its own thread, because a test may be inside a runtime already.
        let address = self.address();
        let ready = std::thread::spawn(move || {
            while Instant::now() < deadline {
                if runtime.block_on(baton_ledger_postgres::connect(&address, None)).is_ok() {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            false
        });
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        assert!(ready.join().expect("no panic"), "PostgreSQL does not start: {log}");
    }

    /// Stops it as a crash would: nothing is written, the next start recovers.
    pub fn crash(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let pid = i32::try_from(process.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .expect("a process");
        // "Immediate shutdown" in PostgreSQL's words. SIGKILL would leave its children behind.
        rustix::process::kill_process(pid, rustix::process::Signal::QUIT).expect("it is ours");
        let deadline = Instant::now() + WAIT_MAX;
        while process.try_wait().expect("a child").is_none() {
            assert!(Instant::now() < deadline, "PostgreSQL does not stop");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What a client connects to.
    pub fn address(&self) -> String {
        format!(
            "host={} user=baton dbname=postgres sslmode=disable",
            self.directory.path().display()
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.crash();
    }
}

/// Where `initdb` and `postgres` are: on the path, or where Debian puts the newest.
fn programs() -> Option<PathBuf> {
    let on_path = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect::<Vec<_>>())
        .unwrap_or_default();
    let debian = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"));
    let mut debian: Vec<PathBuf> = debian.collect();
    debian.sort();
    let has = |directory: &Path| directory.join("initdb").is_file() && directory.join("postgres").is_file();
    on_path
        .into_iter()
        .chain(debian.into_iter().rev())
        .find(|directory| has(directory))
}

/// The user and group of PostgreSQL, else of nobody.
fn unprivileged() -> (u32, u32) {
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let find = |name: &str| {
        let fields: Vec<&str> = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?
            .split(':')
            .collect();
        Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
    };
    find("postgres").or_else(|| find("nobody")).unwrap_or((65_534, 65_534))
}
