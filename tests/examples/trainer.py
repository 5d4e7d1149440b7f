"""Prune with the Trainer of `transformers`, on one process or several. Needs `accelerate` too.

    python tests/examples/trainer.py
    torchrun --nproc_per_node=2 tests/examples/trainer.py     # on GPUs also accelerate launch

The subclass is all it takes. Put the masks on before the trainer is made. Then all is as usual:
accumulation of gradients, evaluation, checkpoints, resume_from_checkpoint, several GPUs. But do not
let load_best_model_at_end choose a checkpoint from before τ was final.

A checkpoint holds W, scores and τ. To load it elsewhere, mask a fresh model in the same way, then
load_state_dict(). What to do after the training is in huggingface.py.
"""
import sys
sys.path.append(sys.path[0] + "/../..")     # the folder of blockprune.py

import tempfile

import transformers

from blockprune import density, parameter_groups, penalty, set_threshold, threshold_schedule
from common import sentences
from huggingface import make_bert, mask_bert


class PruningTrainer(transformers.Trainer):
    score_lr = 1e-2         # peak rate of the scores; schedule and clip are those of the weights
    final_tau = 0.1
    final_lambda = 20.0     # to be found for each model: the higher, the less is kept
    flat_start = 0.05       # the share of the run in which τ is 0
    flat_end = 0.5          # the share in which τ is final

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.model, self.args.learning_rate, self.score_lr,
                                      self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step, total = self.state.global_step, self.state.max_steps
        tau = threshold_schedule(step, total, self.flat_start * total, self.flat_end * total,
                                 self.final_tau)
        set_threshold(model, tau)
        # Means over this batch: num_items_in_batch stays here, as not every model makes use of it.
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss + self.final_lambda * tau / self.final_tau * penalty(model)
        # A step's loss is the mean of its batches. Without num_items_in_batch the Trainer divides.
        if num_items_in_batch is not None:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args, **kwargs):     # of evaluate() and predict()
        set_threshold(self.model, self.final_tau)   # the next step of training sets its own again
        return super().evaluation_loop(*args, **kwargs)


def rows(n):
    """The task as the Trainer wants it, a list of dictionaries."""
    return [{"input_ids": ids, "labels": label} for ids, label in zip(*sentences(n))]


def main():
    transformers.set_seed(0)
    model = make_bert()
    mask_bert(model)
    with tempfile.TemporaryDirectory() as folder:
        # Leave use_cpu out where there are GPUs.
        args = transformers.TrainingArguments(
            folder, max_steps=200, per_device_train_batch_size=16, learning_rate=1e-3,
            warmup_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        trainer = PruningTrainer(model, args, train_dataset=rows(4000))
        # Large steps for a short run, and a small penalty for an easy task.
        trainer.score_lr = 5e-2
        trainer.final_lambda = 0.7
        trainer.train()
        prediction = trainer.predict(rows(500))
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    kept = density(model)
    if trainer.is_world_process_zero():
        print(f"processes: {args.world_size}, accuracy: {right.mean():.3f}")
        print(f"kept: {kept['attention']:.2f} of attention, {kept['ffn']:.2f} of the FFN")


if __name__ == "__main__":
    main()
