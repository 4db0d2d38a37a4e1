#!/usr/bin/env bash
# Begin a run, or resume it if it has begun: the same command is right the first time and after every failure.
#
#   train_or_resume.sh train /shared/runs/digits --preset digits --gpus-per-actor 1
#
# A resumed run keeps the settings it began with, so the flags count only the first time.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: train_or_resume.sh train|finetune RUN [flags of fedray train or finetune]" >&2
    exit 2
fi
command=$1
run=$2
shift 2

if [ -e "$run/config.json" ]; then
    exec fedray "$command" --resume "$run"
fi
exec fedray "$command" --out "$run" "$@"
