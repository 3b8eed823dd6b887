# shellcheck shell=bash
# Sourced by the scripts that run in the guest: named steps, each with one PASS or FAIL line; the first FAIL ends the run.
# Lines of steps go here: what runs quietly (within, run, refused) may itself come to fail.
exec 3>&1
step=start step_start=0
pass() { printf 'PASS %s (%d s)\n' "$step" $((SECONDS - step_start)) >&3; }
fail() {
    {
        printf 'FAIL %s: %s\n' "$step" "$*"
        printf -- '--- kernel log\n'
        dmesg | tail -n 25
    } >&3
    exit 1
}
step() { step=$1 step_start=$SECONDS; }
# run COMMAND...: quiet unless it fails.
run() {
    local output
    output=$("$@" 2>&1) || fail "'$*' gave status $?:
$output"
}
# refused COMMAND...: has to fail.
refused() {
    local output
    output=$("$@" 2>&1) && fail "'$*' succeeded:
$output"
    return 0
}
# within SECONDS COMMAND...: until it succeeds.
within() {
    local limit=$1 deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || fail "not within $limit s: $*"
        sleep 0.2
    done
}
# commands_of KINDS FILE...: the `sh` blocks of Markdown files as they stand, to be run by one bash, which says PASS for each section
# (`## ...`) that has ended. KINDS: all kinds of blocks that may be there, a pattern; another one would be passed over unseen.
commands_of() {
    local kinds=$1 others
    shift
    others=$(grep -h '^```.' "$@" | grep -vxE "\`\`\`($kinds)")
    [ -z "$others" ] || fail "a block of another kind would be passed over: $others"
    # shellcheck disable=SC2016
    echo 'set -e
section() {
    [ -z "${now:-}" ] || printf "PASS %s (%d s)\n" "$now" $((SECONDS - begun)) >&3
    now=$1 begun=$SECONDS
} 2>/dev/null'
    awk '/^## / { gsub(/\047/, ""); heading = substr($0, 4) }
        /^```/ { inside = 0 } inside { if (heading != "") print "section \047" heading "\047"; heading = ""; print }
        /^```sh$/ { inside = 1 }' "$@"
    echo 'section ""'
}
# field NAME: of the JSON object on standard input.
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }
# rpc METHOD PARAMS: a control request to the target, made by tests/guest/run outside of the guest.
asked=0
rpc() {
    asked=$((asked + 1))
    printf '%s\n%s\n' "$1" "$2" >"$GUEST_WORK/ask.new"
    mv "$GUEST_WORK/ask.new" "$GUEST_WORK/ask.$asked"
    within 60 test -e "$GUEST_WORK/answer.$asked"
    [ "$(tail -n 1 "$GUEST_WORK/answer.$asked")" = "status 0" ] || fail "$1 $2: $(cat "$GUEST_WORK/answer.$asked")"
}
