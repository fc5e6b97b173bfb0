#!/bin/sh
# The runs behind README's "Does it learn?": `make proof`, or tests/proof.sh PYTHON. Hours on 2 cores; stopped at any
# moment, it goes on where it was: a finished run or result says so and ends.
# DATA holds sar_rgb_pairs, bigearthnet, eurosat_rgb, eurosat and resisc45 (README, "Does it learn?").
set -eu
PYTHON=${1:-python}
DATA=${DATA:-../shared/data}
RUNS=runs/proof
RESULTS=results/proof
BIGEARTHNET="$DATA/bigearthnet/tiles.csv --s2-bands B02,B03,B04,B08 --s1-bands VV,VH"
GENTLE="--lr 0.03 --tau 0.99"

pretrain() { # name, then flags
    name=$1
    shift
    $PYTHON pretrain.py --arch resnet18 --size 64 --epochs 70 --log-every 10 --resume --out "$RUNS/$name" "$@"
}

on_pairs() { # name, then flags
    pretrain "$@" --pairs "$DATA/sar_rgb_pairs/pairs.csv" --s2-bands Red,Green,Blue --s1-bands VH
}

probe() {
    $PYTHON probe.py --arch resnet18 --seeds 5 --out "$RESULTS" "$@"
}

segment() {
    $PYTHON segment.py --dataset csv --root $BIGEARTHNET --classes urban,crops,forest,shrub/grass,wetland,water \
        --band all --arch resnet18 --epochs 8 --seeds 3 --maps 6 --out "$RESULTS" "$@"
}

for seed in 0 1 2; do
    on_pairs "rs-byol-1-seed$seed" --mode single --seed $seed
    on_pairs "gentle-seed$seed" --mode single --seed $seed $GENTLE
done
on_pairs ms-only --mode single --views ms-ms
pretrain three --mode three --pairs $BIGEARTHNET $GENTLE

RGB="--dataset eurosat-rgb --root $DATA/eurosat_rgb"
for run in random rs-byol-1-seed0 gentle-seed0 ms-only; do
    weights=$run
    [ "$run" = random ] || weights="$RUNS/$run/encoder.safetensors"
    for bn in encoder reestimate; do
        probe $RGB --band all --weights "$weights" --bn $bn
    done
done
for run in rs-byol-1-seed1 rs-byol-1-seed2 gentle-seed1 gentle-seed2; do
    probe $RGB --band Red --weights "$RUNS/$run/encoder.safetensors" --bn reestimate
done
probe $RGB --band Red --weights scratch --epochs 5
probe $RGB --bands RGB --weights random
probe $RGB --bands RGB --weights "$RUNS/three/encoder.safetensors" --bn reestimate

ENCODER="$RUNS/gentle-seed0/encoder.safetensors"
for data in "eurosat --root $DATA/eurosat --band all" "resisc45 --root $DATA/resisc45 --band Red"; do
    probe --dataset $data --weights random
    probe --dataset $data --weights "$ENCODER" --bn reestimate
done
segment --weights random
segment --weights "$ENCODER" --bn reestimate
$PYTHON analyze.py "$RESULTS" --runs "$RUNS" --out report/proof
