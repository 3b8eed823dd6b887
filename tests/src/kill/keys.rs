//! Changes of keys under load: a domain is encrypted anew, switched off and on again, while the program dies; another is erased.
//!
//! What was answered holds after any kill; what was not, happened whole or not at all.

use std::path::Path;

use cryptfold_bdev_sim::Rng;
use cryptfold_bdev_sim::content::{self, Kind, Tag};
use serde_json::{Value, json};

use super::load::SETS;
use super::program::Program;
use crate::search::Patterns;

/// The domain whose keys change.
const DOMAIN: &str = "shared";
/// Slow enough for several kills while one change is carried out.
const RATE_MB_S: u32 = 1;
/// While the end of a change is waited for.
const FAST_MB_S: u32 = 1000;

/// What a domain is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    encrypted: bool,
    generation: u64,
}

/// A call that a round makes under load.
pub struct Call {
    pub method: &'static str,
    pub params: Value,
    then: State,
}

/// What has been asked for, and what has come of it.
#[derive(Default)]
pub struct Changes {
    under_way: Option<State>,
    /// Changes that ended in the state that was asked for.
    pub ended: u64,
    /// Kills while one was being carried out.
    pub cut: u64,
}

/// (what the domain is like, whether its keys are being changed).
fn state(program: &Program) -> Result<(State, bool), String> {
    let status = program.rpc("cryptfold_encryption_status", &json!({"name": "pool"}))?;
    let found =
        status["pools"][0]["domains"].as_array().and_then(|all| all.iter().find(|d| d["name"] == DOMAIN));
    let read = |d: &Value| {
        let state = State { encrypted: d["encrypted"].as_bool()?, generation: d["generation"].as_u64()? };
        Some((state, d["changing"].as_bool()?))
    };
    found.and_then(read).ok_or_else(|| format!("no state of the domain: {status:#}"))
}

impl Changes {
    /// The next change, when none is under way.
    pub fn next(&self, program: &Program, rng: &mut Rng) -> Result<Option<Call>, String> {
        let (now, changing) = state(program)?;
        if changing {
            return Ok(None);
        }
        let (method, encrypted) = match now.encrypted {
            false => ("cryptfold_encryption_enable", true),
            true if rng.one_in(2) => ("cryptfold_encryption_disable", false),
            true => ("cryptfold_encryption_rotate", true),
        };
        let params = json!({"name": "pool", "domain": DOMAIN, "rate_mb_s": RATE_MB_S});
        Ok(Some(Call { method, params, then: State { encrypted, generation: now.generation + 1 } }))
    }

    /// After a restart: what the round's call has come to. `answered`: it had succeeded before the kill.
    pub fn judge(&mut self, program: &Program, call: Option<(Call, bool)>) -> Result<(), String> {
        let (now, changing) = state(program)?;
        if let Some((call, answered)) = call {
            if answered || now == call.then {
                self.under_way = Some(call.then);
            } else if now.generation + 1 != call.then.generation {
                return Err(format!("{} was cut off, and the domain is {now:?}", call.method));
            }
        }
        let Some(wanted) = self.under_way else { return Ok(()) };
        if now != wanted {
            return Err(format!("the domain is {now:?} instead of {wanted:?}"));
        }
        self.cut += u64::from(changing);
        if !changing {
            self.under_way = None;
            self.ended += 1;
        }
        Ok(())
    }

    /// Lets the change under way come to its end, then switches encryption off and on: what is on the device is in clear in
    /// between, and nothing of it afterwards.
    pub fn end(&mut self, program: &Program, disk: &Path) -> Result<(), String> {
        self.finish(program)?;
        if state(program)?.0.encrypted {
            self.change(program, "cryptfold_encryption_disable", false)?;
        }
        let sets = Patterns::new((0..SETS).map(literal));
        if sets.count_in_file(disk)? == 0 {
            return Err("nothing is found on the device while it is not encrypted".into());
        }
        self.change(program, "cryptfold_encryption_enable", true)?;
        match sets.count_in_file(disk)? {
            0 => Ok(()),
            n => Err(format!("{n} pieces are left in clear after encryption was switched on")),
        }
    }

    fn change(&mut self, program: &Program, method: &str, encrypted: bool) -> Result<(), String> {
        program.rpc(method, &json!({"name": "pool", "domain": DOMAIN, "rate_mb_s": FAST_MB_S}))?;
        self.under_way = Some(State { encrypted, generation: state(program)?.0.generation });
        self.finish(program)
    }

    fn finish(&mut self, program: &Program) -> Result<(), String> {
        let changing = || state(program).map(|(_, changing)| changing);
        if changing()? {
            program.rpc("cryptfold_encryption_renew", &json!({"name": "pool", "rate_mb_s": FAST_MB_S}))?;
        }
        super::wait_until("the change of keys ends", || changing().map(|c| !c))?;
        self.judge(program, None)
    }
}

/// What of a duplicate's content a compressor has to keep as it is: 16 bytes of its noise.
fn literal(set: u64) -> Vec<u8> {
    let tag = Tag { volume: 0, lba: 0, generation: 0, kind: Kind::Duplicate(set) };
    content::blocks(&[tag], 4096)[16..32].to_vec()
}

/// The erasure of a domain.
pub fn erase(domain: &str) -> (&'static str, Value) {
    ("cryptfold_encryption_erase", json!({"name": "pool", "domain": domain, "confirm": domain}))
}

/// Which domain it is by now: another one of the same name is made after an erasure.
pub fn identity(program: &Program, domain: &str) -> Result<String, String> {
    let status = program.rpc("cryptfold_encryption_status", &json!({"name": "pool"}))?;
    let found =
        status["pools"][0]["domains"].as_array().and_then(|all| all.iter().find(|d| d["name"] == domain));
    let uuid = found.and_then(|d| d["uuid"].as_str());
    uuid.map(str::to_owned).ok_or_else(|| format!("there is no domain {domain}: {status:#}"))
}
