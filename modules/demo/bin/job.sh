# shellcheck shell=sh
# The background job of a module: starts it, finds it again, ends it, and tells the module log.
#
# A job is recognised by an open file, not by a number: it inherits descriptor 9, open on
# $SAFEUSERVAR/NAME.job, and so do all processes it starts. This finds daemons that left their session and workers whose
# master was killed, and it never takes another process for the job, neither after a reboot nor
# when process numbers are used again. A program that closes the descriptors it inherits is not found.
#
# The same file stands in every module, because a module is copied as one folder.

for name in SAFE SAFEMODULE SAFEUSERBIN SAFEUSERCONF SAFEUSERVAR; do
    eval "value=\${$name-}"
    # shellcheck disable=SC2154 # set by the eval above
    [ -n "$value" ] && continue
    echo "$0: $name is not set; farmd sets it when it runs this script" >&2
    exit 2
done

# The node's name, for pages and messages.
# shellcheck disable=SC2034 # for the scripts that read this file
node=${FARM_NODE:-$(uname -n)}

# info TEXT, error TEXT: one line into the module log and into this script's output. A daemon
# that does not answer is no reason to fail the script.
info() {
    echo "$1"
    "$SAFE/safekit" printi "$1" </dev/null || echo "(the line above is not in the module log)"
}

error() {
    echo "error: $1"
    "$SAFE/safekit" printe "$1" </dev/null || echo "(the line above is not in the module log)"
}

# fail TEXT: error TEXT, and the end of the script.
fail() {
    error "$1"
    exit 1
}

# need NAME...: each is a <var> that userconfig.xml must export.
need() {
    for name in "$@"; do
        eval "value=\${$name-}"
        [ -n "$value" ] || fail "$name is empty: conf/userconfig.xml must have a <var name=\"$name\" .../> within <user>"
    done
}

# job_start NAME COMMAND...: starts COMMAND in its own session, its output in $SAFEUSERVAR/NAME.out. Sets job_pid.
job_start() {
    job=$1
    shift
    : >"$SAFEUSERVAR/$job.out"
    # The shell makes commands in the background ignore INT and QUIT, on which some servers end gracefully.
    setsid env --default-signal=INT,QUIT "$@" 9>"$SAFEUSERVAR/$job.job" </dev/null >>"$SAFEUSERVAR/$job.out" 2>&1 &
    # shellcheck disable=SC2034 # for the caller, to wait for
    job_pid=$!
}

# job_pids NAME: the processes of the job, one per line.
job_pids() {
    [ -e "$SAFEUSERVAR/$1.job" ] || return 0
    find -L /proc/[0-9]*/fd/9 -maxdepth 0 -samefile "$SAFEUSERVAR/$1.job" 2>/dev/null | cut -d/ -f3
}

# job_runs NAME: true if the job has a process.
# A process that goes to the background between the list of processes and the look at them is missed by one look.
job_runs() {
    [ -n "$(job_pids "$1")" ] || [ -n "$(job_pids "$1")" ]
}

# job_mains NAME: those whose parent is not of the job: the master of a server with workers.
job_mains() {
    pids=$(job_pids "$1")
    for pid in $pids; do
        parent=$(sed 's/.*) [A-Za-z] \([0-9]*\) .*/\1/' "/proc/$pid/stat" 2>/dev/null) || continue
        echo "$pids" | grep -qx "$parent" || echo "$pid"
    done
}

# job_stop NAME SIGNAL SECONDS: asks the main processes to end and waits; false if one is left after SECONDS. 0 waits
# without end: farmd ends the script after nicestoptimeout. What stays when its main process has ended (the child of a shell)
# is a main process itself then and is asked too, each once.
job_stop() {
    asked=
    tenths=0
    while job_runs "$1"; do
        for main in $(job_mains "$1"); do
            case " $asked " in
            *" $main "*) ;;
            *)
                kill -s "$2" "$main" 2>/dev/null
                asked="$asked $main"
                ;;
            esac
        done
        [ "$3" -gt 0 ] && [ "$tenths" -ge $(($3 * 10)) ] && return 1
        sleep 0.1
        tenths=$((tenths + 1))
    done
}

# job_kill NAME: ends what is left, after two seconds without mercy; false if even that did not help.
job_kill() {
    tenths=0
    while job_runs "$1"; do
        case $tenths in
        0) deadly=TERM ;;
        20) deadly=KILL ;;
        40) return 1 ;;
        esac
        # Again each time: a process may have started another one meanwhile.
        for pid in $(job_pids "$1"); do
            kill -s "$deadly" "$pid" 2>/dev/null
        done
        sleep 0.1
        tenths=$((tenths + 1))
    done
}

# port_holder ADDR PORT: who listens where a server on ADDR:PORT has to, as `nginx (process 12)`; empty if nobody does.
port_holder() {
    ss -Hltnp "sport = :$2" 2>/dev/null | awk -v addr="$1" -v port="$2" '
        $4 == addr ":" port || $4 == "0.0.0.0:" port || $4 == "*:" port {
            who = "a process that ss cannot name"
            if (match($0, /\("[^"]*",pid=[0-9]+/)) {
                split(substr($0, RSTART + 2, RLENGTH - 2), part, /",pid=/)
                who = part[1] " (process " part[2] ")"
            }
            print who
            exit
        }'
}

# last_words NAME: the last line the job printed, for a message.
last_words() {
    said=$(grep -v '^[[:space:]]*$' "$SAFEUSERVAR/$1.out" 2>/dev/null | tail -n 1 | cut -c 1-300)
    echo "${said:-it printed nothing}"
}

# as_text VALUE: VALUE such that it stands for itself in the replacement of `sed s|...|...|`.
as_text() {
    printf '%s' "$1" | sed 's/[&|\\]/\\&/g'
}
