//! Processes that the suite starts: each in a process group of its own (Ctrl-C reaches the suite, which ends them in order),
//! none outlives its owner. Only a suite that is killed (SIGKILL, out of memory) leaves them: a load ends after its seconds, a
//! target has to be ended by hand. PR_SET_PDEATHSIG would need `unsafe` code (`pre_exec`), which this program has none of.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Between two looks at a child.
const LOOK: Duration = Duration::from_millis(10);
/// Time for an end in order.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Of what a failed process said, that is shown.
const SAID_BYTES: usize = 800;

/// Why a step has no result.
#[derive(Debug)]
pub enum Failed {
    /// Ctrl-C or SIGTERM.
    Interrupted,
    /// What went wrong, in one line or more.
    Step(String),
}

impl From<String> for Failed {
    fn from(what: String) -> Failed {
        Failed::Step(what)
    }
}

/// Set by SIGINT and SIGTERM.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on these signals only set this.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn on_signals() -> Result<Stop, String> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, flag.clone()).map_err(|e| format!("signals: {e}"))?;
        }
        Ok(Stop(flag))
    }

    /// Whether one came.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// # Errors
    /// When one came.
    pub fn check(&self) -> Result<(), Failed> {
        if self.requested() { Err(Failed::Interrupted) } else { Ok(()) }
    }
}

/// A child that is ended when this is dropped.
pub struct Owned(Child);

impl Owned {
    /// Starts it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn spawn(command: &mut Command) -> Result<Owned, String> {
        let program = command.get_program().to_string_lossy().into_owned();
        command
            .process_group(0)
            .stdin(Stdio::null())
            .spawn()
            .map(Owned)
            .map_err(|e| format!("{program}: {e}"))
    }

    /// Its status, if it has ended.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, String> {
        self.0.try_wait().map_err(|e| e.to_string())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        let asked = kill_process(Pid::from_child(&self.0), Signal::TERM);
        let begin = Instant::now();
        while asked.is_ok() && begin.elapsed() < END_LIMIT {
            match self.0.try_wait() {
                Ok(None) => std::thread::sleep(LOOK),
                _ => return,
            }
        }
        // It has ended meanwhile, or is ended now: nothing else can come of these.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end; what it wrote to its standard output.
///
/// # Errors
/// That it failed with what it said, or that the suite was told to stop.
pub fn output(command: &mut Command, stop: &Stop) -> Result<String, Failed> {
    stop.check()?;
    // Files, not pipes: nobody has to read while it runs.
    let file = || tempfile::tempfile().map_err(|e| format!("a temporary file: {e}"));
    let (mut out, mut err) = (file()?, file()?);
    let clone = |f: &std::fs::File| f.try_clone().map_err(|e| format!("a temporary file: {e}"));
    command.stdout(clone(&out)?).stderr(clone(&err)?);
    let mut child = Owned::spawn(command)?;
    let status = loop {
        if let Some(status) = child.ended()? {
            break status;
        }
        stop.check()?;
        std::thread::sleep(LOOK);
    };
    let text = |f: &mut std::fs::File| {
        let mut text = Vec::new();
        f.seek(SeekFrom::Start(0)).and_then(|_| f.read_to_end(&mut text)).map_err(|e| e.to_string())?;
        Ok::<_, String>(String::from_utf8_lossy(&text).into_owned())
    };
    let (said, complained) = (text(&mut out)?, text(&mut err)?);
    if status.success() {
        return Ok(said);
    }
    stop.check()?;
    let why = if complained.trim().is_empty() { &said } else { &complained };
    Err(Failed::Step(format!("{}: {status}: {}", line(command), tail(why))))
}

/// The end of what a process said.
pub fn tail(text: &str) -> &str {
    let text = text.trim();
    let mut from = text.len().saturating_sub(SAID_BYTES);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// A command as a shell would take it.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let mut words = vec![quoted(&program.to_string_lossy())];
    words.extend(command.get_args().map(|a| quoted(&a.to_string_lossy())));
    words.join(" ")
}

/// A word as a shell would take it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+/.,:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> Stop {
        Stop(Arc::default())
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a-b=c"), "a-b=c");
        assert_eq!(quoted("{\"a\": 1}"), "'{\"a\": 1}'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(line(Command::new("/bin/echo").args(["a b", ""])), "echo 'a b' ''");
    }

    #[test]
    fn what_a_command_says_and_how_it_fails() {
        let said = output(Command::new("sh").args(["-c", "echo good; echo aside >&2"]), &never());
        assert_eq!(said.expect("succeeds"), "good\n");
        match output(Command::new("sh").args(["-c", "echo bad >&2; exit 3"]), &never()) {
            Err(Failed::Step(e)) => assert!(e.contains("exit status: 3") && e.ends_with("bad"), "{e}"),
            other => panic!("{other:?}"),
        }
        assert!(matches!(output(&mut Command::new("/no/such"), &never()), Err(Failed::Step(_))));
    }

    #[test]
    fn a_stop_ends_what_runs() {
        let stop = never();
        let other = stop.clone();
        let thread = std::thread::spawn(move || output(Command::new("sleep").arg("1000"), &other));
        std::thread::sleep(Duration::from_millis(50));
        stop.0.store(true, Ordering::Relaxed);
        assert!(matches!(thread.join().expect("no panic"), Err(Failed::Interrupted)));
    }
}
