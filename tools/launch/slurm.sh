#!/usr/bin/env bash
#SBATCH --job-name=vig
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Train or test under Slurm, one process per GPU: see usage below. Options given to sbatch go before those above.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch [options of sbatch] tools/launch/slurm.sh {train|test} CONFIG [arguments of tools/train.py or tools/test.py]

Submit it from the repository, with its environment active. In an allocation of salloc, bash takes the place of sbatch.

examples:
  sbatch tools/launch/slurm.sh train seg_configs/upernet_vig_s.py --amp                           # 8 GPUs of a machine
  sbatch --nodes 2 --time 2-0 tools/launch/slurm.sh train det_configs/mask_rcnn_vig_b.py --amp    # 16 GPUs
  sbatch --gpus-per-node 2 --ntasks-per-node 2 tools/launch/slurm.sh test seg_configs/upernet_vig_s.py CHECKPOINT

A job that is preempted, or that has 120 seconds left, goes back into the queue. When it starts again, it goes on from
the last whole checkpoint in its work dir.
TEXT
}

fail() {
    printf 'error: %s\n(--help shows how it is used)\n' "$1" >&2
    exit 2
}

case ${1-} in
    -h | --help) usage; exit 0 ;;
    train | test) tool=$1; shift ;;
    *) fail "expected train or test, got '${1-}'" ;;
esac
(($#)) || fail "$tool needs a config"
[[ -n ${SLURM_JOB_ID-} ]] || fail 'this is not a Slurm job: start it with sbatch, or in an allocation of salloc'
gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-none}
[[ $gpus != 0 ]] || fail 'the job has no GPU: ask for some with --gpus-per-node'
[[ $tasks == "$gpus" ]] || fail "one process per GPU: with --gpus-per-node $gpus, --ntasks-per-node is $gpus, not $tasks"
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f tools/$tool.py ]] || fail "there is no tools/$tool.py in $PWD: submit the job from the repository"

if [[ -z ${MASTER_ADDR-} ]]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR="${hosts%%$'\n'*}"
fi
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" # two jobs on one machine need two
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                         # processes and data workers share the cores
if [[ -n ${SLURM_CPUS_PER_TASK-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over
fi

if [[ $tool == train ]] && ((${SLURM_RESTART_COUNT:-0})); then
    set -- "$@" --resume
fi
trap 'scontrol requeue "$SLURM_JOB_ID" || echo "Slurm refuses: submit it again, with --resume" >&2' USR1

# Each process sees all GPUs of its machine and takes the one with its number.
srun --gpu-bind=none --kill-on-bad-exit=1 python "tools/$tool.py" "$@" --launcher slurm &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the waiting, not the step
    status=0
    wait "$step" || status=$?
done
exit "$status"
