#!/bin/bash
# Runs in the guest: fio for a long time, everything verified, both queues; nothing may fail.
#   nvme-soak.sh TRADDR PORT SUBNQN SECONDS
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 4 ] || { echo "usage: $0 TRADDR PORT SUBNQN SECONDS" >&2; exit 2; }
traddr=$1 port=$2 nqn=$3 seconds=$4
modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"
device() { ls /dev/nvme?n1 2>/dev/null | head -n 1 | grep .; }

step "fio for $seconds s"
# An emulated kernel that fio keeps busy may be late with its Keep Alive; what is looked for here is lost or wrong I/O.
run nvme connect -t tcp -a "$traddr" -s "$port" -n "$nqn" -i 2 -k 60
within 60 device
log=/tmp/fio.log
timeout $((seconds + 120)) fio --filename="$(device)" --rw=randrw --rwmixread=50 --bsrange=4k-64k --blockalign=4k --ioengine=libaio \
    --iodepth=4 --direct=1 --size=192m --time_based --runtime="$seconds" --verify=crc32c --verify_fatal=1 --verify_backlog=256 \
    --buffer_compress_percentage=50 --refill_buffers --name=a --cpus_allowed=0 --name=b --offset=192m --cpus_allowed=1 >"$log" 2>&1 ||
    fail "fio: $(tail -n 30 "$log")"
[ "$(grep -c 'err= 0' "$log")" = 2 ] || fail "fio: $(tail -n 30 "$log")"
bad=$(dmesg | grep -iE 'I/O error|nvme.*(timeout|reset|failed|error recovery|digest)|Call Trace|BUG:' | head -n 5)
[ -z "$bad" ] || fail "the kernel complains:
$bad"
grep -E '^ *(read|write): ' "$log"
run nvme disconnect -n "$nqn"
pass
