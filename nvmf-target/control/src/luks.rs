//! Volumes on which hosts put LUKS2: who reads their headers, has the key, and puts the host's layer on and takes it off.
//!
//! ```text
//!   header on the volume ---> look ---> verdict:   raw         as it is, and why
//!   record in the pool  --/    |                   converting  bound, and what was stored before is gone through ([`late`])
//!                              |                   bound       decrypted below, with the key of this header
//!                              |                   waiting     bound, but its key is not there yet: hosts try again
//!                      key server, proof           fenced      bound, and its key ended, or the header is another one
//! ```
//!
//! One ordinary thread for each volume: a header is a guest's input and its proof may take a second. A volume that is in use has its
//! key fetched and proven on another one ([`token`]), and goes on meanwhile as it is.
//!
//! Invariants:
//! - When a volume becomes bound, a record in the pool says to which payload ([`cryptfold_luks2::Payload::identity`]). Without a
//!   record all of the payload is raw; with it a block is under that key, or raw because it was stored before: the pool's map says
//!   which, block by block, so none is ever taken for the other.
//! - The record is durable before the first write that is decrypted. It goes when nothing is stored behind the header again.
//! - A key that is not proven against the header's digest is never used.
//! - A host that need not say who it is gets nothing bound, unless the volume allows it; nor does one that the volume does not name,
//!   if it names any ([`access`]).
//! - Another header fences before anybody else is asked anything.

mod access;
mod late;
pub(crate) mod record;
#[cfg(test)]
mod tests;
mod token;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Status};
use cryptfold_bdev_crypto::gate::{Access as KeyAccess, KeyGate};
use cryptfold_bdev_crypto::hostcrypt::Shape;
use cryptfold_bdev_crypto::luks::{Bound, Layer, LuksOptions, Shut, Switch, WATCHED_BYTES, Wake};
use cryptfold_luks2::{Header, PROBE_BYTES, Payload, Place};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_reduce::AsSent;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::control::{Control, lock};
use crate::jsonrpc::RpcError;
use crate::kms::Unproven;
use access::Refusal;
use late::Pass;
use record::Stored;
use token::{Trial, UnderWay};

/// How long making a device waits for the first look.
const FIRST_LOOK: Duration = Duration::from_secs(15);
/// How long changes under way may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(15);
/// The furthest beginning of a payload: the raw part before it is looked through.
const MAX_OFFSET_BYTES: u64 = 1 << 30;
/// Bytes of a block, here and in the pool's map.
const BLOCK_BYTES: u64 = 4096;
/// Bytes read at once.
const STEP_BYTES: usize = 1 << 20;
/// Number of a LUKS volume's key in the pool's map.
const KEY_ID: u16 = 1;
/// Between two looks at what may come when there is no server to say.
const PAUSE: Duration = Duration::from_secs(5);

/// Why a volume that is in use stays as it is for now.
const PROVING: &str = "its key is being fetched and proven";

/// What `bdev_luks_create` takes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name.
    pub name: String,
    /// The volume.
    pub base_bdev_name: String,
    /// The key server that has hosts' keys.
    pub kms_server: String,
    /// Also for hosts that need not authenticate.
    pub allow_unauthenticated: bool,
    /// The hosts (NQNs) that may get at it while it is bound; none: all that authenticate.
    pub allowed_hosts: Vec<String>,
    /// Most iterations of a header's digest.
    pub max_iterations: u32,
    /// MB/s of what was stored before its key that are reduced late; 0: nothing is, and the volume stays raw then.
    pub late_mb_s: u32,
    /// Identity.
    pub uuid: Option<Uuid>,
}

/// A header that can be acted on.
#[derive(Clone)]
struct Found {
    header: Header,
    payload: Payload,
    /// Of the token; none: the key may have the volume's UUID for its name.
    objects: Option<Vec<String>>,
}

/// What a look comes to.
struct Verdict {
    /// None: it stays.
    layer: Option<Layer>,
    state: &'static str,
    reason: Option<String>,
    found: Option<Value>,
    /// Look again in a while.
    again: bool,
}

impl Verdict {
    fn raw(reason: String) -> Verdict {
        Verdict { layer: Some(Layer::Raw), state: "raw", reason: Some(reason), found: None, again: false }
    }

    fn shut(from_bytes: u64, state: &'static str, reason: String) -> Verdict {
        let status = match state {
            "waiting" => Status::NAMESPACE_NOT_READY,
            _ => Status::ACCESS_DENIED.do_not_retry(),
        };
        let layer = Some(Layer::Shut(Shut { from_bytes, status, discards: false }));
        Verdict { layer, state, reason: Some(reason), found: None, again: true }
    }

    fn again(self) -> Verdict {
        Verdict { again: true, ..self }
    }

    fn with(self, found: &Found) -> Verdict {
        let s = &found.payload.segment;
        let shown = json!({
            "uuid": found.header.uuid.to_string(), "label": found.header.label, "objects": found.objects,
            "payload_offset": s.offset_bytes, "iv_offset": s.iv_tweak, "sector_size": s.sector_bytes,
        });
        Verdict { found: Some(shown), ..self }
    }
}

/// All such volumes.
#[derive(Default)]
pub struct Volumes {
    all: Mutex<Vec<Arc<Volume>>>,
    /// See [`access`].
    door: Mutex<()>,
}

/// See the module.
pub struct Volume {
    options: Options,
    /// Of the volume below.
    base: String,
    pool: String,
    volume: String,
    switch: Arc<Switch>,
    /// Who gets in without saying who it is, when it was last looked at.
    open_to: Mutex<Option<String>>,
    /// It waits for a host that is connected to go or to authenticate.
    strangers: AtomicBool,
    /// Of the key that is watched for it.
    gate: Mutex<Option<Arc<KeyGate>>>,
    /// The key that the header asks for is fetched and proven while hosts go on.
    trial: Mutex<Option<Arc<Trial>>>,
    /// It changes no more.
    snapshot: bool,
    /// Goes through what was stored before.
    pass: Mutex<Option<Arc<Pass>>>,
    /// Without a record nothing from this byte on is under a key: nothing comes to be as long as there is none. At first it is not
    /// known of any.
    unkeyed_from: AtomicU64,
}

impl Volumes {
    /// Makes a device, and its thread; waits for its first look, for some time.
    ///
    /// # Errors
    /// Unknown volume or server, a device that can not be made.
    pub fn add(&self, c: &Control, options: Options) -> Result<String, RpcError> {
        if c.kms.poll_interval(&options.kms_server).is_none() {
            let what = format!("key server \"{}\" (add it with keyring_kmip_add_server)", options.kms_server);
            return Err(RpcError::not_found(what));
        }
        let base = c.registry.get(&options.base_bdev_name)?;
        let (_, info) = crate::methods::find_volume(c, base.name()).map_err(|_| {
            BdevError::Invalid(format!("{} is no volume of a pool: one is needed", options.base_bdev_name))
        })?;
        let mut params = json!({"kms_server": options.kms_server, "allow_unauthenticated": options.allow_unauthenticated,
            "max_iterations": options.max_iterations, "late_mb_s": options.late_mb_s});
        if !options.allowed_hosts.is_empty() {
            params["allowed_hosts"] = json!(options.allowed_hosts);
        }
        let device = LuksOptions {
            name: options.name.clone(),
            base_bdev_name: options.base_bdev_name.clone(),
            uuid: options.uuid,
            params,
        };
        let (bdev, switch) = cryptfold_bdev_crypto::luks::create(&c.registry, device)?;
        let volume = Arc::new(Volume {
            base: base.name().to_owned(),
            pool: c.pools()?.manager().info(&info.pool)?.uuid.to_string(),
            volume: info.uuid.to_string(),
            open_to: Mutex::default(),
            strangers: AtomicBool::new(false),
            gate: Mutex::default(),
            trial: Mutex::default(),
            snapshot: info.snapshot,
            pass: Mutex::default(),
            unkeyed_from: AtomicU64::new(u64::MAX),
            switch: switch.clone(),
            options,
        });
        let (me, control) = (volume.clone(), c.weak());
        lock(&self.all).push(volume.clone());
        let spawned = std::thread::Builder::new().name("luks".into()).spawn(move || me.watch(&control));
        if let Err(e) = spawned {
            drop(c.registry.unregister(bdev.name()));
            lock(&self.all).retain(|v| !Arc::ptr_eq(v, &volume));
            return Err(RpcError::internal(format!("a thread for the volume: {e}")));
        }
        switch.wait_first(FIRST_LOOK);
        Ok(bdev.name().to_owned())
    }

    /// What they are, for people.
    pub fn status(&self, c: &Control, name: Option<&str>) -> Result<Vec<Value>, RpcError> {
        let all = lock(&self.all).clone();
        let wanted = |v: &&Arc<Volume>| !v.switch.is_ended() && name.is_none_or(|n| n == v.options.name);
        let mut found = all.iter().filter(wanted).peekable();
        match (name, found.peek()) {
            (Some(name), None) => Err(RpcError::no_device(name)),
            _ => Ok(found.map(|v| v.status(c)).collect()),
        }
    }
}

impl Volume {
    /// Name of its key among those of the server.
    fn key_name(&self) -> String {
        format!("luks:{}", self.options.name)
    }

    fn status(&self, c: &Control) -> Value {
        let mut status = self.switch.status();
        status["name"] = json!(self.options.name);
        status["base_bdev_name"] = json!(self.base);
        status["kms_server"] = json!(self.options.kms_server);
        // What the key server has said since.
        if let Layer::Bound(bound) = self.switch.layer() {
            let name = self.key_name();
            let key = c.kms.keys().into_iter().find(|k| k.options.name == name);
            let state = match bound.gate.access() {
                KeyAccess::Open(_) if status["state"] == "converting" => "converting",
                KeyAccess::Open(_) => "bound",
                KeyAccess::Waiting => "waiting",
                KeyAccess::Fenced => "fenced",
            };
            status["state"] = json!(state);
            status["key_state"] = json!(key.as_ref().map(|k| &k.state));
            if let Some(pass) = lock(&self.pass).as_ref() {
                let (left_bytes, trouble) = pass.progress();
                status["left_bytes"] = json!(left_bytes);
                if status["reason"].is_null() && status["state"] == "converting" {
                    status["reason"] = json!(trouble);
                }
            }
            if status["reason"].is_null() {
                status["reason"] = json!(key.and_then(|k| k.reason));
            }
        }
        status
    }

    // ---- the thread

    fn watch(self: &Arc<Self>, control: &Weak<Control>) {
        let mut pause = None;
        while let Wake::Look(look) = self.switch.wait(pause) {
            let Some(c) = control.upgrade().filter(|c| !c.is_ending()) else { break };
            let verdict = self.look(&c, look);
            let again = self.act(&c, verdict, look);
            let interval = || c.kms.poll_interval(&self.options.kms_server).unwrap_or(PAUSE);
            pause = again.then(interval);
            self.switch.settle(look);
        }
        self.switch.end();
        self.end_pass();
        if let Some(c) = control.upgrade() {
            self.forget_key(&c);
            lock(&c.luks.all).retain(|v| !Arc::ptr_eq(v, self));
        }
    }

    fn forget_key(&self, c: &Control) {
        if let Some(gate) = lock(&self.gate).take() {
            c.kms.forget_proven(&self.key_name(), &gate);
        }
    }

    /// Sets the layer, and tells people. Whether to look again in a while.
    fn act(self: &Arc<Self>, c: &Control, verdict: Verdict, look: u64) -> bool {
        let _door = lock(&c.luks.door);
        let mut verdict = match (&verdict.layer, self.switch.layer()) {
            (Some(Layer::Bound(bound)), _) => self.admitted(c, bound.clone(), verdict, look),
            (None, Layer::Bound(bound)) => self.admitted(c, bound, verdict, look),
            // Somebody has shut it meanwhile, and asked for another look.
            (None, _) => return true,
            (Some(layer), _) => {
                self.switch.set(layer.clone());
                verdict
            }
        };
        match self.switch.layer() {
            Layer::Bound(bound) if verdict.state == "converting" => {
                verdict.again |= !self.begin_pass(c, &bound.shape);
            }
            Layer::Bound(_) => self.end_pass(),
            _ => {
                self.end_pass();
                self.forget_key(c);
            }
        }
        self.end_trial();
        let mut status = verdict.found.unwrap_or_else(|| json!({}));
        status["state"] = json!(verdict.state);
        status["reason"] = json!(verdict.reason);
        self.tell(status);
        verdict.again
    }

    /// What is about to be bound, or to stay so, is, unless somebody is there who may not be or there is another header by now. With
    /// the door held.
    fn admitted(&self, c: &Control, bound: Arc<Bound>, verdict: Verdict, look: u64) -> Verdict {
        let from = bound.shape.payload_offset_bytes;
        let shut = match self.refusal(c) {
            Some(refusal) => self.refused(refusal, from),
            None if verdict.layer.is_none() => return verdict,
            None if self.switch.set_unless_touched(Layer::Bound(bound), look) => return verdict,
            None => {
                let why = "its header is being changed".to_owned();
                match self.switch.layer() {
                    Layer::Raw if verdict.state == "converting" => Verdict::raw(why).again(),
                    _ => Verdict::shut(from, "waiting", why),
                }
            }
        };
        if let Some(layer) = &shut.layer {
            self.switch.set(layer.clone());
        }
        Verdict { found: verdict.found, ..shut }
    }

    fn tell(&self, status: Value) {
        let before = self.switch.status();
        if before["state"] != status["state"] || before["reason"] != status["reason"] {
            let (device, uuid) = (&self.options.name, status["uuid"].as_str().unwrap_or(""));
            let word = |name: &str| status[name].as_str().unwrap_or("").to_owned();
            let (state, reason) = (word("state"), word("reason"));
            tracing::info!(target: AUDIT, event = "luks volume", device, state, reason, uuid);
        }
        self.switch.say(status);
    }

    fn look(self: &Arc<Self>, c: &Control, look: u64) -> Verdict {
        *lock(&self.open_to) = self.open_to(c);
        self.strangers.store(false, Ordering::SeqCst);
        let (stored, read_only) =
            match c.pools().and_then(|p| Ok(p.manager().volume(&self.pool, &self.volume)?)) {
                Ok(info) => (info.host_key, info.read_only),
                Err(e) => return Verdict::shut(0, "waiting", format!("the pool: {}", e.message)),
            };
        let stored = match stored.map(|record| Stored::decode(&record)) {
            Some(None) => {
                let why = "the pool's record of its key is of another version".to_owned();
                return Verdict { again: false, ..Verdict::shut(0, "fenced", why) };
            }
            stored => stored.flatten(),
        };
        let found = match self.read(c, look) {
            Ok(header) => header.and_then(|header| self.understand(c, header)),
            // It may well be there.
            Err(why) => {
                let from = stored.as_ref().map_or(WATCHED_BYTES, |stored| stored.offset_bytes);
                return Verdict::shut(from, "waiting", format!("the header can not be read: {why}"));
            }
        };
        let Some(stored) = stored else { return self.unbound(c, found, read_only) };
        match found {
            Ok(found) if stored.is(&found.payload) => {
                let unused = self.is_unused(&stored);
                let verdict = self.bound(c, &found, &stored).with(&found);
                match verdict.layer {
                    Some(Layer::Shut(_)) if unused => {
                        Verdict { layer: Some(Layer::Raw), state: "raw", ..verdict }
                    }
                    _ => verdict,
                }
            }
            other if self.is_unused(&stored) => match self.remove_record(c) {
                Ok(true) => self.unbound(c, other, read_only),
                Ok(false) => Verdict::raw("the record of the key was not removed".into()).again(),
                Err(e) => Verdict::raw(format!("the pool: {}", e.message)).again(),
            },
            other => self.estranged(c, &stored, other),
        }
    }

    /// The header, if there is one, or why it is none that counts; the outer error is that of the device.
    fn read(&self, c: &Control, look: u64) -> Result<Result<Option<Header>, String>, String> {
        let reactor = c.handles().first().ok_or("no reactor runs")?;
        let (registry, base) = (c.registry.clone(), self.base.clone());
        let area = reactor.block_on(move || async move {
            let open = registry.open(&base, Access::ReadOnly, |_| ()).and_then(|d| d.channel());
            let channel = open.map_err(|e| e.to_string())?;
            let failed = |status: Status| status.to_string();
            let block = channel.bdev().block_size_bytes() as usize;
            let mut area = vec![0; PROBE_BYTES.next_multiple_of(block)];
            let probe = channel.read(0, (area.len() / block) as u64).await.map_err(failed)?;
            probe.copy_to_slice(&mut area);
            let bytes = Header::area_bytes(&area).unwrap_or(0).min(channel.bdev().size_bytes() as usize);
            while area.len() < bytes {
                let (at, step) = (area.len(), (bytes - area.len()).min(STEP_BYTES));
                let more = channel.read((at / block) as u64, (step / block) as u64).await.map_err(failed)?;
                area.resize(at + step, 0);
                more.copy_to_slice(&mut area[at..]);
            }
            Ok::<_, String>(area)
        });
        let area = area.map_err(|_| "no reactor runs")??;
        self.switch.found_magic(Header::area_bytes(&area).is_some(), look);
        Ok(Header::parse(&area).map_err(|e| e.to_string()))
    }

    /// What a header asks for, if it can be done.
    fn understand(&self, c: &Control, header: Option<Header>) -> Result<Found, String> {
        let header = header.ok_or("there is no LUKS header")?;
        let bytes = c.registry.get(&self.base).map_err(|e| e.to_string())?.size_bytes();
        let payload = header.payload(Place::Attached, bytes).map_err(|e| e.to_string())?;
        let segment = &payload.segment;
        if segment.size_bytes.is_some() {
            return Err(
                "the segment has a size of its own; one that reaches to the device's end is needed".into()
            );
        }
        let offset = segment.offset_bytes;
        if !(WATCHED_BYTES..=MAX_OFFSET_BYTES).contains(&offset) || !offset.is_multiple_of(4096) {
            return Err(format!(
                "the segment's offset is {offset}; a multiple of 4096 from {WATCHED_BYTES} to {MAX_OFFSET_BYTES} is \
                 needed (cryptsetup's own is 16777216)"
            ));
        }
        let objects = header.kmip_token().map_err(|e| e.to_string())?.map(|t| t.objects);
        Ok(Found { header, payload, objects })
    }

    // ---- verdicts

    /// Without a record: all of the payload, if there is any, is raw.
    fn unbound(self: &Arc<Self>, c: &Control, found: Result<Found, String>, read_only: bool) -> Verdict {
        let found = match found {
            Ok(found) => found,
            Err(reason) => return Verdict::raw(reason),
        };
        self.first(c, &found, read_only).unwrap_or_else(|verdict| *verdict).with(&found)
    }

    /// Binds for the first time.
    fn first(self: &Arc<Self>, c: &Control, found: &Found, read_only: bool) -> Result<Verdict, Box<Verdict>> {
        match self.refusal(c) {
            Some(Refusal::Configured(who)) => return Err(Verdict::raw(who).into()),
            Some(Refusal::Connected(who)) => {
                self.strangers.store(true, Ordering::SeqCst);
                return Err(Verdict::raw(who).again().into());
            }
            None => {}
        }
        if let Some(why) = self.unexported(c) {
            return Err(Verdict::raw(why).again().into());
        }
        let offset = found.payload.segment.offset_bytes;
        let failed =
            |e: RpcError| Box::new(Verdict::shut(offset, "waiting", format!("the pool: {}", e.message)));
        let manager = c.pools().map_err(failed)?.manager();
        let is_empty = || manager.is_empty_behind(&self.pool, &self.volume, offset);
        let empty = is_empty().map_err(|e| failed(e.into()))?;
        let before = "data was written behind the header before it could be bound";
        if !empty && self.snapshot {
            return Err(Verdict::raw(format!("{before}, and this is a snapshot of it")).into());
        }
        if !empty && read_only {
            return Err(Verdict::raw(format!("{before}, and the volume is read-only")).again().into());
        }
        if !empty && self.options.late_mb_s == 0 {
            let why = format!(
                "{before}, and late_mb_s is 0; to bind it, discard it (blkdiscard) and format it again"
            );
            return Err(Verdict::raw(why).into());
        }
        // What is in use already goes on as it is: with data there, raw is right until the first write under the key, also when
        // the record is durable by then.
        let not_now = |why: String| {
            Box::new(if empty { Verdict::shut(offset, "waiting", why) } else { Verdict::raw(why).again() })
        };
        let failed = |e: RpcError| not_now(format!("the pool: {}", e.message));
        let key = if empty {
            self.key(c, found, None)
        } else {
            match self.tried(c, found, None) {
                Err(UnderWay(failed)) => {
                    return Err(Verdict::raw(failed.unwrap_or_else(|| PROVING.into())).into());
                }
                Ok(had) => had.and_then(|(proven, objects)| Ok((self.take(c, proven)?, objects))),
            }
        };
        let (gate, objects) = key.map_err(|e| match e {
            // A token says that the host wants it: nothing is written before it is clear.
            Unproven::NotYet(why) if found.objects.is_some() => not_now(why),
            Unproven::NotYet(why) | Unproven::Ended(why) => Verdict::raw(why).again().into(),
            Unproven::Refused(why) => Verdict::raw(why).into(),
        })?;
        if !self.switch.drain(DRAIN_LIMIT) {
            return Err(not_now("writes that are under way do not end".into()));
        }
        // Nothing is written any more until the layer is on.
        let converting = !is_empty().map_err(|e| failed(e.into()))?;
        let stored = Stored { mixed: converting, converting, ..Stored::of(&found.payload, objects) };
        self.store(c, &stored).map_err(not_now)?;
        Ok(self.now_bound(found, gate, &stored))
    }

    /// Nothing behind the header is under a key, while there is no record.
    fn check_unkeyed(&self, c: &Control, found: &Found, goes_on: impl Fn() -> bool) -> Result<(), Unproven> {
        let offset = found.payload.segment.offset_bytes;
        if offset >= self.unkeyed_from.load(Ordering::Relaxed) {
            return Ok(());
        }
        let keyed = self.kinds(c, offset, goes_on, |part| part.keyed);
        if keyed.map_err(|e| Unproven::NotYet(format!("the pool: {}", e.message)))? {
            let why = "blocks behind the header were stored under a host's key (bdev_hostcrypt_create), and whose that is, is not \
                       recorded";
            return Err(Unproven::Refused(why.into()));
        }
        self.unkeyed_from.fetch_min(offset, Ordering::Relaxed);
        Ok(())
    }

    /// Whether there is such a part behind the header; an error when it is of no use any more to know that.
    fn kinds(
        &self,
        c: &Control,
        offset_bytes: u64,
        goes_on: impl Fn() -> bool,
        is: impl Fn(&AsSent) -> bool,
    ) -> Result<bool, RpcError> {
        let manager = c.pools()?.manager();
        let mut next = Some(offset_bytes / BLOCK_BYTES);
        while let Some(from) = next {
            if self.switch.is_ended() || c.is_ending() || !goes_on() {
                return Err(RpcError::internal("what is stored is not looked through any more"));
            }
            let part = manager.as_sent(&self.pool, &self.volume, from)?;
            if is(&part) {
                return Ok(true);
            }
            next = part.next;
        }
        Ok(false)
    }

    /// Makes the record durable. What is stored behind the header stays what it is.
    fn store(&self, c: &Control, stored: &Stored) -> Result<(), String> {
        let failed = |why: String| format!("the pool: {why}");
        let bytes = c.registry.get(&self.base).map_err(|e| failed(e.to_string()))?.size_bytes();
        let manager = c.pools().map_err(|e| failed(e.message))?.manager();
        // Behind the end there is nothing.
        match manager.set_host_key(&self.pool, &self.volume, bytes, Some(stored.encode())) {
            Ok(true) => Ok(()),
            Ok(false) => Err(failed("the record of the key was not changed".into())),
            Err(e) => Err(failed(e.to_string())),
        }
    }

    /// Its record is durable, but the header changed again before the layer was on: nothing was written under the key, and what is
    /// written is raw with the record and without it.
    fn is_unused(&self, stored: &Stored) -> bool {
        stored.mixed && matches!(self.switch.layer(), Layer::Raw)
    }

    /// Without a look at what is stored.
    fn remove_record(&self, c: &Control) -> Result<bool, RpcError> {
        let bytes = c.registry.get(&self.base)?.size_bytes();
        Ok(c.pools()?.manager().set_host_key(&self.pool, &self.volume, bytes, None)?)
    }

    /// What it is when its layer is on.
    fn bound_state(&self, stored: &Stored) -> &'static str {
        let converting = stored.converting && !self.snapshot && self.options.late_mb_s > 0;
        if converting { "converting" } else { "bound" }
    }

    fn still_bound(&self, stored: &Stored) -> Verdict {
        Verdict { layer: None, state: self.bound_state(stored), reason: None, found: None, again: false }
    }

    fn now_bound(&self, found: &Found, gate: Arc<KeyGate>, stored: &Stored) -> Verdict {
        let s = &found.payload.segment;
        let shape = Shape {
            payload_offset_bytes: s.offset_bytes,
            iv_offset: s.iv_tweak,
            iv_large_sectors: false,
            sector_size_bytes: s.sector_bytes,
            key_id: KEY_ID,
            by_block: stored.mixed,
        };
        let layer = Some(Layer::Bound(Arc::new(Bound { shape, gate })));
        Verdict { layer, ..self.still_bound(stored) }
    }

    /// With a record, and somebody gets at it who may not.
    fn refused(&self, refusal: Refusal, from_bytes: u64) -> Verdict {
        match refusal {
            Refusal::Configured(who) => Verdict { again: false, ..Verdict::shut(from_bytes, "fenced", who) },
            // It may be about to go: hosts are told to try again.
            Refusal::Connected(who) => {
                self.strangers.store(true, Ordering::SeqCst);
                Verdict::shut(from_bytes, "waiting", who)
            }
        }
    }

    /// With a record, and its header is there.
    fn bound(self: &Arc<Self>, c: &Control, found: &Found, stored: &Stored) -> Verdict {
        let offset = stored.offset_bytes;
        if let Some(refusal) = self.refusal(c) {
            return self.refused(refusal, offset);
        }
        if let Layer::Bound(_) = self.switch.layer() {
            let other = |objects: &&Vec<String>| !stored.objects.is_empty() && **objects != stored.objects;
            let (stored, trouble) = self.converted(c, stored);
            let verdict = match found.objects.as_ref().filter(other) {
                Some(_) => self.renamed(c, found, &stored),
                None => self.still_bound(&stored),
            };
            return match trouble {
                Some(why) => Verdict { reason: verdict.reason.or(Some(why)), again: true, ..verdict },
                None => verdict,
            };
        }
        // It was shut only to look who is there: the key is still watched.
        let same = found.objects.as_ref().is_none_or(|objects| *objects == stored.objects);
        if same && let Some(gate) = lock(&self.gate).clone() {
            return self.now_bound(found, gate, stored);
        }
        let key = if self.is_unused(stored) {
            match self.tried(c, found, Some(stored)) {
                Err(UnderWay(failed)) => return Verdict::raw(failed.unwrap_or_else(|| PROVING.into())),
                Ok(had) => had.and_then(|had| self.note_and_take(c, stored, had)),
            }
        } else {
            self.key(c, found, Some(stored)).map(|(gate, _)| gate)
        };
        match key {
            Ok(gate) => self.now_bound(found, gate, stored),
            Err(Unproven::NotYet(why)) => Verdict::shut(offset, "waiting", why),
            Err(Unproven::Ended(why)) => Verdict::shut(offset, "fenced", why),
            Err(Unproven::Refused(why)) => Verdict { again: false, ..Verdict::shut(offset, "fenced", why) },
        }
    }

    /// With a record, and its header is gone or another one. What is stored is of no use to anybody else; when it is given up,
    /// the volume is free again.
    fn estranged(self: &Arc<Self>, c: &Control, stored: &Stored, found: Result<Found, String>) -> Verdict {
        let offset = stored.offset_bytes;
        // Before anything that may take its time: pool, changes under way, key server.
        let shut = Shut { from_bytes: offset, status: Status::ACCESS_DENIED.do_not_retry(), discards: true };
        self.switch.set(Layer::Shut(shut));
        // What could not be asked is asked again.
        let drained = self.switch.drain(DRAIN_LIMIT);
        let given_up = if drained { self.let_go(c, stored).ok() } else { None };
        if given_up == Some(true) {
            self.switch.set(Layer::Raw);
            // It could be written for that.
            return self.unbound(c, found, false);
        }
        let again = given_up.is_none();
        let what = match &found {
            Ok(_) => "the header is of another key or payload than what is stored".to_owned(),
            Err(why) => format!("the header of what is stored is gone: {why}"),
        };
        let reason = format!("{what}; restore it, or discard all of the volume (blkdiscard)");
        let layer = Some(Layer::Shut(shut));
        let verdict = Verdict { layer, state: "fenced", reason: Some(reason), found: None, again };
        match &found {
            Ok(found) => verdict.with(found),
            Err(_) => verdict,
        }
    }

    /// Removes the record if nothing is under its key, while nothing is written. Whether it did. Clones are never empty for the pool;
    /// and what is as it was sent is nobody's.
    fn let_go(&self, c: &Control, stored: &Stored) -> Result<bool, RpcError> {
        let manager = c.pools()?.manager();
        if manager.set_host_key(&self.pool, &self.volume, stored.offset_bytes, None)? {
            return Ok(true);
        }
        let keeps = |part: &AsSent| part.keyed || !(stored.mixed || part.runs.is_empty());
        if self.kinds(c, stored.offset_bytes, || true, keeps)? {
            return Ok(false);
        }
        self.remove_record(c)
    }
}
