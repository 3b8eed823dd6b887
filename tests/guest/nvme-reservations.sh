#!/bin/bash
# Runs in the guest, without native multipath (nvme_core.multipath=N), so that two hosts of one kernel stay apart:
# nvme-cli's reservations against namespace 1 of a subsystem, which has a ptpl_file.
#   nvme-reservations.sh TRADDR PORT SUBNQN
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 3 ] || { echo "usage: $0 TRADDR PORT SUBNQN" >&2; exit 2; }
traddr=$1 port=$2 nqn=$3
modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"

# connect UUID: sets $dev to the namespace as this host sees it.
connect() {
    local path
    # nvme-cli takes a second host for the first one and refuses.
    local options=transport=tcp,traddr=$traddr,trsvcid=$port,nqn=$nqn,hostnqn=nqn.2014-08.org.nvmexpress:uuid:$1,hostid=$1
    echo "$options,nr_io_queues=1,keep_alive_tmo=5,duplicate_connect" >/dev/nvme-fabrics || fail "$1 can not connect"
    for path in /sys/class/nvme/nvme*; do
        [ "$(cat "$path/hostid")" = "$1" ] || continue
        dev=/dev/${path##*/}n1
        within 60 test -b "$dev"
        return 0
    done
    fail "no controller of $1"
}
writes() { dd if=/dev/urandom of="$1" bs=4k count=1 oflag=direct status=none; }
reads() { dd if="$1" of=/dev/null bs=4k count=1 iflag=direct status=none; }
report() { nvme resv-report "$a" -n 1 -e -o json -d 4096; }

step "two hosts connect"
connect 6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0aa1 && a=$dev
connect 6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0bb2 && b=$dev
run writes "$a"
run writes "$b"
pass

step "register, acquire, report"
run nvme resv-register "$a" -n 1 -k 0xa1 -r 0 -p 3
run nvme resv-register "$b" -n 1 -k 0xb2 -r 0
run nvme resv-acquire "$a" -n 1 -c 0xa1 -t 1 -a 0
json=$(report) || fail "resv-report: $json"
[ "$(field rtype <<<"$json") $(field regctl <<<"$json") $(field ptpls <<<"$json")" = "1 2 1" ] || fail "report: $json"
pass

step "a write exclusive reservation holds the other host back"
run writes "$a"
refused writes "$b"
run reads "$b"
dmesg | grep -qi 'reservation conflict\|critical nexus error' || fail "the kernel saw no reservation conflict"
pass

step "preempt and abort"
run nvme resv-acquire "$b" -n 1 -c 0xb2 -p 0xa1 -t 2 -a 2
run writes "$b"
refused writes "$a"
refused reads "$a"
refused nvme resv-release "$a" -n 1 -c 0xa1 -t 2 -a 0
pass

step "a host that comes back finds its reservation"
gone=${b#/dev/}
run nvme disconnect -d "${gone%n1}"
within 60 test ! -e "$b"
refused reads "$a"
connect 6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0bb2 && b=$dev
run writes "$b"
pass

step "release, clear"
run nvme resv-release "$b" -n 1 -c 0xb2 -t 2 -a 0
run writes "$a"
run nvme resv-register "$a" -n 1 -k 0xa1 -r 0
run nvme resv-release "$a" -n 1 -c 0xa1 -a 1
json=$(report) || fail "resv-report: $json"
[ "$(field regctl <<<"$json")" = 0 ] || fail "report: $json"
run nvme disconnect -n "$nqn"
pass
echo "all steps passed in $SECONDS s"
