#!/usr/bin/env python3
"""Every method that SPDK's clients need, through SPDK's own client, against a running target.

    methods.py SPDK_RPC CRYPTFOLD

Runs `SPDK_RPC --server` (PyPI's spdk-rpc) and a target of its own; each reply is compared with what docs/rpc.md and SPDK's
schema say. GROUPS lists the methods: each has to be answered with success at least once. One PASS or FAIL line per part;
the first FAIL ends the run.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib

GROUPS = {
    "framework": """rpc_get_methods spdk_get_version framework_get_subsystems framework_get_config framework_start_init
        framework_wait_init spdk_kill_instance framework_get_reactors thread_get_stats thread_get_pollers
        thread_get_io_channels log_set_level log_get_level log_set_print_level log_get_print_level log_set_flag
        log_clear_flag log_get_flags notify_get_types notify_get_notifications""",
    "devices and target": """bdev_get_bdevs bdev_wait_for_examine bdev_examine bdev_set_options nvmf_create_transport
        nvmf_get_transports nvmf_create_subsystem nvmf_get_subsystems nvmf_delete_subsystem nvmf_subsystem_add_ns
        nvmf_subsystem_remove_ns nvmf_subsystem_add_listener nvmf_subsystem_remove_listener
        nvmf_subsystem_get_listeners nvmf_subsystem_get_controllers nvmf_subsystem_get_qpairs nvmf_get_stats
        nvmf_set_config nvmf_set_max_subsystems nvmf_set_crdt""",
    "volumes": """bdev_lvol_create_lvstore bdev_lvol_delete_lvstore bdev_lvol_get_lvstores bdev_lvol_rename_lvstore
        bdev_lvol_grow_lvstore bdev_lvol_create bdev_lvol_delete bdev_lvol_get_lvols bdev_lvol_snapshot bdev_lvol_clone
        bdev_lvol_resize bdev_lvol_rename bdev_lvol_inflate bdev_lvol_decouple_parent bdev_lvol_set_read_only""",
    "access": """nvmf_subsystem_add_host nvmf_subsystem_remove_host nvmf_subsystem_allow_any_host
        nvmf_subsystem_set_keys keyring_file_add_key keyring_file_remove_key keyring_get_keys
        nvmf_subsystem_listener_set_ana_state nvmf_subsystem_set_ns_ana_group nvmf_ns_add_host nvmf_ns_remove_host
        nvmf_discovery_add_referral nvmf_discovery_remove_referral nvmf_discovery_get_referrals""",
    "device kinds": """bdev_null_create bdev_null_delete bdev_malloc_create bdev_malloc_delete bdev_aio_create
        bdev_aio_delete bdev_uring_create bdev_uring_delete bdev_delay_create bdev_delay_delete bdev_error_create
        bdev_error_delete bdev_passthru_create bdev_passthru_delete bdev_split_create bdev_split_delete
        bdev_error_inject_error bdev_null_resize bdev_crypto_create bdev_crypto_delete accel_crypto_key_create
        accel_crypto_key_destroy accel_crypto_keys_get bdev_get_iostat bdev_reset_iostat bdev_enable_histogram
        bdev_get_histogram bdev_set_qos_limit bdev_nvme_attach_controller bdev_nvme_detach_controller
        bdev_nvme_get_controllers bdev_nvme_reset_controller bdev_nvme_set_options iobuf_set_options iobuf_get_stats sock_impl_get_options
        sock_impl_set_options save_config load_config""",
}
NQN = "nqn.2016-06.io.spdk:c1"
HOST = "nqn.2014-08.org.nvmexpress:uuid:0b5f7f6e-4f63-4a53-9b64-0a5f2e1d9c77"
DISCOVERY = "nqn.2014-08.org.nvmexpress.discovery"
ADDRESS = {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1"}


class Failure(Exception):
    """A reply that is not what is documented."""


class Rpc:
    """SPDK's client, which reads commands from its standard input."""

    def __init__(self, program, socket):
        self.socket, self.succeeded = socket, set()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([program, "--server"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def run(self, command):
        """(succeeded, what was printed)"""
        self.process.stdin.write(f"-s {self.socket} {command}\n")
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line.startswith("**STATUS="):
                return line.strip() == "**STATUS=0", "".join(lines).strip()
            lines.append(line)
        raise Failure(f"{command}: spdk-rpc ended: {''.join(lines)}")

    def ok(self, command):
        """The reply of a command that has to succeed."""
        succeeded, text = self.run(command)
        if not succeeded:
            raise Failure(f"{command}: {text}")
        self.succeeded.add(command.split()[0])
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    def done(self, command):
        """A command that has to succeed and replies true; the client prints that or nothing."""
        reply = self.ok(command)
        if reply not in (None, True):
            raise Failure(f"{command}: replied {reply}")

    def refused(self, command, *texts):
        """A command that has to fail with all of these in its message."""
        succeeded, text = self.run(command)
        if succeeded or not all(t in text for t in texts):
            raise Failure(f"{command}: expected a refusal with {texts}, got: {text}")


def equal(got, want):
    if got != want:
        raise Failure(f"expected {want!r}, got {got!r}")


def has(reply, *keys):
    """The documented members of an object."""
    missing = [k for k in keys if k not in reply]
    if missing:
        raise Failure(f"{missing} missing in {reply}")


def one(reply):
    """The only element of a list."""
    if not isinstance(reply, list) or len(reply) != 1:
        raise Failure(f"expected a list of one, got {reply}")
    return reply[0]


def secret(path, seed):
    """A DH-HMAC-CHAP secret, as nvme gen-dhchap-key prints it."""
    key = bytes([seed]) * 32
    text = base64.b64encode(key + zlib.crc32(key).to_bytes(4, "little")).decode()
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(f"DHHC-1:00:{text}:\n")


def before_initialisation(r, d):
    r.refused("bdev_malloc_create -b early 8 512", '"code": -1,', "may only be called after")
    equal("bdev_set_options" in r.ok("rpc_get_methods -c"), True)
    equal("bdev_malloc_create" in r.ok("rpc_get_methods -c"), False)
    r.done("bdev_set_options -p 65535 -c 256 --auto-examine")
    r.done("iobuf_set_options --small-pool-count 8192 --large-pool-count 1024 --small-bufsize 8192")
    r.done("nvmf_set_max_subsystems -x 64")
    r.done("nvmf_set_config -d match_any --dhchap-digests sha256,sha384 --dhchap-dhgroups null,ffdhe2048")
    r.done("sock_impl_set_options -i posix --quickack")
    r.done("framework_start_init")
    r.done("framework_wait_init")
    r.refused("bdev_set_options -p 65535", '"code": -1,', "may only be called before")


def framework(r, d):
    has(r.ok("spdk_get_version"), "version", "fields")
    names = {s["subsystem"] for s in r.ok("framework_get_subsystems")}
    equal({"keyring", "accel", "bdev", "nvmf"} <= names, True)
    has(r.ok("framework_get_config bdev")[0], "method", "params")
    reactors = r.ok("framework_get_reactors")
    has(reactors, "tick_rate", "reactors")
    has(reactors["reactors"][0], "lcore", "busy", "idle", "lw_threads")
    has(r.ok("thread_get_stats")["threads"][0], "name", "id", "busy", "idle", "active_pollers_count")
    has(r.ok("thread_get_pollers")["threads"][0], "name", "active_pollers", "timed_pollers", "paused_pollers")
    has(r.ok("thread_get_io_channels")["threads"][0], "name", "io_channels")
    has(r.ok("iobuf_get_stats")[0], "module", "small_pool", "large_pool")
    equal(r.ok("sock_impl_get_options -i posix")["enable_quickack"], True)
    for name in ("log_set_level", "log_set_print_level"):
        r.done(f"{name} WARNING")
        equal(r.ok(name.replace("set", "get")), "WARNING")
    r.done("log_set_level NOTICE")
    flag = sorted(r.ok("log_get_flags"))[0]
    r.done(f"log_set_flag {flag}")
    equal(r.ok("log_get_flags")[flag], True)
    r.done(f"log_clear_flag {flag}")
    equal(r.ok("log_get_flags")[flag], False)
    r.refused("log_set_flag no_such_flag", "Invalid parameters")
    equal({"bdev_register", "bdev_unregister"} <= set(r.ok("notify_get_types")), True)
    equal(isinstance(r.ok("notify_get_notifications -i 0 -n 5"), list), True)


def device_kinds(r, d):
    equal(r.ok("bdev_malloc_create -b m0 64 512"), "m0")
    equal(r.ok("bdev_malloc_create -b m1 64 4096 -u 6ba7b810-9dad-11d1-80b4-00c04fd430c8 -o 8"), "m1")
    equal(r.ok("bdev_null_create n0 64 512"), "n0")
    for kind in ("aio", "uring"):
        path = f"{d}/{kind}"
        with open(path, "wb") as file:
            file.truncate(32 << 20)
        equal(r.ok(f"bdev_{kind}_create {path} {kind}0 4096"), f"{kind}0")
    bdev = one(r.ok("bdev_get_bdevs -b m1"))
    has(bdev, "name", "aliases", "product_name", "block_size", "num_blocks", "uuid", "assigned_rate_limits", "claimed",
        "zoned", "supported_io_types", "driver_specific")
    equal((bdev["block_size"], bdev["num_blocks"], bdev["uuid"]), (4096, 16384, "6ba7b810-9dad-11d1-80b4-00c04fd430c8"))
    equal(bdev["supported_io_types"]["write_zeroes"], True)
    equal(one(r.ok("bdev_get_bdevs -b 6ba7b810-9dad-11d1-80b4-00c04fd430c8"))["name"], "m1")
    equal(sorted(b["name"] for b in r.ok("bdev_get_bdevs")), ["aio0", "m0", "m1", "n0", "uring0"])
    r.refused("bdev_get_bdevs -b nothing", "No such device", "-19")
    r.refused("bdev_malloc_create -b m0 64 512", "File exists", "-17")
    r.refused("bdev_malloc_create -b bad 64 500", "Invalid parameters")
    r.done("bdev_wait_for_examine")
    r.done("bdev_examine -b m0")
    r.done("bdev_null_resize n0 128")
    equal(one(r.ok("bdev_get_bdevs -b n0"))["num_blocks"], 262144)
    equal(r.ok("bdev_delay_create -b m0 -d d0 -r 10 -t 20 -w 10 -n 20"), "d0")
    equal(one(r.ok("bdev_get_bdevs -b m0"))["claimed"], True)
    r.done("bdev_delay_delete d0")
    equal(r.ok("bdev_passthru_create -b m0 -p p0"), "p0")
    r.done("bdev_passthru_delete p0")
    equal(r.ok("bdev_error_create m0"), "EE_m0")
    r.done("bdev_error_inject_error EE_m0 read failure -n 3")
    r.done("bdev_error_inject_error EE_m0 clear failure")
    r.done("bdev_error_delete EE_m0")
    equal(r.ok("bdev_split_create m0 2 -s 16"), "m0p0 m0p1")
    equal(one(r.ok("bdev_get_bdevs -b m0p1"))["num_blocks"], 32768)
    r.done("bdev_split_delete m0")
    key, key2 = os.urandom(32).hex(), os.urandom(32).hex()
    r.done(f"accel_crypto_key_create -c AES_XTS -k {key} -e {key2} -n k0")
    known = one(r.ok("accel_crypto_keys_get -k k0"))
    has(known, "name", "cipher")
    equal(key in json.dumps(known) or key2 in json.dumps(known), False)
    equal(r.ok("bdev_crypto_create -n k0 m0 c0"), "c0")
    equal(one(r.ok("bdev_get_bdevs -b c0"))["driver_specific"]["crypto"]["key_name"], "k0")
    r.refused("accel_crypto_key_destroy -n k0", "-16")
    r.done("bdev_crypto_delete c0")
    r.done("accel_crypto_key_destroy -n k0")
    stat = r.ok("bdev_get_iostat --names m0")
    has(stat, "tick_rate", "ticks", "bdevs")
    has(one(stat["bdevs"]), "name", "bytes_read", "num_read_ops", "bytes_written", "num_write_ops", "read_latency_ticks")
    r.done("bdev_reset_iostat -b m0 -m all")
    r.done("bdev_enable_histogram m0 --histogram")
    has(r.ok("bdev_get_histogram m0"), "histogram", "granularity", "tsc_rate")
    r.done("bdev_enable_histogram m0 --no-histogram")
    r.done("bdev_set_qos_limit m0 --rw-ios-per-sec 20000 --r-mbytes-per-sec 100")
    limits = one(r.ok("bdev_get_bdevs -b m0"))["assigned_rate_limits"]
    equal((limits["rw_ios_per_sec"], limits["r_mbytes_per_sec"]), (20000, 100))
    r.done("bdev_set_qos_limit m0 --rw-ios-per-sec 0 --r-mbytes-per-sec 0")
    for name in ("aio", "null"):
        device = {"aio": "aio0", "null": "n0"}[name]
        r.done(f"bdev_{name}_delete {device}")
        r.refused(f"bdev_{name}_delete {device}", "No such device")


def volumes(r, d):
    uuid = r.ok("bdev_lvol_create_lvstore uring0 pool")
    equal((len(uuid), uuid.count("-")), (36, 4))
    r.refused("bdev_lvol_create_lvstore uring0 again", "-16")
    store = one(r.ok("bdev_lvol_get_lvstores -l pool"))
    has(store, "uuid", "name", "base_bdev", "total_data_clusters", "free_clusters", "block_size", "cluster_size")
    equal((store["uuid"], store["base_bdev"]), (uuid, "uring0"))
    lvol = r.ok("bdev_lvol_create -l pool -t v0 16")
    equal(len(lvol), 36)
    r.refused("bdev_lvol_create -l pool -t v0 16", "File exists")
    r.refused("bdev_lvol_create -l nothing -t v1 16", "No such device")
    equal(one(r.ok("bdev_get_bdevs -b pool/v0"))["uuid"], lvol)
    entry = one(r.ok("bdev_lvol_get_lvols -l pool"))
    has(entry, "alias", "uuid", "name", "is_thin_provisioned", "is_snapshot", "is_clone", "is_esnap_clone", "is_degraded", "lvs")
    equal(entry["alias"], "pool/v0")
    snapshot = r.ok("bdev_lvol_snapshot pool/v0 s0")
    equal({l['uuid'] for l in r.ok(f'bdev_lvol_get_lvols -u {uuid}')}, {lvol, snapshot})
    clone = r.ok("bdev_lvol_clone pool/s0 c0")
    equal(one(r.ok(f"bdev_get_bdevs -b {clone}"))["driver_specific"]["lvol"]["base_snapshot"], "s0")
    r.refused("bdev_lvol_delete pool/s0", "Operation not permitted")
    r.done("bdev_lvol_resize pool/c0 24")
    equal(one(r.ok("bdev_get_bdevs -b pool/c0"))["num_blocks"] * 4096, 24 << 20)
    r.done("bdev_lvol_rename pool/c0 c1")
    r.done("bdev_lvol_decouple_parent pool/c1")
    r.done("bdev_lvol_inflate pool/c1")
    r.done("bdev_lvol_set_read_only pool/c1")
    r.done("bdev_lvol_delete pool/c1")
    r.done("bdev_lvol_delete pool/s0")
    r.done("bdev_lvol_rename_lvstore pool tank")
    r.done("bdev_lvol_grow_lvstore -l tank")
    r.done("bdev_lvol_rename_lvstore tank pool")


def target(r, d):
    port = d.port
    r.done("nvmf_create_transport -t TCP -q 256 -m 64 -c 8192 -i 262144 -a 256")
    r.refused("nvmf_create_transport -t TCP", "already exists")
    transport = one(r.ok("nvmf_get_transports --trtype TCP"))
    want = {"trtype": "TCP", "max_queue_depth": 256, "max_io_qpairs_per_ctrlr": 64, "in_capsule_data_size": 8192,
            "max_io_size": 262144, "max_aq_depth": 256}
    equal({k: transport[k] for k in want}, want)
    r.done("nvmf_set_crdt -t1 1 -t2 2 -t3 3")
    r.done(f"nvmf_create_subsystem {NQN} -s S1 -d model -m 8 -i 1 -I 1000 -r")
    r.refused(f"nvmf_create_subsystem {NQN}", "already exists")
    r.ok(f"nvmf_subsystem_add_ns {NQN} pool/v0 -n 5 -g 00112233445566778899aabbccddeeff -e 1122334455667788")
    r.ok(f"nvmf_subsystem_add_ns {NQN} m1")
    r.ok(f"nvmf_subsystem_add_ns {NQN} m0 -n 7 -i -p {d}/ptpl")
    r.refused(f"nvmf_subsystem_add_ns {NQN} m1", "claimed")
    r.refused("nvmf_subsystem_add_ns nqn.2016-06.io.spdk:none m1", "not found")
    r.done(f"nvmf_subsystem_add_listener {NQN} -t tcp -a 127.0.0.1 -f ipv4 -s {port}")
    r.refused(f"nvmf_subsystem_add_listener {NQN} -t tcp -a 127.0.0.1 -f ipv4 -s {port}", "already exists")
    all_of_them = r.ok("nvmf_get_subsystems")
    equal(all_of_them[0]["nqn"], DISCOVERY)
    subsystem = one(r.ok(f"nvmf_get_subsystems {NQN}"))
    has(subsystem, "nqn", "subtype", "listen_addresses", "allow_any_host", "hosts", "serial_number", "model_number",
        "max_namespaces", "min_cntlid", "max_cntlid", "namespaces")
    equal((subsystem["serial_number"], subsystem["max_namespaces"], subsystem["max_cntlid"]), ("S1", 8, 1000))
    equal([n["nsid"] for n in subsystem["namespaces"]], [1, 5, 7])
    named = [n for n in subsystem["namespaces"] if n["nsid"] == 5][0]
    equal((named["nguid"], named["eui64"]), ("00112233445566778899AABBCCDDEEFF", "1122334455667788"))
    listener = one(r.ok(f"nvmf_subsystem_get_listeners {NQN}"))
    equal(listener["address"], {**ADDRESS, "trsvcid": str(port)})
    equal(listener["ana_states"][0]["ana_state"], "optimized")
    equal(r.ok(f"nvmf_subsystem_get_controllers {NQN}"), [])
    equal(r.ok(f"nvmf_subsystem_get_qpairs {NQN}"), [])
    stats = r.ok("nvmf_get_stats")
    has(stats, "tick_rate", "poll_groups")
    has(stats["poll_groups"][0], "name", "admin_qpairs", "io_qpairs", "completed_nvme_io", "transports")


def errors(r, d):
    """The codes of docs/rpc.md's conventions, as SPDK's client prints them."""
    # -32601: no such method. spdk-rpc checks names itself, so by SPDK's library below it.
    code, message = d.library.refused("bdev_maloc_create", {})
    equal((code, "Method not found" in message, "bdev_malloc_create" in message), (-32601, True, True))
    # -1: a method in the wrong state (SPDK's own answer, where others would say -32601).
    r.refused("bdev_set_options -p 65535", '"code": -1,', "may only be called before")
    r.refused("framework_start_init", '"code": -1,', "may only be called before")
    # -32602: missing, unknown and unacceptable parameters are named.
    for params, names in (({}, "missing"), ({"num_blocks": 8, "block_size": 512, "nmae": 1}, "nmae"),
                          ({"num_blocks": "8", "block_size": 512}, "num_blocks")):
        code, message = d.library.refused("bdev_malloc_create", params)
        equal((code, "Invalid parameters" in message, names in message), (-32602, True, True))
    equal(d.library.refused("spdk_get_version", {"a": 1})[0], -32602)
    r.refused("bdev_malloc_create -b bad 64 500", '"code": -32602,', "Invalid parameters")
    r.refused("nvmf_subsystem_add_ns nqn.2016-06.io.spdk:none m1", '"code": -32602,', "not found")
    r.refused("nvmf_delete_subsystem nqn.2016-06.io.spdk:none", '"code": -32602,', "not found")
    # -32603: the transport is there already.
    r.refused("nvmf_create_transport -t TCP", '"code": -32603,', "Transport type 'TCP' already exists")
    # -28: a device with no room for a pool.
    r.ok("bdev_malloc_create -b tiny 1 4096")
    r.refused("bdev_lvol_create_lvstore tiny small", '"code": -28,', "No space left on device")
    equal([s["name"] for s in r.ok("bdev_lvol_get_lvstores")], ["pool"])
    r.done("bdev_malloc_delete tiny")


def access(r, d):
    port = d.port
    for n in (1, 2):
        secret(f"{d}/h{n}.key", n)
        r.done(f"keyring_file_add_key key{n} {d}/h{n}.key")
    r.refused(f"keyring_file_add_key key1 {d}/h1.key", "-17")
    r.refused(f"keyring_file_add_key key9 {d}/nothing", "-2")
    equal(sorted(k["name"] for k in r.ok("keyring_get_keys")), ["key1", "key2"])
    r.done(f"nvmf_subsystem_add_host {NQN} {HOST} --dhchap-key key1")
    r.done(f"nvmf_subsystem_set_keys {NQN} {HOST} --dhchap-key key1 --dhchap-ctrlr-key key2")
    host = one(one(r.ok(f"nvmf_get_subsystems {NQN}"))["hosts"])
    equal((host["nqn"], host["dhchap_key"], host["dhchap_ctrlr_key"]), (HOST, "key1", "key2"))
    r.refused(f"nvmf_subsystem_add_host {NQN} {HOST}x --dhchap-key nothing", '"code": -2,')
    for flag, now in (("--allow-any-host", True), ("--no-allow-any-host", False)):
        r.done(f"nvmf_subsystem_allow_any_host {NQN} {flag}")
        equal(one(r.ok(f"nvmf_get_subsystems {NQN}"))["allow_any_host"], now)
    r.done(f"nvmf_ns_add_host {NQN} 7 {HOST}")
    r.done(f"nvmf_ns_remove_host {NQN} 7 {HOST}")
    r.done(f"nvmf_ns_add_host {NQN} 7 {HOST}")
    r.done(f"nvmf_subsystem_set_ns_ana_group {NQN} 5 3")
    where = f"-t tcp -a 127.0.0.1 -f ipv4 -s {port}"
    r.done(f"nvmf_subsystem_listener_set_ana_state {NQN} {where} -n non_optimized -g 3")
    states = {a["ana_group"]: a["ana_state"] for a in one(r.ok(f"nvmf_subsystem_get_listeners {NQN}"))["ana_states"]}
    equal((states[3], states[1]), ("non_optimized", "optimized"))
    referral = "-t tcp -a 192.0.2.7 -f ipv4 -s 8009"
    r.done(f"nvmf_discovery_add_referral {referral}")
    equal(one(r.ok("nvmf_discovery_get_referrals"))["address"]["traddr"], "192.0.2.7")


def configuration(r, d):
    saved = r.ok("save_config")
    order = [s["subsystem"] for s in saved["subsystems"]]
    known = [s for s in ("scheduler", "sock", "iobuf", "keyring", "vmd", "accel", "bdev", "nvmf", "nbd") if s in order]
    equal(order, known)
    text = json.dumps(saved)
    for n in (1, 2):
        with open(f"{d}/h{n}.key") as file:
            equal(file.read().strip() in text, False)
    d.saved = saved


def everything_back(r, d):
    """A second target, configured by load_config alone, saves the same and is the same."""
    with open(f"{d}/saved.json", "w") as file:
        json.dump(d.saved, file)
    equal(r.run(f"load_config -j {d}/saved.json")[0], True)
    r.succeeded.add("load_config")
    again = r.ok("save_config")
    for before, after in zip(d.saved["subsystems"], again["subsystems"]):
        equal(after, before)
    equal(len(again["subsystems"]), len(d.saved["subsystems"]))
    subsystem = one(r.ok(f"nvmf_get_subsystems {NQN}"))
    equal([n["nsid"] for n in subsystem["namespaces"]], [1, 5, 7])
    equal(one(subsystem["hosts"])["dhchap_ctrlr_key"], "key2")
    equal(one(r.ok("bdev_lvol_get_lvols -l pool"))["name"], "v0")
    equal(one(r.ok("nvmf_discovery_get_referrals"))["address"]["traddr"], "192.0.2.7")


def and_away(r, d):
    port = d.port
    r.done("nvmf_discovery_remove_referral -t tcp -a 192.0.2.7 -f ipv4 -s 8009")
    equal(r.ok("nvmf_discovery_get_referrals"), [])
    r.done(f"nvmf_subsystem_remove_host {NQN} {HOST}")
    for n in (1, 2):
        r.done(f"keyring_file_remove_key key{n}")
    equal(r.ok("keyring_get_keys"), [])
    r.done(f"nvmf_subsystem_remove_ns {NQN} 7")
    r.refused(f"nvmf_subsystem_remove_ns {NQN} 7", "not found", "-32602")
    r.done(f"nvmf_subsystem_remove_listener {NQN} -t tcp -a 127.0.0.1 -f ipv4 -s {port}")
    r.done(f"nvmf_delete_subsystem {NQN}")
    r.refused(f"nvmf_delete_subsystem {NQN}", "not found")
    r.done("bdev_lvol_delete pool/v0")
    r.done("bdev_lvol_delete_lvstore -l pool")
    equal(r.ok("bdev_lvol_get_lvstores"), [])
    r.done("bdev_uring_delete uring0")
    for name in ("m0", "m1"):
        r.done(f"bdev_malloc_delete {name}")
    equal(r.ok("bdev_get_bdevs"), [])


def remote(r, d):
    """Controllers of other targets; the other target is this one."""
    far, ports = "nqn.2016-06.io.spdk:far", (free_port(), free_port())
    where = [f"-t tcp -a 127.0.0.1 -f ipv4 -s {port}" for port in ports]
    equal(r.ok("bdev_null_create z0 64 4096"), "z0")
    r.done(f"nvmf_create_subsystem {far} -a")
    r.ok(f"nvmf_subsystem_add_ns {far} z0 -u 3c9f7a52-0f0e-4a53-9b64-5a3c4f0e9d2a")
    for w in where:
        r.done(f"nvmf_subsystem_add_listener {far} {w}")
    r.done("bdev_nvme_set_options --keep-alive-timeout-ms 10000 --bdev-retry-count 4")
    attach = f"bdev_nvme_attach_controller -b far -n {far} -x multipath -l -1 -o 1"
    equal(r.ok(f"{attach} {where[0]} --hdgst --ddgst"), "farn1")
    equal(r.ok(f"{attach} {where[1]}"), "farn1")
    r.refused(f"{attach} {where[1]}", "already exists with the specified network path", '"code": -114,')
    r.refused(f"{attach.replace('multipath', 'disable')} {where[1]}", "already exists and multipath is disabled", "-114")
    r.refused(f"{attach.replace('-b far', '-b none').replace(far, far + 'x')} {where[0]}", "Input/output error", '"code": -5,')
    r.refused("bdev_nvme_set_options --bdev-retry-count 4", '"code": -1,')
    bdev = one(r.ok("bdev_get_bdevs -b farn1"))
    equal((bdev["num_blocks"], bdev["product_name"]), (16384, "NVMe disk"))
    equal(bdev["uuid"], "3c9f7a52-0f0e-4a53-9b64-5a3c4f0e9d2a")
    equal(bdev["driver_specific"]["nvme"][0]["trid"]["subnqn"], far)
    controller = one(r.ok("bdev_nvme_get_controllers -n far"))
    has(controller, "name", "ctrlrs")
    equal([c["trid"]["trsvcid"] for c in controller["ctrlrs"]], [str(port) for port in ports])
    for path in controller["ctrlrs"]:
        has(path, "state", "trid", "cntlid", "host", "numa_id")
        equal(path["state"], "enabled")
    r.done("bdev_nvme_reset_controller far")
    equal([c["method"] for c in r.ok("framework_get_config bdev")].count("bdev_nvme_attach_controller"), 2)
    r.done(f"bdev_nvme_detach_controller far {where[0]} -n {far}")
    equal(len(one(r.ok("bdev_nvme_get_controllers"))["ctrlrs"]), 1)
    r.done("bdev_nvme_detach_controller far")
    r.refused("bdev_nvme_detach_controller far", "No such device", '"code": -19,')
    equal(r.ok("bdev_nvme_get_controllers"), [])
    r.done(f"nvmf_delete_subsystem {far}")
    r.done("bdev_null_delete z0")


class Target:
    """A target that waits for its configuration."""

    def __init__(self, program, directory, *options):
        self.socket = f"{directory}/rpc.sock"
        self.log = open(f"{directory}/log", "a")
        command = [program, "target", "-r", self.socket, "--no-huge", "--keys", f"{directory}/keys", *options]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while not os.path.exists(self.socket):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"the target does not start: {open(self.log.name).read()[-2000:]}")
            time.sleep(0.02)

    def end(self, r):
        r.done("spdk_kill_instance SIGTERM")
        equal(self.process.wait(60), 0)


class Directory(str):
    """The directory of the run; knows the port, the saved configuration and SPDK's library."""

    port = saved = library = None


class Library:
    """SPDK's library below spdk-rpc, in the interpreter that has it: for what spdk-rpc itself would not send."""

    CODE = """if 1:
        import json, sys
        from spdk.rpc.client import JSONRPCClient, JSONRPCException
        try:
            print(json.dumps({"result": JSONRPCClient(sys.argv[1]).call(sys.argv[2], json.loads(sys.argv[3]))}))
        except JSONRPCException as e:
            print(json.dumps({"error": json.loads(e.message[e.message.index("response:") + 9:])}))
    """

    def __init__(self, spdk_rpc, socket):
        self.python, self.socket = f"{os.path.dirname(spdk_rpc)}/python", socket

    def refused(self, method, params):
        """(code, message) of a call that has to fail."""
        command = [self.python, "-c", self.CODE, self.socket, method, json.dumps(params)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        try:
            error = json.loads(run.stdout)["error"]
        except (ValueError, KeyError) as e:
            raise Failure(f"{method} {params}: no error but {run.stdout} {run.stderr}") from e
        return error["code"], error["message"]


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main(spdk_rpc, program):
    with tempfile.TemporaryDirectory() as path:
        d = Directory(path)
        d.port = free_port()
        first = [before_initialisation, framework, device_kinds, volumes, target, errors, access, configuration]
        runs = [(["--wait-for-rpc"], first), (["--wait-for-rpc"], [everything_back, and_away, remote])]
        succeeded, targets = set(), []
        try:
            for options, parts in runs:
                targets.append(Target(program, path, *options))
                r = Rpc(spdk_rpc, targets[-1].socket)
                d.library = Library(spdk_rpc, targets[-1].socket)
                for part in parts:
                    try:
                        part(r, d)
                    except (Failure, KeyError, IndexError, TypeError) as e:
                        line = e.__traceback__.tb_next.tb_lineno
                        print(f"FAIL {part.__name__}, line {line}: {type(e).__name__} {e}")
                        return 1
                    print(f"PASS {part.__name__.replace('_', ' ')}")
                targets[-1].end(r)
                succeeded |= r.succeeded
                r.process.stdin.close()
                r.process.wait(10)
        finally:
            for t in targets:
                if t.process.poll() is None:
                    t.process.kill()
                    t.process.wait()
        for group, methods in GROUPS.items():
            missing = [m for m in methods.split() if m not in succeeded]
            if missing:
                print(f"FAIL {group}: never called with success: {missing}")
                return 1
            print(f"PASS all {len(methods.split())} methods of '{group}'")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
