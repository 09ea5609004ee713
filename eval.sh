#!/usr/bin/env bash
# Scores a trained run beside the untuned SAM. The run's file knows its adapter, model, size and
# prompt. Edit the values below, or set them in the environment, or add flags:
#     RUN=checkpoints/my_run ./eval.sh --save_predictions
set -euo pipefail

NGPU="${NGPU:-1}"                                  # processes on this machine, one per GPU
RUN="${RUN:-}"                                     # empty: the newest run under checkpoints/
TEST_IMAGE_DIR="${TEST_IMAGE_DIR:-}"               # empty: those that the run was given
TEST_MASK_DIR="${TEST_MASK_DIR:-}"
BATCH_SIZE="${BATCH_SIZE:-4}"                      # per process

source "$(dirname "$0")/setup.sh"
exec "$PYTHON" code/torchrun.py --standalone --nproc_per_node "$NGPU" code/run_sa.py evaluate \
    --run_dir "$RUN" --test_image_dir "$TEST_IMAGE_DIR" --test_mask_dir "$TEST_MASK_DIR" \
    --batch_size "$BATCH_SIZE" "$@"
