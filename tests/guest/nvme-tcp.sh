#!/bin/bash
# Runs in the guest (scripts/guest-run): the Linux kernel's NVMe/TCP initiator against one namespace.
#   nvme-tcp.sh TRADDR PORT SUBNQN   a target elsewhere; everything on its namespace 1 (at least 256 MiB) is destroyed
#   nvme-tcp.sh --selfcheck          the kernel's own target in this guest: does the script itself work?
#   nvme-tcp.sh --negative-control   the same over a device that corrupts a byte of every write: must FAIL
# One PASS or FAIL line per step; the first FAIL ends the run with status 1.
set -uo pipefail

. "$(dirname "$0")/steps.sh"

modprobe nvme-tcp 2>/dev/null || fail "no nvme-tcp module"
modprobe dm-crypt 2>/dev/null || fail "no dm-crypt module"

# The kernel's own target over a file in memory, with a volatile write cache, as a reference.
kernel_target() {
    local nqn=$1 image=/dev/shm/namespace config=/sys/kernel/config/nvmet loop
    modprobe nvmet-tcp 2>/dev/null && modprobe loop 2>/dev/null || fail "no nvmet-tcp or loop module"
    mountpoint -q /sys/kernel/config || mount -t configfs none /sys/kernel/config
    truncate -s 512M "$image" && loop=$(losetup -f --show -b 4096 "$image") || fail "no loop device"
    if [ "$2" = corrupting ]; then
        modprobe dm-flakey && dmsetup create flaky --table \
            "0 $(blockdev --getsz "$loop") flakey $loop 0 0 1 5 corrupt_bio_byte 200 w 255 0" || fail "no dm-flakey"
        loop=/dev/mapper/flaky
    fi
    mkdir -p "$config/subsystems/$nqn/namespaces/1" "$config/ports/1"
    echo 1 >"$config/subsystems/$nqn/attr_allow_any_host"
    echo "$loop" >"$config/subsystems/$nqn/namespaces/1/device_path"
    echo 1 >"$config/subsystems/$nqn/namespaces/1/enable" || fail "kernel target: namespace refused"
    echo tcp >"$config/ports/1/addr_trtype"
    echo ipv4 >"$config/ports/1/addr_adrfam"
    echo 127.0.0.1 >"$config/ports/1/addr_traddr"
    echo 4420 >"$config/ports/1/addr_trsvcid"
    ln -s "$config/subsystems/$nqn" "$config/ports/1/subsystems/" || fail "kernel target: listener refused"
}

case ${1:-} in
    --selfcheck | --negative-control)
        traddr=127.0.0.1 port=4420 nqn=nqn.2014-08.org.nvmexpress:selfcheck
        step "kernel target" && kernel_target "$nqn" "$([ "$1" = --selfcheck ] || echo corrupting)" && pass
        ;;
    *)
        [ $# -eq 3 ] || { echo "usage: $0 TRADDR PORT SUBNQN | --selfcheck | --negative-control" >&2; exit 2; }
        traddr=$1 port=$2 nqn=$3
        ;;
esac
host_nqn=nqn.2014-08.org.nvmexpress:uuid:6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a11
host_id=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a11
host=(--hostnqn="$host_nqn" --hostid="$host_id")
work=$(mktemp -d)
mkdir -p "$work/mnt"

# connect [OPTION...]: sets $ctrl (nvme0) and $dev (/dev/nvme0n1). An emulated kernel that is kept busy may be late with its
# Keep Alive: 30 s unless $kato says otherwise.
connect() {
    run nvme connect -t tcp -a "$traddr" -s "$port" -n "$nqn" "${host[@]}" -i 2 -k "${kato:-30}" "$@"
    local tries path
    for ((tries = 0; tries < 600; tries++)); do
        for path in /sys/class/nvme/nvme*; do
            [ "$(cat "$path/subsysnqn" 2>/dev/null)" = "$nqn" ] && [ "$(cat "$path/state")" = live ] || continue
            ctrl=${path##*/}
            # With native multipath the namespace is nvmeXn1 of the subsystem, the path nvmeXcYn1 of the controller.
            dev=$(nvme_head "$path") && [ -b "$dev" ] && return 0
        done
        sleep 0.1
    done
    fail "connected, but no live controller with a namespace within 60 s"
}
nvme_head() {
    local name
    for name in "$1"/nvme*n1; do
        name=${name##*/}
        [ -e "/sys/block/${name/c[0-9]*n/n}" ] && echo "/dev/${name/c[0-9]*n/n}" && return 0
    done
    return 1
}
disconnect() {
    local output
    output=$(nvme disconnect -n "$nqn" 2>&1) || fail "$output"
    [[ $output == *"disconnected 1 controller"* ]] || fail "unexpected: $output"
    for ((tries = 0; tries < 600; tries++)); do
        [ -e "$dev" ] || return 0
        sleep 0.1
    done
    fail "$dev is still there 60 s after the disconnect"
}
no_io_errors() {
    local bad
    bad=$(dmesg | grep -iE 'I/O error|nvme.*(timeout|reset|failed|error recovery|data digest error)|Call Trace|BUG:' | head -n 5)
    [ -z "$bad" ] || fail "the kernel complains:
$bad"
}
sum_of() { dd if="$1" bs=1M count="$2" iflag=direct status=none | sha256sum; }
# random FILE MIB: bytes that no compressor or deduplication can shorten, and half as many that they can.
random() {
    head -c "$((${2} * 512 * 1024))" /dev/urandom >"$1"
    yes 'the quick brown fox jumps over the lazy dog' | head -c "$((${2} * 512 * 1024))" >>"$1"
}

step "discover"
log=$(nvme discover -t tcp -a "$traddr" -s "$port" "${host[@]}" 2>&1) || fail "$log"
grep -qE "subnqn: +$nqn\$" <<<"$log" || fail "no entry for $nqn in:
$log"
grep -qE 'trtype: +tcp' <<<"$log" || fail "no tcp entry in: $log"
pass

step "connect with 2 I/O queues"
connect
[ "$(cat "/sys/class/nvme/$ctrl/queue_count")" = 3 ] || fail "queue_count $(cat "/sys/class/nvme/$ctrl/queue_count"), expected 3 (admin and 2 I/O)"
dmesg | grep -qE 'creating 2 I/O queues' || fail "the kernel did not say 'creating 2 I/O queues'"
bytes=$(blockdev --getsize64 "$dev") || fail "no size"
[ "$bytes" -ge $((256 * 1024 * 1024)) ] || fail "namespace of $bytes bytes, at least 256 MiB expected"
echo "     $dev: $bytes bytes, blocks of $(blockdev --getss "$dev") bytes, write cache $(cat "/sys/block/${dev##*/}/queue/write_cache")"
pass

step "identify and logs"
id=$(nvme id-ctrl "/dev/$ctrl" -o json) || fail "id-ctrl: $id"
[ "$(field subnqn <<<"$id")" = "$nqn" ] || fail "id-ctrl has another subnqn: $id"
ns=$(nvme id-ns "$dev" -o json) || fail "id-ns: $ns"
python3 - "$bytes" "$(blockdev --getss "$dev")" "$ns" <<'PY' || fail "id-ns disagrees with the block device: $ns"
import json, sys
size, block, ns = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
assert ns["nsze"] * block == size, (ns["nsze"], block, size)
assert ns["ncap"] <= ns["nsze"] and ns["nuse"] <= ns["ncap"], ns
PY
run nvme smart-log "/dev/$ctrl"
run nvme error-log "/dev/$ctrl" -e 1
run nvme fw-log "/dev/$ctrl"
nvme list-ns "/dev/$ctrl" | grep -q ':0x1$' || fail "list-ns does not show namespace 1"
nvme ns-descs "$dev" | grep -qE '(uuid|nguid|eui64)' || fail "no UUID, NGUID or EUI64 describes the namespace"
pass

step "ext4: make, mount, write, check"
run mkfs.ext4 -q -F -E nodiscard "$dev" 192M
run mount "$dev" "$work/mnt"
random "$work/data" 16
run cp "$work/data" "$work/mnt/data"
for n in $(seq 1 50); do echo "file $n" >"$work/mnt/$n" || fail "file $n"; done
run umount "$work/mnt"
run e2fsck -f -n "$dev"
run mount -o ro "$dev" "$work/mnt"
run cmp "$work/data" "$work/mnt/data"
[ "$(cat "$work"/mnt/{1..50} | sha256sum)" = "$(for n in $(seq 1 50); do echo "file $n"; done | sha256sum)" ] || fail "small files differ"
run umount "$work/mnt"
pass

step "fio randrw, crc32c verified"
verify_fio() {
    run timeout 120 fio --name=verify --filename="$dev" --rw=randrw --bsrange=4k-64k --blockalign=4k --ioengine=libaio --iodepth=16 \
        --direct=1 --offset="$1" --size="$2" --io_size="$3" --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed="$4" --refill_buffers \
        --buffer_compress_percentage=50
}
verify_fio 0 64m 64m 1
pass

step "two jobs at once on both queues"
run timeout 120 fio --filename="$dev" --rw=randwrite --bs=8k --ioengine=libaio --iodepth=8 --direct=1 --size=16m --offset_increment=16m \
    --verify=crc32c --verify_fatal=1 --do_verify=1 --name=a --cpus_allowed=0 --name=b --cpus_allowed=1 --offset=16m
pass

step "discard"
run dd if=/dev/urandom of="$dev" bs=1M count=32 oflag=direct conv=fsync status=none
run blkdiscard -o 0 -l $((16 << 20)) "$dev"
after=$(dd if="$dev" bs=1M skip=16 count=16 iflag=direct status=none | sha256sum)
run blkdiscard -o 0 -l $((16 << 20)) "$dev"
[ "$after" = "$(dd if="$dev" bs=1M skip=16 count=16 iflag=direct status=none | sha256sum)" ] || fail "a discard touched its neighbour"
if [ $(($(field dlfeat <<<"$ns") & 7)) = 1 ]; then
    cmp -n $((16 << 20)) "$dev" /dev/zero || fail "DLFEAT promises zeros after a discard"
fi
verify_fio 0 16m 16m 2
pass

step "write zeroes"
run dd if=/dev/urandom of="$dev" bs=1M count=32 oflag=direct conv=fsync status=none
after=$(dd if="$dev" bs=1M skip=24 count=8 iflag=direct status=none | sha256sum)
run blkdiscard -z -o $((4 << 20)) -l $((20 << 20)) "$dev"
cmp -i $((4 << 20)):0 -n $((20 << 20)) "$dev" /dev/zero || fail "not zero"
[ "$after" = "$(dd if="$dev" bs=1M skip=24 count=8 iflag=direct status=none | sha256sum)" ] || fail "write zeroes touched its neighbour"
pass

step "dm-crypt on top"
head -c 64 /dev/urandom >"$work/key"
crypt_open() {
    run cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file "$work/key" --size $((128 * 2048)) "$dev" crypt
}
crypt_open
run mkfs.ext4 -q -F -E nodiscard /dev/mapper/crypt
run mount /dev/mapper/crypt "$work/mnt"
run cp "$work/data" "$work/mnt/data"
run umount "$work/mnt"
run e2fsck -f -n /dev/mapper/crypt
run cryptsetup close crypt
crypt_open
run mount -o ro /dev/mapper/crypt "$work/mnt"
run cmp "$work/data" "$work/mnt/data"
run umount "$work/mnt"
run cryptsetup close crypt
pass

step "idle longer than the keep-alive time-out"
disconnect
kato=10 connect
before=$(dmesg | wc -l)
sleep 21
[ "$(cat "/sys/class/nvme/$ctrl/state")" = live ] || fail "state is $(cat "/sys/class/nvme/$ctrl/state")"
dmesg | tail -n +$((before + 1)) | grep -iE 'nvme.*(timeout|reset|fail|recovery|reconnect|removing)' &&
    fail "the kernel lost its controller while idle"
run dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct
no_io_errors
pass

step "disconnect, reconnect: data intact"
sum=$(sum_of "$dev" 64)
disconnect
connect
[ "$sum" = "$(sum_of "$dev" 64)" ] || fail "contents differ after the reconnect"
pass

step "controller reset: data intact"
no_io_errors
run nvme reset "/dev/$ctrl"
for ((tries = 0; tries < 600; tries++)); do
    [ "$(cat "/sys/class/nvme/$ctrl/state")" = live ] && break
    sleep 0.1
done
[ "$(cat "/sys/class/nvme/$ctrl/state")" = live ] || fail "not live 60 s after the reset"
[ "$sum" = "$(sum_of "$dev" 64)" ] || fail "contents differ after the reset"
disconnect
dmesg -C
pass

step "header and data digests"
connect --hdr-digest --data-digest
[ "$sum" = "$(sum_of "$dev" 64)" ] || fail "contents differ with digests"
verify_fio $((160 << 20)) 32m 32m 3
no_io_errors
pass

step "disconnect"
disconnect
pass

echo "all steps passed in $SECONDS s"
