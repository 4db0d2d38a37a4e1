#!/usr/bin/env bash
# Begin a run, or resume it if it has begun: the same command is right the first time and after every failure.
#
#   train_or_resume.sh train /shared/runs/digits --preset digits --gpus-per-actor 1
#
# A resumed run keeps the settings it began with, so the flags count only the first time. RUN is a path on shared storage,
# not a URL: a new machine would have to take a run at a URL over.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: train_or_resume.sh train|finetune RUN [flags of fedray train or finetune]" >&2
    exit 2
fi
command=$1
run=$2
shift 2

if [[ $run == *://* ]]; then
    echo "$run is a URL; give a path on shared storage, or use fedray $command --resume $run --take-over" >&2
    exit 2
fi
if [ -e "$run/config.json" ]; then
    exec fedray "$command" --resume "$run"
fi
exec fedray "$command" --out "$run" "$@"
