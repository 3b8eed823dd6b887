//! `cryptfold-perf bdev`: load on a block device, in this process: what SPDK's bdevperf is to SPDK.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use cryptfold_bdev::{Access, Channel, Descriptor};
use cryptfold_control::config::Config;
use cryptfold_control::{Control, ControlConfig};

use crate::load::{self, Geometry, LoadArgs, Opener};

/// Loads a block device that a configuration creates, in this process.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Configuration in SPDK's form
    #[arg(long)]
    config: PathBuf,
    /// Device to load: name, alias or UUID
    #[arg(long)]
    bdev: String,
    #[command(flatten)]
    load: LoadArgs,
}

struct Channels(Arc<Descriptor>);

impl Opener for Channels {
    type Sink = Channel;

    async fn open(&self, _job: u32) -> Result<Channel, String> {
        self.0.channel().map_err(|e| e.to_string())
    }

    async fn close(&self, _sink: Rc<Channel>) -> Result<(), String> {
        Ok(())
    }
}

/// Runs and reports.
///
/// # Errors
/// What went wrong, in one line; also when an I/O failed or a block was wrong.
pub fn run(args: &Args) -> Result<(), String> {
    args.load.check()?;
    let config = Config::read(&args.config).map_err(|e| e.to_string())?;
    let control =
        Control::new(ControlConfig { cores: args.load.cores.0.clone(), ..ControlConfig::default() });
    let result = loaded(args, &config, &control);
    let ended = control.shutdown().map_err(|e| e.message);
    let result = result?;
    ended?;
    result.report(args.load.json)
}

fn loaded(args: &Args, config: &Config, control: &Arc<Control>) -> Result<load::LoadResult, String> {
    config.load(control).map_err(|e| e.to_string())?;
    let reads_only = args.load.verify_only || args.load.rw.read_pct(args.load.rwmixread) == 100;
    let access = if reads_only { Access::ReadOnly } else { Access::ReadWrite };
    let descriptor = control.registry().open(&args.bdev, access, |_| {}).map_err(|e| e.to_string())?;
    let bdev = descriptor.bdev();
    let geometry = Geometry { block_size_bytes: u64::from(bdev.block_size_bytes()), blocks: bdev.blocks() };
    load::run(control.handles(), &args.load, geometry, Channels(descriptor))
}
