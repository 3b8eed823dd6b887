//! Creation and removal of the small devices.

use std::time::Duration;

use cryptfold_bdev::{Op, Status};
use cryptfold_bdev_delay::{DelayOptions, Latency};
use cryptfold_bdev_error::{ErrorOptions, Injection, Kind};
use cryptfold_bdev_malloc::MallocOptions;
use cryptfold_bdev_null::NullOptions;
use cryptfold_bdev_passthru::PassthruOptions;
use cryptfold_bdev_split::SplitOptions;
use cryptfold_bdev_uring::UringOptions;
use serde_json::json;
use uuid::Uuid;

use super::bdev::Named;
use crate::control::Control;
use crate::jsonrpc::{RpcError, RpcResult};
use crate::params::{choices, params};
use crate::table::Method;

choices! {
    /// What `bdev_error_inject_error` hits.
    pub enum InjectIo {
        /// Takes all injections back.
        Clear = "clear",
        /// Reads.
        Read = "read",
        /// Writes.
        Write = "write",
        /// Unmaps.
        Unmap = "unmap",
        /// Flushes.
        Flush = "flush",
        /// Everything.
        All = "all",
    }
    /// What it does.
    pub enum InjectKind {
        /// Ends with an error.
        Failure = "failure",
        /// Ends with a given NVMe status.
        NvmeFailure = "nvme_failure",
        /// Does not end.
        Pending = "pending",
        /// Changes a byte.
        CorruptData = "corrupt_data",
        /// Ends as if memory had run out.
        NoMem = "nomem",
    }
    /// Latencies of a delay device.
    pub enum LatencyType {
        /// Most reads.
        AvgRead = "avg_read",
        /// One read in a hundred.
        P99Read = "p99_read",
        /// Most writes.
        AvgWrite = "avg_write",
        /// One write in a hundred.
        P99Write = "p99_write",
    }
}

params! {
    /// `bdev_malloc_create`.
    pub struct MallocCreate {
        /// Name; "MallocN" when not given.
        name: Option<String>,
        /// Bytes in a block: 512 or 4096.
        block_size: u32,
        /// Size in blocks.
        num_blocks: u64,
        /// UUID; random when not given.
        uuid: Option<Uuid>,
        /// Preferred I/O size in blocks.
        optimal_io_boundary: u32 = 0,
        /// Only `block_size` or 0 is possible.
        physical_block_size: Option<u32>,
        /// Only 0 is possible: there is no metadata.
        md_size: Option<u32>,
        /// Only false is possible.
        md_interleave: Option<bool>,
        /// Only 0 is possible.
        dif_type: Option<i32>,
        /// Only false is possible.
        dif_is_head_of_md: Option<bool>,
        /// Only 0 is possible.
        dif_pi_format: Option<u32>,
        /// No effect.
        numa_id: Option<i32>,
    }
    /// `bdev_null_create`.
    pub struct NullCreate {
        /// Name.
        name: String,
        /// Bytes in a block: 512 or 4096.
        block_size: u32,
        /// Size in blocks.
        num_blocks: u64,
        /// UUID; random when not given.
        uuid: Option<Uuid>,
        /// Only `block_size` or 0 is possible.
        physical_block_size: Option<u32>,
        /// Only 0 is possible: there is no metadata.
        md_size: Option<u32>,
        /// Only 0 is possible.
        dif_type: Option<i32>,
        /// Only 0 is possible.
        dif_pi_format: Option<u32>,
        /// Only false is possible.
        dif_is_head_of_md: Option<bool>,
        /// No effect.
        preferred_write_granularity: Option<u32>,
        /// No effect.
        preferred_write_alignment: Option<u32>,
        /// No effect.
        optimal_write_size: Option<u32>,
        /// No effect.
        preferred_unmap_granularity: Option<u32>,
        /// No effect.
        preferred_unmap_alignment: Option<u32>,
    }
    /// `bdev_null_resize`.
    pub struct NullResize {
        /// Name.
        name: String,
        /// New size in MiB.
        new_size: u64,
    }
    /// `bdev_aio_create`.
    pub struct AioCreate {
        /// Name.
        name: String,
        /// File or block device.
        filename: String,
        /// Bytes in a block; the device's own, or 512 for files, when not given.
        block_size: Option<u32>,
        /// Refuse writes.
        readonly: bool = false,
        /// Unmap and write-zeroes by fallocate or discard.
        fallocate: bool = false,
        /// UUID; random when not given.
        uuid: Option<Uuid>,
        /// No effect: io_uring does not block.
        nowait: Option<bool>,
    }
    /// `bdev_uring_create`.
    pub struct UringCreate {
        /// Name.
        name: String,
        /// File, block device, or a namespace's character device (/dev/ng0n1): NVMe commands past the block layer.
        filename: String,
        /// Bytes in a block; the device's own, or 512 for files, when not given.
        block_size: Option<u32>,
        /// UUID; a namespace's own, or random, when not given.
        uuid: Option<Uuid>,
        /// Refuse writes. Ours.
        readonly: bool = false,
        /// Unmap punches holes, discards or deallocates. Ours.
        unmap: bool = true,
    }
    /// `bdev_delay_create`.
    pub struct DelayCreate {
        /// Name.
        name: String,
        /// Device below.
        base_bdev_name: String,
        /// UUID; made of the base's and the name when not given.
        uuid: Option<Uuid>,
        /// Microseconds that a read takes at least.
        avg_read_latency: u64,
        /// Microseconds that one read in a hundred takes at least.
        p99_read_latency: u64,
        /// Microseconds that a write takes at least.
        avg_write_latency: u64,
        /// Microseconds that one write in a hundred takes at least.
        p99_write_latency: u64,
    }
    /// `bdev_delay_update_latency`.
    pub struct DelayUpdate {
        /// Delay device.
        delay_bdev_name: String,
        /// Which latency.
        latency_type: LatencyType,
        /// Microseconds.
        latency_us: u64,
    }
    /// `bdev_error_create`.
    pub struct ErrorCreate {
        /// Device below; the new one is called EE_ and this name.
        base_name: String,
        /// UUID; made of the base's and the name when not given.
        uuid: Option<Uuid>,
    }
    /// `bdev_error_inject_error`.
    pub struct ErrorInject {
        /// Error device.
        name: String,
        /// I/O that is hit.
        io_type: InjectIo,
        /// What happens to it.
        error_type: InjectKind,
        /// Number of I/Os; 0 takes the injection back.
        num: u32 = 1,
        /// Status code type of nvme_failure.
        nvme_sct: u8 = 0,
        /// Status code of nvme_failure.
        nvme_sc: u8 = 0,
        /// No effect.
        queue_depth: Option<u64>,
        /// Byte in the I/O that corrupt_data changes.
        corrupt_offset: u64 = 0,
        /// What it is XORed with, 1 to 255.
        corrupt_value: u8 = 0,
    }
    /// `bdev_passthru_create`.
    pub struct PassthruCreate {
        /// Name.
        name: String,
        /// Device below.
        base_bdev_name: String,
        /// UUID; made of the base's and the name when not given.
        uuid: Option<Uuid>,
    }
    /// `bdev_split_create`.
    pub struct SplitCreate {
        /// Device to split.
        base_bdev: String,
        /// Number of parts.
        split_count: u32,
        /// MiB in a part; equal parts of the whole when not given.
        split_size_mb: Option<u64>,
    }
    /// `bdev_split_delete`.
    pub struct SplitDelete {
        /// Device that was split.
        base_bdev: String,
    }
}

/// How long a removal waits for I/O to drain before it answers; the removal itself goes on.
const DRAIN: Duration = Duration::from_secs(30);

pub fn methods() -> Vec<Method> {
    vec![
        Method::new("bdev_malloc_create", "A RAM disk. Replies its name.", malloc_create),
        delete("bdev_malloc_delete", "bdev_malloc_create"),
        Method::new("bdev_null_create", "Takes writes and forgets them. Replies its name.", null_create),
        delete("bdev_null_delete", "bdev_null_create"),
        Method::new("bdev_null_resize", "Changes the size.", null_resize),
        Method::new(
            "bdev_aio_create",
            "A file or block device (through io_uring). Replies its name.",
            aio_create,
        ),
        delete("bdev_aio_delete", "bdev_aio_create"),
        rescan("bdev_aio_rescan"),
        Method::new(
            "bdev_uring_create",
            "A file, block device or NVMe namespace through io_uring. Replies its name.",
            uring_create,
        ),
        delete("bdev_uring_delete", "bdev_uring_create"),
        rescan("bdev_uring_rescan"),
        Method::new("bdev_delay_create", "Slows its base down. Replies its name.", delay_create),
        delete("bdev_delay_delete", "bdev_delay_create"),
        Method::new("bdev_delay_update_latency", "Changes a latency.", delay_update),
        Method::new("bdev_error_create", "Fails on request. Replies its name.", error_create),
        delete("bdev_error_delete", "bdev_error_create"),
        Method::new("bdev_error_inject_error", "Makes the next I/Os fail.", error_inject),
        Method::new("bdev_passthru_create", "Another name for its base. Replies it.", passthru_create),
        delete("bdev_passthru_delete", "bdev_passthru_create"),
        Method::new("bdev_split_create", "Equal parts of a device. Replies their names.", split_create),
        Method::new("bdev_split_delete", "Removes all parts of a device.", |c, p: SplitDelete| {
            cryptfold_bdev_split::delete(&c.registry, &p.base_bdev)?;
            Ok(json!(true))
        }),
    ]
}

/// A method that removes a device: only of its own kind, with everything on top of it.
pub fn delete(name: &'static str, created_by: &'static str) -> Method {
    Method::new(name, "Removes the device and what is on top of it.", move |c, p: Named| {
        let b = c.registry.get(&p.name)?;
        if b.device().config().first().is_none_or(|(m, _)| m != created_by) {
            let what = format!("\"{}\" is no device of {created_by}: No such device", p.name);
            return Err(RpcError::new(RpcError::ENODEV, what));
        }
        remove(c, b.name())
    })
}

/// Removes a device and waits for its I/O to drain.
pub fn remove(c: &Control, name: &str) -> RpcResult {
    if c.registry.unregister(name)?.wait(DRAIN) {
        return Ok(json!(true));
    }
    Err(RpcError::busy(format!("\"{name}\" is being removed, and still in use after {} s", DRAIN.as_secs())))
}

fn rescan(name: &'static str) -> Method {
    Method::new(name, "Looks at the file's size again.", |c, p: Named| {
        cryptfold_bdev_uring::rescan(&c.registry, &p.name)?;
        Ok(json!(true))
    })
}

/// Parameters of SPDK's that have one possible value here.
fn only<T: PartialEq + std::fmt::Display>(
    name: &str,
    given: Option<T>,
    possible: &[T],
) -> Result<(), RpcError> {
    match given {
        Some(v) if !possible.contains(&v) => {
            let possible: Vec<String> = possible.iter().map(T::to_string).collect();
            Err(RpcError::params(format!(
                "{name}: {v} was given; only {} is possible",
                possible.join(" or ")
            )))
        }
        _ => Ok(()),
    }
}

/// Block metadata and protection information do not exist here.
fn no_metadata(
    md_size: Option<u32>,
    dif_type: Option<i32>,
    dif_pi_format: Option<u32>,
    dif_is_head_of_md: Option<bool>,
) -> Result<(), RpcError> {
    only("md_size", md_size, &[0])?;
    only("dif_type", dif_type, &[0])?;
    only("dif_pi_format", dif_pi_format, &[0])?;
    only("dif_is_head_of_md", dif_is_head_of_md, &[false])
}

fn malloc_create(c: &Control, p: MallocCreate) -> RpcResult {
    no_metadata(p.md_size, p.dif_type, p.dif_pi_format, p.dif_is_head_of_md)?;
    only("md_interleave", p.md_interleave, &[false])?;
    only("physical_block_size", p.physical_block_size, &[0, p.block_size])?;
    let name = p.name.unwrap_or_else(|| {
        let mut free = (0u64..).map(|n| format!("Malloc{n}")).filter(|n| c.registry.get(n).is_err());
        free.next().unwrap_or_default()
    });
    let b = cryptfold_bdev_malloc::create(
        &c.registry,
        MallocOptions {
            name,
            num_blocks: p.num_blocks,
            block_size_bytes: p.block_size,
            uuid: p.uuid,
            optimal_io_boundary: p.optimal_io_boundary,
        },
    )?;
    Ok(json!(b.name()))
}

fn null_create(c: &Control, p: NullCreate) -> RpcResult {
    no_metadata(p.md_size, p.dif_type, p.dif_pi_format, p.dif_is_head_of_md)?;
    only("physical_block_size", p.physical_block_size, &[0, p.block_size])?;
    let options =
        NullOptions { name: p.name, num_blocks: p.num_blocks, block_size_bytes: p.block_size, uuid: p.uuid };
    Ok(json!(cryptfold_bdev_null::create(&c.registry, options)?.name()))
}

fn null_resize(c: &Control, p: NullResize) -> RpcResult {
    let b = c.registry.get(&p.name)?;
    if b.device().config().first().is_none_or(|(m, _)| m != "bdev_null_create") {
        return Err(RpcError::params(format!("name: \"{}\" is no null bdev", p.name)));
    }
    let blocks = p.new_size.checked_mul(1 << 20).map(|b_| b_ / u64::from(b.block_size_bytes()));
    match blocks {
        Some(n) if n > 0 && n <= i64::MAX as u64 / u64::from(b.block_size_bytes()) => b.set_blocks(n),
        _ => {
            return Err(RpcError::params(format!(
                "new_size: {} MiB was given; at least 1 is needed",
                p.new_size
            )));
        }
    }
    Ok(json!(true))
}

fn aio_create(c: &Control, p: AioCreate) -> RpcResult {
    let options = UringOptions {
        name: p.name,
        filename: p.filename.into(),
        block_size_bytes: p.block_size,
        uuid: p.uuid,
        read_only: p.readonly,
        unmap: p.fallocate,
        method: "bdev_aio_create",
    };
    Ok(json!(cryptfold_bdev_uring::create(&c.registry, options)?.name()))
}

fn uring_create(c: &Control, p: UringCreate) -> RpcResult {
    let options = UringOptions {
        name: p.name,
        filename: p.filename.into(),
        block_size_bytes: p.block_size,
        uuid: p.uuid,
        read_only: p.readonly,
        unmap: p.unmap,
        method: "bdev_uring_create",
    };
    Ok(json!(cryptfold_bdev_uring::create(&c.registry, options)?.name()))
}

fn delay_create(c: &Control, p: DelayCreate) -> RpcResult {
    let mut latencies_us = [0; 4];
    latencies_us[Latency::AvgRead as usize] = p.avg_read_latency;
    latencies_us[Latency::P99Read as usize] = p.p99_read_latency;
    latencies_us[Latency::AvgWrite as usize] = p.avg_write_latency;
    latencies_us[Latency::P99Write as usize] = p.p99_write_latency;
    let options = DelayOptions { name: p.name, base_bdev_name: p.base_bdev_name, uuid: p.uuid, latencies_us };
    Ok(json!(cryptfold_bdev_delay::create(&c.registry, options)?.name()))
}

fn delay_update(c: &Control, p: DelayUpdate) -> RpcResult {
    let which = match p.latency_type {
        LatencyType::AvgRead => Latency::AvgRead,
        LatencyType::P99Read => Latency::P99Read,
        LatencyType::AvgWrite => Latency::AvgWrite,
        LatencyType::P99Write => Latency::P99Write,
    };
    cryptfold_bdev_delay::update_latency(&c.registry, &p.delay_bdev_name, which, p.latency_us)?;
    Ok(json!(true))
}

fn error_create(c: &Control, p: ErrorCreate) -> RpcResult {
    let options = ErrorOptions { base_name: p.base_name, uuid: p.uuid };
    Ok(json!(cryptfold_bdev_error::create(&c.registry, options)?.name()))
}

fn error_inject(c: &Control, p: ErrorInject) -> RpcResult {
    let kind = match p.error_type {
        InjectKind::Failure => Kind::Failure,
        InjectKind::NvmeFailure => {
            only("nvme_sct", (p.nvme_sct > 7).then_some(p.nvme_sct), &[0, 1, 2, 3, 7])?;
            Kind::Status(Status::new(p.nvme_sct, p.nvme_sc))
        }
        InjectKind::Pending => Kind::Pending,
        InjectKind::CorruptData => Kind::CorruptData,
        InjectKind::NoMem => Kind::NoMemory,
    };
    if p.error_type == InjectKind::NvmeFailure && p.nvme_sct == 0 && p.nvme_sc == 0 {
        return Err(RpcError::params(
            "nvme_sct and nvme_sc: 0 and 0 mean success; give the status of an error",
        ));
    }
    let inject = |op: Option<Op>, num: u32| {
        let injection = Injection {
            op,
            // Taking back needs no value to corrupt with.
            kind: if num == 0 { Kind::Failure } else { kind },
            num: num.into(),
            corrupt_offset_bytes: p.corrupt_offset,
            corrupt_value: p.corrupt_value,
        };
        cryptfold_bdev_error::inject(&c.registry, &p.name, injection)
    };
    match p.io_type {
        InjectIo::Clear => {
            for op in [None, Some(Op::Read), Some(Op::Write), Some(Op::Unmap), Some(Op::Flush)] {
                inject(op, 0)?;
            }
        }
        InjectIo::Read => inject(Some(Op::Read), p.num)?,
        InjectIo::Write => inject(Some(Op::Write), p.num)?,
        InjectIo::Unmap => inject(Some(Op::Unmap), p.num)?,
        InjectIo::Flush => inject(Some(Op::Flush), p.num)?,
        InjectIo::All => inject(None, p.num)?,
    }
    Ok(json!(true))
}

fn passthru_create(c: &Control, p: PassthruCreate) -> RpcResult {
    let options = PassthruOptions { name: p.name, base_bdev_name: p.base_bdev_name, uuid: p.uuid };
    Ok(json!(cryptfold_bdev_passthru::create(&c.registry, options)?.name()))
}

fn split_create(c: &Control, p: SplitCreate) -> RpcResult {
    let options = SplitOptions {
        base_bdev: p.base_bdev,
        split_count: p.split_count.into(),
        split_size_mb: p.split_size_mb,
    };
    let parts = cryptfold_bdev_split::create(&c.registry, options)?;
    Ok(parts.iter().map(|b| b.name()).collect())
}
