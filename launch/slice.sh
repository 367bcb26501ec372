# shellcheck shell=bash disable=SC2154
# The slice that the settings describe, by gcloud; a part of launch/tpu.sh.
# Uses its settings, `is_dry_run`, `tell` and `die`.

# Slices without this label are left alone.
readonly LABEL_KEY=created-by LABEL_VALUE=dpop-jax-launch

create() {
  local flags=("${WHERE[@]}" "--accelerator-type=${ACCELERATOR_TYPE}")
  flags+=("--labels=${LABEL_KEY}=${LABEL_VALUE}")
  flags+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})
  [[ "${CAPACITY}" == on-demand ]] || flags+=("--${CAPACITY}")
  tell "Creating $(what)."
  if [[ "${QUEUED}" == no ]]; then
    gcloud_ tpu-vm create "${NAME}" "${flags[@]}" \
      "--version=${RUNTIME_VERSION}"
  elif [[ "${NUM_SLICES}" == 1 ]]; then
    gcloud_ queued-resources create "${NAME}" "${flags[@]}" \
      "--runtime-version=${RUNTIME_VERSION}" "--node-id=${NAME}"
  else
    gcloud_ queued-resources create "${NAME}" "${flags[@]}" \
      "--runtime-version=${RUNTIME_VERSION}" "--node-count=${NUM_SLICES}" \
      "--node-prefix=${NAME}"
  fi
}

delete() {
  if [[ "${QUEUED}" == no ]]; then
    gcloud_ tpu-vm delete "${NAME}" "${WHERE[@]}" --quiet
  else
    gcloud_ queued-resources delete "${NAME}" "${WHERE[@]}" --force --quiet
  fi
}

# What `create` makes, in words.
what() {
  local kind="TPU VM slice" count=""
  [[ "${QUEUED}" == no ]] || kind="queued resource"
  [[ "${NUM_SLICES}" == 1 ]] || count=" of ${NUM_SLICES} slices"
  echo "the ${kind} ${NAME}${count} (${CAPACITY} ${ACCELERATOR_TYPE}," \
    "${PROJECT}, ${ZONE})"
}

# slice_state [ASSUMED]: none, waiting, ready, or gone, which is what there is
# to be deleted of one that was taken away. ASSUMED in a dry run.
slice_state() {
  local state node
  if [[ "${is_dry_run}" == yes ]]; then
    echo "$1"
    return
  fi
  if [[ "${QUEUED}" == yes ]]; then
    state="$(describe queued-resources "${NAME}" state.state)" || return
    # https://cloud.google.com/tpu/docs/queued-resources
    case "${state}" in
      ACTIVE) ;;
      none) echo none && return ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) ;&
      SUSPENDING | DELETING) echo waiting && return ;;
      FAILED | SUSPENDED) echo gone && return ;;
      *) die "The queued resource ${NAME} is in the state ${state}." ;;
    esac
  fi
  for node in $(nodes); do
    state="$(describe tpu-vm "${node}" state)" || return
    case "${state}" in
      READY) ;;
      PREEMPTED | TERMINATED) echo gone && return ;;
      none)
        # A queued resource that has lost its node has nothing else.
        [[ "${QUEUED}" == yes ]] && echo gone || echo none
        return
        ;;
      CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | DELETING) ;&
      HIDING | HIDDEN | UNHIDING) echo waiting && return ;;
      # Of what somebody else has done nothing is deleted.
      *) die "The TPU VM ${node} is in the state ${state}." ;;
    esac
  done
  echo ready
}

nodes() {
  local i
  if [[ "${NUM_SLICES}" == 1 ]]; then
    echo "${NAME}"
    return
  fi
  for ((i = 0; i < NUM_SLICES; i++)); do
    echo "${NAME}-${i}"
  done
}

# describe KIND NAME FIELD: its value, or `none` if there is no such thing.
describe() {
  local output
  if output="$(gcloud compute tpus "$1" describe "$2" "${WHERE[@]}" \
    "--format=value($3)" 2>&1)"; then
    # Warnings, if any, come first.
    tail -n 1 <<< "${output}"
  elif grep -qiE 'not[_ ]?found' <<< "${output}"; then
    echo none
  else
    die "gcloud compute tpus $1 describe $2 failed: ${output}"
  fi
}

check_is_ours() {
  local label
  [[ "${is_dry_run}" == no ]] || return 0
  if [[ "${QUEUED}" == yes ]]; then
    label="$(describe queued-resources "${NAME}" \
      "tpu.nodeSpec[0].node.labels.${LABEL_KEY}")" || exit
  else
    label="$(describe tpu-vm "${NAME}" "labels.${LABEL_KEY}")" || exit
  fi
  [[ "${label}" == "${LABEL_VALUE}" ]] \
    || die "${NAME} does not have the label ${LABEL_KEY}=${LABEL_VALUE} that" \
      "\`create\` gives, so it is not deleted here; gcloud can."
}

wait_until_ready() {
  local state
  [[ "${is_dry_run}" == no ]] || return 0
  state="$(slice_state)" || exit
  while [[ "${state}" == waiting ]]; do
    sleep "${POLL_SECONDS}"
    state="$(slice_state)" || exit
  done
  [[ "${state}" == ready ]] || die "${NAME} could not be had (${state})."
  tell "${NAME} is ready."
}

need_ready() {
  local state
  state="$(slice_state ready)" || exit
  [[ "${state}" == ready ]] || die "${NAME} in ${PROJECT}, ${ZONE} is not" \
    "ready (${state}); see launch/tpu.sh create and watch."
}

# on_hosts 0|all COMMAND: runs it by ssh on the first host or on all.
on_hosts() {
  local flags=("${WHERE[@]}" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"})
  if [[ "${NUM_SLICES}" == 1 ]]; then
    gcloud_ tpu-vm ssh "${NAME}" "${flags[@]}" "--worker=$1" "--command=$2"
  else
    gcloud_ queued-resources ssh "${NAME}" "${flags[@]}" "--node=$1" \
      "--worker=$1" "--command=$2"
  fi
}

copy_to_hosts() {
  local flags=("${WHERE[@]}" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"})
  if [[ "${NUM_SLICES}" == 1 ]]; then
    gcloud_ tpu-vm scp "$1" "${NAME}:$2" "${flags[@]}" --worker=all
  else
    gcloud_ queued-resources scp "$1" "${NAME}:$2" "${flags[@]}" --node=all \
      --worker=all
  fi
}

gcloud_() {
  if [[ "${is_dry_run}" == yes ]]; then
    quoted gcloud compute tpus "$@"
  else
    gcloud compute tpus "$@"
  fi
}

# The words as one would type them.
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ ! "${word}" =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    words+=("${word}")
  done
  echo "${words[*]}"
}
