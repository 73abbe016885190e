#!/usr/bin/env bash
# What is too long for ci/test.sh, by name.
#
#   ci/long.sh side_by_side    beside PyTorch FSDP2 + PEFT: tokens/s, memory, losses, all cases (hours); options may
#                              follow, as --cases smollm2-2x512 --repeats 1
#   ci/long.sh losses          20 losses of both, side by side
#   ci/long.sh two_jobs        2 ranks beside two jobs of 1 rank at once
#   ci/long.sh ops             every operation beside the machine's peak (minutes); criterion's options may follow
#   ci/long.sh start           seconds from launch to the first step, both
#   ci/long.sh quickstart      the quickstart, which ends with its score
#   ci/long.sh readme          clones what is committed and runs every command of the README in it (half an hour)
#   ci/long.sh topologies      experts in every topology of up to 4 ranks, in every way to compute, against one rank
#   ci/long.sh memory          what check says of SmolLM2's memory, nine shapes, beside what its ranks take
#   ci/long.sh watchdog        a rank of 4 killed, and a rank stopped, at 20 moments each
#   ci/long.sh crashes         a rank killed at every failpoint of saves, loads and merges, each rank of worlds 1 and 2;
#                              and a server at each of its own
#   ci/long.sh kills           [N]: SIGKILLs at random times of one rank or of all, worlds 1 and 2 (100)
#   ci/long.sh power_cut       the power cut after every call to the file system of recorded runs, 1 and 2 ranks, in a
#                              model of a disk that keeps what fsync promised; options may follow, as --resumes 100
#   ci/long.sh signals         10 signals in each phase of a run, on one rank and on two
#   ci/long.sh full_disk       runs into a small tmpfs that fills up (root)
#   ci/long.sh stall           what a save keeps a step waiting: SmolLM2, and random values of Qwen2.5-1.5B's shapes;
#                              and what the agreement after each micro-batch costs
#   ci/long.sh hosts           two hosts (network namespaces) against one; and their cable cut (root, Open MPI)
#   ci/long.sh mpich           the tests of several ranks built and run with MPICH (Debian's, installed beside Open MPI)
#   ci/long.sh same_bits       BEFORE AFTER: two builds train the same models; results are compared bit for bit; --quick
#   ci/long.sh same_speed      BEFORE AFTER: two release builds in turns, tokens/s and memory beside each other (hour)
#   ci/long.sh schemathesis    requests made of the OpenAPI document, good and bad, to a server of SmolLM2: none is a
#                              5xx; schemathesis' options may follow, as --max-examples 200
#   ci/long.sh real_size       one bf16 step of a random model with the shapes of Qwen2.5-1.5B, on 2 ranks
#   ci/long.sh real_moe        the same with two layers of the shapes of Qwen3-30B-A3B, 64 experts on each rank
#   ci/long.sh load            [MINUTES]: 64 clients that train and 24 that sample ill-treat a server that is stopped
#                              twice and killed once (10, and as many to replay what they did)
#   ci/long.sh soak            [MINUTES]: 2 ranks that save and evaluate, packed rows and single ones: memory and files
#                              stay flat; then killed again and again (30)
#   ci/long.sh reshard         interrupted in every topology of up to 4 ranks, and resumed in every other
#   ci/long.sh examples        [NAME...]: configs/server/examples, each against one server of SmolLM2 on 2 ranks
#   ci/long.sh cookbook        [NAME...]: tinker-cookbook's sl_loop, killed and resumed, and rl_loop, against a server
#   ci/long.sh greedy          50 prompts in fp32, base and adapter: text and log-probabilities beside transformers and
#                              PEFT; options may follow, as --tokens 64
#   ci/long.sh sample          speed of sampling beside transformers, PEFT and its floors, and what it costs training
#   ci/long.sh qlora           quantised bases beside bf16 and PEFT + bitsandbytes: a layer, loading, a step of 1.5 B;
#                              --parts memory: Llama-2-7B's shapes in nf4 on 2 ranks, needs 14 GB of disk
#   ci/long.sh serve           throughput of the server beside PEFT, itself one adapter after another, and a local run
#   ci/long.sh fuzz            [TARGET...] [SECONDS]: libFuzzer with AddressSanitizer on the readers of outside bytes,
#                              all targets or those named, each so long (600)
#   ci/long.sh memcheck        [ROOM...]: unit tests of the rooms with unsafe code, or of rooms named as ops::cpu, with
#                              AddressSanitizer
#   ci/long.sh advisories      cargo-deny: advisories of the crates, with licences, bans and sources; needs the network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Makes models/smollm2 where it is missing.
smollm2() {
  [ -d models/smollm2 ] && return
  launch/setup.sh --no-tests
  .venv/bin/python launch/quickstart/convert_smollm2.py models/smollm2
}

# One thread a rank; ranks as root and more than cores, which Open MPI allows only when told.
tests_of_ranks() {
  export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
}

# A venv target/NAME that sees the packages of .venv, torch among them, and has those of its own that pip is told here.
client_venv() { # NAME PIP_ARGUMENTS...
  local venv=target/$1 want
  shift
  want="$* $(cat configs/server/examples/requirements.txt)"
  [ "$(cat "$venv/.installed" 2>/dev/null || true)" = "$want" ] && return
  .venv/bin/python -m venv --clear "$venv"
  purelib() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
  purelib "$PWD/.venv" >"$(purelib "$venv")/shared.pth"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "$@"
  echo "$want" >"$venv/.installed"
}

case "${1:-}" in
  side_by_side) shift; exec benches/side_by_side.sh "$@" ;;
  losses) shift; exec benches/side_by_side.sh --losses 20 "$@" ;;
  two_jobs) shift; exec benches/side_by_side.sh --two-jobs "$@" ;;
  ops) shift; launch/setup.sh --no-tests; exec cargo bench --bench ops -- "$@" ;;
  start) shift; exec benches/side_by_side.sh --start "$@" ;;
  quickstart) exec launch/quickstart.sh ;;
  readme)
    launch/setup.sh --no-tests
    exec cargo test --quiet --test all -- --ignored --nocapture readme::
    ;;
  topologies)
    launch/setup.sh --no-tests
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture every_topology_and_way
    ;;
  memory)
    launch/setup.sh
    smollm2
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture memory_of_every_shape
    ;;
  watchdog)
    launch/setup.sh --no-tests
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture --test-threads 1 watchdog::
    ;;
  crashes | kills)
    launch/setup.sh --no-tests
    tests_of_ranks
    test=mpi_every_instant_on_every_rank
    [ "$1" = crashes ] || test=mpi_kills_at_random_times
    XORL_KILLS=${2:-100} exec cargo test --quiet --test all -- --ignored --nocapture "$test"
    ;;
  power_cut)
    shift
    launch/setup.sh --no-tests
    command -v strace >/dev/null || apt-get install -y -qq strace >/dev/null
    cargo build --release --quiet
    binary=${CARGO_TARGET_DIR:-target}/release/xorl-dist
    for ranks in 1 2; do python3 ci/power_cut.py --binary "$binary" --ranks "$ranks" "$@"; done
    ;;
  signals)
    launch/setup.sh --no-tests
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture --test-threads 1 ten_signals
    ;;
  full_disk)
    launch/setup.sh --no-tests
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture a_full_disk_stops
    ;;
  stall)
    shift
    launch/setup.sh
    smollm2
    cargo build --release --quiet
    exec .venv/bin/python ci/stall.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" "$@"
    ;;
  hosts)
    launch/setup.sh --no-tests
    exec cargo test --quiet --test all -- --ignored --nocapture --test-threads 1 hosts::
    ;;
  mpich)
    launch/setup.sh
    command -v mpiexec.mpich >/dev/null || apt-get install -y -qq mpich libmpich-dev >/dev/null
    bin=$PWD/target/mpich/bin
    mkdir -p "$bin"
    for name in mpicc mpirun mpiexec; do ln -sfn "$(command -v $name.mpich)" "$bin/$name"; done
    # mpiexec looks for it where it was itself called.
    ln -sfn "$(command -v hydra_pmi_proxy)" "$bin/hydra_pmi_proxy"
    export PATH=$bin:$PATH CARGO_TARGET_DIR=$PWD/target/mpich OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    export XORL_ORACLE_PYTHON=${XORL_ORACLE_PYTHON:-$PWD/.venv/bin/python}
    cargo build --quiet --bins --examples
    "$CARGO_TARGET_DIR/debug/xorl-dist" --version | grep MPI
    # slurm's srun is Open MPI's here.
    # Its waiting ranks keep their cores.
    exec cargo nextest run --profile ci --test-threads 1 -E 'test(/(^|::)mpi_/) - test(/^slurm::/)'
    ;;
  same_bits)
    shift
    case " $* " in *' --quick '* | *' --help '*) ;; *) smollm2 ;; esac
    exec python3 ci/same_bits.py "$@"
    ;;
  same_speed)
    shift
    launch/setup.sh
    smollm2
    HF_HUB_OFFLINE=1 exec .venv/bin/python benches/same_speed.py "$@"
    ;;
  schemathesis)
    shift
    smollm2
    venv=target/schemathesis
    [ -x "$venv/bin/st" ] || { python3 -m venv "$venv" && "$venv/bin/pip" install --quiet schemathesis==4.32.5; }
    cargo build --release --quiet
    rm -rf outputs/schemathesis outputs/schemathesis.log
    mkdir -p outputs
    OMP_NUM_THREADS=1 "${CARGO_TARGET_DIR:-target}/release/xorl-dist" serve --device cpu \
      --config configs/server/smollm2_lora.yaml --server.model_path models/smollm2 \
      --server.tokenizer_path models/smollm2 --server.output_dir outputs/schemathesis --server.api_port 0 \
      2>outputs/schemathesis.log &
    server=$!
    trap 'kill "$server"' EXIT
    until address=$(grep -m 1 -o 'listening on http://[0-9.:]*[0-9]' outputs/schemathesis.log); do
      kill -0 "$server" || { cat outputs/schemathesis.log; exit 1; }
      sleep 1
    done
    "$venv/bin/st" run "${address#listening on }/openapi.json" --continue-on-failure \
      --checks not_a_server_error,content_type_conformance,response_schema_conformance "$@"
    ;;
  load)
    shift
    launch/setup.sh
    cargo build --release --quiet
    export OMPI_MCA_rmaps_base_oversubscribe=1 HF_HUB_OFFLINE=1
    exec .venv/bin/python ci/load.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" --minutes "${1:-10}"
    ;;
  soak)
    shift
    launch/setup.sh --no-tests
    cargo build --release --quiet
    OMPI_MCA_rmaps_base_oversubscribe=1 exec .venv/bin/python ci/soak.py \
      --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" --minutes "${1:-30}"
    ;;
  reshard)
    launch/setup.sh --no-tests
    tests_of_ranks
    exec cargo test --quiet --test all -- --ignored --nocapture every_topology_resumes
    ;;
  greedy)
    shift
    launch/setup.sh
    smollm2
    cargo build --release --quiet
    HF_HUB_OFFLINE=1 exec .venv/bin/python ci/greedy.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" "$@"
    ;;
  examples)
    shift
    launch/setup.sh
    smollm2
    client_venv clients -r configs/server/examples/requirements.txt
    cargo build --release --quiet
    exec target/clients/bin/python ci/examples.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" "$@"
    ;;
  cookbook)
    shift
    launch/setup.sh
    smollm2
    # The cookbook wants a version of tml-renderers that PyPI has not; only renderers of other models import it.
    client_venv cookbook tinker==0.38.0 chz datasets rich termcolor tqdm blobfile cloudpickle pillow pyrage aiohttp \
      tiktoken sympy pylatexenc math-verify
    target/cookbook/bin/pip install --quiet --disable-pip-version-check --no-deps tinker-cookbook==0.6.1
    cargo build --release --quiet
    exec target/cookbook/bin/python ci/cookbook.py --binary "${CARGO_TARGET_DIR:-target}/release/xorl-dist" "$@"
    ;;
  serve)
    shift
    launch/setup.sh
    smollm2
    cargo build --release --quiet
    binary=${CARGO_TARGET_DIR:-target}/release/xorl-dist
    HF_HUB_OFFLINE=1 exec .venv/bin/python benches/serve_throughput.py --model models/smollm2 --binary "$binary" "$@"
    ;;
  sample)
    shift
    launch/setup.sh
    smollm2
    cargo build --release --quiet
    binary=${CARGO_TARGET_DIR:-target}/release/xorl-dist
    HF_HUB_OFFLINE=1 exec .venv/bin/python benches/sample_throughput.py --model models/smollm2 --binary "$binary" "$@"
    ;;
  qlora)
    shift
    launch/setup.sh
    cargo build --release --quiet
    binary=${CARGO_TARGET_DIR:-target}/release/xorl-dist
    HF_HUB_OFFLINE=1 exec .venv/bin/python benches/quantised.py --binary "$binary" "$@"
    ;;
  real_size | real_moe)
    launch/setup.sh --no-tests
    cargo build --release --quiet
    rm -rf "outputs/$1"
    case $1 in real_size) model=qwen2_1_5b ;; *) model=qwen3_30b_a3b_2_layers ;; esac
    export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    mpirun -n 2 "${CARGO_TARGET_DIR:-target}/release/xorl-dist" --config "tests/fixtures/$model/run.yaml"
    cat "outputs/$1/metrics.jsonl"
    ;;
  fuzz) shift; exec tests/fuzz/run.sh "$@" ;;
  memcheck)
    shift
    launch/setup.sh --build-only
    # libtorch is not instrumented: leaks and double definitions in it are none of ours.
    export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:detect_container_overflow=0
    [ $# -gt 0 ] || set -- buffers:: checkpoint:: comm:: data::prepared device:: ops:: quant:: weights::
    # The sanitizer comes with the stable compiler, its flag does not.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_INCREMENTAL=0 OMP_NUM_THREADS=1 exec cargo test --quiet --lib \
      --target x86_64-unknown-linux-gnu --target-dir target/memcheck -- --test-threads 2 "$@"
    ;;
  advisories)
    command -v cargo-deny >/dev/null || cargo install --quiet --locked cargo-deny || { echo 'advisories: not run: cargo-deny could not be installed'; exit 1; }
    cargo deny check licenses bans sources
    cargo deny fetch db || { echo 'advisories: not run: the database is out of reach'; exit 1; }
    cargo deny check advisories
    ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
