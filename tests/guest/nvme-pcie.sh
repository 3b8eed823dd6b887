#!/bin/bash
# Runs in the guest: the userspace NVMe driver on QEMU's drives behind the IOMMU. What is on them is overwritten.
#   nvme-pcie.sh CRYPTFOLD PERF SETUP
# Drives by serial number: PCIE1 has namespaces 1 (4096-byte blocks) and 2 (512), PCIE2 can be unplugged, PCIE3 fails every read
# of its sector 2048, PCIE4 is slow. Plugging is asked of tests/guest/run-pcie (plug).
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 3 ] || { echo "usage: $0 CRYPTFOLD PERF SETUP" >&2; exit 2; }
binary=$1 perf=$2 setup=$3
work=/dev/shm/pcie
mkdir -p "$work" && export CRYPTFOLD_KEYS=$work/keys

# plug COMMAND: a command of QEMU's monitor, given outside of the guest.
plugs=0
plug() {
    plugs=$((plugs + 1))
    printf '%s\n' "$1" >"$GUEST_WORK/plug.new"
    mv "$GUEST_WORK/plug.new" "$GUEST_WORK/plug.$plugs"
    within 20 test -e "$GUEST_WORK/plugged.$plugs"
}
# address SERIAL: of the drive with that serial number, while the kernel drives it.
address() {
    local controller
    for controller in /sys/class/nvme/nvme*; do
        [ "$(tr -d ' ' <"$controller/serial")" = "$1" ] && basename "$(readlink -f "$controller/device")" && return 0
    done
    return 1
}
# block SERIAL NSID: its block device with the kernel's driver. The number in its name is the order of finding, not the NSID.
block() {
    local controller ns
    for controller in /sys/class/nvme/nvme*; do
        [ "$(tr -d ' ' <"$controller/serial" 2>/dev/null)" = "$1" ] || continue
        for ns in "$controller"/nvme*n*; do
            [ "$(cat "$ns/nsid" 2>/dev/null)" = "$2" ] && [ -b "/dev/${ns##*/}" ] && echo "/dev/${ns##*/}" && return 0
        done
    done
    return 1
}
call() { "$binary" rpc -r "$work/rpc.sock" "$@"; }
start() {
    : >"$work/target.log" # or an older log says "ready" until the child has emptied it
    "$binary" target -r "$work/rpc.sock" "$@" >"$work/target.log" 2>&1 &
    target=$!
    within 60 grep -q '^cryptfold: ready' "$work/target.log"
}
stop() {
    kill -TERM "$target"
    wait "$target" || fail "the target did not end well: $(tail -n 5 "$work/target.log")"
}
# config NAME ADDRESS [CALL...]: a configuration with one drive attached as NAME.
config() {
    local name=$1 at=$2
    shift 2
    printf '{"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_nvme_attach_controller", "params": {"name": "%s", "trtype": "PCIe", "traddr": "%s"}}' "$name" "$at"
    [ $# -eq 0 ] || printf ',\n%s' "$@"
    printf ']}]}\n'
}
# refuses TEXT COMMAND...: has to fail and to say so.
refuses() {
    local output text=$1
    shift
    output=$("$@" 2>&1) && fail "'$*' succeeded: $output"
    grep -qF -- "$text" <<<"$output" || fail "'$*' says: $output"
}
load() { timeout 60 "$perf" bdev --config "$1" --bdev "$2" "${@:3}" 2>&1; }

step "the kernel's driver, and what setup refuses"
run modprobe nvme
within 20 block PCIE1 2
one=$(address PCIE1) two=$(address PCIE2) bad=$(address PCIE3) slow=$(address PCIE4) || fail "drives are missing"
d1=$(block PCIE1 1) d2=$(block PCIE1 2)
[ "$(blockdev --getss "$d1") $(blockdev --getss "$d2")" = "4096 512" ] || fail "formats: $(blockdev --getss "$d1" "$d2")"
mkdir -p /tmp/mnt
run mkfs.ext4 -qF "$d2"
run mount "$d2" /tmp/mnt
refuses "mounted on /tmp/mnt; nothing was changed" "$setup" bind "$one"
run umount /tmp/mnt
run addpart "$d2" 1 2048 65536
refuses "partitioned" "$setup" bind "$one"
run delpart "$d2" 1
python3 -c "import os,time; os.open('$d1', os.O_RDONLY | os.O_EXCL); open('$work/held','w'); time.sleep(60)" &
holder=$!
within 10 test -e "$work/held"
refuses "in use" "$setup" bind "$one"
kill "$holder"; wait "$holder" 2>/dev/null
pass

step "bound to vfio-pci behind the IOMMU"
# What the kernel wrote must be what the driver reads.
run dd if=/dev/urandom of="$work/sample" bs=1M count=2 status=none
run dd if="$work/sample" of="$d1" bs=1M seek=100 oflag=direct status=none
run "$setup" hugepages 96
run "$setup" bind "$one" "$two" "$bad" "$slow"
[ -c "/dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$one/iommu_group")")" ] || fail "no group"
"$setup" status
pass

step "verify on 1 and 2 queues, 4096 and 512"
config N "$one" >"$work/perf.json"
for cores in 0 0,1; do
    for n in 1 2; do
        load "$work/perf.json" "Nn$n" --cores "$cores" --iodepth 16 --bs 4k --rw randrw --size 16m --runtime 4 --verify >"$work/perf.log" ||
            fail "cores $cores, namespace $n: $(tail -n 20 "$work/perf.log")"
    done
    load "$work/perf.json" Nn1 --cores "$cores" --iodepth 8 --bs 256k --rw randrw --size 32m --runtime 3 --verify >"$work/perf.log" ||
        fail "256k on cores $cores: $(tail -n 20 "$work/perf.log")"
done
pass

step "the same bytes as with the kernel's driver"
config N "$one" >"$work/plain.json"
start -c "$work/plain.json" --cores 0,1
raw=nqn.2026-01.io.cryptfold:raw
run call nvmf_create_transport '{"trtype": "TCP"}'
# serve NQN SERIAL BDEV...: a subsystem with these namespaces.
serve() {
    run call nvmf_create_subsystem "{\"nqn\": \"$1\", \"allow_any_host\": true, \"serial_number\": \"$2\"}"
    local bdev
    for bdev in "${@:3}"; do
        run call nvmf_subsystem_add_ns "{\"nqn\": \"$1\", \"namespace\": {\"bdev_name\": \"$bdev\"}}"
    done
    run call nvmf_subsystem_add_listener "{\"nqn\": \"$1\", \"listen_address\":
        {\"trtype\": \"TCP\", \"adrfam\": \"IPv4\", \"traddr\": \"127.0.0.1\", \"trsvcid\": \"4420\"}}"
}
serve "$raw" RAW Nn1 Nn2
run modprobe nvme-tcp
connect() { run nvme connect -t tcp -a 127.0.0.1 -s 4420 -n "$1" -i 2 -l 600 -c 1; }
connect "$raw"
served() { r=$(block RAW 2) && [ -b "$r" ]; }
within 20 served
dd if="$(block RAW 1)" bs=1M skip=100 count=2 iflag=direct status=none | cmp - "$work/sample" || fail "the driver reads other bytes than the kernel wrote"
run dd if=/dev/urandom of="$work/ours" bs=1M count=2 status=none
run dd if="$work/ours" of="$(block RAW 2)" bs=1M seek=64 oflag=direct conv=fsync status=none
run nvme disconnect -n "$raw"
run call nvmf_delete_subsystem "{\"nqn\": \"$raw\"}"
pass

step "idle: no CPU"
ticks() { awk '{ print $14 + $15 }' "/proc/$target/stat"; }
before=$(ticks)
sleep 4
used=$(($(ticks) - before))
# Of 800 that two polling reactors would take.
[ "$used" -lt 120 ] || fail "$used ticks in 4 s"
call bdev_nvme_get_controllers >"$work/controllers" || fail "no answer"
grep -q '"state": *"enabled"' "$work/controllers" || fail "$(cat "$work/controllers")"
call bdev_nvme_get_controller_health_info '{"name": "N"}' | grep -q '"serial_number": *"PCIE1"' || fail "no health"
call framework_get_pci_devices | grep -q "\"address\": *\"$one\"" || fail "no PCI devices"
pass

step "a pool on the drive; kill -9 in the middle of I/O"
run call bdev_lvol_create_lvstore '{"bdev_name": "Nn1", "lvs_name": "pool"}'
for v in one two three; do
    run call bdev_lvol_create "{\"lvs_name\": \"pool\", \"lvol_name\": \"$v\", \"size_in_mib\": 64}"
done
serve nqn.2026-01.io.cryptfold:pcie P1 pool/one pool/two pool/three
connect nqn.2026-01.io.cryptfold:pcie
volume() {
    local b
    b=$(block P1 "$1") && [ -b "$b" ] && echo "$b"
}
within 20 volume 3
for n in 1 2 3; do
    run dd if=/dev/urandom of="$work/data$n" bs=1M count=8 status=none
    run dd if="$work/data$n" of="$(volume $n)" bs=1M oflag=direct conv=fsync status=none
done
timeout 120 dd if=/dev/urandom of="$(volume 1)" bs=64k seek=256 count=400 oflag=direct status=none 2>/dev/null &
writer=$!
sleep 2
kill -KILL "$target"
wait "$target" 2>/dev/null
cat >"$work/again.json" <<JSON
{"subsystems": [{"subsystem": "bdev", "config": [
    {"method": "bdev_nvme_attach_controller", "params": {"name": "N", "trtype": "PCIe", "traddr": "$one"}}]},
  {"subsystem": "nvmf", "config": [
    {"method": "nvmf_create_transport", "params": {"trtype": "TCP"}},
    {"method": "nvmf_create_subsystem", "params": {"nqn": "nqn.2026-01.io.cryptfold:pcie", "allow_any_host": true, "serial_number": "P1"}},
    {"method": "nvmf_subsystem_add_ns", "params": {"nqn": "nqn.2026-01.io.cryptfold:pcie", "namespace": {"bdev_name": "pool/one"}}},
    {"method": "nvmf_subsystem_add_ns", "params": {"nqn": "nqn.2026-01.io.cryptfold:pcie", "namespace": {"bdev_name": "pool/two"}}},
    {"method": "nvmf_subsystem_add_ns", "params": {"nqn": "nqn.2026-01.io.cryptfold:pcie", "namespace": {"bdev_name": "pool/three"}}},
    {"method": "nvmf_subsystem_add_listener", "params": {"nqn": "nqn.2026-01.io.cryptfold:pcie",
      "listen_address": {"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": "4420"}}}]}]}
JSON
start -c "$work/again.json" --cores 0,1
wait "$writer" || fail "the host's write did not survive the restart"
for n in 1 2 3; do
    dd if="$(volume $n)" bs=1M count=8 iflag=direct status=none 2>&1 | cmp - "$work/data$n" || fail "volume $n after the kill"
done
run nvme disconnect -n nqn.2026-01.io.cryptfold:pcie
pass

step "a drive that fails reads, and a slow one, beside it"
run call bdev_nvme_attach_controller "{\"name\": \"B\", \"trtype\": \"PCIe\", \"traddr\": \"$bad\"}"
run call bdev_nvme_attach_controller "{\"name\": \"S\", \"trtype\": \"PCIe\", \"traddr\": \"$slow\"}"
run call bdev_nvme_reset_controller '{"name": "S"}'
call bdev_nvme_detach_controller '{"name": "B"}' >/dev/null || fail "no detach"
call bdev_nvme_detach_controller '{"name": "S"}' >/dev/null || fail "no detach"
config B "$bad" >"$work/bad.json"
config S "$slow" >"$work/slow.json"
load "$work/bad.json" Bn1 --cores 0 --iodepth 4 --bs 4k --rw read --size 1m --runtime 2 >"$work/perf.log" || fail "its good sectors: $(tail -n 5 "$work/perf.log")"
load "$work/bad.json" Bn1 --cores 0 --iodepth 4 --bs 4k --rw read --size 2m --runtime 2 >"$work/perf.log" && fail "no error was reported"
grep -qiE 'unrecovered|internal|error' "$work/perf.log" || fail "$(tail -n 5 "$work/perf.log")"
load "$work/slow.json" Sn1 --cores 0 --iodepth 4 --bs 4k --rw randrw --size 1m --runtime 4 --verify >"$work/perf.log" || fail "the slow drive: $(tail -n 5 "$work/perf.log")"
pass

step "hot-remove under load, and hot-add"
run call bdev_nvme_set_hotplug "{\"enable\": true, \"period_us\": 200000, \"allowed\": [\"$two\"]}"
has() { call bdev_get_bdevs "{\"name\": \"$1\"}"; }
within 20 has HotInNvme0n1
run call bdev_lvol_create_lvstore '{"bdev_name": "HotInNvme0n1", "lvs_name": "second"}'
run call bdev_lvol_create '{"lvs_name": "second", "lvol_name": "v", "size_in_mib": 32}'
serve nqn.2026-01.io.cryptfold:hot HOT second/v
timeout 40 "$perf" nvmf --traddr 127.0.0.1 --subnqn nqn.2026-01.io.cryptfold:hot --cores 0 --iodepth 8 --bs 4k --rw randrw --runtime 15 >"$work/hot.log" 2>&1 &
hot=$!
sleep 4
plug "device_del two"
lost() { ! has HotInNvme0n1; }
within 30 lost
wait "$hot" && fail "the load on a drive that is gone ended well"
left() { [ ! -e "/sys/bus/pci/devices/$two" ]; }
within 30 left
# The pool on the other drive did not notice.
kill -0 "$target" 2>/dev/null || fail "the target died: $(tail -n 5 "$work/target.log")"
has pool/one >/dev/null || fail "the other pool is gone"
plug "device_add nvme,id=two,drive=nv2,serial=PCIE2,bus=port2"
there() { [ -e "/sys/bus/pci/devices/$two" ]; }
within 30 there
"$setup" bind "$two" >/dev/null || fail "no bind after hot-add"
within 20 has HotInNvme0n1
pass

step "back to the kernel's driver, with the same bytes"
stop
run "$setup" unbind "$one"
back() { d2=$(block PCIE1 2) && [ -b "$d2" ]; }
within 20 back
dd if="$d2" bs=1M skip=64 count=2 iflag=direct status=none | cmp - "$work/ours" || fail "the kernel reads other bytes than the driver wrote"
load "$work/perf.json" Nn2 --cores 0 --iodepth 1 --bs 4k --rw randread --runtime 1 >"$work/perf.log" && fail "a drive of the kernel was attached"
grep -q 'bound to driver nvme' "$work/perf.log" || fail "$(tail -n 3 "$work/perf.log")"
pass

dmesg | grep -E 'DMAR: .*fault|Call Trace|BUG:' && { step=end; fail "the kernel complains"; }
echo "all steps passed in $SECONDS s"
