# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# The command line, by the table in the file commands beside this. Nothing that
# is wrong with it gets as far as packages, a download or a build. Needs
# common.sh, $SCRIPTS (this folder), and the arrays that the table names.

declare -A VALUE=() HELP=()
# names of commands, and COMMAND.OPTION, as the table has them
ORDER=()

# What was given: options by their names, words, and the options as a tool of
# ours takes them.
declare -A OPTION=()
WORDS=() PASS=()

wrong() {
    echo "error: $*; ./run help tells more" >&2
    exit 2
}

read_commands() {
    local name value text command='' option
    # without IFS's blanks, which "read" would drop, but for those around "|"
    while IFS='|' read -r name value text; do
        [[ $name =~ ^(#.*)?$ ]] && continue
        option=${name#"${name%%[! ]*}"}
        if [ "$option" = "$name" ]; then
            command=${name%% *} option=$command
        else
            option=$command.${option%% *}
        fi
        for name in SUITES HA_SUITES RANDOM_SUITES SANITIZE_SUITES SERIES_NAMES; do
            local -n words=$name
            text=${text//@$name@/${words[*]}}
        done
        ORDER+=("$option")
        VALUE[$option]=${value// /} HELP[$option]=${text# }
    done <"$SCRIPTS/commands"
    for command in "${ORDER[@]}"; do
        [[ $command == *.* || $command =~ ^(clean|fetch|help)$ ]] ||
            VALUE[$command.base]=TEXT
    done
}

# describe INDENT NAME TEXT: TEXT beside NAME, in lines that fit.
describe() {
    local line begin
    printf -v begin '%*s%-*s' "$1" '' $((22 - $1)) "$2"
    while IFS= read -r line; do
        printf '%s %s\n' "$begin" "$line"
        printf -v begin '%22s' ''
    done < <(fold -s -w 56 <<<"$3" | sed 's/ *$//')
}

# What a command takes, behind its name.
words_of() {
    local value=${VALUE[$1]}
    case $value in
        *\*) echo "[${value%\*}...]" ;;
        *) echo "$value" ;;
    esac
}

# A value of the table for people
shown() {
    sed 's/^!//; s/\.0\>//g; s/,/, /g' <<<"$1"
}

help() {
    local name
    echo "usage: ./run COMMAND [ARGUMENT...]"
    echo
    for name in "${ORDER[@]}"; do
        [[ $name == *.* ]] ||
            describe 2 "$name $(words_of "$name")" "${HELP[$name]}"
    done
    cat <<END

./run COMMAND --help tells the options of a command. Debian packages that are
missing are installed, with sudo if not as root.

  --base VERSION       with any of these but clean and fetch: with another QEMU
                       than $REFERENCE. There are: $(bases).

environment:
  QEMU_SRC             a QEMU source tree to use in place of Debian's; it is
                       copied, not changed
  QEMU_REPLICATION_CACHE
                       the folder for everything that is downloaded or built,
                       now ${CACHE:-not known, because HOME is not set}
END
}

help_of() {
    local name value text
    text="usage: ./run $1 [OPTION...] $(words_of "$1")"
    echo "${text% }"
    fold -s -w 76 <<<"${HELP[$1]}" | sed 's/ *$//'
    for name in "${ORDER[@]}"; do
        [[ $name == "$1".* ]] || continue
        value=$(shown "${VALUE[$name]}") text=${HELP[$name]}
        if [[ $value == *,* ]]; then
            text+=": ${value%...}" value=''
        fi
        describe 2 "--${name#*.} $value" "$text"
    done
}

# check_range NAME RANGE NUMBER
check_range() {
    local low=${2%..*} high=${2#*..} digits='[0-9]+'
    [[ $low != *.* ]] || digits='[0-9]+(\.[0-9]+)?'
    { [[ $3 =~ ^$digits$ ]] && [ ${#3} -lt 16 ] &&
          awk "BEGIN { exit !($low <= $3 && $3 <= $high) }"; } ||
        wrong "$1 wants a number from $(shown "$low to $high"), not '$3'"
}

# Whatever is to be written must be possible; $2 is FILE or DIR.
check_output() {
    local path above
    [ -n "$3" ] || wrong "$1 wants a $2, not nothing"
    path=$(readlink -m -- "$3")
    case $2 in
        FILE) [ ! -d "$path" ] || wrong "$1 $path is a folder" ;;
        DIR) [ ! -e "$path" ] || [ -d "$path" ] ||
                 wrong "$1 $path is not a folder" ;;
    esac
    above=$(existing "$path")
    rmdir "$(mktemp -d -p "$above" 2>/dev/null)" 2>/dev/null ||
        wrong "$1 $path: cannot write to $above"
}

check_value() {
    local kind=${2%...}
    case ${kind#!} in
        *..*) check_range "$1" "${kind#!}" "$3" ;;
        *,*)
            [[ ,$kind, == *,"$3",* ]] ||
                wrong "$1 wants one of ${kind//,/, }, not '$3'" ;;
        FILE|DIR) check_output "$1" "${kind#!}" "$3" ;;
    esac
}

# The name in the table of an option that may be a letter.
long_name() {
    case $1 in
        -o) echo --output ;;
        -s) echo --signoff ;;
        *) echo "$1" ;;
    esac
}

# parse COMMAND ARGUMENT...: set OPTION, WORDS and PASS, or end.
parse() {
    local command=$1 argument option kind
    shift
    [[ $command != *.* && -n ${HELP[$command]:-} ]] ||
        wrong "no command is called $command"
    while [ $# -gt 0 ]; do
        argument=$(long_name "$1")
        shift
        case $argument in
            --help|-h) help_of "$command"; exit ;;
            --) WORDS+=("$@"); break ;;
            -?*) ;;
            *) WORDS+=("$argument"); continue ;;
        esac
        option=${argument%%=*}
        kind=${VALUE[$command.${option#--}]-none}
        [ "$kind" != none ] || wrong "$command has no option $option"
        if [ -z "$kind" ]; then
            [ "$option" = "$argument" ] || wrong "$option takes no value"
            OPTION[${option#--}]=yes
            PASS+=("$option")
            continue
        fi
        if [ "$option" = "$argument" ]; then
            [ $# -gt 0 ] || wrong "$option wants a value"
            argument=$option=$1
            shift
        fi
        check_value "$option" "$kind" "${argument#*=}"
        OPTION[${option#--}]=${argument#*=}
        [ "$option" != --base ] || continue
        if [[ $kind != *... ]]; then
            PASS+=("$argument")
            continue
        fi
        PASS+=("$option" "${argument#*=}")
        while [ $# -gt 0 ] && [[ $1 != -* ]]; do
            check_value "$option" "$kind" "$1"
            PASS+=("$1")
            shift
        done
    done
    check_words "$command"
}

check_words() {
    local name kind=${VALUE[$1]} count=${#WORDS[@]}
    case $kind in
        '') [ "$count" = 0 ] || wrong "$1 takes no ${WORDS[0]}" ;;
        *...) [ "$count" -gt 0 ] || wrong "$1 wants ${kind%...}" ;;
        *\*) ;;
        *) [ "$count" = 1 ] || wrong "$1 wants one $kind" ;;
    esac
    for name in "${!VALUE[@]}"; do
        [[ $name != "$1".* || ${VALUE[$name]} != !* ||
               -n ${OPTION[${name#*.}]:-} ]] ||
            wrong "$1 wants --${name#*.} $(shown "${VALUE[$name]}")"
    done
}

# one_of WHAT WORD NAME...: refuse a word that is none of the names.
one_of() {
    local name
    for name in "${@:3}"; do
        [ "$2" != "$name" ] || return 0
    done
    wrong "no $1 is called $2; there are: ${*:3}"
}
