#!/usr/bin/env bash
# A training run on a Cloud TPU VM slice, from creating it to deleting it.
#
#   launch/tpu.sh VERB SETTINGS [--yes] [--dry-run]
#
#   create   asks for the slice, and waits until it is ready
#   setup    copies the checkout to its hosts and installs it there
#   start    starts COMMAND on all hosts; they go on by themselves
#   follow   shows the log of the first host; ends with the run's exit code
#   status   the state of the slice and of the run on each host
#   stop     asks the run to save and to end
#   watch    all of this by itself, until the run is complete: sets up, starts,
#            and brings back a slice that was taken away
#   delete   deletes the slice
#
# SETTINGS is a file like launch/settings.example.env. --dry-run prints the
# gcloud commands that would be run. What cannot be undone is told first and
# needs a `y` or --yes.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly HERE
# shellcheck source=launch/slice.sh
source "${HERE}/slice.sh"
readonly HOST_SOURCE=dpop_jax/source
readonly HOST_SCRIPT="${HOST_SOURCE}/launch/host.sh"
# Exit codes of runs that were interrupted, and do not fail by themselves: lost
# another process (75; 134 if JAX noticed first), killed, asked to stop.
readonly INTERRUPTED=" 75 134 137 143 "
# Runs that are interrupted sooner are restarted more and more slowly.
readonly GOOD_RUN_SECONDS=600 MAX_PAUSE_SECONDS=600

is_confirmed=no
is_dry_run=no
settings=""

main() {
  local verb="" argument
  for argument in "$@"; do
    case "${argument}" in
      --yes) is_confirmed=yes ;;
      --dry-run) is_dry_run=yes ;;
      -h | --help) usage && exit ;;
      -*) die "There is no option ${argument}, only --yes and --dry-run." ;;
      *)
        if [[ -z "${verb}" ]]; then
          verb="${argument}"
        elif [[ -z "${settings}" ]]; then
          settings="${argument}"
        else
          die "Expected a verb and a settings file, got ${argument} as well."
        fi
        ;;
    esac
  done
  case "${verb}" in
    create | setup | start | follow | status | stop | watch | delete) ;;
    "") usage >&2 && exit 1 ;;
    *) die "There is no verb ${verb}; see launch/tpu.sh --help." ;;
  esac
  read_settings "${settings}"
  [[ "${is_dry_run}" == yes ]] || command -v gcloud > /dev/null \
    || die "There is no gcloud here: https://cloud.google.com/sdk/docs/install"
  "verb_${verb}"
}

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

read_settings() {
  local name
  [[ -n "$1" ]] \
    || die "Name a settings file as well, like launch/settings.example.env."
  [[ -f "$1" ]] || die "There is no settings file $1."
  CREATE_FLAGS=() SSH_FLAGS=() COMMAND=()
  NUM_SLICES=1 QUEUED=yes CAPACITY=on-demand PYTHON=3.11 EXTRAS=tpu,gcs
  STOP_SECONDS=600 POLL_SECONDS=30 MAX_RESTARTS=100
  # A name without a slash would be looked for in PATH.
  [[ "$1" == */* ]] || set -- "./$1"
  # shellcheck disable=SC1090 # The user's.
  source "$1"
  for name in PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION; do
    [[ -n "${!name:-}" ]] || die "$1 should set ${name}."
  done
  [[ "${#COMMAND[@]}" -gt 0 ]] \
    || die "$1 should set COMMAND, as COMMAND=(python -m ...)."
  # shellcheck disable=SC2153 # It is not `name`.
  [[ "${NAME}" =~ ^[a-z][-a-z0-9]{0,60}$ ]] \
    || die "NAME must be of small letters, digits and -, got ${NAME}."
  [[ "${CAPACITY}" =~ ^(on-demand|spot|reserved)$ ]] \
    || die "CAPACITY must be on-demand, spot or reserved, got ${CAPACITY}."
  [[ "${QUEUED}" =~ ^(yes|no)$ ]] \
    || die "QUEUED must be yes or no, got ${QUEUED}."
  for name in NUM_SLICES STOP_SECONDS POLL_SECONDS MAX_RESTARTS; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] \
      || die "${name} must be a positive whole number, got ${!name}."
  done
  [[ "${NUM_SLICES}" == 1 || "${QUEUED}" == yes ]] \
    || die "NUM_SLICES=${NUM_SLICES} needs QUEUED=yes."
  WHERE=("--project=${PROJECT}" "--zone=${ZONE}")
}

# --- verbs -------------------------------------------------------------------

verb_create() {
  local state
  state="$(slice_state none)" || exit
  [[ "${state}" == none ]] || die "${NAME} exists already in ${PROJECT}," \
    "${ZONE} (${state}); use it, delete it or choose another NAME."
  create
  wait_until_ready
}

verb_setup() {
  need_ready
  install
}

verb_start() {
  need_ready
  start
}

verb_follow() {
  need_ready
  on_hosts 0 "$(host_command follow)"
}

verb_status() {
  local state
  state="$(slice_state ready)" || exit
  echo "${NAME} in ${PROJECT}, ${ZONE}: ${state}"
  [[ "${state}" != ready ]] || run_status --log
}

verb_stop() {
  need_ready
  confirm "Stop the run on ${NAME} (${PROJECT}, ${ZONE})? It is asked to save" \
    "and to end, and killed if it has not ended after ${STOP_SECONDS} s."
  on_hosts all "$(host_command stop "${STOP_SECONDS}" stopped)"
}

verb_delete() {
  local state
  state="$(slice_state ready)" || exit
  [[ "${state}" != none ]] \
    || die "There is no ${NAME} in ${PROJECT}, ${ZONE}."
  check_is_ours
  confirm "Delete $(what) with all that is on the disks of its hosts?"
  delete
}

verb_watch() {
  local state runs summary restarts=0 pause="${POLL_SECONDS}" started=""
  confirm "Watch $(what)? Until its run is complete, it is created if it is" \
    "not there, and DELETED and created again if it was taken away. At the" \
    "end it is left as it is."
  if [[ "${is_dry_run}" == yes ]]; then
    echo "# if the slice was taken away:"
    delete
    echo "# if there is none:"
    create
    echo "# if nothing runs on it:"
    install
    start
    echo "# every ${POLL_SECONDS} s:"
    run_status
    return
  fi
  while true; do
    if ! state="$(slice_state)"; then
      pause_or_give_up "Asking for the state of ${NAME}"
      continue
    fi
    case "${state}" in
      waiting) sleep "${POLL_SECONDS}" && continue ;;
      gone)
        tell "${NAME} was taken away."
        "${BASH_SOURCE[0]}" delete "${settings}" --yes \
          || pause_or_give_up "Deleting what is left of ${NAME}"
        continue
        ;;
      none)
        "${BASH_SOURCE[0]}" create "${settings}" \
          || pause_or_give_up "Creating ${NAME}"
        continue
        ;;
    esac
    if ! runs="$(run_status)"; then
      # Perhaps hosts are about to go, and the next state says so.
      pause_or_give_up "Asking the hosts of ${NAME}"
      continue
    fi
    summary="$(summary "${runs}")"
    case "${summary}" in
      running) ;;
      complete)
        tell "The run is complete. Still there, and paid for: $(what)."
        return
        ;;
      stopped)
        tell "The run was stopped by launch/tpu.sh; \`start\` continues it."
        return
        ;;
      failed*)
        run_status --log || true
        die "The run failed by itself (exit code ${summary#failed });" \
          "above is how the logs of its hosts end."
        ;;
      *)
        if [[ -n "${started}" ]]; then
          if ((SECONDS - started > GOOD_RUN_SECONDS)); then
            pause="${POLL_SECONDS}"
          fi
          started=""
          # It may have been interrupted because the slice is about to go.
          pause_or_give_up "The run"
          continue
        fi
        # What is left of it waits for what is gone.
        if on_hosts all \
          "$(unless_bare) $(host_command stop 60 interrupted)" \
          && "${BASH_SOURCE[0]}" setup "${settings}" \
          && "${BASH_SOURCE[0]}" start "${settings}"; then
          started="${SECONDS}"
        else
          pause_or_give_up "Starting the run"
        fi
        ;;
    esac
    sleep "${POLL_SECONDS}"
  done
}

# Waits, longer each time, and gives up when that has happened too often. The
# `restarts` and `pause` of verb_watch.
pause_or_give_up() {
  restarts=$((restarts + 1))
  ((restarts <= MAX_RESTARTS)) \
    || die "$1 did not succeed, and was tried again MAX_RESTARTS" \
      "(${MAX_RESTARTS}) times in all."
  tell "$1 was interrupted or failed; next attempt in ${pause} s" \
    "(${restarts} of at most ${MAX_RESTARTS})."
  sleep "${pause}"
  pause=$((pause * 2 < MAX_PAUSE_SECONDS ? pause * 2 : MAX_PAUSE_SECONDS))
}

# --- the run on the hosts -----------------------------------------------------

# Copies the files that git knows or could know, as they are now, and installs.
install() {
  local folder
  folder="$(mktemp -d)"
  # shellcheck disable=SC2064 # The folder of now is meant.
  trap "rm -rf '${folder}'" EXIT
  (
    cd "${HERE}/.."
    git ls-files -z --cached --others --exclude-standard --deduplicate \
      | while IFS= read -r -d '' file; do
        # Not those that were deleted and are not committed yet.
        [[ ! -e "${file}" ]] || printf '%s\0' "${file}"
      done | tar -czf "${folder}/source.tar.gz" --null -T -
  )
  copy_to_hosts "${folder}/source.tar.gz" dpop_jax.tar.gz
  on_hosts all "{ $(unless_bare) $(host_command check_idle); } &&\
 rm -rf ${HOST_SOURCE} && mkdir -p ${HOST_SOURCE} &&\
 tar -xzf dpop_jax.tar.gz -C ${HOST_SOURCE} &&\
 $(host_command setup "${PYTHON}" "${EXTRAS}")"
}

start() {
  on_hosts all "$(host_command start "${COMMAND[@]}")"
}

run_status() {
  on_hosts all "if [ -e ${HOST_SCRIPT} ]; then $(host_command status "$@");\
 else echo status: \$(hostname) idle; fi"
}

# The beginning of a command that does nothing on a host not set up yet.
unless_bare() {
  echo "[ ! -e ${HOST_SCRIPT} ] ||"
}

host_command() {
  quoted bash "${HOST_SCRIPT}" "$@"
}

# What the lines of `host.sh status` come to: running, complete, stopped,
# `failed CODE`, interrupted or idle.
summary() {
  local line state code total=0 idle=0 complete=0 running=0
  while IFS= read -r line; do
    [[ "${line}" == status:* ]] || continue
    state="$(cut -d " " -f 3- <<< "${line}")"
    total=$((total + 1))
    case "${state}" in
      idle) idle=$((idle + 1)) ;;
      running) running=$((running + 1)) ;;
      "ended 0") complete=$((complete + 1)) ;;
      stopped) echo stopped && return ;;
      ended\ *)
        code="${state#ended }"
        if [[ "${INTERRUPTED}" != *" ${code} "* ]]; then
          echo "failed ${code}" && return
        fi
        ;;
    esac
  done <<< "$1"
  if ((running > 0)); then
    echo running
  elif ((total > 0 && complete == total)); then
    echo complete
  elif ((idle == total)); then
    echo idle
  else
    echo interrupted
  fi
}

# --- talking ------------------------------------------------------------------

confirm() {
  local answer
  [[ "${is_dry_run}" == no && "${is_confirmed}" == no ]] || return 0
  [[ -t 0 ]] || die "Not confirmed: $* Say --yes."
  read -r -p "$* [y/N] " answer
  [[ "${answer}" == y ]] || die "Not confirmed."
}

tell() {
  echo "$*" >&2
}

die() {
  echo "Error: $*" >&2
  exit 1
}

main "$@"
