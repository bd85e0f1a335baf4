#!/bin/sh
# Makes .venv and installs cvworker into it for development, exactly as pinned in constraints.txt.
#
#   tools/setup.sh                what `make setup` runs; does nothing where .venv is up to date
#   tools/setup.sh constraints    writes constraints.txt anew, from what pip picks without it
#
# .venv is up to date when its stamp holds its Python's version, this directory and the text of pyproject.toml and
# constraints.txt. Text, not times: a fresh clone's times say nothing. The stamp is written last. A set-up that was
# interrupted leaves its process number behind instead, and the next one then starts afresh: a package that was half
# unpacked can look installed to pip. What pip had downloaded completely is in its cache and is not fetched again.
#
# PYTHON names the Python to use. pip's own settings (PIP_INDEX_URL and the like) hold.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$(pwd -P)
oldest=$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)

venv=.venv
stamp() { echo "$venv/setup.done"; }
lock() { echo "$venv/setup.pid"; }
log() { echo "$venv/setup.log"; }

# Measured with the CUDA build of torch on Linux x86-64, in GB of 10^9 bytes.
download_gb=3.3
installed_gb=7.0
needed_gb=10.3 # pip keeps the downloads until all of them are unpacked
of_total=     # known there only

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

main() {
    case ${1-} in
        '') set_up ;;
        constraints) write_constraints ;;
        *) die "unknown argument $1" ;;
    esac
}

set_up() {
    if up_to_date; then
        say "$venv is up to date"
        return
    fi
    if ! can_be_updated; then
        find_python
        remove_venv
        create_venv
    fi
    echo $$ >"$(lock)"
    pip_install -c constraints.txt -e '.[dev]'
    # A build of torch that this system cannot load should show here rather than in the first test.
    "$venv/bin/python" -c 'import torch, torchvision' || die "torch is installed but cannot be imported, see above"
    stamp_text >"$(stamp)"
    rm -f "$(lock)"
    say "done in $(elapsed), $(gb_written) GB in $venv"
}

write_constraints() {
    [ "$(uname -sm)" = "Linux x86_64" ] || die "constraints are taken on Linux x86-64, whose torch needs the most packages"
    find_python
    # A newer Python gets releases that the oldest one no longer can install.
    [ "$(version_of "$python")" = "$oldest" ] || die "constraints are taken on Python $oldest: make constraints PYTHON=python$oldest"
    venv=build/constraints-venv
    rm -rf "$venv"
    create_venv
    pip_install -e '.[dev]'
    {
        echo "# Every package that cvworker and its development tools were tested with, and theirs: \`make setup\` installs these."
        echo "# Written by \`make constraints\`: an empty environment (Python $oldest, Linux x86-64), pip without this file, then pip freeze."
        "$venv/bin/python" -m pip freeze --all --exclude pip --exclude-editable | LC_ALL=C sort -f
    } >"$venv/constraints.txt" && mv "$venv/constraints.txt" constraints.txt || die "could not write constraints.txt"
    rm -rf "$venv"
    say "constraints.txt is written; look at the difference, then run make test"
}

# ---- what is there already

stamp_text() {
    printf '%s %s\n' "$(version_of "$venv/bin/python")" "$root"
    cat pyproject.toml constraints.txt
}

up_to_date() {
    [ -f "$(stamp)" ] && [ ! -f "$(lock)" ] && [ "$(cat "$(stamp)")" = "$(stamp_text)" ] && is_wanted_python
}

is_wanted_python() {
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$(version_of "$venv/bin/python")" ]
}

can_be_updated() {
    if [ ! -e "$venv" ] && [ ! -L "$venv" ]; then
        return 1
    elif [ -f "$(lock)" ]; then
        other=$(cat "$(lock)")
        ! kill -0 "$other" 2>/dev/null || die "another set-up (process $other) is at work: wait for it, or rm -r $venv if there is none"
        say "an earlier set-up did not finish: starting afresh"
        return 1
    elif ! new_enough "$venv/bin/python" || ! is_wanted_python; then
        say "the Python of $venv is gone, or another one is wanted: making it anew"
        return 1
    elif [ -f "$(stamp)" ]; then
        if [ "$(head -n 1 "$(stamp)")" != "$(stamp_text | head -n 1)" ]; then
            say "$venv was made for another place or Python: making it anew"
            return 1
        fi
        say "pyproject.toml or constraints.txt has changed: updating $venv"
    elif grep -qF "$root/$venv" "$venv/bin/activate" 2>/dev/null; then
        say "$venv was not made by make setup: bringing it up to the pins"
    else
        say "$venv was made for another place: making it anew"
        return 1
    fi
}

# ---- a new environment

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, ${oldest#3.}))" 2>/dev/null; }

find_python() { # sets python: the interpreter itself, since the one on PATH may be that of the .venv to be replaced
    first=${PYTHON:-python3}
    set -- "$first"
    [ -n "${PYTHON:-}" ] || set -- python3 python3.11 python3.12 python3.13 python3.14
    for candidate; do
        if new_enough "$candidate"; then
            python=$("$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
            [ "$candidate" = "$first" ] || say "$first is too old: taking $candidate"
            return
        fi
    done
    version=$(version_of "$first")
    if ! command -v "$first" >/dev/null; then
        die "there is no $first here: install Python $oldest or newer, or name one: make setup PYTHON=/path/to/python"
    elif [ -z "$version" ]; then
        die "$first does not start: name another Python, $oldest or newer: make setup PYTHON=/path/to/python"
    fi
    die "$first is Python $version, and $oldest or newer is needed: install one, or name it: make setup PYTHON=/path/to/python"
}

remove_venv() { rm -rf "$venv" || die "could not remove $venv"; }

create_venv() {
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package=python$(version_of "$python")-venv
        case $python in /usr/bin/python3*) [ "$(version_of /usr/bin/python3)" != "$(version_of "$python")" ] || package=python3-venv ;; esac
        command -v apt-get >/dev/null || die "$python cannot make virtual environments (no venv or ensurepip): install its venv package"
        die "$python cannot make virtual environments: sudo apt-get install $package"
    fi
    expectation="takes a few minutes"
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        free_gb=$(df -Pk . | awk 'NR == 2 { for (i = 4; i <= NF; i++) if ($i ~ /%$/) printf "%.1f", $(i - 1) * 1024 / 1e9 }')
        awk "BEGIN { exit !(${free_gb:-999} >= $needed_gb) }" ||
            die "not enough disk space: $needed_gb GB is needed here while installing ($installed_gb GB afterwards) and $free_gb GB is free"
        of_total=" of about $needed_gb"
        expectation="downloads about $download_gb GB unless pip has it cached and takes $installed_gb GB of disk"
    fi
    say "making $venv with Python $(version_of "$python") ($python): $expectation"
    mkdir -p "$venv" && echo $$ >"$(lock)" && "$python" -m venv "$venv" || die "could not make $venv"
}

# ---- pip

pip_install() {
    started=$(date +%s)
    mkdir -p "$venv/tmp"
    # The downloads go beside what they are unpacked to: /tmp is often a few GB of memory.
    TMPDIR=$root/$venv/tmp "$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        "$@" </dev/null >"$(log)" 2>&1 &
    pip=$!
    trap stop_pip INT TERM HUP
    show_progress
    wait "$pip"
    status=$?
    trap - INT TERM HUP
    rm -rf "$venv/tmp"
    [ "$status" -eq 0 ] || explain_failure
    # All but what pip says of folders that its settings name and that are not there.
    grep -E '^(ERROR|WARNING|DEPRECATION)' "$(log)" | grep -v '^WARNING: Location .* is ignored' >&2
    rm -f "$(log)"
}

stop_pip() {
    kill "$pip"
    wait "$pip" 2>/dev/null
    die "interrupted: the next set-up starts afresh"
}

show_progress() { # a line that is written over at a terminal, one every half minute elsewhere
    interval=30 form='setup: %s GB written%s, %s\n'
    [ ! -t 1 ] || interval=3 form='\rsetup: %s GB written%s, %s   '
    shown=$started
    while kill -0 "$pip" 2>/dev/null; do
        sleep 1
        [ $(($(date +%s) - shown)) -ge "$interval" ] || continue
        shown=$(date +%s)
        # shellcheck disable=SC2059 # it is one of the two above
        printf "$form" "$(gb_written)" "$of_total" "$(elapsed)"
    done
    [ ! -t 1 ] || echo
}

gb_written() { du -sk "$venv" 2>/dev/null | awk '{ printf "%.1f", $1 * 1024 / 1e9 }'; }

elapsed() {
    seconds=$(($(date +%s) - started))
    echo "$((seconds / 60)) min $((seconds % 60)) s"
}

explain_failure() { # pip's own words run to pages, and name the last thing that it tried
    details="($(log) has what pip said)"
    if in_log 'No space left on device'; then
        die "no disk space left: $needed_gb GB is needed here while installing, and pip's cache takes $download_gb GB more $details"
    fi
    # pip undoes what it could not finish: an environment that worked is still what it was, so keep it.
    [ ! -f "$(stamp)" ] || [ "$status" -gt 2 ] || rm -f "$(lock)"
    if [ "$status" -gt 128 ]; then
        die "pip was killed by signal $((status - 128)) (out of memory?): run it again"
    elif in_log 'SSLCertVerificationError|CERTIFICATE_VERIFY_FAILED|confirming the ssl certificate'; then
        die "the package index's certificate is not trusted: PIP_CERT names the file with your proxy's $details"
    elif in_log 'Retry\(total=0|setuptools.*\(from versions: none\)' ||
        in_log '^ *(ERROR|pip.*Error|.*urllib3).*(Max retries|timed out|Timeout|IncompleteRead|Connection)'; then
        die "no network, or it broke off: pip cannot reach its package index $details"
    fi
    pin=$(sed -n -e 's/^ *The user requested (constraint) //p' -e 's/^ERROR: No matching distribution found for //p' "$(log)" | head -n 1)
    [ -z "$pin" ] || die "$pin does not fit pyproject.toml (then: make constraints) or Python $(version_of "$venv/bin/python") on $(uname -sm) $details"
    tail -n 40 "$(log)" >&2
    die "pip failed, see above $details"
}

in_log() { grep -qE "$1" "$(log)"; }

main "$@"
