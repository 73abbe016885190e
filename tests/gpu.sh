#!/usr/bin/env bash
# What only a machine with NVIDIA GPUs can show, as a table; "not run" where there is none. Ends with 1 if a row fails.
#
#   tests/gpu.sh                   a rank on each GPU of this machine
#   RANKS=2 tests/gpu.sh           two ranks; where they are more than GPUs they share them, which needs NCCL 2.30
#   (torch brings
#                                  2.29: name the folder of a newer one in LD_LIBRARY_PATH, and it in LD_PRELOAD)
#   ROWS='nccl|resume' tests/gpu.sh  the rows whose names begin so
#
# XORL_DIST=FILE takes that binary as it is. DEVICE=stand-in is for the test of this script: then a library of ours
# stands in for the driver and NCCL, and what needs a real GPU is not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-cuda}
gpus=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
ranks=${RANKS:-$gpus}
out=$(mktemp -d "${TMPDIR:-/tmp}/xorl-gpu.XXXXXX")
trap 'rm -rf "$out"' EXIT
python=$PWD/.venv/bin/python
failures=0

if [ "$gpus" -gt 0 ] && [ -z "${XORL_DIST:-}" ]; then
  launch/setup.sh
  cargo build --release --quiet
fi
program=${XORL_DIST:-${CARGO_TARGET_DIR:-target}/release/xorl-dist}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 HF_HUB_OFFLINE=1
if [ "$ranks" -gt "$gpus" ]; then
  # As few blocks of a GPU as can be, for a rank waits for another that has to get its turn on it.
  export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=1
fi

# row NEEDS NAME FUNCTION: a row of the table. NEEDS: gpu (a real one), one (device), several (ranks). What the function
# writes into $out/said is the row's result.
row() {
  local needs=$1 name=$2 result
  shift 2
  [[ "$name" =~ ^(${ROWS:-.*}) ]] || return 0
  if [ "$gpus" -lt 1 ] || { [ "$needs" = gpu ] && [ "$device" != cuda ]; } || { [ "$needs" = several ] && [ "$ranks" -lt 2 ]; }; then
    result='not run'
  elif echo 'see above' >"$out/said" && "$@"; then result=$(cat "$out/said")
  else failures=1 result="FAILED: $(cat "$out/said")"; fi
  printf '%-64s %s\n' "$name" "$result"
}

# train NAME RANKS DEVICE CONFIG [--section.field VALUE]...
train() {
  local name=$1 ranks=$2 where=$3 config=$4 launch=()
  shift 4
  [ "$ranks" = 1 ] || launch=(mpirun -n "$ranks")
  "${launch[@]}" "$program" --device "$where" --config "$config" --train.output_dir "$out/$name" --train.save_epochs 0 \
    --train.log_format structured "$@" >"$out/$name.log" 2>&1 || { cat "$out/$name.log" >&2; return 1; }
  # Slower is not what is to be shown.
  ! grep 'no kernels of our own' "$out/$name.log" >&2
}

# same A B TOLERANCE: the losses of two runs, relative
same() {
  python3 - "$out/$1" "$out/$2" "$3" >"$out/said" <<'P'
import json, sys
a, b = ([json.loads(line)['loss'] for line in open(f'{run}/metrics.jsonl')] for run in sys.argv[1:3])
apart = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
print(f'equal: {len(a)} losses at most {apart:.1e} apart, {sys.argv[3]} allowed')
sys.exit(not apart <= float(sys.argv[3]))
P
}

moe=configs/local/tiny_moe_lora.yaml
fp32=(--train.enable_mixed_precision false --train.max_steps 8)

experts_on_one() {
  train cpu 1 cpu "$moe" --train.expert_parallel_size 1 "${fp32[@]}" &&
    train gpu 1 "$device" "$moe" --train.expert_parallel_size 1 "${fp32[@]}" && same gpu cpu 1e-4
}
grouped_on_one() {
  local bf16=(--train.expert_parallel_size 1 --train.max_steps 8 --train.profile_steps 1)
  train cpu-grouped 1 cpu "$moe" "${bf16[@]}" && train gpu-grouped 1 cuda "$moe" "${bf16[@]}" || return
  grep -q linear.forward_at_once "$out"/gpu-grouped/trace/*/rank_0.txt || { echo 'one GEMM after the other' >"$out/said"; return 1; }
  same gpu-grouped cpu-grouped 5e-3
}
# Packs of documents of 1 to 700 tokens.
flash_on_one() {
  model
  python3 - >"$out/documents.jsonl" <<'P'
import json, random
random.seed(1)
for i in range(64):
    ids = [random.randrange(3, 40000) for _ in range(random.randrange(1, 700))]
    print(json.dumps({'input_ids': ids, 'labels': ids}))
P
  cat >"$out/flash.yaml" <<Y
model: {model_path: models/smollm2}
data: {datasets: [{path: $out/documents.jsonl, type: tokenized}], sample_packing_method: sequential, sample_packing_sequence_len: 2048}
train: {micro_batch_size: 1, max_steps: 4, lr: 1.0e-3}
Y
  train cpu-bf16 1 cpu "$out/flash.yaml" && train gpu-bf16 1 cuda "$out/flash.yaml" && same gpu-bf16 cpu-bf16 2e-3
}
# The pass over the head with 1 and 3 targets a token, against fp64.
losses_on_one() {
  XORL_TEST_DEVICE=cuda cargo test --release --quiet --test all the_pass_on_a_device >"$out/losses.log" 2>&1 ||
    { tail -20 "$out/losses.log" >&2; return 1; }
  echo 'equal: fp32 to 1e-5, bf16 to 5e-2 of fp64' >"$out/said"
}
# Matrices of every format, by the kernels and by libtorch, to the bit, and the rates of the kernels.
decoded_on_one() {
  cargo test --release --quiet --lib -- --ignored --nocapture gpu_gives_the_bits >"$out/decoded.log" 2>&1 ||
    { tail -20 "$out/decoded.log" >&2; return 1; }
  grep 'GB/s' "$out/decoded.log" | paste -sd ';' >"$out/said"
}
# A base in each packed format; on devices that the stand-in makes nf4 alone.
packed_on_one() {
  local format formats=(nf4 nvfp4 block_fp8) packed
  [ "$device" = cuda ] || formats=(nf4)
  for format in "${formats[@]}"; do
    packed=(--train.expert_parallel_size 1 --lora.enable_qlora true --lora.quant_format "$format")
    train "cpu-$format" 1 cpu "$moe" "${packed[@]}" "${fp32[@]}" &&
      train "gpu-$format" 1 "$device" "$moe" "${packed[@]}" "${fp32[@]}" && same "gpu-$format" "cpu-$format" 1e-4 || return
  done
}
# bf16: experts' matrices are decoded in one launch, and multiplied in one GEMM.
packed_on_one_grouped() {
  local format packed
  for format in nf4 nvfp4 block_fp8; do
    packed=(--train.expert_parallel_size 1 --train.max_steps 8 --lora.enable_qlora true --lora.quant_format "$format")
    train "cpu-bf16-$format" 1 cpu "$moe" "${packed[@]}" &&
      train "gpu-bf16-$format" 1 cuda "$moe" "${packed[@]}" && same "gpu-bf16-$format" "cpu-bf16-$format" 5e-3 || return
  done
}
# Packed bytes are what is gathered.
packed_over_nccl() {
  local packed=(--train.expert_parallel_size 1 --lora.enable_qlora true --lora.quant_format nf4)
  [ -e "$out/gpu-nf4/metrics.jsonl" ] || train gpu-nf4 1 "$device" "$moe" "${packed[@]}" "${fp32[@]}" || return
  train nccl-nf4 "$ranks" "$device" "$moe" "${packed[@]}" "${fp32[@]}" && same nccl-nf4 gpu-nf4 1e-5
}
over_nccl() { # EP
  [ $((ranks % $1)) = 0 ] || { echo "$ranks ranks cannot be dealt to $1" >"$out/said"; return; }
  [ -e "$out/gpu/metrics.jsonl" ] || train gpu 1 "$device" "$moe" --train.expert_parallel_size 1 "${fp32[@]}"
  train "nccl-$1" "$ranks" "$device" "$moe" --train.expert_parallel_size "$1" "${fp32[@]}" && same "nccl-$1" gpu 1e-5
}

# The grouped GEMM over rows of both ranks.
over_nccl_grouped() {
  if [ "$ranks" -lt 2 ] || [ $((ranks % 2)) != 0 ]; then echo 'not run' >"$out/said"; return 0; fi
  [ -e "$out/gpu-grouped/metrics.jsonl" ] || grouped_on_one || return
  train nccl-grouped "$ranks" cuda "$moe" --train.expert_parallel_size 2 --train.max_steps 8 --train.profile_steps 1 || return
  grep -q linear.forward_at_once "$out"/nccl-grouped/trace/*/rank_0.txt || { echo 'one GEMM after the other' >"$out/said"; return 1; }
  same nccl-grouped gpu-grouped 5e-3
}

# From step 4 of 8 again: the same bytes. On every rank, with experts over two or all of them.
resumed() {
  local run=weights/run again=(--train.expert_parallel_size $((ranks % 2 ? 1 : 2)) --train.save_steps 4 --train.max_steps 8)
  train whole "$ranks" "$device" "$moe" "${again[@]}" || return
  cp -r "$out/whole" "$out/again"
  rm -r "$out/again/$run/step_8"
  echo step_4 >"$out/again/$run/latest"
  train again "$ranks" "$device" "$moe" "${again[@]}" || return
  grep -q 'on from .*step_4' "$out/again.log" || { echo 'began anew' >"$out/said"; return 1; }
  local files file
  files=$(cd "$out/whole/$run/step_8" && find . -name '*.safetensors' -o -name '*.bin' | sort)
  [ -n "$files" ] || return
  for file in $files; do
    cmp "$out/whole/$run/step_8/$file" "$out/again/$run/step_8/$file" >"$out/said" || return
  done
  echo "equal: $(wc -l <<<"$files") files of step 8" >"$out/said"
}

# One rank is stopped in the middle: the others name it, and all are gone.
stopped() {
  local run begin took deadline=5
  train stopped "$ranks" "$device" "$moe" --train.expert_parallel_size 1 --train.num_train_epochs 100000 --train.comm_timeout_s "$deadline" \
    2>/dev/null &
  run=$!
  for _ in $(seq 120); do
    sleep 0.5
    [ "$(wc -l 2>/dev/null <"$out/stopped/metrics.jsonl" || echo 0)" -lt 3 ] || break
  done
  begin=$(date +%s)
  pkill -STOP -n -f "^$program .*$out/stopped" || { echo 'no rank to stop' >"$out/said"; pkill -f "$out/stopped"; return 1; }
  while kill -0 "$run" 2>/dev/null && [ $(($(date +%s) - begin)) -lt 60 ]; do sleep 0.5; done
  took=$(($(date +%s) - begin))
  echo "gone in $took s (deadline $deadline): $(grep -m1 '^error:' "$out/stopped.log" | cut -c1-70)" >"$out/said"
  if pkill -KILL -f "$out/stopped"; then echo "some were there after $took s" >"$out/said"; return 1; fi
  ! wait "$run" && [ "$took" -le $((deadline + 10)) ] && grep -q '^error: .*from rank [0-9]' "$out/stopped.log"
}

model() {
  [ -d models/smollm2 ] || "$python" launch/quickstart/convert_smollm2.py models/smollm2
}

generated() {
  model
  local where
  for where in cpu cuda; do
    "$program" generate --device "$where" --model models/smollm2 --dtype float32 --prompt 'The capital of France is' \
      --max-new-tokens 16 >"$out/generated-$where" 2>"$out/generate.log" || { cat "$out/generate.log" >&2; return 1; }
  done
  cmp "$out/generated-cpu" "$out/generated-cuda" >"$out/said" && echo 'equal: 16 tokens' >"$out/said"
}

# speed_config MODEL BATCH SEQUENCE [TARGETS]: $out/speed.yaml, over the rows of random_rows
speed_config() {
  cat >"$out/speed.yaml" <<Y
model: {model_path: $1}
data: {datasets: [{path: $out/rows.jsonl, type: tokenized}], sample_packing_method: none, max_seq_len: $3,
       shuffle_merged_datasets: false, shuffle_before_merging_datasets: false}
train: {micro_batch_size: $2, max_steps: 12}
lora: {lora_rank: 16, lora_alpha: 32, lora_target_modules: ${4:-null}}
Y
}

# random_rows COUNT LENGTH: ids as both read them
random_rows() {
  "$python" - "$out" "$1" "$2" <<'P'
import json, sys
import numpy
folder, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ids = numpy.random.default_rng(1).integers(3, 32000, (rows, length))
numpy.save(f'{folder}/rows.npy', ids)
with open(f'{folder}/rows.jsonl', 'w') as out:
    out.writelines(json.dumps({'input_ids': row, 'labels': row}) + '\n' for row in ids.tolist())
P
}

# What the device has in use beyond what was before, when its allocator has settled.
memory() {
  model
  random_rows 24 2048
  speed_config models/smollm2 8 2048
  rm -f "$out/memory.txt"
  local way
  for way in no_recompute recompute_full_layer; do
    "$program" check --device cuda --config "$out/speed.yaml" --train.gradient_checkpointing_method "$way" \
      --train.output_dir "$out/memory-$way" >"$out/check.log" || return
    train "memory-$way" 1 cuda "$out/speed.yaml" --train.gradient_checkpointing_method "$way" --train.max_steps 3 || return
    python3 - "$out" "$way" >>"$out/memory.txt" <<'P'
import json, re, sys
text = open(f'{sys.argv[1]}/check.log').read()
planned, before = (int(re.search(pattern, text)[1]) for pattern in (r'a rank needs (\d+) bytes of it', r'(\d+) in use'))
used = [json.loads(line)['device_memory_bytes'] for line in open(f'{sys.argv[1]}/memory-{sys.argv[2]}/metrics.jsonl')][-1] - before
print(f'{sys.argv[2]}: {used / 1e9:.2f} GB, {used / planned:.2f} of the plan')
# The driver and libtorch have their own, which is in no plan.
sys.exit(not 0.85 * planned < used < 1.15 * planned + 1e9)
P
    local fits=$?
    [ "$fits" = 0 ] || { cp "$out/memory.txt" "$out/said"; return 1; }
  done
  paste -sd ';' "$out/memory.txt" >"$out/said"
}

# beside_peer MODEL BATCH SEQUENCE [TARGETS]: FSDP2 + PEFT, eager and compiled, and ours, each of ours, from the same
# tokens. One rank a GPU.
beside_peer() {
  local rows=$((gpus * $2 * 12)) way log peers=0
  random_rows "$rows" "$3"
  rm -f "$out"/peer-*.json
  for way in --no-recompute '--no-recompute --compile'; do
    peers=$((peers + 1)) log="$out/peer-$peers"
    # shellcheck disable=SC2086 # a way is several words
    "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" benches/peer_fsdp2_peft.py --device cuda --model "$1" \
      --batch "$2" --seq "$3" --steps 12 --warmup 4 --tokens "$out/rows.npy" $way >"$log.json" 2>"$log.log" || tail -5 "$log.log" >&2
  done
  speed_config "$@"
  rm -rf "$out"/speed-*
  for way in recompute_full_layer selective no_recompute; do
    train "speed-$way" "$gpus" cuda "$out/speed.yaml" --train.gradient_checkpointing_method "$way" || return
  done
  python3 - "$out" >"$out/said" <<'P'
import glob, json, os, statistics, sys
peers = [json.loads(open(path).read().splitlines()[-1]) for path in sorted(glob.glob(f'{sys.argv[1]}/peer-*.json')) if os.path.getsize(path)]
ours = {}
for path in glob.glob(f'{sys.argv[1]}/speed-*/metrics.jsonl'):
    lines = [json.loads(line) for line in open(path)]
    ours[path.split('speed-')[1].split('/')[0]] = lines
speed = lambda lines: statistics.median(line['tokens_per_second'] for line in lines[4:])
memory = lambda lines: max(line['device_memory_bytes'] for line in lines) / 1e9
best = max(peers, key=lambda peer: peer['tokens_per_second'])
way = max(ours, key=lambda way: speed(ours[way]))
first = abs(ours[way][0]['loss'] - best['losses'][0]) / best['losses'][0]
print(f"peer {best['tokens_per_second']:.0f}, ours {speed(ours[way]):.0f} tokens/s: {speed(ours[way]) / best['tokens_per_second']:.2f} times; first losses {first:.1e} apart")
for peer in peers:
    print(f"  peer, recompute {peer['recompute']}, compile {peer['compiled']}: {peer['tokens_per_second']:.0f} tokens/s, {peer['peak_device_bytes'] / 1e9:.2f} GB")
for way, lines in ours.items():
    print(f'  ours, {way}: {speed(lines):.0f} tokens/s, {memory(lines):.2f} GB of the device in use')
P
}
small_beside_peer() { model && beside_peer models/smollm2 8 2048; }
# NAME of benches/random_model.py, and the rest of beside_peer's
random_beside_peer() {
  "$python" benches/random_model.py "$1" "$out/$1" >"$out/random.log" 2>&1 || { cat "$out/random.log" >&2; return 1; }
  beside_peer "$out/$1" "${@:2}"
}

# Each format beside bf16: tokens a second, and memory.
packed_speed() {
  [ -d "$out/$1" ] || "$python" benches/random_model.py "$1" "$out/$1" >"$out/random.log" 2>&1 || { cat "$out/random.log" >&2; return 1; }
  random_rows $((gpus * $2 * 12)) "$3"
  speed_config "$out/$1" "$2" "$3"
  rm -rf "$out"/speed-*
  local format
  train speed-bf16 "$gpus" cuda "$out/speed.yaml" || return
  for format in nf4 nvfp4 block_fp8; do
    train "speed-$format" "$gpus" cuda "$out/speed.yaml" --lora.enable_qlora true --lora.quant_format "$format" || return
  done
  python3 - "$out" >"$out/said" <<'P'
import json, statistics, sys
def seen(name):
    lines = [json.loads(line) for line in open(f'{sys.argv[1]}/speed-{name}/metrics.jsonl')]
    return statistics.median(line['tokens_per_second'] for line in lines[4:]), max(line['device_memory_bytes'] for line in lines) / 1e9
speed, memory = seen('bf16')
said = [f'bf16 {speed:.0f} tokens/s, {memory:.2f} GB']
for name in 'nf4', 'nvfp4', 'block_fp8':
    own, held = seen(name)
    said.append(f'{name} {own / speed:.2f} times, {held:.2f} GB')
print('; '.join(said))
P
}

# Three adapters and rows without one in a pass, dense and experts.
mixed_pass() {
  XORL_TEST_DEVICE=cuda cargo test --release --quiet --test all -- --ignored --nocapture gpu_adapters >"$out/mixed.log" 2>&1 ||
    { cat "$out/mixed.log" >&2; return 1; }
  echo 'losses, log-probabilities and gradients within 1e-5' >"$out/said"
}

row one 'experts on 1 GPU = on the CPU, fp32' experts_on_one
row gpu 'experts on 1 GPU = on the CPU, bf16, grouped GEMM' grouped_on_one
row gpu 'quantised matrices decoded on 1 GPU = on the CPU, to the bit' decoded_on_one
row one 'quantised bases on 1 GPU = on the CPU, fp32' packed_on_one
row gpu 'quantised bases on 1 GPU = on the CPU, bf16, grouped GEMM' packed_on_one_grouped
row gpu 'flash attention on 1 GPU = CPU: SmolLM2-135M, bf16, packs' flash_on_one
row gpu 'adapters of one pass on 1 GPU = each alone, fp32' mixed_pass
row gpu 'losses by token on 1 GPU = fp64: 1 and 3 targets a token' losses_on_one
row several "nccl: $ranks ranks on $gpus GPUs = 1 GPU, experts gathered, fp32" over_nccl 1
row several "nccl: $ranks ranks on $gpus GPUs = 1 GPU, experts over 2, fp32" over_nccl 2
row gpu "nccl: $ranks ranks on $gpus GPUs = 1 GPU, experts over 2, bf16" over_nccl_grouped
row several "nccl: $ranks ranks on $gpus GPUs = 1 GPU, nf4 gathered packed, fp32" packed_over_nccl
row one "resume at 4 of 8 on $ranks ranks = undisturbed, to the byte" resumed
row several "stopped rank of $ranks: named, communicators aborted" stopped
row gpu 'generate on 1 GPU = on the CPU: SmolLM2-135M, fp32' generated
row gpu 'memory of 1 GPU against the plan: SmolLM2-135M, 8x2048' memory
row gpu 'speed beside FSDP2 + PEFT: SmolLM2-135M, bf16, 8x2048 a rank' small_beside_peer
row gpu 'speed beside FSDP2 + PEFT: qwen3-2gb, bf16, 4x2048 a rank' random_beside_peer qwen3-2gb 4 2048
row gpu 'speed beside FSDP2 + PEFT: qwen3-moe-0.23b, bf16, 8x1024 a rank' random_beside_peer qwen3-moe-0.23b 8 1024 \
  '[q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj]'
row gpu 'speed beside FSDP2 + PEFT: qwen3-moe-2.8b, bf16, 4x1024 a rank' random_beside_peer qwen3-moe-2.8b 4 1024 \
  '[q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj]'
row gpu 'speed of quantised bases beside bf16: qwen3-2gb, 4x2048 a rank' packed_speed qwen3-2gb 4 2048
exit $failures
