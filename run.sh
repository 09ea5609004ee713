#!/usr/bin/env bash
# Trains SAM with an adapter. Edit the values below, or set them in the environment, or add flags:
#     NGPU=4 ./run.sh --lr 1e-4
#     NGPU=4 ./run.sh --config configs/NAME.yaml --data_root DIR
# With --config the file stands in for the values below, but not for what the environment sets.
# Nothing edited, it trains a small SAM on a small sample set, to show that everything works.
set -euo pipefail

ENVIRONMENT=" $(compgen -e | tr '\n' ' ') "
NGPU="${NGPU:-1}"                                  # processes on this machine, one per GPU
NNODES="${NNODES:-1}"                              # machines; the same line on each, but NODE_RANK,
NODE_RANK="${NODE_RANK:-0}"                        # which is 0 on the first, whose address is
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"            # this one, as the others reach it,
MASTER_PORT="${MASTER_PORT:-29500}"                # with a port that is free there
MAX_RESTARTS="${MAX_RESTARTS:-0}"                  # how often a crash is followed by a new start
MODEL_TYPE="${MODEL_TYPE:-vit_mini}"               # vit_b, vit_l, vit_h: the real ones
CHECKPOINT="${CHECKPOINT:-auto}"                   # checkpoints/sam_vit_b_01ec64.pth
ADAPTER="${ADAPTER:-sam_adapter}"                  # decoder, lora, conv_lora, adaptformer, ...
TRAIN_IMAGE_DIR="${TRAIN_IMAGE_DIR:-}"             # dataset/train/image   (empty: the sample set)
TRAIN_MASK_DIR="${TRAIN_MASK_DIR:-}"               # dataset/train/mask
VAL_IMAGE_DIR="${VAL_IMAGE_DIR:-}"                 # dataset/val/image
VAL_MASK_DIR="${VAL_MASK_DIR:-}"                   # dataset/val/mask
TEST_IMAGE_DIR="${TEST_IMAGE_DIR:-}"               # dataset/test/image    (may stay empty)
TEST_MASK_DIR="${TEST_MASK_DIR:-}"                 # dataset/test/mask
EPOCH="${EPOCH:-10}"
BATCH_SIZE="${BATCH_SIZE:-4}"                      # per process
LR="${LR:-2e-4}"
SEED="${SEED:-21}"
OUTPUT_DIR="${OUTPUT_DIR:-}"                       # empty: a new folder under checkpoints/

flags=()
for name in MODEL_TYPE CHECKPOINT ADAPTER TRAIN_IMAGE_DIR TRAIN_MASK_DIR VAL_IMAGE_DIR VAL_MASK_DIR \
    TEST_IMAGE_DIR TEST_MASK_DIR EPOCH BATCH_SIZE LR SEED OUTPUT_DIR; do
    case " $* " in *" --config "* | *" --config="*)
        case "$ENVIRONMENT" in *" $name "*) ;; *) continue ;; esac ;;
    esac
    flags+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")" "${!name}")
done

source "$(dirname "$0")/setup.sh"
nodes=(--standalone)
if [ "$NNODES" != 1 ]; then
    nodes=(--nnodes "$NNODES" --node_rank "$NODE_RANK")
    nodes+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
fi
exec "$PYTHON" code/torchrun.py "${nodes[@]}" --nproc_per_node "$NGPU" \
    --max_restarts "$MAX_RESTARTS" code/run_sa.py train ${flags[@]+"${flags[@]}"} "$@"
