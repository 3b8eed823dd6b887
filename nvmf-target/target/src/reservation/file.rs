//! What of a namespace outlives a power loss: registrations, the reservation, write protection; in a file (`ptpl_file`).
//!
//! The file is JSON and replaced as a whole: a new one is written beside it, made durable, and renamed over it. A thread
//! of its own does that, because it blocks; a command whose change has to be durable completes when the file is. A file
//! has one user at a time in the process.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cryptfold_nvmf_spec::Status;
use cryptfold_nvmf_spec::reservation::ReservationType;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Undo;
use super::state::{Held, HostId, MAX_REGISTRANTS, State};
use crate::TargetError;
use crate::later::Later;
use crate::subsystem::locked;

/// Larger files are none of ours, bytes.
const MAX_BYTES: u64 = 4 << 20;

/// How long whoever wants a file waits for the last write of its last user.
const LAST_WRITE: Duration = Duration::from_secs(30);

/// Files in use; true: the user has let go, and its last write may be under way.
static IN_USE: Mutex<BTreeMap<PathBuf, bool>> = Mutex::new(BTreeMap::new());

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Registrations and the reservation; nothing of them unless they are persistent.
    pub state: State,
    /// Namespace write protection.
    pub write_protected: bool,
}

struct Job {
    bytes: Vec<u8>,
    undo: Option<Undo>,
    later: Option<Arc<Later>>,
}

/// A namespace's file.
pub struct StateFile {
    path: PathBuf,
    device: Uuid,
    jobs: Sender<Job>,
}

impl StateFile {
    /// Opens the file of the device `device`; a missing one is an empty one, and is tried to be written.
    ///
    /// # Errors
    /// In use, not readable or writable, no file of ours, or another device's.
    pub fn open(path: &str, device: Uuid) -> Result<(StateFile, Kept), TargetError> {
        let path = PathBuf::from(path);
        let bad = |why: String| TargetError::Invalid("ptpl_file", format!("{}: {why}", path.display()));
        let claim = Claim::new(&path).ok_or_else(|| bad("is another namespace's".into()))?;
        let kept = match read(&path) {
            Ok(Some(text)) => decode(&text, device).map_err(bad)?,
            Ok(None) => Kept::default(),
            Err(e) => return Err(TargetError::os(format!("read {}", path.display()), &e, "")),
        };
        // Better now than when a host relies on it.
        replace(&path, &encode(&kept, device)).map_err(|e| {
            TargetError::os(format!("write {}", path.display()), &e, "ptpl_file needs a writable directory")
        })?;
        let (jobs, todo) = channel();
        let at = path.clone();
        let thread = std::thread::Builder::new().name("nvmf-ptpl".into());
        let started = thread.spawn(move || work(&at, &todo, claim));
        started.map_err(|e| TargetError::os("start a thread for ptpl_file", &e, ""))?;
        Ok((StateFile { path, device, jobs }, kept))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `kept`, in the order of the calls; then lets go of `later`. If the file can not be written `undo` is carried out before, and
    /// `later` fails. Called with the lock that `undo` takes.
    pub fn save(&self, kept: &Kept, undo: Option<Undo>, later: Option<Arc<Later>>) {
        let job = Job { bytes: encode(kept, self.device), undo, later };
        if let Err(lost) = self.jobs.send(job) {
            // Its thread lives as long as this.
            tracing::error!("{}: nobody writes this file any more", self.path.display());
            fail(lost.0.later.as_deref());
        }
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        if let Ok(key) = std::path::absolute(&self.path)
            && let Some(ending) = locked(&IN_USE).get_mut(&key)
        {
            *ending = true;
        }
    }
}

fn fail(later: Option<&Later>) {
    if let Some(later) = later {
        later.set(Status::INTERNAL_ERROR);
    }
}

/// The right to a file, until dropped.
struct Claim(PathBuf);

impl Claim {
    fn new(path: &Path) -> Option<Claim> {
        let key = std::path::absolute(path).ok()?;
        let end = Instant::now() + LAST_WRITE;
        loop {
            let mut in_use = locked(&IN_USE);
            match in_use.get(&key) {
                None => {
                    in_use.insert(key.clone(), false);
                    return Some(Claim(key));
                }
                Some(true) if Instant::now() < end => {}
                Some(_) => return None,
            }
            drop(in_use);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        locked(&IN_USE).remove(&self.0);
    }
}

fn work(path: &Path, todo: &Receiver<Job>, _claim: Claim) {
    while let Ok(first) = todo.recv() {
        // What came meanwhile is written at once: the last one has it all.
        let mut jobs = vec![first];
        jobs.extend(todo.try_iter());
        let newest = jobs.last().map(|j| j.bytes.as_slice()).unwrap_or_default();
        let result = replace(path, newest);
        if let Err(e) = &result {
            tracing::error!("{}: reservations can not be made durable: {e}", path.display());
        }
        let undo = jobs[0].undo.take();
        match (result, undo) {
            (Ok(()), Some(undo)) => undo.written(jobs.len()),
            (Ok(()), None) => {}
            (Err(_), undo) => {
                if let Some(undo) = undo {
                    undo.take_back(|| jobs.extend(todo.try_iter()));
                }
                jobs.iter().for_each(|j| fail(j.later.as_deref()));
            }
        }
    }
}

fn read(path: &Path) -> std::io::Result<Option<String>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = String::new();
    std::io::Read::read_to_string(&mut std::io::Read::take(file, MAX_BYTES), &mut text)?;
    Ok(Some(text))
}

/// Replaces the file: after this the new content is there also after a power loss, before it the old one.
fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // What can fail comes before the new content is there.
    let directory = File::open(directory)?;
    fs::rename(&beside, path)?;
    directory.sync_all()
}

fn encode(kept: &Kept, device: Uuid) -> Vec<u8> {
    let s = &kept.state;
    let empty = State::default();
    let shown = if s.persistent { s } else { &empty };
    let text = |h: &HostId| Uuid::from_bytes(*h).to_string();
    let registrants: Vec<Value> =
        shown.registrants.iter().map(|(h, k)| json!({"rkey": k, "host_uuid": text(h)})).collect();
    let mut all = json!({
        "ptpl": s.persistent,
        "bdev_uuid": device.to_string(),
        "rtype": shown.held.map_or(0, |h| h.kind as u8),
        "registrants": registrants,
        "write_protected": kept.write_protected,
    });
    if let Some(held) = shown.held {
        all["holder_uuid"] = text(&held.by).into();
        all["crkey"] = shown.registrants.get(&held.by).copied().unwrap_or(0).into();
    }
    all.to_string().into_bytes()
}

fn decode(text: &str, device: Uuid) -> Result<Kept, String> {
    let all: Value = serde_json::from_str(text).map_err(|e| format!("is no state of a namespace: {e}"))?;
    let uuid = |v: &Value, name: &str| {
        let text = v[name].as_str().ok_or_else(|| format!("{name}: a UUID is needed"))?;
        Uuid::parse_str(text).map_err(|e| format!("{name}: {e}"))
    };
    let owner = uuid(&all, "bdev_uuid")?;
    if owner != device {
        return Err(format!("belongs to the device {owner}, not to {device}; another file is needed"));
    }
    let flag = |name: &str| all[name].as_bool().unwrap_or(false);
    let mut kept = Kept { write_protected: flag("write_protected"), ..Default::default() };
    if !flag("ptpl") {
        return Ok(kept);
    }
    let state = &mut kept.state;
    state.persistent = true;
    for r in all["registrants"].as_array().into_iter().flatten() {
        let key = r["rkey"].as_u64().filter(|k| *k != 0).ok_or("rkey: a number above 0 is needed")?;
        state.registrants.insert(uuid(r, "host_uuid")?.into_bytes(), key);
    }
    if state.registrants.len() > MAX_REGISTRANTS {
        return Err(format!("more than {MAX_REGISTRANTS} registrants"));
    }
    let rtype = all["rtype"].as_u64().unwrap_or(0);
    if rtype != 0 {
        let kind = u8::try_from(rtype).ok().and_then(ReservationType::from_u8);
        let kind = kind.ok_or_else(|| format!("rtype: {rtype} is not within 0 to 6"))?;
        let by = uuid(&all, "holder_uuid")?.into_bytes();
        if !state.is_registered(&by) {
            return Err("holder_uuid: not among the registrants".into());
        }
        state.held = Some(Held { kind, by });
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Kept {
        let mut state = State { persistent: true, ..Default::default() };
        for h in 1..=40u8 {
            state.registrants.insert([h; 16], u64::MAX - u64::from(h));
        }
        state.held = Some(Held { kind: ReservationType::WriteExclusiveAll, by: [7; 16] });
        Kept { state, write_protected: true }
    }

    #[test]
    fn files_come_back() {
        let device = Uuid::from_u128(5);
        let (all, text) = (kept(), String::from_utf8(encode(&kept(), device)).expect("JSON"));
        assert_eq!(decode(&text, device), Ok(all.clone()));
        assert!(decode(&text, Uuid::nil()).is_err_and(|e| e.contains("another file")));
        let mut volatile = all;
        volatile.state.persistent = false;
        let text = String::from_utf8(encode(&volatile, device)).expect("JSON");
        let want = Kept { state: State::default(), write_protected: true };
        assert_eq!(decode(&text, device), Ok(want), "what is not persistent is not kept");
    }

    #[test]
    fn damaged_files_are_refused() {
        let device = Uuid::from_u128(5);
        let whole = String::from_utf8(encode(&kept(), device)).expect("JSON");
        for cut in 0..whole.len() {
            assert!(decode(&whole[..cut], device).is_err(), "cut at {cut}");
        }
        for (from, to) in
            [("\"rtype\":5", "\"rtype\":9"), ("07070707", "99070707"), ("\"rkey\":", "\"rkey\":-")]
        {
            let text = whole.replacen(from, to, 1);
            assert!(text != whole && decode(&text, device).is_err(), "{from} -> {to}");
        }
    }

    #[test]
    fn saving_survives_a_crash_and_is_exclusive() {
        let dir = std::env::temp_dir().join(format!("cryptfold-ptpl-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let path = dir.join("state");
        let (name, device) = (path.to_str().expect("UTF-8"), Uuid::from_u128(9));
        let (file, empty) = StateFile::open(name, device).expect("a new file");
        assert_eq!(empty, Kept::default());
        assert!(StateFile::open(name, device).is_err(), "in use");
        file.save(&kept(), None, None);
        drop(file);
        let (file, back) = StateFile::open(name, device).expect("waits for the last user");
        assert_eq!(back, kept());
        drop(file);
        // Its thread writes nothing any more when the file is nobody's.
        while locked(&IN_USE).contains_key(&path) {
            std::thread::sleep(Duration::from_millis(1));
        }
        // What a crash in the middle of a write leaves behind.
        fs::write(dir.join("state.new"), b"{\"pt").expect("written");
        let (file, back) = StateFile::open(name, device).expect("nobody has it");
        assert_eq!(back, kept());
        drop(file);
        assert!(StateFile::open("/nonexistent/state", device).is_err());
        fs::remove_dir_all(&dir).expect("removed");
    }
}
