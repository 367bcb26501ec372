"""TRL's DPOTrainer on the pairs of an order (see `meter`)."""

import meter as meter_lib
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.utils import data as torch_data


def main() -> None:
  meter = meter_lib.Meter()
  order, sizes = meter.order, meter.order["model"]
  torch.manual_seed(0)
  torch.set_num_threads(order["threads"])
  config = transformers.Qwen3Config(
    **sizes,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    max_position_embeddings=8192,
  )
  policy = transformers.Qwen3ForCausalLM(config)
  reference = None
  if not order["is_reference_cached"]:
    reference = transformers.Qwen3ForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
  settings = dict(
    per_device_train_batch_size=order["microbatch_pairs"],
    gradient_accumulation_steps=order["pairs"] // order["microbatch_pairs"],
    max_length=None,
    precompute_ref_log_probs=order["is_reference_cached"],
    # Its default is True: less memory, more work.
    gradient_checkpointing=False,
    bf16=False,
    learning_rate=order["learning_rate"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    beta=order["beta"],
    loss_type=["sigmoid"],
  )
  arguments = trl.DPOConfig(
    output_dir=order["folder"],
    max_steps=meter.num_updates,
    use_cpu=True,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
    **settings,
  )
  rows = [
    dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
    for prompt, chosen, rejected in meter.pairs
  ]
  trainer = PairTrainer(
    model=policy,
    ref_model=reference,
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer(),
    callbacks=[Watch(meter)],
  )
  trainer.meter = meter
  trainer.train()
  meter.write(
    versions={
      "trl": trl.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
    settings=settings | {"attention": policy.config._attn_implementation},
  )


class PairTrainer(trl.DPOTrainer):
  """Takes token ids as they are, in their order."""

  def _prepare_dataset(self, dataset, *_, **__):
    return dataset

  def _get_train_sampler(self, *_, **__):
    return torch_data.SequentialSampler(self.train_dataset)

  def training_step(self, model, inputs, *args, **kwargs):
    self.meter.count_answer_tokens(inputs["completion_mask"].sum())
    return super().training_step(model, inputs, *args, **kwargs)


class Watch(transformers.TrainerCallback):
  """Tells the meter what happens, once the device has done it."""

  def __init__(self, meter, wait=lambda: None):
    self._meter, self._wait = meter, wait

  def on_step_end(self, *_, **__):
    self._wait()
    self._meter.end_update()

  def on_log(self, args, state, control, logs=None, **__):
    if logs and "loss" in logs:
      self._meter.add_loss(logs["loss"])


def tokenizer():
  """One that is never asked: everything comes as ids."""
  words = {"<eos>": 0, "<pad>": 1}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
    eos_token="<eos>",
    pad_token="<pad>",
  )


if __name__ == "__main__":
  main()
