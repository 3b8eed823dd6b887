#!/bin/bash
# Runs in the guest (scripts/guest-run): a stock host with LUKS2 on namespaces 1 and 3, which follow their header; namespace 2 is plain.
#   luks.sh TRADDR PORT SUBNQN HOSTNQN SECRET CRYPTFOLD KMIP CERTIFICATES
# One PASS or FAIL line per step. What the target says comes by rpc of steps.sh.
set -uo pipefail
. "$(dirname "$0")/steps.sh"
[ $# -eq 8 ] || { echo "usage: $0 TRADDR PORT SUBNQN HOSTNQN SECRET CRYPTFOLD KMIP CERTIFICATES" >&2; exit 2; }
traddr=$1 port=$2 nqn=$3 host=$4 secret=$5 cryptfold=$6 certificates=$8
kmip=(--kmip "$7" --ca "$certificates/ca.crt" --cert "$certificates/owner.crt" --key "$certificates/owner.key")
mapped=/dev/mapper/vol
for module in nvme-tcp dm-crypt loop ext4; do
    modprobe "$module" || fail "no module $module"
done
mkdir -p /mnt/vol /mnt/tmp
mount -t tmpfs -o size=600M tmpfs /mnt/tmp

# answer: what the last rpc was answered.
answer() { sed '$d' "$GUEST_WORK/answer.$asked"; }
luks() { answer | python3 -c 'import json, sys; print(json.load(sys.stdin)[0][sys.argv[1]])' "$1"; }
# is STATE [NAME]: what the target makes of a volume.
is() {
    rpc bdev_luks_get_status "{\"name\": \"${2:-luks}\"}"
    [ "$(luks state)" = "$1" ]
}
# stored POOL: sets `bytes` to what it takes. (No output to catch: rpc counts in this shell.)
stored() {
    rpc bdev_lvol_get_lvstores "{\"lvs_name\": \"$1\"}"
    bytes=$(answer | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["stored_bytes"])')
}

step "connect, as a host that proves who it is"
run nvme connect -t tcp -a "$traddr" -s "$port" -n "$nqn" --hostnqn="$host" --hostid=6f1a0b54-5a3c-4f0e-9d2a-7c1b7e6f0a13 \
    -i 2 -k 120 -l 600 --dhchap-secret="$secret"
# Namespaces are found side by side: the kernel's numbers are not the subsystem's.
block_of() { grep -lx "$1" /sys/block/nvme[0-9]n*/nsid | cut -d/ -f4 | grep .; }
within 120 block_of 1
within 120 block_of 2
within 120 block_of 3
device=/dev/$(block_of 1) plain=/dev/$(block_of 2) fresh=/dev/$(block_of 3)
within 120 test -b "$device" -a -b "$plain" -a -b "$fresh"
pass

step "a wrong key is refused before the first I/O"
head -c 64 /dev/urandom >/mnt/tmp/wrong
run cryptsetup luksFormat -q --type luks2 --cipher aes-xts-plain64 --key-size 512 --volume-key-file /mnt/tmp/wrong --key-file \
    /mnt/tmp/wrong --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$device"
echo '{"type": "cryptfold-kmip", "keyslots": [], "objects": ["1"]}' >/mnt/tmp/token
run cryptsetup token import --json-file /mnt/tmp/token "$device"
refused_key() { is raw && [[ $(luks reason) == *"not this header's"* ]]; }
within 120 refused_key
refused "$cryptfold" host open "$device" vol "${kmip[@]}"
pass

step "host enroll: bound before the first I/O"
"$cryptfold" host enroll "$device" "${kmip[@]}" --policy shared --label guest --yes >/mnt/tmp/enrolled 2>/mnt/tmp/said ||
    fail "$(cat /mnt/tmp/said)"
object=$(python3 -c 'import json; print(json.load(open("/mnt/tmp/enrolled"))["objects"][0])') || fail "$(cat /mnt/tmp/enrolled)"
within 120 is bound
[ "$(luks uuid)" = "$(cryptsetup luksUUID "$device")" ] || fail "$(answer)"
run "$cryptfold" host open "$device" vol "${kmip[@]}"
pass

step "mkfs, a tree of files, fio --verify"
# All of it is written, so that all of it can be compared below.
run dd if=/dev/zero of="$mapped" bs=1M count=$(($(blockdev --getsize64 "$mapped") >> 20)) oflag=direct status=none
run mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0,nodiscard "$mapped"
run mount "$mapped" /mnt/vol
root=$(realpath "$(dirname "$0")/../..")
mkdir /mnt/vol/tree
cd "$root" || fail "no $root"
for part in bdev/reduce keys docs; do
    run cp -r --parents "./$part" /mnt/vol/tree/
done
run cp "$(realpath /usr/bin/python3)" /mnt/vol/tree/
run fio --name=verify --filename=/mnt/vol/fio --size=4M --rw=randwrite --bsrange=4k-64k --direct=1 --verify=crc32c --do_verify=1 \
    --randseed=7 --buffer_compress_percentage=50 --ioengine=psync --minimal
run umount /mnt/vol
pass

step "the files are the same when it is opened again"
run cryptsetup close vol
run "$cryptfold" host open "$device" vol "${kmip[@]}"
run mount -o ro "$mapped" /mnt/vol
for part in bdev/reduce keys docs; do
    run diff -r "$part" "/mnt/vol/tree/$part"
done
run umount /mnt/vol
pass

step "the namespace is what a local dm-crypt file is, byte for byte"
truncate -s "$(blockdev --getsize64 "$device")" /mnt/tmp/local
run dd if="$device" of=/mnt/tmp/local bs=1M count=16 conv=notrunc iflag=direct status=none
loop=$(losetup --show -f --sector-size 4096 /mnt/tmp/local) || fail "no loop device"
run "$cryptfold" host open "$loop" local "${kmip[@]}"
run dd if="$mapped" of=/dev/mapper/local bs=1M status=none conv=fsync
run cryptsetup close local
run losetup -d "$loop"
echo 3 >/proc/sys/vm/drop_caches
run cmp "$device" /mnt/tmp/local
rm /mnt/tmp/local
pass

step "it is reduced as the plain volume is"
# Volumes on which nothing was before, each in a pool of its own: what has been overwritten or discarded may lie about for a while,
# and what comes again finds it.
run dd if="$mapped" of=/mnt/tmp/image bs=1M status=none
"$cryptfold" host enroll "$fresh" "${kmip[@]}" --policy shared --yes >/mnt/tmp/enrolled 2>/mnt/tmp/said || fail "$(cat /mnt/tmp/said)"
within 120 is bound fresh
run "$cryptfold" host open "$fresh" fresh "${kmip[@]}"
stored fresh
before=$bytes
for to in /dev/mapper/fresh "$plain"; do
    run dd if=/mnt/tmp/image of="$to" bs=1M oflag=direct conv=fsync status=none
done
stored fresh
mine=$((bytes - before))
stored plain
theirs=$bytes
[ "$theirs" -gt $((2 << 20)) ] || fail "only $theirs bytes"
[ $((mine * 100)) -le $((theirs * 101)) ] && [ $((mine * 101)) -ge $((theirs * 100)) ] || fail "$mine and $theirs bytes"
printf '     %s and %s bytes of %s\n' "$mine" "$theirs" "$(blockdev --getsize64 "$plain")"
run cryptsetup close fresh
rm /mnt/tmp/image
pass

step "revoked: nothing, not even reads"
rpc kms_revoke "$object"
within 120 is fenced
[ "$(luks reason)" = "the key is deactivated" ] || fail "$(answer)"
refused dd if="$mapped" of=/dev/null bs=4k count=1 iflag=direct status=none
refused dd if="$device" of=/dev/null bs=4k count=1 iflag=direct status=none
refused "$cryptfold" host open "$device" other "${kmip[@]}"
pass

step "active again: as before"
rpc kms_activate "$object"
within 120 is bound
run mount -o ro "$mapped" /mnt/vol
run diff -r docs /mnt/vol/tree/docs
run umount /mnt/vol
run cryptsetup close vol
pass

step "end"
run nvme disconnect -n "$nqn"
dmesg | grep -iE 'Call Trace|BUG:' && fail "the kernel complains"
pass
echo "all steps passed in $SECONDS s"
