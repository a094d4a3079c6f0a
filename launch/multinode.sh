#!/usr/bin/env bash
# Training on several machines without a scheduler, by torchrun. The same line on every machine; the first one named
# holds the rendezvous, and they find their ranks themselves:
#
#   launch/multinode.sh --nnodes 2 --endpoint node0:29500 model=gemma2b trainer.devices=8 run_dir=/shared/runs/mine
#
# or with ranks that you give, 0 on the machine of the endpoint:
#
#   launch/multinode.sh --nnodes 2 --endpoint node0:29500 --node-rank 1 model=gemma2b trainer.devices=8
#
# Each option may be an environment variable instead: NNODES, ENDPOINT, NODE_RANK. All machines have to see the run
# folder. torchrun ends with 1 whatever the program's own exit code was; start the same line again to go on.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

while (($#)); do
    case $1 in
        --nnodes | --endpoint | --node-rank) (($# > 1)) || fail "$1 needs a value" ;;&
        --nnodes) NNODES=$2 ;;
        --endpoint) ENDPOINT=$2 ;;
        --node-rank) NODE_RANK=$2 ;;
        --) shift && break ;;
        *) break ;;
    esac
    shift 2
done
[[ ${NNODES:-} =~ ^[1-9][0-9]*$ ]] || fail 'give --nnodes NUMBER, how many machines there are'
[[ ${ENDPOINT:-} =~ ^[^:]+:[0-9]+$ ]] || fail 'give --endpoint HOST:PORT, the first machine and a free port on it'
if [[ ! ${NODE_RANK:-0} =~ ^(0|[1-9][0-9]*)$ || ${NODE_RANK:-0} -ge $NNODES ]]; then
    fail "--node-rank $NODE_RANK: the machines are 0 to $((NNODES - 1))"
fi

given() { # given KEY WORD...: print the value of the last KEY=VALUE among the words
    local key=$1 value='' word
    shift
    for word; do
        word=${word#+}
        word=${word#+}
        if [[ $word == "$key="* ]]; then value=${word#*=}; fi
    done
    printf '%s' "$value"
}

devices=$(given trainer.devices "$@")
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail 'give trainer.devices=NUMBER, the GPUs of each machine'
nodes=$(given trainer.num_nodes "$@")
[[ ${nodes:-$NNODES} == "$NNODES" ]] || fail "trainer.num_nodes=$nodes, and --nnodes is $NNODES"
[[ -n $nodes ]] || set -- "trainer.num_nodes=$NNODES" "$@"

if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

meet=(--rdzv-backend=c10d "--rdzv-endpoint=$ENDPOINT" --rdzv-id=dpo_lightning)
if [[ -n ${NODE_RANK:-} ]]; then
    meet=("--node-rank=$NODE_RANK" "--master-addr=${ENDPOINT%:*}" "--master-port=${ENDPOINT#*:}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "--nnodes=$NNODES" "--nproc-per-node=$devices" "${meet[@]}" \
    -m dpo_lightning "$@"
