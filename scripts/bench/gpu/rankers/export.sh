#!/usr/bin/env bash
# export.sh FOLDER: programs of scripts/bench/gpu/rankers.py, made where MindSpore is. Names given after FOLDER choose some.
set -eu
FOLDER=$1; shift
OWN=scripts/bench/gpu/rankers
export_one() {  # name config graphs keys...
    local name=$1 config=$2 graphs=$3; shift 3
    python -m parallel export --config "$config" --graphs "$graphs" --output "$FOLDER/$name" "$@" || echo "$name failed" >&2
}
wanted() { [ $# -lt 2 ] || case " ${*:2} " in *" $1 "*) ;; *) return 1 ;; esac; }
for type in bf16 fp16; do
    for size in 1b 100m; do
        wanted "rankmixer_${size}_$type" "$@" && export_one "rankmixer_${size}_$type" "configs/recsys/rankmixer_$size.yaml" \
            scores_512 "train.precision=$type" "serve.engine.candidates=[512]"
    done
done
SERVED="train.precision=bf16 serve.engine.requests=1 serve.engine.candidates=[100,500,1000]"
for model in rankmixer_1b tokenmixer_500m; do
    wanted "ug_$model" "$@" && export_one "ug_$model" $OWN/ug_$model.yaml scores_100,scores_500,scores_1000 $SERVED
    for ratio in 1:1 1:2 3:1; do
        name=ug_${model}_${ratio/:/_}
        wanted "$name" "$@" && export_one "$name" $OWN/ug_$model.yaml user_1,candidates_100,candidates_500,candidates_1000,request_100,request_500,request_1000 \
            $SERVED "model.ug_sep={ratio: \"$ratio\"}"
    done
done
TRAINED="train.precision=bf16 parallel.devices=null train.data_sink=false"
wanted train_500m "$@" && export_one train_500m $OWN/train_500m.yaml step $TRAINED
wanted train_4b "$@" && export_one train_4b $OWN/train_4b.yaml step $TRAINED
wanted train_7b "$@" && export_one train_7b $OWN/train_7b.yaml step $TRAINED
wanted train_7b_recompute "$@" && export_one train_7b_recompute $OWN/train_7b.yaml step $TRAINED parallel.recompute.policy=full
wanted train_500m_moe "$@" && export_one train_500m_moe $OWN/train_500m.yaml step $TRAINED model.ratio=2.0833333 \
    "model.moe={experts: 8, active: 4, dispatch: capacity, capacity_factor: 1.0}"
for sharded in tokens tokens_naive width; do
    wanted train_500m_$sharded "$@" && export_one train_500m_$sharded $OWN/train_500m.yaml step $TRAINED parallel.op=2 \
        model.op_sharding=$sharded
done
exit 0
