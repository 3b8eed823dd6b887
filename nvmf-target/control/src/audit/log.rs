//! The file of the audit log: opened where it ends, appended to by a thread of its own.
//!
//! - **Start.** The chain goes on from the last record of the file, or, where there is none, of FILE.1, to which it was rotated. A last
//!   line without an end (a crash) is cut off, and the next record says so. A file whose last line is no intact record is moved aside,
//!   whatever it is, and a new chain begins, which says so too.
//! - **Rotation.** A file that was renamed or removed is let go, one that was truncated is begun again; the chain goes on.
//! - **A full disk.** The log says so once and tries again every second. Up to [`QUEUED`] records wait, half of them of calls that were
//!   refused: those cost nothing. What does not fit is counted, and the count is the next record.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::layer::{AuditLayer, now};
use super::record::{Head, MAX_RECORD_BYTES, encode, parse};
use crate::control::lock;

/// Records that wait for the file.
pub const QUEUED: usize = 8192;
/// Between two attempts at a file that could not be written.
const RETRY: Duration = Duration::from_secs(1);
/// How often the end of the program tries a file that could not be written.
const LAST_ATTEMPTS: u32 = 3;
/// The chain's head is told to the program's own log this often.
const ANCHOR_RECORDS: u64 = 1000;

/// Why there is no log.
#[derive(Debug, Error)]
pub enum AuditError {
    /// The operating system refused.
    #[error("audit log {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
    /// Another process appends to it.
    #[error("audit log {0}: another process writes it; give each target a file of its own")]
    Busy(PathBuf),
}

/// What happened, and when.
pub(super) struct Event {
    pub time: String,
    pub members: Map<String, Value>,
}

/// What waits for the thread.
#[derive(Default)]
struct Queue {
    events: Vec<Event>,
    lost: u64,
    closing: bool,
    /// Events that were ever queued, and of these those that are in the file.
    sent: u64,
    written: u64,
}

/// The sending end: the queue, what tells the thread of a change, and what tells others that it has written.
#[derive(Clone, Default)]
pub(super) struct Sender(Arc<(Mutex<Queue>, Condvar, Condvar)>);

impl Sender {
    /// Never waits for the file: the thread holds the lock only to take what is there.
    pub fn send(&self, event: Event) {
        let mut queue = lock(&self.0.0);
        let refused = event.members.get("event").is_some_and(|e| e == "call refused");
        match queue.events.len() < if refused { QUEUED / 2 } else { QUEUED } {
            true => {
                queue.events.push(event);
                queue.sent += 1;
            }
            false => queue.lost += 1,
        }
        drop(queue);
        self.0.1.notify_one();
    }

    /// Waits until what has been sent so far is in the file and synced, for so long at most. Whether it is.
    fn flush(&self, limit: Duration) -> bool {
        let queue = lock(&self.0.0);
        let sent = queue.sent;
        let waited = self.0.2.wait_timeout_while(queue, limit, |q| q.written < sent);
        waited.unwrap_or_else(PoisonError::into_inner).0.written >= sent
    }

    fn wrote(&self, events: usize) {
        lock(&self.0.0).written += events as u64;
        self.0.2.notify_all();
    }

    fn close(&self) {
        lock(&self.0.0).closing = true;
        self.0.1.notify_one();
    }

    /// Waits until there is something, or, after a failure, for the next attempt.
    fn wait(&self, failing: bool) -> MutexGuard<'_, Queue> {
        let (queue, change, _) = &*self.0;
        let queue = lock(queue);
        if failing {
            let waited = change.wait_timeout_while(queue, RETRY, |q| !q.closing);
            return waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let idle = |q: &mut Queue| q.events.is_empty() && q.lost == 0 && !q.closing;
        change.wait_while(queue, idle).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A log that is written to; dropping it writes what is queued and closes it.
pub struct AuditLog {
    sender: Sender,
    writer: Option<JoinHandle<()>>,
    begun: String,
}

impl AuditLog {
    /// Opens or makes the file (mode 0600) and starts the thread.
    ///
    /// # Errors
    /// See [`AuditError`].
    pub fn open(path: &Path) -> Result<AuditLog, AuditError> {
        let (store, head, first) = open(path)?;
        let begun = match first.get("damaged_log").and_then(Value::as_str) {
            Some(aside) => {
                format!("the last line was no intact record; that log is now {aside}, and a new one begins")
            }
            None => format!("goes on behind record {}, whose hash is {}", head.seq, head.hash),
        };
        let sender = Sender::default();
        sender.send(Event { time: now(), members: first });
        let writer = Writer::new(store, head, sender.clone());
        let thread = std::thread::Builder::new().name("audit".into());
        let spawned = thread.spawn(move || writer.run());
        let writer = spawned.map_err(|error| AuditError::Io { path: path.into(), error })?;
        Ok(AuditLog { sender, writer: Some(writer), begun: format!("audit log {}: {begun}", path.display()) })
    }

    /// How it began, for the program's own log, which opens later.
    pub fn begun(&self) -> &str {
        &self.begun
    }

    /// For whoever ends the program at once: waits until all that was recorded before is in the file, for so long at most. Whether it is.
    pub fn flusher(&self) -> impl Fn(Duration) -> bool + Send + Sync + use<> {
        let sender = self.sender.clone();
        move |limit| sender.flush(limit)
    }

    /// What a subscriber sends events by.
    pub fn layer(&self) -> AuditLayer {
        AuditLayer(self.sender.clone())
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        self.sender.close();
        if let Some(writer) = self.writer.take() {
            // It has said what went wrong.
            let _ = writer.join();
        }
    }
}

/// Where lines go. All of a piece arrives, or nothing of it stays.
trait Store: Send {
    fn append(&mut self, lines: &[u8]) -> io::Result<()>;
    fn name(&self) -> String;
}

struct LogFile {
    path: PathBuf,
    file: File,
}

fn open_file(path: &Path) -> Result<File, AuditError> {
    let io = |error| AuditError::Io { path: path.into(), error };
    let mut options = OpenOptions::new();
    let file = options.read(true).append(true).create(true).mode(0o600).open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_file() {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(AuditError::Busy(path.into())),
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
    }
    Ok(file)
}

impl LogFile {
    /// Whether the path still leads to the open file.
    fn is_current(&self) -> io::Result<bool> {
        let open = self.file.metadata()?;
        match std::fs::metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Store for LogFile {
    fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if !self.is_current()? {
            self.file = open_file(&self.path).map_err(io::Error::other)?;
        }
        let before = self.file.metadata()?;
        if !before.is_file() {
            return self.file.write_all(lines);
        }
        let written = self.file.write_all(lines).and_then(|()| self.file.sync_data());
        if written.is_err() {
            // Half a line would look like a crash.
            self.file.set_len(before.len())?;
        }
        written
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// What every record begins with.
const BEGIN: &[u8] = b"{\"seq\":";

/// Whether this is a record that was not finished, or nothing.
fn is_torn_record(bytes: &[u8]) -> bool {
    bytes.len() < MAX_RECORD_BYTES && (bytes.starts_with(BEGIN) || BEGIN.starts_with(bytes))
}

/// The last record of the file to which the log was rotated, if it has one.
fn rotated(path: &Path) -> Option<(PathBuf, Head)> {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    let mut file = File::open(&old).ok()?;
    let state = file.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let (line, _) = last_line(&mut file, state.len()).ok()?;
    Some((old.into(), parse(&line?).ok()?.head()))
}

/// The end of a file: its last whole line if there is one, and what comes after that.
fn last_line(file: &mut File, len: u64) -> io::Result<(Option<Vec<u8>>, Vec<u8>)> {
    let tail = len.min(2 * MAX_RECORD_BYTES as u64);
    file.seek(SeekFrom::Start(len - tail))?;
    let mut bytes = Vec::new();
    io::Read::take(&mut *file, tail).read_to_end(&mut bytes)?;
    let Some(end) = bytes.iter().rposition(|b| *b == b'\n') else { return Ok((None, bytes)) };
    let torn = bytes[end + 1..].to_vec();
    let start = bytes[..end].iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1);
    Ok((Some(bytes[start..end].to_vec()), torn))
}

/// The file, the chain's head, and the record that comes first.
fn open(path: &Path) -> Result<(LogFile, Head, Map<String, Value>), AuditError> {
    let io = |error| AuditError::Io { path: path.into(), error };
    let mut first = Map::new();
    first.insert("event".into(), "audit log opened".into());
    first.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    first.insert("pid".into(), std::process::id().into());
    let mut file = open_file(path)?;
    let state = file.metadata().map_err(io)?;
    if !state.is_file() || state.len() == 0 {
        let mut head = Head::default();
        if state.is_file()
            && let Some((old, last)) = rotated(path)
        {
            first.insert("continues".into(), old.display().to_string().into());
            head = last;
        }
        return Ok((LogFile { path: path.into(), file }, head, first));
    }
    let (line, torn) = last_line(&mut file, state.len()).map_err(io)?;
    let head = match &line {
        None => Some(Head::default()),
        Some(line) => parse(line).ok().map(|r| r.head()),
    };
    let Some(head) = head.filter(|_| is_torn_record(&torn)) else {
        let aside = PathBuf::from(format!("{}.damaged-{}", path.display(), now().replace(':', "")));
        std::fs::rename(path, &aside).map_err(io)?;
        first.insert("damaged_log".into(), aside.display().to_string().into());
        return Ok((LogFile { path: path.into(), file: open_file(path)? }, Head::default(), first));
    };
    if !torn.is_empty() {
        file.set_len(state.len() - torn.len() as u64).map_err(io)?;
        first.insert("torn_bytes".into(), torn.len().into());
    }
    Ok((LogFile { path: path.into(), file }, head, first))
}

struct Writer<S> {
    store: S,
    head: Head,
    anchored: u64,
    from: Sender,
    /// What is being written.
    batch: Vec<Event>,
    lost: u64,
    failing: bool,
}

impl<S: Store> Writer<S> {
    fn new(store: S, head: Head, from: Sender) -> Writer<S> {
        Writer { store, head, anchored: head.seq, from, batch: Vec::new(), lost: 0, failing: false }
    }

    fn run(mut self) {
        loop {
            let mut queue = self.from.wait(self.failing);
            let closing = queue.closing;
            // What comes while the file can not be written waits in the queue, which has an end.
            if self.batch.is_empty() || closing {
                self.batch.append(&mut queue.events);
                self.lost += std::mem::take(&mut queue.lost);
            }
            drop(queue);
            if closing {
                return self.close();
            }
            self.write();
        }
    }

    fn close(mut self) {
        let mut members = Map::new();
        members.insert("event".into(), "audit log closed".into());
        members.insert("pid".into(), std::process::id().into());
        self.batch.push(Event { time: now(), members });
        lock(&self.from.0.0).sent += 1;
        for attempt in 1..=LAST_ATTEMPTS {
            if self.write() {
                return self.anchor();
            }
            if attempt < LAST_ATTEMPTS {
                std::thread::sleep(RETRY);
            }
        }
        tracing::error!("audit log {}: {} records are not written", self.store.name(), self.batch.len());
    }

    /// Appends what waits, all of it or nothing; false when that failed.
    fn write(&mut self) -> bool {
        let (mut lines, mut head) = (Vec::new(), self.head);
        let mut put = |time: &str, members: Map<String, Value>| {
            let (line, next) = encode(head, time, members);
            lines.extend_from_slice(&line);
            head = next;
        };
        for event in &self.batch {
            put(&event.time, event.members.clone());
        }
        if self.lost > 0 {
            let members = json!({"event": "records lost", "level": "error", "records": self.lost});
            put(&now(), members.as_object().cloned().unwrap_or_default());
        }
        if lines.is_empty() {
            return true;
        }
        if let Err(error) = self.store.append(&lines) {
            if !self.failing {
                tracing::error!(%error, "audit log {} can not be written; records wait", self.store.name());
            }
            self.failing = true;
            return false;
        }
        self.lost = 0;
        self.from.wrote(self.batch.len());
        self.batch.clear();
        self.head = head;
        if std::mem::take(&mut self.failing) {
            tracing::warn!("audit log {} is written again", self.store.name());
        }
        if self.head.seq / ANCHOR_RECORDS != self.anchored / ANCHOR_RECORDS {
            self.anchor();
        }
        true
    }

    /// Tells the program's own log, which goes elsewhere, how far the chain has come.
    fn anchor(&mut self) {
        self.anchored = self.head.seq;
        tracing::info!(
            "audit log {}: record {} has the hash {}",
            self.store.name(),
            self.head.seq,
            self.head.hash
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::verify::Verifier;
    use super::*;

    fn event(n: usize) -> Event {
        let members = json!({"event": "e", "number": n}).as_object().unwrap().clone();
        Event { time: now(), members }
    }

    /// Writes so many events and closes.
    fn write(path: &Path, events: usize) {
        let log = AuditLog::open(path).unwrap();
        (0..events).for_each(|n| log.sender.send(event(n)));
    }

    /// The events of whole files, whose chain has to be right.
    fn read(paths: &[&Path]) -> Vec<Value> {
        let mut chain = Verifier::default();
        let text: String = paths.iter().map(|p| std::fs::read_to_string(p).unwrap()).collect();
        assert!(text.is_empty() || text.ends_with('\n'));
        let record =
            |l: &str| Value::Object(chain.next(l.as_bytes()).unwrap_or_else(|e| panic!("{l}: {e}")).members);
        text.lines().map(record).collect()
    }

    fn names(records: &[Value]) -> Vec<&str> {
        records.iter().map(|r| r["event"].as_str().unwrap()).collect()
    }

    const OPENED: &str = "audit log opened";
    const CLOSED: &str = "audit log closed";

    #[test]
    fn a_restart_goes_on_and_a_second_writer_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        write(&path, 2);
        let log = AuditLog::open(&path).unwrap();
        let busy = AuditLog::open(&path).err().expect("refused").to_string();
        assert!(busy.contains("another process"), "{busy}");
        drop(log);
        assert_eq!(names(&read(&[&path])), [OPENED, "e", "e", CLOSED, OPENED, CLOSED]);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    /// A crash in the midst of any byte of the last line, and of the only one.
    #[test]
    fn a_torn_last_line_is_cut_off_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        write(&path, 1);
        let whole = std::fs::read(&path).unwrap();
        let lines: Vec<&[u8]> = whole.split_inclusive(|b| *b == b'\n').collect();
        let (kept, last) = (whole.len() - lines[2].len(), lines[2].len());
        for torn in [1, 2, last / 2, last - 1] {
            std::fs::write(&path, &whole[..kept + torn]).unwrap();
            write(&path, 0);
            let records = read(&[&path]);
            assert_eq!(names(&records), [OPENED, "e", OPENED, CLOSED]);
            assert_eq!(records[2]["torn_bytes"], torn);
        }
        std::fs::write(&path, &whole[..5]).unwrap();
        write(&path, 0);
        let records = read(&[&path]);
        assert_eq!((names(&records), &records[0]["seq"]), (vec![OPENED, CLOSED], &json!(1)));
        assert_eq!(records[0]["torn_bytes"], 5);
    }

    #[test]
    fn a_log_that_does_not_end_in_a_record_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        // A key file among them: 32 bytes without an end of a line.
        for damaged in
            ["not a record\n".to_owned(), "\n".to_owned(), "k".repeat(32), "x".repeat(3 * MAX_RECORD_BYTES)]
        {
            std::fs::write(&path, &damaged).unwrap();
            let log = AuditLog::open(&path).unwrap();
            assert!(log.begun().contains("no intact record"), "{}", log.begun());
            drop(log);
            let records = read(&[&path]);
            assert_eq!(names(&records), [OPENED, CLOSED]);
            let aside = records[0]["damaged_log"].as_str().unwrap();
            assert_eq!(std::fs::read_to_string(aside).unwrap(), damaged);
            std::fs::remove_file(&path).unwrap();
        }
    }

    fn wait(what: &str, done: impl Fn() -> bool) {
        for _ in 0..12_000 {
            if done() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("not within two minutes: {what}");
    }

    /// As logrotate does it, by renaming or by copying and truncating: one chain over both files.
    #[test]
    fn rotation_does_not_break_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("audit.log"), dir.path().join("audit.log.1"));
        let lines = || std::fs::read_to_string(&path).unwrap_or_default().lines().count();
        for rename in [true, false] {
            let log = AuditLog::open(&path).unwrap();
            log.sender.send(event(1));
            wait("two records", || lines() == 2);
            if rename {
                std::fs::rename(&path, &old).unwrap();
            } else {
                std::fs::copy(&path, &old).unwrap();
                File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
            }
            log.sender.send(event(2));
            wait("one more", || lines() == 1);
            drop(log);
            assert_eq!(names(&read(&[&old, &path])), [OPENED, "e", "e", CLOSED]);
            std::fs::remove_file(&path).unwrap();
            std::fs::remove_file(&old).unwrap();
        }
    }

    /// Nobody writes the log while it is renamed: the next start goes on all the same.
    #[test]
    fn rotation_while_nothing_runs_does_not_break_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("audit.log"), dir.path().join("audit.log.1"));
        write(&path, 1);
        std::fs::rename(&path, &old).unwrap();
        write(&path, 1);
        let records = read(&[&old, &path]);
        assert_eq!(names(&records), [OPENED, "e", CLOSED, OPENED, "e", CLOSED]);
        assert_eq!((&records[3]["seq"], &records[3]["continues"]), (&json!(4), &json!(old)));
    }

    /// Who floods the log with calls that are refused does not push out what happened.
    #[test]
    fn refusals_leave_room_for_the_rest() {
        let sender = Sender::default();
        let refused = || json!({"event": "call refused"}).as_object().unwrap().clone();
        (0..QUEUED).for_each(|_| sender.send(Event { time: now(), members: refused() }));
        sender.send(event(1));
        let queue = lock(&sender.0.0);
        assert_eq!((queue.events.len(), queue.lost), (QUEUED / 2 + 1, (QUEUED / 2) as u64));
    }

    /// A disk of so many bytes.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Store for Disk {
        fn append(&mut self, lines: &[u8]) -> io::Result<()> {
            let mut disk = lock(&self.0);
            if disk.0.len() + lines.len() > disk.1 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            disk.0.extend_from_slice(lines);
            Ok(())
        }
        fn name(&self) -> String {
            "a disk".into()
        }
    }

    #[test]
    fn a_full_disk_holds_up_nobody_and_what_was_lost_is_counted() {
        let (disk, sender) = (Disk::default(), Sender::default());
        let writer = Writer::new(disk.clone(), Head::default(), sender.clone());
        let thread = std::thread::spawn(move || writer.run());
        sender.send(event(0));
        // The thread has taken the first one, and can not write it.
        wait("the first attempt", || lock(&sender.0.0).events.is_empty());
        (1..=QUEUED + 5).for_each(|n| sender.send(event(n)));
        let queue = lock(&sender.0.0);
        assert_eq!((queue.events.len(), queue.lost), (QUEUED, 5));
        drop(queue);
        lock(&disk.0).1 = usize::MAX;
        wait("room", || lock(&sender.0.0).events.is_empty());
        sender.close();
        thread.join().unwrap();
        let text = String::from_utf8(lock(&disk.0).0.clone()).unwrap();
        let mut chain = Verifier::default();
        let records: Vec<_> = text.lines().map(|l| chain.next(l.as_bytes()).unwrap().members).collect();
        let numbers: Vec<u64> = records.iter().filter_map(|r| r.get("number")?.as_u64()).collect();
        assert_eq!(numbers, (0..=QUEUED as u64).collect::<Vec<_>>());
        let lost: Vec<_> = records.iter().filter(|r| r["event"] == "records lost").collect();
        assert_eq!((lost.len(), &lost[0]["records"]), (1, &json!(5)));
        assert_eq!(records.last().unwrap()["event"], CLOSED);
    }

    /// What was sent before a flush is in the file after it, whatever the thread was doing; one that is full is told after the limit.
    #[test]
    fn a_flush_waits_for_what_was_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let log = AuditLog::open(&path).unwrap();
        let flush = log.flusher();
        for n in 0..200 {
            log.sender.send(event(n));
            assert!(flush(Duration::from_secs(120)));
            let last = read(&[&path]).pop().unwrap();
            assert_eq!(last["number"], n);
        }
        drop(log);
        assert!(flush(Duration::ZERO), "nothing is left");

        let (disk, sender) = (Disk::default(), Sender::default());
        let writer = Writer::new(disk.clone(), Head::default(), sender.clone());
        let thread = std::thread::spawn(move || writer.run());
        sender.send(event(0));
        assert!(!sender.flush(Duration::from_millis(50)), "there is no room");
        lock(&disk.0).1 = usize::MAX;
        assert!(sender.flush(Duration::from_secs(120)));
        sender.close();
        thread.join().unwrap();
    }

    /// Nothing that is no regular file is read, locked or truncated; the end comes also when nothing could be written.
    #[test]
    fn a_device_that_is_full() {
        let log = AuditLog::open(Path::new("/dev/full")).unwrap();
        log.sender.send(event(1));
        drop(log);
        write(Path::new("/dev/null"), 3);
    }
}
