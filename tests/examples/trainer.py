"""Fine-prune with the Trainer of the `transformers` package, Hybrid. The subclass is all it takes.

The masks are put on before the trainer is made. Then all is as usual: accumulation of gradients,
evaluation, checkpoints, resume_from_checkpoint. But load_best_model_at_end must not choose a
checkpoint from before τ was final.

A checkpoint holds W, scores and τ. To load it elsewhere, mask a fresh model in the same way, then
load_state_dict(). After bake() the model is an ordinary one for save_pretrained() and
from_pretrained().

The task is made up: which of four marks is in a sentence of 12 tokens? The model is small and
random; put from_pretrained("...") in its place. Needs `transformers` and `accelerate`.
"""
import copy
import tempfile

import torch
import transformers

from blockprune import (bake, density, mask_dimensions, mask_weight, parameter_groups, penalty,
                        set_threshold, threshold_schedule)


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


def tiny_bert():
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=12, num_labels=4)
    return transformers.BertForSequenceClassification(config)


def put_masks_on(model):
    """Mask a BERT as Hybrid does: blocks in attention, inner dimensions in the FFN."""
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        for linear in (attention.self.query, attention.self.key, attention.self.value,
                       attention.output.dense):
            mask_weight(linear, (8, 8), kind="attention")
        mask_dimensions(layer.intermediate.dense, layer.output.dense)
    return model


def sentences(n):
    """Tokens 4 to 39, and a mark 0 to 3 somewhere: the label."""
    ids = torch.randint(4, 40, (n, 12))
    labels = torch.randint(4, (n,))
    ids[torch.arange(n), torch.randint(12, (n,))] = labels
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]


def accuracy(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": right.mean().item()}


def main():
    transformers.set_seed(0)
    model = put_masks_on(tiny_bert())
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=200, per_device_train_batch_size=16, gradient_accumulation_steps=2,
            learning_rate=3e-3, warmup_steps=15, save_steps=100, logging_steps=100,
            report_to="none", disable_tqdm=True, use_cpu=True)
        trainer = PruningTrainer(model, args, train_dataset=sentences(4000),
                                 eval_dataset=sentences(500), compute_metrics=accuracy)
        # Large steps for a short run, and a small penalty for an easy task.
        trainer.score_lr = 5e-2
        trainer.final_lambda = 0.5
        trainer.train()
        right = trainer.evaluate()["eval_accuracy"]
        kept = density(model)

        # A copy with plain modules is saved; `model` could go on training.
        baked = bake(copy.deepcopy(model))
        baked.save_pretrained(folder)
        reloaded = transformers.BertForSequenceClassification.from_pretrained(folder)

    # All three compute the same.
    ids = torch.randint(40, (100, 12))
    with torch.no_grad():
        expected = model.eval()(ids).logits
        for other in (baked, reloaded):
            torch.testing.assert_close(other.eval()(ids).logits, expected, rtol=0, atol=0)
    print(f"accuracy {right:.3f}, kept of attention {kept['attention']:.2f}, "
          f"of the feed-forward layers {kept['ffn']:.2f}")
    return right, kept


if __name__ == "__main__":
    main()
