# shellcheck shell=bash
# Functions that the launchers source. DRY_RUN=1 in the environment, or --dry-run as the first argument, prints the
# commands, one a line, without running them.

# run COMMAND…: runs the command, or prints it.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# holds COMMAND…: whether a query command succeeds; false in a dry run, which runs nothing.
holds() {
  [ "${DRY_RUN:-0}" != 1 ] && "$@" >/dev/null 2>&1
}

# words WORD…: the words on one line, quoted for another shell, whichever it is (bash's own %q is not for dash).
words() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# file NAME: its absolute path; fails with a message if there is no such file.
file() {
  [ -f "$1" ] || { echo "no such file: $1" >&2; return 1; }
  realpath -- "$1"
}

# until_done COMMAND: a loop that restarts the training for as long as SIGTERM stops it (exit code 75).
until_done() {
  echo "while :; do $1 && break; code=\$?; [ \$code = 75 ] || exit \$code; done"
}
