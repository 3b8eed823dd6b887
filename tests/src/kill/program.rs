//! The program under test: where it is, starting it, killing it, asking it.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cryptfold_nvmf_initiator::ConnectOptions;
use serde_json::Value;

/// Name of the subsystem.
pub const NQN: &str = "nqn.2026-01.io.cryptfold:kill";
/// Longest start or orderly end.
const PATIENCE: Duration = Duration::from_secs(120);

/// The `cryptfold` of the profile that the caller was built with; cargo builds it if it is not there.
///
/// # Errors
/// Why there is none.
pub fn find_or_build() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|e| format!("the path of this program: {e}"))?;
    // target/PROFILE/deps/TEST or target/PROFILE/PROGRAM
    let dir =
        own.ancestors().skip(1).find(|d| !d.ends_with("deps")).ok_or("this program is in no directory")?;
    let program = dir.join("cryptfold");
    if program.is_file() {
        return Ok(program);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--locked", "-p", "cryptfold"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if let Some(target) = dir.parent() {
        command.arg("--target-dir").arg(target);
    }
    if dir.ends_with("release") {
        command.arg("--release");
    }
    let status = command
        .status()
        .map_err(|e| format!("{} is missing and cargo can not be run: {e}", program.display()))?;
    match status.success() && program.is_file() {
        true => Ok(program),
        false => {
            Err(format!("{} is missing, and `{command:?}` did not make it ({status})", program.display()))
        }
    }
}

/// The directory in which a pool lives through many processes.
pub struct Place {
    program: PathBuf,
    dir: PathBuf,
    port: u16,
}

impl Place {
    /// Makes a pool's empty file and the configuration, for a port that was free a moment ago.
    pub fn prepare(
        program: &Path,
        dir: &Path,
        pool_bytes: u64,
        configuration: fn(&Path, u16) -> Value,
    ) -> Result<Place, String> {
        let place = || -> std::io::Result<Place> {
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
            File::create(dir.join("disk"))?.set_len(pool_bytes)?;
            std::fs::write(dir.join("config.json"), format!("{:#}\n", configuration(dir, port)))?;
            Ok(Place { program: program.into(), dir: dir.into(), port })
        };
        place().map_err(|e| format!("{}: {e}", dir.display()))
    }

    /// How to reach it.
    pub fn connect_options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new("127.0.0.1", self.port.to_string(), NQN);
        options.io_queues = super::load::QUEUES;
        options
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    fn spawn(&self) -> Result<Program, String> {
        let open = |name: &str| File::options().create(true).append(true).open(self.dir.join(name));
        let spawn = || -> std::io::Result<Child> {
            File::create(self.dir.join("out"))?;
            Command::new(&self.program)
                .arg("target")
                .arg("-c")
                .arg(self.dir.join("config.json"))
                .arg("-r")
                .arg(self.dir.join("rpc.sock"))
                .arg("--audit-log")
                .arg(self.dir.join("audit.log"))
                // As many reactors as there are CPUs, two at most.
                .args(["--cores", if std::thread::available_parallelism()?.get() > 1 { "0-1" } else { "0" }])
                .arg("--no-huge")
                .stdin(Stdio::null())
                .stdout(open("out")?)
                .stderr(open("log")?)
                .spawn()
        };
        let child = spawn().map_err(|e| format!("{}: {e}", self.program.display()))?;
        Ok(Program { child, path: self.program.clone(), dir: self.dir.clone(), start_time: Duration::ZERO })
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<Program, String> {
        let begin = Instant::now();
        let mut program = self.spawn()?;
        while !program.is_ready() {
            if let Some(status) = program.child.try_wait().map_err(|e| e.to_string())? {
                return Err(format!("the target did not start ({status}): {}", program.log_end()));
            }
            if begin.elapsed() > PATIENCE {
                return Err(format!("the target is not ready after {PATIENCE:?}: {}", program.log_end()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        program.start_time = begin.elapsed();
        Ok(program)
    }

    /// Starts it and kills it after `delay`, whatever it has come to.
    pub fn start_and_kill(&self, delay: Duration) -> Result<(), String> {
        let program = self.spawn()?;
        std::thread::sleep(delay);
        program.kill().map_err(|e| format!("{} ms into a start: {e}", delay.as_millis()))
    }

    /// Keeps a copy of the pool's file. What the program has written and not flushed is in it too: the page cache is one.
    pub fn save_pool(&self) -> Result<(), String> {
        self.copy("disk", "disk.saved")
    }

    /// Puts the copy in the pool's place.
    pub fn restore_pool(&self) -> Result<(), String> {
        self.copy("disk.saved", "disk")
    }

    fn copy(&self, from: &str, to: &str) -> Result<(), String> {
        let status =
            Command::new("cp").arg("--sparse=always").arg(from).arg(to).current_dir(&self.dir).status();
        match status {
            Ok(s) if s.success() => Ok(()),
            other => Err(format!("copying {from} to {to}: {other:?}")),
        }
    }
}

/// One process; killed when dropped.
pub struct Program {
    child: Child,
    path: PathBuf,
    dir: PathBuf,
    /// From its start until it was ready.
    pub start_time: Duration,
}

impl Program {
    fn is_ready(&self) -> bool {
        let out = std::fs::read_to_string(self.dir.join("out")).unwrap_or_default();
        out.lines().any(|line| line.starts_with("cryptfold: ready"))
    }

    fn log_end(&self) -> String {
        let log = std::fs::read(self.dir.join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Its RPC socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("rpc.sock")
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> Result<usize, String> {
        let dir = format!("/proc/{}/fd", self.id());
        std::fs::read_dir(&dir).map(Iterator::count).map_err(|e| format!("{dir}: {e}; {}", self.log_end()))
    }

    /// Waits until no more than so many descriptors are open: a socket lives a moment longer than its connection.
    pub fn returns_to(&self, descriptors: usize) -> Result<(), String> {
        let begin = Instant::now();
        while self.descriptors()? > descriptors {
            if begin.elapsed() > Duration::from_secs(30) {
                return Err(format!("{descriptors} descriptors became {}", self.descriptors()?));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// A limit of its process: `resource` as prlimit(1) calls it.
    pub fn limit(&self, resource: &str, value: &str) -> Result<(), String> {
        let status = Command::new("prlimit")
            .args(["--pid", &self.id().to_string(), &format!("--{resource}={value}")])
            .status()
            .map_err(|e| format!("prlimit: {e}"))?;
        if status.success() { Ok(()) } else { Err(format!("prlimit --{resource}={value}: {status}")) }
    }

    /// (processor time used so far, resident bytes).
    pub fn usage(&self) -> Result<(Duration, u64), String> {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/proc/{}/{name}", self.id())).map_err(|e| e.to_string())
        };
        let stat = read("stat")?;
        // After the name in parentheses; utime and stime are fields 14 and 15, in hundredths of a second.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let number = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok());
        let ticks = number(11).zip(number(12)).map(|(u, s)| u + s).ok_or("/proc has another format")?;
        let pages = read("statm")?.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).ok_or("no RSS")?;
        Ok((Duration::from_millis(ticks * 10), pages * 4096))
    }

    /// The most bytes that were ever resident.
    pub fn peak_bytes(&self) -> Result<u64, String> {
        let path = format!("/proc/{}/status", self.id());
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or_else(|| format!("{path} has another format"))
    }

    /// SIGKILL, and its end awaited. An error if it had ended by itself.
    pub fn kill(mut self) -> Result<(), String> {
        if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
            return Err(format!("the target had ended by itself ({status}): {}", self.log_end()));
        }
        self.child.kill().and_then(|()| self.child.wait()).map_err(|e| e.to_string())?;
        Ok(())
    }

    /// An end in order, as SIGTERM brings it; must give status 0.
    pub fn stop(mut self) -> Result<(), String> {
        self.rpc("spdk_kill_instance", &serde_json::json!({"sig_name": "SIGTERM"}))?;
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            match self.child.try_wait().map_err(|e| e.to_string())? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("the target ended with {status}: {}", self.log_end())),
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
        Err(format!("the target did not end within {PATIENCE:?}: {}", self.log_end()))
    }

    fn call(&self, method: &str, params: &Value) -> Command {
        let mut command = Command::new(&self.path);
        command.args(["rpc", "-r"]).arg(self.dir.join("rpc.sock")).args([method, &params.to_string()]);
        command
    }

    /// Begins a call that the program may not live to answer.
    pub fn begin_rpc(&self, method: &str, params: &Value) -> Result<Pending, String> {
        let mut command = self.call(method, params);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().map(Pending).map_err(|e| format!("{}: {e}", self.path.display()))
    }

    /// Calls a method by the program's own `rpc` command.
    pub fn rpc(&self, method: &str, params: &Value) -> Result<Value, String> {
        let output =
            self.call(method, params).output().map_err(|e| format!("{}: {e}", self.path.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{method}: {}; end of the target's log: {}", said.trim(), self.log_end()));
        }
        serde_json::from_slice(&output.stdout).map_err(|e| format!("{method} answers no JSON: {e}"))
    }
}

/// A call under way.
pub struct Pending(Child);

impl Pending {
    /// After the program's end: whether it had answered. An error if it had refused.
    pub fn answered(self) -> Result<bool, String> {
        let output = self.0.wait_with_output().map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&output.stderr);
        let cut_off = ["closed the connection before it answered", "no target answers"];
        match output.status.success() {
            true => Ok(true),
            false if cut_off.iter().any(|what| said.contains(what)) => Ok(false),
            false => Err(format!("refused: {}", said.trim())),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Ended already, or about to: nothing is to be done about a failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
