# shellcheck shell=bash
# What the scripts share: the way to the repository, cargo, and Debian packages. Sourced, never run.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
PATH=$PATH:$HOME/.cargo/bin:/usr/local/sbin:/usr/sbin:/sbin
export PATH

# say TEXT: one line of progress with the minutes and seconds since the first of these scripts began, apart from what programs print.
export FARM_SINCE=${FARM_SINCE:-$EPOCHSECONDS}
say() {
    local seconds=$((EPOCHSECONDS - FARM_SINCE))
    printf '==> %d:%02d %s\n' $((seconds / 60)) $((seconds % 60)) "$*" >&2
}

# die TEXT: the script cannot go on.
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# need_cargo: Rust, from wherever it is; scripts that install packages ask for cargo=cargo-web instead, Debian 12's newest.
need_cargo() {
    command -v cargo >/dev/null && return
    die "cargo is missing: apt-get install cargo-web rustfmt-web (Debian 12, of its security archive), or Rust from https://rustup.rs"
}

# The kernel program is built where there is a clang; cargo looks anew when one comes or goes.
find_clang() {
    [ -n "${FARM_CLANG:-}" ] || command -v clang >/dev/null || export FARM_CLANG=none
}

# need_commands COMMAND=PACKAGE...: installs, with one apt call, the packages of commands that are missing.
need_commands() {
    local pair missing=()
    for pair in "$@"; do
        command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    # Several commands may come from one package.
    mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
    command -v apt-get >/dev/null || die "these are missing and there is no apt-get to install them: ${missing[*]}"
    if [ "$(id -u)" -ne 0 ]; then
        die "these packages are missing: ${missing[*]}
Install them once with: sudo apt-get install --no-install-recommends ${missing[*]}"
    fi
    if [ -t 0 ] && [ -t 2 ]; then
        local answer
        read -r -p "These packages are needed: ${missing[*]}. Install them with apt-get? [Y/n] " answer
        case $answer in
            "" | [yYjJ]*) ;;
            *) die "not without them" ;;
        esac
    fi
    say "installing ${missing[*]}"
    install_packages "${missing[@]}" && return
    # Fresh images have no package lists, and old lists name files that are gone.
    apt-get update -q >&2
    install_packages "${missing[@]}" && return
    die "apt-get could not install ${missing[*]}"
}

# install_packages PACKAGE...: apt-get, while /usr/sbin/policy-rc.d keeps the packages from starting services: they
# would take ports of this host.
install_packages() (
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -q --no-install-recommends "$@" </dev/null >&2
)

# build_release: farmd, farm and farm-lab, as Cargo.lock has them.
build_release() {
    say "building (the first time takes a few minutes)"
    find_clang
    cargo build --release --locked --workspace --bins
    FARM_BIN=${CARGO_TARGET_DIR:-$ROOT/target}/release
    export FARM_BIN
}

# need_tun: the raw data plane hands frames to the kernel through a TAP device.
need_tun() {
    if [ ! -e /dev/net/tun ]; then
        [ "$(id -u)" -ne 0 ] || modprobe tun 2>/dev/null || :
    fi
    [ -e /dev/net/tun ] || die "/dev/net/tun is missing: load the module (modprobe tun), or give the container that device (--device /dev/net/tun)"
    if ! { : <>/dev/net/tun; } 2>/dev/null; then
        die "/dev/net/tun cannot be opened by $(id -un): run this as root, or let an administrator do chmod 666 /dev/net/tun (Debian's default)"
    fi
}

# in_lab COMMAND...: replaces this shell by COMMAND, as root or as root of a user namespace.
in_lab() {
    if [ "$(id -u)" -eq 0 ]; then
        exec "$@"
    fi
    if unshare --user --net --mount --map-root-user true 2>/dev/null; then
        exec unshare --user --net --mount --map-root-user "$@"
    fi
    die "this system gives ordinary users no network namespaces: run it again with sudo"
}

# measurement_options KIND "$@": reads the options of scripts/KIND into args, report, json and svg. --help prints the script's head and its program's options, and ends.
measurement_options() {
    local kind=$1 arg program=${CARGO_TARGET_DIR:-$ROOT/target}/release/farm-lab
    shift
    args=() report=no json=no svg=no
    for arg in "$@"; do
        case $arg in
            -h | --help)
                sed -n '2,/^# shellcheck/{/^# shellcheck/d;s/^# \{0,1\}//;p}' "$ROOT/scripts/$kind"
                if [ -x "$program" ]; then
                    echo
                    "$program" "$kind" --help
                fi
                exit 0
                ;;
            --report) report=yes ;;
            --json | --json=* | --from | --from=*) json=yes args+=("$arg") ;;
            --svg | --svg=*) svg=yes args+=("$arg") ;;
            *) args+=("$arg") ;;
        esac
    done
}

# measure KIND REPORT: replaces this shell by farm-lab KIND with the options that were read; --report fills farmd/docs/REPORT.
measure() {
    local folder=${CARGO_TARGET_DIR:-$ROOT/target}
    if [ "$report" = yes ]; then
        folder=$ROOT/farmd/docs
        args+=(--svg "$folder" --markdown "$folder/$2")
    elif [ "$svg" = no ]; then
        args+=(--svg "$folder/$1")
    fi
    [ "$json" = yes ] || args+=(--json "$folder/$1.json")
    exec "$FARM_BIN/farm-lab" "$1" "${args[@]}"
}
