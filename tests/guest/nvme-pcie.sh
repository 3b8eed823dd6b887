#!/bin/bash
# Runs in the guest: the userspace NVMe driver on QEMU's drives behind the IOMMU. What is on them is overwritten.
#   nvme-pcie.sh CRYPTFOLD PERF SETUP
# Drives by serial number: PCIE1 has namespaces 1 (4096-byte blocks) and 2 (512), PCIE2 and PCIE5 can be unplugged, PCIE3 fails
# every read of its sector 2048, PCIE4 is slow. Plugging is asked of tests/guest/run-pcie (plug).
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 3 ] || { echo "usage: $0 CRYPTFOLD PERF SETUP" >&2; exit 2; }
binary=$1 perf=$2 setup=$3
work=/dev/shm/pcie
mkdir -p "$work" && export CRYPTFOLD_KEYS=$work/keys
trap '[ $? = 0 ] || { echo "--- end of the target'"'"'s log"; tail -n 25 "$work/target.log"; }' EXIT

# plug COMMAND: a command of QEMU's monitor, given outside of the guest.
plugs=0
plug() {
    plugs=$((plugs + 1))
    printf '%s\n' "$1" >"$GUEST_WORK/plug.new"
    mv "$GUEST_WORK/plug.new" "$GUEST_WORK/plug.$plugs"
    within 150 test -e "$GUEST_WORK/plugged.$plugs"
    grep -q '"return"' "$GUEST_WORK/plugged.$plugs" || fail "$1: $(cat "$GUEST_WORK/plugged.$plugs")"
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
    local deadline=$((SECONDS + 150))
    until grep -q '^cryptfold: ready' "$work/target.log"; do
        [ "$SECONDS" -lt "$deadline" ] && kill -0 "$target" 2>/dev/null || fail "the target is not ready: $(tail -n 20 "$work/target.log")"
        sleep 0.2
    done
}
stop() {
    kill -TERM "$target"
    wait "$target" || fail "the target did not end well: $(tail -n 5 "$work/target.log")"
}
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
# config NAME ADDRESS [CALL...]: a configuration with one drive attached as NAME.
config() {
    local name=$1 at=$2
    shift 2
    printf '{"subsystems": [{"subsystem": "bdev", "config": [
        {"method": "bdev_nvme_attach_controller", "params": {"name": "%s", "trtype": "PCIe", "traddr": "%s"}}' "$name" "$at"
    [ $# -eq 0 ] || printf ',\n%s' "$@"
    printf ']}]}\n'
}
# node BLOCK: the character device of that namespace.
node() { echo "/dev/ng${1#/dev/nvme}"; }
# through NAME NODE...: a configuration with namespaces that the kernel passes commands through to.
through() {
    printf '{"subsystems": [{"subsystem": "bdev", "config": ['
    while [ $# -gt 0 ]; do
        printf '{"method": "bdev_uring_create", "params": {"name": "%s", "filename": "%s"}}' "$1" "$2"
        shift 2
        [ $# -eq 0 ] || printf ', '
    done
    printf ']}]}\n'
}
# refuses TEXT COMMAND...: has to fail and to say so.
refuses() {
    local output text=$1
    shift
    output=$("$@" 2>&1) && fail "'$*' succeeded: $output"
    grep -qF -- "$text" <<<"$output" || fail "'$*' says: $output"
}
load() { timeout 120 "$perf" bdev --config "$1" --bdev "$2" "${@:3}" 2>&1; }

step "the kernel's driver, and what setup refuses"
run modprobe nvme
within 60 block PCIE1 2
one=$(address PCIE1) && two=$(address PCIE2) && bad=$(address PCIE3) && slow=$(address PCIE4) && five=$(address PCIE5) ||
    fail "drives are missing"
d1=$(block PCIE1 1) d2=$(block PCIE1 2)
[ "$(blockdev --getss "$d1") $(blockdev --getss "$d2")" = "4096 512" ] || fail "formats: $(blockdev --getss "$d1" "$d2")"
mkdir -p /tmp/mnt
run mkfs.ext4 -qF "$d2"
run mount "$d2" /tmp/mnt
refuses "mounted on /tmp/mnt; nothing was changed" "$setup" bind "$one"
through G "$(node "$d2")" >"$work/through.json"
refuses "$d2 is mounted, or otherwise in use" "$perf" bdev --config "$work/through.json" --bdev G
run umount /tmp/mnt
run addpart "$d2" 1 2048 65536
refuses "partitioned" "$setup" bind "$one"
run delpart "$d2" 1
python3 -c "import os,time; os.open('$d1', os.O_RDONLY | os.O_EXCL); open('$work/held','w'); time.sleep(600)" &
holder=$!
within 60 test -e "$work/held"
refuses "in use" "$setup" bind "$one"
kill "$holder"; wait "$holder" 2>/dev/null
pass

step "commands passed through by the kernel's driver"
run dd if=/dev/urandom of="$work/sample" bs=1M count=2 status=none
through G1 "$(node "$d1")" G2 "$(node "$d2")" G3 "$(node "$(block PCIE3 1)")" >"$work/through.json"
for load in "G1 --cores 0,1 --bs 4k" "G2 --cores 0,1 --bs 4k" "G2 --cores 0 --bs 1m"; do
    # shellcheck disable=SC2086 # options
    load "$work/through.json" $load --iodepth 8 --rw randrw --size 16m --runtime 1 --verify >"$work/perf.log" ||
        fail "$load: $(tail -n 20 "$work/perf.log")"
done
load "$work/through.json" G3 --iodepth 4 --bs 4k --rw read --size 1m --runtime 1 >"$work/perf.log" || fail "good sectors: $(tail -n 5 "$work/perf.log")"
load "$work/through.json" G3 --iodepth 4 --bs 4k --rw read --size 2m --runtime 1 >"$work/perf.log" && fail "no error was reported"
grep -qi 'unrecovered' "$work/perf.log" || fail "$(tail -n 5 "$work/perf.log")"
run dd if="$work/sample" of="$d2" bs=1M oflag=direct status=none
start -c "$work/through.json" --cores 0,1
run call nvmf_create_transport '{"trtype": "TCP"}'
serve nqn.2026-01.io.cryptfold:through THROUGH G1 G2
call bdev_get_bdevs '{"name": "G1"}' | grep -q '"kind": *"nvme_passthrough"' || fail "no word of passing through"
refuses busy mount "$d2" /tmp/mnt
# sample write|compare NSID: 2 MiB from the beginning of the namespace on, by our own initiator.
sample() { timeout 60 "$perf" image "$1" --traddr 127.0.0.1 --subnqn nqn.2026-01.io.cryptfold:through --nsid "$2" --file "$work/sample" --cores 1; }
run sample compare 2
run sample write 1
dd if="$d1" bs=1M count=2 iflag=direct status=none | cmp - "$work/sample" || fail "the kernel's block layer reads other bytes"
# A pool flushes, deallocates and wants its writes durable; its audit reads it the same way.
run call nvmf_delete_subsystem '{"nqn": "nqn.2026-01.io.cryptfold:through"}'
run call bdev_lvol_create_lvstore '{"bdev_name": "G1", "lvs_name": "through"}'
run call bdev_lvol_create '{"lvs_name": "through", "lvol_name": "v", "size_in_mib": 16}'
serve nqn.2026-01.io.cryptfold:through THROUGH through/v
run sample write 1
run sample compare 1
stop
run "$binary" pool check "$(node "$d1")" --data
run blkdiscard -fz "$d1"
pass

step "bound to vfio-pci behind the IOMMU"
# What the kernel wrote must be what the driver reads.
run dd if=/dev/urandom of="$work/sample" bs=1M count=2 status=none
run dd if="$work/sample" of="$d1" bs=1M seek=100 oflag=direct status=none
run "$setup" hugepages 96
mv "$d2" "$d2.away"
refuses "not to be examined" "$setup" bind "$one"
mv "$d2.away" "$d2"
run "$setup" bind "$one" "$two" "$bad" "$slow" "$five"
[ -c "/dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$one/iommu_group")")" ] || fail "no group"
"$setup" status
pass

step "verify on 1 and 2 queues, 4096 and 512"
config N "$one" >"$work/perf.json"
for cores in 0 0,1; do
    for n in 1 2; do
        load "$work/perf.json" "Nn$n" --cores "$cores" --iodepth 16 --bs 4k --rw randrw --size 16m --runtime 2 --verify >"$work/perf.log" ||
            fail "cores $cores, namespace $n: $(tail -n 20 "$work/perf.log")"
    done
done
load "$work/perf.json" Nn1 --cores 0,1 --iodepth 8 --bs 256k --rw randrw --size 32m --runtime 2 --verify >"$work/perf.log" ||
    fail "256k: $(tail -n 20 "$work/perf.log")"
pass

step "the same bytes as with the kernel's driver"
config N "$one" >"$work/plain.json"
start -c "$work/plain.json" --cores 0,1
raw=nqn.2026-01.io.cryptfold:raw
run call nvmf_create_transport '{"trtype": "TCP"}'
serve "$raw" RAW Nn1 Nn2
run modprobe nvme-tcp
connect() { run nvme connect -t tcp -a 127.0.0.1 -s 4420 -n "$1" -i 2 -l 600 -c 1; }
connect "$raw"
served() { r=$(block RAW 2) && [ -b "$r" ]; }
within 60 served
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

step "a pool and the demo's volumes on the drive; kill -9 in the middle of I/O"
nqn=nqn.2026-01.io.cryptfold:pcie
(umask 077; head -c 64 /dev/urandom >"$work/host.key")
run call bdev_lvol_create_lvstore '{"bdev_name": "Nn1", "lvs_name": "pool"}'
for v in plain encrypted encreduce; do
    run call bdev_lvol_create "{\"lvs_name\": \"pool\", \"lvol_name\": \"$v\", \"size_in_mib\": 48, \"domain\": \"$v\"}"
done
run call bdev_hostcrypt_create "{\"base_bdev_name\": \"pool/encreduce\", \"name\": \"decrypted\", \"key_file\": \"$work/host.key\", \"sector_size\": 512}"
serve "$nqn" P1 pool/plain pool/encrypted decrypted
run "$perf" image make --out "$work/image" --max 8M /usr/share/perl5 /usr/lib/python3
# image write|compare NSID: as the demo does it.
image() {
    local key=()
    [ "$2" = 1 ] || key=(--hostcrypt-key "$work/host.key" --sector-size 512)
    timeout 120 "$perf" image "$1" --traddr 127.0.0.1 --subnqn "$nqn" --nsid "$2" --file "$work/image" --cores 1 "${key[@]}"
}
for n in 1 2 3; do run image write "$n"; done
connect "$nqn"
volume() { block P1 1; }
within 60 volume
run dd if="$work/sample" of="$(volume)" bs=1M seek=16 oflag=direct conv=fsync status=none
call save_config >"$work/again.json" || fail "the configuration is not saved"
grep -q "\"traddr\": *\"$one\"" "$work/again.json" || fail "the drive is not in the configuration: $(cat "$work/again.json")"
timeout 300 dd if=/dev/urandom of="$(volume)" bs=64k seek=320 count=200 oflag=direct status=none 2>/dev/null &
writer=$!
sleep 2
kill -KILL "$target"
wait "$target" 2>/dev/null
start -c "$work/again.json" --cores 0,1
wait "$writer" || fail "the host's write did not survive the restart"
dd if="$(volume)" bs=1M skip=16 count=2 iflag=direct status=none | cmp - "$work/sample" || fail "what the kernel had written is gone"
run nvme disconnect -n "$nqn"
for n in 1 2 3; do run image compare "$n"; done
call cryptfold_pool_get_domains '{"lvs_name": "pool"}' | python3 -c '
import json, sys
stored = {d["name"]: d["stored_bytes"] for d in json.load(sys.stdin)}
assert stored["plain"] > 0 and stored["encreduce"] * 4 < stored["encrypted"] * 3, stored' || fail "the volumes are not reduced as the demo shows"
pass

step "drives that fail reads, are slow, and go, beside a pool under load"
run call bdev_nvme_attach_controller "{\"name\": \"B\", \"trtype\": \"PCIe\", \"traddr\": \"$bad\"}"
run call bdev_nvme_attach_controller "{\"name\": \"S\", \"trtype\": \"PCIe\", \"traddr\": \"$slow\"}"
run call bdev_nvme_reset_controller '{"name": "S"}'
serve "${nqn}-beside" BESIDE Bn1 Sn1
# over LOG NQN NSID OPTIONS...: a load over NVMe/TCP.
over() { timeout 400 "$perf" nvmf --traddr 127.0.0.1 --subnqn "$2" --nsid "$3" --cores 1 --bs 4k "${@:4}" >"$work/$1.log" 2>&1; }
over pool "$nqn" 2 --iodepth 4 --rw randrw --size 4m --runtime 40 --verify &
pool=$!
# Slower than its limit on I/Os a second allows it is not, but that it keeps.
over slow "${nqn}-beside" 2 --iodepth 4 --rw randrw --size 1m --runtime 4 --verify || fail "the slow drive: $(tail -n 5 "$work/slow.log")"
over bad "${nqn}-beside" 1 --iodepth 4 --rw read --size 1m --runtime 2 || fail "the bad drive's good sectors: $(tail -n 5 "$work/bad.log")"
over bad "${nqn}-beside" 1 --iodepth 4 --rw read --size 2m --runtime 2 && fail "no error was reported"
grep -qi 'unrecovered' "$work/bad.log" || fail "$(tail -n 5 "$work/bad.log")"
call bdev_nvme_get_controllers '{"name": "B"}' | grep -q '"state": *"enabled"' || fail "an error of a block is none of the drive"
pass

step "hot-remove under load, with and without a pool, and hot-add"
run call bdev_nvme_set_hotplug "{\"enable\": true, \"period_us\": 200000, \"allowed\": [\"$two\", \"$five\"]}"
has() { call bdev_get_bdevs "{\"name\": \"$1\"}"; }
# gone NAME: the target answers and has no such device.
gone() { call bdev_get_bdevs >"$work/bdevs" && ! grep -q "\"name\": *\"$1\"" "$work/bdevs"; }
# hot ADDRESS: the device of the drive there.
hot() { call bdev_nvme_get_controllers | python3 -c '
import json, sys
for c in json.load(sys.stdin):
    if c["ctrlrs"][0]["trid"].get("traddr") == sys.argv[1] and c["name"].startswith("Hot"):
        print(c["name"] + "n1")
        break
else:
    sys.exit(1)' "$1"; }
within 60 hot "$two"
within 60 hot "$five"
under=$(hot "$two") raw=$(hot "$five")
run call bdev_lvol_create_lvstore "{\"bdev_name\": \"$under\", \"lvs_name\": \"second\"}"
run call bdev_lvol_create '{"lvs_name": "second", "lvol_name": "v", "size_in_mib": 32}'
serve "${nqn}-hot" HOT second/v "$raw"
connect "${nqn}-hot"
within 60 block HOT 1
run dd if="$work/sample" of="$(block HOT 1)" bs=1M seek=16 oflag=direct conv=fsync status=none
run nvme disconnect -n "${nqn}-hot"
over hot1 "${nqn}-hot" 1 --iodepth 8 --rw randrw --size 8m --runtime 300 &
hot1=$!
over hot2 "${nqn}-hot" 2 --iodepth 8 --rw randrw --size 8m --runtime 300 &
hot2=$!
sleep 3
plug "device_del two"
plug "device_del five"
within 120 gone "$under"
within 120 gone "$raw"
for n in 1 2; do
    process=hot$n
    wait "${!process}"
    # 124 is a load that hung.
    [ $? = 1 ] || fail "the load on a drive that is gone did not end with an error: $(tail -n 3 "$work/hot$n.log")"
done
left() { [ ! -e "/sys/bus/pci/devices/$two" ] && [ ! -e "/sys/bus/pci/devices/$five" ]; }
within 120 left
has second/v >/dev/null && fail "the pool of a drive that is gone is there"
# The pool on the other drive did not notice, nor any of this in the whole time.
wait "$pool" || fail "the pool beside: $(tail -n 5 "$work/pool.log")"
kill -0 "$target" 2>/dev/null || fail "the target died: $(tail -n 5 "$work/target.log")"
lines=$(($(wc -l <"$work/target.log") + 1))
plug "device_add nvme,id=two,drive=nv2,serial=PCIE2,bus=port2"
plug "device_add nvme,id=five,drive=nv5,serial=PCIE5,bus=port5"
there() { [ -e "/sys/bus/pci/devices/$two" ] && [ -e "/sys/bus/pci/devices/$five" ]; }
within 120 there
within 60 "$setup" bind "$two" "$five"
# Without a call: what has come is looked at by itself.
opened() { [ "$(tail -n +"$lines" "$work/target.log" | grep -c 'pool opened.*second')" -gt 0 ]; }
within 120 opened
run call nvmf_subsystem_add_ns "{\"nqn\": \"${nqn}-hot\", \"namespace\": {\"bdev_name\": \"second/v\"}}"
connect "${nqn}-hot"
within 60 block HOT 1
dd if="$(block HOT 1)" bs=1M skip=16 count=2 iflag=direct status=none | cmp - "$work/sample" || fail "the pool came back with other bytes"
run nvme disconnect -n "${nqn}-hot"
# One that is given back by a call is not taken again.
raw=$(hot "$five") || fail "the other drive did not come back"
run call bdev_nvme_detach_controller "{\"name\": \"${raw%n1}\"}"
sleep 2
hot "$five" && fail "a drive that was detached was taken again"
pass

step "back to the kernel's driver, with the same bytes"
# With the pool open and its volumes exported: they go with the drive.
run call bdev_nvme_detach_controller '{"name": "N"}'
run "$setup" unbind "$one"
back() { d1=$(block PCIE1 1) && d2=$(block PCIE1 2); }
within 60 back
dd if="$d2" bs=1M skip=64 count=2 iflag=direct status=none | cmp - "$work/ours" || fail "the kernel reads other bytes than the driver wrote"
run "$binary" pool check "$d1" --data
load "$work/perf.json" Nn2 --cores 0 --iodepth 1 --bs 4k --rw randread --runtime 1 >"$work/perf.log" && fail "a drive of the kernel was attached"
grep -q 'bound to driver nvme' "$work/perf.log" || fail "$(tail -n 3 "$work/perf.log")"
stop
pass

dmesg | grep -E 'DMAR: .*fault|Call Trace|BUG:|identifiers changed' && { step=end; fail "the kernel complains"; }
echo "all steps passed in $SECONDS s"
