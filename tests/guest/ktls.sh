#!/bin/bash
# Runs in the guest: TLS whose records the kernel makes and opens, between this build's target and initiator over loopback, and
# what others may do to it.
#   ktls.sh CRYPTFOLD PERF
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 2 ] || { echo "usage: $0 CRYPTFOLD PERF" >&2; exit 2; }
binary=$1 perf=$2 peer="$(dirname "$0")/ktls_peer.py"
# All waits together end before the guest does (run-auth: 600 s, of which it takes some to start).
left() { echo $((SECONDS < 530 ? 540 - SECONDS : 10)); }
nqn=nqn.2026-01.io.cryptfold:ktls host=nqn.2014-08.org.nvmexpress:uuid:6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a13
work=/dev/shm/ktls
mkdir -p "$work" && export CRYPTFOLD_KEYS=$work/keys
trap '[ $? = 0 ] || { echo "--- end of the target'"'"'s log"; tail -n 25 "$work/target.log"; cat /proc/net/tls_stat; }' EXIT

call() { "$binary" rpc -r "$work/rpc.sock" "$@"; }
# stat NAME: a counter of the kernel's.
stat() { awk -v name="$1" '$1 == name { print $2 }' /proc/net/tls_stat; }
# said TEXT: in the target's log, how often.
said() { grep -cF -- "$1" "$work/target.log"; }
# layers: of the target's connections and of its own initiator's, each once.
layers() {
    { call nvmf_subsystem_get_qpairs "{\"nqn\": \"$nqn\"}" && call bdev_nvme_get_controllers; } | python3 -c '
import json, sys
decoder, text = json.JSONDecoder(), sys.stdin.read().strip()
queues, end = decoder.raw_decode(text)
controllers = json.loads(text[end:])
tls = [q["tls"] for q in queues] + [l["tls"] for c in controllers for l in c["ctrlrs"]]
print(len(queues), *sorted({t["send"] + "/" + t["receive"] for t in tls}))'
}
load() {
    timeout "$(left)" "$perf" nvmf --traddr 127.0.0.1 --trsvcid 4420 --subnqn "$nqn" --hostnqn "$host" --psk "$work/key" \
        --io-timeout 120 --kato 60000 --verify "$@" >"$work/perf.log" 2>&1 || fail "perf $*: $(tail -n 5 "$work/perf.log")"
}
# attach NAME: the target's own initiator connects to it.
attach() {
    run call bdev_nvme_attach_controller "{\"name\": \"$1\", \"trtype\": \"TCP\", \"adrfam\": \"IPv4\", \"traddr\": \"127.0.0.1\",
        \"trsvcid\": \"4420\", \"subnqn\": \"$nqn\", \"hostnqn\": \"$host\", \"psk\": \"tls\", \"psk_version\": 1}"
}
# peer WHAT...: what ktls_peer.py does with the target.
peer() { run timeout "$(left)" python3 "$peer" "$work/key" "$host" "$nqn" 4420 "$@"; }

step "the kernel has the module, and loads it when asked"
modinfo tls >/dev/null 2>&1 || fail "no tls module in $(uname -r)"
[ ! -e /proc/net/tls_stat ] || fail "it is loaded already"
(umask 077 && python3 "$peer" new >"$work/key") || fail "no key"
: >"$work/target.log"
"$binary" target -r "$work/rpc.sock" >"$work/target.log" 2>&1 &
target=$!
within "$(left)" grep -q '^cryptfold: ready' "$work/target.log"
run call sock_impl_set_options '{"impl_name": "ssl", "enable_ktls": true}'
run call keyring_file_add_key "{\"name\": \"tls\", \"path\": \"$work/key\"}"
run call bdev_malloc_create '{"name": "M0", "num_blocks": 16384, "block_size": 4096}'
run call nvmf_create_transport '{"trtype": "TCP", "connect_timeout_ms": 60000}'
run call nvmf_create_subsystem "{\"nqn\": \"$nqn\", \"serial_number\": \"KTLS\"}"
run call nvmf_subsystem_add_host "{\"nqn\": \"$nqn\", \"host\": \"$host\", \"psk\": \"tls\"}"
run call nvmf_subsystem_add_ns "{\"nqn\": \"$nqn\", \"namespace\": {\"bdev_name\": \"M0\",
    \"uuid\": \"6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a14\"}}"
run call nvmf_subsystem_add_listener "{\"nqn\": \"$nqn\", \"secure_channel\": true, \"listen_address\":
    {\"trtype\": \"TCP\", \"adrfam\": \"IPv4\", \"traddr\": \"127.0.0.1\", \"trsvcid\": \"4420\"}}"
attach R
[ -e /proc/net/tls_stat ] || fail "it was not loaded"
pass

step "both directions of both ends are the kernel's"
# The admin queue's, and one of the only core, which comes a moment later.
queues=2
both() { [ "$(layers)" = "$queues kernel/kernel" ]; }
within "$(left)" both
# Each connection has two ends here.
[ "$(stat TlsCurrTxSw) $(stat TlsCurrRxSw)" = "$((2 * queues)) $((2 * queues))" ] || fail "$(cat /proc/net/tls_stat)"
pass

step "what is written is what is read, small and large"
opened=$(stat TlsTxSw)
for size in 4k 64k 1m; do
    load --ktls --rw randrw --bs "$size" --size 32m --iodepth 8 --runtime 2
done
# Six ends of admin queues, and as many of I/O queues at least.
[ "$(stat TlsTxSw)" -ge $((opened + 12)) ] && [ "$(stat TlsRxSw)" -ge $((opened + 12)) ] || fail "$(cat /proc/net/tls_stat)"
[ "$(stat TlsDecryptError)" = 0 ] || fail "$(cat /proc/net/tls_stat)"
pass

# others PEER...: another host does something; the initiator's connections stay, and what is written is read.
others() {
    local before after
    before=$(stat TlsTxSw)
    peer "$@"
    after=$(stat TlsTxSw)
    # Only one connection was made, and its target's end was the kernel's.
    [ "$after" = $((before + 1)) ] || fail "$before, $after: $(tail -n 3 "$work/target.log")"
    within "$(left)" ended
    [[ $(layers) == "$queues kernel/kernel" ]] || fail "$(layers)"
}
ended() { [ "$(stat TlsCurrTxSw) $(stat TlsCurrRxSw)" = "$((2 * queues)) $((2 * queues))" ]; }

step "openssl greets, and says good-bye"
others greet
[ "$(said 'ending the connection')" = 0 ] && [ "$(stat TlsDecryptError)" = 0 ] || fail "$(tail -n 3 "$work/target.log")"
pass
step "a record that nobody sealed"
others inject "1703030020$(printf '00%.0s' {1..32})"
within "$(left)" grep -qF 'bad record MAC' "$work/target.log"
pass
step "no record at all"
others inject "$(printf 'GET / HTTP/1.1\r\n\r\n' | od -An -tx1 | tr -d ' \n')"
within "$(left)" grep -qF 'something that is no record' "$work/target.log"
pass
step "a host changes its keys, and has to connect again"
others update
within "$(left)" grep -qF 'the other side changes its keys' "$work/target.log"
pass

step "the others have not noticed"
load --ktls --rw randrw --bs 16k --size 32m --iodepth 8 --runtime 1
cntlid() { call bdev_nvme_get_controllers | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["ctrlrs"][0]["cntlid"])'; }
[ "$(cntlid)" = 1 ] || fail "the initiator had to connect again: $(call bdev_nvme_get_controllers)"
pass

step "switched off"
run call bdev_nvme_detach_controller '{"name": "R"}'
run call sock_impl_set_options '{"impl_name": "ssl", "enable_ktls": false}'
attach L
only() { [[ $(layers) =~ ^[1-9][0-9]*\ $1$ ]]; }
within "$(left)" only library/library
gone() { [ "$(stat TlsCurrTxSw) $(stat TlsCurrRxSw)" = "0 0" ]; }
within "$(left)" gone
run call bdev_nvme_detach_controller '{"name": "L"}'
# One end is the kernel's, the other the library's.
run call sock_impl_set_options '{"impl_name": "ssl", "enable_ktls": true}'
load --rw randrw --bs 128k --size 32m --iodepth 8 --runtime 1
pass

step "the target ends"
kill -TERM "$target"
wait "$target" || fail "status $?"
dmesg | grep -iE 'Call Trace|BUG:' && fail "the kernel complains"
grep -qF "$(cut -d: -f3 "$work/key")" "$work/target.log" && fail "the key is in the log"
pass
echo "all steps passed in $SECONDS s"
