//! Volumes on which hosts put LUKS2: who reads their headers, has the key, and puts the host's layer on and takes it off.
//!
//! ```text
//!   header on the volume ---> look ---> verdict:   raw      as it is, and why
//!   record in the pool  --/    |                   bound    decrypted below, with the key of this header
//!                              |                   waiting  bound, but its key is not there yet: hosts try again
//!                      key server, proof           fenced   bound, and its key ended, or the header is another one
//! ```
//!
//! One ordinary thread for each volume: a header is a guest's input and its proof may take a second.
//!
//! Invariants:
//! - A volume becomes bound only while nothing is stored behind its header, and then a record in the pool says to which payload
//!   ([`cryptfold_luks2::Payload::identity`]). So all of the payload is raw without a record, and with it all is under that
//!   key: no part of it is ever taken for the other.
//! - The record is durable before the first write that is decrypted. It goes when nothing is stored behind the header again.
//! - A key that is not proven against the header's digest is never used.
//! - A host that need not say who it is gets nothing bound, unless the volume allows it.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use cryptfold_bdev::{Access, BdevError, Status};
use cryptfold_bdev_crypto::gate::{Access as KeyAccess, KeyGate};
use cryptfold_bdev_crypto::hostcrypt::Shape;
use cryptfold_bdev_crypto::luks::{Bound, Layer, LuksOptions, Shut, Switch, WATCHED_BYTES, Wake};
use cryptfold_luks2::{Header, PROBE_BYTES, Payload, Place};
use cryptfold_nvmf_target::audit::TARGET as AUDIT;
use cryptfold_nvmf_target::{CLAIM, SubsystemInfo};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::control::{Control, lock};
use crate::jsonrpc::RpcError;
use crate::kms::{KeyOptions, OnEnd, Policy, Unproven};

/// How long making a device waits for the first look.
const FIRST_LOOK: Duration = Duration::from_secs(15);
/// How long changes under way may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(15);
/// The furthest beginning of a payload: the raw part before it is looked through.
const MAX_OFFSET_BYTES: u64 = 1 << 30;
/// Bytes read at once.
const STEP_BYTES: usize = 1 << 20;
/// Number of a LUKS volume's key in the pool's map.
const KEY_ID: u16 = 1;
/// First byte of a record.
const RECORD_VERSION: u8 = 1;
/// Between two looks at what may come when there is no server to say.
const PAUSE: Duration = Duration::from_secs(5);

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
    /// Most iterations of a header's digest.
    pub max_iterations: u32,
    /// Identity.
    pub uuid: Option<Uuid>,
}

/// What a volume's stored payload is: the record in the pool.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stored {
    offset_bytes: u64,
    identity: [u8; 32],
}

impl Stored {
    fn of(payload: &Payload) -> Stored {
        Stored { offset_bytes: payload.segment.offset_bytes, identity: payload.identity() }
    }

    /// Version, offset (little-endian), identity.
    fn encode(&self) -> Vec<u8> {
        let mut record = vec![RECORD_VERSION];
        record.extend_from_slice(&self.offset_bytes.to_le_bytes());
        record.extend_from_slice(&self.identity);
        record
    }

    fn decode(record: &[u8]) -> Option<Stored> {
        let (version, rest) = record.split_first()?;
        let (offset, identity) = rest.split_first_chunk::<8>()?;
        let identity = identity.try_into().ok()?;
        (*version == RECORD_VERSION).then_some(Stored { offset_bytes: u64::from_le_bytes(*offset), identity })
    }
}

/// A header that can be acted on.
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
pub struct Volumes(Mutex<Vec<Arc<Volume>>>);

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
    /// Of the key that is watched for it.
    gate: Mutex<Option<Arc<KeyGate>>>,
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
        let device = LuksOptions {
            name: options.name.clone(),
            base_bdev_name: options.base_bdev_name.clone(),
            uuid: options.uuid,
            params: json!({"kms_server": options.kms_server, "allow_unauthenticated": options.allow_unauthenticated,
                "max_iterations": options.max_iterations}),
        };
        let (bdev, switch) = cryptfold_bdev_crypto::luks::create(&c.registry, device)?;
        let volume = Arc::new(Volume {
            base: base.name().to_owned(),
            pool: c.pools()?.manager().info(&info.pool)?.uuid.to_string(),
            volume: info.uuid.to_string(),
            open_to: Mutex::default(),
            gate: Mutex::default(),
            switch: switch.clone(),
            options,
        });
        let (me, control) = (volume.clone(), c.weak());
        lock(&self.0).push(volume.clone());
        let spawned = std::thread::Builder::new().name("luks".into()).spawn(move || me.watch(&control));
        if let Err(e) = spawned {
            drop(c.registry.unregister(bdev.name()));
            lock(&self.0).retain(|v| !Arc::ptr_eq(v, &volume));
            return Err(RpcError::internal(format!("a thread for the volume: {e}")));
        }
        switch.wait_first(FIRST_LOOK);
        Ok(bdev.name().to_owned())
    }

    /// Subsystems, hosts or what lies on a device may have changed: volumes for which that matters are looked at.
    pub fn recheck(&self, c: &Control) {
        for v in lock(&self.0).clone() {
            let now = v.open_to(c);
            if *lock(&v.open_to) != now {
                v.switch.ask();
            }
        }
    }

    /// What they are, for people.
    pub fn status(&self, c: &Control, name: Option<&str>) -> Result<Vec<Value>, RpcError> {
        let all = lock(&self.0).clone();
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
                KeyAccess::Open(_) => "bound",
                KeyAccess::Waiting => "waiting",
                KeyAccess::Fenced => "fenced",
            };
            status["state"] = json!(state);
            status["key_state"] = json!(key.as_ref().map(|k| &k.state));
            status["reason"] = json!(key.and_then(|k| k.reason));
        }
        status
    }

    // ---- the thread

    fn watch(&self, control: &Weak<Control>) {
        let mut pause = None;
        while let Wake::Look(look) = self.switch.wait(pause) {
            let Some(c) = control.upgrade().filter(|c| !c.is_ending()) else { break };
            let verdict = self.look(&c, look);
            self.act(&c, &verdict);
            let interval = || c.kms.poll_interval(&self.options.kms_server).unwrap_or(PAUSE);
            pause = verdict.again.then(interval);
            self.switch.settle(look);
        }
        self.switch.end();
        if let Some(c) = control.upgrade() {
            self.forget_key(&c);
            lock(&c.luks.0).retain(|v| !std::ptr::eq(&**v, self));
        }
    }

    fn forget_key(&self, c: &Control) {
        if let Some(gate) = lock(&self.gate).take() {
            c.kms.forget_proven(&self.key_name(), &gate);
        }
    }

    /// Sets the layer, and tells people.
    fn act(&self, c: &Control, verdict: &Verdict) {
        let before = self.switch.status();
        let mut status = verdict.found.clone().unwrap_or_else(|| json!({}));
        status["state"] = json!(verdict.state);
        status["reason"] = json!(verdict.reason);
        if let Some(layer) = &verdict.layer {
            self.switch.set(layer.clone());
            if !matches!(layer, Layer::Bound(_)) {
                self.forget_key(c);
            }
        }
        if before["state"] != status["state"] || before["reason"] != status["reason"] {
            let (device, uuid) = (&self.options.name, status["uuid"].as_str().unwrap_or(""));
            let (state, reason) = (verdict.state, verdict.reason.as_deref().unwrap_or(""));
            tracing::info!(target: AUDIT, event = "luks volume", device, state, reason, uuid);
        }
        self.switch.say(status);
    }

    fn look(&self, c: &Control, look: u64) -> Verdict {
        *lock(&self.open_to) = self.open_to(c);
        let stored = match c.pools().and_then(|p| Ok(p.manager().volume(&self.pool, &self.volume)?)) {
            Ok(info) => info.host_key,
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
        let Some(stored) = stored else { return self.unbound(c, found) };
        match found {
            Ok(found) if Stored::of(&found.payload) == stored => self.bound(c, &found),
            other => self.estranged(c, stored, other),
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
    fn unbound(&self, c: &Control, found: Result<Found, String>) -> Verdict {
        let found = match found {
            Ok(found) => found,
            Err(reason) => return Verdict::raw(reason),
        };
        self.first(c, &found).unwrap_or_else(|verdict| *verdict).with(&found)
    }

    /// Binds for the first time.
    fn first(&self, c: &Control, found: &Found) -> Result<Verdict, Box<Verdict>> {
        if let Some(who) = lock(&self.open_to).clone() {
            return Err(Verdict::raw(who).into());
        }
        if let Some(why) = self.unexported(c).or_else(|| self.unproven(c)) {
            return Err(Verdict::raw(why).again().into());
        }
        let offset = found.payload.segment.offset_bytes;
        let failed =
            |e: RpcError| Box::new(Verdict::shut(offset, "waiting", format!("the pool: {}", e.message)));
        let written = || {
            Verdict::raw(
                "data was written behind the header before it could be bound; to bind it, discard it (blkdiscard) and \
                 format it again"
                    .into(),
            )
        };
        let manager = c.pools().map_err(failed)?.manager();
        let empty = manager.is_empty_behind(&self.pool, &self.volume, offset);
        if !empty.map_err(|e| failed(e.into()))? {
            return Err(written().into());
        }
        let gate = self.key(c, found).map_err(|e| {
            Box::new(match e {
                // A token says that the host wants it: nothing is written before it is clear.
                Unproven::NotYet(why) if found.objects.is_some() => Verdict::shut(offset, "waiting", why),
                Unproven::NotYet(why) | Unproven::Ended(why) => Verdict::raw(why).again(),
                Unproven::Refused(why) => Verdict::raw(why),
            })
        })?;
        if !self.switch.drain(DRAIN_LIMIT) {
            let why = "writes that are under way do not end".into();
            return Err(Verdict::shut(offset, "waiting", why).into());
        }
        let record = Stored::of(&found.payload).encode();
        let set = manager.set_host_key(&self.pool, &self.volume, offset, Some(record));
        if !set.map_err(|e| failed(e.into()))? {
            return Err(written().into());
        }
        Ok(self.now_bound(found, gate))
    }

    fn now_bound(&self, found: &Found, gate: Arc<KeyGate>) -> Verdict {
        let s = &found.payload.segment;
        let shape = Shape {
            payload_offset_bytes: s.offset_bytes,
            iv_offset: s.iv_tweak,
            iv_large_sectors: false,
            sector_size_bytes: s.sector_bytes,
            key_id: KEY_ID,
        };
        let layer = Some(Layer::Bound(Arc::new(Bound { shape, gate })));
        Verdict { layer, state: "bound", reason: None, found: None, again: false }
    }

    /// With a record, and its header is there.
    fn bound(&self, c: &Control, found: &Found) -> Verdict {
        let offset = found.payload.segment.offset_bytes;
        let verdict = if let Some(who) = lock(&self.open_to).clone() {
            Verdict { again: false, ..Verdict::shut(offset, "fenced", who) }
        } else if let Layer::Bound(_) = self.switch.layer() {
            Verdict { layer: None, state: "bound", reason: None, found: None, again: false }
        } else if let Some(who) = self.unproven(c) {
            // It may be about to: hosts are told to try again.
            Verdict::shut(offset, "waiting", who)
        } else {
            match self.key(c, found) {
                Ok(gate) => self.now_bound(found, gate),
                Err(Unproven::NotYet(why)) => Verdict::shut(offset, "waiting", why),
                Err(Unproven::Ended(why)) => Verdict::shut(offset, "fenced", why),
                Err(Unproven::Refused(why)) => {
                    Verdict { again: false, ..Verdict::shut(offset, "fenced", why) }
                }
            }
        };
        verdict.with(found)
    }

    /// With a record, and its header is gone or another one. What is stored is of no use to anybody else; when it is given up,
    /// the volume is free again.
    fn estranged(&self, c: &Control, stored: Stored, found: Result<Found, String>) -> Verdict {
        let offset = stored.offset_bytes;
        let manager = match c.pools() {
            Ok(pools) => pools.manager(),
            Err(e) => return Verdict::shut(offset, "waiting", e.message),
        };
        // What could not be asked is asked again.
        let given_up = if self.switch.drain(DRAIN_LIMIT) {
            manager.set_host_key(&self.pool, &self.volume, offset, None).ok()
        } else {
            None
        };
        if given_up == Some(true) {
            self.switch.set(Layer::Raw);
            return self.unbound(c, found);
        }
        let again = given_up.is_none();
        let what = match &found {
            Ok(_) => "the header is of another key or payload than what is stored".to_owned(),
            Err(why) => format!("the header of what is stored is gone: {why}"),
        };
        let reason = format!("{what}; restore it, or discard all of the volume (blkdiscard)");
        let shut = Shut { from_bytes: offset, status: Status::ACCESS_DENIED.do_not_retry(), discards: true };
        let layer = Some(Layer::Shut(shut));
        let verdict = Verdict { layer, state: "fenced", reason: Some(reason), found: None, again };
        match &found {
            Ok(found) => verdict.with(found),
            Err(_) => verdict,
        }
    }

    /// The volume's key, proven, watched from now on.
    fn key(&self, c: &Control, found: &Found) -> Result<Arc<KeyGate>, Unproven> {
        let server = &self.options.kms_server;
        let objects = match &found.objects {
            Some(objects) => objects.clone(),
            None => {
                let uuid = found.header.uuid.to_string();
                let named = c.kms.named(server, &uuid).map_err(Unproven::NotYet)?;
                let n = named.len();
                if n != 1 {
                    let why = format!(
                        "the header has no token of type \"cryptfold-kmip\", and {n} keys at the server are named {uuid}"
                    );
                    // The UUID is known when the header is written: its key comes after it.
                    return Err(if n == 0 { Unproven::NotYet(why) } else { Unproven::Refused(why) });
                }
                named
            }
        };
        let fence = OnEnd::Fence;
        let policy = Policy { deactivated: fence, compromised: fence, destroyed: fence, not_found: fence };
        let options = KeyOptions {
            name: self.key_name(),
            server: server.clone(),
            objects,
            policy,
            device: Some(self.options.name.clone()),
        };
        let digest = &found.payload.digest;
        let gate = c.kms.prove(options, |key| {
            if found.payload.key_bytes.is_some_and(|n| n as usize != key.len()) {
                return Err(format!("the key has {} bytes, not as many as the header's", key.len()));
            }
            digest.prove(key, self.options.max_iterations).map_err(|e| e.to_string())
        })?;
        *lock(&self.gate) = Some(gate.clone());
        Ok(gate)
    }

    /// Who gets at the volume without having to say who it is, if that matters.
    fn open_to(&self, c: &Control) -> Option<String> {
        if self.options.allow_unauthenticated {
            return None;
        }
        let claim = c.registry.get(&self.options.name).ok().and_then(|b| b.claimed_by());
        if let Some(by) = claim.filter(|by| by != CLAIM) {
            return Some(format!("it is claimed (by {by}): a device on it, whose hosts are not known"));
        }
        for s in self.exported_by(c) {
            let nqn = &s.options.nqn;
            if s.options.allow_any_host {
                return Some(format!("subsystem {nqn} lets any host in, and none has to authenticate"));
            }
            let open = s.hosts.iter().find(|h| h.dhchap_key.is_none() && h.psk.is_none());
            if let Some(host) = open {
                return Some(format!("host {} of subsystem {nqn} does not have to authenticate", host.nqn));
            }
        }
        None
    }

    fn exported_by(&self, c: &Control) -> Vec<SubsystemInfo> {
        let mut all = c.target().map(|t| t.subsystems()).unwrap_or_default();
        all.retain(|s| s.namespaces.iter().any(|n| n.bdev_name == self.options.name));
        all
    }

    /// Whether it is not known yet which hosts get at it: nothing is bound for the first time then.
    fn unexported(&self, c: &Control) -> Option<String> {
        let unknown = !self.options.allow_unauthenticated && self.exported_by(c).is_empty();
        unknown.then(|| "no subsystem has it as a namespace yet".into())
    }

    /// A host that is connected and has not said who it is: what the configuration asks of hosts, it asks of those that come.
    fn unproven(&self, c: &Control) -> Option<String> {
        let target = c.target().ok().filter(|_| !self.options.allow_unauthenticated)?;
        let queues =
            self.exported_by(c).into_iter().flat_map(|s| target.qpairs(&s.options.nqn).unwrap_or_default());
        let stranger = queues.into_iter().find(|q| q.auth.is_none() && q.tls.is_none())?;
        Some(format!(
            "host {} at {} is connected and has not authenticated",
            stranger.hostnqn, stranger.peer_address
        ))
    }
}
