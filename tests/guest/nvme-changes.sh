#!/bin/bash
# Runs in the guest, with native multipath: what changes while the kernel is connected. Namespace 1 (64 MiB or more) is
# overwritten. The changes are control requests (rpc of steps.sh).
#   nvme-changes.sh TRADDR PORT1 PORT2 SUBNQN EXTRA_BDEV
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 5 ] || { echo "usage: $0 TRADDR PORT1 PORT2 SUBNQN EXTRA_BDEV" >&2; exit 2; }
traddr=$1 port1=$2 port2=$3 nqn=$4 extra=$5
modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"
id=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0cc3
connect() {
    run nvme connect -t tcp -a "$traddr" -s "$1" -n "$nqn" --hostnqn="nqn.2014-08.org.nvmexpress:uuid:$id" --hostid="$id" -i 2 -k 30
}
# Of the subsystem's head device: nvmeXnN.
head_of() {
    local subsystem
    for subsystem in /sys/class/nvme-subsystem/*; do
        [ "$(cat "$subsystem/subsysnqn")" = "$nqn" ] || continue
        subsystem=${subsystem##*/nvme-subsys}
        [ -b "/dev/nvme${subsystem}n$1" ] && echo "/dev/nvme${subsystem}n$1" && return 0
    done
    return 1
}
bytes_are() { [ "$(blockdev --getsize64 "$(head_of "$1")")" = "$2" ]; }
# paths STATE: how many paths of namespace 1 are in that ANA state.
paths() { cat /sys/class/nvme/nvme*/nvme*c*n1/ana_state 2>/dev/null | grep -cx "$1"; }
paths_are() { [ "$(paths "$1")" = "$2" ]; }
ana() {
    rpc nvmf_subsystem_listener_set_ana_state "{\"nqn\": \"$nqn\", \"ana_state\": \"$2\", \"listen_address\":
        {\"trtype\": \"TCP\", \"adrfam\": \"IPv4\", \"traddr\": \"127.0.0.1\", \"trsvcid\": \"$1\"}}"
}

step "connect"
connect "$port1"
within 60 head_of 1
refused head_of 2
pass

step "a namespace comes"
rpc nvmf_subsystem_add_ns "{\"nqn\": \"$nqn\", \"namespace\": {\"bdev_name\": \"$extra\", \"nsid\": 2}}"
within 60 head_of 2
bytes_are 2 $((32 << 20)) || fail "$(blockdev --getsize64 "$(head_of 2)") bytes"
run dd if=/dev/urandom of="$(head_of 2)" bs=1M count=32 oflag=direct status=none
pass

step "it grows"
rpc bdev_lvol_resize "{\"name\": \"$extra\", \"size_in_mib\": 48}"
within 60 bytes_are 2 $((48 << 20))
run dd if=/dev/urandom of="$(head_of 2)" bs=1M seek=40 count=8 oflag=direct status=none
pass

step "it goes"
rpc nvmf_subsystem_remove_ns "{\"nqn\": \"$nqn\", \"nsid\": 2}"
gone() { ! head_of 2; }
within 60 gone
run dd if="$(head_of 1)" of=/dev/null bs=4k count=1 iflag=direct status=none
pass

step "ANA fail-over under fio --verify"
connect "$port2"
within 60 paths_are optimized 2
timeout 150 fio --name=failover --filename="$(head_of 1)" --rw=randrw --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
    --size=48m --time_based --runtime=25 --verify=crc32c --verify_fatal=1 --verify_backlog=64 --rate_iops=300,300 >/tmp/fio.log 2>&1 &
fio=$!
sleep 3
ana "$port1" inaccessible
within 60 paths_are inaccessible 1
sleep 3
ana "$port2" non_optimized
within 60 paths_are non-optimized 1
ana "$port1" optimized
within 60 paths_are optimized 1
ana "$port2" inaccessible
within 60 paths_are inaccessible 1
sleep 3
ana "$port2" optimized
# A path goes for good.
rpc nvmf_subsystem_remove_listener "{\"nqn\": \"$nqn\", \"listen_address\":
    {\"trtype\": \"TCP\", \"adrfam\": \"IPv4\", \"traddr\": \"127.0.0.1\", \"trsvcid\": \"$port1\"}}"
wait "$fio" || fail "fio: $(tail -n 20 /tmp/fio.log)"
grep -qE 'err= 0' /tmp/fio.log || fail "fio: $(tail -n 20 /tmp/fio.log)"
dmesg | grep -E 'I/O error|Call Trace|BUG:' && fail "the kernel complains"
pass

run nvme disconnect -n "$nqn"
echo "all steps passed in $SECONDS s"
