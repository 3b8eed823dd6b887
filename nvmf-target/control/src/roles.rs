//! Who may call what: each method belongs to one role. What changes nothing is open to every role.
//!
//! The lists are the policy, in one place to be looked through. A method that is in none of them is found when the table is made.

use std::fmt;

use serde_json::Value;

/// What a method takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Reads only: everybody with a role may call it.
    Viewer,
    /// Changes devices, pools, subsystems and the program. Names keys, and never gives or shows one.
    Operator,
    /// Makes, changes, opens and destroys keys.
    Security,
    /// Does what both of the others do.
    Both,
}

impl Role {
    /// Of a method. `None`: it is in none of the lists.
    pub(crate) fn of(method: &str) -> Option<Role> {
        [(Role::Viewer, VIEWER), (Role::Operator, OPERATOR), (Role::Security, SECURITY), (Role::Both, BOTH)]
            .into_iter()
            .find_map(|(role, list)| list.contains(&method).then_some(role))
    }
}

impl Role {
    /// Of a call of a method of this role: one that reads, unless a parameter says otherwise.
    pub(crate) fn of_call(self, method: &str, params: Option<&Value>) -> Role {
        let reset = params.and_then(|p| p.get("reset_mode")).is_some_and(|mode| mode != "none");
        if method == "bdev_get_iostat" && reset { Role::Operator } else { self }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Security => "security",
            Role::Both => "operator and security",
        })
    }
}

/// Methods that change nothing.
const VIEWER: &[&str] = &[
    "rpc_get_methods",
    "spdk_get_version",
    "framework_wait_init",
    "framework_get_reactors",
    "thread_get_stats",
    "thread_get_pollers",
    "thread_get_io_channels",
    "framework_get_scheduler",
    "framework_get_governor",
    "framework_get_subsystems",
    "log_get_level",
    "log_get_print_level",
    "log_get_flags",
    "notify_get_types",
    "notify_get_notifications",
    "cryptfold_get_overview",
    "cryptfold_get_fips_mode",
    "cryptfold_get_history",
    "bdev_get_bdevs",
    "bdev_wait_for_examine",
    "bdev_get_iostat",
    "bdev_get_histogram",
    "bdev_get_histogram_borders",
    "bdev_nvme_get_controllers",
    "bdev_nvme_get_controller_health_info",
    "framework_get_pci_devices",
    "cryptfold_encryption_status",
    "accel_crypto_keys_get",
    "keyring_get_keys",
    "keyring_kmip_get_servers",
    "keyring_kmip_get_keys",
    "bdev_luks_get_status",
    "bdev_lvol_get_lvstores",
    "bdev_lvol_get_lvols",
    "cryptfold_pool_get_domains",
    "nvmf_get_transports",
    "nvmf_get_subsystems",
    "nvmf_subsystem_get_listeners",
    "nvmf_subsystem_get_controllers",
    "nvmf_subsystem_get_qpairs",
    "nvmf_get_stats",
    "nvmf_discovery_get_referrals",
    "iobuf_get_stats",
    "sock_impl_get_options",
    "sock_get_default_impl",
];

/// Storage, network, and the program itself.
const OPERATOR: &[&str] = &[
    "spdk_kill_instance",
    "framework_start_init",
    "framework_monitor_context_switch",
    "framework_set_scheduler",
    "log_set_level",
    "log_set_print_level",
    "log_set_flag",
    "log_clear_flag",
    "log_enable_timestamps",
    "bdev_set_options",
    "bdev_examine",
    "bdev_reset_iostat",
    "bdev_enable_histogram",
    "cryptfold_trace",
    "bdev_set_qos_limit",
    "bdev_set_qd_sampling_period",
    "bdev_malloc_create",
    "bdev_malloc_delete",
    "bdev_null_create",
    "bdev_null_delete",
    "bdev_null_resize",
    "bdev_aio_create",
    "bdev_aio_delete",
    "bdev_aio_rescan",
    "bdev_uring_create",
    "bdev_uring_delete",
    "bdev_uring_rescan",
    "bdev_delay_create",
    "bdev_delay_delete",
    "bdev_delay_update_latency",
    "bdev_error_create",
    "bdev_error_delete",
    "bdev_error_inject_error",
    "bdev_passthru_create",
    "bdev_passthru_delete",
    "bdev_split_create",
    "bdev_split_delete",
    "bdev_nvme_attach_controller",
    "bdev_nvme_detach_controller",
    "bdev_nvme_reset_controller",
    "bdev_nvme_set_options",
    "bdev_nvme_set_hotplug",
    "bdev_crypto_create",
    "bdev_crypto_delete",
    "bdev_hostcrypt_create",
    "bdev_hostcrypt_delete",
    "bdev_luks_create",
    "bdev_luks_delete",
    "bdev_lvol_create_lvstore",
    "bdev_lvol_delete_lvstore",
    "bdev_lvol_grow_lvstore",
    "bdev_lvol_rename_lvstore",
    "bdev_lvol_create",
    "bdev_lvol_delete",
    "bdev_lvol_snapshot",
    "bdev_lvol_clone",
    "bdev_lvol_inflate",
    "bdev_lvol_decouple_parent",
    "bdev_lvol_resize",
    "bdev_lvol_rename",
    "bdev_lvol_set_read_only",
    "cryptfold_pool_open",
    "cryptfold_pool_close",
    "cryptfold_pool_check",
    "cryptfold_pool_scrub",
    "cryptfold_pool_dedupe",
    "cryptfold_pool_create_domain",
    "nvmf_set_config",
    "nvmf_set_max_subsystems",
    "nvmf_set_crdt",
    "nvmf_create_transport",
    "nvmf_create_subsystem",
    "nvmf_delete_subsystem",
    "nvmf_subsystem_add_ns",
    "nvmf_subsystem_remove_ns",
    "nvmf_ns_add_host",
    "nvmf_ns_remove_host",
    "nvmf_subsystem_add_listener",
    "nvmf_subsystem_remove_listener",
    "nvmf_subsystem_listener_set_ana_state",
    "nvmf_subsystem_set_ns_ana_group",
    "nvmf_subsystem_add_host",
    "nvmf_subsystem_set_keys",
    "nvmf_subsystem_remove_host",
    "nvmf_subsystem_allow_any_host",
    "nvmf_discovery_add_referral",
    "nvmf_discovery_remove_referral",
    "iobuf_set_options",
    "sock_impl_set_options",
    "sock_set_default_impl",
    "accel_set_options",
    "accel_set_driver",
    "accel_assign_opc",
    "scheduler_set_options",
    "bdev_raid_set_options",
    "bdev_iscsi_set_options",
    "framework_disable_cpumask_locks",
    "framework_enable_cpumask_locks",
    "vmd_enable",
    "nbd_set_options",
];

/// Keys.
const SECURITY: &[&str] = &[
    "cryptfold_encryption_unlock",
    "cryptfold_encryption_lock",
    "cryptfold_encryption_passwd",
    "cryptfold_encryption_add_slot",
    "cryptfold_encryption_remove_slot",
    "cryptfold_encryption_rotate_kek",
    "cryptfold_encryption_rotate",
    "cryptfold_encryption_disable",
    "cryptfold_encryption_enable",
    "cryptfold_encryption_renew",
    "cryptfold_encryption_backup",
    "cryptfold_encryption_erase",
    "cryptfold_encryption_restore",
    "accel_crypto_key_create",
    "accel_crypto_key_destroy",
    "keyring_file_add_key",
    "keyring_file_remove_key",
    "keyring_kmip_add_server",
    "keyring_kmip_remove_server",
    "keyring_kmip_add_key",
    "keyring_kmip_remove_key",
    "keyring_linux_set_options",
];

/// Run other methods, or write files: keys that were given inline go to files when the configuration is asked for.
const BOTH: &[&str] = &["save_config", "load_config", "framework_get_config"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_reset_statistics_is_no_reading() {
        for (params, role) in [
            (serde_json::json!({"name": "m"}), Role::Viewer),
            (serde_json::json!({"reset_mode": "none"}), Role::Viewer),
            (serde_json::json!({"reset_mode": "all"}), Role::Operator),
        ] {
            assert_eq!(Role::Viewer.of_call("bdev_get_iostat", Some(&params)), role, "{params}");
        }
    }

    #[test]
    fn every_method_stands_in_one_list() {
        let all: Vec<&str> = [VIEWER, OPERATOR, SECURITY, BOTH].concat();
        let table = crate::methods::all();
        for name in &all {
            assert_eq!(all.iter().filter(|n| *n == name).count(), 1, "{name} stands in two lists");
            assert!(table.iter().any(|m| m.name == *name), "there is no method {name}");
        }
        for m in &table {
            assert!(all.contains(&m.name), "{} has no role", m.name);
        }
    }
}
