#!/usr/bin/env bash
# What launch/tpu.sh runs on each host of a slice. It lies there, with the rest
# of the checkout, in ~/dpop_jax/source; beside it are
#
#   venv/   Python and the package      installed  what venv/ was made of
#   log     output of all runs          lock       held as long as a run lives
#   pid     of the run, and its group   result     how the last one ended
#
# A run that ended by itself leaves `ended` and its exit code in `result`, one
# that was made to leaves the word it was stopped with, and one that vanished
# with its host leaves nothing.
set -euo pipefail

readonly ROOT="${HOME}/dpop_jax"
readonly SOURCE="${ROOT}/source"

main() {
  local verb="${1:-}"
  [[ "$#" -eq 0 ]] || shift
  case "${verb}" in
    check_idle | setup | start | run | status | follow | stop) "${verb}" "$@" ;;
    *) die "launch/tpu.sh is the command to use; this is a part of it." ;;
  esac
}

check_idle() {
  ! is_running || die "A run is under way here; stop it first."
}

# setup PYTHON EXTRAS: makes venv/, unless it is there and of this source.
setup() {
  local python="$1" extras="$2" wanted
  check_idle
  # The package is installed editable, so only these can call for another venv.
  wanted="$(cat "${SOURCE}/setup.py" "${SOURCE}/constraints.txt" \
    <(echo "${python} ${extras}") | sha256sum)"
  if [[ "$(cat "${ROOT}/installed" 2> /dev/null)" == "${wanted}" ]]; then
    echo "$(hostname): set up already"
    return
  fi
  export PATH="${HOME}/.local/bin:${PATH}"
  # The images of TPU VMs come with an older Python; uv brings its own.
  command -v uv > /dev/null || python3 -m pip install --quiet --user uv
  rm -rf "${ROOT}/venv"
  uv venv --quiet --python "${python}" "${ROOT}/venv"
  uv pip install --quiet --python "${ROOT}/venv/bin/python" \
    --constraint "${SOURCE}/constraints.txt" --editable "${SOURCE}[${extras}]"
  echo "${wanted}" > "${ROOT}/installed"
  echo "$(hostname): set up"
}

# start WORD...: runs a command here, and does not wait for it.
start() {
  [[ -e "${ROOT}/installed" ]] || die "This host is not set up."
  # The run inherits the lock, so that it ends with it whatever happens.
  exec 9> "${ROOT}/lock"
  flock --wait 2 9 || die "A run is under way here already."
  rm -f "${ROOT}/result" "${ROOT}/pid"
  # A session of its own outlives the one of ssh.
  setsid --fork bash "${BASH_SOURCE[0]}" run "$@" \
    < /dev/null >> "${ROOT}/log" 2>&1
  echo "$(hostname): started"
}

run() {
  local code=0
  export PATH="${ROOT}/venv/bin:${PATH}" PYTHONUNBUFFERED=1
  cd "${SOURCE}"
  echo "== $(date -u '+%F %T') $*"
  # What asks the run to stop may reach this shell as well, which has to stay.
  trap '' TERM HUP
  (trap - TERM HUP && exec "$@") &
  echo "$! $$" > "${ROOT}/pid"
  wait "$!" || code=$?
  echo "== $(date -u '+%F %T') exit code ${code}"
  [[ -e "${ROOT}/result" ]] || write_result "ended ${code}"
}

# One line: the host's name, a word and, behind `ended`, the exit code.
status() {
  local state=idle
  if is_running; then
    state=running
  elif [[ -e "${ROOT}/result" ]]; then
    state="$(cat "${ROOT}/result")"
  elif [[ -e "${ROOT}/pid" ]]; then
    state=vanished
  fi
  echo "status: $(hostname) ${state}"
  if [[ "${1:-}" == "--log" ]]; then
    tail -n 20 "${ROOT}/log" 2> /dev/null | sed "s/^/  $(hostname)  /"
  fi
}

# Shows the log until the run ends; the exit code is the run's.
follow() {
  local tail_pid state
  [[ -e "${ROOT}/log" ]] || die "Nothing was started here."
  tail -n 100 -F "${ROOT}/log" 2> /dev/null &
  tail_pid="$!"
  trap 'kill "${tail_pid}"' EXIT
  while is_running; do
    sleep 1
  done
  # tail looks once a second.
  sleep 1.5
  state="$(cat "${ROOT}/result" 2> /dev/null || echo vanished)"
  case "${state}" in
    ended*) exit "${state#ended }" ;;
    vanished) die "The run vanished with its host." ;;
    *) exit 143 ;;
  esac
}

# stop SECONDS RESULT: asks the run to save and to end, and kills it if that
# takes longer.
stop() {
  local seconds="$1" result="$2" pid group
  if ! is_running; then
    echo "$(hostname): nothing is running"
    return
  fi
  read -r pid group < "${ROOT}/pid"
  write_result "${result}"
  kill -TERM "${pid}" 2> /dev/null || true
  for ((i = 0; i < seconds * 2; i++)); do
    if ! is_running; then
      echo "$(hostname): stopped"
      return
    fi
    sleep 0.5
  done
  # `run` began a group that everything the run has started is in.
  kill -KILL -- "-${group}" || true
  echo "$(hostname): killed, as it had not ended after ${seconds} s"
}

is_running() {
  # Shared, so that several may ask at once.
  ! flock --shared --nonblock "${ROOT}/lock" true
}

write_result() {
  echo "$1" > "${ROOT}/result.new"
  mv "${ROOT}/result.new" "${ROOT}/result"
}

die() {
  echo "Error: $(hostname): $*" >&2
  exit 1
}

main "$@"
