#!/bin/bash
# Runs in the guest, with native multipath: targets that die under the kernel's I/O. They run in the guest too, where they can
# be killed.
#   nvme-failures.sh CRYPTFOLD
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 1 ] || { echo "usage: $0 CRYPTFOLD" >&2; exit 2; }
binary=$1
modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"
modprobe loop 2>/dev/null || fail "no loop module"
work=/dev/shm/failures
mkdir -p "$work" && export CRYPTFOLD_KEYS=$work/keys
id=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0dd4
base=nqn.2026-01.io.cryptfold

declare -A pids
# start NAME: the target with the configuration NAME.json.
start() {
    : >"$work/$1.log" # or an older log says "ready" until the child has emptied it
    "$binary" target -r "$work/$1.sock" -c "$work/$1.json" --cores 0 >"$work/$1.log" 2>&1 &
    pids[$1]=$!
    within 60 grep -q '^cryptfold: ready' "$work/$1.log"
}
dies() {
    kill -KILL "${pids[$1]}" || fail "target $1 was gone already: $(tail -n 5 "$work/$1.log")"
    wait "${pids[$1]}" 2>/dev/null
}
# subsystem NAME PORT OPTIONS NAMESPACE: its part of a configuration.
subsystem() {
    cat <<JSON
  {"subsystem": "nvmf", "config": [
    {"method": "nvmf_create_transport", "params": {"trtype": "TCP"}},
    {"method": "nvmf_create_subsystem", "params": {"nqn": "$base:$1", "allow_any_host": true, "serial_number": "FAIL0001", $3}},
    {"method": "nvmf_subsystem_add_ns", "params": {"nqn": "$base:$1", "namespace": {"nsid": 1, $4}}},
    {"method": "nvmf_subsystem_add_listener", "params": {"nqn": "$base:$1", "listen_address":
      {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "$2"}}}]}
JSON
}
connect() {
    run nvme connect -t tcp -a 127.0.0.1 -s "$2" -n "$base:$1" --hostnqn="nqn.2014-08.org.nvmexpress:uuid:$id" --hostid="$id" \
        -i 2 -k 5 -l 300 -c 1
}
# Of the subsystem's head device: /dev/nvmeXn1.
head_of() {
    local subsystem
    for subsystem in /sys/class/nvme-subsystem/*; do
        [ "$(cat "$subsystem/subsysnqn")" = "$base:$1" ] || continue
        subsystem=${subsystem##*/nvme-subsys}
        [ -b "/dev/nvme${subsystem}n1" ] && echo "/dev/nvme${subsystem}n1" && return 0
    done
    return 1
}
live() { grep -lx live /sys/class/nvme/nvme*/state 2>/dev/null | wc -l; }
live_are() { [ "$(live)" = "$1" ]; }
# under_fio NAME SECONDS OPTION...: starts it.
under_fio() {
    local device name=$1 seconds=$2
    shift 2
    device=$(head_of "$name") || fail "no device"
    timeout $((seconds + 180)) fio --name="$name" --filename="$device" --rw=randrw --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
        --size=48m --time_based --runtime="$seconds" --verify=crc32c --verify_fatal=1 --verify_backlog=64 --rate_iops=200,200 "$@" \
        >"$work/fio.log" 2>&1 &
    fio=$!
}
fio_is_content() {
    wait "$fio" || fail "fio: $(tail -n 20 "$work/fio.log")"
    grep -qE 'err= 0' "$work/fio.log" || fail "fio: $(tail -n 20 "$work/fio.log")"
    dmesg | grep -E 'Buffer I/O error|Call Trace|BUG:' && fail "the kernel complains"
    grep -E '^ *(read|write): ' "$work/fio.log"
}

step "a target with a pool is killed and started again, twice, under fio"
truncate -s 512M "$work/disk"
{
    cat <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "disk", "filename": "$work/disk", "block_size": 4096}},
    {"method": "bdev_lvol_create_lvstore", "params": {"bdev_name": "disk", "lvs_name": "pool", "exist_ok": true}},
    {"method": "bdev_lvol_create", "params": {"lvs_name": "pool", "lvol_name": "volume", "size_in_mib": 64, "exist_ok": true}}]},
JSON
    subsystem pool 4420 '"ana_reporting": false' '"bdev_name": "pool/volume"'
    echo ']}'
} >"$work/a.json"
start a
connect pool 4420
within 60 head_of pool
# The volume has a volatile write cache, and a killed target loses it: what fio verifies is written through it.
under_fio pool 30 --sync=1
for _ in 1 2; do
    sleep 5
    dies a
    sleep 3
    start a
    within 60 live_are 1
done
fio_is_content
[ "$(dmesg | grep -c 'Successfully reconnected')" -ge 2 ] || fail "the kernel did not reconnect twice"
run nvme disconnect -n "$base:pool"
kill -TERM "${pids[a]}" && wait "${pids[a]}" || fail "the target did not end well: $(tail -n 5 "$work/a.log")"
pass

step "two targets before one shared device, each killed in turn, under fio"
# Two devices over one file are what two machines see of a shared disk.
truncate -s 128M "$work/shared"
cntlid=1
for name in b c; do
    loop=$(losetup -f --show "$work/shared") || fail "no loop device"
    port=$([ "$name" = b ] && echo 4421 || echo 4422)
    {
        cat <<JSON
{"subsystems": [
  {"subsystem": "bdev", "config": [
    {"method": "bdev_uring_create", "params": {"name": "shared", "filename": "$loop", "block_size": 4096,
      "uuid": "0d9a3f5e-3c1b-4f6a-9e57-2b7c4d8e9f10"}}]},
JSON
        subsystem shared "$port" "\"ana_reporting\": true, \"min_cntlid\": $cntlid, \"max_cntlid\": $((cntlid + 99))" '"bdev_name": "shared"'
        echo ']}'
    } >"$work/$name.json"
    cntlid=$((cntlid + 100))
    start "$name"
    connect shared "$port"
done
within 60 head_of shared
within 60 live_are 2
under_fio shared 40
for name in b c; do
    sleep 4
    dies "$name"
    within 60 live_are 1
    sleep 5
    start "$name"
    within 60 live_are 2
done
fio_is_content
pass

run nvme disconnect -n "$base:shared"
kill -TERM "${pids[b]}" "${pids[c]}"
wait "${pids[b]}" && wait "${pids[c]}" || { step=end; fail "a target did not end well: $(tail -n 5 "$work"/[bc].log)"; }
echo "all steps passed in $SECONDS s"
