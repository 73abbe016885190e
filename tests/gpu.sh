#!/usr/bin/env bash
# What only a machine with NVIDIA GPUs can show, as a table; "not run" where there is none. Ends with 1 if a row fails.
#
#   tests/gpu.sh            on all GPUs of this machine
#   GPUS=2 tests/gpu.sh     on two of them
#
# Rows: one GPU against the CPU, ranks over NCCL against one GPU, device memory against the plan of `check`, speed beside
# PyTorch FSDP2 + PEFT on the same GPUs. XORL_DIST=FILE takes that binary as it is. DEVICE=stand-in is for the test of this
# script: then a library of ours stands in for the driver and NCCL, and what needs a real GPU is not run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-cuda}
gpus=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
out=$(mktemp -d "${TMPDIR:-/tmp}/xorl-gpu.XXXXXX")
trap 'rm -rf "$out"' EXIT
python=$PWD/.venv/bin/python
failures=0

row() { printf '%-64s %s\n' "$1" "$2"; }
failed() { failures=1; row "$1" "FAILED: ${2:-see above}"; }

if [ "$gpus" -gt 0 ] && [ -z "${XORL_DIST:-}" ]; then
  launch/setup.sh
  cargo build --release --quiet
fi
program=${XORL_DIST:-${CARGO_TARGET_DIR:-target}/release/xorl-dist}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 HF_HUB_OFFLINE=1

# train NAME RANKS DEVICE CONFIG [--section.field VALUE]...
train() {
  local name=$1 ranks=$2 where=$3 config=$4 launch=()
  shift 4
  [ "$ranks" = 1 ] || launch=(mpirun -n "$ranks")
  "${launch[@]}" "$program" --device "$where" --config "$config" --train.output_dir "$out/$name" --train.save_epochs 0 \
    --train.log_format structured "$@" >"$out/$name.log" 2>&1 || { cat "$out/$name.log" >&2; return 1; }
}

# same NAME A B TOLERANCE: the losses of two runs, relative
same() {
  python3 - "$out/$2" "$out/$3" "$4" <<'P' && row "$1" "equal: $(cat "$out/apart")" || failed "$1" "$(cat "$out/apart")"
import json, sys
a, b = ([json.loads(line)['loss'] for line in open(f'{run}/metrics.jsonl')] for run in sys.argv[1:3])
apart = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
open(f'{sys.argv[1]}/../apart', 'w').write(f'{len(a)} losses at most {apart:.1e} apart, {sys.argv[3]} allowed')
sys.exit(not apart <= float(sys.argv[3]))
P
}

moe=configs/local/tiny_moe_lora.yaml
dense=tests/fixtures/qwen2_1_5b/run.yaml
fp32=(--train.enable_mixed_precision false --train.max_steps 8)

name='1 GPU = CPU: mixture of experts, fp32'
if [ "$gpus" -lt 1 ]; then row "$name" 'not run'
elif train cpu 1 cpu $moe --train.expert_parallel_size 1 "${fp32[@]}" &&
  train gpu 1 "$device" $moe --train.expert_parallel_size 1 "${fp32[@]}"; then same "$name" gpu cpu 1e-4
else failed "$name"; fi

name='1 GPU = CPU: Qwen2.5-1.5B, bf16, flash attention'
if [ "$gpus" -lt 1 ] || [ "$device" != cuda ]; then row "$name" 'not run'
elif train cpu-bf16 1 cpu $dense --train.max_steps 2 && train gpu-bf16 1 cuda $dense --train.max_steps 2; then
  same "$name" gpu-bf16 cpu-bf16 2e-2
else failed "$name"; fi

for ep in 1 2; do
  name="$gpus GPUs over NCCL = 1 GPU: experts over $ep, fp32"
  if [ "$gpus" -lt 2 ] || [ $((gpus % ep)) != 0 ]; then row "${name/#[01] GPUs/GPUs}" 'not run'
  elif train "gpus-$ep" "$gpus" "$device" $moe --train.expert_parallel_size $ep "${fp32[@]}"; then same "$name" "gpus-$ep" gpu 1e-5
  else failed "$name"; fi
done

name='device memory against the plan: Qwen2.5-1.5B, 1 GPU'
if [ "$gpus" -lt 1 ] || [ "$device" != cuda ]; then row "$name" 'not run'
elif "$program" check --device cuda --config $dense --train.output_dir "$out/memory" >"$out/check.log" &&
  train memory 1 cuda $dense --train.max_steps 3; then
  python3 - "$out" <<'P' >"$out/memory.txt"
import json, re, sys
text = open(f'{sys.argv[1]}/check.log').read()
planned, before = (int(re.search(pattern, text)[1]) for pattern in (r'a rank needs (\d+) bytes of it', r'(\d+) in use'))
used = [json.loads(line)['device_memory_bytes'] for line in open(f'{sys.argv[1]}/memory/metrics.jsonl')][-1] - before
print(f'{used} bytes, {used / planned:.2f} of the plan')
P
  row "$name" "$(cat "$out/memory.txt")"
else failed "$name"; fi

name='tokens/s beside FSDP2 + PEFT: SmolLM2-135M, bf16, 8x2048 a rank'
if [ "$gpus" -lt 1 ] || [ "$device" != cuda ]; then row "$name" 'not run'
else
  [ -d models/smollm2 ] || "$python" launch/quickstart/convert_smollm2.py models/smollm2
  "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" benches/peer_fsdp2_peft.py --device cuda --model models/smollm2 \
    --batch 8 --seq 2048 --steps 12 --warmup 4 >"$out/peer.json" 2>"$out/peer.log" || cat "$out/peer.log" >&2
  rows=$((gpus * 8 * 12))
  python3 -c "
import json, random
for _ in range($rows):
    ids = [random.randrange(3, 40000) for _ in range(2048)]
    print(json.dumps({'input_ids': ids, 'labels': ids}))" >"$out/rows.jsonl"
  cat >"$out/speed.yaml" <<Y
model: {model_path: $PWD/models/smollm2}
data: {datasets: [{path: $out/rows.jsonl, type: tokenized}], sample_packing_method: none, max_seq_len: 2048}
train: {micro_batch_size: 8}
Y
  if train speed "$gpus" cuda "$out/speed.yaml" --train.max_steps 12; then
    python3 - "$out" <<'P' >"$out/speed.txt" && row "$name" "$(cat "$out/speed.txt")" || failed "$name"
import json, statistics, sys
peer = json.loads(open(f'{sys.argv[1]}/peer.json').read().splitlines()[-1])['tokens_per_second']
steps = [json.loads(line)['tokens_per_second'] for line in open(f'{sys.argv[1]}/speed/metrics.jsonl')]
ours = statistics.median(steps[4:])
print(f'peer {peer:.0f}, ours {ours:.0f}: {ours / peer:.2f} times')
P
  else failed "$name"; fi
fi
exit $failures
