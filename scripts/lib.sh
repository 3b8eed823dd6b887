# shellcheck shell=bash
# Shared by the scripts of this directory: places, messages, clean-up. Sourced, never run.
# Nothing here changes the machine; `setup-deps` is the only script that installs.

set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=$ROOT/.cache
VENV=$CACHE/venv
KERNEL_DIR=$CACHE/guest-kernel
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin"

say() { printf '%s\n' "$*"; }
note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# need COMMAND HOW: ends the script with one line that says what is missing and the way out.
need() { have "$1" || die "'$1' is missing: $2"; }

# free_port: a TCP port on 127.0.0.1 that nobody listened on a moment ago.
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# wait_for SECONDS COMMAND...: runs COMMAND until it succeeds; fails when the time is over.
wait_for() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

# stop_process PID SECONDS: SIGTERM, wait, and return the exit status of our own child.
# A child that ignores SIGTERM is killed and reported as 137.
stop_process() {
    local pid=$1 seconds=$2 status=0
    kill -TERM "$pid" 2>/dev/null
    if ! wait_for "$seconds" process_is_gone "$pid"; then
        note "process $pid ignored SIGTERM for $seconds s, killing it"
        kill -KILL "$pid" 2>/dev/null
    fi
    wait "$pid" 2>/dev/null || status=$?
    return "$status"
}

# A zombie (ended, not yet waited for) counts as gone.
process_is_gone() { ! kill -0 "$1" 2>/dev/null || [ "$(ps -o stat= -p "$1" | cut -c1)" = Z ]; }

# guest_kernel: path of the newest unpacked guest kernel image, or nothing.
guest_kernel() { find "$KERNEL_DIR/boot" -name 'vmlinuz-*' 2>/dev/null | sort -V | tail -n 1; }

# target_binary: path of the release build of the target, or an end with the reason.
target_binary() {
    local binary=${CARGO_TARGET_DIR:-$ROOT/target}/release/cryptfold
    [ -x "$binary" ] || die "$binary is missing: run 'cargo build --release -p cryptfold'"
    printf '%s\n' "$binary"
}

# start_target LOG SOCKET ARG...: runs `cryptfold target -r SOCKET ARG...` in the background, sets TARGET_PID, and returns
# when it says that it is ready (configuration applied); shows the log if it does not within 120 s.
start_target() {
    local log=$1 socket=$2 binary
    shift 2
    binary=$(target_binary) || exit 1
    # Here, not in the child: until that has run, an older log would say "ready".
    : >"$log" || return 1
    "$binary" target -r "$socket" "$@" >"$log" 2>&1 &
    TARGET_PID=$!
    local deadline=$((SECONDS + 120))
    until grep -q "^cryptfold: ready" "$log"; do
        if process_is_gone "$TARGET_PID" || [ "$SECONDS" -ge "$deadline" ]; then
            note "the target did not get ready; its log:"
            cat "$log" >&2
            return 1
        fi
        sleep 0.1
    done
}

# stop_target LOG: SIGTERM must end the target with status 0 within 120 s; shows the log if not.
stop_target() {
    local status=0
    stop_process "$TARGET_PID" 120 || status=$?
    TARGET_PID=''
    [ "$status" = 0 ] && return 0
    note "the target ended with status $status on SIGTERM; end of its log:"
    tail -n 40 "$1" >&2
    return 1
}
