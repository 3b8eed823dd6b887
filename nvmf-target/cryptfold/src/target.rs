//! `cryptfold target`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use clap::{Args, ValueEnum};
use cryptfold_bdev_crypto::engine::awslc;
use cryptfold_control::access::Grant;
use cryptfold_control::audit::AuditLog;
use cryptfold_control::config::Config;
use cryptfold_control::fips::FipsMode;
use cryptfold_control::logging::{Level, LogControl};
use cryptfold_control::server::Server;
use cryptfold_control::{Control, ControlConfig, Signal, keys};
use cryptfold_reactor::memory::forbid_core_dumps;
use cryptfold_reactor::{IdlePolicy, MemoryConfig};
use cryptfold_view::Look;
use cryptfold_web::{Web, WebConfig};
use serde_json::Value;
use zeroize::Zeroizing;

use crate::cores::Cores;
use crate::signals::{EndRequests, kill_self};
use crate::{Failure, SocketArgs, reference};

/// How long a kill by request waits for the audit log.
const AUDIT_LIMIT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, ValueEnum)]
enum Idle {
    /// Never sleep: lowest latency, one whole CPU per core of the list.
    Poll,
    /// Poll for a while, then sleep until woken.
    Adaptive,
    /// Sleep whenever there is nothing to do.
    Interrupt,
}

#[derive(Clone, Copy, ValueEnum)]
enum Fips {
    /// All that cryptfold has.
    Off,
    /// Only algorithms that FIPS 140-3 approves; pools have to be made in such a mode.
    Approved,
    /// The same, executed by AWS-LC's validated module, which has to be built in.
    Validated,
}

#[derive(Args)]
pub struct TargetArgs {
    /// Configuration in SPDK's form (JSON, comments allowed).
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// CPUs, one reactor each: 0  0-1  0,2  [0,1]  0x3.
    #[arg(long, short = 'm', value_name = "LIST", default_value = "0")]
    cores: Cores,
    #[command(flatten)]
    socket: SocketArgs,
    /// What idle reactors do.
    #[arg(long, value_enum, default_value_t = Idle::Adaptive)]
    idle: Idle,
    /// Wait for framework_start_init before anything but start-up methods runs.
    #[arg(long)]
    wait_for_rpc: bool,
    /// error, warning, notice, info or debug.
    #[arg(long, value_name = "LEVEL", default_value = "notice", value_parser = level)]
    log: Level,
    /// Directory of key files [default: $CRYPTFOLD_KEYS, else $XDG_STATE_HOME/cryptfold/keys,
    /// else /var/lib/cryptfold/keys for root and ~/.local/state/cryptfold/keys for others].
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,
    /// File to which every event of keys, access and configuration is appended (never keys); see cryptfold audit.
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// What others than root and the target's user may do on the RPC socket: viewer, operator or security, for a user or a
    /// primary group (ROLE=uid:NUMBER, ROLE=gid:NUMBER). May be given several times; the socket's mode is 0666 then.
    #[arg(long, value_name = "GRANT")]
    role: Vec<Grant>,
    /// Serve a web page, /metrics (Prometheus), /healthz and /api/v1 over HTTP there [default without ADDRESS: 127.0.0.1:9420].
    #[arg(long, value_name = "ADDRESS", num_args = 0..=1, default_missing_value = "127.0.0.1:9420")]
    http: Option<SocketAddr>,
    /// File with the token that HTTP clients have to present (Authorization: Bearer); needed for addresses that others
    /// reach.
    #[arg(long, value_name = "FILE", requires = "http")]
    http_token: Option<PathBuf>,
    /// Which algorithms may be used, and what executes them (docs/security.md).
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Fips::Off)]
    fips_mode: Fips,
    /// Do not use reserved hugepages.
    #[arg(long)]
    no_huge: bool,
    /// Allow core dumps. They contain keys and the hosts' data.
    #[arg(long)]
    core_dumps: bool,
    /// Print these options and the settings of the configuration file as docs/configuration.md has them (Markdown), and end.
    #[arg(long)]
    doc: bool,
}

fn level(word: &str) -> Result<Level, String> {
    Level::parse(word).ok_or_else(|| format!("\"{word}\" is no level; error, warning, notice, info or debug"))
}

/// Runs until asked to end, then drains, flushes and checkpoints.
pub fn run(args: TargetArgs) -> Result<(), Failure> {
    if args.doc {
        print!("{}", reference::markdown());
        return Ok(());
    }
    // SAFETY: first of all: nothing has used the library yet.
    if !unsafe { awslc::keep_out_of_dumps() } {
        return Err("the cipher library does not take the memory that is kept out of core dumps"
            .to_owned()
            .into());
    }
    let fips = match args.fips_mode {
        Fips::Off => FipsMode::Off,
        Fips::Approved => FipsMode::Approved,
        Fips::Validated => FipsMode::Validated,
    };
    fips.enter().map_err(|e| e.to_string())?;
    if !args.core_dumps {
        forbid_core_dumps()
            .map_err(|e| format!("core dumps can not be forbidden: {e} (--core-dumps allows them)"))?;
    }
    let ends = EndRequests::new().map_err(|e| format!("signals: {e}"))?;
    args.cores.check(&std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default())?;
    let config = match &args.config {
        Some(path) => Config::read(path).map_err(|e| e.to_string())?,
        None => Config { origin: "no configuration".into(), calls: Vec::new() },
    };
    // Closed after everything else.
    let audit = args.audit_log.as_deref().map(AuditLog::open).transpose().map_err(|e| e.to_string())?;
    let log = LogControl::install(args.log, audit.as_ref());
    let flush_audit = audit.as_ref().map(AuditLog::flusher);
    // Whoever connects is judged by who it is; without roles nobody else gets that far.
    let mode = if args.role.is_empty() { 0o600 } else { 0o666 };
    let sender = std::sync::Mutex::new(ends.sender.clone());
    let control = Control::new(ControlConfig {
        cores: args.cores.0,
        idle: match args.idle {
            Idle::Poll => IdlePolicy::Poll,
            Idle::Adaptive => IdlePolicy::default(),
            Idle::Interrupt => IdlePolicy::Interrupt,
        },
        pin: true,
        memory: MemoryConfig { hugepages: !args.no_huge, ..MemoryConfig::default() },
        key_dir: args.keys.unwrap_or_else(keys::default_key_dir),
        log,
        grants: args.role,
        fips,
        on_signal: Box::new(move |signal| match signal {
            Signal::Int | Signal::Term | Signal::Quit => {
                let _ = sender.lock().map(|s| s.send(()));
            }
            Signal::Kill => {
                if let Some(flush) = &flush_audit
                    && !flush(AUDIT_LIMIT)
                {
                    tracing::error!("killed by request, with records that are not in the audit log");
                }
                kill_self();
            }
            Signal::Hup | Signal::Usr1 => tracing::info!(?signal, "signal ignored"),
        }),
    });
    // Before the socket: a wrong file must not take a running target's place even for a moment.
    config.check(&control).map_err(|e| e.to_string())?;
    control.hold();
    let web = args.http.map(|listen| serve_http(listen, args.http_token.as_deref(), &control)).transpose()?;
    let served = control.clone();
    let admit = Box::new(move |peer| served.session(peer));
    let mut server = Server::start_for_peers(&args.socket.socket, mode, admit).map_err(|e| e.to_string())?;
    let started = configure(&control, &config, args.wait_for_rpc, &ends);
    if let Ok(true) = started {
        control.release();
        announce(&control, &server, web.as_ref());
        ends.wait();
        tracing::info!("ending: draining, flushing, checkpointing");
    }
    control.end_waits();
    drop(web);
    server.stop();
    let ended = control.shutdown().map_err(|e| e.message);
    started?;
    Ok(ended?)
}

fn serve_http(listen: SocketAddr, token: Option<&Path>, control: &Arc<Control>) -> Result<Web, String> {
    let config = WebConfig { listen, token: token.map(read_token).transpose()? };
    Web::start(config, Arc::new(Seen(Arc::downgrade(control)))).map_err(|e| format!("HTTP: {e}"))
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, String> {
    let failed = |why: &str| format!("HTTP token {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map(Zeroizing::new).map_err(|e| failed(&e.to_string()))?;
    let token = text.trim();
    if token.is_empty() {
        return Err(failed("the file is empty"));
    }
    // What a browser can send in a header and a person can type.
    match token.chars().position(|c| !matches!(c, ' '..='~')) {
        None => Ok(Zeroizing::new(token.to_owned())),
        Some(at) => Err(failed(&format!(
            "a token is one line of printable ASCII characters; character {} of {} is none",
            at + 1,
            token.chars().count()
        ))),
    }
}

/// The control plane as HTTP sees it.
struct Seen(Weak<Control>);

impl cryptfold_web::Source for Seen {
    fn look(&self) -> Option<Arc<Look>> {
        self.0.upgrade().map(|c| c.look())
    }

    fn history(&self) -> Value {
        self.0.upgrade().map_or(Value::Null, |c| c.history())
    }
}

/// False when the end was asked for while waiting.
fn configure(
    control: &Arc<Control>,
    config: &Config,
    wait: bool,
    ends: &EndRequests,
) -> Result<bool, String> {
    config.load_startup(control).map_err(|e| e.to_string())?;
    if wait {
        while !control.is_initialized() {
            if ends.wait_for(Duration::from_millis(50)) {
                return Ok(false);
            }
        }
    }
    control.initialize().map_err(|e| e.message)?;
    config.load_runtime(control).map_err(|e| e.to_string())?;
    Ok(true)
}

/// One line on standard output: what listens where.
fn announce(control: &Control, server: &Server, web: Option<&Web>) {
    let mut line = format!("cryptfold: ready; RPC on {}", server.path().display());
    for (nqn, address) in control.listening() {
        line.push_str(&format!("; {nqn} on {address}"));
    }
    if let Some(web) = web {
        line.push_str(&format!("; http://{}/", web.address()));
    }
    println!("{line}");
    let _ = std::io::stdout().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_no_browser_could_send_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_token(&path).map(|token| token.to_string())
        };
        assert_eq!(read(" correct horse~\r\n").as_deref(), Ok("correct horse~"));
        assert!(read(" \n").is_err_and(|why| why.contains("the file is empty")));
        for (text, at) in
            [("a\nb\n", "2 of 3"), ("\u{201c}ab", "1 of 3"), ("ab\tc", "3 of 4"), ("a\u{7f}", "2 of 2")]
        {
            let why = read(text).expect_err(text);
            assert!(why.contains("one line of printable ASCII") && why.contains(at), "{text:?}: {why}");
            assert!(why.contains(path.to_str().unwrap()), "{why}");
        }
        std::fs::write(&path, b"a\xffb").unwrap();
        assert!(read_token(&path).is_err_and(|why| why.contains("UTF-8")));
    }
}
