#!/usr/bin/env bash
# What a cluster does, on one machine: two Ray nodes, one rank of the trainer on each, gradients averaged over gloo.
#
#     examples/ray_cluster/two_nodes.sh [KEY=VALUE ...]
#
# The words go to cod_train.verl_main. PYTHON, PORT and OUT (the training folder) may be set. It ends only what it started.
set -euo pipefail
python=${PYTHON:-python}
port=${PORT:-6399}
out=$(realpath -m "${OUT:-runs/two_nodes}")
# Nobody else can reach these nodes: they listen on the loopback.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}

# The CPU counts as a GPU, one for each rank. Of 6 CPUs verl reserves 3 for a rank.
node=(--block --node-ip-address=127.0.0.1 --num-cpus=6 --num-gpus=1 --object-store-memory=500000000 --disable-usage-stats)
started=()
trap 'kill "${started[@]}" 2>/dev/null || true; wait' EXIT

start() { # LOG, and what `ray start` takes
    local log=$1
    shift
    "$python" -m ray.scripts.scripts start "${node[@]}" "$@" >"$log" 2>&1 &
    started+=($!)
    until grep -q "Ray runtime started" "$log"; do
        kill -0 $! 2>/dev/null || { cat "$log" >&2; exit 1; }
        sleep 0.5
    done
}

mkdir -p "$out"
start "$out/head.log" --head --port="$port" --include-dashboard=false
start "$out/second.log" --address="127.0.0.1:$port"

"$python" -m cod_train.verl_main \
    ray_kwargs.ray_init.address="127.0.0.1:$port" trainer.nnodes=2 trainer.n_gpus_per_node=1 \
    "trainer.default_local_dir='$out'" "$@"
