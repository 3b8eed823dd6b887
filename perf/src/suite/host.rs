//! The load: `cryptfold-perf nvmf`, or `cryptfold-perf bdev` over a device that encrypts as a host's dm-crypt does. A process
//! for each measurement, so that the commands of the report are what was run.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::matrix::{Case, Data, Effort, Layers};
use super::process::{Failed, Stop, output};
use super::record::Sample;
use super::target::HOST_KEY;
use crate::load::Rw;

/// A namespace to load.
#[derive(Clone, Debug)]
pub struct Place {
    /// Target's address.
    pub traddr: String,
    /// Its port.
    pub trsvcid: String,
    /// Subsystem.
    pub subnqn: String,
    /// Namespace.
    pub nsid: u32,
    /// This host's name.
    pub hostnqn: String,
    /// Key of TLS.
    pub psk: Option<PathBuf>,
}

/// What a host does, apart from the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nothing.
    Clear,
    /// Encrypts its data.
    Encrypts,
    /// Speaks TLS.
    Tls,
}

impl Kind {
    /// Of a path.
    pub const fn of(path: Layers) -> Kind {
        match path {
            Layers::PoolE2 => Kind::Encrypts,
            Layers::Tls => Kind::Tls,
            Layers::Plain | Layers::Crypto | Layers::Pool => Kind::Clear,
        }
    }
}

/// Everything about a load but the case.
pub struct Host<'a> {
    /// This program.
    pub perf: &'a Path,
    /// CPUs.
    pub cores: String,
    /// Where configurations may be written.
    pub dir: &'a Path,
    /// How long, over how much.
    pub effort: &'a Effort,
    /// Image of real files.
    pub files: Option<&'a Path>,
}

impl Host<'_> {
    fn command(&self, place: &Place, kind: Kind) -> Result<Command, String> {
        let mut c = Command::new(self.perf);
        match kind {
            Kind::Encrypts => {
                let path =
                    self.dir.join(format!("host-{}-{}.json", place.traddr.replace(':', "."), place.trsvcid));
                std::fs::write(&path, configuration(place).to_string())
                    .map_err(|e| format!("{}: {e}", path.display()))?;
                c.arg("bdev").arg("--config").arg(path).args(["--bdev", "host"]);
            }
            Kind::Clear | Kind::Tls => {
                c.args([
                    "nvmf",
                    "--traddr",
                    &place.traddr,
                    "--trsvcid",
                    &place.trsvcid,
                    "--subnqn",
                    &place.subnqn,
                ]);
                c.args([
                    "--nsid",
                    &place.nsid.to_string(),
                    "--hostnqn",
                    &place.hostnqn,
                    "--io-timeout",
                    "600",
                ]);
                if let Some(psk) = place.psk.as_ref().filter(|_| kind == Kind::Tls) {
                    c.arg("--psk").arg(psk);
                }
            }
        }
        c.args(["--cores", &self.cores, "--size", &self.effort.size.0.to_string(), "--json"]);
        Ok(c)
    }

    /// Data options. Paths that do not look at the data get buffers that are made once.
    fn data(&self, c: &mut Command, data: &Data, path: Layers) {
        match (self.files, data.compress_ratio, data.dedupe_pct) {
            (Some(file), ..) => {
                c.arg("--data").arg(file).arg("--stamp");
            }
            (None, ratio, None | Some(0)) if !path.pool() && ratio.is_none_or(|r| r == 1.0) => {}
            _ => {
                let pct = data.dedupe_pct.unwrap_or(0).to_string();
                c.args(["--compress-ratio", &data.ratio().to_string(), "--dedupe-pct", &pct]);
            }
        }
    }

    /// The command that writes all of the span once.
    ///
    /// # Errors
    /// When a configuration can not be written.
    pub fn fill_command(
        &self,
        place: &Place,
        kind: Kind,
        case: &Case,
        data: &Data,
    ) -> Result<Command, String> {
        let mut c = self.command(place, kind)?;
        let size = self.effort.size.0.to_string();
        c.args(["--rw", "write", "--bs", "128k", "--iodepth", "32", "--io-size", &size]);
        c.args(["--ramp-time", "0", "--runtime", "0"]);
        self.data(&mut c, data, case.path);
        Ok(c)
    }

    /// The command that measures a case.
    ///
    /// # Errors
    /// When a configuration can not be written.
    pub fn case_command(
        &self,
        place: &Place,
        kind: Kind,
        case: &Case,
        data: &Data,
    ) -> Result<Command, String> {
        let mut c = self.command(place, kind)?;
        c.args(["--rw", case.op.name(), "--bs", &case.bs.to_string(), "--iodepth", &case.depth.to_string()]);
        if case.op.mixed() {
            c.args(["--rwmixread", &case.read_pct.to_string()]);
        }
        c.args([
            "--runtime",
            &self.effort.seconds.to_string(),
            "--ramp-time",
            &self.effort.warmup.to_string(),
        ]);
        if !matches!(case.op, Rw::Read | Rw::RandRead) {
            self.data(&mut c, data, case.path);
        }
        Ok(c)
    }
}

/// The host's devices: the namespace, and its cipher above.
fn configuration(place: &Place) -> Value {
    let attach = json!({"name": "r", "trtype": "TCP", "adrfam": "IPv4", "traddr": place.traddr,
        "trsvcid": place.trsvcid, "subnqn": place.subnqn, "hostnqn": place.hostnqn});
    let key = json!({"name": "host", "cipher": "AES_XTS", "key": HOST_KEY[0], "key2": HOST_KEY[1]});
    let base = format!("rn{}", place.nsid);
    json!({"subsystems": [
        {"subsystem": "accel", "config": [{"method": "accel_crypto_key_create", "params": key}]},
        {"subsystem": "bdev", "config": [
            {"method": "bdev_nvme_attach_controller", "params": attach},
            {"method": "bdev_crypto_create", "params": {"base_bdev_name": base, "name": "host", "key_name": "host"}}]}]})
}

/// Runs a load and reads its report.
///
/// # Errors
/// What went wrong, I/O errors included, or that the suite was told to stop.
pub fn run(command: &mut Command, stop: &Stop, round: u32) -> Result<Sample, Failed> {
    let text = output(command, stop)?;
    // `bdev` may say more behind.
    let first = text.lines().next().unwrap_or_default();
    let v: Value = serde_json::from_str(first).map_err(|e| format!("the load's report: {e}: {first}"))?;
    let number = |v: &Value| v.as_f64().ok_or_else(|| format!("the load's report lacks figures: {first}"));
    let latency = &v["lat_us"];
    Ok(Sample {
        round,
        iops: number(&v["iops"])?,
        mean_us: number(&latency["mean"])?,
        p50_us: number(&latency["p50"])?,
        p99_us: number(&latency["p99"])?,
        p99_9_us: number(&latency["p99_9"])?,
        max_us: number(&latency["max"])?,
        host_busy_pct: number(&v["cpu"]["busy_pct"])?,
        cost: None,
    })
}
