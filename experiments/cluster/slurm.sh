#!/usr/bin/env bash
#SBATCH --job-name=fedray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=2
#SBATCH --time=12:00:00
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#
# A run on a Slurm allocation. Not run on Slurm, but on one node.
# From the top of the repository, which lies with .venv and the run on storage that all nodes see:
#
#   .venv/bin/ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token     # once
#   sbatch experiments/cluster/slurm.sh train /shared/runs/digits --preset digits --gpus-per-actor 1
#
# --exclusive: Ray's ports are fixed, and `ray stop` at the end of the job stops every Ray of yours on the node.
# --requeue: after a lost node or a preemption Slurm starts the job again, and the run resumes. Not after --time:
# then repeat the sbatch command.
set -euo pipefail
run=${2:?usage: sbatch experiments/cluster/slurm.sh train|finetune RUN [flags of fedray train or finetune]}

export PATH="$PWD/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_killing_policy_by_group=true # where memory is full: client actors go before the run's driver
export MALLOC_ARENA_MAX=1 # actors keep the memory that they free for the next vector (fedray/memory.py)
export RAY_AUTH_MODE=token # without it Ray takes commands from anyone on the network
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -r "$RAY_AUTH_TOKEN_PATH" ]; then
    echo "there is no token at $RAY_AUTH_TOKEN_PATH: run \`ray get-auth-token --generate\` first" >&2
    exit 1
fi
# Seconds to wait for all nodes. The default of 30 is short for a cold file system.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# By number: a node may know its own name as 127.0.1.1, which other nodes cannot reach.
read -r head_ip _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname -I)

# The address is given by the environment, so that the command is the same for a run and a resumed run.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$head_ip:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    -- env RAY_ADDRESS="$head_ip:6379" bash experiments/cluster/train_or_resume.sh "$@"

# symmetric-run also exits with 0 when it could not start Ray.
if [ ! -e "$run/result.json" ]; then
    echo "the run in $run did not finish" >&2
    exit 1
fi
