# shellcheck shell=bash
# What the launchers share; they source it. DRY_RUN=1 in the environment, or --dry-run as the first argument, prints the
# commands that would be run, one a line, and runs none of them.

# run COMMAND…: runs it, or prints it.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# holds COMMAND…: whether a question to the outside is answered with success; in a dry run, with no.
holds() {
  [ "${DRY_RUN:-0}" != 1 ] && "$@" >/dev/null 2>&1
}

# words WORD…: the words quoted for another shell, in one line.
words() {
  printf '%q ' "$@" | sed 's/ $//'
}

# The command of a training that is started again as long as SIGTERM stopped it (exit code 75).
until_done() {
  echo "while :; do $1 && break; code=\$?; [ \$code = 75 ] || exit \$code; done"
}
