//! From a volume to what a host types: `volume create --export` and `connect`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::Args;
use cryptfold_control::client::Client;
use serde_json::{Value, json};

use crate::rpc::{absolute, call, connect as to_target, print};
use crate::status::list;
use crate::{Failure, SocketArgs};

/// Port that NVMe/TCP subsystems have by registration.
const PORT: u16 = 4420;

#[derive(Args)]
pub struct ExportArgs {
    /// Make a subsystem with the volume as its namespace, and print what a host types to connect.
    #[arg(long)]
    export: bool,
    /// Name of the subsystem [default: nqn.2014-08.org.nvmexpress:uuid:UUID of the volume].
    #[arg(long, requires = "export")]
    nqn: Option<String>,
    /// Where it listens: ADDRESS, ADDRESS:PORT or [IPv6]:PORT [default: where the target listens already, or 127.0.0.1:4420].
    #[arg(long, value_name = "ADDRESS", requires = "export", value_parser = address)]
    listen: Option<SocketAddr>,
    /// Only this host may connect, by its NQN; may be given several times [default: any host that reaches the port].
    #[arg(long = "host", value_name = "NQN", requires = "export")]
    hosts: Vec<String>,
    /// The host encrypts (dm-crypt, aes-xts-plain64): file of the target's machine with its key, 64 bytes raw or hexadecimal, mode
    /// 0600. The volume stores plaintext, reduced and encrypted with the pool's key; the host sees its ciphertext.
    #[arg(long, value_name = "FILE", requires = "export")]
    host_key: Option<String>,
    /// Bytes in a data unit of the host's dm-crypt.
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = ["512", "4096"], requires = "host_key")]
    host_sector_size: String,
}

#[derive(Args)]
pub struct ConnectArgs {
    /// Only this subsystem.
    nqn: Option<String>,
    /// JSON: an array of the lines.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArgs,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    let alone = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    text.parse()
        .or_else(|_| alone.map(|ip| SocketAddr::new(ip, PORT)))
        .map_err(|_| format!("\"{text}\" is no address; examples: 10.0.0.1, 10.0.0.1:4420, [fd00::1]:4420"))
}

/// Where the target listens already, the first of it.
fn listens(subsystems: &Value) -> Option<SocketAddr> {
    list(subsystems).iter().flat_map(|s| list(&s["listen_addresses"])).find_map(socket_address)
}

fn socket_address(listener: &Value) -> Option<SocketAddr> {
    let ip = listener["traddr"].as_str()?.parse().ok()?;
    Some(SocketAddr::new(ip, listener["trsvcid"].as_str()?.parse().ok()?))
}

/// The line for a host. An address that stands for all of the machine's becomes the machine's name.
fn connect_line(nqn: &str, at: SocketAddr) -> String {
    let all = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let host = if all.contains(&at.ip()) {
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    } else {
        at.ip().to_string()
    };
    format!("nvme connect -t tcp -a {host} -s {} -n {nqn}", at.port())
}

/// A subsystem with the volume `uuid` as its only namespace, the host's layer in between named after `volume`; the line for its
/// hosts. Undone if it fails.
pub fn export(
    client: &mut Client,
    uuid: &str,
    volume: &str,
    args: &ExportArgs,
) -> Result<Vec<String>, Failure> {
    if !args.export {
        return Ok(Vec::new());
    }
    let Some(key_file) = &args.host_key else { return serve(client, uuid, uuid, args) };
    let layer = format!("{volume}-host");
    let params = json!({
        "base_bdev_name": uuid, "name": layer, "key_file": absolute(key_file.clone())?,
        "sector_size": args.host_sector_size.parse::<u32>().unwrap_or(512),
    });
    call(client, "bdev_hostcrypt_create", Some(params))?;
    let lines = serve(client, uuid, &layer, args);
    if lines.is_err() {
        // What failed is what the user has to know.
        let _ = call(client, "bdev_hostcrypt_delete", Some(json!({"name": layer})));
    }
    lines
}

/// A subsystem, named after the volume if it has no name, with the device `bdev`.
fn serve(client: &mut Client, uuid: &str, bdev: &str, args: &ExportArgs) -> Result<Vec<String>, Failure> {
    let own = || format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}");
    let nqn = args.nqn.clone().unwrap_or_else(own);
    let transports = call(client, "nvmf_get_transports", None)?;
    if !list(&transports).iter().any(|t| t["trtype"] == "TCP") {
        call(client, "nvmf_create_transport", Some(json!({"trtype": "TCP"})))?;
    }
    let subsystems = call(client, "nvmf_get_subsystems", None)?;
    let local = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT);
    let at = args.listen.or_else(|| listens(&subsystems)).unwrap_or(local);
    let any = args.hosts.is_empty();
    call(client, "nvmf_create_subsystem", Some(json!({"nqn": nqn, "allow_any_host": any})))?;
    let lines = furnish(client, &nqn, bdev, at, &args.hosts).and_then(|()| lines(client, Some(&nqn)));
    if lines.is_err() {
        // What failed is what the user has to know.
        let _ = call(client, "nvmf_delete_subsystem", Some(json!({"nqn": nqn})));
    }
    let lines = lines?;
    if any {
        eprintln!(
            "cryptfold: any host that reaches this address may connect; --host NQN names those that may"
        );
    }
    Ok(lines)
}

fn furnish(
    client: &mut Client,
    nqn: &str,
    bdev: &str,
    at: SocketAddr,
    hosts: &[String],
) -> Result<(), Failure> {
    for host in hosts {
        call(client, "nvmf_subsystem_add_host", Some(json!({"nqn": nqn, "host": host})))?;
    }
    let namespace = json!({"nqn": nqn, "namespace": {"bdev_name": bdev}});
    call(client, "nvmf_subsystem_add_ns", Some(namespace))?;
    let listen = json!({"nqn": nqn, "listen_address": {
        "trtype": "TCP", "traddr": at.ip().to_string(), "trsvcid": at.port().to_string(),
    }});
    call(client, "nvmf_subsystem_add_listener", Some(listen)).map(drop)
}

/// What hosts type, a line for each subsystem and address.
fn lines(client: &mut Client, nqn: Option<&str>) -> Result<Vec<String>, Failure> {
    let subsystems = call(client, "nvmf_get_subsystems", nqn.map(|nqn| json!({"nqn": nqn})))?;
    let mut lines = Vec::new();
    for s in list(&subsystems).iter().filter(|s| s["subtype"] != "Discovery") {
        let all = list(&s["listen_addresses"]).iter().filter_map(socket_address);
        lines.extend(all.map(|at| connect_line(s["nqn"].as_str().unwrap_or_default(), at)));
    }
    Ok(lines)
}

pub fn connect(args: ConnectArgs) -> Result<(), Failure> {
    let lines = lines(&mut to_target(&args.socket)?, args.nqn.as_deref())?;
    if lines.is_empty() {
        return Err(Failure::Failed(
            "no subsystem listens; cryptfold volume create --export makes one".into(),
        ));
    }
    if args.json {
        print(&lines.into());
    } else {
        lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_lines() {
        assert_eq!(address("10.0.0.1"), Ok("10.0.0.1:4420".parse().unwrap()));
        assert_eq!(address("10.0.0.1:1"), Ok("10.0.0.1:1".parse().unwrap()));
        assert_eq!(address("[fd00::1]"), Ok("[fd00::1]:4420".parse().unwrap()));
        assert_eq!(address("[fd00::1]:5"), Ok("[fd00::1]:5".parse().unwrap()));
        assert!(address("host").is_err() && address("1.2.3.4:70000").is_err());
        let line = connect_line("nqn.x", "10.0.0.1:4421".parse().unwrap());
        assert_eq!(line, "nvme connect -t tcp -a 10.0.0.1 -s 4421 -n nqn.x");
        assert!(!connect_line("nqn.x", "0.0.0.0:4420".parse().unwrap()).contains("0.0.0.0"));
    }
}
