//! The generated part of `docs/configuration.md`: options of the target, and settings of its configuration file.

use std::fmt::Write as _;

use clap::Arg;
use cryptfold_control::params::Param;
use cryptfold_control::table::When;
use cryptfold_control::{Control, ControlConfig};

use crate::commands;

/// Calls of a configuration file that set something; the others make things (docs/rpc.md).
const SETTINGS: [&str; 11] = [
    "bdev_set_options",
    "bdev_nvme_set_options",
    "bdev_nvme_set_hotplug",
    "bdev_lvol_create_lvstore",
    "keyring_kmip_add_server",
    "nvmf_create_transport",
    "nvmf_set_config",
    "nvmf_set_max_subsystems",
    "nvmf_set_crdt",
    "sock_impl_set_options",
    "log_set_level",
];

/// Parameters that are taken for SPDK's files only.
const WITHOUT_EFFECT: [&str; 4] = ["No effect", "RDMA only", "VFIO-USER only", "Shown as given"];

/// Both tables.
pub fn markdown() -> String {
    let mut out =
        String::from("## Options of `cryptfold target`\n\n| option | default | what |\n|---|---|---|\n");
    let all = commands();
    let target = all.get_subcommands().find(|c| c.get_name() == "target");
    for arg in target.into_iter().flat_map(|c| c.get_arguments()).filter(|a| a.get_id() != "doc") {
        option(&mut out, arg);
    }
    out.push_str("\n## Settings in the configuration file\n");
    let control = Control::new(ControlConfig::default());
    for method in SETTINGS.iter().filter_map(|name| control.table().get(name)) {
        let early = if method.when == When::Startup { " Only before initialisation." } else { "" };
        let _ = writeln!(out, "\n### {}\n\n{}{early}\n", method.name, method.doc);
        out.push_str("| parameter | | what |\n|---|---|---|\n");
        parameters(&mut out, "", &method.params);
    }
    out
}

fn option(out: &mut String, arg: &Arg) {
    let Some(long) = arg.get_long() else { return };
    let short = arg.get_short().map(|c| format!("`-{c}`, ")).unwrap_or_default();
    let values: Vec<&str> = arg.get_value_names().into_iter().flatten().map(|name| name.as_str()).collect();
    let takes = arg.get_action().takes_values();
    let value = if takes { format!(" {}", values.join(" ")) } else { String::new() };
    let default: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    let default =
        if takes && !default.is_empty() { format!("`{}`", default.join(" ")) } else { String::new() };
    let mut what = arg.get_help().map(ToString::to_string).unwrap_or_default().replace('\n', " ");
    if takes {
        for possible in arg.get_possible_values() {
            let help = possible.get_help().map(ToString::to_string).unwrap_or_default();
            let _ = write!(what, "; `{}`: {help}", possible.get_name());
        }
    }
    let _ = writeln!(out, "| {short}`--{long}{value}` | {default} | {} |", what.replace('|', "\\|"));
}

fn parameters(out: &mut String, prefix: &str, params: &[Param]) {
    for p in params.iter().filter(|p| !WITHOUT_EFFECT.iter().any(|none| p.doc.starts_with(none))) {
        let name = format!("{prefix}{}", p.name);
        let shown = if p.required { format!("**{name}**") } else { name.clone() };
        let default = p.default.as_ref().map(|d| format!("; default {d}")).unwrap_or_default();
        let _ = writeln!(out, "| {shown} | {}{default} | {} |", p.kind.replace('|', "\\|"), p.doc);
        parameters(out, &format!("{name}."), &p.members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_a_method() {
        let control = Control::new(ControlConfig::default());
        for name in SETTINGS {
            assert!(control.table().get(name).is_some(), "{name}");
        }
    }
}
