#!/usr/bin/env bash
# Train or test on several GPUs of one machine, or of several: see usage below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/launch/torchrun.sh [options] {train|test} CONFIG [arguments of tools/train.py or tools/test.py]

options:
  --gpus N              processes on this machine (default: one for each visible GPU)
  --nodes N             machines (default: 1); start this script on each of them
  --node-rank I         number of this machine, from 0
  --master HOST[:PORT]  machine 0, as the others reach it (default port: 29500)

examples:
  bash tools/launch/torchrun.sh train seg_configs/upernet_vig_s.py --amp
  bash tools/launch/torchrun.sh --gpus 4 test det_configs/mask_rcnn_vig_s.py CHECKPOINT
  CUDA_VISIBLE_DEVICES=2,3 bash tools/launch/torchrun.sh train seg_configs/upernet_vig_s.py
  bash tools/launch/torchrun.sh --nodes 2 --node-rank 0 --master node0 train seg_configs/upernet_vig_b.py  # on node0
  bash tools/launch/torchrun.sh --nodes 2 --node-rank 1 --master node0 train seg_configs/upernet_vig_b.py  # on node1
TEXT
}

fail() {
    printf 'error: %s\n(--help shows how it is used)\n' "$1" >&2
    exit 2
}

check_number() { # NAME VALUE LEAST
    if ! [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
        fail "$1 $2: expected a whole number, at least $3"
    fi
}

gpus='' nodes=1 node_rank='' master=''
while (($#)); do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --gpus | --nodes | --node-rank | --master) (($# > 1)) || fail "$1 needs a value" ;;
        -*) fail "unknown option $1 in front of train or test" ;;
        *) break ;;
    esac
    case $1 in
        --gpus) check_number "$1" "$2" 1; gpus=$2 ;;
        --nodes) check_number "$1" "$2" 1; nodes=$2 ;;
        --node-rank) check_number "$1" "$2" 0; node_rank=$2 ;;
        --master) master=$2 ;;
    esac
    shift 2
done

case ${1-} in
    train | test) tool=$1; shift ;;
    *) fail "expected train or test, got '${1-}'" ;;
esac
(($#)) || fail "$tool needs a config"
command -v torchrun >/dev/null || fail 'there is no torchrun: activate the environment (. .venv/bin/activate)'

if [[ -z $gpus ]]; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    ((gpus)) || fail 'no GPU is visible; for processes on the CPU say how many: --gpus 2'
fi
if ((nodes == 1)); then
    [[ -z $node_rank$master ]] || fail '--node-rank and --master are for several machines: add --nodes N'
    where=(--standalone) # takes a free port
else
    [[ -n $node_rank && -n $master ]] || fail "--nodes $nodes needs --node-rank and --master"
    ((node_rank < nodes)) || fail "--node-rank $node_rank: $nodes machines are numbered from 0 to $((nodes - 1))"
    [[ $master == *:* ]] || master+=:29500
    where=(--nnodes "$nodes" --node_rank "$node_rank" --master_addr "${master%:*}" --master_port "${master##*:}")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # processes and data workers share the cores
tools=$(dirname "${BASH_SOURCE[0]}")/..
exec torchrun "${where[@]}" --nproc_per_node "$gpus" "$tools/$tool.py" "$@" --launcher pytorch
