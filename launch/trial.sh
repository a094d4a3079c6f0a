#!/usr/bin/env bash
# One trial of a W&B sweep: what `wandb agent` starts, with the trial's keys as arguments. In a SLURM job it is
# launch/train.sbatch, ranks and all; elsewhere a run on this machine.
set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
if [[ -z ${DPO_LIGHTNING_TRIAL:-} ]]; then
    if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
    exec "${PYTHON:-python}" -m dpo_lightning "$@"
fi

# launch/sweep.sbatch goes on with this trial when its job is started again: the agent would begin another one.
words=("WANDB_SWEEP_ID=$WANDB_SWEEP_ID" "WANDB_RUN_ID=$WANDB_RUN_ID" bash "$launch/train.sbatch" "$@")
printf '%s\0' "${words[@]}" >"$DPO_LIGHTNING_TRIAL.new"
mv "$DPO_LIGHTNING_TRIAL.new" "$DPO_LIGHTNING_TRIAL"

# The sweep stops a trial early by SIGTERM to this process. It goes to the ranks through scancel: srun, if it got
# the signal, would kill them on the spot. When SLURM itself ends the job, to start it again too, everybody gets
# SIGTERM, and the job runs no more: scancel would try until it does, and so stop it after its next start.
# shellcheck disable=SC2317 # the trap calls it
stop() {
    if [[ $(squeue --noheader --jobs="$DPO_LIGHTNING_JOB" --format=%T) == RUNNING ]]; then
        scancel --signal=TERM "$DPO_LIGHTNING_JOB" || true
    fi
}
trap stop TERM
env "${words[@]}" &
child=$!
code=0
until
    wait "$child"
    code=$?
    ! kill -0 "$child" 2>/dev/null # wait has returned because of the signal: once more
do :; done
printf '%s' "$code" >"$DPO_LIGHTNING_TRIAL.code"
exit "$code"
