#!/bin/sh
# The runs of the README's first table:
#
#     sh results/headline.sh PYTHON DATA RUNS     as in: python data/squad runs/headline
#
# Run it from the root. The model to start from is weights/minilm. After an interruption rerun the
# same command: what is finished is skipped.
set -e
python=$1
data=$2
runs=$3

run() {
  echo "+ python $*"
  "$python" "$@"
}
train() {
  run train_squad.py --data "$data" --questions 10000 --preset small "$@"
}

# The teacher is trained until it gains little: 2 epochs, then 4 more with itself as teacher.
train --init weights/minilm --epochs 2 --out "$runs/dense-2"
train --init "$runs/dense-2" --teacher "$runs/dense-2" --epochs 4 --out "$runs/dense-6"
teacher=$runs/dense-6

# Pruned, compacted, refilled. Beside the pruning the masks of its checkpoints are kept, for a
# picture of the heads going. What keeps them ends when the pruning has ended.
"$python" results/moments.py "$runs/hybrid-10" &
trap 'kill $! 2> /dev/null || true' EXIT
train --init "$teacher" --teacher "$teacher" --method hybrid --epochs 10 --score-lr 0.02 \
  --final-lambda 20 --checkpoint-every 120 --out "$runs/hybrid-10"
run compact.py "$runs/hybrid-10" --data "$data" --out "$runs/hybrid-10-compact"
train --init "$runs/hybrid-10-compact" --teacher "$teacher" --fill --epochs 4 \
  --out "$runs/hybrid-10-filled"

# The dense control: the same teacher, trained on for as many epochs.
train --init "$teacher" --teacher "$teacher" --epochs 10 --out "$runs/dense-16"
train --init "$runs/dense-16" --teacher "$teacher" --epochs 4 --warmup-steps 10 \
  --out "$runs/dense-20"

# The same shape, with heads and dimensions left at random, trained on for as many epochs.
run results/cut_to_shape.py "$teacher" "$runs/hybrid-10-compact" "$runs/random" random
train --init "$runs/random" --teacher "$teacher" --fill --epochs 10 --out "$runs/random-10"
train --init "$runs/random-10" --teacher "$teacher" --fill --epochs 4 --out "$runs/random-14"

# Once more with another seed: the questions stay, since the teacher has seen these.
questions="$runs/questions"
run results/questions.py "$data" "$questions" 10000 17
again() {
  run train_squad.py --data "$questions" --seed 18 --preset small --teacher "$teacher" "$@"
}
again --init "$teacher" --method hybrid --epochs 10 --score-lr 0.02 --final-lambda 20 \
  --out "$runs/hybrid-10-seed-18"
run compact.py "$runs/hybrid-10-seed-18" --data "$data" --out "$runs/hybrid-10-seed-18-compact"
again --init "$runs/hybrid-10-seed-18-compact" --fill --epochs 4 \
  --out "$runs/hybrid-10-seed-18-filled"

# The same shape, with the heads and dimensions of the largest weights, after 10 epochs.
run results/cut_to_shape.py "$teacher" "$runs/hybrid-10-compact" "$runs/magnitude" magnitude
train --init "$runs/magnitude" --teacher "$teacher" --fill --epochs 10 --out "$runs/magnitude-10"

run compact.py --compare "$runs/dense-6" "$runs/dense-20" "$runs/hybrid-10-compact" \
  "$runs/hybrid-10-filled" "$runs/random-14" --data "$data"
