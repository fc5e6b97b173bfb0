#!/bin/sh
# The runs behind tests/PROOF.md: `make proof`, or tests/proof.sh PYTHON. Hours on 2 cores; stopped at any
# moment, it goes on where it was: a finished run or result says so and ends.
# DATA holds sar_rgb_pairs, s1s2_scenes, flood_pairs, bigearthnet, eurosat_rgb, eurosat and resisc45
# (sources: PROOF.md). Says at each part what time it is.
set -eu
PYTHON=${1:-python}
DATA=${DATA:-../shared/data}
RUNS=runs/proof
RESULTS=results/proof
BIGEARTHNET="$DATA/bigearthnet/tiles.csv --s2-bands B02,B03,B04,B08 --s1-bands VV,VH"
GENTLE="--lr 0.03 --tau 0.99"
PLAIN="--blur 0,0 --erase 0"

say() {
    echo "== $(date '+%d %b %H:%M'): $*"
}

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
        --arch resnet18 --epochs 8 --seeds 5 --maps 6 --out "$RESULTS" "$@"
}

for seed in 0 1 2; do
    on_pairs "rs-byol-1-seed$seed" --mode single --seed $seed
    on_pairs "gentle-seed$seed" --mode single --seed $seed $GENTLE
    on_pairs "ms-only-seed$seed" --mode single --seed $seed --views ms-ms
done
on_pairs lr-alone --mode single --lr 0.03
on_pairs tau-alone --mode single --tau 0.99
on_pairs plain-seed0 --mode single $GENTLE $PLAIN --epochs 630
for seed in 1 2 3; do
    on_pairs "plain-seed$seed" --mode single --seed $seed $GENTLE $PLAIN --epochs 310
done
for seed in 0 1; do
    on_pairs "ms-only-plain-seed$seed" --mode single --seed $seed --views ms-ms $GENTLE $PLAIN --epochs 310
done
on_pairs gentle-long --mode single $GENTLE --epochs 310
on_pairs paper-long --mode single --epochs 150
on_pairs erasing-alone --mode single $GENTLE --blur 0,0 --epochs 150
on_pairs blur-alone --mode single $GENTLE --erase 0 --epochs 150
pretrain three --mode three --pairs $BIGEARTHNET $GENTLE --epochs 233
pretrain three-plain --mode three --pairs $BIGEARTHNET $GENTLE $PLAIN --epochs 630

# Is it the archive? MS only on EuroSAT's own images, unlabelled. pretrain.py reads TIFF.
mkdir -p "$RUNS/eurosat-tiff"
$PYTHON - "$DATA/eurosat_rgb" "$RUNS/eurosat-tiff" <<'END'
import pathlib, sys, numpy, tifffile, PIL.Image
photos, out = map(pathlib.Path, sys.argv[1:])
names = ["s1,s2"]
for photo in sorted(photos.glob("*/*.jpg")):
    name = photo.with_suffix(".tif").name
    tifffile.imwrite(out / name, numpy.asarray(PIL.Image.open(photo).convert("RGB")), photometric="rgb")
    names.append(f"{name},{name}")
(out / "pairs.csv").write_text("\n".join(names) + "\n")
END
on_eurosat() {
    pretrain "$@" --pairs "$RUNS/eurosat-tiff/pairs.csv" --s2-bands Red,Green,Blue --s1-bands VH,-,- --mode single \
        --views ms-ms $GENTLE --restart-epochs 5
}
on_eurosat eurosat --epochs 15
for seed in 0 1; do
    on_eurosat "eurosat-plain-seed$seed" --epochs 35 $PLAIN --crop-area 0.3 --seed $seed
done

# Varied places: 2,864 pairs of four archives, as 8-bit TIFFs of three bands and one. Band names are
# by decree: what is grey is repeated, VH is what each archive has of radar.
say "varied places"
mkdir -p "$RUNS/varied"
[ -e "$RUNS/varied/pairs.csv" ] || $PYTHON - "$DATA" "$RUNS/varied" <<'END'
import csv, pathlib, sys, bandcrop, numpy, tifffile, PIL.Image
data, out = map(pathlib.Path, sys.argv[1:])
def read(path, bands):
    if path.suffix == ".jpg":
        photo = PIL.Image.open(path).convert("RGB" if bands == 3 else "L")
        return numpy.atleast_3d(numpy.asarray(photo)).transpose(2, 0, 1)
    x = bandcrop.read(path)  # [bands, height, width]
    if path.parts[-3] == "bigearthnet":  # VH in dB; Red, Green, Blue of Blue, Green, Red, NIR
        x = (x[1:2] + 30) * 8 if bands == 1 else x[[2, 1, 0]] / 3000 * 255
        x = x.clip(0, 255).astype(numpy.uint8)
    return x
rows = ["s1,s2"]
for folder in ("sar_rgb_pairs", "s1s2_scenes", "flood_pairs", "bigearthnet"):
    table = data / folder / ("tiles.csv" if folder == "bigearthnet" else "pairs.csv")
    for i, row in enumerate(csv.DictReader(open(table))):
        names = [f"{folder}_{i:04d}_{sensor}.tif" for sensor in ("s1", "s2")]
        for name, sensor, bands in zip(names, ("s1", "s2"), (1, 3)):
            x = read(data / folder / row[sensor], bands)
            tifffile.imwrite(out / name, numpy.ascontiguousarray(x), photometric="minisblack",
                             planarconfig="separate" if bands == 3 else None)
        rows.append(",".join(names))
(out / "pairs.csv").write_text("\n".join(rows) + "\n")
END
on_varied() { # 89 steps an epoch, cycles of 10, 20, 40, 80 and 160 epochs
    name=$1 && shift
    pretrain "$name" --mode single --pairs "$RUNS/varied/pairs.csv" --s2-bands Red,Green,Blue --s1-bands VH \
        --recipe small --epochs 10 "$@"
}
for seed in 0 1 2; do
    on_varied "varied-seed$seed" --seed $seed --negatives 0 --epochs 150 # encoders at 10, 30, 70 and 150
    on_varied "negatives-seed$seed" --seed $seed --negatives 0.2 --epochs 310 # 2.5 hours with AVX-512
    on_varied "paper-seed$seed" --seed $seed --recipe paper --epochs 70
    on_varied "varied-ms-only-seed$seed" --seed $seed --negatives 0 --views ms-ms
    on_varied "varied-crops-seed$seed" --seed $seed --crop-area 0.25
    on_varied "varied-fast-seed$seed" --seed $seed --negatives 0 --lr 0.06
done
on_varied varied-lr --lr 0.1
on_varied varied-temperature --negatives 0.1
on_varied wide --size 128 --epochs 30 # at 128 pixels: 45 minutes
# Without s1s2_scenes, whose optical images are grey: MS and SAR against MS only
grep -v s1s2_scenes "$RUNS/varied/pairs.csv" >"$RUNS/varied/colour.csv"
on_colour() { # name, seed, views, then flags
    name=$1 seed=$2 views=$3 && shift 3
    pretrain "$name-seed$seed" --mode single --views $views --pairs "$RUNS/varied/colour.csv" \
        --s2-bands Red,Green,Blue --s1-bands VH --recipe small --seed $seed "$@"
}
for seed in 0 1 2; do
    for views in ms-sar ms-ms; do
        on_colour "colour-$views" $seed $views --epochs 24 --restart-epochs 24
    done
    on_colour colour-blurred $seed ms-ms --epochs 24 --restart-epochs 24 --blur 1,0.1 --erase 0.5
done
for seed in 0 1 2 3 4 5; do # the paper's claim
    for views in ms-sar ms-ms; do
        on_colour "claim-$views" $seed $views --epochs 150 # half an hour each
    done
done

RGB="--dataset eurosat-rgb --root $DATA/eurosat_rgb"
TEN="--dataset eurosat --root $DATA/eurosat"
BEST="$RUNS/plain-seed0/encoder-epoch0310.safetensors"

# The page: the encoder that learnt, on every data set, beside random and scratch; its recipe's others
# on the first, where analyze.py tests the four together.
for weights in random stats "$BEST --bn reestimate" "scratch --epochs 5"; do
    probe $RGB --band all --weights $weights
done
for seed in 1 2 3; do
    probe $RGB --band all --weights "$RUNS/plain-seed$seed/encoder.safetensors" --bn reestimate
done
for weights in random "$RUNS/three/encoder.safetensors --bn reestimate" \
    "$RUNS/three-plain/encoder.safetensors --bn reestimate" "scratch --epochs 5"; do
    probe $RGB --bands RGB --weights $weights
done
for weights in random stats "$BEST --bn reestimate" "scratch --epochs 50"; do
    probe $TEN --band all --weights $weights
done
for weights in random stats "$BEST --bn reestimate" "scratch --epochs 20"; do
    for size in 64 128; do
        probe --dataset resisc45 --root "$DATA/resisc45" --band Red --size $size --weights $weights
    done
done
for weights in random "$BEST" scratch; do
    segment --band all --weights $weights
done
$PYTHON analyze.py "$RESULTS" --runs "$RUNS" --out report/proof

# Varied places: README's table. Each encoder's features of EuroSAT's bands and of labelled scenes by each sensor, at
# two sizes, then tests/judge.py; and scores from few labels.
say "varied places: features"
JUDGED=results/proof-scores
$PYTHON tests/judge.py lists "$DATA" "$JUDGED"
embed() { # name, then flags
    name=$1 && shift
    for size in 64 128; do
        for column in Red Green Blue optical radar; do
            list=eurosat order=Red,Green,Blue band=$column
            case $column in optical) list=$column order=Red band=Red ;; radar) list=$column order=VH band=VH ;; esac
            for part in val test; do
                file="$JUDGED/$name@$size@$column@$part.npz"
                [ -e "$file" ] || $PYTHON probe.py --dataset csv --root "$JUDGED/$list-$part.csv" --bands-in-file $order \
                    --band $band --size $size --arch resnet18 --embed "$file" "$@"
            done
        done
    done
}
embed stats --weights stats
for size in 64 128; do $PYTHON tests/judge.py texture "$JUDGED" $size; done # a higher floor
embed random --weights random
embed random-bn --weights random --bn reestimate
embed wide --weights "$RUNS/wide/encoder.safetensors" --bn reestimate
for seed in 0 1 2; do
    for run in varied paper varied-ms-only varied-crops varied-fast negatives colour-ms-sar colour-ms-ms colour-blurred; do
        embed "$run-seed$seed" --weights "$RUNS/$run-seed$seed/encoder.safetensors" --bn reestimate
    done
    for at in varied:010 varied:030 varied:070 negatives:010 negatives:030 negatives:070 negatives:150; do
        run=${at%:*} epoch=${at#*:}
        embed "$run-epoch$epoch-seed$seed" --weights "$RUNS/$run-seed$seed/encoder-epoch0$epoch.safetensors" \
            --bn reestimate
    done
done
for seed in 0 1 2 3 4 5; do
    for run in claim-ms-sar claim-ms-ms; do
        embed "$run-seed$seed" --weights "$RUNS/$run-seed$seed/encoder.safetensors" --bn reestimate
        embed "$run-epoch070-seed$seed" --weights "$RUNS/$run-seed$seed/encoder-epoch0070.safetensors" --bn reestimate
    done
done
say "varied places: scores"
$PYTHON tests/judge.py table "$JUDGED"
for size in 64 128; do
    $PYTHON tests/judge.py versus "$JUDGED" $size negatives-epoch070 varied-epoch070 negatives-epoch150 varied \
        varied negatives-epoch070 varied varied-epoch070 negatives-epoch010 varied-epoch010 \
        varied-epoch010 varied-ms-only colour-ms-sar colour-ms-ms colour-ms-sar colour-blurred \
        claim-ms-sar claim-ms-ms claim-ms-sar-epoch070 claim-ms-ms-epoch070 \
        varied-fast varied-epoch010 negatives-epoch010 varied-fast
done
RESULTS=results/proof-other # data unlike the training pairs
for run in stats random varied-seed0 varied-seed1 varied-seed2 negatives-seed0 negatives-seed1 negatives-seed2; do
    weights=$run
    [ -d "$RUNS/$run" ] && weights="$RUNS/$run/encoder-epoch0070.safetensors --bn reestimate"
    probe --dataset resisc45 --root "$DATA/resisc45" --band Red --size 128 --head linear --weights $weights
    probe $TEN --band all --head linear --weights $weights
done
for run in stats random negatives-seed0 negatives-seed1 negatives-seed2; do # the paper's head, after 27,590 steps
    weights=$run
    [ -d "$RUNS/$run" ] && weights="$RUNS/$run/encoder.safetensors --bn reestimate"
    probe --dataset resisc45 --root "$DATA/resisc45" --band Red --size 128 --weights $weights
    probe $TEN --band all --weights $weights
    probe $RGB --band Red --weights $weights
    for few in "" "--train-images 50" "--train-images 200"; do
        probe $RGB --band Red --size 128 $few --weights $weights
    done
done
$PYTHON analyze.py "$RESULTS" --runs "$RUNS" --out report/proof-other
# probe.py's own table at 64 pixels: frozen, from scratch, fine-tuned; all labels and few
say "frozen, from scratch, fine-tuned"
RESULTS=results/proof-table
EARLY="$RUNS/negatives-seed0/encoder-epoch0070.safetensors"
LATE="$RUNS/negatives-seed0/encoder-epoch0310.safetensors"
for sensor in radar optical; do # the scenes that share no ground
    { cat "$JUDGED/$sensor-val.csv" && tail -n +2 "$JUDGED/$sensor-test.csv"; } >"$RUNS/scenes-$sensor.csv"
done
RADAR="--dataset csv --root $RUNS/scenes-radar.csv --bands-in-file VH --band VH --size 64"
OPTICAL="--dataset csv --root $RUNS/scenes-optical.csv --bands-in-file Red --band Red --size 64"
for weights in stats random "$EARLY --bn reestimate" "$LATE --bn reestimate"; do
    probe $RGB --band all --weights $weights
    probe $TEN --band all --weights $weights
    probe $TEN --band NIR --train-images 50 --weights $weights
    probe $RADAR --weights $weights
    probe $OPTICAL --weights $weights
    for labels in 50 200 1000; do
        probe $RGB --band Red --train-images $labels --weights $weights
    done
    for labels in 50 200; do
        probe $RADAR --train-images $labels --weights $weights
        probe $OPTICAL --train-images $labels --weights $weights
    done
done
for weights in scratch "$EARLY --finetune"; do
    probe $RGB --band Red --epochs 15 --weights $weights
done
FEW="$RGB --band Red --train-images 200 --seeds 2"
probe $FEW --weights scratch
for seed in 0 1 2; do
    for how in --finetune --bn=reestimate; do
        probe $FEW $how --weights "$RUNS/negatives-seed$seed/encoder-epoch0070.safetensors"
    done
done
for weights in scratch "$LATE --finetune"; do
    probe $RGB --band Red --epochs 60 --seeds 3 --weights $weights # 40 minutes a seed
    probe $RADAR --epochs 15 --weights $weights
    probe $OPTICAL --epochs 15 --weights $weights
done
$PYTHON analyze.py "$RESULTS" --runs "$RUNS" --out report/proof-table
RESULTS=results/proof-maps # longer than the eight epochs above, of three encoders
$PYTHON tests/judge.py maps "$DATA" # a floor
for run in random negatives-seed0 negatives-seed1 negatives-seed2; do
    weights=$run
    [ -d "$RUNS/$run" ] && weights="$RUNS/$run/encoder.safetensors"
    segment --band all --epochs 30 --seeds 2 --weights "$weights"
    segment --band all --epochs 30 --split random --seeds 5 --weights "$weights" # 40 minutes
done
segment --band all --epochs 30 --seeds 1 --weights scratch
# by radar, of encoders pre-trained with and without radar
for seed in 3 4 5; do
    for run in claim-ms-sar claim-ms-ms; do
        weights="$RUNS/$run-seed$seed/encoder-epoch0070.safetensors"
        for band in VV VH; do
            segment --band $band --epochs 30 --seeds 2 --weights "$weights"
            segment --band $band --epochs 30 --split random --seeds 3 --weights "$weights"
        done
    done
done
$PYTHON analyze.py "$RESULTS" --runs "$RUNS" --out report/proof-maps

# A page of its own for the settings, one change at a time.
RESULTS=results/proof-settings
for run in random rs-byol-1-seed0 gentle-seed0 ms-only-seed0; do
    weights=$run
    [ "$run" = random ] || weights="$RUNS/$run/encoder.safetensors"
    for bn in encoder reestimate; do
        probe $RGB --band all --weights "$weights" --bn $bn
    done
done
for run in rs-byol-1-seed1 rs-byol-1-seed2 gentle-seed1 gentle-seed2 ms-only-seed1 ms-only-seed2 \
    lr-alone tau-alone plain-seed0 plain-seed1 plain-seed2 plain-seed3 gentle-long \
    ms-only-plain-seed0 ms-only-plain-seed1 paper-long erasing-alone blur-alone \
    eurosat eurosat-plain-seed0 eurosat-plain-seed1; do
    probe $RGB --band Red --weights "$RUNS/$run/encoder.safetensors" --bn reestimate
done
# at the ends of earlier cycles
for early in plain-seed0/encoder-epoch0070 plain-seed0/encoder-epoch0150 plain-seed0/encoder-epoch0310 \
    plain-seed1/encoder-epoch0150 \
    gentle-long/encoder-epoch0150 eurosat-plain-seed0/encoder-epoch0015; do
    probe $RGB --band Red --weights "$RUNS/$early.safetensors" --bn reestimate
done
probe $RGB --band Red --weights "$BEST" --bn reestimate --stats encoder
$PYTHON analyze.py "$RESULTS" --out report/proof-settings
