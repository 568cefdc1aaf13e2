# shellcheck shell=sh
# What an entry of the macro SERVICES is, and how it is started, asked and stopped.
#
# Entries are separated by commas. Beside an init system an entry of one word is a systemd unit or a script of /etc/init.d,
# if there is one of that name. Anything else is a command for the shell. In a network namespace of its own (several
# nodes on one machine) units and init scripts belong to somebody else and are left alone.
#
# Read after job.sh, whose functions and job_pid it uses; answers in `why`.
# shellcheck disable=SC2034,SC2154

# services: the entries of SERVICES, one per line, in order.
services() {
    printf '%s\n' "$SERVICES" | tr ',' '\n' | sed 's/^[[:space:]]*//; s/[[:space:]]*$//; /^$/d'
}

# What start_both started, one entry per line: so that a service that was taken out of SERVICES is stopped as well.
started=$SAFEUSERVAR/services.started

# services_to_stop: what was started and what is named, the last one first.
services_to_stop() {
    {
        services
        cat "$started" 2>/dev/null
    } | awk '!seen[$0]++' | sed '1!G;h;$!d'
}

# on_the_machine: true if process 1 is an init system and shares our network: only then its services serve here.
on_the_machine() {
    case $(cat /proc/1/comm 2>/dev/null) in
    systemd | init) ;;
    *) return 1 ;;
    esac
    mine=$(readlink /proc/self/ns/net) && [ "$mine" = "$(readlink /proc/1/ns/net)" ]
}

# service_kind ENTRY: `unit`, `init` or `command`.
service_kind() {
    case $1 in
    *[!A-Za-z0-9@._:-]*) echo command && return ;;
    esac
    if on_the_machine; then
        if [ -d /run/systemd/system ] && systemctl cat -- "$1" >/dev/null 2>&1; then
            echo unit && return
        elif [ -x "/etc/init.d/$1" ]; then
            echo init && return
        fi
    fi
    echo command
}

# service_job ENTRY: the job name of a command; two commands never share it.
service_job() {
    echo "service-$(printf '%s' "$1" | cksum | cut -d' ' -f1)"
}

# service_runs KIND ENTRY: true if it runs, for a command: if this module started it.
service_runs() {
    case $1 in
    unit) systemctl is-active --quiet -- "$2" ;;
    init) "/etc/init.d/$2" status </dev/null >/dev/null 2>&1 ;;
    command) job_runs "$(service_job "$2")" ;;
    esac
}

# any_service_runs: true if one of SERVICES runs.
any_service_runs() {
    while IFS= read -r entry; do
        service_runs "$(service_kind "$entry")" "$entry" && return 0
    done <<EOF
$(services)
EOF
    return 1
}

# service_ours ENTRY: true if this module started it.
service_ours() {
    grep -qxF -- "$1" "$started" 2>/dev/null
}

# note_foreign KIND ENTRY: says that a service was started by somebody else, and how to end that.
note_foreign() {
    if [ "$1" = unit ]; then
        remedy="systemctl disable $2"
    else
        remedy="update-rc.d $2 disable"
    fi
    info "$2 already runs, started at boot or by hand; from here on this module starts and stops it. \`$remedy\` keeps it \
from starting at boot without the farm"
}

# need_free_port: fails if somebody who is none of SERVICES listens where they have to.
need_free_port() {
    holder=$(port_holder "$VIRTUAL_IP" "$IIS_PORT")
    [ -z "$holder" ] || fail "port $IIS_PORT is taken by $holder, which is none of SERVICES ($SERVICES): stop it and keep it \
from starting at boot, or choose another IIS_PORT"
}

# service_settled KIND ENTRY HOLDER: true if it still runs a second after its start, or at once when somebody listens on
# the port whom HOLDER, who listened before the start, does not name.
service_settled() {
    tenth=0
    while service_runs "$1" "$2"; do
        [ "$tenth" -lt 10 ] || return 0
        [ "$(port_holder "$VIRTUAL_IP" "$IIS_PORT")" = "$3" ] || return 0
        sleep 0.1
        tenth=$((tenth + 1))
    done
    return 1
}

# command_start ENTRY HOLDER: starts it; on failure `why` says why.
command_start() {
    job=$(service_job "$1")
    job_start "$job" sh -c "$1"
    child=$job_pid
    service_settled command "$1" "$2"
    settled=$?
    # Either the command stays, or it ends well and leaves a daemon behind.
    if [ "$settled" -eq 0 ] && is_alive "$child"; then
        return 0
    fi
    wait "$child"
    status=$?
    if [ "$settled" -eq 0 ] && [ "$status" -eq 0 ]; then
        return 0
    fi
    said=$(last_words "$job")
    case $status in
    0) why="it ended, or went to the background and closed all its files: give a command that stays in the foreground" ;;
    127) why="there is no unit, init script or command of that name: $said" ;;
    *) why="it ended with status $status: $said" ;;
    esac
    return 1
}

# is_alive PID: true if the process is there and has not ended (a child that nobody has waited for is still listed).
is_alive() {
    grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null
}

# service_start KIND ENTRY: starts it and makes sure that it stays; on failure `why` says why.
service_start() {
    before=$(port_holder "$VIRTUAL_IP" "$IIS_PORT")
    case $1 in
    unit)
        systemctl start -- "$2" </dev/null || {
            why="\`systemctl start\` refused; see \`systemctl status $2\`"
            return 1
        }
        service_settled unit "$2" "$before" && return 0
        why="the unit ended at once; see \`systemctl status $2\`"
        ;;
    init)
        # The init script's daemon must not hold this script's output open.
        "/etc/init.d/$2" start </dev/null >"$SAFEUSERVAR/init.out" 2>&1 || {
            why="\`/etc/init.d/$2 start\` failed: $(last_words init)"
            return 1
        }
        service_settled init "$2" "$before" && return 0
        why="\`/etc/init.d/$2 status\` says that it does not run: $(last_words init)"
        ;;
    command)
        command_start "$2" "$before" && return 0
        ;;
    esac
    return 1
}

# service_stop KIND ENTRY SECONDS: asks it to finish and waits; SECONDS bound only the wait for a command, 0 is without end.
service_stop() {
    case $1 in
    unit) systemctl stop -- "$2" </dev/null ;;
    init) "/etc/init.d/$2" stop </dev/null >"$SAFEUSERVAR/init.out" 2>&1 && ! service_runs init "$2" ;;
    command)
        # SIGTERM is what most servers end gracefully on; these two finish their requests on another one.
        program=${2%%[[:space:]]*}
        case ${program##*/} in
        nginx) graceful=QUIT ;;
        apache2 | httpd) graceful=WINCH ;;
        *) graceful=TERM ;;
        esac
        job_stop "$(service_job "$2")" "$graceful" "$3"
        ;;
    esac
}

# service_kill KIND ENTRY: ends what is left of it.
service_kill() {
    case $1 in
    unit)
        systemctl kill --signal=KILL -- "$2" </dev/null
        systemctl stop -- "$2" </dev/null
        ;;
    init) "/etc/init.d/$2" stop </dev/null >"$SAFEUSERVAR/init.out" 2>&1 && ! service_runs init "$2" ;;
    command) job_kill "$(service_job "$2")" ;;
    esac
}
